"""A study with made-up images and scores, to freeze a user study from; and votes made without a server."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from invdpo.config import StudyConfig, parse_study
from user_study_app.settings import Places
from user_study_app.simulate import Behaviour, World

ARMS = {"walrus_base": "no_training", "marmot_dpo": "diffusion_dpo", "gecko_inverted": "inversion_dpo_code"}
WORDS = "amber birch cedar delta ember fjord grove heron".split()
SCORERS = {"clip": 1.0, "pickscore": 0.7, "aesthetic": 0.0}  # score -> how much it knows of a picture's quality


def settings(**changes: Any) -> dict[str, Any]:
    """A `user_study:` section."""
    section: dict[str, Any] = {
        "groups": [
            {"arms": ["walrus_base", "gecko_inverted"], "pairs": 24},
            {"arms": ["marmot_dpo", "gecko_inverted"], "pairs": 24},
        ],
        "raters": 8,
        "per_pair": 3,
        "repeats": 3,
        "attention": 2,
        "practice": 2,
        "break_every": 10,
        "seed": 5,
        "consent": {
            name: f"The {name}."
            for name in ("title", "purpose", "data", "withdrawal", "ethics", "content_warning", "contact")
        }
        | {"version": "7"},
        "completion_code": "DONE",
        "min_view_ms": 0,
        "exclusions": {"max_attention_failures": 0, "min_repeat_consistency": 0.5, "min_median_ms": 500},
    }
    return section | changes


def make_study(prompts: int = 48, seeds: int = 2, user_study: dict[str, Any] | None = None) -> StudyConfig:
    """Write results/judged/{images,scores} below the working directory."""
    study = parse_study(
        {
            "study": "judged",
            "base": "base",
            "preferences": "pairs.parquet",
            "prompts": "prompts.txt",
            "scorers": {"clip": {"model": "ViT-B-32"}},
            "seeds": list(range(seeds)),
            "training": {"steps": 4, "batch": 4, "checkpoints": [2], "learning_rate": 1.0e-4, "beta": 1.0},
            "sampling": {},
            "arms": {name: {"method": method} for name, method in ARMS.items()},
            "user_study": settings() if user_study is None else user_study,
        },
        "judged",
    )
    for arm in ARMS:
        for seed in study.seeds if study.arm(arm).trains else [0]:
            write_results(study, arm, seed, prompts)
    return study


def prompt_of(number: int) -> str:
    """Distinct prompts; of two, three in eight share no word."""
    picked = [WORDS[(number + k) % len(WORDS)] for k in range(3)]
    return " ".join([*picked, f"take{number}"])


def write_results(study: StudyConfig, arm: str, seed: int, prompts: int, size: int = 16) -> None:
    """images/ and scores/ of one run. A picture's quality decides its scores, more or less."""
    rng = np.random.default_rng([seed, len(arm)])
    images, scores = [], []
    for number in range(prompts):
        # Noise of a random height on a plain ground: files of very different lengths.
        pixels = np.full((size, size, 3), rng.integers(256), dtype=np.uint8)
        noise = rng.integers(0, 256, (int(rng.integers(1, size)), size, 3), dtype=np.uint8)
        pixels[: len(noise)] = noise
        picture = Image.fromarray(pixels)
        stream = io.BytesIO()
        picture.save(stream, "PNG", pnginfo=_remark(arm))
        sha256 = hashlib.sha256(picture.tobytes()).hexdigest()
        step = 4 if study.arm(arm).trains else 0
        head = {"method": arm, "seed": seed, "step": step, "prompt_set": "prompts", "prompt_id": number}
        head["prompt"] = prompt_of(number)
        images.append(head | {"sha256": sha256, "png": stream.getvalue()})
        quality = rng.normal()
        for scorer, weight in SCORERS.items():
            score = weight * quality + (1 - weight) * rng.normal()
            scores.append(head | {"image_sha256": sha256, "scorer": scorer, "scorer_version": "1", "score": score})
            earlier = {"step": 2, "image_sha256": "0"} if step else {}
            if earlier:
                scores.append(scores[-1] | earlier | {"score": 100.0})
    for folder, rows in (("images", images), ("scores", scores)):
        path = study.root / folder / arm / f"seed{seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)


def _remark(arm: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", arm)
    return info


def fix_salt(study: StudyConfig, salt: int) -> None:
    """Make the next bundle the same at every run."""
    key = Places(study).key
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text(json.dumps({"salt": f"{salt:064x}"}))


def votes(study: StudyConfig, behaviours: list[Behaviour], raters: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Export rows of simulated raters who follow the schedule, without a server."""
    places = Places(study)
    world = World(places.bundle, places.key, seed)
    manifest = json.loads((places.bundle / "manifest.json").read_text())
    slots = json.loads((places.bundle / "schedule.json").read_text())["slots"]
    rows = []
    for rater in range(raters or len(slots)):
        behaviour = behaviours[rater % len(behaviours)]
        slot = slots[rater % len(slots)]
        for index, trial in enumerate(slot["trials"]):
            pair = world.pairs[trial["pair"]]
            choice, milliseconds = world.choose(behaviour, rater, index, trial["pair"], trial["left"])
            rows.append(
                {
                    "rater": f"{rater:02x}" + hashlib.sha256(bytes([rater])).hexdigest()[:10],
                    "slot": slot["slot"],
                    "index": index,
                    "pair": trial["pair"],
                    "group": pair["group"],
                    "kind": trial["kind"],
                    "repeat_of": trial["repeat_of"],
                    "left": trial["left"],
                    "choice": choice,
                    "response_ms": milliseconds,
                    "bundle": manifest["bundle"],
                }
            )
    return pd.DataFrame(rows)


def write_votes(study: StudyConfig, rows: pd.DataFrame) -> Path:
    """Where the analysis reads them."""
    path = Places(study).votes
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)
    return path
