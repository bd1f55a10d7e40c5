"""An open_clip model as the scorers use it: L2-normalised embeddings of images and prompts.

The authors' scripts carry a copy of open_clip whose validation transform works on tensors: ToTensor, bicubic
resize of the longest side, padding to a square, normalisation. Here open_clip's own validation transform is
used (PIL bicubic resize of the shortest side and a centre crop, unless the model's config says otherwise).
For square images, which is all this study makes, the two differ by the rounding of the resized picture to
eight bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.scorers.weights import loading, require_file, sha12, weights_in


def half_on_cuda(device: torch.device) -> AbstractContextManager[object]:
    """fp16 autocast on CUDA, plain fp32 elsewhere; cosines and heads are computed in fp32 on either."""
    return autocast(device, torch.float16 if device.type == "cuda" else torch.float32)


def _files(model: str, pretrained: str | None, field: str) -> list[Path]:
    """The weight files that open_clip will load for these names, fetched from the hub where need be."""
    if model.startswith("local-dir:"):
        return weights_in(Path(model.removeprefix("local-dir:")), field)
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    if model.startswith("hf-hub:"):
        name = model.removeprefix("hf-hub:")
        return [Path(loading(field, model, lambda: download_pretrained_from_hf(name)))]
    if pretrained is None:
        return []
    if tag := get_pretrained_cfg(model.replace("/", "-"), pretrained):
        return [Path(loading(field, f"{model}, {pretrained}", lambda: download_pretrained(tag)))]
    return [require_file(pretrained, field)]


class OpenClip:
    """Embeddings of one open_clip model.

    model: `local-dir:PATH`, `hf-hub:ID`, or an architecture's name with `pretrained` (a tag or a file).
    checkpoint: a .pt with {"state_dict": ...} of the same architecture, loaded over it (HPSv2's form). field:
    the config field that names it, for errors. Raises InvdpoError where there are no weights to load:
    open_clip alone would go on with random ones.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        pretrained: str | None = None,
        checkpoint: Path | str | None = None,
        field: str = "scorers.clip.model",
    ):
        files = _files(model, pretrained, field)
        if checkpoint is not None:
            files = [require_file(checkpoint, field.rsplit(".", 1)[0] + ".checkpoint")]
        if not files:
            raise InvdpoError(
                f"{field}: {model!r} is an architecture without weights; add `pretrained` or `checkpoint`"
            )
        self.device = device
        self.model, self.preprocess, self.tokenize = loading(
            field, model, lambda: _load(model, pretrained, checkpoint, device)
        )
        size, resize = self.model.visual.image_size, self.model.visual.preprocess_cfg
        pixels = size[0] if isinstance(size, tuple) else size
        self.hash = sha12(files)
        self.preprocessing = f"{resize['resize_mode']}-{resize['interpolation']}-{pixels}"

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """PIL images -> (B, D) float32 unit vectors."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with half_on_cuda(self.device):
            features = self.model.encode_image(pixels)
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Prompts -> (B, D) float32 unit vectors."""
        tokens = self.tokenize(texts).to(self.device)
        with half_on_cuda(self.device):
            features = self.model.encode_text(tokens)
        return normalize(features.float(), dim=-1)

    def cosine(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The cosine of each image with its own prompt, (B,) float32, not scaled."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)


def _load(
    model: str, pretrained: str | None, checkpoint: Path | str | None, device: torch.device
) -> tuple[Any, Any, Any]:
    """(model in eval mode on the device, validation transform, tokenizer)."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    # OpenAI's weights were trained with QuickGELU; under the plain architecture name open_clip only warns.
    tag = get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else {}
    network: Any
    network, _, preprocess = open_clip.create_model_and_transforms(
        model, pretrained=pretrained, force_quick_gelu=bool(tag.get("quick_gelu", False))
    )
    if checkpoint is not None:
        open_clip.load_checkpoint(network, str(checkpoint), strict=True, weights_only=True)
    return network.to(device).eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model)
