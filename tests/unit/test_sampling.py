"""DDIM sampling against diffusers' own pipeline, its seeding, and its accounts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdpo.backbones import pipeline
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.errors import InvdpoError
from invdpo.sampling import decode, prompt_generator, sample, unet_evaluations
from invdpo.types import Conditioning

CPU = torch.device("cpu")
SHAPE = (4, 4, 4)
PROMPTS = ["a red circle", "a blue square left of a red circle", "a green triangle"]


@pytest.fixture(scope="module")
def cond(tiny_base: Path) -> Conditioning:
    text = load_text(tiny_base, CPU)
    return for_sampling(encode_prompts(text, PROMPTS), empty_prompt(text), 32)


@pytest.fixture(scope="module")
def eps_model(tiny_base: Path) -> pipeline.UNetEps:
    return pipeline.UNetEps(pipeline.load_unet(tiny_base, CPU))


def generators(count: int = len(PROMPTS)) -> list[torch.Generator]:
    return [prompt_generator(7, prompt_id) for prompt_id in range(count)]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("steps", [7, 20])
def test_equals_diffusers_pipeline(
    tiny_base: Path, eps_model: Any, cond: Conditioning, steps: int, guidance_scale: float
) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    stock: Any = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators()])
    options: dict[str, Any] = {
        "prompt": PROMPTS,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "eta": 0.0,
        "latents": noise,
    }
    expected = stock(**options, output_type="latent").images
    pictures = stock(**options, output_type="np").images
    schedule = pipeline.load_schedule(tiny_base)
    found = sample(eps_model, cond, schedule, steps, guidance_scale, generators(), SHAPE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - noise).abs().max() > 0.1
    decoded = decode(pipeline.load_vae(tiny_base, CPU), found)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, 32, 32, 3)
    assert np.abs(decoded.astype(int) - np.round(pictures * 255).astype(int)).max() <= 1


def test_batch_size_changes_rounding_only(tiny_base: Path, eps_model: Any, cond: Conditioning) -> None:
    schedule = pipeline.load_schedule(tiny_base)
    together = sample(eps_model, cond, schedule, 10, 5.0, generators(), SHAPE)
    for row in range(len(PROMPTS)):
        alone = sample(
            eps_model,
            cond.map(lambda v, r=row: v[r : r + 1]),
            schedule,
            10,
            5.0,
            generators()[row : row + 1],
            SHAPE,
        )
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    vae = pipeline.load_vae(tiny_base, CPU)
    one_by_one = np.concatenate([decode(vae, latent[None]) for latent in together])
    assert np.abs(one_by_one.astype(int) - decode(vae, together).astype(int)).max() <= 1


def test_decoding_in_chunks_changes_nothing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = pipeline.load_vae(tiny_base, CPU)
    latents = torch.randn(5, *SHAPE, generator=prompt_generator(0, 0))
    whole = decode(vae, latents)
    monkeypatch.setattr("invdpo.sampling.ddim.DECODED_PIXELS", 2 * 32 * 32)
    np.testing.assert_allclose(decode(vae, latents).astype(int), whole.astype(int), atol=1)


def test_noise_is_a_function_of_seed_and_prompt() -> None:
    def draw(seed: int, prompt_id: int) -> Tensor:
        return torch.randn(100, generator=prompt_generator(seed, prompt_id))

    assert torch.equal(draw(1, 2), draw(1, 2))
    keys = [(1, 2), (2, 1), (1, 3), (12, 2), (1, 22), (11, 2)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_evaluations_are_those_spent(tiny_base: Path, cond: Conditioning, guidance_scale: float) -> None:
    spent = 0

    def counting(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        nonlocal spent
        spent += len(x)
        assert t.shape == (len(x),) and t.dtype == torch.int64
        return torch.zeros_like(x)

    sample(counting, cond, pipeline.load_schedule(tiny_base), 6, guidance_scale, generators(), SHAPE)
    assert spent == unet_evaluations(len(PROMPTS), 6, guidance_scale)


def test_errors_name_the_sampling_field(tiny_base: Path, eps_model: Any, cond: Conditioning) -> None:
    schedule = pipeline.load_schedule(tiny_base)
    with pytest.raises(InvdpoError, match="sampling.guidance_scale"):
        sample(eps_model, cond.without_uncond(), schedule, 5, 3.0, generators(), SHAPE)
    with pytest.raises(InvdpoError, match="sampling.steps"):
        sample(eps_model, cond, schedule, 5000, 3.0, generators(), SHAPE)
    with pytest.raises(InvdpoError, match="non-finite latents"):
        sample(lambda x, t, c: x * float("nan"), cond, schedule, 5, 1.0, generators(), SHAPE)
