"""Training that logs to an MLflow server as it goes: everything arrives, and nothing is lost where there is none."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from evidence_fixture import make_config, make_small_study

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.provenance import device_name, lock_hash
from invdpo.tracking import live, mlflow_sync
from invdpo.tracking.store import connect
from invdpo.training import loop

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

MakeStudy = Callable[..., StudyConfig]
CPU = torch.device("cpu")
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def client(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The store that MLFLOW_TRACKING_URI names, without runs."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'live.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(live, "GRACE", 120.0)  # a busy machine is slow, not wrong
    monkeypatch.chdir(tmp_path)
    return connect(uri)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The messages about MLflow."""
    with caplog.at_level(logging.DEBUG, "invdpo"):
        yield lambda: [record.message for record in caplog.records if "MLFLOW_TRACKING_URI" in record.message]


def runs(client: MlflowClient, study: str) -> list[Run]:
    """The live runs, oldest first."""
    experiment = client.get_experiment_by_name(f"{study}: live")
    return [] if experiment is None else list(reversed(client.search_runs([experiment.experiment_id])))


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "grad_norm": 2.0, "logratio_lose": None}


def steps(client: MlflowClient, run: Run, name: str = "train/loss") -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (InvdpoError("nan"), "FAILED")]
)
def test_every_step_and_how_it_ended(
    client: MlflowClient, error: type[BaseException] | Exception | None, status: str
) -> None:
    study = make_config()
    try:
        with live.live_run(study, "diffusion_dpo", 1, [row(1)], CPU) as show:
            show(row(2))
            show(row(3))
            if error is not None:
                raise error
    except (KeyboardInterrupt, InvdpoError):
        pass
    (run,) = runs(client, "toy")
    assert run.info.status == status
    assert steps(client, run) == {1: 1.0, 2: 1 / 2, 3: 1 / 3}
    assert set(run.data.metrics) == {"train/loss", "train/grad_norm"}
    tags = run.data.tags
    assert (tags["live"], tags["job_key"], tags["arm"], tags["seed"]) == (
        "true",
        "toy/live/diffusion_dpo/seed1",
        "diffusion_dpo",
        "1",
    )
    assert run.data.params["beta"] == "10.0"
    assert (tags["lock_hash"], tags["device"]) == (lock_hash(), device_name(CPU))
    assert tags["config_hash"] == study.arm("diffusion_dpo").hash


def test_a_run_that_was_killed_is_not_left_running(client: MlflowClient) -> None:
    study = make_config()
    for arm in ("q_single", "p_single"):
        with live.live_run(study, arm, 0, [], CPU):
            pass
    for run in runs(client, "toy"):
        client.update_run(run.info.run_id, status="RUNNING")
    with live.live_run(study, "q_single", 0, [], CPU):
        pass
    found = [(run.data.tags["arm"], run.info.status) for run in runs(client, "toy")]
    assert sorted(found) == [("p_single", "RUNNING"), ("q_single", "FINISHED"), ("q_single", "KILLED")]


TRAINING = """
import os, sys, time
import torch
from evidence_fixture import make_config
from invdpo.tracking import live
with live.live_run(make_config(), sys.argv[1], 0, [{"step": 1, "loss": 1.0}], torch.device("cpu")):
    time.sleep(600)
"""


