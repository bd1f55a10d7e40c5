"""Pictures back to scenes: what is really there, whatever the caption says.

Pixels are assigned to the nearest palette colour, grouped into connected components, and each component's mask is
matched with the four shapes. Built for the base model's samples, so it tolerates soft edges and small blemishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from invdpo.world.render import PAPER, SIDE, _distance
from invdpo.world.scenes import COLOURS, LARGE_FROM, SHAPES

# A pixel belongs to a palette colour if it is at most this far from it in RGB; the two nearest palette colours are
# 110 apart and paper is more than 150 from all.
COLOUR_REACH = 75.0
# The smallest object (a small cross) covers about 90 pixels; clutter dots cover at most 21.
SMALLEST_AREA = 36
SHAPE_GRID = 15


@dataclass(frozen=True)
class Seen:
    """An object found in a picture; `match` is the IoU of its mask with the shape's."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    match: float


@dataclass(frozen=True)
class Reading:
    """Everything the parser measures in a picture, each quality in 0..1."""

    seen: tuple[Seen, ...]
    clean: float
    sharp: float
    pure: float


@cache
def _templates() -> tuple[np.ndarray, ...]:
    """Each shape's mask on the unit grid (15, 15)."""
    return tuple(_resample(_distance(shape, SIDE / 2, SIDE / 2, 20.0) < 0) for shape in SHAPES)


def _resample(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box, resampled to the unit grid by nearest neighbour."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    grid = (np.arange(SHAPE_GRID) + 0.5) / SHAPE_GRID
    pick_rows = (rows[0] + grid * (rows[-1] - rows[0] + 1)).astype(int)
    pick_columns = (columns[0] + grid * (columns[-1] - columns[0] + 1)).astype(int)
    return mask[np.ix_(pick_rows, pick_columns)]


def _shape_of(mask: np.ndarray) -> tuple[str, float]:
    resampled = _resample(mask)
    matches = [(resampled & template).sum() / (resampled | template).sum() for template in _templates()]
    best = int(np.argmax(matches))
    return SHAPES[best], float(matches[best])


def read_picture(picture: np.ndarray) -> Reading:
    """Objects and qualities of a uint8 picture (64, 64, 3).

    clean: 1 where all of the background looks like paper, 0 where a tenth of it does not. sharp: the share of paper
    in the rim around objects. pure: how close object pixels are to their palette colour.
    """
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the shapes world reads pictures of {SIDE}x{SIDE}x3, got {picture.shape}")
    pixels = picture.astype(np.float32)
    palette = np.asarray(list(COLOURS.values()), np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    nearest, reach = distances.argmin(-1), distances.min(-1)
    off_paper = np.linalg.norm(pixels - np.asarray(PAPER, np.float32), axis=-1)
    inside = (reach < COLOUR_REACH) & (off_paper > reach)

    seen: list[Seen] = []
    objects = np.zeros((SIDE, SIDE), bool)
    for colour_index, colour in enumerate(COLOURS):
        components = np.asarray(ndimage.label(inside & (nearest == colour_index))[0])  # pyright: ignore[reportIndexIssue]
        for index, window in enumerate(ndimage.find_objects(components), start=1):
            mask = components[window] == index
            if mask.sum() < SMALLEST_AREA:
                continue
            objects[window] |= mask
            shape, match = _shape_of(mask)
            height, width = mask.shape
            size = "large" if (height + width) / 4 >= LARGE_FROM else "small"
            y, x = window[0].start + height / 2, window[1].start + width / 2
            seen.append(Seen(colour, shape, size, x, y, match))

    rim = ndimage.binary_dilation(objects, iterations=2) & ~objects
    around = ~(objects | rim)
    # Clutter covers a few per cent of the background, so each per cent costs a tenth.
    clean = max(0.0, 1.0 - 10.0 * float((off_paper[around] > 30).mean())) if around.any() else 0.0
    if not seen:
        return Reading((), clean, 0.0, 0.0)
    soft = rim & (off_paper > 30)
    sharp = 1.0 - min(1.0, soft.sum() / max(1, rim.sum()))
    pure = 1.0 - float(reach[objects].mean()) / COLOUR_REACH
    return Reading(tuple(seen), clean, sharp, pure)
