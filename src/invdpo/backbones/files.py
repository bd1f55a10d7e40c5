"""The files of a pipeline: where they lie, what they say, and one message for whatever cannot be read.

Weights are read from safetensors alone. A pickle runs whatever code its author put into it, and so does a repository's
own Python code: neither is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from invdpo.errors import InvdpoError
from invdpo.provenance import sha256_file

Loaded = TypeVar("Loaded")

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
NAMED = 4  # keys that a message about a checkpoint names


def read_json(source: str | Path, name: str, label: str = "base") -> dict[str, Any]:
    """A JSON file of a pipeline folder or hub id, by its path inside it; InvdpoError where it cannot be read. label:
    the study's key that names the source."""

    def read() -> dict[str, Any]:
        path = Path(source) / name
        if not Path(source).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), name))
        return json.loads(path.read_text(encoding="utf-8"))

    return attempt(source, name, read, label)


def text_parts(base: str | Path) -> tuple[tuple[str, str], ...]:
    """The folders of a pipeline's tokenizers and text encoders: one pair of them for SD1.5, two for SDXL.

    Raises InvdpoError for a pipeline of another kind.
    """
    index = read_json(base, "model_index.json")
    has = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
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
    unet = read_json(source, "unet/config.json")
    encoders = [read_json(base, f"{folder}/config.json") for _, folder in text_parts(base)]
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
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]


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
    parts = _listed(base, text if vae is not None else ["vae", *text], variant)
    if vae is not None:
        parts += _listed(vae, [""], None)
    digest = hashlib.sha256()
    for name, path in parts:
        digest.update(f"{name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _listed(source: str | Path, parts: list[str], variant: str | None) -> list[tuple[str, Path]]:
    """Name in the pipeline and place of the files behind its parts that are read; "" is the source itself."""
    suffix = "" if variant is None else f".{variant}"
    weights = [f"{name}{suffix}.safetensors" for name in ("model", "diffusion_pytorch_model")]
    patterns = ["*.json", "*.txt", *weights]
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = [f"{part}/{pattern}".lstrip("/") for part in parts for pattern in patterns]
        folder = Path(attempt(source, "files", lambda: snapshot_download(str(source), allow_patterns=wanted)))
    found = []
    for part in parts:
        files = {path for pattern in patterns for path in (folder / part).glob(pattern)}
        found += [(str(path.relative_to(folder)), path) for path in sorted(files)]
    return found


def load_weights(kind: type[Loaded], source: str | Path, part: str, label: str = "base", **options: Any) -> Loaded:
    """A diffusers or transformers network of that kind, when every key of its weights was found and used.

    part: its folder in the pipeline, "" for the source itself. label: the study's key that names the source. The
    libraries only warn about missing and unexpected keys, and put random weights in the place of missing ones.
    """
    _refuse_pickles(source, part, label)
    library: Any = kind
    options |= {"subfolder": part, "use_safetensors": True, "output_loading_info": True}
    model, report = attempt(source, part or "weights", lambda: library.from_pretrained(source, **options), label)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        counts = [f"{len(keys)} {what} ({_some(keys)})" for keys, what in _told(missing, unexpected)]
        raise InvdpoError(
            f"`{label}: {source}`: the weights of `{part or 'the model'}` have {' and '.join(counts)}, so they are not "
            "those of the network that its config.json describes. Check the file, or fetch it again."
        )
    return model


def _told(missing: list[str], unexpected: list[str]) -> list[tuple[list[str], str]]:
    both = [(missing, "missing keys"), (unexpected, "unexpected keys")]
    return [(keys, what) for keys, what in both if keys]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", …" if len(keys) > NAMED else "")


def _refuse_pickles(source: str | Path, part: str, label: str) -> None:
    folder = Path(source) / part
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise InvdpoError(
            f"`{label}: {source}`: `{part or '.'}` holds its weights as a pickle only ({pickles[0]}), which can run "
            "any code when it is read, so it is not read. Use a release in safetensors, or convert one that you trust."
        )


def attempt(source: str | Path, part: str, load: Callable[[], Loaded], label: str = "base") -> Loaded:
    """Call a library's loader; whatever it cannot find or read becomes one message that names the part."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InvdpoError(f"`{label}: {source}`: {_why(Path(source), part, error)}") from error


def _why(folder: Path, part: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if folder.is_dir():
        if part and not (folder / part).exists():
            return (
                f"the folder has no `{part}`. A pipeline folder holds model_index.json, unet, vae, scheduler and one "
                "or two text encoders with tokenizers, as `save_pretrained` writes them."
            )
        return f"the `{part}` of it cannot be loaded ({reason}). Check the files."
    from huggingface_hub import errors

    causes, local = list(_chain(error)), "a local copy also does: put its folder in place of the id."

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(errors.GatedRepoError):
        return (
            "the hub gives it only to those who accepted its terms. Do so on its page there and log in "
            f"(`hf auth login`); {local}"
        )
    if is_any(errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"there is no such folder here, and no such repository on the hub (or a private one). Check it; {local}"
    if is_any(errors.RemoteEntryNotFoundError):
        return (
            f"the hub's repository has no such `{part}` (weights must be safetensors, of the `variant` asked for). "
            f"Check the id; {local}"
        )
    if is_any(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError):
        return f"there is no such folder here, the hub cannot be reached, and `{part}` was not fetched before; {local}"
    return f"there is no such folder here, and the hub's `{part}` cannot be loaded ({reason}). Check the id; {local}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
