"""From a number back to its origin, on a made-up study and on the published one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from evidence_fixture import make_study
from typer.testing import CliRunner

from invdpo.cli import app
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, tables, trace
from invdpo.evidence.lineage import Link
from invdpo.evidence.load import arm_title
from invdpo.provenance import sha256_file

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path("results/reference/shapes")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, Path]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = make_study(prompts=8)
        (config.root / "study.json").write_text(dump_study(config))
        tables.write(config)
        claims.write(config)
    return config, folder


@pytest.fixture
def study(made: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A small study with its tables and verdicts, in the working directory."""
    monkeypatch.chdir(made[1])
    return made[0]


def links(found: trace.Trace) -> dict[str, Link]:
    return {link.what: link for link in found.links}


def test_a_cell_is_walked_back_to_its_files_and_commands(study: StudyConfig) -> None:
    what, placed = trace.place("results/toy/tables/table1.md:Diffusion-DPO:PickScore minus base", Path("none"), False)
    (found,) = trace.trace(what, placed)
    row = next(
        row for row in csv.DictReader((study.root / "tables/table1.csv").open()) if row["arm"] == "diffusion_dpo"
    )
    assert (found.address, found.value) == ("table1:diffusion_dpo:pickscore_minus_base", row["pickscore_minus_base"])
    by_name = links(found)
    statistic = by_name["Statistic"].facts
    assert statistic["arms"] == ["diffusion_dpo", "base"]
    assert (statistic["training seeds"], statistic["prompts"]) == (3, 8)
    assert statistic["from the files, now"] == f"{found.value} (the same)"
    scores = by_name["Scores of Diffusion-DPO"]
    path = study.root / "scores/diffusion_dpo/seed2.parquet"
    assert (
        sha256_file(path) in scores.facts["files"][str(path)] and scores.facts["rows of the last checkpoint"] == 3 * 8
    )
    assert scores.facts["scorer version"] == ["1"]
    assert scores.command == "invdpo evaluate --study config/toy.yaml --arm diffusion_dpo"
    assert by_name["Runs of Diffusion-DPO"].command == "invdpo train --study config/toy.yaml --arm diffusion_dpo"
    run = by_name["Runs of Diffusion-DPO"].facts["runs"]["results/toy/runs/diffusion_dpo/seed1"]
    assert run["config hash"] == study.arm("diffusion_dpo").hash and run["commit"] == "abc"
    assert "methods/diffusion_dpo.yaml" in by_name["Recipe of Diffusion-DPO"].facts["file"]
    assert by_name["Preferences"].command == "invdpo prepare --study config/toy.yaml"
    assert by_name["Code and environment"].command == "git checkout abc && uv sync --frozen"


def test_a_table_that_the_scores_do_not_give_is_said_to_be_so(study: StudyConfig) -> None:
    path = study.root / "tables/table_s5.csv"
    before, rows = path.read_text(), pd.read_csv(path, dtype=str)
    rows.loc[0, "clip"] = "0.9"
    rows.to_csv(path, index=False)
    (found,) = trace.trace("table_s5:q_single:clip", study)
    path.write_text(before)
    assert found.value == "0.9" and links(found)["Statistic"].facts["from the files, now"].endswith(
        "(NOT what is stored)"
    )


@pytest.mark.parametrize(
    ("what", "arms"),
    [
        ("table3:one timestep of p:CLIP minus fewest", ["p_single", "p_single_n10"]),
        ("table3:p_single_n40:unet_evals", ["p_single_n40"]),
        ("table_s5:Difference, paired:HPS", ["p_single", "q_single"]),
        ("controls:diffusion_dpo_swapped:clip:true_minus_control", ["diffusion_dpo", "diffusion_dpo_swapped"]),
        ("costs:SFT:pairs_seen", ["sft"]),
        ("table1:base:Oracle utility", ["base"]),
        ("table1:diffusion_dpo:oracle_utility_win_rate", ["diffusion_dpo", "base"]),
        ("table1:sft:clip_minus_base_p_holm", ["sft", "base"]),
        ("win_rates:SFT:Diffusion-DPO:HPS:win_rate", ["sft", "diffusion_dpo"]),
        ("over_optimisation:sft:0:40:HPS", ["sft", "base"]),
        ("to_target:inversion_dpo_implied:CLIP:step:cost", ["inversion_dpo_implied", "diffusion_dpo", "base"]),
    ],
)
def test_every_kind_of_cell(study: StudyConfig, what: str, arms: list[str]) -> None:
    (found,) = trace.trace(what, study)
    statistic = links(found)["Statistic"].facts
    assert statistic["arms"] == arms and statistic["from the files, now"].endswith("(the same)")


def test_claims_of_every_kind(study: StudyConfig) -> None:
    addresses = ("steady_rise:inversion_dpo_code", "twice_as_fast_by_step:inversion_dpo_implied", "dpo_above_base",
                 "zero_gradient_at_the_reference", "more_inversion_steps_primary:p_single")  # fmt: skip
    for address in addresses:
        (found,) = trace.trace(f"claim:{address}", study)
        assert "(the same)" in links(found)["Statistic"].facts["from the files, now"], address
        assert any(link.what.startswith("Runs of") for link in found.links)
    with pytest.raises(InvdpoError, match="several readings.*steady_rise:inversion_dpo_code"):
        trace.trace("claim:steady_rise", study)


