"""Weights of a UNet as they are published: where their tensors lie, whether they fit a base, and the base with them.

Files are read tensor by tensor, so that two networks can be compared without either being built. Only safetensors are
read: a pickle runs whatever code its author put into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo import hub
from invdpo.backbones.files import (
    LOCAL_COPY,
    UNET,
    attempt,
    complete,
    fetch,
    file_names,
    inside,
    look,
    read_header,
    read_json,
    refuse_pickles,
    said,
    weights_among,
)
from invdpo.errors import InvdpoError
from invdpo.hub import Remote

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

LORA_FILE = "pytorch_lora_weights.safetensors"
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
        return any(word in name for name in self.shapes for word in LORA_WORDS)

    def reader(self, stack: ExitStack) -> Callable[[str], Tensor]:
        """Reads a tensor by its name, as it is stored, on the CPU; the files are open until `stack` closes."""
        from safetensors import safe_open

        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in dict.fromkeys(self.places.values())
        }
        return lambda name: opened[self.places[name]].get_tensor(name)


def find_weights(source: str | Path, wanted: str = "weights", variant: str | None = None) -> Stored:
    """The tensors of a UNet or LoRA: of a folder (a UNet's, a pipeline's, a checkpoint's) or safetensors file here, or
    of a hub id, which a path inside its repository may follow (`owner/name/folder`, `owner/name/file.safetensors`).

    wanted: the setting that names the source, for messages. variant: which of its files, `fp16` for
    diffusion_pytorch_model.fp16.safetensors; None: the plain ones, else those of fp16, else those of the only variant
    that there is. Raises InvdpoError: no such source or no weights in it, weights in a pickle only (of which nothing is
    fetched), of a type that is no weight's, a file that is truncated or not safetensors.
    """
    root, names = _names(str(source), wanted, variant)
    places, shapes = {}, {}
    for file in names:
        path = fetch(root, file, wanted)
        for name, (_, shape) in read_header(path, f"{said(wanted, source)}: {file}").items():
            places[name], shapes[name] = path, shape
    return Stored(str(source), places, shapes)


def look_at_weights(
    source: str | Path, wanted: str = "weights", variant: str | None = None
) -> tuple[Stored, list[Remote]]:
    """What `find_weights` would find, without places, so that it cannot be read; and its files on the hub, of which
    nothing but headers is fetched. Arguments and errors as there.
    """
    root, names = _names(str(source), wanted, variant)
    shapes, files = {}, []
    for file in names:
        header, remote = look(root, file, wanted)
        shapes |= {name: shape for name, (_, shape) in header.items()}
        files += [remote] if remote is not None else []
    return Stored(str(source), {}, shapes), files


def made_from(source: str | Path, wanted: str = "weights") -> str | None:
    """What the configuration beside published weights says that they were loaded from, as diffusers writes it into a
    config.json; None where it says nothing. It may be a folder of its maker's.
    """
    root, names = _names(str(source), wanted, None)
    folder = names[0].rpartition("/")[0]
    if f"{folder}/config.json".lstrip("/") not in file_names(root, folder, wanted):
        return None
    return read_json(root, f"{folder}/config.json".lstrip("/"), wanted).get("_name_or_path")


def _names(source: str, wanted: str, variant: str | None) -> tuple[str, list[str]]:
    """A folder here or hub id, and the paths inside it of the files that hold the weights."""
    root, inner = _split(source, wanted)
    if inner.endswith(".safetensors"):
        return root, [inner]
    folders, where = [inner] if inner else ["unet", ""], said(wanted, source)
    names = _all_names(root, folders, where)
    for folder in folders:
        if found := _of_variant(weights_among(inside(names, folder), UNET), variant, where):
            return root, complete(found, where)
    lora = f"{folders[-1]}/{LORA_FILE}".lstrip("/")
    if lora in names:
        return root, [lora]
    refuse_pickles((name for folder in folders for name in inside(names, folder)), where)
    suffix = "" if variant is None else f".{variant}"
    unets = [f"{folder}/{UNET}{suffix}.safetensors".lstrip("/") for folder in folders]
    raise InvdpoError(
        f"{where} holds no {' or '.join(unets)} and no {lora}. Name the folder or safetensors file of a diffusers "
        "UNet, pipeline or LoRA, or a hub id; a path inside a repository may follow its id."
    )


def _all_names(root: str, folders: list[str], where: str) -> list[str]:
    """Paths of the files in those folders of a folder here, or of all files of a hub repository."""
    if not Path(root).is_dir():
        return sorted(hub.list_files(root, where, LOCAL_COPY))
    files = [path for folder in folders for path in (Path(root) / folder).glob("*") if path.is_file()]
    return sorted(path.relative_to(root).as_posix() for path in files)


def _of_variant(found: Mapping[str | None, list[str]], variant: str | None, where: str) -> list[str]:
    """The files of a variant, or of the one that stands for none; empty where there is no such."""
    if variant is not None:
        return found.get(variant, [])
    for name in (None, "fp16"):
        if name in found:
            return found[name]
    if len(found) > 1:
        raise InvdpoError(f"{where} holds weights in the variants {', '.join(map(str, found))}. Name one of the files.")
    return next(iter(found.values()), [])


def _split(source: str, wanted: str) -> tuple[str, str]:
    """A folder here or a hub id, and the path inside it."""
    path = Path(source)
    if path.is_dir():
        return source, ""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InvdpoError(
                f"{said(wanted, source)} is no safetensors file. Other kinds could run any code when they are read, so "
                "they are not; convert the file where you trust it."
            )
        return str(path.parent), path.name
    found = None if path.is_absolute() else hub.split_id(source)
    if found is None:
        raise InvdpoError(f"{said(wanted, source)}: there is no such folder or file. Check the path.")
    return found


def network_of(base: str | Path) -> Stored:
    """The tensors of the network that a pipeline's unet/config.json describes, of which none is made."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = read_json(base, "unet/config.json")

    def shapes() -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(config)
        return {name: tuple(value.shape) for name, value in unet.state_dict().items()}

    return Stored("unet/config.json", {}, attempt(base, "unet/config.json", shapes))


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


def require_peft(weights: Stored, wanted: str = "weights") -> None:
    """InvdpoError where a LoRA cannot be read because its library is not installed."""
    from diffusers.utils.import_utils import is_peft_available

    if not is_peft_available():
        raise InvdpoError(
            f"`{wanted}: {weights.source}` is a LoRA, which needs peft. Install it: `uv sync --extra lora`."
        )


def _fuse(unet: UNet2DConditionModel, weights: Stored, wanted: str) -> UNet2DConditionModel:
    require_peft(weights, wanted)
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
