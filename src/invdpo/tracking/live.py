"""Training as it goes, on an MLflow server: what MLFLOW_TRACKING_URI switches on.

The rows of train.jsonl are sent by a thread of its own and nothing waits for it, so that a slow or absent server costs
training nothing. The result files are written as without it, and `invdpo mlflow` replaces what was sent.

A process that is killed cannot say so, and its run would stay RUNNING. So it holds a lock (flock) on a file of the
study's folder, root/live/ARM-seedK, which names the run and which the kernel lets go of with the process. Whoever sees
that file, also over a common file system, knows whether the run is alive: the next training of the arm and seed, and
`invdpo mlflow`, end as KILLED what is not. Of a run of another folder nobody here knows, and it is left as it is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.errors import InvdpoError
from invdpo.provenance import device_name, git_commit, lock_hash
from invdpo.tracking.store import (
    arm_tags,
    client_class,
    connect,
    curve_points,
    exclusive,
    made_by,
    open_experiment,
    parameters,
    quiet,
)

if TYPE_CHECKING:
    import torch
    from mlflow.tracking import MlflowClient

    from invdpo.config import StudyConfig

log = logging.getLogger("invdpo")

QUESTION = "live"
NOTE = (
    "**Runs while they train.** `invdpo mlflow --tracking-uri` with this server's address replaces those that ended by "
    "finished ones in the experiments of their questions, and marks as killed those whose process was."
)
INTERVAL = 5.0  # s between two messages, each with all steps since the last
RETRY = 60.0  # s, once the server did not answer
GRACE = 10.0  # s that the end of a run may wait for its last message
BATCH = 900  # MLflow takes at most 1,000 metrics a call


def job_key(study: StudyConfig, arm: str, seed: int) -> str:
    """What the live runs of one arm and seed have in common."""
    return f"{study.study}/{QUESTION}/{arm}/seed{seed}"


def _lock_file(study: StudyConfig, arm: str, seed: int | str) -> Path:
    return study.root / "live" / f"{arm}-seed{seed}"


def _folder(study: StudyConfig) -> str:
    """The study's folder on this machine, as a tag of its live runs names it."""
    return f"{socket.gethostname()}:{study.root.resolve()}"


