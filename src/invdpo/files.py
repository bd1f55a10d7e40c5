"""Files that are either whole or absent: everything is written beside its place and renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invdpo.errors import InvdpoError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The safetensors library is written in Rust and reports the system's error in words, torch's archive writer
# in its own.
FULL_DISK_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed",
)


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replace_when_done(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; what was made there takes the place of `path` once the block
    succeeds.

    Works for a file and for a folder. On any failure the temporary is deleted and `path` stays as it was.
    Raises InvdpoError naming `path` when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
        # Between two hard links of one file a rename does nothing, and both would stay.
        remove(temporary)
    except BaseException as error:
        remove(temporary)
        if is_full_disk(error):
            raise InvdpoError(
                f"The disk is full: {path} could not be written ({error}). Nothing that was already there "
                "is lost. Make room and run the same command again."
            ) from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised in the handling of, says that a write found no room."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    if any(words in str(error) for words in FULL_DISK_WORDS):
        return True
    # torch's archive writer may stumble over its own half-written file while it handles the system's error.
    earlier = error.__cause__ or error.__context__
    return earlier is not None and is_full_disk(earlier)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, default=str) + "\n"
    with replace_when_done(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def mirror(source: Path, target: Path) -> None:
    """Make `target` (file or folder) a copy of `source`, through hard links where the file system allows
    them.

    The copy's time is now: Snakemake compares the times of outputs with those of their inputs.
    """
    with replace_when_done(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(source), str(temporary))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        shutil.copy(source, target)
    os.utime(target)
