"""The log-ratio and preference-loss slots, and the loss as one differentiable graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import guided
from invdpo.inversion.guidance import evaluations
from invdpo.objectives.points import Points, as_list, comparison_guidance, make_points
from invdpo.objectives.recipe import Recipe
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel, select


@dataclass(frozen=True)
class LossOutput:
    """loss: 0-d mean over pairs. logratio_win, logratio_lose (B,): the surrogate log p_theta - log p_ref before beta
    (lose is None for winner-only losses). unet_evals: a forward pass of one latent counts 1, its backward pass 2
    more."""

    loss: Tensor
    logratio_win: Tensor
    logratio_lose: Tensor | None
    unet_evals: int


@dataclass(frozen=True)
class Batch:
    """What one evaluation of an objective needs: the points of B pairs, R latents, and the networks as compared."""

    recipe: Recipe
    policy: EpsModel
    reference: EpsModel
    cond: Conditioning | None
    points: Points
    pairs: int
    rows: int

    def policy_evals(self) -> int:
        """UNet evaluations of one forward pass of the policy over every point."""
        return self.points.size * evaluations(comparison_guidance(self.recipe))

    def reference_evals(self) -> int:
        """The same for the reference, which only the four-term form calls, and only where it is not known already."""
        needed = self.recipe.log_ratio.form == "four_term" and self.points.reference is None
        return self.points.size if needed else 0


def prepare(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generator: torch.Generator | Sequence[torch.Generator],
    chunk: int | None,
) -> Batch:
    """Every draw and every network call that needs no gradient."""
    pairs = len(x0_win)
    if pairs == 0:
        raise InvdpoError("preference loss: got no pair; give at least one winner and loser")
    if recipe.loss.kind == "winner_only":
        x0 = x0_win
    elif x0_lose is None or x0_lose.shape != x0_win.shape:
        got = None if x0_lose is None else tuple(x0_lose.shape)
        raise InvdpoError(f"preference loss: winners are {tuple(x0_win.shape)}, losers {got}; they must be alike")
    else:
        x0 = torch.cat([x0_win, x0_lose])
    schedule = schedule.to(x0.device)
    if recipe.trajectory.steps_offset is not None:
        schedule = schedule.with_offset(recipe.trajectory.steps_offset)
    if recipe.trajectory.guidance_scale == 1 and cond is not None:
        cond = cond.without_uncond()
    cond = select(cond, torch.arange(len(x0)) % pairs)
    points = make_points(recipe, policy, reference, x0, cond, schedule, as_list(generator, pairs), chunk)
    if comparison_guidance(recipe) == 1 and cond is not None:
        cond = cond.without_uncond()
    guidance = comparison_guidance(recipe)
    return Batch(recipe, guided(policy, guidance), guided(reference, guidance), cond, points, pairs, len(x0))


def squared_error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """|prediction - target|^2 of (n,C,H,W), summed or averaged over a latent's elements, (n,), at least float32."""
    squares = (widen(prediction) - widen(target)).square().flatten(1)
    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)


def terms(batch: Batch, call: slice, with_reference: bool = True) -> Tensor:
    """The unweighted log-ratio term of each point in `call`, (n,), differentiable in the policy.

    with_reference=False leaves the reference's share out: a constant, which no gradient needs.
    """
    spec, points = batch.recipe.log_ratio, batch.points
    x, t, target = points.x[call], points.t[call], points.target[call]
    cond = select(batch.cond, torch.arange(call.start, call.stop) % batch.rows)
    error = squared_error(batch.policy(x, t, cond), target, spec.reduction)
    if spec.form == "two_term":
        return error if spec.sign == "+" else -error
    if spec.form == "four_term" and with_reference:
        with torch.no_grad():
            known = points.reference
            eps_ref = batch.reference(x, t, cond) if known is None else known[call]
            reference_error = squared_error(eps_ref, target, spec.reduction)
        error = error - reference_error
    return -error


def log_ratios(batch: Batch, point_terms: Tensor) -> Tensor:
    """The log-ratio of each latent, (R,), from the terms (K*R,) of all its points."""
    weight = batch.points.weight.to(point_terms.dtype)
    weighted = batch.recipe.log_ratio.scale * weight * point_terms.view_as(weight)
    # Winners and losers summed apart: a vectorised sum rounds by column, and swapping labels must swap exactly.
    return torch.cat([part.contiguous().sum(dim=0) for part in weighted.split(batch.pairs, dim=1)])


def pair_loss(recipe: Recipe, difference: Tensor) -> Tensor:
    """DPO's loss of each pair, from its log-ratios' difference, winner minus loser (any shape): Rafailov et al. 2023,
    Eq. 7.

    With smoothing, the expectation under labels that are wrong that often (Mitchell 2023, conservative DPO).
    """
    s = recipe.beta * difference - recipe.loss.margin
    smoothing = recipe.loss.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(s) - smoothing * F.logsigmoid(-s)


def output(batch: Batch, ratios: Tensor, unet_evals: int) -> LossOutput:
    """The loss and what is logged beside it, from the log-ratios (R,)."""
    if batch.recipe.loss.kind == "winner_only":
        return LossOutput(-ratios.mean(), ratios, None, unet_evals)
    win, lose = ratios[: batch.pairs], ratios[batch.pairs :]
    return LossOutput(pair_loss(batch.recipe, win - lose).mean(), win, lose, unet_evals)


def preference_loss(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generator: torch.Generator | Sequence[torch.Generator],
) -> LossOutput:
    """The recipe's loss on B pairs of clean latents (B,C,H,W), differentiable in whatever the policy depends on.

    cond has B rows (a pair shares its prompt). generator: one, or one a pair. Keeps the graph of every point alive;
    `backward` gives the same gradient in constant memory. `unet_evals` counts the forward passes made here only.
    The networks must accept x0's dtype; their predictions may come in another.
    """
    batch = prepare(recipe, policy, reference, x0_win, x0_lose, cond, schedule, generator, None)
    return full_graph(batch)


def full_graph(batch: Batch) -> LossOutput:
    """The loss with every point's graph alive."""
    point_terms = torch.cat([terms(batch, call) for call in batch.points.calls])
    evals = batch.points.unet_evals + batch.policy_evals() + batch.reference_evals()
    return output(batch, log_ratios(batch, point_terms), evals)
