"""What is raced: a policy and its reference, and the plain diffusers loops that our own code is held against."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invdpo.backbones.pipeline import UNetEps, load_unet
from invdpo.device import autocast, resolve_dtype
from invdpo.objectives import Recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


@dataclass(frozen=True)
class Models:
    """A policy near its reference, the base's diffusers scheduler, a prompt's number of tokens, the autocast type."""

    policy: UNet2DConditionModel
    reference: UNet2DConditionModel
    scheduler: Any
    tokens: int
    device: torch.device
    dtype: torch.dtype

    @property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's arithmetic as our own code has it."""
        return NoiseSchedule.from_scheduler(self.scheduler).to(self.device)

    def eps(self, unet: UNet2DConditionModel) -> UNetEps:
        """One of the two as our own code calls it."""
        return UNetEps(unet, self.dtype)

    def latents(self, n: int, seed: int) -> Tensor:
        """Random latents (n,C,H,W) of the UNet's own size."""
        config = self.policy.config
        shape = (n, config["in_channels"], config["sample_size"], config["sample_size"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def prompts(self, n: int, seed: int) -> Conditioning:
        """Random token embeddings (n,L,D), and one empty prompt for all."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n + 1, self.tokens, self.policy.config["cross_attention_dim"])
        embeds = torch.randn(shape, generator=generator).to(self.device)
        return Conditioning(embeds[1:], uncond=Conditioning(embeds[:1].expand_as(embeds[1:])))


def load(base: str, device: torch.device) -> Models:
    """The UNet of a pipeline folder or hub id of the SD1.5 family."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import AutoConfig

    unet = load_unet(base, device)
    text = AutoConfig.from_pretrained(base, subfolder="text_encoder")
    return twins(unet, DDIMScheduler.from_pretrained(base, subfolder="scheduler"), text.max_position_embeddings)


def sdxl_shaped(device: torch.device) -> Models:
    """SDXL's UNet with random weights; its embedding of image size and pooled text, two matrices, is left out."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    with device:
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
            attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]
            cross_attention_dim=2048,
            use_linear_projection=True,
        ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    return twins(unet, scheduler, tokens=77)


def twins(reference: UNet2DConditionModel, scheduler: Any, tokens: int) -> Models:
    """A policy 1 % of noise away from its reference, so that no gradient is exactly zero."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean(), alpha=0.01)
    device = reference.device
    return Models(policy, reference.requires_grad_(False), scheduler, tokens, device, resolve_dtype(device, "auto"))


def plain_training_step(
    models: Models, optimizer: torch.optim.Optimizer, win: Tensor, lose: Tensor, embeds: Tensor, beta: float
) -> float:
    """One step of Diffusion-DPO as a diffusers script does it (its train.py:1053-1145), all pairs (B,C,H,W) at once."""
    scheduler = models.scheduler
    noise = torch.randn_like(win).repeat(2, 1, 1, 1)
    t = torch.randint(len(scheduler.alphas_cumprod), (len(win),), device=win.device).repeat(2)
    noisy = scheduler.add_noise(torch.cat([win, lose]), noise, t)
    text = embeds.repeat(2, 1, 1)
    with autocast(models.device, models.dtype):
        prediction = models.policy(noisy, t, text).sample
    with torch.no_grad(), autocast(models.device, models.dtype):
        reference = models.reference(noisy, t, text).sample
    error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
    reference_error = (reference.float() - noise).square().mean(dim=(1, 2, 3))
    win_term, lose_term = (error - reference_error).chunk(2)
    loss = -F.logsigmoid(-0.5 * beta * (win_term - lose_term)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def reference_loop(recipe: Recipe, models: Models, win: Tensor, lose: Tensor, cond: Conditioning) -> Tensor:
    """The released script's step for `inversion_dpo_code`: loss (0-d) of one pair (1,C,H,W), gradients accumulated.

    Winner and loser one after the other, one timestep at a time, the graph of all 2N policy calls alive, as
    train_ddim.py:1230-1282; gradient checkpointing is the caller's to switch on. `inversion_dpo_implied` has no
    released script: the same loop with Eq. 6's four terms. Other recipes are not written here.
    """
    ratios = [_image(recipe, models, x0, cond) for x0 in (win, lose)]
    loss = -F.logsigmoid(0.5 * recipe.beta * (ratios[0] - ratios[1]))
    loss.backward()
    return loss.detach()


def _image(recipe: Recipe, models: Models, x0: Tensor, cond: Conditioning) -> Tensor:
    """The mean over timesteps of one image's terms: the reference inverts and its predictions are kept (523-547), then
    the policy is run on the stored latents (549-560)."""
    scheduler, steps = models.scheduler, recipe.trajectory.steps
    assert steps is not None and recipe.name in ("inversion_dpo_code", "inversion_dpo_implied")
    abar, final = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
    offset = recipe.trajectory.steps_offset
    first, stride = scheduler.config.steps_offset if offset is None else offset, len(abar) // steps

    def predict(unet: UNet2DConditionModel, x: Tensor, t: int) -> Tensor:
        with autocast(models.device, models.dtype):
            if cond.uncond is None or recipe.trajectory.guidance_scale == 1:
                return unet(x, t, cond.embeds).sample.to(x.dtype)
            both = unet(torch.cat([x, x]), t, torch.cat([cond.uncond.embeds, cond.embeds])).sample.to(x.dtype)
        uncond, conditional = both.chunk(2)
        return uncond + recipe.trajectory.guidance_scale * (conditional - uncond)

    x, stored = x0, []
    with torch.no_grad():
        for t in range(first, first + steps * stride, stride):
            eps = predict(models.reference, x, t)
            a, a_prev = abar[t], abar[t - stride] if t >= stride else final
            x_next = math.sqrt(a / a_prev) * (x - math.sqrt(1 - a_prev) * eps) + math.sqrt(1 - a) * eps
            stored.append((t, a, x, x_next, eps))
            x = x_next
    terms = []
    for t, a, x, x_next, eps in stored:
        if recipe.target == "reference":
            terms.append((predict(models.policy, x, t) - eps).square().mean() / (2 * a))
        else:
            implied = (x_next - math.sqrt(a) * x0) / math.sqrt(1 - a)
            with torch.no_grad():
                reference_error = (predict(models.reference, x_next, t) - implied).square().mean()
            terms.append(reference_error - (predict(models.policy, x_next, t) - implied).square().mean())
    return torch.stack(terms).mean()
