"""What tables, figures and verdicts say of the runs and scores that they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evidence_fixture import make_config, make_study, write_scores
from PIL import Image

from invdpo.config import StudyConfig, dump_study
from invdpo.evidence import claims, figures, tables
from invdpo.evidence.load import read_provenance
from invdpo.evidence.provenance import study_hash, study_provenance
from invdpo.files import write_json

ARMS = ["base", "sft", "diffusion_dpo"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """Two trained arms of two seeds and the base."""
    monkeypatch.chdir(tmp_path)
    config = make_config(("oracle_utility", "pickscore"), 2).model_dump(mode="json")
    config["arms"] = {name: config["arms"][name] for name in ARMS}
    config["experiments"] = {"comparison": {"arms": ARMS}, "weight_distances": {"arms": ["sft"]}}
    return make_study(("oracle_utility", "pickscore"), 2, 4, study=StudyConfig.model_validate(config))


def test_every_commit_machine_and_library_of_the_runs_is_named(study: StudyConfig) -> None:
    run = study.root / "runs/sft/seed1/run.json"
    elsewhere = {
        "git_commit": "def",
        "git_dirty": True,
        "device": "GPU",
        "dtype": "bfloat16",
        "versions": {"torch": "8"},
    }
    write_json(run, json.loads(run.read_text()) | elsewhere)
    scored = study.root / "scores/diffusion_dpo/seed0.parquet"
    write_scores(scored, pq.read_table(scored).to_pandas(), read_provenance(scored) | {"lock_hash": "m"})
    found = study_provenance(study)
    assert found["arms"] == {name: study.arm(name).hash for name in ARMS}
    assert (found["study"], found["seeds"], found["config_hash"]) == ("toy", [0, 1], study_hash(study))
    training, scoring = found["training"], found["scoring"]
    assert (training["files"], scoring["files"]) == (5, 5)
    assert (training["git_commits"], training["git_dirty"]) == (["abc", "def"], True)
    assert (training["devices"], training["dtypes"]) == (["GPU", "cpu"], ["bfloat16", "float32"])
    assert (training["versions"], training["python"], training["lock_hashes"]) == (
        {"torch": ["8", "9"]},
        ["3.11"],
        ["l"],
    )
    assert training["unet_evals"] == 40 * 2 * (100 + 250) and scoring["unet_evals"] == 500
    assert (scoring["git_commits"], scoring["git_dirty"], scoring["lock_hashes"]) == (["abc"], False, ["l", "m"])
    assert found["stamps"] == ["experiments/weight_distances/provenance.json"]


def test_what_has_not_run_is_not_counted(study: StudyConfig) -> None:
    (study.root / "runs/sft/seed1/run.json").unlink()
    (study.root / "scores/sft/seed0.parquet").unlink()
    found = study_provenance(study)
    assert (found["training"]["files"], found["scoring"]["files"]) == (4, 4)


def test_every_output_has_it_and_figures_say_whose_they_are(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "CURVES", {"fig3": "pickscore"})
    for stage in (tables, figures, claims):
        stage.write(study)
    expected = study_provenance(study)
    for folder in ("tables", "figures"):
        assert json.loads((study.root / folder / "provenance.json").read_text()) == expected
    for name in ("costs.json", "claims.json"):
        assert json.loads((study.root / name).read_text())["provenance"] == expected
    with Image.open(study.root / "figures/fig3.png") as image:
        assert image.info["Title"] == "fig3 of the study toy"
        assert image.info["Description"] == f"configuration {study_hash(study)}"
    drawn = (study.root / "figures/fig3.pdf").read_bytes()
    assert b"(fig3 of the study toy)" in drawn and f"(configuration {study_hash(study)})".encode() in drawn
    assert b"CreationDate" not in drawn


def test_a_studys_hash_knows_its_values_and_not_how_they_are_written(study: StudyConfig, tmp_path: Path) -> None:
    resolved = json.loads(dump_study(study))
    assert study_hash(StudyConfig.model_validate(resolved)) == study_hash(study)
    backwards = StudyConfig.model_validate({name: resolved[name] for name in reversed(resolved)})
    assert study_hash(backwards) == study_hash(study.placed(tmp_path)) == study_hash(study)
    resolved["sampling"]["steps"] += 1
    assert study_hash(StudyConfig.model_validate(resolved)) != study_hash(study)


def test_a_setting_that_comes_later_changes_no_hash_before_it_is_set(study: StudyConfig) -> None:
    class Later(StudyConfig):
        sharpness: float = 1.0

    resolved = json.loads(dump_study(study))
    assert study_hash(Later.model_validate(resolved)) == study_hash(study)
    assert study_hash(Later.model_validate(resolved | {"sharpness": 2.0})) != study_hash(study)
