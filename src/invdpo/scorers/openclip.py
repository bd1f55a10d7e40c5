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

import json
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from invdpo.config import nearest
from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.hub import Remote, list_files, look, split_id
from invdpo.scorers.pictures import Pictures, Preprocessing
from invdpo.scorers.texts import Texts
from invdpo.scorers.weights import INSTEAD, find_file, loading, look_for_file, require_file, sha12, weights_in

Kind = Literal["open_clip", "authors", "authors_aliased"]
LOCAL, HUB = "local-dir:", "hf-hub:"


def half_on_cuda(device: torch.device) -> AbstractContextManager[object]:
    """fp16 autocast on CUDA, plain fp32 elsewhere; cosines and heads are computed in fp32 on either."""
    return autocast(device, torch.float16 if device.type == "cuda" else torch.float32)


def _files(model: str, pretrained: str | None, field: str) -> list[Path]:
    """The weight files that open_clip will load for these names, fetched from the hub where need be."""
    if model.startswith(LOCAL):
        return weights_in(Path(model.removeprefix(LOCAL)), field)
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

    if model.startswith(HUB):
        name = model.removeprefix(HUB)
        return [Path(loading(field, name, lambda: download_pretrained_from_hf(name)))]
    if pretrained is None:
        return []
    if tag := _tag(model, pretrained):
        return [Path(loading(field, tag.get("hf_hub") or model, lambda: download_pretrained(tag)))]
    return [require_file(pretrained, field)]


def _tag(model: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip knows of the weights of an architecture by that name; empty: nothing."""
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else {}


def look_for(model: str, pretrained: str | None, checkpoint: str | None, field: str) -> list[Remote]:
    """The hub's files that an `OpenClip` of these would read, none where all lie here, without fetching one; raises
    InvdpoError where one is missing. Weights that open_clip fetches from elsewhere are not looked for.
    """
    import open_clip
    from open_clip.constants import HF_CONFIG_NAME, HF_WEIGHTS_NAME

    if model.startswith(LOCAL):
        weights_in(Path(model.removeprefix(LOCAL)), field)
        _text_settings(model, field)
    elif not model.startswith(HUB) and model not in open_clip.list_models():
        raise InvdpoError(f"{field}: open_clip has no architecture {model}.{nearest(model, open_clip.list_models())}")
    if checkpoint is not None:
        return look_for_file(checkpoint, _checkpoint_field(field))
    if model.startswith(HUB):
        repo = model.removeprefix(HUB)
        return [_hub_weights(repo, HF_WEIGHTS_NAME, field), look(repo, HF_CONFIG_NAME, field, INSTEAD)]
    tag = _tag(model, pretrained)
    if found := split_id(tag.get("hf_hub") or ""):
        return [_hub_weights(found[0], found[1] or HF_WEIGHTS_NAME, field)]
    if not tag and not model.startswith(LOCAL):
        if pretrained is None:
            raise InvdpoError(_without_weights(model, field))
        require_file(pretrained, field)
    return []


def _text_settings(model: str, field: str) -> dict[str, Any]:
    """What a model's configuration says of its text tower; InvdpoError where it asks for a repository's own code."""
    import open_clip
    from open_clip.constants import HF_CONFIG_NAME
    from open_clip.pretrained import download_pretrained_from_hf

    name = model.removeprefix(HUB).removeprefix(LOCAL)

    def read() -> dict[str, Any]:
        if name == model:
            return (open_clip.get_model_config(model) or {}).get("text_cfg", {})
        local = model.startswith(LOCAL)
        path = Path(name) / HF_CONFIG_NAME if local else Path(download_pretrained_from_hf(name, HF_CONFIG_NAME))
        return json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]

    settings = loading(field, name, read)
    if settings.get("tokenizer_kwargs", {}).get("trust_remote_code") or _has_code(settings.get("hf_model_name"), field):
        raise InvdpoError(
            f"{field}: the text tower or tokenizer of {name} is made by Python code of its own, and no repository's "
            f"code is run. Name a model that the libraries have a class for."
        )
    return settings


def _has_code(tower: str | None, field: str) -> bool:
    """Whether a text tower of transformers, by its folder or hub id, comes with a class of its own."""
    from transformers import PretrainedConfig

    return tower is not None and "auto_map" in loading(field, tower, lambda: PretrainedConfig.get_config_dict(tower))[0]


def _hub_weights(repo: str, name: str, field: str) -> Remote:
    """The file of weights that open_clip takes from a repository for that name: in safetensors where there is one."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    safe = HF_SAFE_WEIGHTS_NAME if name == HF_WEIGHTS_NAME else str(Path(name).with_suffix(".safetensors"))
    return look(repo, safe if safe in list_files(repo, field, INSTEAD) else name, field, INSTEAD)


def _checkpoint_field(field: str) -> str:
    return field.rsplit(".", 1)[0] + ".checkpoint"


def _without_weights(model: str, field: str) -> str:
    return f"{field}: {model!r} is an architecture without weights; add `pretrained` or `checkpoint`"


class OpenClip:
    """Embeddings of one open_clip model; scorers that hold the same object share its passes over a `Pictures`.

    model: `local-dir:PATH`, `hf-hub:ID`, or an architecture's name with `pretrained` (a tag or a file). checkpoint: a
    .pt with {"state_dict": ...} of the same architecture, loaded over it (HPSv2's form), a file here or one of the hub
    as `owner/name/path/in/it`. field: the config field that names it, for errors. preprocessing: see the top of this
    file. Raises InvdpoError where there are no weights to load: open_clip alone would go on with random ones.
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
        over = None if checkpoint is None else find_file(checkpoint, _checkpoint_field(field))
        files = files if over is None else [over]
        if not files:
            raise InvdpoError(_without_weights(model, field))
        self.device = device
        # The other tokenizers take no such argument.
        options = {"trust_remote_code": False} if _text_settings(model, field).get("hf_tokenizer_name") else {}
        self.model, transform, self.tokenize = loading(
            field, model.removeprefix(HUB).removeprefix(LOCAL), lambda: _load(model, pretrained, over, device, options)
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
    model: str, pretrained: str | None, checkpoint: Path | None, device: torch.device, options: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """(model in eval mode on the device, validation transform, tokenizer). options: the tokenizer's."""
    import open_clip

    # OpenAI's weights were trained with QuickGELU; under the plain architecture name open_clip only warns.
    gelu = bool(_tag(model, pretrained).get("quick_gelu", False))
    network: Any
    network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, force_quick_gelu=gelu)
    if checkpoint is not None:
        open_clip.load_checkpoint(network, str(checkpoint), strict=True, weights_only=True)
    return network.to(device).eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model, **options)


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
