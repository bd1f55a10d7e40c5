"""Who is preferred: the label controls, and the strengths of a method that asks a scorer.

A control is the same pairs with the preference drawn by a coin, or reversed, whoever states it. Votes: winner and loser
exchange their latents. A scorer (SmPO): the latents are exchanged just so, and each pair keeps the strength, sign
included, that it has in the order of the votes. So `swapped` trains towards what the scorer likes less, and `shuffled`
towards a coin's choice. A strength taken from the exchanged latents would change its sign with them and undo the
control.
"""

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


def strengths(scores: Tensor, among: Tensor | None = None) -> Tensor:
    """(n,) preference strengths 2p - 1 of n pairs, from the PickScores (raw cosines) of their images (n,2), the votes'
    winner first; negative where the scorer likes the other image more, which is SmPO's relabelling.

    p is the softmax of a pair's two scores after min-max scaling (SmPO's train.py:739-747), so 2p - 1 is
    tanh((score_win - score_lose) / (2 span)), within +-0.46. The span is that of the scores `among` which the pairs
    are seen (m,2), a training set's, or else of those given: 0.2820 - 0.1154 in the released code is this quantity for
    PickScore on Pick-a-Pic, and another scorer or other images have another.
    """
    among = scores if among is None else among
    span = among.max() - among.min()
    return torch.tanh((scores[:, 0] - scores[:, 1]) / (2 * span))
