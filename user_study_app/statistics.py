"""What can be said from votes that cluster by rater and by prompt.

Rows are votes: a frame with `rater`, `prompt_id`, `pair`, `group` and `value` (1: the group's second arm, 0: its first,
0.5: a tie, NaN: no vote).

Intervals are 95 %. The first is a crossed percentile bootstrap: raters and prompts are resampled independently, so all
votes of a rater, and all votes on a prompt, stay together. It counts the noise of a single vote at both levels and is
therefore wide where votes are nearly independent. The second (`robust`) adds the variances clustered by rater and by
prompt and subtracts that of single votes, with Student's t for the number of raters; it needs two raters. Coverage
measured on 400 simulated studies each, 15 % ties, a win rate of 0.65, logistic effects of rater and prompt with these
standard deviations, and the mean half-width:

    raters  pairs  raters/pair  rater  prompt    bootstrap      robust
    10      100    3            0      0         1.00  0.084    0.98  0.063
    10      100    3            0.3    1         1.00  0.093    0.97  0.074
    10      100    3            0.8    1         0.99  0.112    0.96  0.107
    10      100    10           0.3    1         0.98  0.061    0.97  0.057
    10      100    10           0.8    1         0.95  0.088    0.96  0.096
    30      200    3            0.3    1         0.99  0.067    0.95  0.046
"""

# pandas annotates every cell, row and group key as whatever a frame may hold.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from invdpo.evidence.statistics import DRAWS, Interval, bootstrap_means

FITS = 999  # bootstrap refits of the Davidson model
STRONGEST = 10.0  # bound of a log-strength: a method that never loses would go to infinity
OUTCOMES = (1.0, 0.5, 0.0)


def tables_of(rows: pd.DataFrame, raters: list[Any], prompts: list[Any], value: pd.Series) -> np.ndarray:
    """(2, raters, prompts): sums of `value` and numbers of votes; NaN is no vote."""
    known = value.notna().to_numpy()
    at = (
        pd.Index(raters).get_indexer(rows["rater"].to_numpy()[known]),
        pd.Index(prompts).get_indexer(rows["prompt_id"].to_numpy()[known]),
    )
    sums = np.zeros((2, len(raters), len(prompts)))
    np.add.at(sums[0], at, value.to_numpy(float)[known])
    np.add.at(sums[1], at, 1.0)
    return sums


def _draws(sums: np.ndarray) -> np.ndarray:
    """Bootstrap draws of sums[0] / sums[1], (DRAWS,); NaN where a resample holds nothing."""
    top, bottom = bootstrap_means(sums)
    return np.divide(top, bottom, out=np.full(DRAWS, np.nan), where=bottom > 0)


def share(rows: pd.DataFrame, value: pd.Series) -> Interval | None:
    """Mean of `value` over votes, with the crossed bootstrap over raters and prompts; None without a vote."""
    known = rows[value.notna()]
    if known.empty:
        return None
    sums = tables_of(rows, sorted(known["rater"].unique()), sorted(known["prompt_id"].unique()), value)
    return _interval(sums[0].sum() / sums[1].sum(), _draws(sums), sums.shape[1], sums.shape[2])


def _interval(estimate: float, draws: np.ndarray, raters: int, prompts: int) -> Interval:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(float(estimate), float(low), float(high), float(np.nanstd(draws, ddof=1)), raters, prompts)


def p_of_half(rows: pd.DataFrame, value: pd.Series) -> float | None:
    """Two-sided bootstrap p of the share against one half; at least 2 / (DRAWS + 1)."""
    known = rows[value.notna()]
    if known.empty:
        return None
    draws = _draws(tables_of(rows, sorted(known["rater"].unique()), sorted(known["prompt_id"].unique()), value))
    tail = min((draws <= 0.5).sum(), (draws >= 0.5).sum())
    return float(min(1.0, 2 * (tail + 1) / (DRAWS + 1)))


def robust_interval(rows: pd.DataFrame, value: pd.Series) -> tuple[float, float] | None:
    """Two-way cluster-robust interval of the share (Cameron, Gelbach and Miller 2011); None with fewer than two raters
    or prompts. Its variance is no smaller than that of independent votes.
    """
    known = rows[value.notna()]
    raters, prompts = sorted(known["rater"].unique()), sorted(known["prompt_id"].unique())
    if len(raters) < 2 or len(prompts) < 2:
        return None
    sums, counts = tables_of(rows, raters, prompts, value)
    mean = sums.sum() / counts.sum()
    rest = sums - mean * counts
    by_rater = (rest.sum(1) ** 2).sum() * len(raters) / (len(raters) - 1)
    by_prompt = (rest.sum(0) ** 2).sum() * len(prompts) / (len(prompts) - 1)
    single = (rest**2).sum()
    half = stats.t.ppf(0.975, len(raters) - 1) * np.sqrt(max(by_rater + by_prompt - single, single)) / counts.sum()
    return float(mean - half), float(mean + half)


def krippendorff(counts: np.ndarray) -> float:
    """Krippendorff's alpha for nominal values. counts: (units, categories), how many raters gave each; units with fewer
    than two do not count. NaN where only one category was ever given.
    """
    return float(_alpha(*(part.sum(axis=0) for part in _coincidences(counts))))


