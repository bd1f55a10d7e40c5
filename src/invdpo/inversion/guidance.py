"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) around any eps-model."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.types import Conditioning, EpsModel, concatenate


def evaluations(guidance_scale: float) -> int:
    """UNet evaluations a latent: two with guidance, one without."""
    return 1 if guidance_scale == 1 else 2


def guided(eps_model: EpsModel, guidance_scale: float) -> EpsModel:
    """eps_uncond + s (eps_cond - eps_uncond), both halves in one call of 2B latents; s = 1 is the model itself.

    Raises InvdpoError, when called, if s differs from 1 and the conditioning has no `uncond`.
    """
    if guidance_scale == 1:
        return eps_model

    def model(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if cond is None or cond.uncond is None:
            raise InvdpoError(
                f"trajectory.guidance_scale is {guidance_scale:g}, but the conditioning has no unconditional half: "
                "give Conditioning.uncond (the empty prompt), or set trajectory.guidance_scale to 1"
            )
        both = concatenate(cond.uncond.without_uncond(), cond.without_uncond())
        uncond, conditional = eps_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + guidance_scale * (conditional - uncond)

    return model


def two_model_guidance(conditional: EpsModel, unconditional: EpsModel, guidance_scale: float) -> EpsModel:
    """Guidance whose two halves come from two models: u + s (c - u), u the unconditional model's prediction for
    `cond.uncond` and c the conditional model's for the prompt; s = 1 is the conditional model alone.

    Diffusion-NPO samples so, with the weights trained towards losers as `unconditional` (gen_xl.py, the pipeline's
    negative_unet). Raises InvdpoError, when called, if s differs from 1 and the conditioning has no `uncond`.
    """

    def model(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if guidance_scale == 1:
            return conditional(x, t, None if cond is None else cond.without_uncond())
        if cond is None or cond.uncond is None:
            raise InvdpoError(
                f"guidance with two models and scale {guidance_scale:g}: the conditioning has no unconditional half; "
                "give Conditioning.uncond (the empty prompt), or set the scale to 1"
            )
        uncond = unconditional(x, t, cond.uncond.without_uncond())
        return uncond + guidance_scale * (conditional(x, t, cond.without_uncond()) - uncond)

    return model
