"""Read preference pairs in the columns of Pick-a-Pic v2 (`yuvalkirstain/pickapic_v2`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from invdpo.errors import InvdpoError

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")


@dataclass(frozen=True)
class Pair:
    """One decided pair, winner first. `row` counts the rows of all files in order."""

    row: int
    caption: str
    winner: bytes
    loser: bytes
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


def find_files(source: str) -> list[Path]:
    """A parquet file, every parquet file of a folder (sorted), or the train split of a hub dataset.

    Raises InvdpoError where there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise InvdpoError(f"`preferences: {source}` is a folder without a parquet file in it.")
        return files
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.parquet"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvdpoError(
            f"`preferences: {source}` is no file or folder here, nor a reachable hub dataset ({reason}). "
            "Check the path or the id."
        ) from error
    files = sorted(folder.rglob("*.parquet"))
    # A hub dataset names its splits in its file names; validation and test pairs must not be trained on.
    return [file for file in files if "train" in file.name] or files


def check_columns(files: list[Path]) -> int:
    """Check that every file can be read and has the needed columns; returns the rows of all together.

    Raises InvdpoError that names the file and the missing columns.
    """
    rows = 0
    for file in files:
        try:
            described = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise InvdpoError(f"{file} cannot be read as parquet: {error}") from error
        missing = [name for name in COLUMNS if name not in described.schema_arrow.names]
        if missing:
            raise InvdpoError(
                f"{file} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
                f"Preference pairs need Pick-a-Pic v2's columns {', '.join(COLUMNS)}; this file has "
                f"{', '.join(described.schema_arrow.names)}."
            )
        rows += described.metadata.num_rows
    return rows


def read_pairs(files: list[Path], counts: Counts, batch: int = 256) -> Iterator[Pair]:
    """The decided pairs in file order, winner first, decoded to RGB; `counts` is filled on the way.

    Ties (neither label 0 nor 1, as Diffusion-DPO's train.py L859-862 filters them) are left out. A pair with
    an image that cannot be decoded is left out and counted; the caller judges how many are too many.
    """
    for file in files:
        for table in pq.ParquetFile(file).iter_batches(batch_size=batch, columns=list(COLUMNS)):
            for record in table.to_pylist():
                row = counts.rows
                counts.rows += 1
                if record["label_0"] not in (0, 1):
                    counts.ties += 1
                    continue
                images = [_bytes(record["jpg_0"]), _bytes(record["jpg_1"])]
                if record["label_0"] == 0:
                    images.reverse()
                decoded = _both(images, row, counts)
                if decoded is not None:
                    yield Pair(row, record["caption"] or "", images[0], images[1], *decoded)


def read_votes(files: list[Path], counts: Counts, batch: int = 256) -> Iterator[Vote]:
    """Every pair in file order, ties included, decoded to RGB; `counts` is filled on the way.

    A label that is neither 0 nor 1 is a tie. A pair with an image that cannot be decoded is left out and counted.
    """
    for file in files:
        for table in pq.ParquetFile(file).iter_batches(batch_size=batch, columns=list(COLUMNS)):
            for record in table.to_pylist():
                row = counts.rows
                counts.rows += 1
                label = float(record["label_0"]) if record["label_0"] in (0, 1) else 0.5
                counts.ties += label == 0.5
                decoded = _both([_bytes(record["jpg_0"]), _bytes(record["jpg_1"])], row, counts)
                if decoded is not None:
                    yield Vote(row, record["caption"] or "", *decoded, label)


def _both(images: list[bytes], row: int, counts: Counts) -> tuple[Image.Image, Image.Image] | None:
    """A pair's images, counted as kept; None, counted as undecodable, where either is no image."""
    try:
        first, second = (_decode(image) for image in images)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        counts.undecodable += 1
        counts.undecodable_rows.append(row)
        return None
    counts.kept += 1
    return first, second


def _bytes(value: bytes | dict[str, bytes] | None) -> bytes:
    """The datasets library writes an image column as {bytes, path}, Pick-a-Pic as plain bytes."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content or b""


def _decode(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    return image.convert("RGB")  # loads the pixels, so a truncated file fails here
