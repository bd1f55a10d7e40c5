"""LAION's aesthetic predictor, `sac+logos+ava1-l14-linearMSE.pth`: a linear head on CLIP image embeddings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from invdpo.errors import InvdpoError
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import find_file, finite, loading, sha12

FIELD = "scorers.aesthetic.model"
# The odd indices were dropout when the head was trained.
LAYERS = (0, 2, 4, 6, 7)


class AestheticHead:
    """Five linear layers without activations, D -> 1024 -> 128 -> 64 -> 16 -> 1 in LAION's file; widths from
    the file.

    path: a file here, or one of the hub as `owner/name/path/in/it`. Raises InvdpoError where it is missing, unreadable,
    or not five layers that follow one another to one output.
    """

    def __init__(self, path: Path | str, device: torch.device):
        self.path = find_file(path, FIELD)
        # LAION's tensors were saved on cuda:0.
        weights = loading(FIELD, str(path), lambda: torch.load(self.path, map_location="cpu", weights_only=True))
        names = {f"layers.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
        if not isinstance(weights, dict) or set(weights) != names:
            raise InvdpoError(f"{FIELD}: {path} is not an aesthetic head; its tensors must be {sorted(names)}")
        self.layers = [
            (weights[f"layers.{layer}.weight"].float(), weights[f"layers.{layer}.bias"].float()) for layer in LAYERS
        ]
        widths = [weight.shape[1] for weight, _ in self.layers] + [1]
        expected = [((after, before), (after,)) for before, after in pairwise(widths)]
        found = [(tuple(weight.shape), tuple(bias.shape)) for weight, bias in self.layers]
        if found != expected:
            raise InvdpoError(f"{FIELD}: the layers of {path} do not follow one another to one output: {found}")
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]
        self.width = widths[0]

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """(B, D) unit embeddings -> (B,) scores, about 1 to 10."""
        for weight, bias in self.layers:
            embeddings = linear(embeddings, weight, bias)
        return embeddings[:, 0]


class AestheticScore:
    """`score` gives {"aesthetic": (B,)}.

    model: the head's .pth file, here or of the hub. tower: the open_clip model that embeds the image (LAION's head:
    OpenAI's ViT-L-14, for instance `hf-hub:timm/vit_large_patch14_clip_224.openai`); its embeddings are L2-normalised.
    The authors' script embeds with transformers, which resizes and crops as open_clip's own preprocessing does.
    """

    def __init__(self, model: Path | str, tower: OpenClip):
        self.head = AestheticHead(model, tower.device)
        self.tower, self.preprocessing = tower, tower.preprocessing
        width = int(tower.embed_images([Image.new("RGB", (8, 8))]).shape[1])
        if width != self.head.width:
            raise InvdpoError(
                f"scorers.aesthetic.tower embeds images in {width} dimensions, the head {model} expects "
                f"{self.head.width}; it was trained on another tower"
            )
        self.version = f"aesthetic:{sha12([self.head.path])}+{tower.hash}:{tower.preprocessing.name}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images -> {"aesthetic": (B,) float32}, higher is better; the prompts play no part."""
        return {"aesthetic": finite("aesthetic", self.head(self.tower.embed_images(images)))}
