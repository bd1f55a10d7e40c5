"""What the import and live logging share: opening a tracking store, its experiments, and what a run is described by."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from invdpo.config import StudyConfig

PATIENCE = 20.0  # s that another process may keep a database to itself; MLflow waits as long in each of its sessions
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report every call of the client to its makers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 take minutes to say that nobody answers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # s
}
DELETE = "it holds copies of the results only, and the next `invdpo mlflow` makes it again"


def database(uri: str) -> Path | None:
    """The file behind a `sqlite:///` address; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Let one process of this package at a time make or fill a database file; the others wait. A server needs none."""
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock on the folder leaves no file behind, and the system lifts it however the process ends.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the migration log of a new database, and tracebacks and retries of what also arrives as an exception."""
    loggers = [logging.getLogger(name) for name in ("alembic", "alembic.runtime.migration", "mlflow", "urllib3")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def client_class() -> type[MlflowClient]:
    """MLflow's client, imported (seconds) with this package's settings where the environment has none of its own."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient


def connect(uri: str) -> MlflowClient:
    """A client of a tracking store; a database file is made if there is none. Call it inside `exclusive`.

    Raises InvdpoError for a database that another process keeps locked, that is damaged, or that another version of
    MLflow made.
    """
    make_client, path = client_class(), database(uri)
    with quiet():
        if path is not None:
            if path.is_file() and path.stat().st_size:
                _check(path)
            else:
                # Whole or absent: MLflow takes seconds to make one, and cannot go on with half of it.
                with replace_when_done(path) as temporary:
                    make_client(f"sqlite:///{temporary}").search_experiments(max_results=1)
        return make_client(uri)


def _check(path: Path) -> None:
    """Raise InvdpoError unless the file can be written now and has the tables of this MLflow."""
    import mlflow
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            found = [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
            connection.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        if is_locked(error):
            raise locked(path) from error
        raise InvdpoError(f"{path} is no database that MLflow can use ({error}). Delete it: {DELETE}.") from error
    settings = Config()
    settings.set_main_option("script_location", "mlflow:store/db_migrations")
    scripts = ScriptDirectory.from_config(settings)
    if found == scripts.get_heads():
        return
    known = {script.revision for script in scripts.walk_revisions()}
    age = "an older" if known.issuperset(found) else "a newer"
    raise InvdpoError(
        f"{path} was made by {age} MLflow than this one ({mlflow.__version__}): its tables are of revision "
        f"{', '.join(found) or 'none'}. Delete it: {DELETE}. If it holds anything else, use the MLflow that made it, "
        f"or bring an older one up to date with `mlflow db upgrade sqlite:///{path}`."
    )


def is_locked(error: BaseException) -> bool:
    """Whether SQLite, or MLflow in its words, says that another process holds the file."""
    return "database is locked" in str(error)


def locked(path: Path | None) -> InvdpoError:
    """What to say about such a file."""
    return InvdpoError(
        f"{path} is locked by another process, which did not let go of it for {PATIENCE:.0f} s. Wait until that "
        "process (an import, MLflow's server, a program that looks into the database) has ended, or end it; then run "
        f"again. If there is none, delete the file: {DELETE}."
    )


def experiment_name(study: StudyConfig, question: str) -> str:
    """`shapes: q_vs_p`."""
    return f"{study.study}: {question}"


def artifact_folder(uri: str, study: StudyConfig, question: str) -> Path | None:
    """Where an experiment's artifacts lie beside a database file; a server has a place of its own (None)."""
    path = database(uri)
    return None if path is None else path.parent / "mlruns" / study.study / question


def open_experiment(client: MlflowClient, uri: str, study: StudyConfig, question: str) -> str:
    """The id of a question's experiment, made or restored if needed; other processes may be making it too."""
    from mlflow.exceptions import MlflowException

    name, folder = experiment_name(study, question), artifact_folder(uri, study, question)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, None if folder is None else folder.as_uri())
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _flatten(prefix: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flatten(f"{prefix}.{key}", part).items()}
    return {prefix: str(value)}


def parameters(study: StudyConfig, arm: str) -> dict[str, str]:
    """Recipe slots, learning rate, beta, batch and the rest of the arm's settings."""
    config = study.arm(arm)
    params = {"method": config.method, "labels": config.labels}
    if not config.trains:
        return params
    training = config.training
    params |= _flatten("recipe", config.recipe.model_dump(mode="json"))
    params |= {
        "learning_rate": str(config.learning_rate),
        "beta": str(config.recipe.beta),
        "batch": str(training.batch),
        "steps": str(training.steps),
        "optimizer": training.optimizer,
        "warmup_steps": str(training.warmup_steps),
        "initial_rounding": str(config.initial_rounding),
    }
    return params


def arm_tags(study: StudyConfig, arm: str, seed: int) -> dict[str, str]:
    """What runs are grouped and searched by."""
    entry = study.arms[arm]
    return {
        "arm": arm,
        "seed": str(seed),
        "base": study.with_base_of(arm).base,
        "method": Path(entry.method).stem,
        "stage": "train",
        "labels": entry.labels,
        "study": study.study,
    }


def made_by(record: Mapping[str, Any]) -> dict[str, str]:
    """Of a run record, the tags that say which code, configuration and libraries made the run, and on what."""
    return {name: str(record.get(name)) for name in ("git_commit", "config_hash", "lock_hash", "device")}


def curve_points(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of train.jsonl by metric name; those that a recipe does not have are left out."""
    return {
        f"train/{name}": float(value)
        for name, value in row.items()
        if name != "step" and value is not None and math.isfinite(value)
    }
