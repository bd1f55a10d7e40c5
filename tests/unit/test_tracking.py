"""The import into MLflow: complete, idempotent, and self-repairing."""

from __future__ import annotations

from typing import Any

import pytest
from evidence_fixture import STEPS, make_config, make_study

from invdpo.config import StudyConfig
from invdpo.tracking import mlflow_sync, sync


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory):
    """One study and its database, made once: a new MLflow database takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("tracking"))
    study = make_study(seeds=2, prompts=8)
    report = sync(study)
    from mlflow.tracking import MlflowClient

    yield study, report, MlflowClient(report.uri)
    patch.undo()


def runs_of(client, study: StudyConfig, question: str) -> dict[str, Any]:
    experiment = client.get_experiment_by_name(f"{study.study}: {question}")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=500)}


def test_one_experiment_a_question_and_one_run_an_arm_and_seed(synced) -> None:
    study, report, client = synced
    names = {experiment.name for experiment in client.search_experiments()} - {"Default"}
    assert names == {f"toy: {q}" for q in ("comparison", "q_vs_p", "controls", "inversion_steps")}
    assert set(runs_of(client, study, "q_vs_p")) == {
        "base-toy-s0", "q_single-toy-s0", "q_single-toy-s1", "p_single-toy-s0", "p_single-toy-s1"
    }  # fmt: skip
    assert report.imported == 13 + 5 + 15 + 2
    for experiment in client.search_experiments():
        if experiment.name != "Default":
            assert "?" in experiment.tags["mlflow.note.content"]
            assert experiment.artifact_location.startswith("file:///")


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
    assert run.data.params["beta"] == "10.0"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in sorted(losses, key=lambda m: m.step)] == list(range(1, STEPS + 1))
    assert min(m.timestamp for m in losses) == 1_750_000_000_000 + 25  # 0.02 s x 1.25 after the start
    scores = client.get_metric_history(run.info.run_id, "eval/pickscore")
    assert sorted(m.step for m in scores) == [10, 20, 40]
    last = run.data.metrics
    assert last["eval/pickscore_delta_vs_base_lo"] < last["eval/pickscore_delta_vs_base"]
    assert last["eval/pickscore_delta_vs_base"] < last["eval/pickscore_delta_vs_base_hi"]
    assert 0.5 < last["eval/oracle_utility_win_rate_vs_base"] <= 1
    assert "train/logratio_win" not in runs_of(client, study, "comparison")["sft-toy-s0"].data.metrics


def test_inversion_steps_are_the_step_axis(synced) -> None:
    study, _, client = synced
    runs = runs_of(client, study, "inversion_steps")
    assert set(runs) == {"p_single-inversion-toy-s0", "p_single-inversion-toy-s1"}
    run = runs["p_single-inversion-toy-s0"]
    history = client.get_metric_history(run.info.run_id, "inversion/pickscore")
    assert sorted(m.step for m in history) == [10, 20, 40]
    assert all(name.startswith("inversion/") for name in run.data.metrics)


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


def test_parameters_name_the_recipes_slots() -> None:
    params = mlflow_sync._params(make_config(), "diffusion_dpo")
    assert params["learning_rate"] == "0.0001" and params["beta"] == "10.0" and params["batch"] == "8"
    assert params["recipe.trajectory.kind"] == "forward"
    assert mlflow_sync._params(make_config(), "base") == {"method": "no_training", "labels": "true"}
