"""Pictures that the study did not just draw itself: a folder of files, or a parquet file of encoded images."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from invdpo.errors import InvdpoError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# The study's own images, the hub's usual names, Pick-a-Pic's style of column.
COLUMNS = ("png", "jpg", "image")
# What was done to an image beside decoding.
TRANSPARENT, TURNED, DEEP = (
    "transparent: the colour below the transparency is scored, as the authors' scripts do",
    "turned as their EXIF orientation says",
    "of 16 bits a pixel: scaled to 8",
)


def open_picture(source: Path | bytes) -> tuple[Image.Image, list[str]]:
    """An RGB image, and what was done to it beside decoding. Raises whatever Pillow does where it is no picture, is not
    whole, or has more pixels than Pillow thinks safe.
    """
    notes = []
    with open_image(source) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            notes.append(TRANSPARENT)
        if image.getexif().get(0x0112, 1) != 1:
            notes.append(TURNED)
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            notes.append(DEEP)
            # Pillow's conversion would cut at 255, and leave a white picture.
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return image.convert("RGB"), notes


def open_image(source: Path | bytes) -> Image.Image:
    """An image by its header. Raises whatever Pillow does, and ValueError for more pixels than it thinks safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error


def why(error: Exception) -> str:
    """An error of `open_picture` without the file's name or the stream's address, which Pillow puts into it."""
    return re.sub(r" '[^']*'$| <_io[^>]*>", "", str(error)) or type(error).__name__


@dataclass(frozen=True)
class Picture:
    """An encoded image. source: its file, or its bytes. name: the file's name, or the row's id, for rows and errors."""

    name: str
    source: Path | bytes

    def encoded(self) -> bytes:
        """The file's bytes; InvdpoError where it cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise InvdpoError(f"{self.source} cannot be read: {error.strerror}. Restore the image.") from error

    def sha256(self) -> str:
        """Hex digest of the encoded image."""
        return hashlib.sha256(self.encoded()).hexdigest()

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, from the header alone."""
        try:
            with open_image(self.source) as image:
                return image.size
        except Exception as error:  # Pillow raises many kinds; all mean the same to the reader
            raise self._broken(error) from error

    def decode(self) -> Image.Image:
        """The image as RGB (`open_picture`); InvdpoError naming the picture where its bytes are no complete image."""
        try:
            return open_picture(self.source)[0]
        except Exception as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> InvdpoError:
        place = self.source if isinstance(self.source, Path) else self.name
        return InvdpoError(f"{place} is not a readable image ({why(error)}). Restore it, or leave it out.")


def read_pictures(path: Path | str, limit: int | None = None) -> list[Picture]:
    """The pictures of a folder in the order of their names, or of a parquet file in the order of its rows; at most
    `limit` from the first.

    A parquet file has its images as bytes in a column `png`, `jpg` or `image` (also the hub's {bytes, path}); a row's
    name is its `prompt_id`, else its number. Raises InvdpoError: no such place, no image there, fewer than `limit`.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        found = [Picture(file.name, file) for file in files]
    elif path.suffix == ".parquet" and path.is_file():
        found = _rows(path)
    else:
        raise InvdpoError(f"{path} is neither a folder of images ({', '.join(ENDINGS)}) nor a parquet file of them.")
    if not found or len(found) < (limit or 0):
        wanted = f"{limit:,} were asked for" if limit else "at least one is needed"
        raise InvdpoError(f"{path} holds {len(found):,} images; {wanted}.")
    return found[:limit]


def _rows(path: Path) -> list[Picture]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InvdpoError(f"{path} is not a readable parquet file ({error}). Make it again.") from error
    column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None:
        raise InvdpoError(f"{path} has none of the columns {', '.join(COLUMNS)}; it has {table.column_names}.")
    values = table.column(column).to_pylist()
    names = table.column("prompt_id").to_pylist() if "prompt_id" in table.column_names else range(len(values))
    found = []
    for name, value in zip(names, values, strict=True):
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InvdpoError(f"{path}, row {name}: column `{column}` holds no encoded image. Leave the row out.")
        found.append(Picture(str(name), content))
    return found
