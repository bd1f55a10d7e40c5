"""What a pipeline's networks cost, from their architecture alone: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from invdpo.config import read_yaml

META = torch.device("meta")
TOKENS = 77  # of CLIP's text encoders, which every pipeline of the two families has


def networks(unet: dict[str, Any], vae: dict[str, Any], resolution: int) -> dict[str, int]:
    """Sizes for images of resolution x resolution, by the networks' configurations as diffusers saves them.

    unet_parameters, vae_parameters. unet_flops, encode_flops, decode_flops: of the forward pass of one latent or image,
    a multiplication and an addition counting two. graph_bytes: what a forward pass of one latent keeps for its backward
    pass, in half precision; checkpointed_bytes: the same with gradient checkpointing, the largest block that is
    computed again included; double both for fp32. latent_elements: of one latent.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with META:
        denoiser: Any = Module.to(UNet2DConditionModel.from_config(unet), torch.bfloat16)  # pyright: ignore
        codec: Any = Module.to(AutoencoderKL.from_config(vae), torch.bfloat16)  # pyright: ignore
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    latent = torch.empty(1, unet["in_channels"], side, side, dtype=torch.bfloat16, device=META)
    picture = torch.empty(1, 3, resolution, resolution, dtype=torch.bfloat16, device=META)
    inputs = _inputs(unet)

    def denoise() -> Tensor:
        return denoiser(latent, torch.ones(1, device=META), return_dict=False, **inputs)[0]

    with torch.no_grad():
        flops = {
            "unet_flops": _flops(denoise),
            "encode_flops": _flops(lambda: codec.encode(picture)),
            "decode_flops": _flops(lambda: codec.decode(latent)),
        }
    graph = _saved(denoise, denoiser)
    return {
        "unet_parameters": sum(value.numel() for value in denoiser.parameters()),
        "vae_parameters": sum(value.numel() for value in codec.parameters()),
        **flops,
        "graph_bytes": graph,
        "checkpointed_bytes": _checkpointed(denoise, denoiser),
        "latent_elements": latent.numel(),
    }


def networks_of(folder: Path, resolution: int) -> dict[str, int]:
    """The same for a pipeline folder."""
    unet, vae = (read_yaml(folder / part / "config.json") for part in ("unet", "vae"))
    return networks(unet, vae, resolution)


def _inputs(unet: dict[str, Any]) -> dict[str, Any]:
    """Conditioning of one latent: SDXL's UNet also takes a pooled embedding and six numbers on size and crop."""
    embeds = torch.empty(1, TOKENS, unet["cross_attention_dim"], dtype=torch.bfloat16, device=META)
    if unet.get("addition_embed_type") != "text_time":
        return {"encoder_hidden_states": embeds}
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    added = {"text_embeds": torch.empty(1, pooled, dtype=torch.bfloat16, device=META)}
    added["time_ids"] = torch.empty(1, 6, dtype=torch.bfloat16, device=META)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _saved(work: Callable[[], object], network: Module) -> int:
    """Bytes that autograd keeps for the backward pass, the weights apart."""
    weights = {value.untyped_storage()._cdata for value in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = value
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        work()
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def _checkpointed(work: Callable[[], object], network: Any) -> int:
    """The inputs of all blocks, and what the largest of them keeps while it is computed again."""
    inputs: dict[int, int] = {}
    largest = 0

    def block(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal largest
        for value in arguments:
            if isinstance(value, Tensor):
                inputs[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        result = None

        def run() -> None:
            nonlocal result
            result = function(*arguments)

        largest = max(largest, _saved(run, network))
        return result

    network.train()
    network.enable_gradient_checkpointing(block)
    outside = _saved(work, network)
    return outside + sum(inputs.values()) + largest
