"""The pictures that the base model and the CLIPs learn from: random scenes, drawn with realistic faults."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invdpo.world.render import render, sample_faults
from invdpo.world.scenes import caption, sample_scene

CHUNK = 2000


@dataclass(frozen=True)
class Corpus:
    """pictures: uint8 (n, 3, 64, 64); captions: n strings."""

    pictures: Tensor
    captions: list[str]


def _render_chunk(seed: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(CHUNK)]
    pictures = np.stack([render(scene, rng, sample_faults(rng)) for scene in scenes])
    return pictures.transpose(0, 3, 1, 2), [caption(scene) for scene in scenes]


def make_corpus(chunks: int, seed: int, workers: int) -> Corpus:
    """`chunks` x 2,000 captioned pictures; the same for every number of workers."""
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_render_chunk, [(seed, index) for index in range(chunks)]))
    pictures = torch.from_numpy(np.concatenate([pictures for pictures, _ in parts]))
    return Corpus(pictures, [text for _, captions in parts for text in captions])


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1, the range of every image model here."""
    return pictures.float() / 127.5 - 1.0
