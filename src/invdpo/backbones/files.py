"""The files of a pipeline: where they lie, what they say, and one message for whatever cannot be read.

Weights are read from safetensors alone. A pickle runs whatever code its author put into it, and so does a repository's
own Python code: neither is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from invdpo import hub
from invdpo.errors import InvdpoError
from invdpo.hub import Header, Remote
from invdpo.provenance import sha256_file

Loaded = TypeVar("Loaded")

UNET = "diffusion_pytorch_model"  # what diffusers calls the file of a UNet or codec
TEXT = "model"  # and transformers that of a text encoder
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FLOATS = ("F16", "BF16", "F32", "F64")  # what weights may be stored as
SCALE = 0.18215  # of a codec whose configuration does not say it, as SD1.5's: diffusers' default
NAMED = 4  # keys that a message about a checkpoint names
LOCAL_COPY = "put the folder of a local copy in place of the id"


def said(label: str, source: str | Path) -> str:
    """A setting and its value, as messages begin."""
    return f"`{label}: {source}`"


def read_json(source: str | Path, name: str, label: str = "base") -> dict[str, Any]:
    """A JSON file of a pipeline folder or hub id, by its path inside it; InvdpoError where it cannot be read or holds
    no object. label: the study's key that names the source."""
    path = fetch(source, name, label)
    if not path.is_file():
        raise _missing(source, name, label)
    found = attempt(source, name, lambda: json.loads(path.read_text(encoding="utf-8")), label)
    if not isinstance(found, dict):
        raise InvdpoError(
            f"{said(label, source)}: `{name}` holds a {type(found).__name__} and no settings. Fetch it again."
        )
    return found


def read_settings(source: str | Path, name: str, keys: Iterable[str], label: str = "base") -> dict[str, Any]:
    """As `read_json`, and InvdpoError where the file lacks one of the keys."""
    found = read_json(source, name, label)
    if lacking := [key for key in keys if key not in found]:
        raise InvdpoError(
            f"{said(label, source)}: `{name}` lacks {' and '.join(f'`{key}`' for key in lacking)}, which says what the "
            "network reads or gives. Fetch it again, or use another release."
        )
    return found


def _missing(source: str | Path, part: str, label: str) -> InvdpoError:
    return InvdpoError(
        f"{said(label, source)}: it has no `{part}`. A pipeline holds model_index.json, unet, vae, scheduler and one "
        "or two text encoders with tokenizers, as `save_pretrained` writes them. Name such a folder or hub id."
    )


def fetch(source: str | Path, name: str, label: str = "base") -> Path:
    """A file of a folder or hub id, by its path inside it, fetched where need be."""
    return Path(source) / name if Path(source).is_dir() else hub.fetch_file(*_asked(source, name, label))


def look(source: str | Path, name: str, label: str = "base") -> tuple[Header, Remote | None]:
    """The header of a safetensors file of a folder or hub id, and what the hub says of it; None: it lies here.

    Of a file that is neither here nor in the hub's cache nothing else is fetched. Raises InvdpoError as `read_header`.
    """
    what = f"{said(label, source)}: {name}"
    if Path(source).is_dir():
        return read_header(Path(source) / name, what), None
    remote = hub.look(*_asked(source, name, label))
    if remote.path is not None:
        return read_header(remote.path, what), remote
    header = hub.fetch_header(remote, said(label, source), LOCAL_COPY)
    _check_types(header, what)
    return header, remote


def _asked(source: str | Path, name: str, label: str) -> tuple[str, str, str, str]:
    return str(source), name, said(label, source), LOCAL_COPY


