"""Import finished runs into sqlite:///<root>/mlflow.db so that they can be compared in MLflow's own pages.

One MLflow experiment per question, one MLflow run per arm and training seed, and one per question with its tables,
figures and verdicts. MLflow holds copies only: tables, figures and claims never read it, and deleting the database
costs nothing but a new import.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.errors import InvdpoError
from invdpo.evidence.ledger import NOT_RUN, Verdict, read_verdicts
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
from invdpo.tracking.live import QUESTION as LIVE
from invdpo.tracking.live import end_dead
from invdpo.tracking.store import (
    arm_tags,
    artifact_folder,
    connect,
    curve_points,
    database,
    exclusive,
    experiment_name,
    is_locked,
    locked,
    made_by,
    open_experiment,
    parameters,
    quiet,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from invdpo.config import StudyConfig

# Part of every content hash: raise it when the imported form changes, and every run is imported again.
FORMAT = "3"
BATCH = 900  # MLflow takes at most 1,000 metrics, parameters and tags a call
NOTE_LENGTH = 19_000  # MLflow refuses notes of more than 20,000 characters
LARGEST = 2_000_000  # bytes of a table or figure that is copied

HELD_OUT = "held_out"
NOTES = {
    "comparison": "**Which method raises the scores most?** One run per method and training seed (Table 1, Fig. 3). "
    "Select the runs, *Compare*, and group by the tag `arm`. `eval/*_delta_vs_base` is the paired gain over the base "
    "model at each checkpoint, with its 95 % interval over prompts in `_lo` and `_hi`.",
    "q_vs_p": "**Is one timestep of the inversion (p) better than one of the forward noise (q)?** Table S5; group by "
    "`arm`.",
    "inversion_steps": "**Do more inversion steps help?** Table 3. One run per family and training seed; the step axis "
    "of `inversion/*` is the number of inversion steps N, not the optimizer step.",
    "controls": "**Does a method learn from the labels?** Each method with true, shuffled and swapped labels; group by "
    "`method`, then colour by the tag `labels`. What shuffled labels gain too is not preference learning.",
    HELD_OUT: "**Do the inversions and the surrogate log-ratios hold on pairs that nothing was trained on?** Without "
    "runs of its own: tables and figures only.",
}
# question -> names of its tables and figures; all others belong to the comparison
SHOWN_IN = {
    "q_vs_p": {"table_s5"},
    "inversion_steps": {"table3", "inversion_steps"},
    "controls": {"controls"},
    HELD_OUT: {
        "audit",
        "fig_s9",
        "inversion_error",
        "inversion_levels",
        "precision",
        "preference_accuracy",
    },
}


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: runs imported, left as they were, and deleted, and live ones of processes that were killed; and
    the database's address."""

    uri: str
    imported: int
    unchanged: int
    deleted: int
    killed: int

    def __str__(self) -> str:
        text = f"{self.uri}: {self.imported} runs imported, {self.unchanged} unchanged, {self.deleted} deleted"
        return text + (f", {self.killed} marked as killed" if self.killed else "")


@dataclass(frozen=True)
class _Dataset:
    """What a run read. digest: 32 characters of its content's hash; context: what for."""

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class _Model:
    """Weights that stay where they are: a checkpoint folder, its optimizer step, and the base they started from."""

    checkpoint: str
    step: int
    base: str


@dataclass(frozen=True)
class _Run:
    """One MLflow run to be. metrics: (name, value, timestamp in ms, step); files: content by place among its artifacts;
    datasets: the prompts come first.
    """

    key: str
    name: str
    digest: str
    start: int
    end: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]
    datasets: list[_Dataset] = field(default_factory=list)
    model: _Model | None = None
    files: dict[str, bytes] = field(default_factory=dict)


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


def _datasets(evidence: Evidence, arm: str, record: dict[str, Any]) -> list[_Dataset]:
    """The prompts that the arm was scored on, and the pairs that it was trained on; only what is known."""
    study, found = evidence.study, []
    if evidence.has(arm):
        scores = evidence.scores[arm]
        digest = hashlib.sha256(json.dumps([scores.prompts, scores.texts]).encode()).hexdigest()
        found.append(_Dataset(Path(study.prompts).name, digest[:32], study.prompts, "evaluation"))
    if key := record.get("data_key"):
        found.append(_Dataset(Path(study.preferences).name, key[:32], study.preferences, "training"))
    return found


