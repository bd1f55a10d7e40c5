"""How well an objective's surrogate captures log p_theta(x_0) - log p_ref(x_0), the ratio that DPO is about.

Inversion-DPO claims to replace the sampler's likelihood "without introducing approximation errors". A deterministic
sampler's likelihood can be computed (`invdpo.likelihood`), so the claim can be measured: the surrogate log-ratio of
each recipe against the true one, over the latents of held-out pairs and a policy that some training has made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.evidence.statistics import DRAWS, LEVEL, SEED
from invdpo.inversion import Label
from invdpo.likelihood import Divergence, log_prob
from invdpo.objectives import Recipe, preference_loss
from invdpo.preferences.order import generator
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, concatenate, select

SETTING = ["policy", "recipe", "steps", "draws"]
SIDES = ("win", "lose")


@dataclass(frozen=True)
class Pairs:
    """P held-out pairs: clean latents win, lose (P,C,H,W) and their prompts' conditioning (P rows); cond_lose: that of
    the losers where it is another one."""

    win: Tensor
    lose: Tensor
    cond: Conditioning | None
    cond_lose: Conditioning | None = None

    @property
    def both(self) -> Conditioning | None:
        """The conditioning of winners, then losers (2P rows)."""
        return concatenate(self.cond, self.cond if self.cond_lose is None else self.cond_lose)


def true_log_prob(
    eps_model: EpsModel,
    pairs: Pairs,
    schedule: NoiseSchedule,
    steps: int,
    divergence: Divergence = "exact",
    label: Label = "previous",
    probes: int = 8,
    order: int = 6,
    chunk: int = 256,
) -> Tensor:
    """log p(x_0) (2P,) float64 of the winners, then the losers, along `steps` inversion steps, without guidance; nan
    where a step folds space, so that one latent among many does not cost the others. Models called alike share
    their probes.

    label "previous", though the released code inverts with "next": see the note on labels in `invdpo.likelihood`.
    Raises as `log_prob` does.
    """
    x0, cond = torch.cat([pairs.win, pairs.lose]), pairs.both
    return log_prob(
        eps_model,
        x0,
        cond,
        schedule,
        steps,
        divergence,
        label=label,
        probes=probes,
        order=order,
        chunk=chunk,
        folded="nan",
    )


def log_ratios(
    policy_name: str,
    policy: EpsModel,
    reference: EpsModel,
    pairs: Pairs,
    schedule: NoiseSchedule,
    truth: Tensor,
    settings: Sequence[tuple[Recipe, int]],
    seed: int = 0,
    chunk: int = 256,
) -> pd.DataFrame:
    """Surrogate and true log-ratio of every latent under every setting, one row each.

    truth (2P,): `true_log_prob` of the policy minus that of the reference. settings: recipes with the number of
    independent draws (of timesteps and forward noise) that their surrogate is averaged over; the draws are functions of
    (seed, draw, pair). chunk: latents in a network call, at most where a pair's points fit. Columns: policy, recipe,
    steps (of the recipe's grid), draws, pair, side ("win" or "lose"), surrogate, truth, unet_evals (the surrogate's
    network evaluations a latent, the mean over the pairs).

    Raises InvdpoError for a recipe that has no log-ratio, and for repeated draws of one that draws nothing.
    """
    if truth.shape != (2 * len(pairs.win),):
        raise InvdpoError(
            f"truth: expected {2 * len(pairs.win)} numbers, winners then losers, got {tuple(truth.shape)}"
        )
    n = len(pairs.win)
    place = {
        "policy": policy_name,
        "pair": np.tile(np.arange(n), 2),
        "side": np.repeat(SIDES, n),
        "truth": truth.double().cpu().numpy(),
    }
    frames = []
    for recipe, draws in settings:
        values, evals = surrogate(recipe, policy, reference, pairs, schedule, draws, seed, chunk)
        setting = {"recipe": recipe.name, "steps": recipe.trajectory.steps or schedule.num_train_timesteps}
        results = {"draws": draws, "surrogate": values.cpu().numpy(), "unet_evals": evals}
        frames.append(pd.DataFrame(place | setting | results))
    columns = [*SETTING, "pair", "side", "surrogate", "truth", "unet_evals"]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)


@torch.no_grad()
def surrogate(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    pairs: Pairs,
    schedule: NoiseSchedule,
    draws: int,
    seed: int,
    chunk: int,
) -> tuple[Tensor, float]:
    """The recipe's log-ratio (2P,) float64 of winners, then losers, averaged over `draws`; UNet evaluations a latent.

    Before beta, so on the scale of the recipe: comparable with the truth by ranks and signs alone.
    """
    _check(recipe, draws)
    n = len(pairs.win)
    k = {"single": 1, "subset": recipe.subset_size, "all": recipe.trajectory.steps}[recipe.timesteps] or 1
    parts, evals = [], 0
    for rows in torch.arange(n * draws).split(max(1, chunk // (2 * k))):
        pair = rows // draws
        generators = [generator(seed, int(row) % draws, int(row) // draws, "precision") for row in rows]
        win, lose = (side[pair.to(side.device)] for side in (pairs.win, pairs.lose))
        cond, cond_lose = select(pairs.cond, pair), select(pairs.cond_lose, pair)
        strength = torch.ones(len(rows))  # of a preference; the loss may ask for it, a log-ratio never depends on it
        out = preference_loss(recipe, policy, reference, win, lose, cond, schedule, generators, strength, cond_lose)
        assert out.logratio_lose is not None  # the recipe compares pairs
        parts.append(torch.stack([out.logratio_win, out.logratio_lose]).double())
        evals += out.unet_evals
    return torch.cat(parts, dim=1).view(2, n, draws).mean(dim=2).flatten(), evals / (2 * n)


def agreement(latents: pd.DataFrame) -> pd.DataFrame:
    """How far each setting's surrogate agrees with the truth, one row a setting of `log_ratios`' table.

    Pairs of which a latent has no true log-ratio (nan) are left out. Columns: policy, recipe, steps, draws; pairs, how
    many were left; unet_evals_per_latent; spearman, the rank correlation over all latents, with
    the 95 % percentile interval low, high of a bootstrap that resamples pairs (nan where either side is constant);
    pair_accuracy and true_pair_accuracy, the share of pairs whose winner has the larger log-ratio by the surrogate
    and by the truth; sign_agreement, the share in which the two agree on that. A tie counts one half.
    """
    rows = []
    for _, group in latents.groupby(SETTING, sort=False):
        values, truth = _table(group, "surrogate"), _table(group, "truth")
        known = ~np.isnan(truth).any(axis=1)
        if not known.any():
            raise InvdpoError(
                f"agreement: no pair of policy {group['policy'].iloc[0]!r} has a true log-ratio, because steps fold "
                "space at latents of each; compute the truth with more steps"
            )
        values, truth = values[known], truth[known]
        order, true_order = (np.sign(side[:, 0] - side[:, 1]) for side in (values, truth))
        spearman, low, high = _rank_correlation(values, truth)
        results = {
            "pairs": len(truth),
            "unet_evals_per_latent": group["unet_evals"].mean(),
            "spearman": spearman,
            "low": low,
            "high": high,
            "pair_accuracy": _share(order),
            "true_pair_accuracy": _share(true_order),
            "sign_agreement": _share(order * true_order),
        }
        rows.append(group[SETTING].iloc[0].to_dict() | results)
    return pd.DataFrame(rows)


def _table(group: pd.DataFrame, column: str) -> np.ndarray:
    """(P,2): winners and losers, in the order of their pairs."""
    by_side = group.pivot(index="pair", columns="side", values=column)
    return np.stack([by_side[side].to_numpy() for side in SIDES], axis=1)


def _share(signs: np.ndarray) -> float:
    """Of +1 (yes) and -1 (no), the share of yes; 0 counts one half."""
    return float((1 + signs).mean() / 2)


def _rank_correlation(values: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation of two tables (P, 2), and its percentile interval over resampled pairs."""
    pairs = len(values)
    counts = np.random.default_rng([SEED, pairs]).multinomial(pairs, np.full(pairs, 1 / pairs), size=DRAWS)
    counts = np.repeat(np.concatenate([np.ones((1, pairs)), counts]), 2, axis=1)  # the sample itself first
    ranks = [_ranks(side.ravel(), counts) for side in (values, truth)]
    x, y = (rank - (counts * rank).sum(axis=1, keepdims=True) / (2 * pairs) for rank in ranks)
    with np.errstate(invalid="ignore"):  # 0 / 0: a constant side has no correlation
        correlation = (counts * x * y).sum(axis=1) / np.sqrt(
            (counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1)
        )
    drawn = correlation[1:][~np.isnan(correlation[1:])]  # of very few pairs, some resamples have a constant side
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if len(drawn) else (math.nan, math.nan)
    return float(correlation[0]), float(low), float(high)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mid-ranks (DRAWS, n) of values (n,) in samples that hold each of them counts (DRAWS, n) times."""
    unique, inverse = np.unique(values, return_inverse=True)
    held = counts @ (inverse[:, None] == np.arange(len(unique)))
    return (held.cumsum(axis=1) - (held - 1) / 2)[:, inverse]


def _check(recipe: Recipe, draws: int) -> None:
    if recipe.log_ratio.form == "denoising":
        raise InvdpoError(
            f"recipe {recipe.name!r} has no log-ratio (log_ratio.form is 'denoising'), so nothing to hold against the "
            "truth; leave it out"
        )
    if draws < 1:
        raise InvdpoError(f"recipe {recipe.name!r}: draws is {draws}; at least 1 is needed")
    if draws > 1 and recipe.trajectory.kind == "inversion" and recipe.timesteps == "all":
        raise InvdpoError(f"recipe {recipe.name!r} draws nothing at random; set its draws to 1, not {draws}")
