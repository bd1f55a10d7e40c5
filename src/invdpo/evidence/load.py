"""What the stages before left behind: scores, training logs and run records, as arrays the statistics can use."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from invdpo.config import NO_TRAINING
from invdpo.errors import InvdpoError
from invdpo.scorers.composition import TASKS

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

# Order of the columns in every table; a score that is not listed comes after these, by name.
SCORERS = {
    "oracle_utility": "Oracle utility",
    "oracle_sg_iou": "SG-IoU",
    "oracle_entity_iou": "Entity-IoU",
    "oracle_relation_iou": "Relation-IoU",
    "pickscore": "PickScore",
    "pickscore_scaled": "PickScore, scaled",
    "clip": "CLIP",
    "aesthetic": "Aesthetic",
    "hps": "HPS",
    "imagereward": "ImageReward",
}
# The same score in another unit: in the score files for those who compare with such numbers, in no table.
RESCALED = {"pickscore_scaled"}
ARMS = {
    "base": "Base",
    "sft": "SFT",
    "diffusion_dpo": "Diffusion-DPO",
    "inversion_dpo_paper": "Inversion-DPO (Eq. 16)",
    "inversion_dpo_paper_as_minus": "Inversion-DPO (Eq. 16), fp16 start, values tuned for DPO's sign",
    "inversion_dpo_minus": "Inversion-DPO (Eq. 16, DPO's sign)",
    "inversion_dpo_minus_as_paper": "Inversion-DPO (Eq. 16, DPO's sign), fp16 start, at Eq. 16's values",
    "inversion_dpo_code": "Inversion-DPO (released code)",
    "inversion_dpo_exact": "Inversion-DPO (Eq. 11)",
    "inversion_dpo_implied": "Inversion-DPO (implied noise)",
    "q_single": "one timestep of q",
    "p_single": "one timestep of p",
    "p_single_as_q": "one timestep of p, at q's values",
    "ddim_inpo": "DDIM-InPO",
    "smpo": "SmPO",
    "mapo": "MaPO",
    "dspo": "DSPO",
    "diffusion_kto": "Diffusion-KTO",
    "diffusion_npo": "Diffusion-NPO",
    "likelihood_dpo": "DPO on the true log-ratio",
    "inversion_dpo": "Inversion-DPO",
    "itercomp": "IterComp",
    "spo": "SPO",
}
SUFFIXES = {
    "shuffled": "labels shuffled",
    "swapped": "labels swapped",
    "published": "published",
    "rounded": "fp16 start",
    "weak": "a tenth of the learning rate",
    "strong": "three times the learning rate",
    "sd15": "SD1.5",
    "multi_objective": "mean of the metrics",
    "dpg": "DPG score alone",
    "compbench": "CompBench 3-in-1 alone",
    "fixed": "mean of the metrics, fixed pairs",
}


INCOMPLETE = (
    "is missing or not finite for some checkpoint, seed or prompt. "
    "Evaluate every seed of the arm with the same study file."
)


def published() -> list[dict[str, str]]:
    """The rows of published.csv: numbers printed in the paper, with their place in it."""
    text = resources.files("invdpo.evidence").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def scorer_title(name: str) -> str:
    """How a score is called in print."""
    return SCORERS.get(name, name)


def arm_title(name: str) -> str:
    """How an arm is called in print: `diffusion_dpo_shuffled` -> `Diffusion-DPO, labels shuffled`."""
    if name in ARMS:
        return ARMS[name]
    for suffix, words in SUFFIXES.items():
        if stem := name.removesuffix(f"_{suffix}") if name.endswith(f"_{suffix}") else "":
            return f"{arm_title(stem)}, {words}"
    stem, _, suffix = name.rpartition("_")
    if stem and suffix[:1] == "n" and suffix[1:].isdigit():
        return f"{arm_title(stem)}, N = {suffix[1:]}"
    return name


@dataclass(frozen=True)
class ArmScores:
    """All scores of one arm. values[scorer]: (steps, seeds, prompts that have this score) float64, by (set, id).
    judged[scorer]: places in `prompts` of those that have it, ascending.
    tasks[task of `invdpo.scorers.composition`]: (seeds, prompts) of the last step alone, nan for a prompt that does not
    ask for it. versions: scorer -> its version. config_hash: of the arm that was trained. sampling: how its images were
    drawn.
    """

    arm: str
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    judged: Mapping[str, list[int]]
    tasks: Mapping[str, np.ndarray]
    versions: Mapping[str, str]
    config_hash: str
    sampling: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        """False for the base model: it has one column of scores, whatever the training seed."""
        return self.steps[-1] > 0

    def final(self, scorer: str) -> np.ndarray:
        """(seeds, prompts) at the last checkpoint."""
        return self.values[scorer][-1]


COLUMNS = ["seed", "step", "prompt_set", "prompt_id", "prompt", "scorer", "scorer_version", "score"]


def read_provenance(path: Path) -> dict[str, Any]:
    """What `invdpo evaluate` noted in a parquet file's metadata; InvdpoError where it is no such file."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[b"provenance"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise InvdpoError(
            f"{path}: not a file of `invdpo evaluate` ({type(error).__name__}: {error}). Evaluate the arm again."
        ) from error


