"""A batch of pictures on its way through the scorers: what several of them need of it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a tower's input. Two of them are equal where they make equal pixels of every picture.

    name: as in a scorer's version, for instance `shortest-bicubic-224`. numbers: all that the name leaves open (mean
    and standard deviation). transform: PIL image -> (3,H,W) float32. shortest: the side in pixels to which its first
    step resizes the shorter side by PIL's bicubic filter, so that several can share this step; None: another first
    step.
    """

    name: str
    numbers: tuple[float, ...]
    transform: Callable[[Image.Image], Tensor] = field(compare=False, repr=False)
    shortest: int | None = None


def prepare(image: Image.Image, preprocessings: Iterable[Preprocessing]) -> dict[Preprocessing, Tensor]:
    """One picture's input to every tower, (3,H,W) float32 each; pictures are resized once for all that share it."""
    resized: dict[int | None, Image.Image] = {None: image}
    made = {}
    for each in preprocessings:
        if each.shortest is not None and each.shortest not in resized:
            resized[each.shortest] = _resize_shortest(image, each.shortest)
        made[each] = each.transform(resized[each.shortest])
    return made


def _resize_shortest(image: Image.Image, side: int) -> Image.Image:
    """What torchvision's Resize(side) and transformers' `shortest_edge` do with a PIL image."""
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class Pictures(list[Image.Image]):
    """A list of PIL images that remembers what was made of them; the scorers take any list, and share by this one.

    prepared: pixels (B,3,H,W) by preprocessing, where they are there already. The images must not be changed.
    """

    def __init__(self, images: Iterable[Image.Image], prepared: Mapping[Preprocessing, Tensor] | None = None):
        super().__init__(images)
        self._made: dict[Hashable, Tensor] = {key: pixels for key, pixels in (prepared or {}).items()}

    @classmethod
    def of(cls, images: list[Image.Image]) -> Pictures:
        """The list itself where it is one of these already."""
        return images if isinstance(images, cls) else cls(images)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it gave under this key before."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def pixels(self, preprocessing: Preprocessing) -> Tensor:
        """The input of a tower, (B,3,H,W) float32 on the CPU."""
        return self.once(
            preprocessing,
            lambda: torch.stack([prepare(image, [preprocessing])[preprocessing] for image in self]),
        )