def _model(study: StudyConfig, arm: str, seed: int, record: dict[str, Any]) -> _Model:
    if not study.arm(arm).trains:
        return _Model(study.base, 0, study.base)
    return _Model((study.root / "runs" / arm / f"seed{seed}" / "unet").as_posix(), record["steps"], study.base)


def _scores_metrics(evidence: Evidence, arm: str, seed: int, at: dict[int, int]) -> list[tuple[str, float, int, int]]:
    """At every checkpoint eval/<scorer>, and its paired gain and win rate over the base with intervals over prompts."""
    if not evidence.has(arm):
        return []
    scores, base = evidence.scores[arm], baseline_of(evidence.study, arm)
    if scores.trained and seed not in scores.seeds:
        return []
    row = scores.seeds.index(seed) if scores.trained else 0
    found = []
    for scorer, values in scores.values.items():
        first = None
        if base is not None and arm != base and evidence.has(base, scorer):
            first = evidence.final(base, scorer)[:1]
        for step, here in zip(scores.steps, values[:, row : row + 1], strict=True):
            found.append((f"eval/{scorer}", float(here.mean()), at[step], step))
            if first is not None:
                for suffix, interval in (("delta", mean_interval(here - first)), ("win_rate", win_rate(here, first))):
                    name = f"eval/{scorer}_{suffix}_vs_base"
                    ends = {name: interval.estimate, f"{name}_lo": interval.low, f"{name}_hi": interval.high}
                    found += [(metric, value, at[step], step) for metric, value in ends.items()]
    return found


def _arm_runs(evidence: Evidence, question: str, arm: str) -> Iterator[_Run]:
    """The runs of one arm, one per training seed that has a run.json (one in all where nothing is trained)."""
    study, root = evidence.study, evidence.study.root
    base = baseline_of(study, arm)
    base_files = sorted((root / "scores" / base).glob("seed*.parquet")) if base else []
    base_digest = [_file_digest(path) for path in base_files]
    params = parameters(study, arm)
    for seed in study.seeds:
        folder = root / "runs" / arm / f"seed{seed}"
        record = load_run(folder)
        if record is None or (not study.arm(arm).trains and seed != study.seeds[0]):
            continue
        files = (folder / "run.json", folder / "train.jsonl", root / "scores" / arm / f"seed{seed}.parquet")
        key = f"{study.study}/{question}/{arm}/seed{seed}"
        tags = arm_tags(study, arm, seed) | made_by(record) | {"title": arm_title(arm)}
        datasets, model = _datasets(evidence, arm, record), _model(study, arm, seed, record)
        links = [asdict(part) for part in (*datasets, model)]
        digest = _digest([_file_digest(path) for path in files], base_digest, tags, params, links)
        start = float(record["started"])
        log = evidence.logs[arm][seed]
        metrics, at = [], {0: round(1000 * start)}
        for row in log.to_dict("records"):
            step = int(row["step"])
            at[step] = round(1000 * (start + float(row["seconds"])))
            metrics += [(name, value, at[step], step) for name, value in curve_points(row).items()]
        end = max(at.values())
        if evidence.has(arm):
            at |= {step: end for step in evidence.scores[arm].steps if step not in at}
        metrics += _scores_metrics(evidence, arm, seed, at)
        name = f"{arm}-{study.study}-s{seed}"
        yield _Run(key, name, digest, at[0], end, tags, params, metrics, datasets, model)


