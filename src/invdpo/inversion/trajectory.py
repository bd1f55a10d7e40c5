"""Whole trajectories from x_0 to x_T, or up to one grid point a sample."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import ddim
from invdpo.inversion.guidance import evaluations, guided
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, select

# Which timestep the network is told when it sees x_{t-1}: t ("next": diffusers' DDIMInverseScheduler and the
# released code, train_ddim.py:496-505) or t-1 ("previous": the paper's Eq. 9).
Label = Literal["next", "previous"]

SOLVERS: dict[str, ModuleType] = {"ddim": ddim}


@dataclass(frozen=True)
class Trajectory:
    """latents (N+1,B,C,H,W) from x_0 to x_T; timesteps (N,) of latents[1:]; eps (N,B,C,H,W) as used by each step."""

    latents: Tensor
    timesteps: Tensor
    eps: Tensor
    unet_evals: int


@dataclass(frozen=True)
class Arrival:
    """Where each sample stopped: latents (B,C,H,W) at timesteps (B,), and the input and eps of its last step."""

    latents: Tensor
    timesteps: Tensor
    previous: Tensor
    eps: Tensor
    unet_evals: int


@torch.no_grad()
def invert(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    solver: str = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> Trajectory:
    """The trajectory x_0 … x_T of x0 (B,C,H,W) on the grid of `steps` timesteps, without gradient, in x0's dtype.

    Raises InvdpoError for an unknown solver, an impossible number of steps, guidance without `cond.uncond`, or a
    non-finite noise prediction.
    """
    run = _solver(solver)
    model = guided(eps_model, guidance_scale)
    schedule = schedule.to(x0.device)
    grid = schedule.timesteps(steps)
    latents, eps = [x0], []
    for t_prev, t, told in plan(schedule, steps, label):
        x, e = run.step(model, latents[-1], cond, schedule, t_prev, t, told)
        latents.append(x)
        eps.append(e)
    stacked = torch.stack(eps)
    _check_finite(torch.isfinite(stacked).flatten(1).all(dim=1), grid)
    evals = steps * len(x0) * run.CALLS * evaluations(guidance_scale)
    return Trajectory(torch.stack(latents), grid, stacked, evals)


@torch.no_grad()
def invert_to(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    index: Tensor,
    steps: int,
    solver: str = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> Arrival:
    """Each sample of x0 (B,C,H,W) inverted to its own grid point index (B,) in 1..steps, then left out of the batch.

    With uniform indices this costs half of `invert` on average. Raises as `invert` does, and for an
    index outside the grid.
    """
    run = _solver(solver)
    model = guided(eps_model, guidance_scale)
    schedule = schedule.to(x0.device)
    grid = schedule.timesteps(steps)
    index = index.cpu()
    if len(index) != len(x0) or int(index.min()) < 1 or int(index.max()) > steps:
        raise InvdpoError(f"invert_to: index must be {len(x0)} integers in 1..{steps}, got {index.tolist()}")
    # Farthest first: those still under way are always the first rows.
    order = torch.argsort(index, descending=True, stable=True)
    x, cond = x0[order.to(x0.device)], select(cond, order)
    arrived, finite, evals = [], [], 0
    for i, (t_prev, t, told) in enumerate(plan(schedule, steps, label)[: int(index.max())], start=1):
        x_next, eps = run.step(model, x, cond, schedule, t_prev, t, told)
        evals += len(x) * run.CALLS * evaluations(guidance_scale)
        finite.append(torch.isfinite(eps).all())
        going = int((index > i).sum())
        arrived.append((x_next[going:], x[going:], eps[going:]))
        x, cond = x_next[:going], select(cond, torch.arange(going))
    _check_finite(torch.stack(finite), grid)
    back = torch.argsort(order).to(x0.device)
    latents, previous, eps = (torch.cat(parts[::-1])[back] for parts in zip(*arrived, strict=True))
    return Arrival(latents, grid[index.to(grid.device) - 1], previous, eps, evals)


def plan(schedule: NoiseSchedule, steps: int, label: Label) -> list[tuple[int, int, int]]:
    """One (level before, level after, timestep told to the network) a step; the clean level is told as 0."""
    grid = schedule.timesteps(steps).tolist()
    levels = [(int(schedule.previous(t, steps)), t) for t in grid]
    return [(t_prev, t, t if label == "next" else max(t_prev, 0)) for t_prev, t in levels]


def _solver(name: str) -> ModuleType:
    if name not in SOLVERS:
        raise InvdpoError(f"trajectory.solver is {name!r}; known solvers: {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name]


def _check_finite(finite: Tensor, grid: Tensor) -> None:
    """finite (n,) bool, one a step taken. Looked at once a trajectory, so that a GPU never waits between its steps."""
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise InvdpoError(
            f"trajectory: the inverting model predicted a non-finite noise in step {step + 1} (timestep "
            f"{int(grid[step])}); check its weights, use a wider reference_dtype, "
            "or a trajectory.guidance_scale nearer 1"
        )
