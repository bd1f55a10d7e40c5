"""Images from an eps-model, one seed a prompt."""

from invdpo.sampling.ddim import DECODED_PIXELS, decode, denoise, prompt_generator, sample, unet_evaluations

__all__ = ["DECODED_PIXELS", "decode", "denoise", "prompt_generator", "sample", "unet_evaluations"]
