"""What readers see first comes from the committed reference run, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from invdpo.config import load_study
from invdpo.evidence.claims import summary
from invdpo.evidence.ledger import load_claims, read_verdicts
from invdpo.evidence.publish import BEGIN, END, figures_folder
from invdpo.evidence.statistics import paired_difference
from invdpo.provenance import sha256_file

REFERENCE = Path("results/reference/shapes")
STUDIES = sorted(path.name for path in REFERENCE.parent.iterdir())


def test_the_readmes_verdicts_are_those_of_the_reference_run() -> None:
    block = Path("README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert block.strip() == summary(read_verdicts(REFERENCE / "claims.json")).strip()


@pytest.mark.parametrize("study", STUDIES)
def test_no_published_file_was_touched(study: str) -> None:
    reference = REFERENCE.parent / study
    listed = json.loads((reference / "provenance.json").read_text())["files"]
    assert listed == {name: sha256_file(reference / name) for name in listed}
    figures = figures_folder(Path("."), study, judged=(reference / "claims.json").is_file())
    shown = [path for path in figures.iterdir() if path.is_file()]
    assert len(shown) == sum(name.startswith(("tables/", "figures/")) for name in listed)
    for path in shown:
        part = "tables" if path.suffix in (".csv", ".md", ".tex") else "figures"
        assert sha256_file(path) == listed[f"{part}/{path.name}"]


def test_every_claim_is_judged_and_none_by_another_rule() -> None:
    judged = {row.id: row.test for row in read_verdicts(REFERENCE / "claims.json")}
    claims = load_claims(Path("config/claims.yaml"))
    assert set(judged) == {claim.id for claim in claims}
    for claim in claims:
        assert judged[claim.id]["kind"] == claim.test.kind
        assert judged[claim.id]["threshold"] == claim.test.threshold


@pytest.mark.parametrize("name", STUDIES)
def test_the_reference_run_used_the_committed_study(name: str) -> None:
    study = load_study(f"config/{name}.yaml")
    runs = json.loads((REFERENCE.parent / name / "provenance.json").read_text())["runs"]
    assert set(runs) == set(study.arms)
    for arm_name, seeds in runs.items():
        assert set(seeds) == {f"seed{seed}" for seed in study.seeds}
        arm = study.arm(arm_name)
        for run in seeds.values():
            assert not run["git_dirty"]
            assert (run["method"], run["labels"]) == (arm.method, arm.labels)
            if arm.trains:
                assert run["training"] == arm.training.model_dump(mode="json")
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
