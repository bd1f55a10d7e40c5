"""Exactly invertible sampling by two coupled latents: EDICT (Wallace et al. 2022, arXiv:2211.12446).

Each latent of the pair moves by the prediction at the other, so that either direction can be undone, whatever the
network is: inversion followed by sampling returns x_0 up to rounding.
"""

from __future__ import annotations

from torch import Tensor

from invdpo.inversion.solver import Solver, State, predict
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel

# Weight of a latent's own value in the mixing that keeps the pair together: "mix_weight=0.93" in the released code.
# Sampling draws the pair together by it, and inversion drives it apart, by up to 1/0.93^2 a step.
MIX = 0.93


def step(
    eps_model: EpsModel,
    state: State,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t_prev: int,
    t: int,
    label: int,
) -> tuple[State, Tensor]:
    """From the pair at t-1 to the pair at t.

    The eps returned is the prediction that moved the first latent. Mixing comes on top of it, so a DDIM step with it
    does not lead back to x_{t-1}.
    """
    x, y = _unmixed(*state)
    if _first_moves_last(t_prev, t):
        y = schedule.ddim_inverse_step(y, predict(eps_model, x, label, cond), t_prev, t)
        eps = predict(eps_model, y, t, cond)
        return (schedule.ddim_inverse_step(x, eps, t_prev, t), y), eps
    eps = predict(eps_model, y, label, cond)
    x = schedule.ddim_inverse_step(x, eps, t_prev, t)
    return (x, schedule.ddim_inverse_step(y, predict(eps_model, x, t, cond), t_prev, t)), eps


def back(
    eps_model: EpsModel,
    state: State,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t: int,
    t_prev: int,
) -> tuple[State, Tensor]:
    """From the pair at t to the pair at t-1, the inverse of `step`."""
    x, y = state
    if _first_moves_last(t_prev, t):
        eps = predict(eps_model, y, t, cond)
        x = schedule.ddim_step(x, eps, t, t_prev)
        y = schedule.ddim_step(y, predict(eps_model, x, t, cond), t, t_prev)
    else:
        y = schedule.ddim_step(y, predict(eps_model, x, t, cond), t, t_prev)
        eps = predict(eps_model, y, t, cond)
        x = schedule.ddim_step(x, eps, t, t_prev)
    return _mixed(x, y), eps


def _first_moves_last(t_prev: int, t: int) -> bool:
    """Whether inversion moves the second latent first: in every other step, so that neither runs ahead."""
    return t // (t - t_prev) % 2 == 0


def _mixed(x: Tensor, y: Tensor) -> State:
    mixed_x = MIX * widen(x) + (1 - MIX) * widen(y)
    return mixed_x.to(x.dtype), (MIX * widen(y) + (1 - MIX) * mixed_x).to(y.dtype)


def _unmixed(x: Tensor, y: Tensor) -> State:
    unmixed_y = (widen(y) - (1 - MIX) * widen(x)) / MIX
    return ((widen(x) - (1 - MIX) * unmixed_y) / MIX).to(x.dtype), unmixed_y.to(y.dtype)


# Only under "next" is a step told one timestep throughout, t, as its inverse is.
SOLVER = Solver("edict", step, back, calls=2, calls_back=2, labels=("next",), coupled=True)
