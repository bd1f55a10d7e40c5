"""Where the files of a data set of pairs are, and how they come here whole: a local folder or a hub data set."""

from __future__ import annotations

import hashlib
import logging
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

from invdpo.errors import InvdpoError
from invdpo.hub import explain, split_id, told
from invdpo.provenance import sha256_file

log = logging.getLogger("invdpo")

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
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
    of files with `train` in their names only these count. revision: branch, tag or commit of a hub data set.
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
    from huggingface_hub import HfApi

    with told(repo, f"`preferences: {source}`", INSTEAD, "dataset", revision=revision):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    files = {Path(file.rfilename): file for file in info.siblings or [] if file.rfilename.endswith(".parquet")}
    names = _of_split(sorted(files), split or "train") or ([] if split else sorted(files))
    if not names:
        splits = sorted({name.name.split("-")[0] for name in files})
        raise InvdpoError(
            f"The hub data set `{repo}` has no parquet file{f' of the split `{split}`' if split else ''}"
            f"{f'; its splits: {splits}' if splits else ''}. Name another one."
        )
    return [
        Shard(
            f"{repo}/{name}",
            files[name].size or 0,
            repo=repo,
            commit=info.sha or revision or "main",
            sha256=lfs.sha256 if (lfs := files[name].lfs) else None,
            blob=files[name].blob_id,
        )
        for name in names
    ]


def _of_split(files: Iterable[Path], split: str) -> list[Path]:
    """Files whose names say that split: `train-00000-of-00645-….parquet`. `train` may stand anywhere in the name."""
    return [file for file in files if (split in file.name if split == "train" else file.name.split("-")[0] == split)]


@contextmanager
def opened(shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard's parquet, its columns checked; of one on the hub only what is then read of it is fetched, by range.

    Raises InvdpoError where it is no whole parquet file, or lacks a column that pairs need.
    """
    try:
        with pq.ParquetFile(shard.path if shard.path is not None else _remote(shard)) as parquet:
            missing = [name for name in COLUMNS if name not in parquet.schema_arrow.names]
            if missing:
                raise InvdpoError(
                    f"{shard.name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
                    f"Preference pairs need Pick-a-Pic v2's columns {', '.join(COLUMNS)}; this file has "
                    f"{', '.join(parquet.schema_arrow.names)}."
                )
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
