"""Preference pairs: two samples of the base model a caption, voted on, in Pick-a-Pic v2's columns."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from invdpo.backbones.pipeline import UNetEps, load_schedule, load_unet, load_vae
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.sampling import decode, prompt_generator, sample
from invdpo.world.annotators import vote
from invdpo.world.oracle import score
from invdpo.world.render import SIDE
from invdpo.world.scenes import sample_captions

SAMPLING_STEPS = 20
# Low guidance keeps the base model's faults in, so that annotators have something to choose between.
GUIDANCE_SCALE = 2.0
BATCH = 128


def sample_pictures(base: Path, captions: list[str], guidance_scale: float, seed: int) -> np.ndarray:
    """One picture a caption from the base model, uint8 (n, 64, 64, 3)."""
    device = torch.device("cpu")
    eps_model, schedule = UNetEps(load_unet(str(base), device).eval()), load_schedule(str(base))
    vae, text = load_vae(str(base), device), load_text(str(base), device)
    empty = empty_prompt(text)
    pictures = []
    for start in tqdm(range(0, len(captions), BATCH), desc="sampling", mininterval=5.0, ncols=100):
        part = captions[start : start + BATCH]
        generators = [prompt_generator(seed, start + index) for index in range(len(part))]
        cond = for_sampling(encode_prompts(text, part), empty, SIDE)
        latents = sample(eps_model, cond, schedule, SAMPLING_STEPS, guidance_scale, generators, (4, 8, 8))
        pictures.append(decode(vae, latents))
    return np.concatenate(pictures)


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=90, subsampling=0, optimize=True)
    return buffer.getvalue()


def make_votes(base: Path, pairs: int, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`pairs` voted pairs as a table with Pick-a-Pic v2's columns, and facts about them for the card.

    The utility is measured on the decoded JPEG, the picture that the annotators and every learner see.
    """
    captions = sample_captions(pairs, seed)
    pictures = sample_pictures(base, [text for text in captions for _ in range(2)], GUIDANCE_SCALE, seed)
    files = [_jpeg(picture) for picture in pictures]
    utilities = np.array(
        [score(Image.open(io.BytesIO(file)), captions[index // 2])["utility"] for index, file in enumerate(files)]
    ).reshape(-1, 2)
    labels, margin = vote(utilities, np.random.default_rng(seed))
    uids = [hashlib.sha256(file).hexdigest()[:32] for file in files]
    decided = labels[:, 0] != 0.5
    table = pd.DataFrame(
        {
            "are_different": [a != b for a, b in zip(uids[0::2], uids[1::2], strict=True)],
            "best_image_uid": [
                "tie" if label == 0.5 else uids[2 * index + int(label == 0)] for index, label in enumerate(labels[:, 0])
            ],
            "caption": captions,
            "created_at": pd.Timestamp("2026-01-01"),
            "has_label": True,
            "image_0_uid": uids[0::2],
            "image_0_url": "",
            "image_1_uid": uids[1::2],
            "image_1_url": "",
            "jpg_0": files[0::2],
            "jpg_1": files[1::2],
            "label_0": labels[:, 0],
            "label_1": labels[:, 1],
            "model_0": "shapes-base",
            "model_1": "shapes-base",
            "ranking_id": np.arange(pairs),
            "user_id": 0,
            "num_example_per_prompt": 1,
            "__index_level_0__": np.arange(pairs),
        }
    )
    better = utilities[:, 0] > utilities[:, 1]
    facts = {
        "pairs": pairs,
        "seed": seed,
        "ties": round(float((~decided).mean()), 4),
        "tie_margin": round(margin, 4),
        "mean_utility": round(float(utilities.mean()), 4),
        "utility_gap_sd": round(float((utilities[:, 0] - utilities[:, 1]).std()), 4),
        "oracle_accuracy": round(float((better == (labels[:, 0] == 1))[decided].mean()), 4),
    }
    return table, facts
