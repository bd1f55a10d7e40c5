"""Whole trajectories from x_0 to x_T, or up to one grid point a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import ddim, dpm_solver, edict, fixed_point, renoise
from invdpo.inversion.guidance import evaluations, guided
from invdpo.inversion.solver import Label, Solver
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, select

SOLVERS: dict[str, Solver] = {
    "ddim": ddim.SOLVER,
    "dpm_solver": dpm_solver.SOLVER,
    "edict": edict.SOLVER,
    "fixed_point": fixed_point.SOLVER,
    "renoise": renoise.SOLVER,
}


@dataclass(frozen=True)
class Trajectory:
    """latents (N+1,B,C,H,W) from x_0 to x_T; timesteps (N,) of latents[1:]; eps (N,B,C,H,W) of each step.

    eps is what the step moved the latent along: a DDIM step with eps[i] maps latents[i+1] back to latents[i] for
    every solver but edict. It is a prediction at latents[i] for ddim alone. partner (B,C,H,W): for edict the second
    latent of the pair at x_T, without which sampling does not retrace the inversion; latents are the first.
    """

    latents: Tensor
    timesteps: Tensor
    eps: Tensor
    unet_evals: int
    partner: Tensor | None = None


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
    solver: str | Solver = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> Trajectory:
    """The trajectory x_0 … x_T of x0 (B,C,H,W) on the grid of `steps` timesteps, without gradient, in x0's dtype.

    solver: a name in SOLVERS, or a Solver built with other numbers than its default. Raises InvdpoError for an
    unknown solver, a label that the solver has no meaning for, an impossible number of steps, guidance without
    `cond.uncond`, or a non-finite noise prediction.
    """
    run = checked_solver(solver, label)
    model = guided(eps_model, guidance_scale)
    schedule = schedule.to(x0.device)
    grid = schedule.timesteps(steps)
    state = (x0, x0) if run.coupled else (x0,)
    latents, eps = [x0], []
    for t_prev, t, told in plan(schedule, steps, label):
        state, e = run.step(model, state, cond, schedule, t_prev, t, told)
        latents.append(state[0])
        eps.append(e)
    stacked = torch.stack(eps)
    check_finite(torch.isfinite(stacked).flatten(1).all(dim=1), grid, "inverting")
    evals = steps * len(x0) * run.calls * evaluations(guidance_scale)
    return Trajectory(torch.stack(latents), grid, stacked, evals, state[-1] if run.coupled else None)


@torch.no_grad()
def invert_to(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    index: Tensor,
    steps: int,
    solver: str | Solver = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> Arrival:
    """Each sample of x0 (B,C,H,W) inverted to its own grid point index (B,) in 1..steps, then left out of the batch.

    With uniform indices this costs half of `invert` on average. Raises as `invert` does, and for an
    index outside the grid.
    """
    run = checked_solver(solver, label)
    model = guided(eps_model, guidance_scale)
    schedule = schedule.to(x0.device)
    grid = schedule.timesteps(steps)
    index = index.cpu()
    if len(index) != len(x0) or int(index.min()) < 1 or int(index.max()) > steps:
        raise InvdpoError(f"invert_to: index must be {len(x0)} integers in 1..{steps}, got {index.tolist()}")
    # Farthest first: those still under way are always the first rows.
    order = torch.argsort(index, descending=True, stable=True)
    x, cond = x0[order.to(x0.device)], select(cond, order)
    state = (x, x) if run.coupled else (x,)
    arrived, finite, evals = [], [], 0
    for i, (t_prev, t, told) in enumerate(plan(schedule, steps, label)[: int(index.max())], start=1):
        x = state[0]
        state, eps = run.step(model, state, cond, schedule, t_prev, t, told)
        evals += len(x) * run.calls * evaluations(guidance_scale)
        finite.append(torch.isfinite(eps).all())
        going = int((index > i).sum())
        arrived.append((state[0][going:], x[going:], eps[going:]))
        state, cond = tuple(part[:going] for part in state), select(cond, torch.arange(going))
    check_finite(torch.stack(finite), grid, "inverting")
    back = torch.argsort(order).to(x0.device)
    latents, previous, eps = (torch.cat(parts[::-1])[back] for parts in zip(*arrived, strict=True))
    return Arrival(latents, grid[index.to(grid.device) - 1], previous, eps, evals)


def plan(schedule: NoiseSchedule, steps: int, label: Label) -> list[tuple[int, int, int]]:
    """One (level before, level after, timestep told to the network) a step; the clean level is told as 0."""
    grid = schedule.timesteps(steps).tolist()
    levels = [(int(schedule.previous(t, steps)), t) for t in grid]
    return [(t_prev, t, t if label == "next" else max(t_prev, 0)) for t_prev, t in levels]


def checked_solver(solver: str | Solver, label: Label | None = None) -> Solver:
    """The solver of that name, under that label where one is given. Raises InvdpoError where there is none such."""
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise InvdpoError(f"trajectory.solver is {solver!r}; known solvers: {', '.join(sorted(SOLVERS))}")
        solver = SOLVERS[solver]
    if label is not None and label not in solver.labels:
        known = " or ".join(repr(known) for known in solver.labels)
        raise InvdpoError(
            f"trajectory.label is {label!r}, but trajectory.solver {solver.name!r} is defined for {known} alone: set "
            f"trajectory.label to {known}, or choose another trajectory.solver"
        )
    return solver


def check_finite(finite: Tensor, grid: Tensor, model: str) -> None:
    """finite (n,) bool, one a step taken, at timesteps grid. Raises InvdpoError that names the first bad step.

    Looked at once a trajectory, so that a GPU never waits between its steps.
    """
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise InvdpoError(
            f"trajectory: the {model} model predicted a non-finite noise in step {step + 1} (timestep "
            f"{int(grid[step])}); check its weights, use a wider reference_dtype, "
            "or a trajectory.guidance_scale nearer 1"
        )
