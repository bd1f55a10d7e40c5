"""Images become squares: as they always did by default, cropped and flipped at random where that is asked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import random_jpeg
from PIL import Image

from invdpo.preferences.preprocess import CENTRE, Placement, cut, placements


def picture(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def test_the_default_is_what_diffusion_dpo_s_script_does() -> None:
    """Its two transforms from torchvision, on sizes whose longer side is no whole number, with rooms of all kinds."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    theirs = Compose([Resize(20, interpolation=InterpolationMode.BILINEAR), CenterCrop(20)])
    sizes = [(90, 41), (41, 90), (33, 21), (23, 20), (20, 25), (61, 47), (20, 20), (40, 40), (7, 9), (9, 13)]
    for size in sizes:
        image = Image.open(io.BytesIO(random_jpeg(np.random.default_rng(0)))).resize(size)
        assert np.array_equal(cut(image, 20).pixels, np.asarray(theirs(image))), size


def test_the_default_is_resized_and_cropped_in_the_middle() -> None:
    image = Image.open(io.BytesIO(random_jpeg(np.random.default_rng(0)))).resize((90, 41))
    square = cut(image, 20)
    resized = image.resize((43, 20), Image.Resampling.BILINEAR)  # 43.9
    assert np.array_equal(square.pixels, np.asarray(resized)[:, 12:32])  # the middle of 11.5
    assert square.size == (90, 41) and square.corner == (12, 0)
    assert square.time_ids() == [41, 90, 0, 12, 20, 20]
    assert square.tensor().shape == (3, 20, 20) and square.tensor().dtype == torch.float32
    white = cut(Image.new("RGB", (20, 20), "white"), 20).tensor()
    assert torch.equal(white, torch.ones(3, 20, 20)) and cut(Image.new("RGB", (20, 20)), 20).tensor().max() == -1


def test_a_crop_can_start_anywhere_that_leaves_a_whole_square() -> None:
    wide, tall = picture(60, 20), picture(20, 60)
    for share, first in ((0.0, 0), (0.5, 20), (0.999, 40)):
        assert cut(wide, 20, Placement(share, 0.7)).corner == (first, 0)
        assert cut(wide, 20, Placement(share, 0.7)).pixels[0, 0, 0] == first
        assert cut(tall, 20, Placement(0.7, share)).corner == (0, first)
        assert cut(tall, 20, Placement(0.7, share)).pixels[0, 0, 1] == first


def test_a_flipped_image_is_cropped_where_its_corner_says() -> None:
    square = cut(picture(60, 20), 20, Placement(0.0, 0.0, flip=True))
    assert square.corner == (0, 0) and square.pixels[0, :3, 0].tolist() == [59, 58, 57]
    same_size = cut(picture(20, 20), 20, Placement(flip=True))
    assert same_size.pixels[0, :, 0].tolist() == list(range(19, -1, -1)) and same_size.corner == (0, 0)


def test_by_default_nothing_is_drawn() -> None:
    assert {placement for row in range(50) for placement in placements(0, row, "center", "none")} == {CENTRE}


def test_placements_are_functions_of_seed_and_row() -> None:
    drawn = [placements(3, row, "random", "independent") for row in range(300)]
    assert drawn == [placements(3, row, "random", "independent") for row in range(300)]
    assert drawn != [placements(4, row, "random", "independent") for row in range(300)]
    shares = np.array([[p.left, p.top] for pair in drawn for p in pair]).reshape(300, 4)
    assert shares.min() >= 0 and shares.max() < 1
    assert np.abs(shares.mean(axis=0) - 0.5).max() < 0.07  # four standard errors
    assert np.abs(np.corrcoef(shares.T) - np.eye(4)).max() < 0.24  # winner and loser, left and top: each its own


@pytest.mark.parametrize(("flip", "alike"), [("shared", 1.0), ("independent", 0.5)])
def test_flips_are_fair_and_shared_only_where_asked_for(flip: str, alike: float) -> None:
    coins = np.array([[p.flip for p in placements(0, row, "center", flip)] for row in range(1000)])  # pyright: ignore
    assert np.abs(coins.mean(axis=0) - 0.5).max() < 0.07
    assert abs((coins[:, 0] == coins[:, 1]).mean() - alike) < 0.07
    assert all(p.left is None and p.top is None for p in placements(0, 1, "center", flip))  # pyright: ignore
    again = np.array([[p.flip for p in placements(0, row, "random", flip)] for row in range(1000)])  # pyright: ignore
    assert np.array_equal(coins, again)  # whatever the crop
