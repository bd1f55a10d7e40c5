"""Scene graphs of the shapes world and the captions that describe them.

A scene holds one to three objects, each a colour and a shape and, where the caption says so, a size; the first two
objects of a scene stand in one spatial relation. The grammar is unambiguous, so a caption can be read back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (40, 90, 215),
    "yellow": (240, 196, 25),
    "purple": (150, 60, 180),
    "cyan": (30, 185, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
# Half the side of an object's bounding box, in pixels of a 64-pixel image.
RADII = {"small": (6.5, 8.0), "large": (11.0, 13.0)}
# Objects of these half-sides or more count as large: half-way between the two ranges.
LARGE_FROM = 9.5


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `size` is None where the caption leaves it open."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def label(self) -> str:
        """What a caption calls it, without the article."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """Things in caption order; `relation` holds between the first and the second and is None for a single thing."""

    things: tuple[Thing, ...]
    relation: str | None = None


_THING = r"a (?:(small|large) )?({}) ({})".format("|".join(COLOURS), "|".join(SHAPES))
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING}(?: and {_THING})?)?")


def caption(scene: Scene) -> str:
    """ "a large red circle left of a blue square and a small green triangle"."""
    first, *rest = (f"a {thing.label}" for thing in scene.things)
    if not rest:
        return first
    return " and ".join([f"{first} {scene.relation} {rest[0]}", *rest[1:]])


def read_caption(text: str) -> Scene | None:
    """The scene that a caption describes, or None where the text is not a caption of this world."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        return None
    groups = match.groups()
    words = [groups[0:3], groups[4:7], groups[7:10]]
    things = tuple(Thing(colour, shape, size) for size, colour, shape in words if colour)
    return Scene(things, groups[3])


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: 25 % of one thing, 50 % of two, 25 % of three; no two things share both colour and shape."""
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    kinds = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False)
    colours = list(COLOURS)
    things = tuple(
        Thing(
            colours[kind // len(SHAPES)],
            SHAPES[kind % len(SHAPES)],
            str(rng.choice(SIZES)) if rng.random() < 0.3 else None,
        )
        for kind in kinds
    )
    return Scene(things, str(rng.choice(RELATIONS)) if count > 1 else None)


def sample_captions(
    count: int, seed: int, exclude: frozenset[str] = frozenset(), things: int | None = None
) -> list[str]:
    """`count` distinct captions, none of them in `exclude`; of scenes with so many things, where `things` says so."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        scene = sample_scene(rng)
        text = caption(scene)
        if text not in exclude and things in (None, len(scene.things)):
            found[text] = None
    return list(found)
