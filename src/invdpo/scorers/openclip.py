"""An open_clip model as the scorers use it: L2-normalised embeddings of images and prompts.

Three preprocessings, told apart in a scorer's version. `open_clip`: the model's own validation transform (for OpenAI's
and LAION's towers a PIL bicubic resize of the shorter side and a centre crop). `authors`: that of the copy of open_clip
in the authors' scripts and in HPSv2's package (`light_augmentation`, transform.py's ResizeMaxSize): the picture becomes
a tensor first, its longer side is resized by the bicubic filter for tensors, and it is padded to a square with black,
so that a picture that is not square is seen whole. That copy does not say whether the filter shall average over the
pixels it skips: `authors` does, as torchvision has done by default since 0.17 (January 2024), `authors_aliased` does
not, as every torchvision before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.scorers.pictures import Pictures, Preprocessing
from invdpo.scorers.texts import Texts
from invdpo.scorers.weights import loading, require_file, sha12, weights_in

Kind = Literal["open_clip", "authors", "authors_aliased"]


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
    """Embeddings of one open_clip model; scorers that hold the same object share its passes over a `Pictures`.

    model: `local-dir:PATH`, `hf-hub:ID`, or an architecture's name with `pretrained` (a tag or a file).
    checkpoint: a .pt with {"state_dict": ...} of the same architecture, loaded over it (HPSv2's form). field:
    the config field that names it, for errors. preprocessing: see the top of this file. Raises InvdpoError where
    there are no weights to load: open_clip alone would go on with random ones.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        pretrained: str | None = None,
        checkpoint: Path | str | None = None,
        preprocessing: Kind = "open_clip",
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
        self.model, transform, self.tokenize = loading(
            field, model, lambda: _load(model, pretrained, checkpoint, device)
        )
        self.preprocessing = _preprocessing(preprocessing, self.model.visual, transform)
        self.hash = sha12(files)
        self.texts = Texts(self._embed_texts)

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """PIL images -> (B, D) float32 unit vectors."""
        pictures = Pictures.of(images)

        def embed() -> Tensor:
            with half_on_cuda(self.device):
                features = self.model.encode_image(pictures.pixels(self.preprocessing).to(self.device))
            return normalize(features.float(), dim=-1)

        return pictures.once(self, embed)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Prompts -> (B, D) float32 unit vectors."""
        return self.texts(texts)

    @torch.no_grad()
    def _embed_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenize(texts).to(self.device)
        with half_on_cuda(self.device):
            features = self.model.encode_text(tokens)
        return normalize(features.float(), dim=-1)

    def cosine(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The cosine of each image with its own prompt, (B,) float32, not scaled."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def cut(self, prompts: list[str]) -> int:
        """How many prompts have more tokens than the text tower reads (77); their ends play no part."""
        tokens = self.tokenize(prompts)
        # With room for one more token, the end mark of a prompt that was cut moves.
        longer = self.tokenize(prompts, context_length=tokens.shape[1] + 1)
        return int((longer[:, :-1] != tokens).any(dim=1).sum())


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


def _preprocessing(kind: Kind, visual: Any, transform: Any) -> Preprocessing:
    """The chosen preprocessing for an image tower. transform: open_clip's own for it."""
    size, settings = visual.image_size, visual.preprocess_cfg
    pixels = size[0] if isinstance(size, tuple) else size
    numbers = (*settings["mean"], *settings["std"])
    if kind == "open_clip":
        mode, interpolation = settings["resize_mode"], settings["interpolation"]
        shared = pixels if (mode, interpolation) == ("shortest", "bicubic") else None
        return Preprocessing(f"{mode}-{interpolation}-{pixels}", numbers, transform, shared)
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    antialias = kind == "authors"
    name = f"authors-longest-bicubic-{'antialiased' if antialias else 'aliased'}-{pixels}"
    return Preprocessing(
        name, numbers, partial(authors_transform, side=pixels, mean=mean, std=std, antialias=antialias)
    )


def authors_transform(
    image: Image.Image, side: int, mean: tuple[float, ...], std: tuple[float, ...], antialias: bool
) -> Tensor:
    """PIL image -> (3,side,side): resized as a tensor so that the longer side fits, padded with black, normalised."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize as shift
    from torchvision.transforms.functional import pad, resize, to_tensor

    pixels = to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    # A strip may be so thin that rounding would leave nothing of it.
    fitted = [max(1, round(length * scale)) for length in (height, width)]
    if scale != 1.0:
        pixels = resize(pixels, fitted, InterpolationMode.BICUBIC, antialias=antialias)
    top, left = (side - fitted[0]) // 2, (side - fitted[1]) // 2
    pixels = pad(pixels, [left, top, side - fitted[1] - left, side - fitted[0] - top])
    return shift(pixels, list(mean), list(std))
