"""What a pipeline's networks cost, from their architecture alone: no weights are read and nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from invdpo.backbones.files import text_parts
from invdpo.config import read_yaml

META = torch.device("meta")

# The configurations of a pipeline's UNet, its image codec and its text encoders, as diffusers and transformers save
# them: one text encoder for SD1.5, two for SDXL.
Configurations = tuple[dict[str, Any], dict[str, Any], Sequence[dict[str, Any]]]


def networks(
    unet: dict[str, Any], vae: dict[str, Any], texts: Sequence[dict[str, Any]], resolution: int
) -> dict[str, int]:
    """Sizes for images of resolution x resolution, by the networks' configurations.

    unet_parameters, vae_parameters, text_parameters. unet_flops, encode_flops, decode_flops: of the forward pass of one
    latent or image, a multiplication and an addition counting two. unet_operations: of torch, in that pass of the UNet.
    latent_elements, caption_elements: of one latent, and of one prompt as the UNet is given it. The rest as `denoiser`.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with META:
        codec: Any = Module.to(AutoencoderKL.from_config(vae), torch.bfloat16)  # pyright: ignore
        encoders: list[Any] = [
            kind(CLIPTextConfig(**text))
            for kind, text in zip((CLIPTextModel, CLIPTextModelWithProjection), texts, strict=False)
        ]
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    latent = torch.empty(1, unet["in_channels"], side, side, dtype=torch.bfloat16, device=META)
    picture = torch.empty(1, 3, resolution, resolution, dtype=torch.bfloat16, device=META)
    tokens = texts[0]["max_position_embeddings"]
    _, denoise = _pass(unet, side, tokens)
    with torch.no_grad():
        flops = {
            "unet_flops": _flops(denoise),
            "encode_flops": _flops(lambda: codec.encode(picture)),
            "decode_flops": _flops(lambda: codec.decode(latent)),
        }
        with _Operations() as operations:
            denoise()
    return {
        **denoiser(unet, side, tokens),
        "vae_parameters": _parameters(codec),
        "text_parameters": sum(map(_parameters, encoders)),
        **flops,
        "unet_operations": operations.count,
        "latent_elements": latent.numel(),
        "caption_elements": _inputs(unet, tokens)[1],
    }


def denoiser(unet: Mapping[str, Any], side: int, tokens: int) -> dict[str, int]:
    """Sizes of a UNet for latents of side x side and prompts of so many tokens.

    unet_parameters. gathered_parameters: what a process has whole at a time of a network that `training.shards` cuts,
    the largest block and all that is in none. graph_bytes: what a forward pass of one latent keeps for its backward
    pass, in half precision; checkpointed_bytes: the same with gradient checkpointing, the largest block that is
    computed again included; forward_bytes: the most that a pass without a backward pass has at a time; double all three
    for fp32.
    """
    network, denoise = _pass(unet, side, tokens)
    with torch.no_grad(), _Living(network) as living:
        denoise()
    return {
        "unet_parameters": _parameters(network),
        "gathered_parameters": _gathered(network),
        "graph_bytes": _saved(denoise, network),
        "checkpointed_bytes": _checkpointed(denoise, network),
        "forward_bytes": living.most,
    }


def _pass(unet: Mapping[str, Any], side: int, tokens: int) -> tuple[Any, Callable[[], Tensor]]:
    """A UNet without weights, and its forward pass of one latent."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with META:
        network: Any = Module.to(UNet2DConditionModel.from_config(unet), torch.bfloat16)  # pyright: ignore
    latent = torch.empty(1, unet["in_channels"], side, side, dtype=torch.bfloat16, device=META)
    inputs, _ = _inputs(unet, tokens)

    def denoise() -> Tensor:
        with _OnGpu():
            return network(latent, torch.ones(1, device=META), return_dict=False, **inputs)[0]

    return network, denoise


def configurations(folder: Path) -> Configurations:
    """Those of a pipeline folder. Raises InvdpoError for a pipeline of neither family."""
    texts = [read_yaml(folder / encoder / "config.json") for _, encoder in text_parts(folder)]
    return read_yaml(folder / "unet" / "config.json"), read_yaml(folder / "vae" / "config.json"), texts


def converted(folder: Path) -> Configurations:
    """Those of what `invdpo world sdxl-layout` makes of a pipeline folder of SD1.5's layout, by its own code on
    networks without weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from invdpo.world.sdxl_layout import extended, widened

    unet, vae, (text,) = configurations(folder)
    with META:
        encoder = CLIPTextModel(CLIPTextConfig(**text))
        wide = [widened(encoder, kind).config.to_dict() for kind in (CLIPTextModel, CLIPTextModelWithProjection)]
        denoiser: Any = UNet2DConditionModel.from_config(unet)
        larger = extended(denoiser, wide[1]["projection_dim"])
    return dict(larger.config), vae, wide


def _inputs(unet: Mapping[str, Any], tokens: int) -> tuple[dict[str, Any], int]:
    """Conditioning of one latent, and how many numbers a prompt is in it: SDXL's UNet also takes a pooled embedding,
    and six numbers on size and crop."""
    embeds = torch.empty(1, tokens, unet["cross_attention_dim"], dtype=torch.bfloat16, device=META)
    if unet.get("addition_embed_type") != "text_time":
        return {"encoder_hidden_states": embeds}, embeds.numel()
    width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    pooled = torch.empty(1, width, dtype=torch.bfloat16, device=META)
    sizes = torch.empty(1, 6, dtype=torch.bfloat16, device=META)
    inputs = {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return inputs, embeds.numel() + pooled.numel()


def _parameters(network: Module) -> int:
    return sum(value.numel() for value in network.parameters())


class _OnGpu(TorchFunctionMode):
    """A network in half precision as a GPU runs it under autocast: normalised in fp32, multiplied in half precision.

    Attention is the one kernel that GPUs have for it: without a device, torch takes it apart, and keeps the products of
    all queries and keys.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*_cast(args[:3], torch.bfloat16))[0]
        if func in (functional.conv2d, functional.linear):
            args = _cast(args, torch.bfloat16)
        elif func in (functional.group_norm, functional.layer_norm):
            args = _cast(args, torch.float32)
        return func(*args, **(kwargs or {}))


def _cast(values: Iterable[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in values)


class _Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Living(TorchDispatchMode):
    """Adds up the bytes of what torch's operations make, while it lives, the weights apart. most: at a time."""

    now = most = 0

    def __init__(self, network: Module) -> None:
        super().__init__()
        self.seen = {value.untyped_storage()._cdata for value in network.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.seen:
                size = value.untyped_storage().nbytes()
                self.seen.add(key)
                self._change(size)
                weakref.finalize(value.untyped_storage(), self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def _gathered(network: Module) -> int:
    from invdpo.training.shards import BLOCKS

    blocks = [_parameters(module) for module in network.modules() if type(module).__name__ in BLOCKS]
    return max(blocks, default=0) + _parameters(network) - sum(blocks)


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
