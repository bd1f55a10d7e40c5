"""Import finished runs into sqlite:///<root>/mlflow.db so that they can be compared in MLflow's own pages.

One MLflow experiment per question, one MLflow run per arm and training seed. MLflow holds copies only: tables, figures
and claims never read it, and deleting the database costs nothing but a new import.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    baseline_of,
    comparison_arms,
    control_arms,
    load_evidence,
    load_run,
    scorer_title,
    step_families,
)
from invdpo.evidence.statistics import mean_interval, win_rate

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from invdpo.config import StudyConfig

# Part of every content hash: raise it when the imported form changes, and every run is imported again.
FORMAT = "1"
BATCH = 900  # MLflow takes at most 1,000 metrics, parameters and tags a call

NOTES = {
    "comparison": "**Which method raises the scores most?** One run per method and training seed (Table 1, Fig. 3). "
    "Select the runs, *Compare*, and group by the tag `arm`. `eval/*_delta_vs_base` is the paired gain over the base "
    "model at the last checkpoint, with its 95 % interval over prompts in `_lo` and `_hi`.",
    "q_vs_p": "**Is one timestep of the inversion (p) better than one of the forward noise (q)?** Table S5; group by "
    "`arm`.",
    "inversion_steps": "**Do more inversion steps help?** Table 3. One run per family and training seed; the step axis "
    "of `inversion/*` is the number of inversion steps N, not the optimizer step.",
    "controls": "**Does a method learn from the labels?** Each method with true, shuffled and swapped labels; group by "
    "`method`, then colour by the tag `labels`. What shuffled labels gain too is not preference learning.",
}


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: runs imported, left as they were, and deleted; and the database's address."""

    uri: str
    imported: int
    unchanged: int
    deleted: int


