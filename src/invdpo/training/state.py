"""What a run needs to go on where it stopped, kept outside the run's declared outputs.

A state folder holds `state.pt` (weights, optimizer, counters; gone once the run is finished), `train.jsonl`,
`checkpoints/step000010/unet/…` (adapters as a LoRA file beside `unet`), `run.json` (finished runs only) and
`identity.json` (what the data were).
Every file is whole or absent, so a kill at any moment leaves the last good state.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.files import mirror, remove, replace_when_done, write_json
from invdpo.inversion.cache import Savings
from invdpo.training import lora, shards

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


@dataclass
class Progress:
    """Counters of a run. `loss_scale` is fp16's; `good_steps` counts steps since it last changed.

    `unet_evals` and `seconds` are what the method costs by itself, the evaluations of all processes; `savings` is what
    the trajectory cache took off.
    """

    step: int = 0
    pairs_seen: int = 0
    unet_evals: int = 0
    seconds: float = 0.0
    loss_scale: float = 1.0
    good_steps: int = 0
    savings: Savings = field(default_factory=Savings)
    rows: list[dict[str, Any]] = field(default_factory=list)


def save_state(
    folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, writes: bool = True
) -> None:
    """Write weights, optimizer and counters as one file, and the log up to here beside it.

    writes: whether this process does; of sharded weights (`shards`) all must call this.
    """
    weights, moments = trained(policy), optimizer.state_dict()
    if shards.is_sharded(policy):
        moments = shards.gathered_optimizer(moments, list(weights.values()), writes)
        weights = shards.gathered(weights, writes)
    if not writes:
        return
    content = {"policy": weights, "optimizer": moments, "progress": asdict(progress)}
    with replace_when_done(folder / "state.pt") as temporary, open(temporary, "wb") as stream:
        torch.save(content, stream)
    write_rows(folder / "train.jsonl", progress.rows)


def trained(policy: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: value.detach() for name, value in policy.named_parameters() if value.requires_grad}


def load_state(folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a stored state into the policy and the optimizer; fresh counters where nothing is stored.

    Raises InvdpoError where the file is damaged.
    """
    path = folder / "state.pt"
    if not path.is_file():
        return Progress()
    weights = trained(policy)
    cut = shards.is_sharded(policy)
    device = torch.device("cpu") if cut else next(policy.parameters()).device
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=cut)
        if cut:
            content["optimizer"] = shards.cut_optimizer(content["optimizer"], list(weights.values()))
        for name, value in weights.items():
            if cut:
                shards.part(value).copy_(shards.part_of(content["policy"][name], value))
            else:
                value.copy_(content["policy"][name])
        optimizer.load_state_dict(content["optimizer"])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InvdpoError(f"{path} cannot be resumed from ({reason}). Delete {folder} to train from zero.") from error
    progress = content["progress"]
    return Progress(**progress | {"savings": Savings(**progress["savings"])})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    with replace_when_done(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def checkpoint_folder(step: int) -> Path:
    """Where a checkpoint lies inside a run: `checkpoints/step000010`."""
    return Path("checkpoints") / f"step{step:06d}"


def save_checkpoint(
    folder: Path, policy: UNet2DConditionModel, step: int, adapted: UNet2DConditionModel | None = None
) -> None:
    """Keep the policy's weights of a step as a diffusers folder; beside it, the adapters of `adapted`."""
    with replace_when_done(folder / checkpoint_folder(step)) as temporary:
        policy.save_pretrained(temporary / "unet")
        if adapted is not None:
            lora.save(adapted, temporary)


def finish(folder: Path, run: dict[str, Any]) -> None:
    """Mark a run as finished; the optimizer, twice the size of the weights, is not needed any more."""
    write_json(folder / "run.json", run)
    remove(folder / "state.pt")


def publish(folder: Path, out: Path, steps: list[int], finished: bool) -> None:
    """Bring a run's outputs in line with its state: the log, the checkpoints in `steps`; once finished,
    run.json and the last weights as `unet/`."""
    if (folder / "train.jsonl").is_file():
        mirror(folder / "train.jsonl", out / "train.jsonl")
    for step in steps:
        if not (out / checkpoint_folder(step)).is_dir():
            mirror(folder / checkpoint_folder(step), out / checkpoint_folder(step))
    if finished:
        if steps:
            mirror(folder / checkpoint_folder(steps[-1]) / "unet", out / "unet")
        mirror(folder / "run.json", out / "run.json")
