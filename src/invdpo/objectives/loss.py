"""The log-ratio and preference-loss slots, and the loss as one differentiable graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import guided, invert
from invdpo.inversion.cache import Inverter
from invdpo.inversion.guidance import evaluations
from invdpo.objectives import pair_losses
from invdpo.objectives.likelihood import LogRatios, log_ratios
from invdpo.objectives.points import Points, as_list, comparison_guidance, make_points, predict
from invdpo.objectives.recipe import Recipe
from invdpo.schedule import NoiseSchedule, widen
from invdpo.types import Conditioning, EpsModel, concatenate, select


@dataclass(frozen=True)
class LossOutput:
    """loss: 0-d mean over pairs. logratio_win, logratio_lose (B,): the surrogate log p_theta - log p_ref before beta
    of the images passed as winners and losers, whatever the recipe reverses (minus the denoising error where the
    recipe has no reference; lose is None for winner-only losses). unet_evals: a forward pass of one latent counts 1,
    its backward pass 2 more."""

    loss: Tensor
    logratio_win: Tensor
    logratio_lose: Tensor | None
    unet_evals: int


@dataclass(frozen=True)
class Compared:
    """B pairs, R latents, and how their log-ratios make a loss. strength (B,): where the recipe weights by it."""

    recipe: Recipe
    pairs: int
    rows: int
    strength: Tensor | None


@dataclass(frozen=True)
class Batch(Compared):
    """The same with all that an evaluation of an objective needs: the points, and the networks as compared."""

    policy: EpsModel
    reference: EpsModel
    cond: Conditioning | None
    points: Points

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
    strength: Tensor | None,
    cond_lose: Conditioning | None,
    inverter: Inverter = invert,
    reference_first: bool = False,
) -> Batch:
    """Every draw and every network call that needs no gradient; with reference_first all of the reference's."""
    compared, reference, x0, cond, schedule = _checked(
        recipe, reference, x0_win, x0_lose, cond, schedule, strength, cond_lose
    )
    generators = as_list(generator, compared.pairs)
    points = make_points(recipe, policy, reference, x0, cond, schedule, generators, chunk, inverter)
    guidance = comparison_guidance(recipe)
    if guidance == 1 and cond is not None:
        cond = cond.without_uncond()
    networks = guided(policy, guidance), guided(reference, guidance)
    if reference_first and recipe.log_ratio.form == "four_term" and points.reference is None:
        known, evals = predict(networks[1], points, points.calls, cond, len(x0))
        points = replace(points, reference=known, unet_evals=points.unet_evals + evals * evaluations(guidance))
    return Batch(recipe, compared.pairs, len(x0), compared.strength, *networks, cond, points)


def prepare_likelihood(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generator: torch.Generator | Sequence[torch.Generator],
    chunk: int | None,
    strength: Tensor | None,
    cond_lose: Conditioning | None,
) -> tuple[Compared, LogRatios]:
    """The same for log_ratio.form `likelihood`, whose networks are compared by whole trajectories and at no point."""
    compared, reference, x0, cond, schedule = _checked(
        recipe, reference, x0_win, x0_lose, cond, schedule, strength, cond_lose
    )
    generators = as_list(generator, compared.pairs)
    return compared, log_ratios(recipe, policy, reference, x0, cond, schedule, generators, chunk)


def _checked(
    recipe: Recipe,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    strength: Tensor | None,
    cond_lose: Conditioning | None,
) -> tuple[Compared, EpsModel, Tensor, Conditioning | None, NoiseSchedule]:
    """The pairs, the reference as it is told timesteps, x0 and cond of R rows, and the schedule of the recipe."""
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
    strength = _checked_strength(strength, pairs, recipe.name) if recipe.loss.weight_by_strength else None
    reference = _told_in(recipe.reference_label_dtype, reference)
    schedule = schedule.to(x0.device)
    if recipe.trajectory.steps_offset is not None:
        schedule = schedule.with_offset(recipe.trajectory.steps_offset)
    if recipe.trajectory.guidance_scale == 1 and cond is not None:
        cond = cond.without_uncond()
    if recipe.loss.kind != "winner_only":
        cond = concatenate(cond, cond if cond_lose is None else cond_lose)
    return Compared(recipe, pairs, len(x0), strength), reference, x0, cond, schedule


def _checked_strength(strength: Tensor | None, pairs: int, name: str) -> Tensor:
    if strength is None:
        raise InvdpoError(
            f"recipe {name!r}: loss.weight_by_strength needs the pairs' preference strengths: pass `strength`, (B,) "
            "values 2p - 1 in [-1, 1] (1 for a plain winner), or set loss.weight_by_strength to false"
        )
    if strength.shape != (pairs,) or not bool((strength.abs() <= 1).all()):
        raise InvdpoError(
            f"recipe {name!r}: strength must be {pairs} numbers in [-1, 1], one a pair, got shape "
            f"{tuple(strength.shape)} and {strength.flatten()[:8].tolist()}"
        )
    return strength


def _told_in(dtype: str, eps_model: EpsModel) -> EpsModel:
    """The model told every timestep rounded to `dtype`, as `t.to(unet_dtype)` does (train_ddim.py:420)."""
    if dtype == "float32":
        return eps_model

    def model(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        return eps_model(x, t.to(getattr(torch, dtype)).to(t.dtype), cond)

    return model


def squared_error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """|prediction - target|^2 of (n,C,H,W), summed or averaged over a latent's elements, (n,), at least float32."""
    squares = (widen(prediction) - widen(target)).square().flatten(1)
    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)


