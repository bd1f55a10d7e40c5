"""Plain DDIM inversion: the eps of one network call, held fixed over the step (Inversion-DPO Eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel

# Calls of the network that one step makes.
CALLS = 1


def step(
    eps_model: EpsModel,
    x: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    t_prev: int,
    t: int,
    label: int,
) -> tuple[Tensor, Tensor]:
    """x (B,C,H,W) at level t_prev -> (x at level t, the eps used); the network is told `label`."""
    labels = torch.full((len(x),), label, dtype=torch.int64, device=x.device)
    eps = eps_model(x, labels, cond).to(x.dtype)
    return schedule.ddim_inverse_step(x, eps, t_prev, t), eps
