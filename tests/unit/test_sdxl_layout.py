"""The shapes world's base in SDXL's layout: the same function, by parts that all count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invdpo.backbones.pipeline import UNetEps, load_schedule, load_unet, load_vae
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.sampling import decode, prompt_generator, sample
from invdpo.types import Conditioning
from invdpo.world.sdxl_layout import convert

BASE = Path("assets/shapes/base")
CPU = torch.device("cpu")
PROMPTS = ["a red circle left of a blue square", "a small green triangle", "two things"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout") / "pipeline"
    convert(BASE, folder)
    return folder


def conditioning(base: Path) -> Conditioning:
    text = load_text(base, CPU)
    return for_sampling(encode_prompts(text, PROMPTS), empty_prompt(text), 64)


def test_the_pictures_are_those_of_the_original(converted: Path) -> None:
    pictures = []
    for base in (BASE, converted):
        eps_model, generators = UNetEps(load_unet(base, CPU)), [prompt_generator(0, i) for i in range(3)]
        latents = sample(eps_model, conditioning(base), load_schedule(base), 10, 3.0, generators, (4, 8, 8))
        pictures.append((latents, decode(load_vae(base, CPU), latents).astype(int)))
    torch.testing.assert_close(pictures[1][0], pictures[0][0], rtol=1e-3, atol=1e-3)
    assert np.abs(pictures[1][1] - pictures[0][1]).max() <= 1
    assert pictures[0][1].std() > 20  # and there is something in them


def test_the_embeddings_hold_the_original_s_twice(converted: Path) -> None:
    original, cond = conditioning(BASE), conditioning(converted)
    halves = cond.embeds.chunk(4, dim=-1)
    for half in (halves[1], halves[3]):
        torch.testing.assert_close(half, original.embeds, rtol=1e-5, atol=5e-6)
    assert cond.pooled is not None and (cond.pooled[0] - cond.pooled[1]).abs().max() > 0.1


def test_a_diffusers_pipeline_loads_it(converted: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(converted)
    pipeline.set_progress_bar_config(disable=True)
    cond = conditioning(converted)
    found = pipeline.encode_prompt(PROMPTS, device="cpu")
    assert cond.pooled is not None and cond.uncond is not None and cond.uncond.pooled is not None
    for ours, theirs in zip((cond.embeds, cond.uncond.embeds, cond.pooled, cond.uncond.pooled), found, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours))


def test_every_added_part_can_be_trained(converted: Path) -> None:
    unet, cond = load_unet(converted, CPU), conditioning(converted).without_uncond()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    x, t = torch.randn(3, 4, 8, 8, generator=prompt_generator(1, 0)), torch.full((3,), 400)
    for _ in range(2):  # the zeros of the last added layer hide the others for one step
        optimizer.zero_grad()
        UNetEps(unet)(x, t, cond).square().mean().backward()
        optimizer.step()
    for name, value in unet.named_parameters():
        if name.startswith("add_embedding"):
            assert value.grad is not None and value.grad.any(), name
    assert cond.pooled is not None and cond.time_ids is not None
    with torch.no_grad():
        plain = UNetEps(unet)(x, t, cond)
        second = torch.cat([cond.embeds[..., :128], torch.zeros_like(cond.embeds[..., 128:])], dim=-1)
        for other in (
            replace(cond, pooled=cond.pooled.flip(0)),
            replace(cond, time_ids=2 * cond.time_ids),
            replace(cond, embeds=second),
        ):
            assert (UNetEps(unet)(x, t, other) - plain).abs().max() > 1e-6