def test_a_bare_number_lists_its_places(study: StudyConfig) -> None:
    hits = {hit.address for hit in trace.trace("10000", study)}
    assert {"table1:diffusion_dpo:unet_evals", "costs:q_single:unet_evals"} <= hits
    value = next(csv.DictReader((study.root / "tables/table1.csv").open()))["pickscore"]
    assert trace.trace(value, study)[0].address == "table1:base:pickscore"
    with pytest.raises(InvdpoError, match="0.123456 is in no table"):
        trace.trace("0.123456", study)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("table1:difusion_dpo:clip", "no row `difusion_dpo`. Did you mean `diffusion_dpo`"),
        ("table1:sft:clipp", "no column `clipp`. Did you mean `clip`"),
        ("table1:sft", "names no column"),
        ("table9:sft:clip", "is no address"),
        ("table1:sft:arm", "names the row and was not measured"),
        ("controls:sft:clip:minus_base", "no row `sft:clip`"),
        ("win_rates:sft:clip:win_rate", "has 6 rows `sft:clip`. Name one: win_rates:base:sft:clip:win_rate"),
        ("claim:dpo_abov_base", "Did you mean `dpo_above_base`"),
    ],
)
def test_mistakes_are_answered_with_the_nearest_name(study: StudyConfig, what: str, words: str) -> None:
    with pytest.raises(InvdpoError, match=words):
        trace.trace(what, study)


def test_results_that_are_not_there_are_named(study: StudyConfig) -> None:
    resolved = study.root / "study.json"
    Path("other.json").write_text(resolved.read_text().replace('"study": "toy"', '"study": "other"'))
    with pytest.raises(InvdpoError, match="results/other holds no finished study.*--reference"):
        trace.place("table1:base:clip", Path("other.json"), False)
    assert trace.place("table1:base:clip", resolved, False)[1].root == study.root


@pytest.mark.parametrize(
    ("file", "command", "arms"),
    [
        ("tables/table1.tex", "invdpo tables", {"base", "sft", "inversion_dpo_code"}),
        ("tables/table_s5.csv", "invdpo tables", {"q_single", "p_single", "base"}),
        ("scores/sft/seed1.parquet", "invdpo evaluate --study config/toy.yaml --arm sft", {"sft"}),
        ("images/base/seed0.parquet", "invdpo evaluate --study config/toy.yaml --arm base", {"base"}),
        ("runs/sft/seed2/train.jsonl", "invdpo train --study config/toy.yaml --arm sft", {"sft"}),
        ("costs.json", "invdpo tables", {"diffusion_dpo_swapped"}),
    ],
)
def test_every_kind_of_file(study: StudyConfig, file: str, command: str, arms: set[str]) -> None:
    what, placed = trace.place(f"results/toy/{file}", Path("none"), False)
    (found,) = trace.trace(what, placed)
    link = found.links[0]
    assert link.facts["sha256"] == sha256_file(study.root / file) and link.command.startswith(command)
    assert arms <= set(link.facts["arms"])
    assert {f"Scores of {arm_title(arm)}" for arm in arms} <= set(links(found))


def test_files_that_lead_to_no_result_are_refused(study: StudyConfig) -> None:
    (study.root / "notes.txt").write_text("mine")
    with pytest.raises(InvdpoError, match="notes.txt is no file of the stages"):
        trace.trace("notes.txt", study)
    (study.root / "notes.txt").unlink()
    with pytest.raises(InvdpoError, match="elsewhere/table1.csv is in no folder of a study"):
        trace.place("elsewhere/table1.csv", Path("none"), False)


def published(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["trace", *arguments, "--json"], catch_exceptions=False)
    (found,) = json.loads(done.output)
    return found


def test_one_image_of_the_published_study_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pictures = pd.read_parquet(PUBLISHED / "images/diffusion_dpo/seed0.parquet")
    prompt = int(pictures["prompt_id"].iloc[0])
    found = published("table1:diffusion_dpo:pickscore", "--reference", "--prompt", str(prompt))
    by_name = {link["what"]: link["facts"] for link in found["links"]}
    assert by_name["Statistic"]["from the files, now"] == f"{found['value']} (the same)"
    image = by_name["Images of Diffusion-DPO"]["one image"]
    scores = pd.read_parquet(PUBLISHED / "scores/diffusion_dpo/seed0.parquet")
    one = scores[(scores["prompt_id"] == prompt) & (scores["step"] == 24) & (scores["scorer"] == "pickscore")].iloc[0]
    assert (image["pickscore"], image["sha256 of the pixels"]) == (one["score"], one["image_sha256"])
    assert image["picture"].endswith("the same pixels")
    weights = [run["weights"] for run in by_name["Runs of Diffusion-DPO"]["runs"].values()]
    assert len(weights) == 3 and all(weights)
    assert by_name["Base model"]["sha256"]["assets/shapes/base/unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "links"),
    [
        (["paper_figures/audit.pdf"], {"File", "Experiment audit", "Base model"}),
        (["paper_figures/shapes_methods/fig1.png"], {"File", "Scores of SmPO", "Images of SmPO"}),
        (["table2:diffusion_dpo:kid", "--reference"], {"Sets of images", "Images of Diffusion-DPO"}),
        (["composition:sft:geneval:overall:score", "--reference"], {"Statistic", "Scores of SFT"}),
        (["results/reference/shapes/tables/precision.csv:diffusion_dpo:inversion_dpo_implied:20:spearman"],
         {"Experiment precision", "Runs of Diffusion-DPO"}),
    ],
)  # fmt: skip
def test_what_readers_see_leads_to_what_is_published(
    arguments: list[str], links: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = published(*arguments)
    by_name = {link["what"]: link["facts"] for link in found["links"]}
    assert links <= set(by_name)
    assert by_name.get("Statistic", {}).get("from the files, now", "(the same)").endswith("(the same)")


def test_the_papers_own_number_is_walked_to_its_table(study: StudyConfig) -> None:
    (found,) = trace.trace("table1:diffusion_dpo:paper_pickscore_sdxl", study)
    assert found.value == "0.227" and links(found)["The paper's own number"].facts["source"] == "Inversion-DPO, Table 1"