def _step_runs(evidence: Evidence) -> Iterator[_Run]:
    """One run per family and training seed; the metric step is the number of inversion steps."""
    study = evidence.study
    base = baseline_arm(study)
    for family, arms in step_families(study).items():
        for seed in study.seeds:
            metrics, times, datasets = [], [], []
            for count, arm in arms.items():
                record = load_run(study.root / "runs" / arm / f"seed{seed}")
                if record is None or not evidence.has(arm) or seed not in evidence.scores[arm].seeds:
                    continue
                started = round(1000 * float(record["started"]))
                times.append(started)
                datasets = _datasets(evidence, arm, record)  # the same for every N
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
            first = next(iter(arms.values()))
            tags = arm_tags(study, first, seed) | {"arm": family, "stage": "ablation", "title": arm_title(family)}
            params = {f"arm_n{count}": arm for count, arm in arms.items()}
            key = f"{study.study}/inversion_steps/{family}/seed{seed}"
            digest = _digest(tags, params, metrics, [asdict(part) for part in datasets])
            name = f"{family}-inversion-{study.study}-s{seed}"
            yield _Run(key, name, digest, min(times), max(times), tags, params, metrics, datasets)


def question_of(study: StudyConfig, verdict: Verdict) -> str:
    """The experiment that a claim belongs to, by its test and its arms."""
    test = verdict.test
    if test["kind"] in ("agreement", "round_trip") or test.get("rounding"):
        return HELD_OUT
    if test["kind"] == "trend":
        return "inversion_steps"
    here = set(test["arms"]) & set(study.arms)  # an arm that this study does not run leaves its claim with the other
    if study.experiments.q_vs_p and here and here <= set(study.experiments.q_vs_p.arms):
        return "q_vs_p"
    controls = [(kind, arm) for arms in control_arms(study).values() for kind, arm in arms.items()]
    names = {arm for _, arm in controls}
    # Also of a control that this study does not run.
    endings = tuple({f"_{kind}" for kind, _ in controls})
    return "controls" if any(arm in names or arm.endswith(endings) for arm in test["arms"]) else "comparison"


def claims_table(verdicts: list[Verdict], length: int = NOTE_LENGTH) -> str:
    """Markdown of at most `length` characters: a row a verdict, and the claims that were not run in a line."""
    lines = ["| Claim | Where | Reading | Verdict | Value [95 %] |", "|---|---|---|---|---|"]
    for row in verdicts:
        if row.verdict == NOT_RUN:
            continue
        value = "" if row.value is None else f"{row.value:.4g}"
        if row.low is not None:
            high = "∞" if row.high is None else f"{row.high:.4g}"
            value += f" [{row.low:.4g}, {high}]"
        cells = (row.question, row.locus, arm_title(row.variant), f"**{row.verdict}**", value)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines = lines if len(lines) > 2 else ["No claim of this question has been run."]
    absent = dict.fromkeys(row.id for row in verdicts if row.verdict == NOT_RUN)
    if absent:
        lines += ["", "Not run: " + ", ".join(f"`{name}`" for name in absent) + "."]
    rest = "The other rows are in `claims.json` of the summary run."
    while len("\n".join(lines)) > length:
        lines = [*lines[: -2 if lines[-1] == rest else -1], rest]
    return "\n".join(lines)


def _note(evidence: Evidence, question: str, verdicts: list[Verdict]) -> str:
    note = f"{NOTES[question]}\n\nThe score that decides: **{scorer_title(evidence.primary)}** (`{evidence.primary}`)."
    if not verdicts:
        return note
    note += "\n\n### Claims\n\n"
    return note + claims_table(verdicts, NOTE_LENGTH - len(note))


