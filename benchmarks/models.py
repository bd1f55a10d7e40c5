"""What is measured with: a policy and its reference, their codec and text encoders, from a pipeline or of SDXL's shape
with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo.backbones.pipeline import UNetEps, load_unet, load_vae
from invdpo.backbones.text import Encoder, Text, for_sampling, load_text
from invdpo.device import resolve_dtype
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning
from invdpo.world.base import scheduler

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

# As the files of stable-diffusion-xl-base-1.0 have them.
UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# But for force_upcast: madebyollin/sdxl-vae-fp16-fix, which config/sdxl.yaml uses, is safe in fp16.
CODEC: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
TEXT: tuple[dict[str, Any], ...] = (
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
)


@dataclass(frozen=True)
class Models:
    """A policy near its reference, the base's diffusers scheduler, a prompt's number of tokens, the autocast type, and
    what loads the codec (in the precision that images are drawn in) and the text encoders, which few cases need."""

    policy: UNet2DConditionModel
    reference: UNet2DConditionModel
    scheduler: Any
    tokens: int
    device: torch.device
    dtype: torch.dtype
    codec: Callable[[], Any]
    text: Callable[[], Text]

    @property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's arithmetic as our own code has it."""
        return NoiseSchedule.from_scheduler(self.scheduler).to(self.device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C,H,W) of a latent of the UNet's own size."""
        config = self.policy.config
        return config["in_channels"], config["sample_size"], config["sample_size"]

    def eps(self, unet: Any) -> UNetEps:
        """One of the two as our own code calls it."""
        return UNetEps(unet, self.dtype)

    def latents(self, n: int, seed: int) -> Tensor:
        """Random latents (n,C,H,W)."""
        return torch.randn((n, *self.shape), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def prompts(self, n: int, seed: int) -> Conditioning:
        """Random embeddings of n prompts, and one of the empty prompt for all; of the SDXL family, with a pooled
        embedding and the sizes of whole images of eight pixels a latent's."""
        generator = torch.Generator().manual_seed(seed)
        config = self.policy.config
        embeds = torch.randn(n + 1, self.tokens, config["cross_attention_dim"], generator=generator).to(self.device)
        empty, prompts = Conditioning(embeds[:1]), Conditioning(embeds[1:])
        if config["addition_embed_type"] == "text_time":
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            pooled = torch.randn(n + 1, width, generator=generator).to(self.device)
            empty, prompts = replace(empty, pooled=pooled[:1]), replace(prompts, pooled=pooled[1:])
        return for_sampling(prompts, empty, 8 * self.shape[-1])


def load(base: str, device: torch.device) -> Models:
    """Those of a pipeline folder or hub id."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import AutoConfig

    length = AutoConfig.from_pretrained(base, subfolder="text_encoder").max_position_embeddings
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    dtype = resolve_dtype(device, "auto")
    policy, reference = twins(load_unet(base, device))
    return Models(
        policy,
        reference,
        scheduler,
        length,
        device,
        dtype,
        codec=lambda: load_vae(base, device, dtype=dtype),
        text=lambda: load_text(base, device),
    )


def sdxl_shaped(device: torch.device) -> Models:
    """Networks of SDXL's shape, their weights drawn on the device itself."""
    dtype = resolve_dtype(device, "auto")
    policy, reference = twins(sdxl_unet(device))
    return Models(
        policy,
        reference,
        scheduler(),  # SDXL's noise schedule is SD1.5's
        77,
        device,
        dtype,
        codec=lambda: sdxl_codec(device).half(),  # as `load_vae` has it on a GPU
        text=lambda: sdxl_text(device),
    )


def sdxl_unet(device: torch.device) -> UNet2DConditionModel:
    """SDXL's denoiser, 2,567,463,684 parameters."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with device:
        unet = UNet2DConditionModel(**UNET)
    return unet.eval()


def sdxl_codec(device: torch.device) -> Any:
    """SDXL's codec, in the memory format that `load_vae` gives it."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with device:
        codec = AutoencoderKL(**CODEC)
    return codec.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def sdxl_text(device: torch.device) -> Text:
    """SDXL's two text encoders; in place of the tokenizers, which are files, one that draws tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = (CLIPTextConfig(**config) for config in TEXT)
    with device:
        networks = (CLIPTextModel(first).eval(), CLIPTextModelWithProjection(second).eval())
    return Text(tuple(Encoder(DrawnTokens(), network) for network in networks), zero_empty=True)


class DrawnTokens:
    """Stands in for CLIP's tokenizer: as many tokens, any of its vocabulary."""

    model_max_length = 77

    def __call__(self, prompts: list[str], **options: Any) -> SimpleNamespace:
        ids = torch.randint(49408, (len(prompts), self.model_max_length), generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(input_ids=ids)


def twins(reference: UNet2DConditionModel) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """A policy 1 % of noise away from its reference, so that no gradient is exactly zero, and the reference."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean(), alpha=0.01)
    return policy, reference.requires_grad_(False)
