"""ReNoise inversion (Garibi et al. 2024, arXiv:2403.14602): predictions at ever better estimates of x_t, averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.inversion import ddim
from invdpo.inversion.solver import Solver, State, predict
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel


def solver(renoisings: int, averaged: int) -> Solver:
    """The inverter that predicts at x_{t-1}, then at `renoisings` estimates of x_t, and steps from x_{t-1} along the
    mean of the last `averaged` of those renoisings + 1 predictions.

    An estimate of x_t is the inversion step along the newest prediction. The network is told one timestep throughout
    the step, whichever `trajectory.label` says: t in the paper, and in SmPO's code, under the diffusers that it pins,
    the level of x_{t-1}. The eps of a step is the mean that it took, so a DDIM step with it leads back exactly. The
    paper's two additions for editing (a loss that whitens the noise, and a correction by fresh noise) are left out.
    """

    def step(
        eps_model: EpsModel,
        state: State,
        cond: Conditioning | None,
        schedule: NoiseSchedule,
        t_prev: int,
        t: int,
        label: int,
    ) -> tuple[State, Tensor]:
        (x,) = state
        predictions = [predict(eps_model, x, label, cond)]
        for _ in range(renoisings):
            estimate = schedule.ddim_inverse_step(x, predictions[-1], t_prev, t)
            predictions.append(predict(eps_model, estimate, label, cond))
        eps = torch.stack([widen(prediction) for prediction in predictions[-averaged:]]).mean(dim=0).to(x.dtype)
        return (schedule.ddim_inverse_step(x, eps, t_prev, t),), eps

    return Solver("renoise", step, ddim.back, calls=renoisings + 1, calls_back=1)


# SmPO averages the predictions at x_{t-1} and at the first estimate of x_t (train.py:1009-1022); ReNoise's own
# examples for SD1.5 and SDXL also renoise once (num_renoise_steps = 1), and average both below timestep 250.
SOLVER = solver(renoisings=1, averaged=2)
