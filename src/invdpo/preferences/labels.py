"""The label controls: the same pairs with the winner drawn by a coin, or with winner and loser exchanged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def flips(labels: Literal["true", "shuffled", "swapped"], pairs: int, seed: int) -> Tensor:
    """(pairs,) bool: which pairs exchange winner and loser.

    `shuffled` flips each pair by a fair coin of the seed, once for the whole run: a label that carries
    nothing.
    """
    if labels == "true":
        return torch.zeros(pairs, dtype=torch.bool)
    if labels == "swapped":
        return torch.ones(pairs, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(pairs, generator=generator) < 0.5
