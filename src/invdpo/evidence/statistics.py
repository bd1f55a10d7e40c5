"""Intervals, tests and sample sizes over training seeds and prompts. Every random draw comes from one fixed seed.

The data of one comparison is a table D (seeds, prompts). Both levels vary: another training seed gives another model,
another prompt another image. Two intervals answer two questions:

- *Of the method* (`mean_interval`): a crossed two-level percentile bootstrap. Seeds and prompts are resampled
  independently with replacement (the "pigeonhole bootstrap", Owen 2007), D is averaged with the product of the two
  weights, and the percentiles of 9,999 such means bound the mean.
- *Of these runs* on other prompts (`prompt_interval`): seeds are averaged within each prompt, and prompts are
  resampled (scipy's BCa). It says nothing about another training.

**What three seeds can say.** Resampling S seeds underestimates their variance by (S - 1) / S, and with S = 3 there are
only ten distinct resamples, so where seeds vary more than prompts the interval is too narrow; where the seed-by-prompt
noise dominates it is too wide (that noise is counted at both levels). Coverage of the nominal 95 % measured on
300 simulated tables of 96 prompts with Gaussian effects (standard deviations of seed, prompt and residual):

    seed, prompt, residual    3 seeds    5 seeds
    0.0   0.5     1.0         0.99       0.99
    0.1   1.0     0.5         0.95       0.95
    0.3   1.0     0.5         0.90       0.92
    0.5   0.5     0.5         0.82       0.87
    1.0   0.3     0.3         0.77       0.85

With one seed the interval covers prompts alone and says nothing about a method; claims are then never decided.

**Tests.** Many comparisons need p-values far below those that a bootstrap of three seeds can give, and its error under
the null is that of the table above. `p_value` is a t-test with both levels random: the standard error from the variance
components, its degrees of freedom by Satterthwaite (1946). Share of true nulls called significant at 5 %, measured on
6,000 tables of 96 prompts, and share of families of 20 with any such call after `holm`, on 1,000:

    seed, prompt, residual    3 seeds    5 seeds    family, 3 seeds    family, 5 seeds
    0.0   0.5     1.0         0.01       0.03       0.00               0.01
    0.1   1.0     0.5         0.05       0.05       0.05               0.05
    0.3   1.0     0.5         0.07       0.06       0.22               0.11
    0.5   0.5     0.5         0.07       0.06       0.32               0.12
    1.0   0.3     0.3         0.05       0.05       0.17               0.05

A family is corrected as well as its smallest p-values are right, and with few seeds that vary much they are not. Nor
quite where effects are as skewed as an exponential distribution: of one run, 6 % of nulls and 10 % of families of 10 at
96 prompts, 5 % and 6 % at 500.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.stats import bootstrap, norm, t

DRAWS = 9_999
SEED = 20_250_731
LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
ROUNDING = 1e-12  # relative size below which a difference is one of rounding
MOST = 1_000_000  # seeds or prompts that a plan looks for
MAX_DRAWN = 200_000  # numbers of a BCa bootstrap held at once: what a core's cache holds


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval. standard_error is the bootstrap's."""

    estimate: float
    low: float
    high: float
    standard_error: float
    seeds: int
    prompts: int


@lru_cache(maxsize=8)
def _weights(n: int, level: int) -> np.ndarray:
    """(DRAWS, n) weights of n items resampled with replacement, each row summing to one."""
    if n == 1:
        return np.ones((DRAWS, 1))
    rng = np.random.default_rng([SEED, level, n])
    return rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n


def bootstrap_means(values: np.ndarray) -> np.ndarray:
    """Crossed bootstrap means of `values` (..., seeds, prompts) -> (..., DRAWS).

    The same resample is used for every leading index, so curves and differences stay paired.
    """
    seeds, prompts = values.shape[-2:]
    by_seed, by_prompt = _weights(seeds, 0), _weights(prompts, 1)
    flat = values.reshape(-1, prompts)
    # Over prompts first: what is left is small, where weights times a table would be a table a draw.
    over_prompts = (flat @ by_prompt.T).reshape(-1, seeds, DRAWS)
    return (over_prompts * by_seed.T).sum(axis=1).reshape(*values.shape[:-2], DRAWS)


