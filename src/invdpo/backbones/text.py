"""Prompts as a UNet is conditioned on them, exactly as the stock pipelines of diffusers compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdpo.backbones.files import attempt, load_weights, read_json, text_parts
from invdpo.types import Conditioning


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its text encoder."""

    tokenizer: Any
    network: Any

    @property
    def length(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids (n,L) on the network's device."""
        found = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(self.network.device)


@dataclass(frozen=True)
class Text:
    """The text encoders of a pipeline: one for SD1.5, two for SDXL. zero_empty: whether guidance starts from zeros in
    place of the encoded empty prompt (`force_zeros_for_empty_prompt`)."""

    encoders: tuple[Encoder, ...]
    zero_empty: bool


def load_text(base: str | Path, device: torch.device, variant: str | None = None) -> Text:
    """The tokenizers and text encoders (fp32) of a pipeline; variant: as for `load_unet`."""
    encoders = tuple(_load(base, *parts, device, variant) for parts in text_parts(base))
    return Text(encoders, starts_from_zeros(base))


def starts_from_zeros(base: str | Path) -> bool:
    """Whether guidance in a pipeline starts from zeros in place of the encoded empty prompt."""
    # SDXL's pipeline takes True for an entry that is missing.
    index = read_json(base, "model_index.json")
    return len(text_parts(base)) == 2 and bool(index.get("force_zeros_for_empty_prompt", True))


def _load(base: str | Path, tokenizer: str, encoder: str, device: torch.device, variant: str | None) -> Encoder:
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModel if encoder == "text_encoder" else CLIPTextModelWithProjection
    network: Any = load_weights(kind, base, encoder, dtype=torch.float32, variant=variant)
    # None, the library's default, asks on a terminal whether to run a repository's code.
    options = {"subfolder": tokenizer, "trust_remote_code": False}
    words = attempt(base, tokenizer, lambda: AutoTokenizer.from_pretrained(base, **options))
    return Encoder(words, network.eval().to(device))


@torch.no_grad()
def encode_prompts(text: Text, prompts: list[str], batch: int = 256) -> Conditioning:
    """n prompts on the encoders' device.

    SD1.5: embeds (n,L,D), the encoder's last hidden state, as `StableDiffusionPipeline`. SDXL: the penultimate hidden
    states of both encoders side by side, and pooled (n,P), the second one's projected embedding, as
    `StableDiffusionXLPipeline`; sizes are the caller's to add.
    """
    parts = [_encode(text, prompts[start : start + batch]) for start in range(0, len(prompts), batch)]
    pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts if part.pooled is not None])
    return Conditioning(torch.cat([part.embeds for part in parts]), pooled)


def _encode(text: Text, prompts: list[str]) -> Conditioning:
    if len(text.encoders) == 1:
        (encoder,) = text.encoders
        return Conditioning(encoder.network(encoder.tokens(prompts))[0])
    outputs = [encoder.network(encoder.tokens(prompts), output_hidden_states=True) for encoder in text.encoders]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Conditioning(embeds, outputs[1].text_embeds)


def empty_prompt(text: Text) -> Conditioning:
    """What guidance starts from, one row: zeros where the pipeline says so (SDXL-base), else the encoded empty
    prompt."""
    empty = encode_prompts(text, [""])
    return empty.map(torch.zeros_like) if text.zero_empty else empty


def square_sizes(side: int, n: int, device: torch.device) -> Tensor:
    """time_ids (n,6) of whole images of side x side pixels: (h, w) of the original, (top, left) of the crop, (h, w)."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device).expand(n, -1)


def for_sampling(prompts: Conditioning, empty: Conditioning, side: int) -> Conditioning:
    """n prompts, guided away from the empty one (1 row), for images of side x side pixels, as the stock pipelines
    sample them."""
    n = len(prompts.embeds)
    cond = replace(prompts, uncond=empty.map(lambda value: value.expand(n, *value.shape[1:])))
    return cond if cond.pooled is None else cond.with_time_ids(square_sizes(side, n, cond.embeds.device))
