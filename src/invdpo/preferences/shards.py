"""Where the files of a data set of pairs are, and how they come here whole: a local folder or a hub data set."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from invdpo.errors import InvdpoError, Unreachable
from invdpo.hub import cached, explain, snapshot, split_id, told
from invdpo.provenance import sha256_file

log = logging.getLogger("invdpo")

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
SHA256_DIGITS = 64  # the hub's cache names a large file's content so, a small one's by git's id
MAGIC = b"PAR1"  # the first and last four bytes of every parquet file
READ_AHEAD = 2**16  # bytes a range request of a footer or label column asks for: both are tens of kB
FOOTERS_AT_ONCE = 8  # requests of labels under way
INSTEAD = "point the setting to a local folder of its parquet files, or to an id with the same columns"


@dataclass(frozen=True)
class Shard:
    """One parquet file of a source. name: for messages, with the path inside the data set. size: bytes.

    A local one has `path`. One of the hub has `repo`, the commit that is read, and what the hub knows of its content:
    sha256 of a large file, git's blob id of a small one.
    """

    name: str
    size: int
    path: Path | None = None
    repo: str = ""
    commit: str = ""
    sha256: str | None = None
    blob: str | None = None

    def identity(self) -> str:
        """The same for the same content: sha256 of the file where it is to be had, without fetching anything."""
        if self.path is not None:
            return sha256_file(self.path)
        return self.sha256 or f"git:{self.blob}"


def list_shards(source: str, revision: str | None = None) -> list[Shard]:
    """The files of a source in the order of their names, without fetching one of them.

    source: a parquet file, a folder of them, or a hub data set's id, with `:split` behind it where it is not the train
    split. Data sets name their splits in their files' names, and validation and test pairs must not be trained on, so
    of files with `train` in their names only these count. revision: branch, tag or commit of a hub data set. Without
    a connection, the files of the hub's cache are listed where it holds a split whole (as `hf download` fetches it).
    Raises InvdpoError where there is none, or where the hub is unreachable, has no such data set, or gives no access.
    """
    path = Path(source)
    if path.is_file():
        return [Shard(str(path), path.stat().st_size, path)]
    if path.is_dir():
        files = _of_split(sorted(path.rglob("*.parquet")), "train") or sorted(path.rglob("*.parquet"))
        if not files:
            raise InvdpoError(f"`preferences: {source}` is a folder without a parquet file in it.")
        return [Shard(str(file), file.stat().st_size, file) for file in files]
    repo, _, split = source.partition(":")
    if split_id(repo) != (repo, ""):
        raise InvdpoError(
            f"`preferences: {source}` is no file or folder here, nor a hub data set's id (owner/name). Check the path."
        )
    files, silent = _on_the_hub(source, repo, revision)
    names = _of_split(sorted(files), split or "train") or ([] if split else sorted(files))
    if silent is not None and not _are_all(names):
        raise silent
    if not names:
        splits = sorted({name.name.split("-")[0] for name in files})
        raise InvdpoError(
            f"The hub data set `{repo}` has no parquet file{f' of the split `{split}`' if split else ''}"
            f"{f'; its splits: {splits}' if splits else ''}. Name another one."
        )
    return [files[name] for name in names]


def _on_the_hub(source: str, repo: str, revision: str | None) -> tuple[dict[Path, Shard], Unreachable | None]:
    """The parquet files of a hub data set by their paths in it; where the hub does not answer, those of its cache and
    its silence."""
    from huggingface_hub import HfApi

    try:
        with told(repo, f"`preferences: {source}`", INSTEAD, "dataset", revision=revision):
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except Unreachable as silent:
        return _in_the_cache(repo, revision), silent
    files = {Path(file.rfilename): file for file in info.siblings or [] if file.rfilename.endswith(".parquet")}
    return {
        name: Shard(
            f"{repo}/{name}",
            file.size or 0,
            repo=repo,
            commit=info.sha or revision or "main",
            sha256=file.lfs.sha256 if file.lfs else None,
            blob=None if file.lfs else file.blob_id,
        )
        for name, file in files.items()
    }, None


def _in_the_cache(repo: str, revision: str | None) -> dict[Path, Shard]:
    """The same of the files that the hub's cache holds of it."""
    folder, shards = snapshot(repo, "dataset", revision), {}
    if folder is None:
        return shards
    for path in folder.rglob("*.parquet"):
        name, content = path.relative_to(folder), path.resolve().name  # a link to what is named by its content
        sha256, blob = (content, None) if len(content) == SHA256_DIGITS else (None, content)
        shards[name] = Shard(f"{repo}/{name}", path.stat().st_size, None, repo, folder.name, sha256, blob)
    return shards


