"""Where a scorer's weights lie on disk, and the hash that names them in the results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from invdpo.errors import InvdpoError

Loaded = TypeVar("Loaded")

# The formats in the order in which transformers and open_clip prefer them; one folder may hold both.
PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def require_file(path: Path | str, field: str) -> Path:
    """The path of an existing file; raises InvdpoError naming the config field otherwise."""
    path = Path(path)
    if not path.is_file():
        raise InvdpoError(f"{field}: there is no file {path}; put the weights there or set `{field}` to where they are")
    return path


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
    """`load()`, any failure of which becomes an InvdpoError that names the config field and what it says.

    The libraries raise anything from OSError to KeyError for a file that is truncated, of another model or
    not there.
    """
    try:
        return load()
    except InvdpoError:
        raise
    except Exception as error:
        raise InvdpoError(
            f"{field}: cannot load {identifier!r}: {type(error).__name__}: {error}; "
            "it must be a folder with a complete model, or a hub id when the hub can be reached"
        ) from error


def finite(scorer: str, scores: Tensor) -> np.ndarray:
    """Scores (B,) as a float32 array; raises InvdpoError if one is not finite: such weights are broken."""
    values = scores.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise InvdpoError(
            f"scorers.{scorer}: a score is not a number; its weights are broken, fetch or build them again"
        )
    return values