def mean_interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Mean over a table (seeds, prompts) with its crossed bootstrap interval."""
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected a table (seeds, prompts), got shape {values.shape}")
    draws = bootstrap_means(values)
    low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(values.mean()), float(low), float(high), float(draws.std(ddof=1)), *values.shape)


def paired_difference(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Interval:
    """Mean of values - baseline, paired by seed and prompt; (seeds, prompts) each, a single-seed one is repeated."""
    return mean_interval(_difference(values, baseline), level)


def win_rate(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Interval:
    """Share of (seed, prompt) cells in which `values` beats `baseline`; a tie counts one half."""
    difference = _difference(values, baseline)
    return mean_interval((difference > 0) + 0.5 * (difference == 0), level)


def _difference(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    if values.shape[-1] != baseline.shape[-1]:
        raise ValueError(f"paired scores need the same prompts, got {values.shape} and {baseline.shape}")
    return values - baseline


def prompt_interval(values: np.ndarray, level: float = LEVEL, draws: int = DRAWS) -> Interval:
    """Mean over a table (seeds, prompts) with its BCa interval over prompts, seeds averaged within each prompt.

    A statement about these runs on other prompts, not about the method: see the head of the module.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected a table (seeds, prompts), got shape {values.shape}")
    return replace(cluster_interval(values.mean(axis=0), np.ones(values.shape[1]), level, draws), seeds=len(values))


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def cluster_interval(sums: np.ndarray, counts: np.ndarray, level: float = LEVEL, draws: int = DRAWS) -> Interval:
    """The mean of observations in clusters, with its BCa interval over clusters (Efron 1987).

    sums: (clusters,) sum of each cluster's observations. counts: (clusters,) how many they are. `prompts` of the result
    is the number of clusters.
    """
    estimate, n, means = float(sums.sum() / counts.sum()), len(sums), sums / counts
    if np.ptp(means) <= ROUNDING * np.abs(means).max():  # nothing varies: BCa's acceleration would be 0 / 0
        return Interval(estimate, estimate, estimate, 0.0, 1, n)
    alike = np.ptp(counts) == 0  # then the ratio of sums is a mean, and half as much is drawn
    found = bootstrap(
        (means,) if alike else (sums, counts),
        np.mean if alike else _ratio,
        n_resamples=draws,
        batch=max(1, MAX_DRAWN // n),
        vectorized=True,
        paired=not alike,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng([SEED, n]),
    )
    low, high = found.confidence_interval
    return Interval(estimate, float(low), float(high), float(found.standard_error), 1, n)


def p_value(values: np.ndarray, threshold: float = 0.0) -> float:
    """Two-sided p of the mean of a table (seeds, prompts) against `threshold`: a t-test, both levels random.

    With one seed it is the paired t-test over prompts. 1 for a single value.
    """
    seeds, prompts = values.shape
    effect = abs(float(values.mean()) - threshold)
    if values.size == 1 or effect <= ROUNDING * float(np.abs(values).max()):
        return 1.0
    error, freedom = _error(*components(values), seeds, prompts)
    if error == 0:
        return 0.0
    return float(2 * t.sf(effect / error, freedom))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def components(values: np.ndarray) -> tuple[float, float, float]:
    """Variances (seeds, prompts, residual) of a table (seeds, prompts), by two-way analysis of variance.

    Negative estimates are set to zero. Of one seed the three cannot be told apart: all variance between its prompts is
    returned as that of prompts; and likewise of one prompt.
    """
    seeds, prompts = values.shape
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    if seeds < 2 or prompts < 2:
        return (float(rows.var(ddof=1)) if seeds > 1 else 0.0, float(columns.var(ddof=1)) if prompts > 1 else 0.0, 0.0)
    residual = values - rows[:, None] - columns + values.mean()
    noise = float((residual**2).sum() / ((seeds - 1) * (prompts - 1)))
    by_seed = max(0.0, (prompts * float(rows.var(ddof=1)) - noise) / prompts)
    by_prompt = max(0.0, (seeds * float(columns.var(ddof=1)) - noise) / seeds)
    return by_seed, by_prompt, noise


def _error(by_seed: float, by_prompt: float, noise: float, seeds: int, prompts: int) -> tuple[float, float]:
    """Standard error of the mean of a table with these variance components, and its degrees of freedom.

    Satterthwaite's, from the mean squares of seeds and prompts: both are estimated from the same table.
    """
    rows, columns = prompts * by_seed + noise, seeds * by_prompt + noise
    total = prompts * by_seed + seeds * by_prompt + noise  # seeds * prompts times the variance of the mean
    spread = sum(square**2 / (n - 1) for square, n in ((rows, seeds), (columns, prompts)) if n > 1)
    if seeds == 1 and by_seed > 0 or prompts == 1 and by_prompt > 0:
        return math.inf, 1.0  # a level that varies and was seen once
    return math.sqrt(total / (seeds * prompts)), total**2 / spread if spread > 0 else math.inf


def detectable_difference(
    variances: tuple[float, float, float], seeds: int, prompts: int, power: float = POWER, alpha: float = ALPHA
) -> float:
    """The smallest true mean that `p_value` finds at level `alpha` (two-sided) with probability `power`.

    variances: of seeds, prompts and residual, as `components` gives them. inf where no mean is found, since a level
    that varies was seen once.
    """
    error, freedom = _error(*variances, seeds, prompts)
    if error in (0, math.inf):
        return error
    return error * float(t.isf(alpha / 2, freedom) + t.isf(1 - power, freedom))


def _smallest(enough: Callable[[int], bool], first: int, most: int) -> int | None:
    """The smallest whole number from `first` to `most` that is enough; None if none is.

    By doubling, then halving: a test that more prompts make sure of the seeds' variance has fewer degrees of freedom,
    so that enough need not stay enough.
    """
    low, high = first - 1, first
    while not enough(high):
        if high == most:
            return None
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def needed_prompts(
    difference: float,
    variances: tuple[float, float, float],
    seeds: int,
    power: float = POWER,
    alpha: float = ALPHA,
) -> int | None:
    """Prompts that tell this mean difference from none with `seeds` trainings; None if a million do not."""

    def enough(prompts: int) -> bool:
        return detectable_difference(variances, seeds, prompts, power, alpha) <= difference

    return _smallest(enough, 1, MOST)


def needed_seeds(
    difference: float,
    variances: tuple[float, float, float],
    prompts: int,
    power: float = POWER,
    alpha: float = ALPHA,
) -> int | None:
    """Training seeds that tell this mean difference from none on `prompts` prompts; None if a million do not."""

    def enough(seeds: int) -> bool:
        return detectable_difference(variances, seeds, prompts, power, alpha) <= difference

    return _smallest(enough, 1, MOST)


def independent_votes(share: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Independent decided votes that tell a true share of wins from one half (two-sided), by the normal approximation.

    Raises ValueError where share is one half or no share.
    """
    if not 0 < share < 1 or share == 0.5:
        raise ValueError(f"a share to tell from one half lies between 0 and 1 and is not 0.5, got {share}")
    spread = norm.isf(alpha / 2) / 2 + norm.isf(1 - power) * math.sqrt(share * (1 - share))
    return float((spread / (share - 0.5)) ** 2)


def needed_votes(
    share: float, power: float = POWER, alpha: float = ALPHA, votes_per_cluster: float = 1, correlation: float = 0
) -> int:
    """Decided votes that tell a true share of wins from one half (two-sided), as `independent_votes`.

    Votes of one rater, or on one pair, resemble one another: with m of them a cluster and the correlation r between
    two, 1 + (m - 1) r times as many are needed (Kish 1965). Raises ValueError where share is one half or no share.
    """
    alike = 1 + (votes_per_cluster - 1) * correlation
    return math.ceil(alike * independent_votes(share, power, alpha))


def needed_both(
    difference: float,
    variances: tuple[float, float, float],
    seeds: int,
    prompts: int,
    power: float = POWER,
    alpha: float = ALPHA,
) -> tuple[int, int] | None:
    """(seeds, prompts) that tell this mean difference from none, in the proportion given and no fewer of either.

    None if 1,000 times of each do not.
    """

    def times(percent: int) -> tuple[int, int]:
        return math.ceil(seeds * percent / 100), math.ceil(prompts * percent / 100)

    def enough(percent: int) -> bool:
        return detectable_difference(variances, *times(percent), power, alpha) <= difference

    percent = _smallest(enough, 100, 100_000)
    return None if percent is None else times(percent)


def settling_size(values: np.ndarray, threshold: float = 0.0) -> tuple[int, int] | None:
    """(seeds, prompts) that would tell the observed mean from `threshold` with 80 % power at the two-sided 5 % level.

    More prompts alone if 20 times as many can do it; else both in proportion, or seeds alone if that takes no more than
    twice those seeds. None with fewer than two seeds (their variance is unknown) or beyond 1,000 times of each.
    """
    seeds, prompts = values.shape
    effect = abs(float(values.mean()) - threshold)
    if seeds < 2 or prompts < 2 or effect == 0:
        return None
    variances = components(values)
    more = needed_prompts(effect, variances, seeds)
    if more is not None and more <= 20 * prompts:
        return seeds, max(prompts, more)
    both = needed_both(effect, variances, seeds, prompts)
    if both is None:
        return None
    trained = needed_seeds(effect, variances, prompts)
    return (max(seeds, trained), prompts) if trained is not None and trained <= 2 * both[0] else both


def needed_units(effect: float, standard_error: float, units: int, power: float = POWER, alpha: float = ALPHA) -> int:
    """How many units (pairs, pictures) tell an effect from none that `units` of them see with this standard error.

    The error is taken to fall with the root of their number, as it does while they are what varies. Raises ValueError
    where there is no effect.
    """
    if effect == 0:
        raise ValueError("an effect of exactly 0 is told from none by no number of units")
    return math.ceil(units * ((norm.isf(alpha / 2) + norm.isf(1 - power)) * standard_error / effect) ** 2)


def needed_points(correlation: float, threshold: float, power: float = POWER, alpha: float = ALPHA) -> int:
    """Points that tell a rank correlation from a threshold, both inside (-1, 1), by Fisher's transformation.

    The standard error of a Spearman correlation's transform is that of Fieller, Hartley and Pearson (1957),
    sqrt(1.06 / (n - 3)). Raises ValueError where the two are equal.
    """
    effect = math.atanh(correlation) - math.atanh(threshold)
    return 3 + needed_units(effect, math.sqrt(1.06), 1, power, alpha)


def seed_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval for the mean of the seeds' values (seeds,), at least two of them."""
    margin = float(t.isf((1 - level) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - margin, float(values.mean()) + margin


def crossing(curve: np.ndarray, cost: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cost at which a curve first reaches its target, by linear interpolation between checkpoints; inf if never.

    curve: (T, R) scores of R resamples at T checkpoints, the first at cost 0. cost: (T,) ascending. target: (R,).
    """
    reached = np.full(target.shape, np.inf)
    for k in range(len(cost) - 1, 0, -1):
        before, after = curve[k - 1], curve[k]
        hit = (after >= target) & (before < target)
        share = (target - before) / np.where(after == before, 1.0, after - before)
        reached = np.where(hit, cost[k - 1] + share * (cost[k] - cost[k - 1]), reached)
    return np.where(curve[0] >= target, 0.0, reached)


@dataclass(frozen=True)
class ToTarget:
    """How soon a curve reaches another's final score, beside how soon that one does.

    cost, cost_low, cost_high: where it first reaches it, inf for never. ratio: the other's cost over this one's, so
    above 1 where this one is faster and 0 where it never gets there; high is inf where some resamples have no target.
    never: share of resamples in which it never gets there. untargeted: share in which the other ends no higher than it
    began, so that there is nothing to reach. `ratio` is None where that is so of the means themselves.
    """

    cost: float
    cost_low: float
    cost_high: float
    ratio: float | None
    low: float
    high: float
    never: float
    untargeted: float
    seeds: int
    prompts: int


def cost_to_target(
    curve: np.ndarray, cost: np.ndarray, other: np.ndarray, other_cost: np.ndarray, level: float = LEVEL
) -> ToTarget:
    """Cost at which the mean of `curve` first reaches the final mean of `other`, with crossed bootstrap intervals.

    curve: (T, seeds, prompts) scores at T checkpoints, the first (cost 0) before training; other: (T', seeds, prompts),
    paired with it. Both are interpolated linearly between checkpoints. cost, other_cost: (T,), (T',), ascending, of any
    kind: steps, evaluations, seconds. A resample that ends below its target bounds the ratio from above by the cost at
    which it ended.
    """
    if curve.shape[1:] != other.shape[1:] or len(cost) != len(curve) or len(other_cost) != len(other):
        raise ValueError(f"curves {curve.shape}, {other.shape} do not fit each other or their costs")

    def measure(fast: np.ndarray, slow: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        # Scores of few values tie exactly, and the order of a sum would decide on which side of the target they lie.
        target = slow[-1] - ROUNDING * max(np.abs(fast).max(), np.abs(slow).max())
        slow_cost, fast_cost = crossing(slow, other_cost, target), crossing(fast, cost, target)
        never = ~np.isfinite(fast_cost)
        least = np.where(never, 0.0, slow_cost / np.where(never | (fast_cost == 0), 1.0, fast_cost))
        most = np.where(never, slow_cost / cost[-1], least)
        gained = target > slow[0]
        return np.where(gained, least, 0.0), np.where(gained, most, np.inf), fast_cost, gained

    means = [part.mean(axis=(1, 2))[:, None] for part in (curve, other)]
    ratio, _, reached, gained = (part[0] for part in measure(*means))
    least, most, costs, targeted = measure(bootstrap_means(curve), bootstrap_means(other))
    # With a target below its start a curve is there at once, which is no speed.
    costs = np.where(targeted, costs, np.inf)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return ToTarget(
        cost=float(reached) if gained else math.inf,
        cost_low=float(np.quantile(costs, ends[0], method="lower")),
        cost_high=float(np.quantile(costs, ends[1], method="higher")),
        ratio=float(ratio) if gained else None,
        low=float(np.quantile(least, ends[0], method="lower")),
        high=float(np.quantile(most, ends[1], method="higher")),
        never=float((targeted & ~np.isfinite(costs)).mean()),
        untargeted=float((~targeted).mean()),
        seeds=curve.shape[1],
        prompts=curve.shape[2],
    )
