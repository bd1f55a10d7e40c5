"""Human Preference Score v2 (Wu et al. 2023): raw cosine of image and prompt under a CLIP model tuned on
preferences.

HPSv2's own `score()` returns this cosine, its `evaluate()` the cosine times 100. Its v2.0 and v2.1 weights
are not comparable: the hash in the version tells them apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import finite


class HumanPreferenceScore:
    """`score` gives {"hps": (B,)}.

    model: an open_clip name (`ViT-H-14` with checkpoint=`HPS_v2.1_compressed.pt`), or a `local-dir:` or
    `hf-hub:` model that holds the tuned weights itself.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        checkpoint: Path | str | None = None,
        pretrained: str | None = None,
    ):
        self.tower = OpenClip(model, device, pretrained=pretrained, checkpoint=checkpoint, field="scorers.hps.model")
        self.version = f"hps:{self.tower.hash}:{self.tower.preprocessing}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {"hps": (B,) float32}, higher is better."""
        return {"hps": finite("hps", self.tower.cosine(images, prompts))}