def _coincidences(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every unit: ordered pairs of equal values, each weighing 1 / (values - 1), (units,); and how often each value
    was given, nought in units that cannot be compared, (units, categories).
    """
    size = counts.sum(axis=1)
    paired = np.where(size[:, None] > 1, counts, 0)
    return (paired * (paired - 1)).sum(axis=1) / np.maximum(size - 1, 1), paired


def _alpha(agreeing: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Alpha from the totals (...,) and (..., categories)."""
    n = values.sum(axis=-1)
    expected = (values * (values - 1)).sum(axis=-1) / np.maximum(n - 1, 1)
    return np.divide(agreeing - expected, n - expected, out=np.full_like(n, np.nan), where=n > expected)


def alpha_interval(rows: pd.DataFrame) -> Interval | None:
    """Alpha of first, tie, second over pairs, resampling prompts; None where nothing can be compared."""
    known = rows[rows["value"].notna()]
    if known.empty:
        return None
    counts = pd.crosstab([known["prompt_id"], known["pair"]], known["value"]).reindex(columns=[0.0, 0.5, 1.0])
    agreeing, values = _coincidences(counts.fillna(0).to_numpy(float))
    of_prompt = pd.DataFrame(np.column_stack([agreeing, values])).groupby(counts.index.get_level_values(0)).sum()
    sums = of_prompt.to_numpy().T[:, None, :]  # (1 + categories, 1, prompts)
    estimate = float(_alpha(sums[0].sum(), sums[1:].sum(axis=(1, 2))))
    if np.isnan(estimate):
        return None
    draws = bootstrap_means(sums) * sums.shape[-1]
    return _interval(estimate, _alpha(draws[0], draws[1:].T), known["rater"].nunique(), sums.shape[-1])


def rater_agreement(rows: pd.DataFrame) -> Interval | None:
    """Share of two decisive votes of different raters on one pair that agree, resampling prompts: what a score that
    knew one rater's taste could reach.
    """
    decisive = rows[rows["value"].isin([0.0, 1.0])]
    counts = decisive.groupby(["prompt_id", "pair"])["value"].agg(["sum", "count"])
    wins, losses = counts["sum"], counts["count"] - counts["sum"]
    both = pd.DataFrame(
        {"same": (wins**2 - wins + losses**2 - losses) / 2, "all": counts["count"] * (counts["count"] - 1) / 2}
    )
    sums = both.groupby(level=0).sum().to_numpy().T[:, None, :]
    if not sums[1].sum():
        return None
    return _interval(sums[0].sum() / sums[1].sum(), _draws(sums), rows["rater"].nunique(), sums.shape[-1])


def davidson(matches: list[tuple[int, int]], counts: np.ndarray) -> np.ndarray:
    """Log-strengths of methods 1, 2, … over method 0, then the log of the tie parameter nu, by maximum likelihood in
    the model of Davidson (1970), P(i) : P(tie) : P(j) = s_i : nu sqrt(s_i s_j) : s_j; without ties Bradley-Terry's.

    matches: the two methods of each comparison. counts: (comparisons, 3), how often the first won, none, the second.
    """
    methods = 1 + max(max(match) for match in matches)
    design = np.zeros((len(matches), 3, methods + 1))
    for row, (i, j) in enumerate(matches):
        design[row, 0, i] = design[row, 2, j] = 1.0
        design[row, 1, [i, j, -1]] = 0.5, 0.5, 1.0
    design = design[..., 1:]
    totals = counts.sum(axis=1, keepdims=True)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ values
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return -float((counts * logs).sum()), np.einsum("co,cop->p", totals * np.exp(logs) - counts, design)

    bounds = [(-STRONGEST, STRONGEST)] * methods
    return optimize.minimize(loss, np.zeros(methods), jac=True, method="L-BFGS-B", bounds=bounds).x


def strengths(rows: pd.DataFrame, groups: dict[str, tuple[str, str]]) -> dict[str, Interval] | None:
    """Arm -> log-strength over the first group's first arm (Davidson's model, bootstrap over raters and prompts), and
    `tie` -> log nu. None with fewer than three arms, and where the votes do not connect them.
    """
    arms = list(dict.fromkeys(arm for pair in groups.values() for arm in pair))
    matches = [(arms.index(a), arms.index(b)) for a, b in groups.values()]
    firsts, seconds = zip(*matches, strict=True)
    graph = coo_array((np.ones(len(matches)), (firsts, seconds)), shape=(len(arms), len(arms)))
    if len(arms) < 3 or connected_components(graph, directed=False)[0] > 1:
        return None
    rows = rows[rows["value"].notna()]
    if rows["group"].nunique() < len(groups):
        return None
    raters, prompts = sorted(rows["rater"].unique()), sorted(rows["prompt_id"].unique())
    sums = np.stack(
        [
            tables_of(rows, raters, prompts, ((rows["group"] == group) & (rows["value"] == outcome)).astype(float))[0]
            for group in groups
            for outcome in OUTCOMES
        ]
    )
    turned = [(j, i) for i, j in matches]  # OUTCOMES starts with the second arm's wins
    estimate = davidson(turned, sums.sum(axis=(1, 2)).reshape(-1, 3))
    draws = bootstrap_means(sums)[:, :FITS].T.reshape(FITS, -1, 3) * sums[0].size
    fits = np.array([davidson(turned, counts) for counts in draws])
    names = [*arms[1:], "tie"]
    return {n: _interval(estimate[i], fits[:, i], len(raters), len(prompts)) for i, n in enumerate(names)}
