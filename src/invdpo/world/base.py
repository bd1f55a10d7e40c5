"""The base model of the shapes world: a small Stable Diffusion pipeline, trained here, saved in the hub's layout."""

# diffusers annotates sequences as one-tuples and optional parts as required, and exports nothing that pyright sees.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from invdpo.world.corpus import Corpus, to_unit
from invdpo.world.fitting import fit, random_batches
from invdpo.world.tokenizer import CONTEXT, build_tokenizer

WIDTH = 64
# Share of captions replaced by the empty one, so that guidance has an unconditional half (Ho & Salimans: 10-20 %).
CAPTION_DROPOUT = 0.1
BATCH = 128
# Where the layout of a picture is decided: timesteps from here on, with a weight of at most this on the loss.
LAYOUT_FROM, LAYOUT_WEIGHT = 200, 20.0


def train_vae(corpus: Corpus, steps: int, seed: int) -> tuple[AutoencoderKL, dict[str, Any]]:
    """64x64x3 pictures to 8x8x4 latents, as SD's f8 autoencoder; the scaling factor gives them unit variance."""
    torch.manual_seed(seed)
    levels = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)
    draw = random_batches(len(corpus.pictures), 32, seed)

    def loss(_: int) -> Tensor:
        pictures = to_unit(corpus.pictures[draw()]).to(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample - pictures
        # A KL this weak keeps latents bounded and costs no sharpness (SD uses 1e-6 a pixel as well).
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    facts = fit(vae, loss, steps, 1.5e-3, "vae", averaging=0.995, weight_decay=0.0)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    latents = encode(vae, corpus.pictures[:4096])
    vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 4))
    with torch.no_grad():
        pictures = to_unit(corpus.pictures[:512])
        rebuilt = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = (rebuilt - pictures).square().mean() / 4
    return vae, {**facts, "psnr_db": round(float(-10 * torch.log10(error)), 2)}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means (n, 4, 8, 8) of uint8 pictures, unscaled."""
    return torch.cat([vae.encode(to_unit(part)).latent_dist.mode() for part in pictures.split(256)])


class _Denoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT,
                projection_dim=WIDTH,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text(tokens).last_hidden_state).sample


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_base(
    corpus: Corpus, vae: AutoencoderKL, steps: int, layout_steps: int, seed: int
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """The pipeline around a freshly trained text encoder and UNet.

    First `steps` with Stable Diffusion's plain loss, then `layout_steps` that start over at the full learning rate and
    weigh high noise, where the spatial relations are decided, before they come back to the plain loss.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    denoiser = _Denoiser(len(tokenizer), int(tokenizer.eos_token_id))
    latents = encode(vae, corpus.pictures) * vae.config["scaling_factor"]
    tokens = tokenizer(corpus.captions, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    facts = _denoise(denoiser, latents, tokens, empty, steps, 0, seed)
    facts["layout"] = _denoise(denoiser, latents, tokens, empty, layout_steps, layout_steps * 2 // 3, seed + 1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text.eval(),
        tokenizer=tokenizer,
        unet=denoiser.unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, {**facts, "pictures_seen": BATCH * (steps + layout_steps)}


def _denoise(
    denoiser: _Denoiser, latents: Tensor, tokens: Tensor, empty: Tensor, steps: int, weighted_steps: int, seed: int
) -> dict[str, Any]:
    """Train on the noise-prediction loss; for the first `weighted_steps`, on that loss weighted towards high noise."""
    noising = scheduler()
    draw = random_batches(len(latents), BATCH, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # The loss in x_0 has weight 1/SNR on the loss in eps; unbounded, the last timesteps would be all that counts.
    weight = ((1 - noising.alphas_cumprod) / noising.alphas_cumprod).clamp(max=LAYOUT_WEIGHT)
    weight = weight / weight[LAYOUT_FROM:].mean()

    def loss(step: int) -> Tensor:
        picked, weighted = draw(), step < weighted_steps
        clean, words = latents[picked], tokens[picked]
        dropped = torch.rand(len(words), 1, generator=generator) < CAPTION_DROPOUT
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(LAYOUT_FROM if weighted else 0, 1000, (len(clean),), generator=generator)
        noisy = noising.add_noise(clean, noise, timesteps)
        error = (denoiser(noisy, timesteps, torch.where(dropped, empty, words)) - noise).square()
        return (error.mean(dim=(1, 2, 3)) * weight[timesteps]).mean() if weighted else error.mean()

    return fit(denoiser, loss, steps, 2e-3, "unet + text encoder", averaging=0.9995)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """The hub's folder layout with safetensors weights."""
    pipeline.save_pretrained(folder, safe_serialization=True)
