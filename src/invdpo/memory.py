"""What a training takes of a device's memory, and what to lower where that is more than there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from invdpo.config import TrainingConfig
from invdpo.machine import GB

if TYPE_CHECKING:
    from invdpo.config import ArmConfig
    from invdpo.cost import Held

CUDA_CONTEXT = 1.0e9  # bytes: the driver's and the libraries' own
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.02}  # a trained parameter
LORA_SHARE = 0.01  # of the parameters, at most, for ranks up to 16 in the attention layers
SUMMED = 2 * 4 * 2**25  # bytes: a bucket of gradients that processes sum, and its place in the network (training.ranks)


@dataclass(frozen=True)
class Denoiser:
    """Sizes of a UNet at a resolution; see `invdpo.network_size.denoiser`."""

    unet_parameters: float
    gathered_parameters: float
    graph_bytes: float
    checkpointed_bytes: float
    forward_bytes: float


@dataclass(frozen=True)
class Way:
    """A change of `training`, in words and as the settings it changes. another: whether it makes another study."""

    words: str
    settings: dict[str, Any]
    another: bool = False


def is_sharded(arm: ArmConfig) -> bool:
    """Whether the arm's processes hold parts of its networks (`training.shards`)."""
    return arm.training.shard and arm.training.processes > 1


def training_memory(arm: ArmConfig, unet: Denoiser, alive: Held, kind: str) -> float:
    """Bytes on one device while the arm trains. alive: see `invdpo.cost.held`."""
    training, recipe, parameters = arm.training, arm.recipe, unet.unet_parameters
    sharded, mixed = is_sharded(arm), _is_mixed(arm, kind)
    each = unet.checkpointed_bytes if training.gradient_checkpointing else unet.graph_bytes
    working = alive.latents * each * (1 if mixed else 2)
    if mixed and training.gradient_checkpointing:
        # Autocast keeps a call's weights in half precision, of a sharded network a block's.
        working += 2 * (unet.gathered_parameters if sharded else parameters)
    elif mixed:
        working += 2 * parameters * alive.calls  # which every graph that is alive has for itself
    if training.reference_offload and recipe.calls_reference:
        working = max(working, _reference_copy(arm, parameters, kind) or 4 * parameters)  # it comes before the graph
    gradients = 4 * alive.gradients * _trained(arm, parameters)
    if sharded:
        # A block's weights, and in the backward pass their gradients before they are cut.
        working += 2 * 4 * unet.gathered_parameters
        gradients /= training.processes
    summed = SUMMED if training.processes > 1 and not sharded else 0
    return weights_memory(arm, unet, kind) + gradients + working + summed


def weights_memory(arm: ArmConfig, unet: Denoiser, kind: str) -> float:
    """Bytes on one device of weights and the optimizer's state, CUDA's own included."""
    training, parameters = arm.training, unet.unet_parameters
    trained = _trained(arm, parameters)
    copy = _reference_copy(arm, parameters, kind)
    weights = 8 * parameters + copy  # policy and base
    if training.lora is not None:
        weights = 4 * parameters + 4 * trained + copy
    elif training.reference_offload:
        weights = 4 * parameters
    held = weights + OPTIMIZER_BYTES[training.optimizer] * trained
    parts = training.processes if is_sharded(arm) else 1
    return held / parts + (CUDA_CONTEXT if kind == "gpu" else 0)


def _is_mixed(arm: ArmConfig, kind: str) -> bool:
    """Whether passes are in half precision over fp32 weights."""
    return kind == "gpu" and arm.identity["precision"] != "fp32"


def _trained(arm: ArmConfig, parameters: float) -> float:
    return parameters if arm.training.lora is None else LORA_SHARE * parameters


def _reference_copy(arm: ArmConfig, parameters: float, kind: str) -> float:
    """Bytes of the base in the reference's own type, where that is not fp32; a CPU only rounds it."""
    if arm.recipe.reference_dtype == "float32":
        return 0.0
    return (2 if kind == "gpu" else 4) * parameters