def _summary(study: StudyConfig, question: str, verdicts: list[Verdict], start: int) -> _Run | None:
    """The run that holds a question's tables (csv, md), figures (png) and verdicts; None where there are none."""
    elsewhere = set().union(*SHOWN_IN.values())
    files = {}
    for folder, endings in (("tables", (".csv", ".md")), ("figures", (".png",))):
        for path in sorted((study.root / folder).glob("*")):
            own = path.stem in SHOWN_IN[question] if question in SHOWN_IN else path.stem not in elsewhere
            if own and path.suffix in endings and path.stat().st_size <= LARGEST:
                files[f"{folder}/{path.name}"] = path.read_bytes()
    if not files and (question == HELD_OUT or not verdicts):
        return None
    if verdicts:
        content = json.dumps([asdict(row) for row in verdicts], indent=2, ensure_ascii=False)
        files["claims.json"] = content.encode()
    tags = {
        "stage": "summary",
        "study": study.study,
        "mlflow.note.content": f"Copies of this question's files in `{study.root.as_posix()}`, made by "
        f"`invdpo tables`, `figures`, `present` and `claims`. Larger ones than {LARGEST / 1e6:g} MB are only there.",
    }
    digest = _digest(tags, {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, start)
    name, key = f"summary-{study.study}", f"{study.study}/{question}/summary"
    return _Run(key, name, digest, start, start, tags, {}, [], files=files)


def sync(study: StudyConfig, tracking_uri: str | None = None) -> SyncReport:
    """Bring a tracking store, root/mlflow.db by default, up to date with the files of the study.

    A run is imported again only if its files or settings changed; one that an earlier sync left half done, or that the
    study no longer has, is deleted, and so is what live logging sent of a run that has finished. A live run whose
    process was killed becomes KILLED. Several processes may sync at once: they fill a database file one by one.

    Raises InvdpoError where the store is locked, damaged, of another MLflow, or does not answer.
    """
    from mlflow.exceptions import MlflowException

    own = study.root.resolve() / "mlflow.db"
    uri = tracking_uri or f"sqlite:///{own}"
    evidence = load_evidence(study)
    ledger = study.root / "claims.json"
    verdicts = read_verdicts(ledger) if study.claims and ledger.is_file() else []
    plan = _plan(evidence, verdicts)
    try:
        with exclusive(uri):
            if tracking_uri is None:
                _clear_if_moved(study, own)
            client = connect(uri)
            with quiet():
                return _bring_up_to_date(client, uri, study, plan)
    except MlflowException as error:
        if is_locked(error):
            raise locked(database(uri)) from error
        if "API request to" in str(error):
            raise InvdpoError(
                f"--tracking-uri {uri}: the server does not answer as MLflow does ({str(error).splitlines()[0]}). "
                "Start it, or correct the address; what was already imported stays, and the same command goes on."
            ) from error
        raise


def _clear_if_moved(study: StudyConfig, path: Path) -> None:
    """Start over where the folder was copied or moved: an experiment's artifacts stay where it was made. And delete the
    artifacts of a database that is gone.
    """
    places = []
    if path.is_file():
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                places = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
        except sqlite3.DatabaseError:
            return  # `connect` says what is wrong with it
    uri = f"sqlite:///{path}"
    here = {
        experiment_name(study, name): folder.as_uri()
        for name in NOTES
        if (folder := artifact_folder(uri, study, name)) is not None
    }
    if any(here.get(name, place) != place for name, place in places):
        path.unlink()
    if not path.exists():
        shutil.rmtree(path.parent / "mlruns", ignore_errors=True)


def _plan(evidence: Evidence, verdicts: list[Verdict]) -> dict[str, tuple[list[_Run], str]]:
    """Question -> its runs and its note."""
    study = evidence.study
    arms, plan = question_arms(study), {}
    for name in NOTES:
        runs = [run for arm in arms.get(name, []) for run in _arm_runs(evidence, name, arm)]
        if name == "inversion_steps":
            runs = list(_step_runs(evidence))
        own = [row for row in verdicts if question_of(study, row) == name]
        # The oldest run of all, so that it is no line of the ten newest that MLflow's charts show.
        start = min((run.start for run in runs), default=0) - 1
        if (runs or name == HELD_OUT) and (summary := _summary(study, name, own, max(start, 0))):
            runs.append(summary)
        plan[name] = (runs, _note(evidence, name, own))
    return plan


def _bring_up_to_date(
    client: MlflowClient, uri: str, study: StudyConfig, plan: dict[str, tuple[list[_Run], str]]
) -> SyncReport:
    imported = unchanged = deleted = 0
    for name, (runs, note) in plan.items():
        found = client.get_experiment_by_name(experiment_name(study, name))
        if not runs and found is None:
            continue
        experiment = open_experiment(client, uri, study, name)
        if found is None or found.tags.get("mlflow.note.content") != note:
            client.set_experiment_tag(experiment, "mlflow.note.content", note)
        wanted = {run.key: run for run in runs}
        for run in _present(client, experiment):
            key, digest = (run.data.tags.get(tag, "") for tag in ("job_key", "content_hash"))
            if run.info.status == "FINISHED" and key in wanted and wanted[key].digest == digest:
                del wanted[key]
                unchanged += 1
            else:
                _delete(client, run)
                deleted += 1
        for run in wanted.values():
            _write(client, experiment, run)
            imported += 1
    replaced, killed = _replace_live(client, study)
    return SyncReport(uri, imported, unchanged, deleted + replaced, killed)


def _present(client: MlflowClient, experiment: str) -> Iterator[Any]:
    """The experiment's runs."""
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1_000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _delete(client: MlflowClient, run: Any) -> None:
    """Delete a run with its links and its copies of files."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for output in run.outputs.model_outputs:
        client.delete_logged_model(output.model_id)
    if run.data.tags.get("stage") == "summary":
        get_artifact_repository(run.info.artifact_uri).delete_artifacts()
    client.delete_run(run.info.run_id)


def _replace_live(client: MlflowClient, study: StudyConfig) -> tuple[int, int]:
    """Delete what live logging sent of runs that are finished, and so imported; end that of killed processes. How many
    of each."""
    experiment = client.get_experiment_by_name(experiment_name(study, LIVE))
    if experiment is None:
        return 0, 0
    done, left = [], []
    for run in _present(client, experiment.experiment_id):
        record = load_run(study.root / "runs" / run.data.tags["arm"] / f"seed{run.data.tags['seed']}")
        (left if record is None else done).append(run)
    for run in done:
        client.delete_run(run.info.run_id)
    return len(done), end_dead(client, study, left)


def _write(client: MlflowClient, experiment: str, run: _Run) -> None:
    """Import one run. Its status becomes FINISHED last, so an interrupted import is recognised and replaced."""
    from mlflow.entities import Metric, Param

    tags = run.tags | {"job_key": run.key, "content_hash": run.digest}
    made = client.create_run(experiment, start_time=run.start, tags=tags, run_name=run.name)
    identity = made.info.run_id
    model_id = _link(client, experiment, identity, run)
    judged = [(part.name, part.digest) for part in run.datasets[:1]] or [(None, None)]
    params = [Param(key, value[:6000]) for key, value in sorted(run.params.items())]
    metrics = []
    for name, value, time, step in run.metrics:
        if run.model is not None and name.startswith("eval/") and step == run.model.step:
            metrics.append(Metric(name, value, time, step, model_id, *judged[0], identity))
        else:
            metrics.append(Metric(name, value, time, step))
    # Parameters ride with the first metrics: every call is a transaction that waits for the disk.
    client.log_batch(identity, metrics=metrics[: BATCH - len(params)], params=params)
    for begin in range(BATCH - len(params), len(metrics), BATCH):
        client.log_batch(identity, metrics=metrics[begin : begin + BATCH])
    if run.files:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in run.files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            client.log_artifacts(identity, folder)
    client.set_terminated(identity, "FINISHED", end_time=run.end)


def _link(client: MlflowClient, experiment: str, identity: str, run: _Run) -> str | None:
    """Tell MLflow of the run's datasets and of its weights, which stay where they are; the model's id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus

    if run.datasets:
        inputs = [
            DatasetInput(
                Dataset(part.name, part.digest, "local", json.dumps({"uri": part.source})),
                [InputTag("mlflow.data.context", part.context)],
            )
            for part in run.datasets
        ]
        client.log_inputs(identity, datasets=inputs)
    if run.model is None:
        return None
    # As mlflow.create_external_model, which takes neither a client nor a time and writes a file a model.
    tags = {"mlflow.model.isExternal": "true", "checkpoint": run.model.checkpoint, "base": run.model.base}
    model = client.create_logged_model(experiment, run.name, identity, tags=tags, model_type="diffusion UNet")
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(identity, [LoggedModelOutput(model.model_id, run.model.step)])
    return model.model_id
