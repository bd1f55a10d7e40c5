"""The import into MLflow: complete, idempotent, self-repairing, and clear about a database that it cannot use."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evidence_fixture import STEPS, make_config, make_small_study, make_study

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evidence import claims
from invdpo.evidence.ledger import read_verdicts
from invdpo.tracking import mlflow_sync, store
from invdpo.tracking.mlflow_sync import sync

TESTS = Path(__file__).resolve().parents[1]
FILES = ["tables/table1.csv", "tables/table1.tex", "tables/table_s5.md", "figures/fig3.png", "figures/fig3.pdf"]


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory, empty_store: Path):
    """One study and its database, made once: a new MLflow database takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("tracking"))
    study = make_study(seeds=2, prompts=8)
    for name in FILES:
        (study.root / name).parent.mkdir(exist_ok=True)
        (study.root / name).write_text(name)
    (study.root / "tables/costs.csv").write_bytes(bytes(mlflow_sync.LARGEST + 1))
    claims.write(study)
    shutil.copy(empty_store, study.root / "mlflow.db")
    report = sync(study)
    from mlflow.tracking import MlflowClient

    yield study, report, MlflowClient(report.uri)
    patch.undo()


def experiment(client, name: str) -> Any:
    return client.get_experiment_by_name(name)


def runs_of(client, study: StudyConfig, question: str) -> dict[str, Any]:
    identity = experiment(client, f"{study.study}: {question}").experiment_id
    return {run.info.run_name: run for run in client.search_runs([identity], max_results=500)}


def test_one_experiment_a_question_and_one_run_an_arm_and_seed(synced) -> None:
    study, report, client = synced
    names = {found.name for found in client.search_experiments()} - {"Default"}
    assert names == {f"toy: {q}" for q in ("comparison", "q_vs_p", "controls", "inversion_steps")}
    assert set(runs_of(client, study, "q_vs_p")) == {
        "base-toy-s0", "q_single-toy-s0", "q_single-toy-s1", "p_single-toy-s0", "p_single-toy-s1", "summary-toy"
    }  # fmt: skip
    assert report.imported == 13 + 5 + 15 + 2 + 4
    for found in client.search_experiments():
        if found.name != "Default":
            assert "?" in found.tags["mlflow.note.content"]
            assert found.artifact_location.startswith("file:///")


def test_a_run_has_its_curves_tags_and_times(synced) -> None:
    study, _, client = synced
    run = runs_of(client, study, "comparison")["diffusion_dpo-toy-s1"]
    tags = run.data.tags
    assert (tags["arm"], tags["seed"], tags["method"], tags["labels"]) == (
        "diffusion_dpo",
        "1",
        "diffusion_dpo",
        "true",
    )
    assert tags["job_key"] == "toy/comparison/diffusion_dpo/seed1" and run.info.status == "FINISHED"
    assert (tags["git_commit"], tags["lock_hash"], tags["device"]) == ("abc", "l", "cpu")
    assert tags["config_hash"] == study.arm("diffusion_dpo").hash
    assert run.data.params["beta"] == "10.0"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in sorted(losses, key=lambda m: m.step)] == list(range(1, STEPS + 1))
    assert min(m.timestamp for m in losses) == 1_750_000_000_000 + 25  # 0.02 s x 1.25 after the start
    scores = client.get_metric_history(run.info.run_id, "eval/pickscore")
    assert sorted(m.step for m in scores) == [10, 20, 40]
    base = runs_of(client, study, "comparison")["base-toy-s0"].data.metrics["eval/pickscore"]
    gains = client.get_metric_history(run.info.run_id, "eval/pickscore_delta_vs_base")
    assert {m.step: m.value + base for m in gains} == pytest.approx({m.step: m.value for m in scores})
    last = run.data.metrics
    assert last["eval/pickscore_delta_vs_base_lo"] < last["eval/pickscore_delta_vs_base"]
    assert last["eval/pickscore_delta_vs_base"] < last["eval/pickscore_delta_vs_base_hi"]
    assert 0.5 < last["eval/oracle_utility_win_rate_vs_base"] <= 1
    assert "train/logratio_win" not in runs_of(client, study, "comparison")["sft-toy-s0"].data.metrics


def test_inversion_steps_are_the_step_axis(synced) -> None:
    study, _, client = synced
    runs = runs_of(client, study, "inversion_steps")
    assert set(runs) == {"p_single-inversion-toy-s0", "p_single-inversion-toy-s1", "summary-toy"}
    run = runs["p_single-inversion-toy-s0"]
    history = client.get_metric_history(run.info.run_id, "inversion/pickscore")
    assert sorted(m.step for m in history) == [10, 20, 40]
    assert all(name.startswith("inversion/") for name in run.data.metrics)


