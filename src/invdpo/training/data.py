"""What a step sees of its pairs, and which noise: functions of (seed, step, position) alone.

So a run that is stopped and resumed, or split into other micro-batches, sees exactly the same data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from invdpo.preferences.cache import PreferenceCache
from invdpo.preferences.order import generator
from invdpo.types import Conditioning, where

# The sizes that the released Inversion-DPO script (train_ddim.py:471) tells SDXL of every image. Diffusion-DPO's tells
# its resolution in place of the number.
FIXED_SIZES = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)


@dataclass(frozen=True)
class Batch:
    """B pairs. x0_win, x0_lose: (B,C,h,w). cond, cond_lose: of winners and losers, which differ in the sizes that SDXL
    is told and in nothing else. generators: one a pair, for timestep and noise."""

    x0_win: Tensor
    x0_lose: Tensor
    cond: Conditioning
    cond_lose: Conditioning
    generators: list[torch.Generator]


def draw(
    cache: PreferenceCache,
    flipped: Tensor,
    pairs: list[int],
    seed: int,
    step: int,
    first: int,
    caption_dropout: float,
    micro_conditioning: Literal["image", "fixed"] = "image",
) -> Batch:
    """The given pairs of a step, the first of them at position `first` of the step's batch.

    Latents are drawn from the VAE's posterior, winner and loser independently, as the official script's
    `.sample()`. micro_conditioning: the sizes that SDXL is told, each image's own or `FIXED_SIZES`.
    """
    device, index = cache.device, cache.rows(pairs)
    swapped = flipped[torch.tensor(pairs)].to(device)
    swap = swapped[:, None, None, None]
    mean = torch.stack([cache.win_mean[index], cache.lose_mean[index]])
    std = torch.stack([cache.win_std[index], cache.lose_std[index]])
    shape = (2, *cache.win_mean.shape[1:])
    positions = range(first, first + len(pairs))
    noise = torch.stack([torch.randn(shape, generator=generator(seed, step, p, "latent")) for p in positions], dim=1)
    x0 = mean + std * noise.to(device)  # (2,B,C,h,w)
    prompt = cache.prompts(index)
    empty = cache.empty.map(lambda value: value.expand(len(pairs), *value.shape[1:]))
    if caption_dropout > 0:
        drawn = [torch.rand((), generator=generator(seed, step, p, "dropout")) for p in positions]
        dropped = (torch.stack(drawn) < caption_dropout).to(device)
        unsaid = cache.dropped.map(lambda value: value.expand(len(pairs), *value.shape[1:]))
        prompt = where(dropped, unsaid, prompt)
    cond = cond_lose = replace(prompt, uncond=empty)
    if cache.win_time_ids is not None and cache.lose_time_ids is not None:
        sizes = torch.stack([cache.win_time_ids[index], cache.lose_time_ids[index]])
        if micro_conditioning == "fixed":
            sizes = torch.tensor(FIXED_SIZES, device=device).expand_as(sizes)
        sizes = torch.where(swapped[:, None], sizes.flip(0), sizes)
        cond, cond_lose = cond.with_time_ids(sizes[0]), cond.with_time_ids(sizes[1])
    return Batch(
        x0_win=torch.where(swap, x0[1], x0[0]),
        x0_lose=torch.where(swap, x0[0], x0[1]),
        cond=cond,
        cond_lose=cond_lose,
        generators=[generator(seed, step, p, "noise") for p in positions],
    )
