"""Optimizers and the learning-rate warm-up."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from invdpo.config import TrainingConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], training: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999), or Adafactor as both official scripts use it for SDXL: no momentum, fixed
    rate.
    """
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=training.weight_decay)
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=learning_rate,
        weight_decay=training.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def warmed_up(learning_rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 1): linear up to `warmup_steps`, constant after."""
    return learning_rate * min(1.0, step / warmup_steps) if warmup_steps else learning_rate


def distance(parameters: list[Tensor], reference: list[Tensor]) -> Tensor:
    """L2 norm of the difference of two lists of tensors, without a second copy of either."""
    return torch.linalg.vector_norm(torch.stack([torch.dist(a, b) for a, b in zip(parameters, reference, strict=True)]))