def terms(batch: Batch, call: slice, with_reference: bool = True) -> Tensor:
    """The unweighted terms of each point in `call`, (S,n), differentiable in the policy. Row 0 is the log-ratio's; DSPO
    adds the policy's error, the reference's, and the distance between the two predictions.

    with_reference=False leaves the reference's share out of the log-ratio: a constant, which no gradient needs.
    """
    spec, points = batch.recipe.log_ratio, batch.points
    x, t, target = points.x[call], points.t[call], points.target[call]
    cond = select(batch.cond, torch.arange(call.start, call.stop) % batch.rows)
    prediction = batch.policy(x, t, cond)
    error = squared_error(prediction, target, spec.reduction)
    if batch.recipe.loss.kind == "dspo":
        assert points.reference is not None  # made with the points
        reference_error = squared_error(points.reference[call], target, spec.reduction)
        distance = squared_error(prediction, points.reference[call], spec.reduction)
        return torch.stack([spec.scale * (reference_error - error), error, reference_error, distance])
    ratio = error if spec.form == "two_term" and spec.sign == "+" else -error
    if spec.form == "four_term" and with_reference:
        with torch.no_grad():
            known = points.reference
            eps_ref = batch.reference(x, t, cond) if known is None else known[call]
            reference_error = squared_error(eps_ref, target, spec.reduction)
        ratio = ratio + reference_error
    return (spec.scale * ratio)[None]


def measure(batch: Batch, point_terms: Tensor) -> Tensor:
    """What the loss is a function of, (S,R): the terms (S,K*R) summed over each latent's points; row 0 holds the
    log-ratios."""
    weight = batch.points.weight.to(point_terms.dtype)
    weighted = weight * point_terms.view(-1, *weight.shape)
    # Winners and losers summed apart: a vectorised sum rounds by column, and swapping labels must swap exactly.
    return torch.cat([part.contiguous().sum(dim=1) for part in weighted.split(batch.pairs, dim=2)], dim=1)


def output(batch: Compared, measured: Tensor, unet_evals: int) -> LossOutput:
    """The loss and what is logged beside it, from what `measure` gave (S,R), log-ratios first."""
    spec, beta = batch.recipe.loss, batch.recipe.beta
    if spec.kind == "winner_only":
        return LossOutput(-measured[0].mean(), measured[0], None, unet_evals)
    win, lose = measured[:, : batch.pairs], measured[:, batch.pairs :]
    better, worse = (lose, win) if spec.reversed else (win, lose)
    if spec.kind == "kto":
        assert spec.positive_share is not None  # the recipe is valid
        loss = pair_losses.kto(better[0], worse[0], beta, spec.positive_share)
    elif spec.kind == "mapo":
        assert spec.link_scale is not None and spec.margin_scale is not None
        loss = pair_losses.mapo(-better[0], -worse[0], beta, spec.link_scale, spec.margin_scale)
    elif spec.kind == "dspo":
        loss = pair_losses.dspo(better[0] - worse[0], better[1], better[2], better[3], beta)
    else:
        loss = pair_losses.dpo(better[0] - worse[0], beta, spec.label_smoothing, spec.margin, batch.strength)
    return LossOutput(loss.mean(), win[0], lose[0], unet_evals)


def preference_loss(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generator: torch.Generator | Sequence[torch.Generator],
    strength: Tensor | None = None,
    cond_lose: Conditioning | None = None,
) -> LossOutput:
    """The recipe's loss on B pairs of clean latents (B,C,H,W), differentiable in whatever the policy depends on.

    cond has B rows (a pair shares its prompt). generator: one, or one a pair. strength: (B,) in [-1, 1], 2p - 1 for a
    probability p that the winner is the better one, 1 for a plain winner; used where loss.weight_by_strength says so.
    cond_lose: what the losers are conditioned on where that is not `cond` (SDXL is told the size of every image).
    Keeps the graph of every point alive; `backward` gives the same gradient in constant memory. `unet_evals` counts the
    passes made here only: forward ones, and for log_ratio.form `likelihood` the vector-Jacobian products of its values.
    The networks must accept x0's dtype; their predictions may come in another.

    Timesteps `single` and `subset` make each log-ratio, and so the loss's argument s, an unbiased estimate s' of the
    value at `all`. The loss L of s' is then biased (Jensen's inequality), to leading order by L''(s) Var(s') / 2, which
    is positive for DPO's -log sigmoid, and its gradient by the gradient of that term,
    L''(s) Cov(s', grad s') + L'''(s) Var(s') grad s / 2. With K of N timesteps, Var(s') is (1 - K/N) / K times the
    variance (N - 1 in its denominator) of s' at one timestep: both biases vanish as K goes to N.

    Raises InvdpoError for winners and losers that are not alike, strengths that are missing or out of range, generators
    that are not one a pair, guidance without `cond.uncond`, a non-finite inversion, or a step of it that has no
    log-determinant where the recipe needs that.
    """
    arguments = (recipe, policy, reference, x0_win, x0_lose, cond, schedule, generator, None, strength, cond_lose)
    if recipe.log_ratio.form == "likelihood":
        compared, ratios = prepare_likelihood(*arguments)
        values, evals = ratios.with_graph()
        return output(compared, values[None], ratios.unet_evals + evals)
    return full_graph(prepare(*arguments))


def full_graph(batch: Batch) -> LossOutput:
    """The loss with every point's graph alive."""
    point_terms = torch.cat([terms(batch, call) for call in batch.points.calls], dim=1)
    evals = batch.points.unet_evals + batch.policy_evals() + batch.reference_evals()
    return output(batch, measure(batch, point_terms), evals)