def read_header(path: Path, what: str) -> Header:
    """The header of a safetensors file here. what: the file, for messages. Raises InvdpoError where it is truncated or
    no safetensors file, and where a tensor is of a type that is no weight's: libraries would copy the integers of a
    quantised network as if they were its weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InvdpoError(f"{what} is truncated, or no safetensors file ({error}). Fetch it again.") from error
    _check_types(header, what)
    return header


def _check_types(header: Header, what: str) -> None:
    # CLIP's text encoders were saved with the numbers of their positions.
    odd = [name for name, (kind, _) in header.items() if kind not in FLOATS and not name.endswith("position_ids")]
    if odd:
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise InvdpoError(
            f"{what} stores {odd[0]} as {header[odd[0]][0]}{more}. Weights must be {', '.join(FLOATS)}: use a release "
            "that is not quantised."
        )


def text_parts(base: str | Path) -> tuple[tuple[str, str], ...]:
    """The folders of a pipeline's tokenizers and text encoders: one pair of them for SD1.5, two for SDXL.

    Raises InvdpoError for a pipeline of another kind.
    """
    index = read_json(base, "model_index.json")
    has = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    if not {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= has or "text_encoder_3" in has:
        raise InvdpoError(
            f"`{base}` is a {index.get('_class_name')} with {', '.join(sorted(has))}. Needed is a pipeline of the "
            "Stable Diffusion 1.x or SDXL layout: unet, vae, scheduler, and one or two text encoders with tokenizers."
        )
    both = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    return tuple(pair for pair in both if pair[1] in has)


def check_fits(source: str | Path, base: str | Path) -> None:
    """InvdpoError where the UNet in `source` is not conditioned on what the text encoders of the pipeline `base` give.

    Reads configurations only: a checkpoint of the wrong family is found before its gigabytes are fetched.
    """
    unet = read_settings(source, "unet/config.json", ["cross_attention_dim"])
    wide = {"text_encoder": ["hidden_size"], "text_encoder_2": ["hidden_size", "projection_dim"]}
    encoders = [read_settings(base, f"{name}/config.json", wide[name]) for _, name in text_parts(base)]
    pooled = encoders[1]["projection_dim"] if len(encoders) == 2 else None
    wanted = (sum(encoder["hidden_size"] for encoder in encoders), pooled)
    found = (unet["cross_attention_dim"], _pooled_width(unet, source))
    if found != wanted:
        raise InvdpoError(
            f"The UNet of `{source}` {_reads(*found)}, but the text encoders of `{base}` give "
            f"{_described(*wanted)}. Use weights that were trained from this base, or the base of these weights."
        )


def _pooled_width(unet: dict[str, Any], source: str | Path) -> int | None:
    """The width of the pooled embedding that a UNet reads beside six numbers about sizes; None: it reads neither."""
    kind = unet.get("addition_embed_type")
    if kind is None:
        return None
    if kind != "text_time":
        raise InvdpoError(
            f"The UNet of `{source}` has `addition_embed_type: {kind}`; only `text_time` (SDXL) is known."
        )
    keys = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    unet = read_settings(source, "unet/config.json", keys)
    return unet[keys[0]] - 6 * unet[keys[1]]


def check_codec(base: str | Path, vae: str | None = None) -> None:
    """InvdpoError where the UNet of a pipeline does not denoise what its codec makes, or what the one in `vae` does:
    latents of as many channels, in the scale that the UNet was trained on.

    Reads configurations only, as `check_fits`.
    """
    source, name, label = (base, "vae/config.json", "base") if vae is None else (vae, "config.json", "vae")
    codec = read_settings(source, name, ["latent_channels"], label)
    unet = read_settings(base, "unet/config.json", ["in_channels", "out_channels"])
    found, made = (unet["in_channels"], unet["out_channels"]), codec["latent_channels"]
    if found != (made, made):
        raise InvdpoError(
            f"The UNet of `{base}` reads {found[0]} channels and gives {found[1]}, but the codec of "
            f"{said(label, source)} makes latents of {made}. Use a codec of the base's family, and a base that "
            "denoises latents alone: one for inpainting or for editing reads other pictures beside them."
        )
    if vae is None:
        return
    own, other = (each.get("scaling_factor", SCALE) for each in (read_json(base, "vae/config.json"), codec))
    if own != other:
        raise InvdpoError(
            f"{said('vae', vae)} multiplies its latents by {other} (`scaling_factor`), the codec of `{base}` by {own}, "
            "which the UNet was trained on. Use a codec of the base's family."
        )


def _reads(width: int, pooled: int | None) -> str:
    return f"is of the {'SD1.5' if pooled is None else 'SDXL'} family and reads {_described(width, pooled)}"


def _described(width: int, pooled: int | None) -> str:
    beside = "no pooled embedding" if pooled is None else f"a pooled embedding of {pooled}"
    return f"token embeddings of {width} numbers and {beside}"


def fingerprint(base: str | Path, vae: str | None = None, variant: str | None = None) -> str:
    """sha256 over the files that encode images and prompts: the same for the same content, wherever it lies.

    vae: a codec in place of the pipeline's own; variant: as for `load_unet`.
    """
    text = [part for pair in text_parts(base) for part in reversed(pair)]
    parts = _listed(base, text if vae is not None else ["vae", *text], variant, "base")
    if vae is not None:
        parts += _listed(vae, [""], None, "vae")
    digest = hashlib.sha256()
    for name, path in parts:
        digest.update(f"{name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _listed(source: str | Path, parts: list[str], variant: str | None, label: str) -> list[tuple[str, Path]]:
    """Name in the pipeline and place of the files behind its parts that are read; "" is the source itself."""
    found = []
    for part in parts:
        names = file_names(source, part, label)
        weights = [name for stem in (UNET, TEXT) for name in weights_among(names, stem).get(variant, [])]
        chosen = {*weights, *(name for name in names if name.endswith((".json", ".txt")))}
        found += [(name, fetch(source, name, label)) for name in sorted(chosen)]
    return found


def file_names(source: str | Path, part: str, label: str = "base") -> list[str]:
    """The files of one folder of a pipeline folder or hub id, as paths inside it, sorted; part "": beside its folders.

    Raises InvdpoError where there is no such folder, and where the hub does not list them.
    """
    folder = Path(source)
    if folder.is_dir():
        there = (folder / part).iterdir() if (folder / part).is_dir() else ()
        names = [path.relative_to(folder).as_posix() for path in there if path.is_file()]
    else:
        names = inside(hub.list_files(str(source), said(label, source), LOCAL_COPY), part)
    if not names:
        raise _missing(source, part or "config.json", label)
    return sorted(names)


def inside(names: Iterable[str], folder: str) -> list[str]:
    """Those of some paths that lie in a folder, and not deeper."""
    return [name for name in names if str(PurePosixPath(name).parent) == (folder or ".")]


def weights_among(names: Iterable[str], stem: str) -> dict[str | None, list[str]]:
    """Variant -> those of a folder's files that hold a network of that variant in safetensors: one, or else its parts.

    A variant is what stands behind the stem of the name: fp16 in `stem.fp16.safetensors`; None: nothing does.
    """
    whole, parts = {}, {}
    pattern = re.compile(rf"{stem}(?:\.(\w+))?(-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors")
    for name in sorted(names):
        if found := pattern.fullmatch(PurePosixPath(name).name):
            variant = found[1] or found[3]
            (parts if found[2] else whole).setdefault(variant, []).append(name)
    return parts | whole


def part_weights(source: str | Path, part: str, variant: str | None, label: str = "base") -> list[str]:
    """The safetensors files of a part of a pipeline, as paths inside it; part "": of a network of its own.

    Raises InvdpoError where there is none of that variant: other variants, a pickle, a part that is missing.
    """
    names, stem = file_names(source, part, label), TEXT if part.startswith("text_encoder") else UNET
    found, where = weights_among(names, stem), f"{said(label, source)}: `{part or '.'}`"
    if variant in found:
        return complete(found[variant], where)
    if found:
        has = " and ".join(sorted("plain ones" if name is None else f"`variant: {name}`" for name in found))
        asked = "plain weights" if variant is None else f"weights of `variant: {variant}`"
        raise InvdpoError(f"{where} holds no {asked}, but {has}. Set `variant` so, or use another release.")
    refuse_pickles(names, where)
    raise InvdpoError(
        f"{where} holds no weights in safetensors ({stem}.safetensors). Fetch it again, or use another release."
    )


def complete(names: list[str], where: str) -> list[str]:
    """The files of a network; InvdpoError where it is stored in parts and not all of them are there."""
    if (found := re.search(r"-of-(\d{5})\.", names[0])) and len(names) != int(found[1]):
        raise InvdpoError(f"{where} holds {len(names)} of {int(found[1])} parts of its weights. Fetch it again.")
    return names


def refuse_pickles(names: Iterable[str], where: str) -> None:
    """InvdpoError where one of some files, none of which is weights in safetensors, is a pickle."""
    if pickles := [name for name in names if PurePosixPath(name).suffix in PICKLES]:
        raise InvdpoError(
            f"{where} holds its weights as a pickle only ({pickles[0]}), which can run any code when it is read, so it "
            "is not read. Use a release in safetensors, or convert one that you trust."
        )


def load_weights(kind: type[Loaded], source: str | Path, part: str, label: str = "base", **options: Any) -> Loaded:
    """A diffusers or transformers network of that kind, when every key of its weights was found and used.

    part: its folder in the pipeline, "" for the source itself. label: the study's key that names the source. The
    libraries only warn about missing and unexpected keys, and put random weights in the place of missing ones.
    """
    for name in part_weights(source, part, options.get("variant"), label):
        read_header(fetch(source, name, label), f"{said(label, source)}: {name}")
    library: Any = kind
    options |= {"subfolder": part, "use_safetensors": True, "output_loading_info": True}
    model, report = attempt(source, part or "weights", lambda: library.from_pretrained(source, **options), label)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        counts = [f"{len(keys)} {what} ({_some(keys)})" for keys, what in _told(missing, unexpected)]
        raise InvdpoError(
            f"{said(label, source)}: the weights of `{part or 'the model'}` have {' and '.join(counts)}, so they are "
            "not those of the network that its config.json describes. Check the file, or fetch it again."
        )
    return model


def _told(missing: list[str], unexpected: list[str]) -> list[tuple[list[str], str]]:
    both = [(missing, "missing keys"), (unexpected, "unexpected keys")]
    return [(keys, what) for keys, what in both if keys]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", …" if len(keys) > NAMED else "")


def attempt(source: str | Path, part: str, load: Callable[[], Loaded], label: str = "base") -> Loaded:
    """Call a library's loader; whatever it cannot find or read becomes one message that names the part."""
    with hub.told(str(source), said(label, source), LOCAL_COPY, part=part):
        return load()
