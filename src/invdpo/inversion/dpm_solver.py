"""Second-order multistep inversion: DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2) run upwards.

Like diffusers' DPMSolverMultistepInverseScheduler, at the cost of DDIM: the second order comes from the prediction of
the step before, where a single-step solver would need a second call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.inversion.solver import Solver, State, predict
from invdpo.schedule import NoiseSchedule, widen
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
    """From x_{t-1} to x_t; the state hands on the data prediction at x_{t-1}.

    The eps returned is the one that DDIM needs for the same step, the network's own plus the second-order correction:
    a DDIM step with it leads back exactly.
    """
    x, *last = state
    prediction = predict(eps_model, x, label, cond)
    eps, data = _corrected(schedule, x, prediction, last, 2 * t_prev - t, t_prev, t)
    return (schedule.ddim_inverse_step(x, eps, t_prev, t), data), eps


def back(
    eps_model: EpsModel,
    state: State,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t: int,
    t_prev: int,
) -> tuple[State, Tensor]:
    """From x_t to x_{t-1}: DPM-Solver++(2M) sampling, first order where the clean level has no noise at all."""
    x, *last = state
    prediction = predict(eps_model, x, t, cond)
    eps, data = _corrected(schedule, x, prediction, last, 2 * t - t_prev, t, t_prev)
    return (schedule.ddim_step(x, eps, t, t_prev), data), eps


def _corrected(
    schedule: NoiseSchedule, x: Tensor, eps: Tensor, last: list[Tensor], before: int, here: int, there: int
) -> tuple[Tensor, Tensor]:
    """eps (B,C,H,W) of x at level `here`, corrected for the step to level `there`, and x's data prediction.

    last: the data prediction at level `before`, where there is one. It counts for nothing where log-SNRs give no
    finite ratio of step lengths: next to a clean level without noise, and after an identity step.
    """
    a = schedule.alpha_bar(here)
    data = (widen(x) - (1 - a).sqrt() * widen(eps)) / a.sqrt()
    if not last:
        return eps, data
    ratio = (_log_snr(schedule, there) - _log_snr(schedule, here)) / (
        _log_snr(schedule, here) - _log_snr(schedule, before)
    )
    weight = ratio / 2 * (a / (1 - a)).sqrt()
    weight = torch.where(weight.isfinite(), weight, 0)
    return (widen(eps) - weight * (data - last[0])).to(x.dtype), data


def _log_snr(schedule: NoiseSchedule, t: int) -> Tensor:
    """lambda_t = log(alpha_t / sigma_t), 0-d; infinite at a level without noise."""
    a = schedule.alpha_bar(t)
    return (a / (1 - a)).log() / 2


# Only "previous" tells the network the level of the latent it sees, without which the order is one.
SOLVER = Solver("dpm_solver", step, back, calls=1, calls_back=1, labels=("previous",))
