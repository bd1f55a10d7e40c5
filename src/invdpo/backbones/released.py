"""Weights of a UNet as they are published: where their tensors lie, whether they fit a base, and the base with them.

Files are read tensor by tensor, so that two networks can be compared without either being built. Only safetensors are
read: a pickle runs whatever code its author put into it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.hub import fetch_file

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

UNET = "diffusion_pytorch_model"
LORA_FILE = "pytorch_lora_weights.safetensors"
PICKLES = (f"{UNET}.bin", f"{UNET}.fp16.bin", "pytorch_lora_weights.bin")
LORA_WORDS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down")
SHOWN = 3  # names of tensors in a message


@dataclass(frozen=True)
class Stored:
    """A network's tensors in safetensors files. source: as the study names it. places: tensor -> its file. shapes:
    tensor -> its shape.
    """

    source: str
    places: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def lora(self) -> bool:
        """Whether these are low-rank updates of weights, and not weights."""
        return any(word in name for name in self.places for word in LORA_WORDS)

    def reader(self, stack: ExitStack) -> Callable[[str], Tensor]:
        """Reads a tensor by its name, as it is stored, on the CPU; the files are open until `stack` closes."""
        from safetensors import safe_open

        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in dict.fromkeys(self.places.values())
        }
        return lambda name: opened[self.places[name]].get_tensor(name)


def unet_files(variant: str | None) -> tuple[str, str]:
    """What diffusers calls a UNet's file, and the index of one that is stored in parts."""
    suffix = "" if variant is None else f".{variant}"
    return f"{UNET}{suffix}.safetensors", f"{UNET}.safetensors.index{suffix}.json"


def find_weights(source: str | Path, wanted: str = "weights", variant: str | None = None) -> Stored:
    """The tensors of a UNet or LoRA: of a folder (a UNet's, a pipeline's, a checkpoint's) or safetensors file here, or
    of a hub id, which a path inside its repository may follow (`owner/name/folder`, `owner/name/file.safetensors`).

    wanted: the setting that names the source, for messages. variant: which of its files, `fp16` for
    diffusion_pytorch_model.fp16.safetensors; None: the plain ones, or fp16 where there are no others. Raises
    InvdpoError: no such source or no weights in it, weights in a pickle only, a file that is truncated or not
    safetensors.
    """
    files = _files(str(source), wanted, variant)
    places, shapes = {}, {}
    for path in files:
        for name, shape in _header(path, source, wanted).items():
            places[name], shapes[name] = path, shape
    return Stored(str(source), places, shapes)


def _files(source: str, wanted: str, variant: str | None) -> list[Path]:
    root, inner = _split(source, wanted)
    if inner.endswith(".safetensors"):
        return [_needed(root, inner, source, wanted)]
    folders = [f"{inner}/"] if inner else ["unet/", ""]
    names = unet_files(variant) if variant else (*unet_files(None), *unet_files("fp16"))
    for folder in folders:
        for name in names:
            found = _find(root, folder + name, source, wanted)
            if found is not None:
                return [found] if name.endswith(".safetensors") else _parts(found, root, folder, source, wanted)
    last = folders[-1]
    if (found := _find(root, last + LORA_FILE, source, wanted)) is not None:
        return [found]
    for name in [folder + pickle for folder in folders for pickle in PICKLES]:
        if _find(root, name, source, wanted) is not None:
            raise InvdpoError(
                f"`{wanted}: {source}` holds its weights as a pickle ({name}), which could run any code; only "
                "safetensors are read. Convert the file where you trust it, and name the folder with the result."
            )
    raise InvdpoError(
        f"`{wanted}: {source}` holds no {' or '.join(folder + names[0] for folder in folders)} and no "
        f"{last}{LORA_FILE}. Name the folder or safetensors file of a diffusers UNet, pipeline or LoRA, or a hub id; a "
        "path inside a repository may follow its id."
    )


def _split(source: str, wanted: str) -> tuple[str, str]:
    """A folder here or a hub id, and the path inside it."""
    path = Path(source)
    if path.is_dir():
        return source, ""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InvdpoError(
                f"`{wanted}: {source}` is no safetensors file. Other kinds could run any code when they are read, so "
                "they are not; convert the file where you trust it."
            )
        return str(path.parent), path.name
    parts = source.split("/")
    if len(parts) < 2 or path.is_absolute() or parts[0] in (".", "..", ""):
        raise InvdpoError(f"`{wanted}: {source}`: there is no such folder or file. Check the path.")
    return "/".join(parts[:2]), "/".join(parts[2:]).rstrip("/")


