"""Read preference pairs in the columns of Pick-a-Pic v2 (`yuvalkirstain/pickapic_v2`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from invdpo.errors import InvdpoError
from invdpo.preferences.shards import COLUMNS, Shard, decided, winners

ROWS_AT_ONCE = 64  # rows of a record batch: 25 MB of Pick-a-Pic's JPEGs
PAGES = 2**20  # bytes read from the file at a time, instead of a whole row group's


@dataclass(frozen=True)
class EncodedPair:
    """A decided pair as it is stored, winner first. `row` counts the rows of all files in order."""

    row: int
    caption: str
    winner: bytes
    loser: bytes

    def with_images(self, images: tuple[Image.Image, Image.Image]) -> Pair:
        """This pair and its decoded images, winner first."""
        return Pair(self.row, self.caption, self.winner, self.loser, *images)


@dataclass(frozen=True)
class Pair(EncodedPair):
    """With its images decoded."""

    winner_image: Image.Image
    loser_image: Image.Image


@dataclass(frozen=True)
class Vote:
    """One row, ties included. label_0: 1 where image 0 won, 0 where image 1 did, 0.5 for a tie."""

    row: int
    caption: str
    image_0: Image.Image
    image_1: Image.Image
    label_0: float


@dataclass
class Counts:
    """What became of the rows; filled while they are read."""

    rows: int = 0
    ties: int = 0
    undecodable: int = 0
    kept: int = 0
    undecodable_rows: list[int] = field(default_factory=list)

    def spoilt(self, row: int) -> None:
        """A row with an image that cannot be decoded."""
        self.undecodable += 1
        self.undecodable_rows.append(row)


def read_encoded(file: Path, rows: np.ndarray, first: int = 0) -> Iterator[EncodedPair]:
    """The given decided rows of a file (ascending numbers in it), winner first; `first`: the number of its first row.

    Row groups that hold none of them are not read. In memory are a few pages: those of writers that count a page's rows
    and not its bytes (1,024 of them by default) are as large as a row group, and take twice its bytes. Raises
    InvdpoError where the file breaks off.
    """
    for start, batch in _batches(file, rows):
        for row, values, won in zip(start, batch.to_pylist(), winners(batch.column("label_0"))[1], strict=True):
            images = [_bytes(values["jpg_0"]), _bytes(values["jpg_1"])]
            if not won:
                images.reverse()
            yield EncodedPair(first + int(row), values["caption"] or "", *images)


def _batches(file: Path, rows: np.ndarray) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """Those rows of a file in record batches, with their numbers."""
    try:
        with pq.ParquetFile(file, buffer_size=PAGES, pre_buffer=False) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                if len(_between(rows, start, end)):
                    for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(COLUMNS)):
                        chosen = _between(rows, start, start + len(batch))
                        if len(chosen):
                            yield chosen, batch.take(pa.array(chosen - start))
                        start += len(batch)
                start = end
    except (pa.ArrowException, OSError) as error:
        raise InvdpoError(f"{file} breaks off while it is read ({error}). Copy or download the file again.") from error


def _between(rows: np.ndarray, start: int, end: int) -> np.ndarray:
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]


def read_pairs(files: list[Path], counts: Counts) -> Iterator[Pair]:
    """The decoded pairs in file order, winner first, decoded to RGB; `counts` is filled on the way.

    Ties are left out. A pair with an image that cannot be decoded is left out and counted; the caller judges how many
    are too many.
    """
    for file in files:
        first, is_decided = counts.rows, decided(Shard(str(file), 0, file))
        counts.rows += len(is_decided)
        counts.ties += len(is_decided) - int(is_decided.sum())
        for pair in read_encoded(file, np.flatnonzero(is_decided), first):
            images = decode_both(pair.winner, pair.loser)
            if images is None:
                counts.spoilt(pair.row)
            else:
                counts.kept += 1
                yield pair.with_images(images)


def read_votes(files: list[Path], counts: Counts) -> Iterator[Vote]:
    """Every pair in file order, ties included, decoded to RGB; `counts` is filled on the way.

    A label that is neither 0 nor 1 is a tie. A pair with an image that cannot be decoded is left out and counted.
    """
    for file in files:
        first, rows = counts.rows, pq.read_metadata(file).num_rows
        counts.rows += rows
        for numbers, batch in _batches(file, np.arange(rows)):
            labels = np.where(*winners(batch.column("label_0")), 0.5)
            counts.ties += int((labels == 0.5).sum())
            for row, values, label in zip(numbers, batch.to_pylist(), labels, strict=True):
                images = decode_both(_bytes(values["jpg_0"]), _bytes(values["jpg_1"]))
                if images is None:
                    counts.spoilt(first + int(row))
                else:
                    counts.kept += 1
                    yield Vote(first + int(row), values["caption"] or "", *images, float(label))


def decode_both(first: bytes, second: bytes) -> tuple[Image.Image, Image.Image] | None:
    """Two images as RGB; None where either is no whole image."""
    try:
        return _decode(first), _decode(second)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _bytes(value: bytes | dict[str, Any] | None) -> bytes:
    """The datasets library writes an image column as {bytes, path}, Pick-a-Pic as plain bytes."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content or b""


def _decode(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    return image.convert("RGB")  # loads the pixels, so a truncated file fails here
