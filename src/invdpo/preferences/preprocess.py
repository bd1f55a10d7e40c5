"""An image becomes the square that the VAE encodes; what was cut away stays known, for SDXL's micro-conditioning."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from invdpo.config import StudyConfig

Crop = Literal["center", "random"]
Flip = Literal["none", "shared", "independent"]


@dataclass(frozen=True)
class Placement:
    """Where the square is cut. left, top: shares in [0, 1) of the room there is; None: the centre."""

    left: float | None = None
    top: float | None = None
    flip: bool = False


CENTRE = Placement()


@dataclass(frozen=True)
class Square:
    """pixels: (R,R,3) uint8. size: (width, height) of the image as it came. corner: (left, top) of the square in the
    resized, flipped image, in pixels.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    corner: tuple[int, int]

    def tensor(self) -> Tensor:
        """(3,R,R) float32 in [-1, 1]."""
        import torch  # not by processes that only decode

        return torch.from_numpy(self.pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1

    def time_ids(self) -> list[int]:
        """SDXL's six numbers: original height and width, top and left of the crop, height and width of the square."""
        (width, height), (left, top) = self.size, self.corner
        return [height, width, top, left, *self.pixels.shape[:2]]


def cut(image: Image.Image, resolution: int, placement: Placement = CENTRE) -> Square:
    """An RGB image resized (shorter side, bilinear), flipped where asked for, and cropped to a square.

    As Diffusion-DPO's train.py does it with torchvision's Resize and CenterCrop, to the pixel: the longer side is cut
    off to whole pixels, and the middle of an odd room is rounded to even. Its flip comes after the crop; flipped first,
    the corner is the one seen in the flipped image, as in diffusers' own SDXL script.
    """
    size = width, height = image.size
    left = top = 0
    if size != (resolution, resolution):
        longer = int(resolution * max(size) / min(size))
        width, height = (resolution, longer) if width <= height else (longer, resolution)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = _start(placement.left, width - resolution), _start(placement.top, height - resolution)
    if placement.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if image.size != (resolution, resolution):
        image = image.crop((left, top, left + resolution, top + resolution))
    return Square(np.asarray(image), size, (left, top))


def _start(share: float | None, room: int) -> int:
    """First pixel of the square, of 0..room."""
    return round(room / 2) if share is None else int(share * (room + 1))


@dataclass(frozen=True)
class Cutting:
    """How a study cuts its images: `training.resolution` and `data`'s crop, flip and seed."""

    resolution: int
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0

    @classmethod
    def of(cls, study: StudyConfig) -> Cutting:
        """A study's."""
        return cls(study.training.resolution, study.data.crop, study.data.flip, study.data.seed)

    @property
    def draws(self) -> bool:
        """Whether anything of it is left to chance, and so to the seed."""
        return self.crop == "random" or self.flip != "none"

    def pair(self, row: int, winner: Image.Image, loser: Image.Image) -> tuple[Square, Square]:
        """The squares of a row's images."""
        first, second = placements(self.seed, row, self.crop, self.flip)
        return cut(winner, self.resolution, first), cut(loser, self.resolution, second)


def placements(seed: int, row: int, crop: Crop, flip: Flip) -> tuple[Placement, Placement]:
    """Where winner and loser of a row are cut, and whether they are flipped: functions of the seed and the row.

    A pair is encoded once, so these are drawn once a study and not once an epoch. crop `random`: each image for itself.
    flip `shared`: both images or neither; `independent`: each by its own coin, as Diffusion-DPO's train.py and the
    released Inversion-DPO script (train_ddim.py:896) do it. A flipped image can contradict its caption, and flipped
    alone it differs from the other in more than what was voted on; hence `none` by default.
    """
    digest = hashlib.sha256(f"{seed}:{row}:placement".encode()).digest()
    shares = np.random.default_rng(int.from_bytes(digest[:8], "big")).random(6)
    coins = {"none": (False, False), "shared": (shares[4] < 0.5,) * 2, "independent": tuple(shares[4:] < 0.5)}[flip]
    if crop == "center":
        return Placement(flip=bool(coins[0])), Placement(flip=bool(coins[1]))
    win_left, win_top, lose_left, lose_top = map(float, shares[:4])
    return Placement(win_left, win_top, bool(coins[0])), Placement(lose_left, lose_top, bool(coins[1]))
