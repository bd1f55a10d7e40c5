"""How well inversion and sampling agree: the assumption that the paper shows by pictures (Fig. S9) and names as its
limitation when the steps are few (S14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion.round_trip import rms, round_trip
from invdpo.inversion.solver import Label
from invdpo.inversion.trajectory import Trajectory, checked_solver
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel

# latents (B,C,H,W) of all pictures, in their order -> score name -> (B,)
Scored = Callable[[Tensor], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class InversionErrors:
    """errors: one row a solver, N, guidance scale and latent, with columns solver, label, steps, guidance_scale,
    latent (its index), unet_evals (of the inversion of that latent), rms_error (round trip), terminal_second_moment
    (mean of x_T^2, 1 for a standard normal) and terminal_norm_z (standard deviations of |x_T|^2 from what a standard
    normal of d elements has: (|x_T|^2 - d) / sqrt(2 d)). With scores one more each, NAME_change: that of the picture
    returned minus that of the picture inverted, nan where there is none.

    levels: one row a solver, N, guidance scale and level 0..N, with columns solver, label, steps, guidance_scale,
    level, timestep (-1 for the clean level) and rms_difference of the inversion's latents and the sampling's there,
    over all latents.
    """

    errors: pd.DataFrame
    levels: pd.DataFrame


@dataclass(frozen=True)
class SideBySide:
    """inversion, sampling (K,B,C,H,W): latents of both ways at K levels, x_0 first; timesteps (K,), -1 where clean."""

    inversion: Tensor
    sampling: Tensor
    timesteps: Tensor


def inversion_errors(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    solvers: Sequence[str],
    steps: Sequence[int],
    guidance_scales: Sequence[float] = (1.0,),
    scored: Scored | None = None,
) -> InversionErrors:
    """Every solver, under its own label (its first), at every N of `steps` and guidance scale, on x0 (B,C,H,W).

    The sampling back is guided as the inversion is. Raises InvdpoError as `invert` does.
    """
    errors, levels = [], []
    before = scored(x0) if scored else {}
    for solver in solvers:
        label = _own_label(solver)
        for n in steps:
            for scale in guidance_scales:
                there, back = round_trip(eps_model, x0, cond, schedule, n, solver, scale, label)
                run = {"solver": solver, "label": label, "steps": n, "guidance_scale": scale}
                after = scored(back.latents[0]) if scored else {}
                changes = {f"{name}_change": after[name] - before[name] for name in before}
                errors.append(pd.DataFrame({**run, **_per_latent(there, back), **changes}))
                levels.append(pd.DataFrame({**run, **_per_level(there, back)}))
    return InversionErrors(pd.concat(errors, ignore_index=True), pd.concat(levels, ignore_index=True))


def side_by_side(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    solver: str,
    steps: int,
    columns: int,
    guidance_scale: float = 1.0,
) -> SideBySide:
    """The latents of x0 (B,C,H,W) on the way there and back, at `columns` levels spread evenly from x_0 to x_T.

    Raises InvdpoError as `invert` does, and for fewer than 2 or more than steps + 1 columns.
    """
    if not 2 <= columns <= steps + 1:
        raise InvdpoError(f"side_by_side: columns is {columns}; {steps} steps have levels for 2 to {steps + 1} columns")
    there, back = round_trip(eps_model, x0, cond, schedule, steps, solver, guidance_scale, _own_label(solver))
    at = torch.linspace(0, steps, columns, dtype=torch.float64, device=x0.device).round().long()
    return SideBySide(there.latents[at], back.latents[at], _timesteps(there)[at])


def _own_label(solver: str) -> Label:
    return checked_solver(solver).labels[0]


def _per_latent(there: Trajectory, back: Trajectory) -> dict[str, object]:
    x0, x_T = there.latents[0], widen(there.latents[-1]).flatten(1)
    size = x_T.shape[1]
    return {
        "latent": range(len(x0)),
        "unet_evals": there.unet_evals // len(x0),
        "rms_error": rms(back.latents[0] - x0).tolist(),
        "terminal_second_moment": x_T.square().mean(dim=1).tolist(),
        "terminal_norm_z": ((x_T.square().sum(dim=1) - size) / (2 * size) ** 0.5).tolist(),
    }


def _per_level(there: Trajectory, back: Trajectory) -> dict[str, object]:
    # A level's samples all count alike, so the root mean square over them is one over all their elements.
    difference = rms(there.latents - back.latents)
    return {
        "level": range(len(difference)),
        "timestep": _timesteps(there).tolist(),
        "rms_difference": difference.tolist(),
    }


def _timesteps(trajectory: Trajectory) -> Tensor:
    """(N+1,) of every latent of a trajectory; -1 is the clean level."""
    return torch.cat([trajectory.timesteps.new_tensor([-1]), trajectory.timesteps])
