"""What an inverter is: a step up the noise levels, and the sampling step that it is meant to undo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel

# Which timestep the network is told when it sees x_{t-1}: t ("next": diffusers' DDIMInverseScheduler and the
# released code, train_ddim.py:496-505) or t-1 ("previous": the paper's Eq. 9).
Label = Literal["next", "previous"]

# The latent (B,C,H,W) first, then whatever one step hands on to the next; every member has one row a sample.
State = tuple[Tensor, ...]

# (eps_model, state at t_prev, cond, schedule, t_prev, t, timestep told with x_{t-1}) -> (state at t, the step's eps)
InversionStep = Callable[
    [EpsModel, State, Conditioning | None, NoiseSchedule, int, int, int],
    tuple[State, Tensor],
]
# (eps_model, state at t, cond, schedule, t, t_prev) -> (state at t_prev, the step's eps); x_t is always told t.
SamplingStep = Callable[[EpsModel, State, Conditioning | None, NoiseSchedule, int, int], tuple[State, Tensor]]


@dataclass(frozen=True)
class Solver:
    """An inverter. step, back: its inversion and sampling step; calls, calls_back: network calls that one makes.

    labels: the `trajectory.label`s under which the inverter is what its paper defines, its own first. coupled: the
    state is a pair of latents that starts as two copies, and sampling from x_T alone does not retrace the inversion.
    """

    name: str
    step: InversionStep
    back: SamplingStep
    calls: int
    calls_back: int
    labels: tuple[Label, ...] = ("next", "previous")
    coupled: bool = False


def predict(eps_model: EpsModel, x: Tensor, t: int, cond: Conditioning | None) -> Tensor:
    """The noise (B,C,H,W) that the network predicts when it is shown x and told t, in x's dtype."""
    told = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    return eps_model(x, told, cond).to(x.dtype)
