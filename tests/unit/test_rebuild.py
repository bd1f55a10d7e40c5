"""A published study's tables, figures and verdicts again from what was published with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from evidence_fixture import make_config, make_study
from typer.testing import CliRunner

from invdpo.cli import app
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, figures, grids, publish, rebuild, tables, votes
from invdpo.provenance import sha256_file

ARMS = ["base", "sft", "diffusion_dpo"]
REFERENCE = Path("results/reference/toy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StudyConfig, Path]]:
    """A small study that has run and is published, with two of the figures, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "CURVES", {"fig3": "pickscore"})
        patch.setattr(grids, "CHOICES", {"fig1": grids.choose_fig1})
        patch.chdir(folder)
        config = make_config().model_dump(mode="json")
        config["arms"] = {name: config["arms"][name] for name in ARMS}
        config["experiments"] = {"comparison": {"arms": ARMS}, "grids": {"prompts": 2, "arms": ARMS}}
        config["user_study"] = {"groups": [{"arms": ["base", "diffusion_dpo"]}]}
        # As the rules write it for the stages, with its keys in order.
        resolved = json.loads(dump_study(StudyConfig.model_validate(config)))
        study = make_study(prompts=8, study=StudyConfig.model_validate(resolved))
        weights = study.root / "runs/sft/seed0/unet/diffusion_pytorch_model.safetensors"
        weights.parent.mkdir()
        weights.write_bytes(b"weights")
        for write in (tables.write, votes.write, claims.write, figures.write, grids.write):
            write(study)
        (study.root / "tables/speed.csv").write_text("stage,ratio\nmeasured,2\n")
        Path("README.md").write_text(f"{publish.BEGIN}\n{publish.END}\n")
        publish.publish(study)
        yield study, folder


@pytest.fixture
def published(made: tuple[StudyConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A copy of it to break."""
    shutil.copytree(made[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return made[0]


def test_everything_comes_back_byte_for_byte_without_the_study(published: StudyConfig) -> None:
    for path in sorted(published.root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    found = rebuild.rebuild("toy")
    assert found.same, found.text()
    assert (found.folder / "tables/speed.csv").read_text().endswith("measured,2\n")
    expected = {
        "tables/table1.csv",
        "tables/table_s4.tex",
        "figures/fig1.png",
        "claims.json",
        "claims.md",
        "costs.json",
    }
    assert expected <= set(found.equal)
    assert (found.folder / "tables/table1.csv").read_bytes() == (REFERENCE / "tables/table1.csv").read_bytes()
    assert found.folder == Path("results/toy_from_reference") and not list(published.root.glob("*"))


def test_a_published_number_that_the_scores_do_not_give_is_found(published: StudyConfig) -> None:
    path = REFERENCE / "tables/table1.csv"
    before = path.read_bytes()
    path.write_text(path.read_text().replace("sft,ok", "sft,fine"))
    (REFERENCE / "figures/fig3.png").write_bytes(b"another picture")
    listed = json.loads((REFERENCE / "provenance.json").read_text())
    listed["files"]["tables/table9.csv"] = listed["files"].pop("tables/costs.csv")
    (REFERENCE / "provenance.json").write_text(json.dumps(listed))
    done = CliRunner().invoke(app, ["rebuild", "toy", "--out", "again"])
    assert done.exit_code == 1
    assert "tables/table1.csv: differs" in done.output and "figures/fig3.png: differs" in done.output
    assert "tables/table9.csv: published, and not made" in done.output and "costs.csv: not published" in done.output
    assert "table1.md: differs" not in done.output

    weights = listed["weights"]
    done = CliRunner().invoke(app, ["rebuild", "toy", "--out", "again", "--publish"], catch_exceptions=False)
    assert done.exit_code == 0 and path.read_bytes() == before
    assert Path("paper_figures/table1.csv").read_bytes() == before
    assert json.loads((REFERENCE / "provenance.json").read_text())["weights"] == weights != {}
    assert rebuild.rebuild("toy").same


def test_touched_scores_and_other_folders_are_refused(published: StudyConfig) -> None:
    Path("mine").mkdir()
    with pytest.raises(InvdpoError, match="mine exists and was not made"):
        rebuild.rebuild("toy", Path("mine"))
    with pytest.raises(InvdpoError, match="results/toy exists"):
        rebuild.rebuild("toy", published.root)
    with pytest.raises(InvdpoError, match="Published studies: toy"):
        rebuild.rebuild("other")
    log = REFERENCE / "runs/sft/seed1/train.jsonl"
    log.write_text(log.read_text().replace("0.693", "0.694"))
    with pytest.raises(InvdpoError, match=r"sft/seed1/train\.jsonl.*git checkout"):
        rebuild.rebuild("toy")


def test_scores_too_large_are_left_out_and_said(published: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_SCORES_BYTES", 100)
    publish.publish(published)
    assert not (REFERENCE / "scores").exists()
    with pytest.raises(InvdpoError, match="too large to publish.*make reproduce STUDY=toy"):
        rebuild.rebuild("toy")


def test_what_is_published_is_what_evidence_reads(published: StudyConfig) -> None:
    listed = json.loads((REFERENCE / "provenance.json").read_text())
    assert {"study.json", "scores/sft/seed2.parquet", "runs/base/seed0/run.json", "images/sft/seed0.parquet"} <= set(
        listed["files"]
    )
    assert listed["files"] == {name: sha256_file(REFERENCE / name) for name in listed["files"]}
    name = "unet/diffusion_pytorch_model.safetensors"
    assert listed["weights"] == {"runs/sft/seed0": {name: sha256_file(published.root / "runs/sft/seed0" / name)}}
    assert not list(REFERENCE.rglob("*.safetensors"))
    images = [pd.read_parquet(path) for path in sorted((REFERENCE / "images").rglob("*.parquet"))]
    assert [len(rows) for rows in images] == [2, 2, 2], "the two prompts of the grid, of each arm's first seed"
    assert {tuple(rows["prompt_id"]) for rows in images} == {tuple(images[0]["prompt_id"])}
