"""The preference-loss slot: pure functions of what was measured on winners and losers, each (B,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(
    difference: Tensor, beta: float, label_smoothing: float = 0.0, margin: float = 0.0, strength: Tensor | None = None
) -> Tensor:
    """DPO's loss of each pair, from its log-ratios' difference, winner minus loser (any shape): Rafailov et al. 2023,
    Eq. 7.

    With smoothing, the expectation under labels that are wrong that often (Mitchell 2023, conservative DPO). With
    strength, beta is multiplied by it: SmPO's smoothed preference, beta (2 alpha - gamma) in its Eq. 9.
    """
    s = beta * difference if strength is None else beta * strength.to(difference) * difference
    s = s - margin
    return -(1 - label_smoothing) * F.logsigmoid(s) - label_smoothing * F.logsigmoid(-s)


def kto(better: Tensor, worse: Tensor, beta: float, positive_share: float) -> Tensor:
    """Diffusion-KTO's 1 - utility of log-ratios (B,) of liked and of disliked images, 0-d
    (train_kto_sd_v1.5.py:1451-1509).

    Both halves are measured from one zero point: the batch's mean log-ratio, at least 0 and without gradient. Weighting
    the halves by positive_share is, in expectation, drawing images with that share of liked ones, as the code does.
    """
    zero = positive_share * better.detach().mean() + (1 - positive_share) * worse.detach().mean()
    zero = zero.clamp(min=0)
    liked = 1 - torch.sigmoid(beta * (better - zero))
    disliked = 1 - torch.sigmoid(-beta * (worse - zero))
    return positive_share * liked.mean() + (1 - positive_share) * disliked.mean()


def bounded_link(error: Tensor, scale: float) -> Tensor:
    """g(L) = s L / (e^(s L) - 1) of a positive error (any shape): 1 where it vanishes, falling to 0 as it grows."""
    x = scale * error
    # e^-x in place of e^x: nothing overflows.
    return -x * torch.exp(-x) / torch.expm1(-x)


def mapo(better: Tensor, worse: Tensor, beta: float, link_scale: float, margin_scale: float) -> Tensor:
    """MaPO's loss of each pair from its denoising errors L (B,): L_w - beta log sigmoid(T (g(L_w) - g(L_l)))
    (utils.py:286-303). g falls with L, so the margin is positive where the winner is denoised better.
    """
    margin = bounded_link(better, link_scale) - bounded_link(worse, link_scale)
    return better - beta * F.logsigmoid(margin_scale * margin)


def dspo(difference: Tensor, error: Tensor, reference_error: Tensor, distance: Tensor, beta: float) -> Tensor:
    """DSPO's regression of each pair's winner, |(e - y) - c (e - e_ref)|^2 with c = beta sigmoid(-beta difference)
    (train.py:1159-1169, its SD1.5 branch), from the winner's |e - y|^2, |e_ref - y|^2 and |e - e_ref|^2, each (B,).

    The expansion needs no vectors: |(1 - c) a + c b|^2 = (1 - c) |a|^2 + c |b|^2 - c (1 - c) |a - b|^2. As in the
    released code, c carries a gradient, through which alone the loser has a part.
    """
    c = beta * torch.sigmoid(-beta * difference)
    return (1 - c) * error + c * reference_error - c * (1 - c) * distance