def artifacts(client, run: Any) -> dict[str, Path]:
    """Name -> file of everything that a run holds."""
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_question_has_its_tables_figures_and_verdicts(synced) -> None:
    study, _, client = synced
    summary = runs_of(client, study, "comparison")["summary-toy"]
    assert summary.data.tags["stage"] == "summary" and "arm" not in summary.data.tags
    found = artifacts(client, summary)
    assert set(found) == {"tables/table1.csv", "figures/fig3.png", "claims.json"}
    assert found["figures/fig3.png"].read_text() == "figures/fig3.png"
    assert set(artifacts(client, runs_of(client, study, "q_vs_p")["summary-toy"])) == {
        "tables/table_s5.md",
        "claims.json",
    }
    # Every verdict is in one question, or in the one that this study has no files of.
    names = [name for name in mlflow_sync.NOTES if name != mlflow_sync.HELD_OUT]
    rows = [
        (row["id"], row["variant"])
        for name in names
        for row in json.loads(artifacts(client, runs_of(client, study, name)["summary-toy"])["claims.json"].read_text())
    ]
    every = read_verdicts(study.root / "claims.json")
    held_out = [row for row in every if mlflow_sync.question_of(study, row) == mlflow_sync.HELD_OUT]
    assert len(rows) == len(set(rows)) == len(every) - len(held_out)
    # Charts show the ten newest runs: the summary is the oldest.
    runs = client.search_runs([summary.info.experiment_id], order_by=["attributes.start_time ASC"])
    assert runs[0].info.run_name == "summary-toy"


def test_claims_go_to_the_question_that_they_answer(synced) -> None:
    study, _, _ = synced
    of = {row.id: mlflow_sync.question_of(study, row) for row in read_verdicts(study.root / "claims.json")}
    assert of["p_above_q_clip"] == "q_vs_p"
    assert of["more_inversion_steps_pickscore"] == "inversion_steps"
    assert of["labels_matter"] == of["labels_have_a_direction"] == "controls"
    assert of["pickscore_above_diffusion_dpo"] == of["twice_as_fast_by_step"] == of["dpo_above_base"] == "comparison"
    assert of["surrogate_is_the_true_log_ratio"] == of["no_gradient_on_held_out_pairs"] == "held_out"
    assert of["zero_gradient_at_the_reference"] == "comparison"


def test_notes_say_the_verdicts(synced) -> None:
    study, _, client = synced
    note = experiment(client, "toy: controls").tags["mlflow.note.content"]
    row = next(r for r in read_verdicts(study.root / "claims.json") if r.id == "labels_have_a_direction")
    assert row.verdict == "supported" and row.low is not None
    line = next(line for line in note.splitlines() if row.question in line)
    assert "**supported**" in line and f"[{row.low:.4g}, {row.high:.4g}]" in line


def test_a_note_is_never_too_long_for_mlflow(synced) -> None:
    study, _, _ = synced
    rows = [row for row in read_verdicts(study.root / "claims.json") if row.verdict != "not run"]
    assert "claims.json" not in mlflow_sync.claims_table(rows)
    long = mlflow_sync.claims_table(rows * 30)
    assert 10_000 < len(long) <= mlflow_sync.NOTE_LENGTH and long.endswith("are in `claims.json` of the summary run.")
    broken = replace(rows[0], question="a | b")
    assert "a \\| b" in mlflow_sync.claims_table([broken])


def test_runs_name_their_data_and_weights_and_copy_none(synced) -> None:
    study, _, client = synced
    run = runs_of(client, study, "q_vs_p")["p_single-toy-s1"]
    data = {part.tags[0].value: part.dataset for part in run.inputs.dataset_inputs}
    assert set(data) == {"evaluation", "training"}
    assert data["training"].digest == 32 * "d" and "assets/pairs.parquet" in data["training"].source
    assert data["evaluation"].name == "prompts.txt"
    base = runs_of(client, study, "q_vs_p")["base-toy-s0"]
    assert [part.dataset.digest for part in base.inputs.dataset_inputs] == [data["evaluation"].digest]

    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.tags["checkpoint"] == "results/toy/runs/p_single/seed1/unet" and model.status == "READY"
    assert model.tags["base"] == "assets/base" and model.source_run_id == run.info.run_id
    values = {metric.key: metric.value for metric in model.metrics}
    assert values["eval/pickscore"] == run.data.metrics["eval/pickscore"]
    assert {metric.dataset_digest for metric in model.metrics} == {data["evaluation"].digest}
    copied = [path for path in (study.root / "mlruns").rglob("*") if path.is_file()]
    assert {path.name for path in copied} == {"table1.csv", "fig3.png", "table_s5.md", "claims.json"}


def test_sync_again_changes_nothing_and_repairs_what_is_broken(synced) -> None:
    study, report, client = synced
    again = sync(study)
    assert (again.imported, again.deleted, again.unchanged) == (0, 0, report.imported)

    # A run that an interrupted sync left half done, and one whose files changed since.
    half = runs_of(client, study, "q_vs_p")["q_single-toy-s0"]
    client.update_run(half.info.run_id, status="RUNNING")
    log = study.root / "runs/sft/seed0/train.jsonl"
    log.write_text(log.read_text().replace('"loss": 0.693', '"loss": 0.5'))
    third = sync(study)
    assert (third.imported, third.deleted) == (2, 2)
    assert runs_of(client, study, "comparison")["sft-toy-s0"].data.metrics["train/loss"] == 0.5
    assert runs_of(client, study, "q_vs_p")["q_single-toy-s0"].info.run_id != half.info.run_id

    # A run that no longer exists goes away.
    (study.root / "runs/sft/seed1/run.json").unlink()
    fourth = sync(study)
    assert (fourth.imported, fourth.deleted) == (0, 1)
    assert "sft-toy-s1" not in runs_of(client, study, "comparison")


