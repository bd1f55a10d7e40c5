"""FSDP: each process holds an equal part of the policy, its gradients and AdamW's state, and of the reference.

torch's `fully_shard` (FSDP2, Zhao et al. 2023, arXiv:2304.11277) gathers a block's weights when it is called, in the
forward and again in the backward pass, and gives them up after; a block's gradient is summed over the processes and cut
into parts as soon as it is there. So no process ever holds a whole gradient, and a step of several backward passes sums
after each of them: gradients must be final when they are made (`final_at_once` of `objectives.backward`), for what one
process would still multiply its own by is lost in the sum. Every call of a network is one of all processes.

The optimizer sees the parts as plain tensors in the same memory: its arithmetic is that of one process, weight by
weight. Files hold whole tensors, so that another number of processes, or one, can go on from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from invdpo.training.ranks import others_alive

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

# What is gathered at once: one of these, or what is in none of them; at most 54 of SDXL's 2,567 million weights. They
# are also what gradient checkpointing calls again; without it, the graph of a pass in half precision holds all weights
# as they were cast.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


def shard(unet: UNet2DConditionModel, device: torch.device, processes: int) -> UNet2DConditionModel:
    """The same network, changed in place: its weights in parts on the devices of all processes, which take them from
    where they are, block by block. To be called by all processes, with the same weights."""
    mesh = init_device_mesh(device.type, (processes,))
    for module in (*(each for each in unet.modules() if type(each).__name__ in BLOCKS), unet):
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # The sum, of which each process has scaled its own share, not the mean.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return unet


@contextmanager
def calling() -> Iterator[None]:
    """Where sharded networks are called: this process ends when another is gone, and autocast keeps no weight that it
    has cast, as it would to the end of a pass, when the whole network would be there."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with others_alive():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def is_sharded(unet: torch.nn.Module) -> bool:
    """Whether `shard` has cut this network's weights."""
    return isinstance(unet, FSDPModule)


def forget_calls(unet: UNet2DConditionModel) -> None:
    """Clear the order of the blocks' calls, which FSDP notes for a backward pass that a reference never has."""
    assert isinstance(unet, FSDPModule)
    unet.reset_iter_state()


def parts(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """This process's parts of sharded weights, as parameters of their own in the same memory."""
    return [torch.nn.Parameter(part(weight.detach())) for weight in unet.parameters()]


def part(value: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    assert isinstance(value, DTensor)
    return value.to_local()


def move_gradients(unet: UNet2DConditionModel, own: list[Tensor]) -> None:
    """Take the gradients of sharded weights over to `parts` of them, where the optimizer finds them."""
    for weight, mine in zip(unet.parameters(), own, strict=True):
        mine.grad, weight.grad = None if weight.grad is None else part(weight.grad), None


def whole(value: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor that all processes hold parts of; `value` itself where it is not sharded. like: the sharded tensor
    that `value` is this process's part of a companion of, such as a moment of its gradient. To be called by all."""
    if like is not None:
        assert isinstance(like, DTensor)
        value = DTensor.from_local(
            value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as the sharded `like` is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered(weights: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, by name, in the memory of the CPU of a process that keeps them, and none for another. All must
    call this: one tensor at a time is whole on the device."""
    found = {}
    for name, value in weights.items():
        complete = whole(value)
        if keep:
            found[name] = complete.cpu()
    return found


def unet_of(unet: UNet2DConditionModel, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A network like the sharded `unet` that is whole, with these weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    assert isinstance(copy, UNet2DConditionModel)  # and not also the arguments that it did not use
    copy.load_state_dict(weights, assign=True)
    return copy


def gathered_optimizer(state: dict[str, Any], weights: list[Tensor], keep: bool) -> dict[str, Any]:
    """An optimizer's `state_dict` over `parts(weights)` with whole tensors in the CPU's memory; empty for a process
    that does not keep it. All must call this."""
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        moments[number] = {}
        for name, value in values.items():
            complete = whole(value, weights[number]) if _is_companion(value) else value
            if keep:
                moments[number][name] = complete.cpu() if isinstance(complete, Tensor) else complete
    return {**state, "state": moments} if keep else {}


def cut_optimizer(state: dict[str, Any], weights: list[Tensor]) -> dict[str, Any]:
    """Back again: of every whole tensor the part that this process holds of its weight."""
    cut = {
        number: {
            name: part_of(value, weights[number]) if _is_companion(value) else value for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": cut}


def _is_companion(value: Any) -> bool:
    """Whether a value in an optimizer's state has an element for each of the weight's, as AdamW's moments have, and is
    no count."""
    return isinstance(value, Tensor) and value.ndim > 0
