"""Plain DDIM inversion: the eps of one network call, held fixed over the step (Inversion-DPO Eq. 9)."""

from __future__ import annotations

from torch import Tensor

from invdpo.inversion.solver import Solver, State, predict
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel


def step(
    eps_model: EpsModel,
    state: State,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t_prev: int,
    t: int,
    label: int,
) -> tuple[State, Tensor]:
    """From x_{t-1} to x_t along eps(x_{t-1}, label)."""
    (x,) = state
    eps = predict(eps_model, x, label, cond)
    return (schedule.ddim_inverse_step(x, eps, t_prev, t),), eps


def back(
    eps_model: EpsModel,
    state: State,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t: int,
    t_prev: int,
) -> tuple[State, Tensor]:
    """From x_t to x_{t-1} along eps(x_t, t): DDIM sampling, which every inverter without a sampler of its own
    aims at."""
    (x,) = state
    eps = predict(eps_model, x, t, cond)
    return (schedule.ddim_step(x, eps, t, t_prev),), eps


SOLVER = Solver("ddim", step, back, calls=1, calls_back=1)