def test_new_verdicts_change_the_note_and_the_summary_alone(synced) -> None:
    study, _, client = synced
    sync(study)
    before = runs_of(client, study, "controls")["summary-toy"]
    path = study.root / "claims.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["claims"] if row["id"] == "labels_have_a_direction" and row["value"] is not None)
    row["verdict"] = "inconclusive"
    path.write_text(json.dumps(content))
    report = sync(study)
    assert (report.imported, report.deleted) == (1, 1)
    assert "inconclusive" in experiment(client, "toy: controls").tags["mlflow.note.content"]
    assert artifacts(client, before) == {}
    after = artifacts(client, runs_of(client, study, "controls")["summary-toy"])
    assert '"inconclusive"' in after["claims.json"].read_text()


def test_a_study_without_claims_or_tables_has_its_runs(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_small_study()
    shutil.copy(empty_store, study.root / "mlflow.db")
    assert not (study.root / "claims.json").exists()
    report = sync(study)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(report.uri)
    assert set(runs_of(client, study, "q_vs_p")) == {"base-toy-s0", "q_single-toy-s0", "p_single-toy-s0"}
    assert "Claims" not in experiment(client, "toy: q_vs_p").tags["mlflow.note.content"]

    # The same folder elsewhere: its artifacts belong there too, so the database starts over.
    moved = tmp_path / "moved" / "results" / "toy"
    shutil.copytree(study.root, moved)
    monkeypatch.chdir(tmp_path / "moved")
    again = sync(study)
    assert (again.imported, again.unchanged) == (report.imported, 0)
    place = experiment(MlflowClient(again.uri), "toy: q_vs_p").artifact_location
    assert place == (moved / "mlruns/toy/q_vs_p").as_uri()


def test_three_processes_fill_one_new_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys; os.chdir(sys.argv[1])\n"
        "from evidence_fixture import make_small_study\n"
        "from invdpo.tracking.mlflow_sync import sync\n"
        "assert sync(make_small_study(sys.argv[2]), sys.argv[3]).imported == 6\n"
    )
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent / 'src'}")
    running = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        arguments = [sys.executable, "-c", code, str(tmp_path / name), name, uri]
        running.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert "locked" not in "".join(said) and "Traceback" not in "".join(said)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiments = [e for e in client.search_experiments() if e.name != "Default"]
    assert len(experiments) == 12
    runs = client.search_runs([found.experiment_id for found in experiments])
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 18


@pytest.fixture
def small(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    study = make_small_study()
    shutil.copy(empty_store, study.root / "mlflow.db")
    return study


def test_a_locked_database_is_named(small: StudyConfig) -> None:
    path = small.root / "mlflow.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InvdpoError, match=r"toy/mlflow\.db is locked by another process.*Wait.*delete"):
            sync(small)
    assert sync(small).imported > 0


def test_a_database_that_is_locked_on_the_way_is_named_too(small: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    def fail(*arguments: object) -> None:
        raise MlflowException("(sqlite3.OperationalError) database is locked")

    monkeypatch.setattr(mlflow_sync, "_write", fail)
    with pytest.raises(InvdpoError, match=r"toy/mlflow\.db is locked"):
        sync(small)


@pytest.mark.parametrize(
    ("revision", "words"), [("fffffffffffe", "a newer MLflow"), ("451aebb31d03", "an older MLflow")]
)
def test_a_database_of_another_mlflow_is_named(small: StudyConfig, revision: str, words: str) -> None:
    path = small.root / "mlflow.db"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", [revision])
    with pytest.raises(InvdpoError, match=rf"toy/mlflow\.db was made by {words}.*{revision}.*Delete it"):
        sync(small)


def test_a_damaged_database_is_named(small: StudyConfig) -> None:
    (small.root / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(InvdpoError, match=r"toy/mlflow\.db is no database.*Delete it"):
        sync(small)


def test_a_server_that_is_not_there_is_named(small: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InvdpoError, match=r"--tracking-uri http://127\.0\.0\.1:1: the server does not answer"):
        sync(small, "http://127.0.0.1:1")


def test_parameters_name_the_recipes_slots() -> None:
    params = store.parameters(make_config(), "diffusion_dpo")
    assert params["learning_rate"] == "0.0001" and params["beta"] == "10.0" and params["batch"] == "8"
    assert params["recipe.trajectory.kind"] == "forward"
    assert store.parameters(make_config(), "base") == {"method": "no_training", "labels": "true"}