def load_scores(root: Path, arm: str, seeds: tuple[int, ...] | None = None) -> ArmScores | None:
    """The scores of one arm, or None if it has not been evaluated.

    `seeds` leaves out files of other training seeds (of an earlier configuration); the base model's only file is
    always read. InvdpoError if the seeds of an arm were not scored on the same prompts, checkpoints and scorers, were
    trained with different configurations, or were sampled or scored differently.
    """
    folder = root / "scores" / arm
    frames: dict[str, pd.DataFrame] = {}
    noted: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("seed*.parquet")):
        made = read_provenance(path)
        frame = pd.read_parquet(path, columns=COLUMNS)
        untrained = not frame["step"].to_numpy().any()
        if seeds is None or untrained or set(frame["seed"]) <= set(seeds):
            frames[path.name], noted[path.name] = frame, made
    if not frames:
        return None
    config_hash, sampling = (
        _the_one({name: made.get(key) for name, made in noted.items()}, f"{folder}: files of different {words}")
        for key, words in (("config_hash", "configurations of training"), ("sampling", "settings of sampling"))
    )
    versions = _versions(frames, folder)
    rows = pd.concat(frames.values(), ignore_index=True)
    rows["prompt_id"] = rows["prompt_id"].astype(str)
    rows["prompt_set"] = rows["prompt_set"].astype(str)
    texts = rows.groupby(["prompt_set", "prompt_id"], sort=True)["prompt"].first()
    keys = [(str(a), str(b)) for a, b in texts.index.to_list()]
    steps, used = sorted(np.unique(rows["step"])), sorted(np.unique(rows["seed"]))
    asked = rows["scorer"].str.removeprefix("oracle_").isin(TASKS)
    tasks = _tasks(rows.loc[asked & (rows["step"] == steps[-1])], folder, used, keys)
    values, judged = {}, {}
    for name, part in rows[~asked].groupby("scorer", sort=True):
        cube = part.set_index(["step", "seed", "prompt_set", "prompt_id"])["score"]
        if cube.index.has_duplicates:
            raise InvdpoError(f"{folder}: {name} scored an image twice. Evaluate the arm again.")
        # Some scores exist for some prompts only: a caption without a relation has no relation to agree with.
        having = set(zip(part["prompt_set"], part["prompt_id"], strict=True))
        judged[str(name)] = [place for place, key in enumerate(keys) if key in having]
        own = [keys[place] for place in judged[str(name)]]
        full = pd.MultiIndex.from_tuples([(t, s, *k) for t in steps for s in used for k in own])
        grid = cube.reindex(full).to_numpy(np.float64).reshape(len(steps), len(used), len(own))
        if not np.isfinite(grid).all():
            raise InvdpoError(f"{folder}: {name} {INCOMPLETE}")
        values[str(name)] = grid
    return ArmScores(
        arm,
        steps=tuple(int(s) for s in steps),
        seeds=tuple(int(s) for s in used),
        prompts=tuple(keys),
        texts=tuple(map(str, texts)),
        values=values,
        judged=judged,
        tasks=tasks,
        versions=versions,
        config_hash=str(config_hash),
        sampling=sampling or {},
    )


def _versions(frames: Mapping[str, pd.DataFrame], folder: Path) -> dict[str, str]:
    """Scorer -> its version in all files of an arm."""
    found: dict[str, dict[str, list[str]]] = {}
    for file, frame in frames.items():
        for scorer, version in frame[["scorer", "scorer_version"]].drop_duplicates().itertuples(index=False):
            found.setdefault(str(scorer), {}).setdefault(file, []).append(str(version))
    words = "files of different versions of"
    return {
        scorer: _the_one({file: ", ".join(kinds) for file, kinds in files.items()}, f"{folder}: {words} {scorer}")
        for scorer, files in found.items()
    }


