"""Images from an eps-model, one seed a prompt."""

from invdpo.sampling.ddim import decode, denoise, prompt_generator, sample, unet_evaluations

__all__ = ["decode", "denoise", "prompt_generator", "sample", "unet_evaluations"]
