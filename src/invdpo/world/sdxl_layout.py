"""A base of Stable Diffusion 1.x's layout as a pipeline of SDXL's layout that makes the same pictures.

Nothing is trained. The converted pipeline computes what the original computes, up to rounding, by the parts that SDXL
has: two wider text encoders whose *penultimate hidden state* is read, a UNet over both of them side by side, and an
embedding of the pooled text and of the image's sizes, whose last layer starts at zero. So whatever a study of the
converted base finds differently comes from training those parts, or from a mistake in handling them.

**The text encoders.** SD1.x reads LayerNorm_f(h), the normalised last state; SDXL reads a raw state of the residual
stream, so the stream must come to hold LayerNorm_f(h) itself. The converted encoder is twice as wide, with a stream
[c, 0], where c = h - mean(h): whatever writes to the stream is centred, and its readers, all behind a LayerNorm, do not
notice. The mean of [c, 0] is zero and its variance half of h's, so its LayerNorm, with half the epsilon, is
sqrt(2) LayerNorm(h) in the first half; the weights take the sqrt(2) back. After the original layers, one more writes
LayerNorm_f(h) = y into the second half by an MLP that is the identity: act(y) - act(-y) = y for act(y) = y s(y) with
s(y) + s(-y) = 1, which both GELUs of CLIP are. The last layer, which SDXL does not read, adds nothing.
"""

# diffusers exports nothing that pyright sees, and annotates optional parts as required.
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIZE_EMBEDDING = 32  # numbers that each of the six sizes becomes (SDXL: 256)
# Of the random first layer of the added embedding: zeros there as well would leave both without a gradient.
SEED = 0


def convert(base: Path, out: Path) -> None:
    """Write the pipeline `base`, of Stable Diffusion 1.x's layout, in SDXL's layout into the folder `out`."""
    original: Any = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    encoders = [widened(original.text_encoder, kind) for kind in (CLIPTextModel, CLIPTextModelWithProjection)]
    pipeline = StableDiffusionXLPipeline(
        vae=original.vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=original.tokenizer,
        tokenizer_2=original.tokenizer,
        unet=extended(original.unet, encoders[1].config.projection_dim),
        scheduler=original.scheduler,
        # The empty prompt that this base was trained with is an encoded one; SDXL-base's are zeros.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)


def widened(encoder: CLIPTextModel, kind: type[Any]) -> Any:
    """A text encoder of `kind` whose penultimate hidden state is (c, y): y is the last hidden state of `encoder`."""
    config: dict[str, Any] = encoder.config.to_dict()
    width = config["hidden_size"]
    assert config["intermediate_size"] >= 2 * width  # the identity needs two units a number
    changes = {
        "hidden_size": 2 * width,
        "num_attention_heads": 2 * config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"] + 2,
        "layer_norm_eps": config["layer_norm_eps"] / 2,
        "projection_dim": width,
    }
    wide = kind(CLIPTextConfig(**config | changes))
    state = {name: torch.zeros_like(value) for name, value in wide.state_dict().items()}
    prefix = next(name for name in state if name.endswith("final_layer_norm.weight"))[: -len("final_layer_norm.weight")]
    for name, value in _core(encoder).items():
        place = state[prefix + name]
        place[tuple(slice(size) for size in value.shape)] = value
    state[prefix + "final_layer_norm.weight"].fill_(1)  # before the pooled embedding
    if kind is CLIPTextModelWithProjection:
        state["text_projection.weight"][:, width:] = torch.eye(width)
    wide.load_state_dict(state)
    return wide.eval()


def _core(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The weights of the wide encoder where they are not zero, each in the corner or rows that it fills."""
    width, layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
    found = {}
    for name, value in encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        if name.startswith("embeddings.") and value.is_floating_point():
            found[name] = value - value.mean(dim=1, keepdim=True)
        elif name.startswith("encoder."):
            if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
                value = value - value.mean(dim=0, keepdim=True)
            elif "layer_norm" in name and name.endswith("weight"):
                value = value / 2**0.5
            found[name] = value
        elif name == "final_layer_norm.weight":
            found[f"encoder.layers.{layers}.layer_norm2.weight"] = value / 2**0.5
        elif name == "final_layer_norm.bias":
            found[f"encoder.layers.{layers}.layer_norm2.bias"] = value
    eye, zero = torch.eye(width), torch.zeros(width, 2 * width)
    found[f"encoder.layers.{layers}.mlp.fc1.weight"] = torch.cat([eye, -eye])
    found[f"encoder.layers.{layers}.mlp.fc2.weight"] = torch.cat([zero, torch.cat([eye, -eye], dim=1)])
    return found


def extended(unet: UNet2DConditionModel, pooled: int) -> UNet2DConditionModel:
    """The UNet over (c, y) of two encoders, half of its attention's input from either y, with SDXL's added embedding,
    which adds nothing yet."""
    width = unet.config["cross_attention_dim"]
    changes = {
        "cross_attention_dim": 4 * width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_EMBEDDING,
        "projection_class_embeddings_input_dim": pooled + 6 * SIZE_EMBEDDING,
    }
    torch.manual_seed(SEED)
    larger: Any = UNet2DConditionModel.from_config(unet.config, **changes)
    state = larger.state_dict()
    for name in ("add_embedding.linear_2.weight", "add_embedding.linear_2.bias"):
        state[name].zero_()
    for name, value in unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            nothing = torch.zeros_like(value)
            value = torch.cat([nothing, value / 2] * 2, dim=1)
        state[name] = value
    larger.load_state_dict(state)
    return larger.eval()
