"""The world's own clean pictures: what FID and its like hold generated pictures against."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from invdpo.world.render import render
from invdpo.world.scenes import sample_scene


def reference_pictures(count: int, seed: int) -> list[bytes]:
    """`count` pictures as PNG, of scenes drawn as those of the corpus are, without its faults; the same for a seed."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        stream = io.BytesIO()
        Image.fromarray(render(sample_scene(rng), rng)).save(stream, "PNG")
        found.append(stream.getvalue())
    return found
