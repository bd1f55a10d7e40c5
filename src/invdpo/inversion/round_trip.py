"""There and back: what an inversion loses, measured by sampling from where it ended."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion.guidance import evaluations, guided
from invdpo.inversion.solver import Label, Solver, predict
from invdpo.inversion.trajectory import Trajectory, check_finite, checked_solver, invert, plan
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel


@torch.no_grad()
def sample_back(
    eps_model: EpsModel,
    x_T: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    solver: str | Solver = "ddim",
    guidance_scale: float = 1.0,
    partner: Tensor | None = None,
) -> Trajectory:
    """The deterministic sampling from x_T (B,C,H,W) that the solver inverts, without gradient, in x_T's dtype.

    DDIM for ddim, renoise and fixed_point, its own sampler for dpm_solver and edict. The result is ordered as an
    inversion's, x_0 first, so that the two compare level by level. partner: `Trajectory.partner` of an edict
    inversion; without it the pair starts as two copies of x_T, as from fresh noise. Raises InvdpoError as `invert`
    does, and for a partner that the solver has no use for.
    """
    run = checked_solver(solver)
    if partner is not None and not run.coupled:
        raise InvdpoError(f"sample_back: trajectory.solver {run.name!r} carries one latent; leave `partner` out")
    model = guided(eps_model, guidance_scale)
    schedule = schedule.to(x_T.device)
    grid = schedule.timesteps(steps)
    state = (x_T, x_T if partner is None else partner) if run.coupled else (x_T,)
    latents, eps = [x_T], []
    for t_prev, t, _ in reversed(plan(schedule, steps, "next")):
        state, e = run.back(model, state, cond, schedule, t, t_prev)
        latents.append(state[0])
        eps.append(e)
    stacked = torch.stack(eps)
    check_finite(torch.isfinite(stacked).flatten(1).all(dim=1), grid.flip(0), "sampling")
    evals = steps * len(x_T) * run.calls_back * evaluations(guidance_scale)
    return Trajectory(torch.stack(latents[::-1]), grid, stacked.flip(0), evals, partner)


def round_trip(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    solver: str | Solver = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> tuple[Trajectory, Trajectory]:
    """The inversion of x0 (B,C,H,W), and the sampling back from its x_T under the same guidance."""
    there = invert(eps_model, x0, cond, schedule, steps, solver, guidance_scale, label)
    back = sample_back(eps_model, there.latents[-1], cond, schedule, steps, solver, guidance_scale, there.partner)
    return there, back


def round_trip_error(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    solver: str | Solver = "ddim",
    guidance_scale: float = 1.0,
    label: Label = "next",
) -> Tensor:
    """(B,) root-mean-square difference of x0 (B,C,H,W) and what `round_trip` returns for it."""
    _, back = round_trip(eps_model, x0, cond, schedule, steps, solver, guidance_scale, label)
    return rms(back.latents[0] - x0)


@torch.no_grad()
def step_residual(
    eps_model: EpsModel,
    trajectory: Trajectory,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    guidance_scale: float = 1.0,
) -> Tensor:
    """(N,B) how far each step of an inversion is from the fixed point that DDIM sampling would retrace.

    The root-mean-square difference of x_t and the inversion step from x_{t-1} along eps(x_t, t): zero for a converged
    fixed_point. Costs one network call a step.
    """
    model, steps = guided(eps_model, guidance_scale), len(trajectory.timesteps)
    residuals = []
    for x_prev, x, (t_prev, t, _) in zip(
        trajectory.latents[:-1], trajectory.latents[1:], plan(schedule, steps, "next"), strict=True
    ):
        residuals.append(rms(x - schedule.ddim_inverse_step(x_prev, predict(model, x, t, cond), t_prev, t)))
    return torch.stack(residuals)


def rms(difference: Tensor) -> Tensor:
    """(B,…) -> (B,): root mean square over a sample's elements, at least float32."""
    return widen(difference).square().flatten(1).mean(dim=1).sqrt()