def remedies(arm: ArmConfig, unet: Denoiser, kind: str = "gpu", before_steps: bool = False) -> Iterator[str]:
    """Settings of an arm that lower what it takes of a device's memory, with the GB that it then takes: the one that
    lowers it most first, and those that make another study of it last. What would lower nothing is not named.

    before_steps: where the weights and the optimizer alone do not fit.
    """
    from invdpo.cost import held

    def memory(changed: ArmConfig, network: Denoiser) -> float:
        if before_steps:
            return weights_memory(changed, network, kind)
        return training_memory(changed, network, held(changed), kind)

    now, found = memory(arm, unet), []
    for way in _ways(arm, held(arm).latents):
        resolution = way.settings.get("resolution", arm.training.resolution)
        then = memory(_changed(arm, way.settings), scaled(unet, (resolution / arm.training.resolution) ** 2))
        if then < now:
            found.append((way.another, then, f"{way.words}: about {then / GB:.3g} GB"))
    for _, _, words in sorted(found):
        yield words
    if not found:
        yield "a larger GPU"


def scaled(unet: Denoiser, pixels: float) -> Denoiser:
    """The same for images of so many times the pixels: activations grow as they do."""
    names = ("graph_bytes", "checkpointed_bytes", "forward_bytes")
    return replace(unet, **{name: pixels * getattr(unet, name) for name in names})


def _changed(arm: ArmConfig, settings: dict[str, Any]) -> ArmConfig:
    training = TrainingConfig.model_validate(arm.training.model_dump() | settings)
    return arm.model_copy(update={"training": training})


def _ways(arm: ArmConfig, latents: int) -> Iterator[Way]:
    """What an arm could do otherwise, as far as its settings go together. latents: whose graph is alive at once."""
    training, recipe = arm.training, arm.recipe
    processes, sharded = training.processes, training.shard
    share, pairs = training.batch // processes, training.pairs_a_pass(processes)
    if pairs > 1 and recipe.loss.kind != "kto":
        fewer = max(count for count in range(1, pairs) if share % count == 0)
        yield Way(f"`training.micro_batch: {fewer}` (now {pairs})", {"micro_batch": fewer})
    if latents > 1:
        yield Way(f"`training.chunk: {latents // 2}` (now {training.chunk})", {"chunk": latents // 2})
    if not training.gradient_checkpointing:
        yield Way("`training.gradient_checkpointing: true`", {"gradient_checkpointing": True})
    whole = training.lora is None and not sharded
    if whole and not training.reference_offload:
        yield Way("`training.reference_offload: true`", {"reference_offload": True})
    if whole and training.optimizer != "adafactor":
        yield Way("`training.optimizer: adafactor`", {"optimizer": "adafactor"})
    if whole and processes > 1 and training.optimizer == "adamw" and recipe.log_ratio.form != "likelihood":
        alone = [name for name in ("reference_offload", "channels_last", "compile") if getattr(training, name)]
        without = f" without {', '.join(f'`{name}`' for name in alone)}" if alone else ""
        yield Way(f"`training.shard: true`{without}", {"shard": True} | dict.fromkeys(alone, False))
    if sharded and (more := _more_processes(training)):
        yield Way(f"`training.processes: {more}` (now {processes})", {"processes": more})
    half = training.resolution // 2
    words = f"`training.resolution: {half}` (now {training.resolution}), for the whole study"
    yield Way(words, {"resolution": half}, another=True)
    if training.lora is None and arm.initial_rounding is None:
        changes = {"lora": {"rank": 4}, "shard": False, "reference_offload": False}
        yield Way("`training.lora: {rank: 4}`, which is another method", changes, another=True)


def _more_processes(training: TrainingConfig) -> int | None:
    """The next larger number of processes that can share the batch; None where there is none."""
    batch, pairs = training.batch, training.micro_batch or 1
    sizes = (size for size in range(training.processes + 1, batch + 1) if batch % (size * pairs) == 0)
    return next(sizes, None)