@dataclass(frozen=True)
class _Run:
    """One MLflow run to be. metrics: (name, value, timestamp in ms, step)."""

    key: str
    name: str
    digest: str
    start: int
    end: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the migration log of a new database."""
    loggers = [logging.getLogger(name) for name in ("alembic", "alembic.runtime.migration", "mlflow")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def question_arms(study: StudyConfig) -> dict[str, list[str]]:
    """Experiment -> arms with one MLflow run per seed (inversion_steps has its own runs, one per family)."""
    q_vs_p = list(study.experiments.q_vs_p.arms) if study.experiments.q_vs_p else []
    controls = [arm for method, arms in control_arms(study).items() for arm in (method, *arms.values())]
    base = baseline_arm(study)
    questions = {"comparison": comparison_arms(study), "q_vs_p": q_vs_p, "controls": controls}
    return {name: list(dict.fromkeys([*arms, *([base] if base else [])])) for name, arms in questions.items() if arms}


def _digest(*parts: Any) -> str:
    content = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _flatten(prefix: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flatten(f"{prefix}.{key}", part).items()}
    return {prefix: str(value)}


def _params(study: StudyConfig, arm: str) -> dict[str, str]:
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


def _scores_metrics(evidence: Evidence, arm: str, seed: int, at: dict[int, int]) -> list[tuple[str, float, int, int]]:
    """eval/<scorer> at every checkpoint, and at the last one the paired gain and win rate over the base."""
    if not evidence.has(arm):
        return []
    scores, base = evidence.scores[arm], baseline_of(evidence.study, arm)
    if scores.trained and seed not in scores.seeds:
        return []
    row = scores.seeds.index(seed) if scores.trained else 0
    found = []
    for scorer, values in scores.values.items():
        for k, step in enumerate(scores.steps):
            found.append((f"eval/{scorer}", float(values[k, row].mean()), at[step], step))
        if base is None or arm == base or not evidence.has(base, scorer):
            continue
        last = scores.steps[-1]
        first = evidence.final(base, scorer)[:1]
        gain = mean_interval(values[-1, row : row + 1] - first)
        wins = win_rate(values[-1, row : row + 1], first)
        for suffix, interval in (("delta_vs_base", gain), ("win_rate_vs_base", wins)):
            name = f"eval/{scorer}_{suffix}"
            found += [(name, interval.estimate, at[last], last), (f"{name}_lo", interval.low, at[last], last),
                      (f"{name}_hi", interval.high, at[last], last)]  # fmt: skip
    return found


def _arm_runs(evidence: Evidence, question: str, arm: str) -> Iterator[_Run]:
    """The runs of one arm, one per training seed that has a run.json (one in all where nothing is trained)."""
    study, root = evidence.study, evidence.study.root
    base = baseline_of(study, arm)
    entry = study.arms[arm]
    method = Path(entry.method).stem
    base_files = sorted((root / "scores" / base).glob("seed*.parquet")) if base else []
    base_digest = [_file_digest(path) for path in base_files]
    params = _params(study, arm)
    for seed in study.seeds:
        folder = root / "runs" / arm / f"seed{seed}"
        record = load_run(folder)
        if record is None or (not study.arm(arm).trains and seed != study.seeds[0]):
            continue
        files = (folder / "run.json", folder / "train.jsonl", root / "scores" / arm / f"seed{seed}.parquet")
        key = f"{study.study}/{question}/{arm}/seed{seed}"
        tags = {"arm": arm, "seed": str(seed), "base": study.with_base_of(arm).base, "method": method, "stage": "train",
                "labels": entry.labels, "study": study.study, "title": arm_title(arm),
                "git_commit": str(record.get("git_commit")), "config_hash": str(record.get("config_hash"))}  # fmt: skip
        digest = _digest([_file_digest(path) for path in files], base_digest, tags, params)
        start = float(record["started"])
        log = evidence.logs[arm][seed]
        metrics, at = [], {0: round(1000 * start)}
        for row in log.to_dict("records"):
            step = int(row["step"])
            at[step] = round(1000 * (start + float(row["seconds"])))
            for name, value in row.items():
                if name != "step" and value is not None and math.isfinite(value):
                    metrics.append((f"train/{name}", float(value), at[step], step))
        end = max(at.values())
        if evidence.has(arm):
            at |= {step: end for step in evidence.scores[arm].steps if step not in at}
        metrics += _scores_metrics(evidence, arm, seed, at)
        yield _Run(key, f"{arm}-{study.study}-s{seed}", digest, at[0], end, tags, params, metrics)


def _step_runs(evidence: Evidence) -> Iterator[_Run]:
    """One run per family and training seed; the metric step is the number of inversion steps."""
    study = evidence.study
    base = baseline_arm(study)
    for family, arms in step_families(study).items():
        for seed in study.seeds:
            metrics, times = [], []
            for count, arm in arms.items():
                record = load_run(study.root / "runs" / arm / f"seed{seed}")
                if record is None or not evidence.has(arm) or seed not in evidence.scores[arm].seeds:
                    continue
                started = round(1000 * float(record["started"]))
                times.append(started)
                scores = evidence.scores[arm]
                row = scores.seeds.index(seed)
                for scorer, values in scores.values.items():
                    final = values[-1, row : row + 1]
                    metrics.append((f"inversion/{scorer}", float(final.mean()), started, count))
                    if base is not None and evidence.has(base, scorer):
                        gain = mean_interval(final - evidence.final(base, scorer)[:1])
                        name = f"inversion/{scorer}_delta_vs_base"
                        for suffix, value in (("", gain.estimate), ("_lo", gain.low), ("_hi", gain.high)):
                            metrics.append((name + suffix, value, started, count))
                log = evidence.logs[arm][seed]
                if len(log):
                    metrics.append(("inversion/unet_evals", float(log["unet_evals"].iloc[-1]), started, count))
            if not metrics:
                continue
            tags = {"arm": family, "seed": str(seed), "base": study.base, "stage": "ablation", "labels": "true",
                    "method": Path(study.arms[next(iter(arms.values()))].method).stem, "study": study.study,
                    "title": arm_title(family)}  # fmt: skip
            params = {f"arm_n{count}": arm for count, arm in arms.items()}
            key = f"{study.study}/inversion_steps/{family}/seed{seed}"
            digest = _digest(tags, params, metrics)
            name = f"{family}-inversion-{study.study}-s{seed}"
            yield _Run(key, name, digest, min(times), max(times), tags, params, metrics)


def sync(study: StudyConfig) -> SyncReport:
    """Bring root/mlflow.db up to date with the files of the study.

    A run is imported again only if its files or settings changed; one that an earlier sync left half done, or that the
    study no longer has, is deleted. Only one sync may write a database at a time.
    """
    from mlflow.tracking import MlflowClient

    evidence = load_evidence(study)
    root = study.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    arms = question_arms(study)
    questions = {name: [run for arm in arms.get(name, []) for run in _arm_runs(evidence, name, arm)] for name in NOTES}
    questions["inversion_steps"] = list(_step_runs(evidence))
    imported = unchanged = deleted = 0
    with _quiet():
        client = MlflowClient(uri)
        for name, runs in questions.items():
            if not runs and client.get_experiment_by_name(_experiment_name(study, name)) is None:
                continue
            experiment = _experiment(client, study, name, evidence, root)
            present = _present(client, experiment)
            wanted = {run.key: run for run in runs}
            for run_id, (key, digest, finished) in present.items():
                if not finished or key not in wanted or wanted[key].digest != digest:
                    client.delete_run(run_id)
                    deleted += 1
                else:
                    del wanted[key]
                    unchanged += 1
            for run in wanted.values():
                _write(client, experiment, run)
                imported += 1
    return SyncReport(uri, imported, unchanged, deleted)


def _experiment_name(study: StudyConfig, question: str) -> str:
    return f"{study.study}: {question}"


def _experiment(client: MlflowClient, study: StudyConfig, name: str, evidence: Evidence, root: Path) -> str:
    """The id of a question's experiment, made if needed; its note says what the question is."""
    title = _experiment_name(study, name)
    found = client.get_experiment_by_name(title)
    if found is not None and found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    identity = found.experiment_id if found else client.create_experiment(title, (root / "mlruns" / name).as_uri())
    note = f"{NOTES[name]}\n\nThe score that decides: **{scorer_title(evidence.primary)}** (`{evidence.primary}`)."
    if found is None or found.tags.get("mlflow.note.content") != note:
        client.set_experiment_tag(identity, "mlflow.note.content", note)
    return identity


