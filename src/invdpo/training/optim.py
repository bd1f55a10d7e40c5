"""Optimizers and the learning-rate warm-up."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from invdpo.config import TrainingConfig
from invdpo.errors import InvdpoError


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], training: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999; one fused kernel on CUDA; or with its moments in 8 bits), or Adafactor as both official
    scripts use it for SDXL (train_ddim.py:803-810): no momentum, fixed rate.

    Raises InvdpoError where bitsandbytes is needed and not installed.
    """
    parameters = list(parameters)
    if training.optimizer == "adamw":
        fused = True if all(parameter.is_cuda for parameter in parameters) else None
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=training.weight_decay, fused=fused)
    if training.optimizer == "adamw_8bit":
        return _bitsandbytes().AdamW8bit(parameters, lr=learning_rate, weight_decay=training.weight_decay)
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=learning_rate,
        weight_decay=training.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise InvdpoError(
            "`training.optimizer: adamw_8bit` needs bitsandbytes, which is not installed here: `uv pip install "
            "bitsandbytes`, or take adamw, or adafactor, which keeps next to nothing beside the weights."
        ) from error


def warmed_up(learning_rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 1): linear up to `warmup_steps`, constant after."""
    return learning_rate * min(1.0, step / warmup_steps) if warmup_steps else learning_rate


def distance(parameters: list[Tensor], reference: list[Tensor]) -> Tensor:
    """L2 norm of the difference of two lists of tensors, without a second copy of either; the second may be on another
    device."""
    pairs = zip(parameters, reference, strict=True)
    return torch.linalg.vector_norm(torch.stack([torch.dist(a, b.to(a.device)) for a, b in pairs]))
