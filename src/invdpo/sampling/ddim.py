"""Deterministic DDIM sampling (Song et al. 2021, Eq. 12 with eta = 0), seeded for each prompt on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import guided
from invdpo.inversion.guidance import evaluations
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel

# Pixels decoded at once: the activations of an SD decoder for eight 512x512 images are about 8 GiB in fp32.
DECODED_PIXELS = 8 * 512 * 512


def prompt_generator(seed: int, prompt_id: int) -> torch.Generator:
    """The CPU generator of one prompt's initial noise: a function of (seed, prompt_id) alone.

    Neither the batch size, nor the other prompts, nor the device changes what a prompt starts from.
    """
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def unet_evaluations(images: int, steps: int, guidance_scale: float) -> int:
    """UNet evaluations (one forward of one latent each) that `sample` spends on `images` images."""
    return images * steps * evaluations(guidance_scale)


def denoise(
    eps_model: EpsModel,
    noise: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """The latents (B,C,H,W) that DDIM sampling makes of noise x_T (B,C,H,W), differentiable in the eps-model.

    Raises InvdpoError for an impossible number of steps.
    """
    schedule = schedule.to(noise.device)
    try:
        grid = schedule.timesteps(steps).flip(0).tolist()
    except InvdpoError as error:
        raise InvdpoError(f"sampling.steps: {error}") from error
    x, eps_of = noise, guided(eps_model, guidance_scale)
    for t in grid:
        eps = eps_of(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), cond)
        x = schedule.ddim_step(x, eps, t, schedule.previous(t, steps))
    return x


@torch.no_grad()
def sample(
    eps_model: EpsModel,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
) -> Tensor:
    """Latents (B, C, H, W) in float32 on the conditioning's device; one CPU generator a latent, `shape` = (C,
    H, W).

    The same steps as diffusers' `StableDiffusionPipeline` with `DDIMScheduler` at eta 0, from the same noise:
    x_T ~ N(0, 1), then one `ddim_step` a timestep down the schedule, guided as eps_uncond + s (eps_cond -
    eps_uncond).

    Raises InvdpoError for an impossible number of steps, guidance without `cond.uncond`, or non-finite
    latents.
    """
    if guidance_scale != 1 and (cond is None or cond.uncond is None):
        raise InvdpoError(
            f"sampling.guidance_scale is {guidance_scale:g}, but the conditioning has no unconditional half: "
            "give Conditioning.uncond (the empty prompt), or set sampling.guidance_scale to 1"
        )
    device = cond.embeds.device if cond is not None else torch.device("cpu")
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    x = denoise(eps_model, noise, cond, schedule, steps, guidance_scale)
    if not torch.isfinite(x).all():
        raise InvdpoError(
            f"sampling (sampling.steps {steps}, sampling.guidance_scale {guidance_scale:g}) gave non-finite "
            "latents: the UNet's weights are not usable; look at the loss and gradient norm in that run's "
            "train.jsonl"
        )
    return x


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> np.ndarray:
    """Latents (B, C, h, w), scaled as the UNet sees them -> images, uint8 (B, H, W, 3).

    vae: diffusers' AutoencoderKL. Decodes a few images at a time, so that memory does not grow with B.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    chunk = max(1, DECODED_PIXELS // (latents.shape[-1] * latents.shape[-2] * factor**2))
    images = []
    for part in latents.split(chunk):
        pixels = vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        images.append((pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu())
    return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()
