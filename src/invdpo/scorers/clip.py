"""CLIP score: raw cosine of image and prompt under an open_clip model.

The paper's values (.32 to .34) are those of ViT-H-14, laion2B-s32B-b79K (the authors' `utils/clip_utils.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import finite


class ClipScore:
    """`score` gives {"clip": (B,)}; see `OpenClip` for the names of models and for the preprocessing."""

    def __init__(self, model: str, device: torch.device, pretrained: str | None = None):
        self.tower = OpenClip(model, device, pretrained=pretrained, field="scorers.clip.model")
        self.version = f"clip:{self.tower.hash}:{self.tower.preprocessing}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {"clip": (B,) float32}, higher is better."""
        return {"clip": finite("clip", self.tower.cosine(images, prompts))}
