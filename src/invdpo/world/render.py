"""Scenes to 64x64 RGB pictures, with the faults that the base model is to learn along with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from invdpo.world.scenes import COLOURS, RADII, SIZES, Scene, Thing

SIDE = 64
PAPER = (246, 245, 240)
# Chance of each fault in a picture of the corpus; about half of the pictures are flawless.
FAULT_CHANCES = {"swapped": 0.14, "missing": 0.06, "tinted": 0.14, "cluttered": 0.12, "blurred": 0.14}

_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Placed:
    """A thing with its centre and half-side in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


def _distance(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Signed distance in pixels from every pixel to the outline of a shape; negative inside. (64, 64)."""
    dx, dy = _COLUMNS - x, _ROWS - y
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius
    if shape == "triangle":  # apex up, base at the bottom, as wide as high
        slope = (2 * np.abs(dx) - (dy + radius)) / np.sqrt(5.0)
        return np.maximum(slope, dy - radius)
    arm = 0.36 * radius
    upright = np.maximum(np.abs(dx) - arm, np.abs(dy) - radius)
    lying = np.maximum(np.abs(dx) - radius, np.abs(dy) - arm)
    return np.minimum(upright, lying)


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Positions that satisfy the scene's relation on its dominant axis, without overlap, by rejection."""
    while True:
        placed: list[Placed] = []
        for thing in scene.things:
            size = thing.size or str(rng.choice(SIZES))
            radius = float(rng.uniform(*RADII[size]))
            low, high = radius + 2, SIDE - radius - 2
            placed.append(Placed(thing, float(rng.uniform(low, high)), float(rng.uniform(low, high)), radius))
        if _apart(placed) and (scene.relation is None or holds(scene.relation, placed[0], placed[1])):
            return placed


def _apart(placed: list[Placed]) -> bool:
    return all(
        max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + 2
        for index, a in enumerate(placed)
        for b in placed[:index]
    )


def holds(relation: str, a: Placed, b: Placed) -> bool:
    """Whether `a` stands in `relation` to `b`, clearly: on the dominant axis by a factor of 1.3."""
    return relation_between(a.x, a.y, b.x, b.y, dominance=1.3) == relation


def relation_between(ax: float, ay: float, bx: float, by: float, dominance: float = 1.0) -> str | None:
    """The relation of a to b on the dominant axis; None where neither axis dominates by the given factor."""
    dx, dy = bx - ax, by - ay
    if abs(dx) >= dominance * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= dominance * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def draw(placed: list[Placed], background: np.ndarray) -> np.ndarray:
    """Antialiased objects over a float background (64, 64, 3) in 0..255."""
    picture = background.copy()
    for item in placed:
        cover = np.clip(0.5 - _distance(item.thing.shape, item.x, item.y, item.radius), 0, 1)[..., None]
        picture += cover * (np.asarray(COLOURS[item.thing.colour], np.float32) - picture)
    return picture


def render(scene: Scene, rng: np.random.Generator, faults: frozenset[str] = frozenset()) -> np.ndarray:
    """A picture of a scene, uint8 (64, 64, 3), with the named faults (keys of FAULT_CHANCES)."""
    if "swapped" in faults and len(scene.things) > 1:
        first, second, *rest = scene.things
        scene = replace(
            scene,
            things=(replace(first, colour=second.colour), replace(second, colour=first.colour), *rest),
        )
    placed = place(scene, rng)
    if "missing" in faults and len(placed) > 1:
        placed.pop(int(rng.integers(len(placed))))
    background = np.full((SIDE, SIDE, 3), PAPER, np.float32)
    if "tinted" in faults:
        background[:] = rng.uniform(150, 225, size=3)
    if "cluttered" in faults:
        for _ in range(int(rng.integers(6, 14))):
            x, y = rng.uniform(0, SIDE, size=2)
            cover = np.clip(0.5 - _distance("circle", x, y, rng.uniform(1.2, 2.6)), 0, 1)[..., None]
            background += cover * (rng.uniform(60, 190, size=3).astype(np.float32) - background)
    picture = draw(placed, background)
    if "blurred" in faults:
        picture = gaussian_filter(picture, sigma=(*[float(rng.uniform(1.4, 2.4))] * 2, 0))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def sample_faults(rng: np.random.Generator) -> frozenset[str]:
    """Independent faults with the corpus's chances."""
    return frozenset(name for name, chance in FAULT_CHANCES.items() if rng.random() < chance)
