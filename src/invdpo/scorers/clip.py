"""CLIP score: raw cosine of image and prompt under an open_clip model.

The paper's values (.32 to .34) are those of ViT-H-14, laion2B-s32B-b79K (the authors' `utils/clip_utils.py`).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import finite


class ClipScore:
    """`score` gives {"clip": (B,)}; see `OpenClip` for the names of models and for the preprocessings."""

    def __init__(self, tower: OpenClip):
        self.tower, self.preprocessing, self.cut = tower, tower.preprocessing, tower.cut
        self.version = f"clip:{tower.hash}:{tower.preprocessing.name}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {"clip": (B,) float32}, higher is better."""
        return {"clip": finite("clip", self.tower.cosine(images, prompts))}
