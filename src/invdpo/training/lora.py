"""Low-rank adapters (peft): the policy is the base with them, the reference the same network with them switched off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.types import Conditioning, EpsModel

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from invdpo.config import LoraConfig

ADAPTER = "default"


def attach(unet: UNet2DConditionModel, settings: LoraConfig, seed: int) -> UNet2DConditionModel:
    """The same network with adapters that change nothing yet (B = 0, A drawn by the seed), and nothing else trainable.

    Raises InvdpoError where peft is not installed, or no layer's name ends with one of the targets.
    """
    try:
        from peft import LoraConfig as Adapters
    except ImportError as error:
        raise InvdpoError(
            "`training.lora` needs peft, which is not installed. Install it: `uv sync --extra lora` (or `pip install "
            "peft`)."
        ) from error
    adapters = Adapters(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=list(settings.targets),
        init_lora_weights="gaussian",
    )
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(adapters, ADAPTER)
        except ValueError as error:
            raise InvdpoError(
                f"`training.lora.targets: {settings.targets}` fit no layer of the UNet ({error}). Give the ends of "
                "its layers' names, such as to_q."
            ) from error
    return unet


def switched_off(unet: UNet2DConditionModel, model: EpsModel) -> EpsModel:
    """The eps-model `model` of a network with adapters, as it is without them."""

    def reference(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        unet.disable_adapters()
        try:
            return model(x, t, cond)
        finally:  # also before a backward pass: adapters that are off get no gradient
            unet.enable_adapters()

    return reference


def base_weights(unet: torch.nn.Module) -> Iterator[Tensor]:
    """The weights of a network without those of its adapters."""
    return (value.detach() for name, value in unet.named_parameters() if ".lora_" not in name)


@torch.no_grad()
def distance(unet: UNet2DConditionModel) -> Tensor:
    """L2 norm of what the adapters add to the weights."""
    return torch.linalg.vector_norm(torch.stack([added.norm() for _, added in _added(unet)]))


@torch.no_grad()
def merged(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The base (another copy, changed in place) with what the adapters of `unet` add to its weights."""
    for name, added in _added(unet):
        weight = base.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight += added.to(weight)
    return base


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters as `pytorch_lora_weights.safetensors`, which pipelines load with `load_lora_weights`."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=ADAPTER))
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers={name: value.contiguous() for name, value in layers.items()},
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
    )


def detach(unet: UNet2DConditionModel) -> None:
    """Take the adapters out again; the network is then what it was."""
    unet.unload_lora()


def _added(unet: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    """Name of each adapted layer, and what its adapter adds to its weight."""
    from peft.tuners.lora import LoraLayer

    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            found: Any = layer  # get_delta_weight is a method of the kinds of layers, not of their common class
            yield name, found.get_delta_weight(ADAPTER)
