"""Where a scorer's weights lie on disk, and the hash that names them in the results."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from invdpo import hub
from invdpo.device import is_out_of_memory
from invdpo.errors import InvdpoError

Loaded = TypeVar("Loaded")

# The formats in the order in which transformers and open_clip prefer them; one folder may hold both.
PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
INSTEAD = "set it to where a copy of it is here"


def require_file(path: Path | str, field: str) -> Path:
    """The path of an existing file; raises InvdpoError naming the config field otherwise."""
    path = Path(path)
    if not path.is_file():
        raise InvdpoError(f"{field}: there is no file {path}; put the weights there or set `{field}` to where they are")
    return path


def find_file(place: Path | str, field: str) -> Path:
    """A file here by its path, or one of the hub by `owner/name/path/in/it`, fetched where need be; raises InvdpoError
    naming the config field where it cannot be had.
    """
    if Path(place).is_file():
        return Path(place)
    return hub.fetch_file(*_on_hub(place, field))


def look_for_file(place: Path | str, field: str) -> list[hub.Remote]:
    """Whether `find_file` would find it, without fetching it: the hub's file; none where it lies here."""
    if Path(place).is_file():
        return []
    repo, name, *words = _on_hub(place, field)
    hub.list_files(repo, *words)  # which an unreachable hub refuses sooner than a file
    return [hub.look(repo, name, *words)]


def look_here(place: Path | str, field: str) -> list[hub.Remote]:
    """The same for what must be a file here."""
    require_file(place, field)
    return []


def _on_hub(place: Path | str, field: str) -> tuple[str, str, str, str]:
    repo, name = hub.split_id(str(place)) or ("", "")
    if not name:
        raise InvdpoError(
            f"{field}: there is no file {place}; put the weights there, or set `{field}` to where they are: a path, or "
            "a file of the hub as owner/name/path/in/it"
        )
    return repo, name, f"`{field}: {place}`", INSTEAD


def weights_in(folder: Path, field: str) -> list[Path]:
    """The weight files of a model folder; raises InvdpoError where it does not exist or holds none."""
    if not folder.is_dir():
        raise InvdpoError(f"{field}: there is no folder {folder}; put the model there or set `{field}` to where it is")
    for pattern in PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    raise InvdpoError(f"{field}: the folder {folder} holds no weights ({', '.join(PATTERNS)})")


def sha12(files: Iterable[Path]) -> str:
    """The first 12 hex digits of the sha256 of the files' contents, in the given order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def loading(field: str, identifier: str, load: Callable[[], Loaded]) -> Loaded:
    """`load()`, any failure of which becomes an InvdpoError that names the config field and what it says, but for a GPU
    that is out of memory.

    The libraries raise anything from OSError to KeyError for a file that is truncated, of another model or
    not there.
    """
    try:
        return load()
    except InvdpoError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own words say how to run the code.
        raise InvdpoError(
            f"{field}: cannot load {identifier}: it is damaged, or holds more than tensors, which could run any code "
            f"when it is read. Fetch it again, or {INSTEAD}."
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise hub.explain(error, identifier, field, INSTEAD) from error


def finite(scorer: str, scores: Tensor) -> np.ndarray:
    """Scores (B,) as a float32 array; raises InvdpoError if one is not finite: such weights are broken."""
    values = scores.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise InvdpoError(
            f"scorers.{scorer}: a score is not a number; its weights are broken, fetch or build them again"
        )
    return values
