"""What lies behind numbers, as links of a way: scores, images, weights, recipes, data, code, experiments' files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from invdpo.config import method_path, read_yaml
from invdpo.errors import InvdpoError
from invdpo.evidence.grids import CHOICES
from invdpo.evidence.load import Evidence, arm_title, config_file, load_run, read_provenance
from invdpo.evidence.publish import PROVENANCE
from invdpo.provenance import sha256_file, weights_hashes

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

SPEED = Path("results/reference/benchmarks/cpu-2-threads.csv")


@dataclass(frozen=True)
class Link:
    """One step of the way: what it is, what is known of it, and the command that makes it again (empty: none)."""

    what: str
    facts: dict[str, Any]
    command: str = ""


@dataclass(frozen=True)
class OneImage:
    """Which image to name beside the files; seed None: the first of the study, prompt None: the first that is there."""

    seed: int | None = None
    prompt: int | None = None


def chain(evidence: Evidence, arms: Sequence[str], scorers: Sequence[str] | None, one: OneImage) -> list[Link]:
    """From arms to their scores and images (no scorers: to their images alone; None: to neither), logs and runs,
    recipes, and what all of them share. Empty without arms.
    """
    study = evidence.study
    links: list[Link] = []
    records: list[dict[str, Any]] = []
    for arm in arms:
        if scorers:
            links.append(_scores(study, arm, scorers))
        if scorers is not None:
            links.append(_images(evidence, arm, scorers, one))
        seeds = study.seeds if study.arm(arm).trains else study.seeds[:1]
        runs = {seed: study.root / "runs" / arm / f"seed{seed}" for seed in seeds}
        found = {run: record for run in runs.values() if (record := load_run(run)) is not None}
        records += found.values()
        links += [_runs(study, arm, found), _recipe(study, arm)]
    bases = list(dict.fromkeys(study.with_base_of(arm).base for arm in arms))
    assets = {path: digest for arm in arms for path, digest in study.arm(arm).identity.get("assets", {}).items()}
    based = {base: {path: digest for path, digest in assets.items() if path.startswith(f"{base}/")} for base in bases}
    prepared = {
        "source": study.preferences,
        "sha256": {path: digest for path, digest in assets.items() if not any(path in own for own in based.values())},
        "pairs after filtering": next((record["pairs"] for record in records if "pairs" in record), None),
        "key of the encoded pairs": next((record["data_key"] for record in records if "data_key" in record), None),
    }
    if arms and study.preferences:
        links.append(Link("Preferences", prepared, f"invdpo prepare --study {config_file(study)}"))
    links += [Link("Base model", {"pipeline": base, "sha256": based[base]}) for base in bases]
    return [*links, _environment(study, records)] if arms else []


def experiment(study: StudyConfig, name: str) -> Link:
    """The files of an experiment on held-out pairs."""
    folder = study.root / "experiments" / name
    path = folder / "provenance.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {
        "files": _hashed(file for file in sorted(folder.glob("*.*")) if file != path) or f"{folder} is not there",
        "held-out pairs from": study.experiments.held_out or study.preferences,
        "settings": noted.get("settings"),
        "commit": _commit(noted),
        "device": noted.get("device"),
    }
    return Link(f"Experiment {name}", facts, f"invdpo experiment {name} --study {config_file(study)}")


def distribution(study: StudyConfig) -> Link:
    """The distances of image sets."""
    path = study.root / "distribution.csv"
    noted = path.with_suffix(".json")
    record = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    facts = {
        "file": f"{path}, sha256 {sha256_file(path)}" if path.is_file() else f"{path} is not there",
        "settings": record.get("settings"),
        "features": record.get("extractor"),
        "sha256 of the reference images": record.get("reference"),
        "commit": _commit(record),
    }
    return Link("Sets of images", facts, f"invdpo distribution --study {config_file(study)}")


def votes(study: StudyConfig) -> Link:
    """Votes of people, and what they were shown."""
    paths = [study.root / "user_study" / name for name in ("votes.csv", "key.json")]
    paths += [study.root / "tables" / f"{name}.csv" for name in ("table_s4", "user_study")]
    facts = {"files": _hashed(filter(Path.is_file, paths)) or "not there: no votes have been counted"}
    return Link("Votes of people", facts, f"make user-study-analysis STUDY={study.study}")


def benchmark() -> Link:
    """The measurements of speed and memory, which belong to no study."""
    path = SPEED.with_suffix(".json")
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {
        "files": _hashed(filter(Path.is_file, (SPEED, path))) or f"{SPEED} is not there",
        "settings": noted.get("options"),
        "commit": _commit(noted),
        "device": noted.get("device"),
        "libraries": noted.get("versions"),
    }
    return Link("Benchmark", facts, "make bench")


def recipe_of(study: StudyConfig, name: str, label: str) -> Link:
    """A recipe that an experiment of that name held against others."""
    settings = study.experiments.precision
    entry = settings.recipes.get(label) if settings and name == "precision" else None
    if entry is not None:
        facts = {"file": recipe_file(entry.method or label), "overrides": entry.recipe}
        return Link(f"Recipe {label}", facts)
    return _recipe(study, label) if label in study.arms else Link(f"Recipe {label}", {"file": "not of this study"})


def _hashed(files: Iterable[Path]) -> dict[str, str]:
    return {str(file): f"sha256 {sha256_file(file)}" for file in files}


def _environment(study: StudyConfig, records: list[dict[str, Any]]) -> Link:
    first = records[0] if records else {}
    commits = sorted({_commit(record) for record in records} - {""})
    facts = {
        "study": f"{study.study} ({config_file(study)})",
        "commit": commits,
        "lock (sha256 of uv.lock)": first.get("lock_hash"),
        "device": first.get("device"),
        "python": first.get("python"),
        "libraries": first.get("versions"),
    }
    checkout = f"git checkout {commits[0].split()[0]} && uv sync --frozen" if len(commits) == 1 else ""
    return Link("Code and environment", facts, checkout)


def _commit(noted: Mapping[str, Any]) -> str:
    commit = noted.get("git_commit")
    return "" if commit is None else f"{commit} (with uncommitted changes)" if noted.get("git_dirty") else str(commit)


def _seed_files(study: StudyConfig, folder: str, arm: str) -> list[Path]:
    seeds = study.seeds if study.arm(arm).trains else [0]
    paths = [study.root / folder / arm / f"seed{seed}.parquet" for seed in seeds]
    return [path for path in paths if path.is_file()]


def _scores(study: StudyConfig, arm: str, scorers: Sequence[str]) -> Link:
    files, versions, count = {}, set(), 0
    for path in _seed_files(study, "scores", arm):
        frame = pd.read_parquet(path, columns=["step", "scorer", "scorer_version"])
        frame = frame[frame["scorer"].isin(scorers)]
        steps = sorted(set(frame["step"]))
        last = frame[frame["step"] == max(steps, default=0)]
        count += len(last)
        versions |= set(frame["scorer_version"])
        told = f"{len(frame)} rows of {', '.join(scorers)} at step {', '.join(map(str, steps))}"
        files[str(path)] = f"{told}, sha256 {sha256_file(path)}"
    facts = {
        "files": files or f"not there: {study.root}/scores/{arm}",
        "rows of the last checkpoint": count,
        "scorer version": sorted(versions),
    }
    return Link(f"Scores of {arm_title(arm)}", facts, f"invdpo evaluate --study {config_file(study)} --arm {arm}")


def _images(evidence: Evidence, arm: str, scorers: Sequence[str], one: OneImage) -> Link:
    study, scored = evidence.study, evidence.scores.get(arm)
    files = {}
    for path in _seed_files(study, "images", arm):
        prompts = pq.read_table(path, columns=["prompt_id"]).column("prompt_id").to_pylist()
        every = scored is not None and len(prompts) == len(scored.prompts)
        files[str(path)] = f"{len(prompts)} images: prompts {'all' if every else ', '.join(map(str, prompts))}"
    drawn = {_commit(read_provenance(path)) for path in _seed_files(study, "scores", arm)}
    seed = (study.seeds[0] if one.seed is None else one.seed) if study.arm(arm).trains else 0
    facts: dict[str, Any] = {
        "files": files or "not there (not published, or deleted)",
        "drawn and scored at commit": sorted(drawn - {""}),
        "sampling": study.sampling.model_dump(mode="json"),
        "one image": _one_image(evidence, arm, scorers, seed, one.prompt),
    }
    return Link(f"Images of {arm_title(arm)}", facts, f"invdpo evaluate --study {config_file(study)} --arm {arm}")


def _one_image(evidence: Evidence, arm: str, scorers: Sequence[str], seed: int, prompt: int | None) -> dict[str, Any]:
    """An image's prompt, scores and sha256 of its pixels, and where the picture is that has them, or how it is made.

    prompt None: the first that is stored, or else the first that was scored. No scorers: none of its scores.
    """
    study = evidence.study
    path, images = (study.root / folder / arm / f"seed{seed}.parquet" for folder in ("scores", "images"))
    if not path.is_file():
        if prompt is None:
            return {}
        raise InvdpoError(f"{path}: no such file. Seeds of the study: {study.seeds}.")
    scores = pd.read_parquet(path)
    step = max(scores["step"])
    last = [row for row in scores.to_dict("records") if row["step"] == step]
    last = [row for row in last if not scorers or row["scorer"] in scorers]
    pictures = pd.read_parquet(images, columns=["step", "prompt_set", "prompt_id", "png"]) if images.is_file() else None
    stored = {} if pictures is None else _last(pictures)
    known = list(dict.fromkeys((row["prompt_set"], row["prompt_id"]) for row in last))
    wanted = [key for key in known if key in stored] or known
    if prompt is not None:
        wanted = [key for key in known if str(key[1]) == str(prompt)]
    if not wanted and prompt is None:
        return {}
    if not wanted:
        prompts = ", ".join(map(str, sorted({number for _, number in known})))
        raise InvdpoError(f"{path} has no {', '.join(scorers)} of prompt {prompt}; prompts: {prompts}.")
    key = wanted[0]
    rows = [row for row in last if (row["prompt_set"], row["prompt_id"]) == key]
    facts = {
        "prompt": f"{key[1]} of {key[0]}: {rows[0]['prompt']}",
        "training seed": seed,
        "step": rows[0]["step"],
        **{str(row["scorer"]): row["score"] for row in rows if row["scorer"] in scorers},
        "sha256 of the pixels": rows[0]["image_sha256"],
    }
    if key not in stored:
        made = f"results/{study.study}/images/{arm}/seed{seed}.parquet"
        again = f"uv run snakemake {made} --configfile {config_file(study)}"
        return facts | {"picture": f"not published, or deleted; `{again}` makes it again"}
    with Image.open(io.BytesIO(stored[key])) as picture:
        digest = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
    same = "the same pixels" if digest == rows[0]["image_sha256"] else f"OTHER pixels, {digest}"
    return facts | {
        "picture": f"{images}, row of prompt {key[1]}: {same}",
        "shown in": _shown_in(evidence, arm, seed, key),
    }


def _last(pictures: pd.DataFrame) -> dict[tuple[str, Any], bytes]:
    """Prompt (set, id) -> PNG of the last checkpoint."""
    last = pictures[pictures["step"] == pictures["step"].max()]
    return dict(zip(zip(last["prompt_set"], last["prompt_id"], strict=True), last["png"], strict=True))


def _shown_in(evidence: Evidence, arm: str, seed: int, key: tuple[str, Any]) -> list[str]:
    """The figures with that image in them."""
    study, found = evidence.study, []
    if not evidence.has(arm) or seed != (study.seeds[0] if evidence.scores[arm].trained else 0):
        return []
    for name, choose in CHOICES.items():
        choice = choose(evidence)
        prompts = [evidence.scores[arm].prompts[place] for place in choice.prompts] if arm in choice.arms else []
        path = study.root / "figures" / f"{name}.png"
        if (str(key[0]), str(key[1])) in prompts and path.is_file():
            found.append(str(path))
    return found


def _runs(study: StudyConfig, arm: str, found: Mapping[Path, Mapping[str, Any]]) -> Link:
    config = study.arm(arm)
    listed = study.root / PROVENANCE
    weights = json.loads(listed.read_text(encoding="utf-8"))["weights"] if listed.is_file() else None
    each = {}
    for run, record in found.items():
        hashes = weights_hashes(run) if weights is None else weights.get(run.relative_to(study.root).as_posix(), {})
        each[str(run)] = {
            "files": _hashed(path for name in ("run.json", "train.jsonl") if (path := run / name).is_file()),
            "config hash": record["config_hash"],
            "weights": {name: f"sha256 {digest}" for name, digest in hashes.items()},
            "UNet evaluations": f"{record['unet_evals']:,}",
            "seconds": f"{record['wall_seconds']:.1f}",
            "commit": _commit(record),
        }
    facts: dict[str, Any] = {"runs": each}
    if not config.trains:
        facts["checkpoint"] = config.weights or f"the base model as it is, {study.with_base_of(arm).base}"
    elif weights is None:
        place = f"{study.root}/runs/{arm}/seed<k>"
        facts["checkpoint"] = f"{place}/unet (also {place}/checkpoints/step{config.training.grid[-1]:06d})"
    else:
        facts["checkpoint"] = f"runs/{arm}/seed<k>/unet after training; only its hash is published"
    return Link(f"Runs of {arm_title(arm)}", facts, f"invdpo train --study {config_file(study)} --arm {arm}")


def _recipe(study: StudyConfig, arm: str) -> Link:
    config = study.arm(arm)
    if not config.trains:
        return Link(f"Recipe of {arm_title(arm)}", {"method": "no training"})
    training, recipe = config.training, read_yaml(method_path(config.method))
    facts = {
        "file": recipe_file(config.method),
        "source": recipe["source"],
        "overrides": config.recipe_overrides,
        "labels": config.labels,
        "initial rounding": config.initial_rounding,
        "learning rate": training.learning_rate or recipe["learning_rate"],
        "beta": training.beta or recipe["beta"],
        "steps": f"{training.steps} of {training.batch} pairs, {training.optimizer}",
    }
    return Link(f"Recipe of {arm_title(arm)}", facts)


def recipe_file(method: str) -> str:
    """A recipe's file as it is written in the repository, with its hash."""
    path = method_path(method)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else f"{path.parent.name}/{path.name}"
    return f"{name} (sha256 {sha256_file(path)})"