def _the_one(found: Mapping[str, Any], what: str) -> Any:
    """The value that all entries have; InvdpoError that sets the odd ones beside each other."""
    groups: dict[str, list[str]] = {}
    for name, value in found.items():
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(name)
    if len(groups) > 1:
        sides = "; ".join(f"{value} in {', '.join(names)}" for value, names in sorted(groups.items()))
        raise InvdpoError(f"{what}: {sides}. Evaluate all of them again with the same study file and code.")
    return next(iter(found.values()))


def _tasks(rows: pd.DataFrame, folder: Path, seeds: list[int], keys: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Task -> (seeds, prompts) of one checkpoint's rows, nan for a prompt that does not ask for the task."""
    cells = pd.Series(rows.set_index(["scorer", "seed", "prompt_set", "prompt_id"])["score"])
    if cells.index.has_duplicates:
        raise InvdpoError(
            f"{folder}: {cells.index[cells.index.duplicated()][0]} is there twice. Evaluate the arm again."
        )
    if cells.empty:
        return {}
    table = pd.DataFrame(cells.unstack(["prompt_set", "prompt_id"])).reindex(columns=pd.MultiIndex.from_tuples(keys))
    found = {}
    for name in sorted(set(rows["scorer"])):
        found[name.removeprefix("oracle_")] = values = table.loc[name].reindex(seeds).to_numpy(np.float64)
        missing = np.isnan(values)
        if (missing.any(axis=0) != missing.all(axis=0)).any():
            raise InvdpoError(f"{folder}: {name} {INCOMPLETE}")
    return found


def load_log(run: Path) -> pd.DataFrame:
    """train.jsonl of one run as a frame sorted by step; empty (no columns) if nothing was trained."""
    path = run / "train.jsonl"
    if not path.exists():
        return pd.DataFrame()
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return pd.DataFrame(rows).drop_duplicates("step", keep="last").sort_values("step") if rows else pd.DataFrame()


def load_run(run: Path) -> dict[str, Any] | None:
    """run.json of one run, or None."""
    path = run / "run.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class Lack:
    """What of an arm is not there, in a few words for a table's cell, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Evidence:
    """Everything a study has measured. An arm is in `scores` if all its seeds have been scored; if only some have, it
    is in `lacking`, for a mean over fewer seeds is another number. logs: those that exist.
    """

    study: StudyConfig
    scores: Mapping[str, ArmScores]
    logs: Mapping[str, Mapping[int, pd.DataFrame]]
    lacking: Mapping[str, Lack] = field(default_factory=dict)

    @property
    def scorers(self) -> list[str]:
        """Names of all scores that any arm has or the study asks for, in the order of the tables."""
        asked = self.study.scorers
        found = {name for arm in self.scores.values() for name in arm.values}
        found |= {name for name in SCORERS if getattr(asked, name, None)}
        found = (found | ({"oracle_utility"} if asked.oracle else set())) - RESCALED
        return [name for name in SCORERS if name in found] + sorted(found - set(SCORERS))

    @property
    def primary(self) -> str:
        """The score that decides: the world's own where there is one, otherwise the held-out preference model."""
        return "oracle_utility" if "oracle_utility" in self.scorers else "hps"

    def has(self, arm: str, scorer: str | None = None) -> bool:
        """True if the arm has been scored (by that scorer)."""
        return arm in self.scores and (scorer is None or scorer in self.scores[arm].values)

    def lack(self, arm: str, scorer: str | None = None) -> Lack | None:
        """What is missing before the arm (by that scorer) can be reported; None if nothing is."""
        if arm not in self.scores:
            return self.lacking.get(arm) or Lack("not run", _commands(self.study, arm))
        if self.has(arm, scorer):
            return None
        return Lack(f"no {scorer_title(str(scorer))}", _commands(self.study, arm, train=False))

    def absent(self, scorer: str | None, *arms: str | None) -> str:
        """What a table's cell about these arms (by that scorer) says where there is no number: what the first of them
        lacks, or which other one lacks what. None for an arm that the study has not.
        """
        for arm in arms:
            if arm is None:
                return "no base arm"
            if lack := self.lack(arm, scorer):
                return lack.what if arm == arms[0] else f"{arm_title(arm)}: {lack.what}"
        return "no log of every seed"

    def status(self, scorer: str | None, *arms: str | None) -> str:
        """`ok`, or what the arms lack (by that scorer; None: by any) and the commands that make it."""
        scorers = [None, *self.scorers] if scorer is None else [scorer]
        known = [arm for arm in arms if arm is not None]
        lacks = dict.fromkeys(lack for arm in known for name in scorers if (lack := self.lack(arm, name)))
        return "; ".join(f"{lack.what}: {lack.command}" for lack in lacks) or "ok"

    def missing(self, arms: Iterable[str | None]) -> list[str]:
        """A note for each of the arms that is not complete, with the command that makes what is missing."""
        known = dict.fromkeys(arm for arm in arms if arm is not None)
        return [f"{arm_title(arm)}, {text}" for arm in known if (text := self.status(None, arm)) != "ok"]

    def final(self, arm: str, scorer: str) -> np.ndarray:
        """(seeds, prompts) scores of the arm's last checkpoint."""
        return self.scores[arm].final(scorer)

    def paired(self, arm: str, baseline: str, scorer: str) -> tuple[np.ndarray, np.ndarray]:
        """Last-checkpoint scores of two arms on the same seeds and prompts, (seeds, prompts) each.

        Two trained arms are matched by training seed; an untrained one is repeated for every seed of the other.
        """
        return tuple(part[-1] for part in self.paired_curves(arm, baseline, scorer))  # pyright: ignore

    def paired_curves(self, arm: str, baseline: str, scorer: str) -> tuple[np.ndarray, np.ndarray]:
        """The same for all checkpoints, (steps of that arm, seeds, prompts) each."""
        first, second = self.scores[arm], self.scores[baseline]
        if first.prompts != second.prompts:
            raise InvdpoError(
                f"{arm} and {baseline} were scored on different prompts; evaluate both with the same study file."
            )
        a, b = first.values[scorer], second.values[scorer]
        if first.trained and second.trained:
            common = [seed for seed in first.seeds if seed in second.seeds]
            if not common:
                raise InvdpoError(f"{arm} and {baseline} share no training seed; train both with the study's seeds.")
            a = a[:, [first.seeds.index(seed) for seed in common]]
            b = b[:, [second.seeds.index(seed) for seed in common]]
        seeds = max(a.shape[1], b.shape[1])
        return tuple(  # pyright: ignore
            np.broadcast_to(x, (x.shape[0], seeds, x.shape[2])) if x.shape[1] == 1 else x for x in (a, b)
        )

    def cost(self, arm: str, column: str) -> dict[int, float]:
        """Mean over seeds of a cumulative column of the training log at every checkpoint: {step: value}.

        Without the checkpoints that some seed's log does not have.
        """
        if arm not in self.scores:
            return {}
        logs = [log.set_index("step") if len(log) else log for log in self.logs.get(arm, {}).values()]
        found = {}
        for step in self.scores[arm].steps:
            if step == 0:
                found[step] = 0.0
            elif logs and all(step in log.index and column in log for log in logs):
                found[step] = float(np.mean([float(log.at[step, column]) for log in logs]))  # pyright: ignore
        return found

    def from_base(self, arm: str, scorer: str) -> np.ndarray | None:
        """(1 + checkpoints, seeds, prompts): the base model's scores, then those of every checkpoint of `arm`.

        None if the study has no base model or that scorer has not scored it.
        """
        base = baseline_of(self.study, arm)
        if base is None or not self.has(base, scorer):
            return None
        curve, start = self.paired_curves(arm, base, scorer)
        return np.concatenate([start[-1:], curve])

    def paired_from_base(self, arm: str, other: str, scorer: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The curves of two trained arms from the base on the seeds that both have; None if either has none."""
        curves = [self.from_base(name, scorer) for name in (arm, other)]
        seeds = [self.scores[name].seeds for name in (arm, other)]
        common = [seed for seed in seeds[0] if seed in seeds[1]]
        if curves[0] is None or curves[1] is None or not common:
            return None
        first, second = ([own.index(seed) for seed in common] for own in seeds)
        return curves[0][:, first], curves[1][:, second]

    def costs_from_base(self, arm: str, axis: str) -> np.ndarray:
        """(1 + checkpoints,): `step`, or a cumulative column of the training log, at what `from_base` gives; nan if
        the log lacks it.
        """
        steps = self.scores[arm].steps
        spent = {step: float(step) for step in steps} if axis == "step" else self.cost(arm, axis)
        return np.array([0.0, *[spent.get(step, np.nan) for step in steps]])


def baseline_arm(study: StudyConfig) -> str | None:
    """The arm that is the study's base model as it is, which trained arms are held against; None if it has none."""
    return _untouched(study, None)


def baseline_of(study: StudyConfig, arm: str) -> str | None:
    """The arm that is the base model of `arm` as it is; None if the study has none."""
    return _untouched(study, study.arms[arm].base)


def _untouched(study: StudyConfig, base: str | None) -> str | None:
    arms = study.arms.items()
    return next((n for n, a in arms if (a.method, a.weights, a.base) == (NO_TRAINING, None, base)), None)


def by_base(study: StudyConfig, arms: Sequence[str]) -> dict[str | None, list[str]]:
    """Those arms grouped by their base model (None: the study's own), in the order of their first arms."""
    groups: dict[str | None, list[str]] = {}
    for arm in arms:
        groups.setdefault(study.arms[arm].base, []).append(arm)
    return groups


def comparison_arms(study: StudyConfig) -> list[str]:
    """Arms of Table 1."""
    return list(study.experiments.comparison.arms) if study.experiments.comparison else []


def step_families(study: StudyConfig) -> dict[str, dict[int, str]]:
    """Table 3: family -> number of inversion steps (ascending) -> arm."""
    families = study.experiments.inversion_steps
    return {name: {n: arms[n] for n in sorted(arms)} for name, arms in families.items()}


def control_arms(study: StudyConfig) -> dict[str, dict[str, str]]:
    """Method -> control (`shuffled`, `swapped`) -> arm."""
    return {name: {str(k): arm for k, arm in arms.items()} for name, arms in study.experiments.controls.items()}


def config_file(study: StudyConfig) -> str:
    """Where commands in print say that the study's YAML is."""
    return f"config/{study.study}.yaml"


def _commands(study: StudyConfig, arm: str, seeds: Iterable[int] = (), train: bool = True) -> str:
    """The commands that train (unless that is done) and score those seeds of an arm; none named: all of them."""
    options = f"--study {config_file(study)} --arm {arm}" + "".join(f" --seed {seed}" for seed in seeds)
    return " && ".join(f"invdpo {stage} {options}" for stage in (*(["train"] if train else []), "evaluate"))


def load_evidence(study: StudyConfig) -> Evidence:
    """Read every score file and training log of the study's arms.

    InvdpoError where files of one arm disagree (see `load_scores`), where arms were scored by different versions of a
    scorer, or with other weights or samples than the study's configuration makes.
    """
    scores, logs, lacking = {}, {}, {}
    seeds = tuple(study.seeds)
    for arm in study.arms:
        runs = {seed: study.root / "runs" / arm / f"seed{seed}" for seed in seeds}
        logs[arm] = {seed: load_log(run) for seed, run in runs.items()}
        found = load_scores(study.root, arm, seeds)
        if found is None:
            continue
        missing = [seed for seed in seeds if seed not in found.seeds] if found.trained else []
        if missing:
            untrained = any(not (runs[seed] / "run.json").is_file() for seed in missing)
            what = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} missing"
            lacking[arm] = Lack(what, _commands(study, arm, missing, train=untrained))
        else:
            scores[arm] = found
    _check_together(study, scores)
    return Evidence(study, scores, logs, lacking)


def _check_together(study: StudyConfig, scores: Mapping[str, ArmScores]) -> None:
    """InvdpoError where arms cannot stand beside each other, or are not those of the study."""
    folder = study.root / "scores"
    for scorer in sorted({name for found in scores.values() for name in found.versions}):
        versions = {arm: found.versions[scorer] for arm, found in scores.items() if scorer in found.versions}
        _the_one(versions, f"{folder}: arms scored by different versions of {scorer}")
    for arm, found in scores.items():
        sampling = study.with_base_of(arm).sampling.model_dump(mode="json")
        if found.config_hash != study.arm(arm).hash:
            raise InvdpoError(
                f"{folder / arm}: scores of another configuration of this arm ({found.config_hash}, the study's is "
                f"{study.arm(arm).hash}). Run: {_commands(study, arm)}"
            )
        if found.sampling != sampling:
            raise InvdpoError(
                f"{folder / arm}: its images were sampled with {found.sampling}, and the study says {sampling}. "
                f"Run: {_commands(study, arm, train=False)}"
            )
