"""Noise-schedule arithmetic: the only module that knows alpha-bar.

Notation of DDIM (Song et al. 2021, arXiv:2010.02502): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, timesteps
t in 0..T-1, and a negative timestep for the clean level that lies before the first one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invdpo.errors import InvdpoError


def widen(x: Tensor) -> Tensor:
    """The tensor in at least float32: sums and differences of half-precision predictions lose their signal."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule with DDIM's deterministic (eta = 0) steps.

    alphas_cumprod: (T,) floating, abar_t. final_alpha_cumprod: abar of the clean level. steps_offset: added to every
    timestep of a grid ("leading" spacing). num_train_timesteps: T.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    steps_offset: int
    num_train_timesteps: int

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that `DDIMScheduler.from_config(scheduler.config)` would have, for any diffusers scheduler.

        As there, a value that the scheduler's own class merely defaulted to is replaced by DDIM's default, so that
        one model folder gives one schedule whichever scheduler class it was loaded with.

        Raises InvdpoError for a model that does not predict noise, or a spacing that has no exact DDIM inverse.
        """
        defaulted = scheduler.config.get("_use_default_values", [])
        config = {key: value for key, value in scheduler.config.items() if key not in defaulted}
        prediction = config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise InvdpoError(
                f"scheduler: prediction_type is {prediction!r}, but every objective here compares predicted noise; "
                "use a base model trained with prediction_type 'epsilon'"
            )
        spacing = config.get("timestep_spacing", "leading")
        if spacing != "leading":
            raise InvdpoError(
                f"scheduler: timestep_spacing is {spacing!r}; DDIM steps by T // N, which meets the grid only with "
                "'leading': set timestep_spacing to 'leading' in the base's scheduler/scheduler_config.json"
            )
        # float64, so that the coefficients of a step carry no rounding of their own.
        alphas_cumprod = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
        if not bool(((alphas_cumprod > 0) & (alphas_cumprod <= 1)).all()):
            raise InvdpoError(
                "scheduler: alphas_cumprod leaves (0, 1] (rescale_betas_zero_snr?); at 0 a noise prediction says "
                "nothing about the image, so use a scheduler without it"
            )
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0]),
            steps_offset=int(config.get("steps_offset", 0)),
            num_train_timesteps=len(alphas_cumprod),
        )

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on `device` (a step then copies nothing between devices)."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def with_offset(self, steps_offset: int) -> NoiseSchedule:
        """The same schedule with its grids shifted to start at timestep `steps_offset`."""
        return replace(self, steps_offset=steps_offset)

    def timesteps(self, n: int) -> Tensor:
        """The grid of `n` timesteps, (n,) int64, ascending: t_1 (next to x_0) … t_n (x_T).

        "Leading" spacing plus `steps_offset`: as a set, the timesteps of diffusers' DDIMScheduler.
        """
        if not 1 <= n <= self.num_train_timesteps:
            raise InvdpoError(
                f"trajectory.steps is {n}; the schedule has {self.num_train_timesteps} timesteps, so choose 1 to "
                f"{self.num_train_timesteps}"
            )
        grid = torch.arange(n, device=self.alphas_cumprod.device) * (self.num_train_timesteps // n) + self.steps_offset
        last = (n - 1) * (self.num_train_timesteps // n) + self.steps_offset
        if last >= self.num_train_timesteps:
            raise InvdpoError(
                f"trajectory.steps is {n}: with steps_offset {self.steps_offset} the last timestep would be {last}, "
                f"outside 0..{self.num_train_timesteps - 1}; choose fewer steps or trajectory.steps_offset 0"
            )
        return grid

    def previous(self, t: Tensor | int, n: int) -> Tensor | int:
        """The level from which an `n`-step grid arrives at t; negative means the clean level."""
        return t - self.num_train_timesteps // n

    def alpha_bar(self, t: Tensor | int) -> Tensor:
        """abar at integer timesteps of any shape, of that shape, in the table's type; t < 0 is the clean level."""
        level = torch.as_tensor(t, device=self.alphas_cumprod.device if isinstance(t, int) else None)
        table = self.alphas_cumprod.to(level.device)
        return torch.where(level < 0, self.final_alpha_cumprod, table[level.clamp(min=0)])

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """q(x_t | x_0) at one noise draw: sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, (B,…); t int or (B,)."""
        a = self.alpha_bar(t)
        return _combine(a.sqrt(), x0, (1 - a).sqrt(), noise)

    def implied_noise(self, x_t: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """The noise that leads from x0 to x_t by `add_noise`: (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t), (B,…)."""
        a = self.alpha_bar(t)
        return _combine((1 - a).rsqrt(), x_t, -(a / (1 - a)).sqrt(), x0)

    def ddim_step(self, x: Tensor, eps: Tensor, t: Tensor | int, t_prev: Tensor | int) -> Tensor:
        """One deterministic sampling step (DDIM Eq. 12 with sigma = 0), from x at t to t_prev < t, (B,…)."""
        return self._move(x, eps, t, t_prev)

    def ddim_inverse_step(self, x: Tensor, eps: Tensor, t_prev: Tensor | int, t: Tensor | int) -> Tensor:
        """One inversion step (Inversion-DPO Eq. 9), from x at t_prev to t > t_prev, (B,…).

        `ddim_step` with the same eps undoes it exactly: the step's eps is what maps x_t back to x_{t-1}.
        """
        return self._move(x, eps, t_prev, t)

    def inverse_two_alpha_bar(self, t: Tensor | int) -> Tensor:
        """1 / (2 abar_t): the coefficient of Inversion-DPO Eq. S24 with sigma_t^2 set to 1 - abar_t."""
        return 1 / (2 * self.alpha_bar(t))

    def _move(self, x: Tensor, eps: Tensor, source: Tensor | int, destination: Tensor | int) -> Tensor:
        """x at level `source` carried to `destination` along the straight line that eps defines."""
        a, b = self.alpha_bar(source), self.alpha_bar(destination)
        return _combine((b / a).sqrt(), x, (1 - b).sqrt() - (b * (1 - a) / a).sqrt(), eps)


def _combine(c: Tensor, x: Tensor, d: Tensor, y: Tensor) -> Tensor:
    """c * x + d * y with one coefficient a sample, computed in at least float32, in x's type."""
    wide_x, wide_y = widen(x), widen(y)
    shape = c.shape + (1,) * (x.ndim - 1) if c.ndim else ()
    c, d = (k.to(wide_x).reshape(shape) for k in (c, d))
    return (c * wide_x + d * wide_y).to(x.dtype)
