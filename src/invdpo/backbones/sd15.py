"""Pipelines of the SD1.5 family: a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler) or a hub
id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.provenance import sha256_file
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

Loaded = TypeVar("Loaded")


class UNetEps:
    """A `UNet2DConditionModel` as an eps-model.

    x (B,C,H,W) of any float type, t (B,) int64, cond.embeds (B,L,D) -> the predicted noise (B,C,H,W) in x's
    type. With `dtype` other than fp32 the pass runs under autocast; a UNet whose own weights are half
    precision runs in them without autocast, as the reference of the released Inversion-DPO script does.
    """

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> None:
        self.unet = unet
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if cond is None:
            raise InvdpoError("A UNet of the SD1.5 family needs text conditioning; none was given.")
        weights = self.unet.dtype
        # Kernels round by memory format: equal latents must give equal bits, whatever tensor they were cut from.
        x = x.contiguous()
        if weights == torch.float32:
            with autocast(x.device, self.dtype):
                eps = self.unet(x, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]
        else:
            eps = self.unet(x.to(weights), t, encoder_hidden_states=cond.embeds.to(weights), return_dict=False)[0]
        return eps.to(x.dtype)


def load_unet(base: str | Path, device: torch.device, gradient_checkpointing: bool = False) -> UNet2DConditionModel:
    """The denoiser of a pipeline in fp32, or of a folder that holds a `unet/` only (a checkpoint of a run).

    In evaluation mode: dropout, which no UNet of this family has, would draw from the global generator.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = _load(
        base,
        "unet",
        lambda: UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32),
    )
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.eval().to(device)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Text:
    """A tokenizer and its text encoder."""

    tokenizer: Any
    encoder: Any

    @property
    def length(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)


def load_text(base: str | Path, device: torch.device) -> Text:
    """The tokenizer and text encoder (fp32) of a pipeline."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = _load(base, "tokenizer", lambda: AutoTokenizer.from_pretrained(base, subfolder="tokenizer"))
    encoder = _load(
        base,
        "text_encoder",
        lambda: CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32),
    )
    return Text(tokenizer, encoder.eval().to(device))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def encode_prompts(text: Text, prompts: list[str], batch: int = 256) -> Tensor:
    """Token embeddings (n, L, D) of prompts on the encoder's device, as `StableDiffusionPipeline` computes
    them.
    """
    parts = []
    for start in range(0, len(prompts), batch):
        tokens = text.tokenizer(
            prompts[start : start + batch],
            padding="max_length",
            max_length=text.length,
            truncation=True,
            return_tensors="pt",
        )
        parts.append(text.encoder(tokens.input_ids.to(text.encoder.device))[0])
    return torch.cat(parts)


def load_vae(base: str | Path, device: torch.device) -> AutoencoderKL:
    """The image codec of a pipeline in fp32."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = _load(base, "vae", lambda: AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32))
    # Channels last: convolutions over few channels, as here, run up to three times faster on a CPU.
    return vae.eval().to(device, memory_format=torch.channels_last)  # pyright: ignore


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B,3,H,W) in [-1, 1] -> mean and standard deviation (B,C,h,w) of the latents, in the UNet's
    scale.
    """
    posterior = vae.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    scale = vae.config["scaling_factor"]
    return posterior.mean * scale, posterior.std * scale


def load_schedule(base: str | Path) -> NoiseSchedule:
    """The noise schedule of a pipeline, read as DDIM reads it whatever sampler the pipeline was saved
    with.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = _load(base, "scheduler", lambda: DDIMScheduler.from_pretrained(base, subfolder="scheduler"))
    return NoiseSchedule.from_scheduler(scheduler)


def fingerprint(base: str | Path, parts: tuple[str, ...]) -> str:
    """sha256 over the files of a pipeline's `parts`: the same for the same content, wherever it lies."""
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            _load(
                base,
                "/".join(parts),
                lambda: snapshot_download(str(base), allow_patterns=[f"{p}/*" for p in parts]),
            )
        )
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _load(base: str | Path, part: str, load: Callable[[], Loaded]) -> Loaded:
    """Call a library's loader; whatever it cannot find or read becomes one message that names the part."""
    folder = Path(base)
    if folder.is_dir() and not (folder / part).is_dir() and "/" not in part:
        raise InvdpoError(
            f"`base: {base}` has no folder `{part}`. A pipeline folder of the SD1.5 family holds unet, vae, "
            "text_encoder, tokenizer and scheduler, as `save_pretrained` writes them."
        )
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = (
            f"the `{part}` of it cannot be loaded"
            if folder.is_dir()
            else "it is no folder here, nor a reachable hub id"
        )
        raise InvdpoError(f"`base: {base}`: {kind} ({reason}). Check the path or the id.") from error