def _are_all(names: list[Path]) -> bool:
    """Whether these are all files of a split, by what their names say of their number: `train-00000-of-00645-….`."""
    said = [re.search(r"-of-(\d+)", name.name) for name in names]
    return bool(names) and all(found is not None and int(found[1]) == len(names) for found in said)


def _of_split(files: Iterable[Path], split: str) -> list[Path]:
    """Files whose names say that split: `train-00000-of-00645-….parquet`. `train` may stand anywhere in the name."""
    return [file for file in files if (split in file.name if split == "train" else file.name.split("-")[0] == split)]


@contextmanager
def opened(shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard's parquet, its columns checked; of one on the hub that is not in its cache, only what is then read of it
    is fetched, by range.

    Raises InvdpoError where it is no whole parquet file, or lacks a column that pairs need.
    """
    try:
        with pq.ParquetFile(shard.path or in_cache(shard) or _remote(shard)) as parquet:
            missing = [name for name in COLUMNS if name not in parquet.schema_arrow.names]
            if missing:
                raise InvdpoError(
                    f"{shard.name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
                    f"Preference pairs need Pick-a-Pic v2's columns {', '.join(COLUMNS)}; this file has "
                    f"{', '.join(parquet.schema_arrow.names)}."
                )
            _check_types(shard, parquet.schema_arrow)
            yield parquet
    except InvdpoError:
        raise
    except Exception as error:  # of the hub's client, of its HTTP library, which changes, and of the system
        if shard.path is None and not isinstance(error, pa.ArrowException):
            raise _explained(shard, error) from error
        reason = (shard.path and fault(shard.path)) or " ".join(str(error).split())[:300]
        raise InvdpoError(
            f"{shard.name} cannot be read as parquet: {reason}. Copy or download the file again."
        ) from error


def _check_types(shard: Shard, schema: pa.Schema) -> None:
    for name in ("jpg_0", "jpg_1", "caption"):
        kind, wanted = schema.field(name).type, "text"
        if name != "caption":
            wanted = "the bytes of an image file, or a struct with such `bytes`"
            kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        accepted = TEXTS if name == "caption" else BYTES
        if not any(is_one(kind) for is_one in (pa.types.is_null, *accepted)):
            raise InvdpoError(
                f"{shard.name}: the column {name} holds {kind}; needed is {wanted}, as in Pick-a-Pic v2. Convert it."
            )


def in_cache(shard: Shard) -> Path | None:
    """Where the hub's cache holds a shard of the hub whole; None: it does not."""
    path = cached(shard.repo, shard.name.removeprefix(f"{shard.repo}/"), "dataset", shard.commit)
    return path if path is not None and path.stat().st_size == shard.size and fault(path) is None else None


def _remote(shard: Shard) -> Any:
    from huggingface_hub import HfFileSystem

    path = f"datasets/{shard.repo}@{shard.commit}/{shard.name.removeprefix(f'{shard.repo}/')}"
    return HfFileSystem().open(path, "rb", block_size=READ_AHEAD, size=shard.size)


def decided(shard: Shard) -> np.ndarray:
    """Which of a shard's rows name a winner: (rows,) bool, from the label column alone.

    A label that is neither 0 nor 1 is a tie, as Diffusion-DPO's train.py L859-862 filters them. Raises InvdpoError as
    `opened` does.
    """
    with opened(shard) as parquet:
        return winners(parquet.read(columns=["label_0"]).column("label_0"))[0]


def winners(labels: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column label_0: which rows are decided, and in which image 0 won; (rows,) bool each."""
    found = values(labels)
    return found != 0.5, found == 1


def values(labels: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of labels as (rows,) float64: 1 where image 0 won, 0 where image 1 did, 0.5 for all else."""
    found = pc.cast(labels, pa.float64()).fill_null(0.5).to_numpy(zero_copy_only=False)
    return np.where((found == 0) | (found == 1), found, 0.5)


def all_decided(shards: list[Shard]) -> list[np.ndarray]:
    """`decided` of each shard, several at a time where they are on the hub."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(decided, shards))


def fetch(shard: Shard) -> Path:
    """A shard's file, downloaded where it is not here yet and checked against what the hub says of it.

    A download whose connection breaks goes on where it stopped. One whose process is killed starts again from its first
    byte, because the hub's client writes each attempt into a file of a name of its own; files that were complete are
    kept, so that a kill costs at most the file under way (0.5 GB of Pick-a-Pic v2). One that is not whole is fetched
    once more; InvdpoError, naming it, where it is broken then too. A local file is what it is: reading it tells.
    """
    if shard.path is not None:
        return shard.path
    from huggingface_hub import hf_hub_download

    wrong = None
    for again in (False, True):
        if again:
            log.warning(f"{shard.name}: {wrong}; it is fetched once more")
        try:
            path = Path(
                hf_hub_download(
                    shard.repo,
                    shard.name.removeprefix(f"{shard.repo}/"),
                    repo_type="dataset",
                    revision=shard.commit,
                    force_download=again,
                )
            )
        except Exception as error:  # as in opened
            if "Consistency check failed" not in str(error):
                raise _explained(shard, error) from error
            wrong = "the download ended before the file did"
            continue
        wrong = _differs(path, shard) or fault(path)
        if wrong is None:
            return path
    raise InvdpoError(
        f"{shard.name} was fetched twice and is broken: {wrong}. Try again later, or point `preferences:` to a local "
        "folder with a good copy of the files."
    )


def _explained(shard: Shard, error: Exception) -> InvdpoError:
    return explain(error, shard.repo, shard.name, INSTEAD, "dataset", shard.name, shard.commit)


def _differs(path: Path, shard: Shard) -> str | None:
    """How a file differs from what the hub says it holds; None where it does not."""
    size = path.stat().st_size
    if size != shard.size:
        return f"it has {size:,} bytes instead of {shard.size:,}"
    if shard.sha256 is not None and sha256_file(path) != shard.sha256:
        return "its sha256 is not the one the hub names"
    return None


def fault(path: Path) -> str | None:
    """Why a local file is no whole parquet file; None where it is one, as far as both its ends tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(max(0, size - 4))
        last = file.read(4)
    if first != MAGIC:
        return f"it does not begin as a parquet file does ({size:,} bytes)"
    if last != MAGIC or size < 12:
        return f"it is cut off after {size:,} bytes: a parquet file's last bytes are missing"
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        return f"its footer cannot be read ({error})"
    return None


def find_files(source: str, revision: str | None = None) -> list[Path]:
    """Every file of a source, fetched where it is on the hub. Raises InvdpoError as `list_shards` and `fetch` do."""
    return [fetch(shard) for shard in list_shards(source, revision)]


def check_columns(files: list[Path]) -> int:
    """Check that every file can be read and has the needed columns; returns the rows of all together.

    Raises InvdpoError that names the file and the missing columns.
    """
    rows = 0
    for file in files:
        with opened(Shard(str(file), 0, file)) as parquet:
            rows += parquet.metadata.num_rows
    return rows


def digest(rows: Iterable[np.ndarray]) -> str:
    """sha256 of the row numbers of several shards."""
    content = hashlib.sha256()
    for numbers in rows:
        content.update(len(numbers).to_bytes(8, "big") + numbers.astype("<i8").tobytes())
    return content.hexdigest()
