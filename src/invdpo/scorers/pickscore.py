"""PickScore (Kirstain et al. 2023): cosine of image and prompt under a CLIP model tuned on Pick-a-Pic.

The authors' `utils/pickscore_utils.py` returns the raw cosine (0.20 to 0.23), the model card's example the cosine
times exp(logit_scale), about 100 (20 to 23). Here both, as scores of different names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit

from invdpo import hub
from invdpo.errors import InvdpoError
from invdpo.scorers.openclip import half_on_cuda
from invdpo.scorers.pictures import Pictures, Preprocessing
from invdpo.scorers.texts import Texts
from invdpo.scorers.weights import INSTEAD, finite, loading, sha12, weights_in

FIELD = "scorers.pickscore.model"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")  # as transformers wrote it before 5, and since


class PickScore:
    """`score` gives {"pickscore": (B,), "pickscore_scaled": (B,)}: the raw cosine, and times the checkpoint's scale.

    model: folder or hub id of a transformers `CLIPModel`. processor: folder or hub id of its `CLIPProcessor`,
    where that is another one (PickScore_v1 uses `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`'s). Prompts are cut
    and padded to the model's length (77). Images are resized by PIL, as when the authors published: the
    torchvision backend that transformers prefers today differs by up to 1/255.
    """

    def __init__(self, model: str, device: torch.device, processor: str | None = None):
        folder = _model_folder(model)
        self.device = device
        self.model: Any = loading(FIELD, model, lambda: _load_model(folder, device))
        self.processor: Any = loading(
            "scorers.pickscore.processor" if processor else FIELD,
            processor or model,
            lambda: _load_processor(processor or str(folder)),
        )
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self.preprocessing = _preprocessing(self.processor.image_processor)
        self.scale = float(self.model.logit_scale.exp())
        self.texts = Texts(self._embed_texts)
        self.version = f"pickscore:{sha12(weights_in(folder, FIELD))}:{self.preprocessing.name}"

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {name: (B,) float32}, higher is better."""
        pixels = Pictures.of(images).pixels(self.preprocessing).to(self.device)
        with half_on_cuda(self.device):
            image = unit_features(self.model.get_image_features(pixel_values=pixels))
        cosine = finite("pickscore", (image * self.texts(prompts)).sum(-1))
        return {"pickscore": cosine, "pickscore_scaled": cosine * np.float32(self.scale)}

    @torch.no_grad()
    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.processor(
            text=prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        with half_on_cuda(self.device):
            return unit_features(self.model.get_text_features(**tokens))

    def cut(self, prompts: list[str]) -> int:
        """How many prompts have more tokens than the model reads (77); their ends play no part."""
        return sum(len(ids) > self.length for ids in self.processor.tokenizer(prompts, verbose=False)["input_ids"])


def _preprocessing(processor: Any) -> Preprocessing:
    side, crop = int(processor.size["shortest_edge"]), int(processor.crop_size["height"])
    numbers = (float(side), float(processor.rescale_factor), *processor.image_mean, *processor.image_std)
    # Its resize can be shared with open_clip's towers, its arithmetic (in numpy) differs from theirs in the last bit.
    name = f"shortest-bicubic-{crop}"
    return Preprocessing(name, numbers, partial(_transform, processor), side)


def _transform(processor: Any, image: Image.Image) -> Tensor:
    """The processor's own steps after its resize, bit for bit; its own call takes twice as long on a small image."""
    from transformers.image_transforms import center_crop, normalize, rescale
    from transformers.image_utils import ChannelDimension

    height, width = int(processor.crop_size["height"]), int(processor.crop_size["width"])
    pixels = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    pixels = center_crop(pixels, (height, width), input_data_format=ChannelDimension.FIRST)
    pixels = rescale(pixels, processor.rescale_factor, input_data_format=ChannelDimension.FIRST)
    mean, std = list(processor.image_mean), list(processor.image_std)
    return torch.from_numpy(
        np.ascontiguousarray(normalize(pixels, mean, std, input_data_format=ChannelDimension.FIRST))
    )


def unit_features(output: Any) -> Tensor:
    """The unit embeddings (B, D) in float32: transformers 5 returns an object where 4 returned the tensor."""
    return unit(output.pooler_output.float(), dim=-1)


def _model_folder(model: str) -> Path:
    """The local folder of the model; a hub id is fetched into the hub's cache first."""
    if Path(model).is_dir():
        return Path(model)
    _hub_weights(model, FIELD)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    with hub.told(model, FIELD, INSTEAD):
        return Path(snapshot_download(model, allow_patterns=patterns))


def _hub_weights(model: str, field: str) -> list[str]:
    """The safetensors files of a hub id; InvdpoError where it has none: a pickle could run any code."""
    if hub.split_id(model) != (model, ""):
        raise InvdpoError(f"{field}: there is no folder {model}; put the model there or set `{field}` to where it is")
    names = hub.list_files(model, f"`{field}: {model}`", INSTEAD)
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not found:
        raise InvdpoError(
            f"`{field}: {model}`: the hub's repository has no weights in safetensors, and nothing else is read. Name "
            f"one that has, or {INSTEAD}."
        )
    return found


def look_for(model: str, processor: str | None) -> list[hub.Remote]:
    """The hub's files that a `PickScore` of these would read, none where both lie here, without fetching one; raises
    InvdpoError where one is missing.
    """
    found: list[hub.Remote] = []
    if Path(model).is_dir():
        weights_in(Path(model), FIELD)
    else:
        names = ["config.json", *_hub_weights(model, FIELD)]
        found += [hub.look(model, name, f"`{FIELD}: {model}`", INSTEAD) for name in names]
    place, field = processor or model, "scorers.pickscore.processor" if processor else FIELD
    folder, wanted = Path(place), f"`{field}: {place}`"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set(hub.list_files(place, wanted, INSTEAD))
    if not (described := [name for name in PREPROCESSING if name in names]):
        raise InvdpoError(
            f"{wanted} has no {' or '.join(PREPROCESSING)}, which says how pictures are prepared; {INSTEAD}"
        )
    return found if folder.is_dir() else [*found, hub.look(place, described[0], wanted, INSTEAD)]


def _load_model(folder: Path, device: torch.device) -> Any:
    from transformers import CLIPModel

    loaded: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        raise InvdpoError(f"{FIELD}: the weights in {folder} lack {sorted(report['missing_keys'])[:3]}")
    return model.to(device).eval().requires_grad_(False)


def _load_processor(identifier: str) -> Any:
    from transformers import CLIPProcessor

    # None, the library's default, asks on a terminal whether to run a repository's code.
    return CLIPProcessor.from_pretrained(identifier, backend="pil", trust_remote_code=False)