def _hold(path: Path) -> int:
    """A descriptor that alone holds the lock of a file, made where there is none.

    Raises InvdpoError where another process has it, OSError where the file cannot be written or locked at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InvdpoError(f"{path}: another process trains this arm and seed") from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_dead(study: StudyConfig, run: Any) -> bool:
    """Whether the process that a live run is of has gone; False also where nobody here can know."""
    tags = run.data.tags
    path, here = _lock_file(study, tags["arm"], tags["seed"]), tags.get("folder") == _folder(study)
    if path.is_file():
        named = path.read_text()  # empty while a run is being made, before it has an id
        if named == run.info.run_id or (here and not named):
            try:
                os.close(_hold(path))
            except (InvdpoError, OSError):  # held, or in a folder that may not be written or locked here
                return False
            return True
    # The lock is gone, or a later run has it: this one has ended, if it was here.
    return here


def end_dead(client: MlflowClient, study: StudyConfig, runs: Iterable[Any]) -> int:
    """Mark those live runs as KILLED that say RUNNING and whose process has gone; how many."""
    dead = [run for run in runs if run.info.status == "RUNNING" and _is_dead(study, run)]
    for run in dead:
        client.set_terminated(run.info.run_id, "KILLED")
    return len(dead)


@contextmanager
def live_run(
    study: StudyConfig, arm: str, seed: int, rows: list[dict[str, Any]], device: torch.device
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what takes a row of train.jsonl; `rows` are those of the steps before a resume.

    Does nothing unless MLFLOW_TRACKING_URI is set. The run ends KILLED where training was interrupted, FAILED on any
    other exception, else FINISHED. A server that does not answer is warned of once and asked again every RETRY seconds;
    it holds up the end of the run by GRACE seconds at most.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        yield lambda row: None
        return
    sender = _Sender(uri, study, arm, seed, rows, device)
    sender.start()
    status = "FAILED"
    try:
        yield sender.rows.put
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        sender.finish(status)


class _Sender(threading.Thread):
    def __init__(
        self, uri: str, study: StudyConfig, arm: str, seed: int, rows: list[dict[str, Any]], device: torch.device
    ) -> None:
        super().__init__(name="MLflow", daemon=True)  # a daemon, so that a hanging request does not keep the process
        self.uri, self.study, self.arm, self.seed, self.device = uri, study, arm, seed, device
        self.rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for row in rows:
            self.rows.put(row)
        self.unsent: list[tuple[str, float, int, int]] = []
        self.client: MlflowClient | None = None
        self.run_id: str | None = None
        self.lock: int | None = None
        self.status = "RUNNING"
        self.ended = threading.Event()
        self.warned = False
        # No second try inside a request: this thread asks again by itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # s
        # Here and not in the thread: an import would take the processor from the steps whose time is measured.
        client_class()

    def run(self) -> None:
        pause = 0.0
        while True:
            last = self.ended.wait(pause)
            try:
                with quiet():
                    self._send()
                pause = INTERVAL
            except Exception as error:  # whatever MLflow raises, training goes on
                self._warn(f"does not take the curves of {self.arm}/seed{self.seed} ({_first_line(error)})")
                pause = RETRY
            if last:
                break
        if self.lock is not None:
            os.close(self.lock)

    def finish(self, status: str) -> None:
        """Send what is left and the final status, unless that takes longer than GRACE."""
        self.status = status
        self.ended.set()
        self.join(GRACE)
        if self.is_alive():
            self._warn(f"was not told in time that {self.arm}/seed{self.seed} ended")

    def _warn(self, words: str) -> None:
        if not self.warned:
            log.warning(f"MLFLOW_TRACKING_URI: {self.uri} {words}; training does not need it and goes on")
        self.warned = True

    def _send(self) -> None:
        from mlflow.entities import Metric

        status = self.status  # before the rows are read: what ends the run is sent after its last row
        while not self.rows.empty():
            row, now = self.rows.get(), round(1000 * time.time())
            self.unsent += [(name, value, now, int(row["step"])) for name, value in curve_points(row).items()]
        if self.client is None:
            with exclusive(self.uri):
                self.client = connect(self.uri)
        if self.run_id is None:
            self.run_id = self._start(self.client)
        while self.unsent:
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in self.unsent[:BATCH]])
            del self.unsent[:BATCH]
        if status != "RUNNING":
            self.client.set_terminated(self.run_id, status)

    def _start(self, client: MlflowClient) -> str:
        """Make the run and hold its lock; end one of the same arm and seed whose process was killed."""
        from mlflow.entities import Param

        experiment = open_experiment(client, self.uri, self.study, QUESTION)
        client.set_experiment_tag(experiment, "mlflow.note.content", NOTE)
        key = job_key(self.study, self.arm, self.seed)
        if self.lock is None:
            end_dead(client, self.study, client.search_runs([experiment], f"tags.job_key = '{key}'"))
            self.lock = _hold(_lock_file(self.study, self.arm, self.seed))
        os.truncate(self.lock, 0)
        made = {"git_commit": git_commit(), "config_hash": self.study.arm(self.arm).hash, "lock_hash": lock_hash()}
        tags = arm_tags(self.study, self.arm, self.seed) | made_by(made | {"device": device_name(self.device)})
        tags |= {"live": "true", "job_key": key, "folder": _folder(self.study)}
        name = f"{self.arm}-{self.study.study}-s{self.seed}"
        run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        os.pwrite(self.lock, run_id.encode(), 0)
        params = [Param(name, value[:6000]) for name, value in parameters(self.study, self.arm).items()]
        client.log_batch(run_id, params=params)
        return run_id


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