def _find(root: str, name: str, source: str, wanted: str) -> Path | None:
    if Path(root).is_dir():
        path = Path(root) / name
        return path if path.is_file() else None
    return fetch_file(root, name, f"`{wanted}: {source}`", "name the folder of a local copy")


def _needed(root: str, name: str, source: str, wanted: str) -> Path:
    found = _find(root, name, source, wanted)
    if found is None:
        raise InvdpoError(f"`{wanted}: {source}`: {root} has no file {name}. Fetch it again, or check the name.")
    return found


def _parts(index: Path, root: str, folder: str, source: str, wanted: str) -> list[Path]:
    """The files of a network that is stored in several."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InvdpoError(f"`{wanted}: {source}`: {index.name} is no index of weights ({error!r}).") from error
    if unsafe := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
        raise InvdpoError(f"`{wanted}: {source}`: {index.name} names {unsafe[0]}, which is no safetensors file there.")
    return [_needed(root, folder + name, source, wanted) for name in names]


def _header(path: Path, source: str | Path, wanted: str) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, without reading the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InvdpoError(
            f"`{wanted}: {source}`: {path.name} is truncated, or no safetensors file ({error}). Fetch it again."
        ) from error


def check_same_network(weights: Stored, base: Stored, wanted: str = "weights") -> None:
    """InvdpoError where two networks differ in a tensor's name or shape: they are of different families."""
    names, known = set(weights.shapes), set(base.shapes)
    if not names & known:
        example = ", ".join(sorted(names)[:SHOWN]) or "nothing"
        raise InvdpoError(
            f"`{wanted}: {weights.source}` holds no tensor of a diffusers UNet (it holds {example}). A checkpoint in "
            "one file is converted by `from_single_file` and `save_pretrained` of diffusers."
        )
    other = [name for name in sorted(names & known) if weights.shapes[name] != base.shapes[name]]
    problems = [
        _counted(f"tensors of {base.source} are missing", sorted(known - names)),
        _counted("tensors are not in it", sorted(names - known)),
        _counted("have another shape", [f"{n} {weights.shapes[n]}, not {base.shapes[n]}" for n in other]),
    ]
    if any(problems):
        raise InvdpoError(
            f"`{wanted}: {weights.source}` is not of the same network as the base {base.source}: "
            f"{'; '.join(filter(None, problems))}. Use weights that were trained from this base, or name their `base`."
        )


def _counted(what: str, names: list[str]) -> str:
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})" if names else ""


def put_into(unet: UNet2DConditionModel, weights: Stored, wanted: str = "weights") -> UNet2DConditionModel:
    """The UNet with published weights in place of its own, in its own precision; a LoRA is added to its own.

    Raises InvdpoError where the weights are not of this network.
    """
    if weights.lora:
        return _fuse(unet, weights, wanted)
    own = unet.state_dict()
    built = Stored("the study's pipeline", {}, {name: tuple(value.shape) for name, value in own.items()})
    check_same_network(weights, built, wanted)
    with ExitStack() as stack, torch.no_grad():
        read = weights.reader(stack)
        for name, value in own.items():
            value.copy_(read(name))
    return unet


def _fuse(unet: UNet2DConditionModel, weights: Stored, wanted: str) -> UNet2DConditionModel:
    from diffusers.utils.import_utils import is_peft_available

    if not is_peft_available():
        raise InvdpoError(
            f"`{wanted}: {weights.source}` is a LoRA, which needs peft. Install it: `uv sync --extra lora`."
        )
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    if text := [name for name in weights.shapes if name.startswith(("text_encoder", "lora_te"))]:
        raise InvdpoError(
            f"`{wanted}: {weights.source}` also changes a text encoder ({text[0]}), so it cannot be compared with "
            "weights of a UNet alone. Use a LoRA of the UNet."
        )
    sdxl = unet.config["addition_embed_type"] is not None
    loader: Any = StableDiffusionXLLoraLoaderMixin if sdxl else StableDiffusionLoraLoaderMixin
    with ExitStack() as stack:
        read = weights.reader(stack)
        tensors = {name: read(name) for name in weights.places}
    try:
        state, alphas = loader.lora_state_dict(tensors, unet_config=unet.config)
        loader.load_lora_into_unet(state, alphas, unet)
        unet.fuse_lora()
        unet.unload_lora()
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvdpoError(
            f"`{wanted}: {weights.source}` is no LoRA of this base's UNet ({reason}). Use one that was trained from "
            "this base, or name its `base`."
        ) from error
    return unet
