"""Human Preference Score v2 (Wu et al. 2023): raw cosine of image and prompt under a CLIP model tuned on
preferences.

HPSv2's own `score()` returns this cosine, its `evaluate()` the cosine times 100. The values of its v2.0 and v2.1
weights cannot be compared, and its two functions default to one of each: rows carry the release in the scorer's
version.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import finite


class HumanPreferenceScore:
    """`score` gives {"hps": (B,)}.

    tower: an open_clip name (`ViT-H-14` with checkpoint=`xswu/HPSv2/HPS_v2.1_compressed.pt`, of the hub), or a
    `local-dir:` or `hf-hub:` model that holds the tuned weights itself. release: which of HPSv2's weights they are,
    where they are.
    """

    def __init__(self, tower: OpenClip, release: Literal["v2.0", "v2.1"] | None = None):
        self.tower, self.preprocessing, self.cut = tower, tower.preprocessing, tower.cut
        self.version = f"hps{release or ''}:{tower.hash}:{tower.preprocessing.name}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {"hps": (B,) float32}, higher is better."""
        return {"hps": finite("hps", self.tower.cosine(images, prompts))}