@pytest.fixture
def trainings(tmp_path: Path, client: MlflowClient) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Arm -> a process that trains it, whose run is in the store."""
    path = os.pathsep.join((str(TESTS), str(TESTS.parent / "src")))
    processes = {
        arm: subprocess.Popen(
            [sys.executable, "-c", TRAINING, arm], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
        )
        for arm in ("sft", "diffusion_dpo")
    }
    try:
        last = time.monotonic() + 300
        while not {"sft", "diffusion_dpo"} <= {run.data.tags["arm"] for run in runs(client, "toy") if run.data.metrics}:
            assert time.monotonic() < last and all(process.poll() is None for process in processes.values())
            time.sleep(0.5)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_the_import_ends_runs_of_killed_processes_and_of_no_others(
    client: MlflowClient, trainings: dict[str, subprocess.Popen[bytes]]
) -> None:
    study, uri = make_small_study(), os.environ["MLFLOW_TRACKING_URI"]
    tags = {"arm": "sft", "seed": "1", "folder": "another machine:/results/toy"}
    experiment = client.get_experiment_by_name("toy: live")
    assert experiment is not None
    elsewhere = client.create_run(experiment.experiment_id, tags=tags).info.run_id

    def statuses() -> dict[str, str]:
        return {
            "elsewhere" if run.info.run_id == elsewhere else run.data.tags["arm"]: run.info.status
            for run in runs(client, "toy")
        }

    trainings["sft"].kill()
    trainings["sft"].wait()
    report = mlflow_sync.sync(study, uri)
    assert report.killed == 1 and str(report).endswith(", 1 marked as killed")
    assert statuses() == {"sft": "KILLED", "diffusion_dpo": "RUNNING", "elsewhere": "RUNNING"}
    again = mlflow_sync.sync(study, uri)
    assert (again.killed, again.imported) == (0, 0) and "killed" not in str(again)
    trainings["diffusion_dpo"].kill()
    trainings["diffusion_dpo"].wait()
    assert mlflow_sync.sync(study, uri).killed == 1
    assert statuses() == {"sft": "KILLED", "diffusion_dpo": "KILLED", "elsewhere": "RUNNING"}


@pytest.mark.parametrize(
    ("named", "held", "folder", "dead"),
    [
        ("me", True, "here", False),
        ("me", False, "here", True),
        ("me", True, "of another node", False),  # over a common file system
        ("me", False, "of another node", True),
        ("", True, "here", False),  # it is being made
        ("", True, "of another node", False),
        ("later", True, "here", True),
        ("later", False, "of another node", False),
        (None, False, "here", True),
        (None, False, "of another node", False),
    ],
)
def test_who_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, held: bool, folder: str, dead: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_config()
    if named is not None:
        path = live._lock_file(study, "sft", 0)
        lock = live._hold(path)
        path.write_text(named)
        if not held:
            os.close(lock)
    tags = {"arm": "sft", "seed": "0", "folder": live._folder(study) if folder == "here" else folder}
    run = SimpleNamespace(info=SimpleNamespace(run_id="me", status="RUNNING"), data=SimpleNamespace(tags=tags))
    assert live._is_dead(study, run) == dead
    if held:
        os.close(lock)


def test_two_trainings_of_one_arm_and_seed_do_not_share_a_run(
    client: MlflowClient, said: Callable[[], list[str]]
) -> None:
    lock = live._hold(live._lock_file(make_config(), "q_single", 0))
    with live.live_run(make_config(), "q_single", 0, [], CPU) as show:
        show(row(1))
    assert runs(client, "toy") == [] and "another process trains this arm and seed" in said()[0]
    os.close(lock)


def test_nothing_is_logged_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads = threading.active_count()
    with live.live_run(make_config(), "q_single", 0, [], CPU) as show:
        show(row(1))
        assert threading.active_count() == threads


def test_a_server_that_is_away_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(live, "RETRY", 0.05)
    tried: list[float] = []
    real = live._Sender._send

    def send(self: live._Sender) -> None:
        tried.append(time.monotonic())
        real(self)

    monkeypatch.setattr(live._Sender, "_send", send)
    with live.live_run(make_config(), "q_single", 0, [], CPU) as show:
        last = time.monotonic() + 60
        while len(tried) < 3 and time.monotonic() < last:
            show(row(1))
            time.sleep(0.01)
    assert len(tried) >= 3
    assert len(said()) == 1 and "http://127.0.0.1:1" in said()[0]


def test_a_server_that_never_answers_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(live, "GRACE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with live.live_run(make_config(), "q_single", 0, [], CPU) as show:
            sender = next(thread for thread in threading.enumerate() if thread.name == "MLflow")
            for step in range(1, 200):
                show(row(step))
        assert sender.is_alive() and sender.daemon
        assert len(said()) == 1 and "was not told in time" in said()[0]
    sender.join(60)


def test_a_server_that_comes_back_gets_every_step(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(live, "RETRY", 0.05)
    real = type(client).log_batch
    failures = [ConnectionError("away"), ConnectionError("away")]

    def log_batch(self: MlflowClient, *arguments: Any, **options: Any) -> None:
        if options.get("metrics") and failures:
            raise failures.pop()
        real(self, *arguments, **options)

    monkeypatch.setattr(type(client), "log_batch", log_batch)
    with live.live_run(make_config(), "q_single", 0, [], CPU) as show:
        for step in range(1, 700):
            show(row(step))
        last = time.monotonic() + 60
        while failures and time.monotonic() < last:
            time.sleep(0.01)
    (run,) = runs(client, "toy")
    assert sorted(steps(client, run)) == list(range(1, 700)) and run.info.status == "FINISHED"
    assert len(said()) == 1


@pytest.fixture
def prepared(tiny_study: MakeStudy, tiny_cache: Path) -> MakeStudy:
    """As `tiny_study`, the pairs already encoded."""

    def make(**changes: Any) -> StudyConfig:
        study = tiny_study(**changes)
        shutil.copytree(tiny_cache, study.root / "preferences", dirs_exist_ok=True)
        return study

    return make


def test_training_is_the_same_with_and_without_it(
    prepared: MakeStudy, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = prepared()
    folder = study.root / "runs/dpo/seed0"
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    loop.train(study, "dpo", [0], torch.device("cpu"))
    (run,) = runs(client, "tiny")
    logged, written = steps(client, run), weights.read_bytes()
    assert run.info.status == "FINISHED" and sorted(logged) == [1, 2, 3, 4]

    shutil.rmtree(study.root / "runs")
    shutil.rmtree(study.root / "state")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    loop.train(study, "dpo", [0], torch.device("cpu"))
    assert weights.read_bytes() == written
    assert len(runs(client, "tiny")) == 1