def _present(client: MlflowClient, experiment: str) -> dict[str, tuple[str, str, bool]]:
    """Run id -> (job key, content hash, finished) of the experiment's runs."""
    found, token = {}, None
    while True:
        page = client.search_runs([experiment], max_results=1_000, page_token=token)
        for run in page:
            tags = run.data.tags
            finished = run.info.status == "FINISHED"
            found[run.info.run_id] = (tags.get("job_key", ""), tags.get("content_hash", ""), finished)
        token = page.token
        if not token:
            return found


def _write(client: MlflowClient, experiment: str, run: _Run) -> None:
    """Import one run. Its status becomes FINISHED last, so an interrupted import is recognised and replaced."""
    from mlflow.entities import Metric, Param

    tags = run.tags | {"job_key": run.key, "content_hash": run.digest}
    made = client.create_run(experiment, start_time=run.start, tags=tags, run_name=run.name)
    identity = made.info.run_id
    params = [Param(key, value[:6000]) for key, value in sorted(run.params.items())]
    metrics = [Metric(*metric) for metric in run.metrics]
    # Parameters ride with the first metrics: every call is a transaction that waits for the disk.
    client.log_batch(identity, metrics=metrics[: BATCH - len(params)], params=params)
    for begin in range(BATCH - len(params), len(metrics), BATCH):
        client.log_batch(identity, metrics=metrics[begin : begin + BATCH])
    client.set_terminated(identity, "FINISHED", end_time=run.end)
