"""The networks and the noise schedule of a pipeline: a diffusers folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invdpo.backbones.files import attempt, check_codec, check_fits, load_weights, read_json
from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class UNetEps:
    """A `UNet2DConditionModel` as an eps-model.

    x (B,C,H,W) of any float type, t (B,) int64, cond -> the predicted noise (B,C,H,W) in x's type. cond.embeds
    (B,L,D), and for a UNet of the SDXL family also cond.pooled (B,P) and cond.time_ids (B,6). With `dtype` other than
    fp32 the pass runs under autocast; a UNet whose own weights are half precision runs in them without autocast, as
    the reference of the released Inversion-DPO script does.
    """

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> None:
        self.unet = unet
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if cond is None:
            raise InvdpoError("A UNet needs text conditioning; none was given.")
        weights = self.unet.dtype
        # Kernels round by memory format: equal latents must give equal bits, whatever tensor they were cut from.
        x = x.contiguous()
        added = self._added(cond)
        if weights == torch.float32:
            with autocast(x.device, self.dtype):
                eps = self.unet(x, t, cond.embeds, added_cond_kwargs=added, return_dict=False)[0]
        else:
            embeds = cond.embeds.to(weights)
            eps = self.unet(x.to(weights), t, embeds, added_cond_kwargs=added, return_dict=False)[0]
        return eps.to(x.dtype)

    def _added(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """The pooled embedding and the sizes of an SDXL UNet; it rounds them to its own type itself, sizes last."""
        if self.unet.config["addition_embed_type"] is None:
            return None
        if cond.pooled is None or cond.time_ids is None:
            raise InvdpoError(
                "A UNet of the SDXL family needs the pooled embedding and the sizes of its images "
                "(Conditioning.pooled and .time_ids); the conditioning has none."
            )
        return {"text_embeds": cond.pooled, "time_ids": cond.time_ids}


def load_unet(
    source: str | Path,
    device: torch.device,
    gradient_checkpointing: bool = False,
    base: str | Path | None = None,
    variant: str | None = None,
) -> UNet2DConditionModel:
    """The denoiser of a pipeline in fp32, or of a folder or repository that holds a `unet/` only (a checkpoint).

    base: the pipeline whose prompts it will be given, where that is not `source` itself. variant: the files that are
    read, `fp16` for diffusion_pytorch_model.fp16.safetensors. In evaluation mode: dropout, which no UNet of these
    families has, would draw from the global generator.

    Raises InvdpoError for a UNet of another family than the base, missing or unexpected weights, and pickles.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if base is not None or (Path(source) / "model_index.json").is_file() or not Path(source).is_dir():
        check_fits(source, source if base is None else base)
    unet = load_weights(UNet2DConditionModel, source, "unet", torch_dtype=torch.float32, variant=variant)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.eval().to(device)  # pyright: ignore[reportArgumentType]


def load_vae(
    base: str | Path,
    device: torch.device,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> AutoencoderKL:
    """The image codec of a pipeline, or the one in `vae`, a folder or hub id of its own.

    dtype: the precision of the study's networks. In either half precision a codec whose config.json says that it is
    safe there (`force_upcast: false`) runs in fp16, which has three bits more than bf16; every other runs in fp32:
    SDXL's own gives NaN in fp16. variant: as for `load_unet`, of the pipeline's own codec.

    Raises InvdpoError for a codec whose latents the pipeline's UNet was not trained on, missing or unexpected weights,
    and pickles.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    source, part, label = (base, "vae", "base") if vae is None else (vae, "", "vae")
    upcast = read_json(source, f"{part}/config.json".lstrip("/"), label).get("force_upcast", True)  # diffusers' default
    check_codec(base, vae)
    runs_in = torch.float32 if dtype == torch.float32 or upcast else torch.float16
    options = {"torch_dtype": runs_in, "variant": variant if vae is None else None}
    codec = load_weights(AutoencoderKL, source, part, label, **options)
    # Channels last: convolutions over few channels, as here, run up to three times faster on a CPU.
    return codec.eval().to(device, memory_format=torch.channels_last)  # pyright: ignore


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B,3,H,W) in [-1, 1] -> mean and standard deviation (B,C,h,w) of the latents, fp32, in the UNet's
    scale.
    """
    posterior = vae.encode(images.to(vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    scale = vae.config["scaling_factor"]
    return posterior.mean.float() * scale, posterior.std.float() * scale


def load_schedule(base: str | Path) -> NoiseSchedule:
    """The noise schedule of a pipeline, read as DDIM reads it whatever sampler the pipeline was saved with.

    Raises InvdpoError for a model that predicts anything but noise.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = attempt(base, "scheduler", lambda: DDIMScheduler.from_pretrained(base, subfolder="scheduler"))
    return NoiseSchedule.from_scheduler(scheduler)
