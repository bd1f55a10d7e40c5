"""The command line: stages, exit codes, messages."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from invdpo import cli
from invdpo.config import StudyConfig, TunedValues, dump_study, load_study
from invdpo.errors import InvdpoError
from invdpo.provenance import verify_checksums

MakeStudy = Callable[..., StudyConfig]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets up messages and threads of the whole process; put them back."""
    import torch

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run `invdpo …` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["invdpo", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def written(study: StudyConfig) -> Path:
    Path("study.json").write_text(dump_study(study))
    return Path("study.json")


def test_prepare_train_and_check_run_from_the_command_line(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tiny_study(training={"steps": 1}))
    assert invoke(monkeypatch, "check", "--study", study) == 0
    said = capsys.readouterr().out
    assert "12 rows of preferences, 4 prompts, device cpu" in said
    assert "dpo: diffusion_dpo, labels true, 1 steps of 4 pairs, learning rate 0.001, beta 5000" in said
    assert invoke(monkeypatch, "prepare", "--study", study, "--threads", "1", "--log", "logs/prepare.log") == 0
    assert "10 pairs of 12 rows (2 ties left out, 0 undecodable skipped)" in Path("logs/prepare.log").read_text()
    assert invoke(monkeypatch, "train", "--study", study, "--arm", "dpo", "--threads", "1") == 0
    for seed in (0, 1):
        run = json.loads(Path(f"results/tiny/runs/dpo/seed{seed}/run.json").read_text())
        assert (run["arm"], run["seed"], run["steps"]) == ("dpo", seed, 1)


def test_user_errors_are_one_message_and_exit_code_1(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tiny_study())
    assert invoke(monkeypatch, "train", "--study", study, "--arm", "dop") == 1
    said = capsys.readouterr().err
    assert said == "error: Study `tiny` has no arm `dop`. Did you mean `dpo`?\n"
    assert invoke(monkeypatch, "train", "--study", study, "--arm", "dpo", "--seed", "7") == 1
    assert "has no seed 7; its seeds are [0, 1]" in capsys.readouterr().err
    assert invoke(monkeypatch, "train", "--study", "absent.yaml", "--arm", "dpo", "--log", "train.log") == 1
    assert "absent.yaml cannot be read" in Path("train.log").read_text()


def test_an_arm_without_its_tuned_values_is_neither_trained_nor_audited(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = {"arms": ["dpo"], "learning_rate": [1.0e-4], "beta": [5.0], "seeds": [9], "prompts": "tuning.txt"}
    audit = {"arms": ["dpo"], "pairs": 2, "batches": 1, "images": 2}
    scorers = {"pickscore": {"model": "pickscore"}}
    study = tiny_study(tuning=tuning, scorers=scorers, experiments={"audit": audit}, tuned="config/tuned/tiny.yaml")
    for stage in (["train", "--arm", "dpo"], ["experiment", "audit"]):
        assert invoke(monkeypatch, *stage, "--study", written(study)) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: Arm `dpo` of study `tiny` has no learning rate and beta yet")
        assert "Run `make tune STUDY=tiny` first" in said
    assert invoke(monkeypatch, "check", "--study", written(study)) == 1
    said = capsys.readouterr()
    assert "beta 5000 (not tuned yet), 2 seeds" in said.out
    assert said.err.startswith("error: 2 problems with study `tiny`:") and "there is no file tuning.txt" in said.err
    assert "scorers.pickscore.model: there is no folder pickscore" in said.err
    chosen = study.model_copy(update={"tuned": {"diffusion_dpo": TunedValues(beta=7.0)}, "tuning": None})
    assert invoke(monkeypatch, "check", "--study", written(chosen)) == 1
    assert "beta 7, 2 seeds" in capsys.readouterr().out


def test_debug_shows_the_traceback(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tiny_study())
    with pytest.raises(InvdpoError):
        invoke(monkeypatch, "--debug", "train", "--study", "absent.yaml", "--arm", "dpo")


def test_cuda_asked_for_but_absent(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    study = written(tiny_study(device="cuda"))
    assert invoke(monkeypatch, "train", "--study", study, "--arm", "dpo") == 1
    said = capsys.readouterr().err
    assert "asks for `device: cuda`" in said and "Set `device: auto`" in said and "Traceback" not in said


def checksums(folder: Path) -> Path:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"a")
    digest = hashlib.sha256(b"a").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  weights/a.bin\n")
    return folder / "SHA256SUMS"


def test_asset_with_another_hash_stops_every_stage(
    tiny_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = checksums(tmp_path)
    assert verify_checksums(listing) == 1
    (tmp_path / "weights" / "a.bin").write_bytes(b"b")
    study = written(tiny_study(checksums=str(listing)))
    for stage in (["prepare"], ["train", "--arm", "dpo"], ["evaluate", "--arm", "dpo"], ["check"]):
        assert invoke(monkeypatch, *stage, "--study", study) == 1
        assert "weights/a.bin: its content has another hash" in capsys.readouterr().err


def test_missing_asset_and_broken_listing_are_named(tmp_path: Path) -> None:
    listing = checksums(tmp_path)
    (tmp_path / "weights" / "a.bin").unlink()
    with pytest.raises(InvdpoError, match="a.bin: missing"):
        verify_checksums(listing)
    listing.write_text("no hash here\n")
    with pytest.raises(InvdpoError, match="SHA256SUMS, line 1 is not"):
        verify_checksums(listing)
    with pytest.raises(InvdpoError, match="cannot be read"):
        verify_checksums(tmp_path / "absent")


def test_results_says_what_there_is_and_how_to_open_it(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tiny_study())
    assert invoke(monkeypatch, "results", "--study", study) == 0
    assert "tiny has no results yet: make reproduce STUDY=tiny" in capsys.readouterr().out
    Path("results/tiny/tables").mkdir(parents=True)
    Path("results/tiny/mlflow.db").touch()
    assert invoke(monkeypatch, "results", "--study", study) == 0
    said = capsys.readouterr().out
    assert "results/tiny/tables: csv, md, tex" in said
    assert "make mlflow STUDY=tiny" in said
    assert "make report STUDY=tiny writes it" in said
    assert "figures" not in said


def test_schema_is_written(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study()
    assert invoke(monkeypatch, "schema", "out/schema.json") == 0
    assert "arms" in json.loads(Path("out/schema.json").read_text())["properties"]


def test_the_page_of_methods_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(monkeypatch, "methods", "out/methods.md") == 0
    committed = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
    assert Path("out/methods.md").read_text() == committed.read_text()
    assert invoke(monkeypatch, "methods") == 0
    assert Path("docs/methods.md").is_file()


def test_the_user_study_is_planned_from_the_root_alone(tmp_path: Path) -> None:
    def plan(folder: Path) -> subprocess.CompletedProcess[str]:
        # Python's own folder of imports would find the app wherever the tests run.
        command = [sys.executable, "-P", "-m", "invdpo.cli", "study", "power", "--win-rate", "0.6"]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)

    done = plan(Path(__file__).resolve().parents[2])
    assert done.returncode == 0 and "194 decisive votes" in done.stdout
    lost = plan(tmp_path)
    assert lost.returncode == 1 and "Run `invdpo study` in the repository's root" in lost.stderr


def test_help_is_quick_and_needs_neither_torch_nor_diffusers() -> None:
    program = (
        "import sys, invdpo.cli as cli\n"
        "sys.argv = ['invdpo', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'pandas', 'mlflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = (
        "prepare",
        "train",
        "evaluate",
        "tables",
        "figures",
        "claims",
        "mlflow",
        "publish",
        "results",
        "check",
        "world",
        "study",
    )
    assert all(stage in done.stdout for stage in stages)


def test_yaml_and_resolved_json_give_the_same_study(tiny_study: MakeStudy) -> None:
    study = tiny_study()
    content = json.loads(dump_study(study))
    Path("study.yaml").write_text(yaml.safe_dump(content))
    assert load_study("study.yaml") == study == load_study(written(study))
