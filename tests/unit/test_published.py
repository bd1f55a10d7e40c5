"""What readers see first comes from the committed reference run, byte for byte."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from invdpo.config import TrainingConfig, load_study
from invdpo.evidence.claims import summary
from invdpo.evidence.ledger import load_claims, read_verdicts
from invdpo.evidence.publish import figures_folder, verdicts_block
from invdpo.evidence.statistics import paired_difference
from invdpo.provenance import sha256_file

REFERENCE = Path("results/reference/shapes")
STUDIES = sorted(path.parent.name for path in REFERENCE.parent.glob("*/provenance.json"))


def test_the_readmes_verdicts_are_those_of_the_reference_run() -> None:
    block = verdicts_block(Path("README.md").read_text(), "shapes")
    assert block.strip() == summary(read_verdicts(REFERENCE / "claims.json")).strip()


# Row of the table of the other methods -> the arms that it gives numbers of.
OTHER_METHODS = {
    "SmPO": ["smpo"],
    "Diffusion-DPO": ["diffusion_dpo"],
    "Diffusion-NPO": ["diffusion_npo"],
    "DDIM-InPO": ["ddim_inpo"],
    "Eq. 11 of Inversion-DPO, without its step to Eq. 16": ["inversion_dpo_exact"],
    "Diffusion-KTO": ["diffusion_kto"],
    "MaPO, SFT": ["mapo", "sft"],
    "DSPO": ["dspo"],
    "DPO on the true log-ratio, 48 pairs a run": ["likelihood_dpo"],
    "Eq. 16 with DPO's sign, fp16 start": ["inversion_dpo_minus_rounded"],
    "Eq. 16 as printed, same values": ["inversion_dpo_paper_as_minus"],
}
MEAN_CORRELATION = re.compile(
    r"mean rank correlation is ([\d.]+) for the implied noise on inverted points, ([\d.]+) for Diffusion-DPO's mean "
    r"of eight draws, ([\d.]+) for Eq. 11 and ([\d.]+) for Eq. 16 with DPO's sign, and at most ([\d.]+) for any of "
    r"them on the policies that DPO on the true log-ratio made"
)


OTHERS = Path("docs/other_methods.md")


def others() -> str:
    """The page of the other methods on one line."""
    return " ".join(OTHERS.read_text().split())


def is_printed(text: str, value: float) -> bool:
    """Whether a number in print is that value, to the decimals that are printed."""
    return abs(float(text) - value) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)


def rows_of(table: str, **wanted: str) -> list[dict[str, str]]:
    """The rows of a csv file of the other methods' study with those values."""
    with (REFERENCE.parent / "shapes_methods/tables" / f"{table}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def difference(labels: str, arm: str, column: str) -> list[float]:
    """A difference of the hidden utility in the other methods' controls, with its interval."""
    (row,) = rows_of("controls", method=arm, labels=labels, scorer="oracle_utility")
    return [float(row[f"{column}{end}"]) for end in ("", "_low", "_high")]


def test_the_other_methods_are_those_of_the_reference_run() -> None:
    table = OTHERS.read_text().split("true labels minus shuffled |\n")[1].split("\n\n")[0]
    rows = {cells[0]: cells[1:] for line in table.splitlines()[1:] if (cells := line.strip("| ").split(" | "))}
    assert set(rows) == set(OTHER_METHODS)
    for name, (gains, margins) in rows.items():
        arms = OTHER_METHODS[name]
        measured = [value for arm in arms for value in difference("true", arm, "minus_base")]
        measured += [value for arm in arms for value in difference("shuffled", arm, "true_minus_control")]
        printed = re.findall(r"[-+][\d.]+", f"{gains} {margins}")
        assert len(printed) == len(measured)
        for text, value in zip(printed, measured, strict=True):
            assert is_printed(text, value), (name, text, value)


def test_the_other_methods_correlations_are_those_of_the_reference_run() -> None:
    def correlations(**wanted: str) -> list[float]:
        rows = rows_of("precision", **wanted)
        return [float(row["spearman"]) for row in rows if row["recipe"] != "likelihood_dpo"]  # the truth itself

    recipes = ["inversion_dpo_implied", "diffusion_dpo", "inversion_dpo_exact", "inversion_dpo_minus"]
    draws = {"diffusion_dpo": "8"}
    by_recipe = [correlations(recipe=recipe, draws=draws.get(recipe, "1")) for recipe in recipes]
    assert {len(values) for values in by_recipe} == {7}, "policies"
    measured = [sum(values) / len(values) for values in by_recipe] + [max(correlations(arm="likelihood_dpo"))]
    found = MEAN_CORRELATION.search(others())
    assert found is not None
    for text, value in zip(found.groups(), measured, strict=True):
        assert is_printed(text, value), (text, value)


def test_the_rewards_are_those_of_the_reference_run() -> None:
    """Every cell of the page's table is a row of the study's ledger."""
    verdicts = read_verdicts(REFERENCE.parent / "shapes_rewards" / "claims.json")
    rows = {(row.id, row.variant): row for row in verdicts}
    columns = ["mean_above_base_sg_iou", "labels_of_the_mean_matter", "mean_above_dpg_sg_iou"]
    columns += ["mean_above_compbench_sg_iou", "all_pairs_above_fixed_sg_iou"]
    table = Path("docs/rewards.md").read_text().split("all pairs minus fixed |\n")[1].split("\n\n")[0]
    lines = table.splitlines()[1:]
    methods = ("diffusion_dpo", "inversion_dpo_implied", "inversion_dpo_code")
    for method, line in zip(methods, lines, strict=True):
        measured = [rows[column, method] for column in columns]
        wanted = [value for row in measured for value in (row.value, row.low, row.high)]
        for text, value in zip(re.findall(r"[-+]\d\.\d+", line), wanted, strict=True):
            assert value is not None and is_printed(text, value), (method, text, value)
    contrasts = {row.verdict for row in verdicts if "_above_" in row.id and "_base_" not in row.id}
    assert contrasts == {"inconclusive"}, "nothing is told apart"


def test_the_readmes_words_are_those_of_the_ledger() -> None:
    """What README says in words, without a number; its numbers are in test_readme.py."""
    rows = {(row.id, row.variant): row for row in read_verdicts(REFERENCE / "claims.json")}
    faster = [row for (claim, _), row in rows.items() if claim.startswith(("twice_as_fast", "four_times_as_fast"))]
    assert {row.verdict for row in faster if row.verdict != "not run"} == {"not supported"}, "none is faster"
    assert {row.value for row in faster if row.value is not None} == {0}, "none reaches it"
    for variant in ("inversion_dpo_paper", "inversion_dpo_paper_rounded", "inversion_dpo_code"):
        assert rows["labels_matter", variant].verdict == "inconclusive", "ends alike within the intervals"
    implied = "inversion_dpo_implied"
    assert rows["labels_matter", implied].verdict == "supported"
    assert rows["pickscore_above_diffusion_dpo", implied].verdict == "not supported", "below it on PickScore"
    assert rows["primary_above_diffusion_dpo", implied].verdict == "inconclusive", "not told from it on the utility"
    assert rows["more_inversion_steps_primary", implied].verdict == "inconclusive", "open"
    assert rows["released_learning_rate_moves_the_score", "inversion_dpo_code"].verdict == "inconclusive", "no gain"
    fid = [rows[claim, implied].verdict for claim in ("fid_below_base", "fid_below_base_laionsg")]
    assert fid == ["inconclusive", "supported"], "FID answers by its preparation"


@pytest.mark.parametrize("study", STUDIES)
def test_no_published_file_was_touched(study: str) -> None:
    reference = REFERENCE.parent / study
    listed = json.loads((reference / "provenance.json").read_text())["files"]
    assert listed == {name: sha256_file(reference / name) for name in listed}
    figures = figures_folder(Path("."), study)
    shown = [path for path in figures.iterdir() if path.is_file()]
    assert {path.name for path in shown} == {
        Path(name).name for name in listed if name.startswith(("tables/", "figures/"))
    }
    for path in shown:
        part = "tables" if path.suffix in (".csv", ".md", ".tex") else "figures"
        assert sha256_file(path) == listed[f"{part}/{path.name}"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_is_judged_and_none_by_another_rule(name: str) -> None:
    judged = {row.id: row.test for row in read_verdicts(REFERENCE.parent / name / "claims.json")}
    claims = load_claims(Path(load_study(f"config/{name}.yaml").claims or ""))
    assert set(judged) == {claim.id for claim in claims}
    for claim in claims:
        assert judged[claim.id]["kind"] == claim.test.kind
        assert judged[claim.id]["threshold"] == claim.test.threshold


@pytest.mark.parametrize("name", STUDIES)
def test_the_reference_run_used_the_committed_study(name: str) -> None:
    study = load_study(f"config/{name}.yaml")
    folder = REFERENCE.parent / name / "runs"
    assert {path.name for path in folder.iterdir()} == set(study.arms)
    for arm_name in study.arms:
        runs = {path.parent.name: json.loads(path.read_text()) for path in (folder / arm_name).glob("*/run.json")}
        assert set(runs) == {f"seed{seed}" for seed in study.seeds}
        arm = study.arm(arm_name)
        for run in runs.values():
            assert not run["git_dirty"]
            assert (run["method"], run["labels"]) == (arm.method, arm.labels)
            if arm.trains:
                later = TrainingConfig.model_validate(run["training"])  # settings that came later, as they were then
                assert later == arm.training
                assert run["recipe"] == arm.recipe.model_dump(mode="json")
                assert run["learning_rate"] == arm.learning_rate


@pytest.mark.parametrize("baseline", ["base", "diffusion_dpo_shuffled"])
def test_diffusion_dpo_has_learnt_a_preference(baseline: str) -> None:
    """The study's own sanity check, recomputed from the published scores of single images."""

    def utility(arm: str) -> pd.DataFrame:
        parts = [pd.read_parquet(path) for path in sorted((REFERENCE / "scores" / arm).glob("*.parquet"))]
        rows = pd.concat(parts, ignore_index=True)
        last = rows[(rows["scorer"] == "oracle_utility") & (rows["step"] == rows["step"].max())]
        return last.pivot(index="seed", columns="prompt_id", values="score")

    interval = paired_difference(utility("diffusion_dpo").to_numpy(), utility(baseline).to_numpy())
    assert interval.low > 0
