"""Fixed-point inversion: x_t solves x_t = inverse-step(x_{t-1}, eps(x_t, t)), so that the DDIM sampling step from it
leads to x_{t-1} (AIDI, Pan et al. 2023, arXiv:2309.04907)."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.inversion import ddim
from invdpo.inversion.solver import Solver, State, predict
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel


def solver(calls: int) -> Solver:
    """The inverter that spends `calls` network calls on a step: one at x_{t-1}, told `trajectory.label`, for the first
    estimate of x_t, and the others at estimates, told t.

    The iteration is Anderson-accelerated with one step of memory (AIDI's accelerated form): it takes the point on the
    line through the last two iterates at which a linear map would have the smallest residual. The number of calls is
    fixed, so that a sample's result does not depend on its batch; `round_trip.step_residual` tells how far it got.
    Strong guidance, or steps too few, can keep the iteration from contracting, and then it does not converge.

    The eps of a step is the one that DDIM needs from x_{t-1} to the x_t returned, so a DDIM step with it leads back
    exactly; at the fixed point it is eps(x_t, t).
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
        # An iterate is an eps: x_t is affine in it, and the step's eps needs no division by a coefficient that is
        # zero in an identity step.
        image = predict(eps_model, x, label, cond)
        eps, last = image, None
        for _ in range(calls - 1):
            image = predict(eps_model, schedule.ddim_inverse_step(x, eps, t_prev, t), t, cond)
            residual = widen(image) - widen(eps)
            eps, last = _accelerate(image, residual, last), (image, residual)
        return (schedule.ddim_inverse_step(x, eps, t_prev, t),), eps

    return Solver("fixed_point", step, ddim.back, calls=calls, calls_back=1)


def _accelerate(image: Tensor, residual: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
    """Anderson's next iterate (B,C,H,W) from image = g(iterate), residual = image - iterate and those of the last."""
    if last is None:
        return image
    change = residual - last[1]
    square = change.square().flatten(1).sum(dim=1)
    mix = torch.where(square > 0, (change * residual).flatten(1).sum(dim=1) / square, 0)
    mix = mix.reshape(-1, *[1] * (image.ndim - 1))
    return (widen(image) - mix * (widen(image) - widen(last[0]))).to(image.dtype)


# Five calls are this study's choice: on the shapes base they leave a fortieth of DDIM inversion's round-trip error at
# N = 40 without guidance, and each three calls more divide it by four.
SOLVER = solver(calls=5)
