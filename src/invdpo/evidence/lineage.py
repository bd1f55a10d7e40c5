"""What lies behind an arm's numbers: its scores, images, weights, recipe, data, code and machine, as links of a way."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from invdpo.config import method_path, read_yaml
from invdpo.errors import InvdpoError
from invdpo.evidence.load import Evidence, arm_title, config_file, load_run, read_provenance
from invdpo.evidence.publish import PROVENANCE
from invdpo.provenance import sha256_file, weights_hashes

if TYPE_CHECKING:
    from invdpo.config import StudyConfig


@dataclass(frozen=True)
class Link:
    """One step of the way: what it is, what is known of it, and the command that makes it again (empty: none)."""

    what: str
    facts: dict[str, Any]
    command: str = ""


@dataclass(frozen=True)
class OneImage:
    """Which image to name beside the files; seed None: the first of the study, prompt None: no image."""

    seed: int | None = None
    prompt: int | None = None


def chain(evidence: Evidence, arms: list[str], scorers: list[str] | None, one: OneImage) -> list[Link]:
    """From arms to their scores and images (by those scorers; None: the number is not one of a score), logs and runs,
    recipes, and what all of them share.
    """
    study = evidence.study
    links: list[Link] = []
    records: list[dict[str, Any]] = []
    for arm in arms:
        if scorers is not None:
            links += [_scores(study, arm, scorers), _images(evidence, arm, scorers, one)]
        seeds = study.seeds if study.arm(arm).trains else study.seeds[:1]
        runs = {seed: study.root / "runs" / arm / f"seed{seed}" for seed in seeds}
        found = {run: record for run in runs.values() if (record := load_run(run)) is not None}
        records += found.values()
        links += [_runs(study, arm, found), _recipe(study, arm)]
    assets = study.arm(arms[0]).identity.get("assets", {}) if arms else {}
    based = {path: digest for path, digest in assets.items() if path.startswith(f"{study.base}/")}
    prepared = {
        "source": study.preferences,
        "sha256": {path: digest for path, digest in assets.items() if path not in based},
        "pairs after filtering": next((record["pairs"] for record in records if "pairs" in record), None),
        "key of the encoded pairs": next((record["data_key"] for record in records if "data_key" in record), None),
    }
    links.append(Link("Preferences", prepared, f"invdpo prepare --study {config_file(study)}"))
    links.append(Link("Base model", {"pipeline": study.base, "sha256": based}))
    return [*links, _environment(study, records)]


def experiment(study: StudyConfig, name: str) -> Link:
    """The files of an experiment on held-out pairs."""
    folder = study.root / "experiments" / name
    path = folder / "provenance.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {
        "files": {str(file): f"sha256 {sha256_file(file)}" for file in sorted(folder.glob("*.*")) if file != path},
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


def _scores(study: StudyConfig, arm: str, scorers: list[str]) -> Link:
    files, versions, count = {}, set(), 0
    for path in _seed_files(study, "scores", arm):
        frame = pd.read_parquet(path, columns=["step", "scorer", "scorer_version"])
        used = frame[frame["scorer"].isin(scorers) & (frame["step"] == frame["step"].max())]
        count += len(used)
        versions |= set(used["scorer_version"])
        files[str(path)] = (
            f"{len(used)} rows of {', '.join(scorers)} at the last checkpoint, sha256 {sha256_file(path)}"
        )
    facts = {"files": files, "rows used": count, "scorer version": sorted(versions)}
    return Link(f"Scores of {arm_title(arm)}", facts, f"invdpo evaluate --study {config_file(study)} --arm {arm}")


def _images(evidence: Evidence, arm: str, scorers: list[str], one: OneImage) -> Link:
    study, scored = evidence.study, evidence.scores.get(arm)
    files = {}
    for path in _seed_files(study, "images", arm):
        prompts = pq.read_table(path, columns=["prompt_id"]).column("prompt_id").to_pylist()
        every = scored is not None and len(prompts) == len(scored.prompts)
        files[str(path)] = f"{len(prompts)} images: prompts {'all' if every else ', '.join(map(str, prompts))}"
    drawn = {_commit(read_provenance(path)) for path in _seed_files(study, "scores", arm)}
    facts: dict[str, Any] = {
        "files": files or "not there (not published, or deleted)",
        "drawn and scored at commit": sorted(drawn - {""}),
        "sampling": study.sampling.model_dump(mode="json"),
    }
    if one.prompt is not None:
        seed = (study.seeds[0] if one.seed is None else one.seed) if study.arm(arm).trains else 0
        facts["one image"] = _one_image(study, arm, scorers, seed, one.prompt)
    return Link(f"Images of {arm_title(arm)}", facts, f"invdpo evaluate --study {config_file(study)} --arm {arm}")


def _one_image(study: StudyConfig, arm: str, scorers: list[str], seed: int, prompt: int) -> dict[str, Any]:
    """An image's prompt, scores and sha256 of its pixels, and whether the stored picture has that."""
    path = study.root / "scores" / arm / f"seed{seed}.parquet"
    if not path.is_file():
        raise InvdpoError(f"{path}: no such file. Seeds of the study: {study.seeds}.")
    scores = pd.read_parquet(path)
    every = [
        row for row in scores.to_dict("records") if row["scorer"] in scorers and row["step"] == max(scores["step"])
    ]
    rows = [row for row in every if row["prompt_id"] == prompt]
    if not rows:
        known = ", ".join(map(str, sorted({row["prompt_id"] for row in every})))
        raise InvdpoError(f"{path} has no {', '.join(scorers)} of prompt {prompt}; prompts: {known}.")
    row = rows[0]
    facts = {
        "prompt": f"{prompt} of {row['prompt_set']}: {row['prompt']}",
        "training seed": seed,
        "step": row["step"],
        **{str(other["scorer"]): other["score"] for other in rows},
        "sha256 of the pixels": row["image_sha256"],
    }
    images = study.root / "images" / arm / f"seed{seed}.parquet"
    pictures = pd.read_parquet(images, columns=["prompt_id", "png"]) if images.is_file() else pd.DataFrame()
    stored = pictures[pictures["prompt_id"] == prompt]["png"].tolist() if len(pictures) else []
    if not stored:
        return facts | {"picture": f"not in {images} (not published, or deleted)"}
    with Image.open(io.BytesIO(stored[0])) as picture:
        digest = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
    same = "the same pixels" if digest == row["image_sha256"] else f"OTHER pixels, {digest}"
    return facts | {"picture": f"{images}, row of prompt {prompt}: {same}"}


def _runs(study: StudyConfig, arm: str, found: Mapping[Path, Mapping[str, Any]]) -> Link:
    config = study.arm(arm)
    listed = study.root / PROVENANCE
    weights = json.loads(listed.read_text(encoding="utf-8"))["weights"] if listed.is_file() else None
    each = {}
    for run, record in found.items():
        hashes = weights_hashes(run) if weights is None else weights.get(run.relative_to(study.root).as_posix(), {})
        each[str(run)] = {
            "config hash": record["config_hash"],
            "weights": {name: f"sha256 {digest}" for name, digest in hashes.items()},
            "UNet evaluations": f"{record['unet_evals']:,}",
            "seconds": f"{record['wall_seconds']:.1f}",
            "commit": _commit(record),
        }
    facts: dict[str, Any] = {"runs": each}
    if not config.trains:
        facts["checkpoint"] = f"the base model as it is, {study.base}"
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
