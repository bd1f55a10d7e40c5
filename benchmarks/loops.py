"""The plain diffusers loops that our own code is held against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Models
from torch import Tensor
from torch.nn import Module

from invdpo.device import autocast
from invdpo.objectives import Recipe
from invdpo.sampling import prompt_generator
from invdpo.types import Conditioning, concatenate


def plain_unet(unet: Any, x: Tensor, t: Tensor | int, cond: Conditioning) -> Tensor:
    """diffusers' own call, with what SDXL's UNet also takes."""
    added = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return unet(x.to(unet.dtype), t, cond.embeds.to(unet.dtype), added_cond_kwargs=added).sample


def stacked(first: Conditioning, second: Conditioning) -> Conditioning:
    """Rows of both, for one call."""
    found = concatenate(first, second)
    assert found is not None
    return found


def plain_training_step(
    models: Models, optimizer: torch.optim.Optimizer, win: Tensor, lose: Tensor, cond: Conditioning, beta: float
) -> float:
    """One step of Diffusion-DPO as a diffusers script does it (its train.py:1053-1145), all pairs (B,C,H,W) at once."""
    scheduler = models.scheduler
    noise = torch.randn_like(win).repeat(2, 1, 1, 1)
    t = torch.randint(len(scheduler.alphas_cumprod), (len(win),), device=win.device).repeat(2)
    noisy = scheduler.add_noise(torch.cat([win, lose]), noise, t)
    both = stacked(cond.without_uncond(), cond.without_uncond())
    with autocast(models.device, models.dtype):
        prediction = plain_unet(models.policy, noisy, t, both)
    with torch.no_grad(), autocast(models.device, models.dtype):
        reference = plain_unet(models.reference, noisy, t, both)
    error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
    reference_error = (reference.float() - noise).square().mean(dim=(1, 2, 3))
    win_term, lose_term = (error - reference_error).chunk(2)
    loss = -F.logsigmoid(-0.5 * beta * (win_term - lose_term)).mean()
    loss.backward()
    clip_and_step(models, optimizer)
    return float(loss.detach())


def clip_and_step(models: Models, optimizer: torch.optim.Optimizer) -> None:
    """What ends a step of either script."""
    torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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

    def predict(unet: Any, x: Tensor, t: int) -> Tensor:
        whole = unet.dtype == torch.float32
        # A reference in half precision runs in it, as the script's does, and not under autocast.
        with autocast(models.device, models.dtype if whole else torch.float32):
            if cond.uncond is None or recipe.trajectory.guidance_scale == 1:
                return plain_unet(unet, x, t, cond).to(x.dtype)
            halves = stacked(cond.uncond, cond.without_uncond())
            both = plain_unet(unet, torch.cat([x, x]), t, halves).to(x.dtype)
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


def stock_pipeline(models: Models, codec: Any) -> Callable[..., Any]:
    """Draws with diffusers' own pipeline over copies of the reference and the codec in `models.dtype`, as it is run on
    a GPU: its arguments are a conditioning of n prompts, steps, guidance scale and output type (`latent`, `pil`)."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    unet, vae = (Module.to(copy.deepcopy(network), models.dtype) for network in (models.reference, codec))
    parts: dict[str, Any] = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": unet}
    parts["scheduler"] = models.scheduler
    if models.reference.config["addition_embed_type"] is None:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline: Any = StableDiffusionPipeline(**parts)
    else:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipeline = StableDiffusionXLPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    side = models.shape[-1] * pipeline.vae_scale_factor

    def draw(cond: Conditioning, steps: int, guidance_scale: float, output_type: str) -> Any:
        empty = cond.uncond
        assert empty is not None
        given = {"prompt_embeds": cond.embeds, "negative_prompt_embeds": empty.embeds}
        if cond.pooled is not None:
            given |= {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": empty.pooled}
        return pipeline(
            **given,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[prompt_generator(0, number) for number in range(len(cond.embeds))],
            output_type=output_type,
        ).images

    return draw
