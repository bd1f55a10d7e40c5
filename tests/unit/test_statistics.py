"""Closed-form and simulated checks of the intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from invdpo.evidence.statistics import (
    bootstrap_means,
    cluster_interval,
    components,
    cost_to_target,
    crossing,
    detectable_difference,
    holm,
    mean_interval,
    needed_both,
    needed_prompts,
    needed_seeds,
    needed_votes,
    p_value,
    paired_difference,
    prompt_interval,
    settling_size,
    win_rate,
)


def test_identical_arms_have_the_interval_zero_zero() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 50))
    interval = paired_difference(scores, scores)
    assert (interval.estimate, interval.low, interval.high, interval.standard_error) == (0, 0, 0, 0)
    assert p_value(scores - scores) == 1
    wins = win_rate(scores, scores)
    assert wins.estimate == 0.5
    assert wins.low == pytest.approx(0.5, abs=1e-12)


def test_swapping_the_arms_mirrors_the_interval() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 40)), rng.normal(size=(1, 40))
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward.estimate == pytest.approx(-backward.estimate)
    assert forward.low == pytest.approx(-backward.high)
    assert forward.high == pytest.approx(-backward.low)


def test_standard_error_of_one_seed_is_the_textbook_one() -> None:
    values = np.random.default_rng(2).normal(size=(1, 400))
    expected = values.std() / np.sqrt(400)  # the bootstrap divides by n, not n - 1
    interval = mean_interval(values)
    assert interval.standard_error == pytest.approx(expected, rel=0.03)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * expected, rel=0.05)
    assert interval.seeds == 1 and interval.prompts == 400


def test_variance_is_the_sum_over_both_levels() -> None:
    # Rows r_s and columns c_p without noise: variance = var(r)/S + var(c)/P exactly (population variances).
    rows, columns = np.array([[-1.0], [0.0], [1.0]]), np.linspace(-2, 2, 30)[None]
    expected = rows.var() / 3 + columns.var() / 30
    assert bootstrap_means(rows + columns).var() == pytest.approx(expected, rel=0.04)


def test_constant_gain_is_found_exactly_though_prompts_differ() -> None:
    ease = np.random.default_rng(3).normal(size=(1, 64)) * 10
    interval = paired_difference(np.repeat(ease, 3, axis=0) + 0.25, ease)
    assert interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(0.25)


def test_win_rate_counts_a_tie_as_half() -> None:
    assert win_rate(np.array([[1.0, 0.0, 2.0, 5.0]]), np.array([[0.0, 0.0, 3.0, 4.0]])).estimate == 0.625


# Share of 95 % intervals that hold the true mean, as the docstring of the module has it: 3 seeds, 5 seeds.
COVERAGE = {
    (0.0, 0.5, 1.0): (0.99, 0.99),
    (0.1, 1.0, 0.5): (0.95, 0.95),
    (0.3, 1.0, 0.5): (0.90, 0.92),
    (0.5, 0.5, 0.5): (0.82, 0.87),
    (1.0, 0.3, 0.3): (0.77, 0.85),
}
# Share of true nulls that p_value calls significant at 5 %, and of families of 20 with one after Holm.
NULLS = {
    (0.0, 0.5, 1.0): ((0.01, 0.00), (0.03, 0.01)),
    (0.1, 1.0, 0.5): ((0.05, 0.05), (0.05, 0.05)),
    (0.3, 1.0, 0.5): ((0.07, 0.22), (0.06, 0.11)),
    (0.5, 0.5, 0.5): ((0.07, 0.32), (0.06, 0.12)),
    (1.0, 0.3, 0.3): ((0.05, 0.17), (0.05, 0.05)),
}


def simulate(rng: np.random.Generator, sds: tuple[float, float, float], seeds: int, prompts: int = 96) -> np.ndarray:
    """A table with mean 0 and these standard deviations of seeds, prompts and residual."""
    rows, columns, cells = ((seeds, 1), (1, prompts), (seeds, prompts))
    return sum((sd * rng.normal(size=size) for sd, size in zip(sds, (rows, columns, cells), strict=True)), np.zeros(()))


def sampling_error(share: float, tables: int) -> float:
    """Three standard errors of a share seen in that many tables, and the rounding of a documented one."""
    return 3 * np.sqrt(share * (1 - share) / tables) + 0.005


@pytest.mark.parametrize("sds", COVERAGE)
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_is_what_the_docstring_says(sds: tuple[float, float, float], seeds: int) -> None:
    """Near nominal where prompts vary most, too wide under noise, too narrow where few seeds vary most."""
    rng, tables = np.random.default_rng(4), 200
    intervals = [mean_interval(simulate(rng, sds, seeds)) for _ in range(tables)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    expected = COVERAGE[sds][seeds == 5]
    # The documented share is itself that of 300 tables.
    assert abs(covered - expected) <= np.hypot(sampling_error(expected, tables), sampling_error(expected, 300))


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.exponential(size=n) - 1


def mostly_ties(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([-0.5, 0.0, 0.5], size=n, p=[0.2, 0.6, 0.2])


@pytest.mark.parametrize(("draw", "prompts"), [(normal, 96), (skewed, 96), (skewed, 500), (mostly_ties, 150)])
def test_the_interval_over_prompts_covers_95_percent(
    draw: Callable[[np.random.Generator, int], np.ndarray], prompts: int
) -> None:
    rng = np.random.default_rng(8)
    intervals = [prompt_interval(draw(rng, prompts)[None], draws=499) for _ in range(600)]
    assert 0.93 <= np.mean([interval.low <= 0 <= interval.high for interval in intervals]) <= 0.97


def test_the_interval_over_prompts_is_scipys_of_the_seeds_means() -> None:
    values = np.random.default_rng(9).exponential(size=(3, 60))
    found = prompt_interval(values)
    means = values.mean(axis=0)
    reference = stats.bootstrap((means,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(1))
    ends = reference.confidence_interval
    assert found.estimate == pytest.approx(means.mean())
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.004)
    assert (found.seeds, found.prompts) == (3, 60)
    percentile = np.percentile(bootstrap_means(means[None]), [2.5, 97.5])
    assert found.low > percentile[0] + 0.004, "BCa moves with the skewness, percentiles do not"
    assert prompt_interval(values) == found


def test_the_interval_over_prompts_where_nothing_varies() -> None:
    found = prompt_interval(np.full((3, 20), 0.1) + 0.2)
    assert (found.low, found.high, found.standard_error) == (found.estimate, found.estimate, 0)


def test_clusters_count_by_their_size_and_are_resampled_whole() -> None:
    rng = np.random.default_rng(10)
    sizes = rng.integers(1, 9, size=300).astype(float)
    shares = rng.uniform(size=300).round()  # all observations of a cluster are alike
    found = cluster_interval(shares * sizes, sizes)
    estimate = (shares * sizes).sum() / sizes.sum()
    # Linearised standard error of a ratio of sums.
    expected = np.sqrt(((sizes * (shares - estimate)) ** 2).sum()) / sizes.sum()
    assert found.estimate == pytest.approx(estimate)
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    assert expected > 1.3 * np.sqrt(estimate * (1 - estimate) / sizes.sum())


@pytest.mark.parametrize("sds", NULLS)
@pytest.mark.parametrize("seeds", [3, 5])
def test_nulls_are_called_significant_as_often_as_the_docstring_says(
    sds: tuple[float, float, float], seeds: int
) -> None:
    rng, families = np.random.default_rng(11), 200
    found = np.array([[p_value(simulate(rng, sds, seeds)) for _ in range(20)] for _ in range(families)])
    single, whole = NULLS[sds][seeds == 5]
    assert abs((found < 0.05).mean() - single) <= sampling_error(max(single, 0.02), found.size)
    called = np.mean([min(holm(list(row))) < 0.05 for row in found])
    assert abs(called - whole) <= sampling_error(max(whole, 0.02), families)
    if sds[0] <= 0.1:  # seeds vary little beside prompts: the nominal level holds, families included
        assert (found < 0.05).mean() <= 0.05 + sampling_error(0.05, found.size)
        assert called <= 0.05 + sampling_error(0.05, families)


@pytest.mark.parametrize(
    ("draw", "prompts", "single", "whole"),
    [(normal, 96, 0.05, 0.05), (mostly_ties, 96, 0.05, 0.05), (skewed, 96, 0.06, 0.10), (skewed, 500, 0.05, 0.06)],
)
def test_nulls_over_the_prompts_of_one_run(
    draw: Callable[[np.random.Generator, int], np.ndarray], prompts: int, single: float, whole: float
) -> None:
    rng, families = np.random.default_rng(12), 300
    found = np.array([[p_value(draw(rng, prompts)[None]) for _ in range(10)] for _ in range(families)])
    assert (found < 0.05).mean() == pytest.approx(single, abs=sampling_error(single, found.size))
    called = np.mean([min(holm(list(row))) < 0.05 for row in found])
    assert called == pytest.approx(whole, abs=sampling_error(whole, families))


def test_p_value_of_one_seed_is_scipys_t_test() -> None:
    values = np.random.default_rng(13).normal(0.1, size=(1, 57))
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)
    assert p_value(values, 0.3) == pytest.approx(stats.ttest_1samp(values[0], 0.3).pvalue)
    assert p_value(values.T) == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)


def test_p_value_of_seeds_alone_is_a_t_test_over_seeds() -> None:
    rows = np.array([[0.3], [0.5], [1.0]])
    assert p_value(np.repeat(rows, 40, axis=1)) == pytest.approx(stats.ttest_1samp(rows[:, 0], 0).pvalue)


def test_p_value_where_nothing_varies() -> None:
    assert p_value(np.zeros((3, 4))) == 1
    assert p_value(np.full((3, 4), 0.5), 0.5) == 1
    assert p_value(np.full((3, 4), 0.5)) < 1e-6
    assert p_value(np.ones((1, 1))) == 1


def test_intervals_do_not_change_between_calls() -> None:
    values = np.random.default_rng(5).normal(size=(3, 33))
    assert mean_interval(values) == mean_interval(values.copy())


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_components_recover_what_was_simulated() -> None:
    rng = np.random.default_rng(6)
    table = rng.normal(size=(200, 1)) * 2 + rng.normal(size=(1, 300)) * 1 + rng.normal(size=(200, 300)) * 0.5
    by_seed, by_prompt, noise = components(table)
    assert by_seed == pytest.approx(4, rel=0.25)
    assert by_prompt == pytest.approx(1, rel=0.25)
    assert noise == pytest.approx(0.25, rel=0.05)


def test_components_of_one_seed_are_the_variance_of_its_prompts() -> None:
    values = np.random.default_rng(14).normal(size=(1, 50))
    assert components(values) == (0, pytest.approx(values.var(ddof=1)), 0)
    assert components(values.T) == (pytest.approx(values.var(ddof=1)), 0, 0)


def test_detectable_difference_of_prompts_alone_is_the_textbook_one() -> None:
    # metrics of SD1.5: a standard deviation of 0.007 and a difference of 0.001 take about 390 prompts.
    assert needed_prompts(0.001, (0, 0.007**2, 0), 1) == 387  # 385 by the normal approximation
    assert detectable_difference((0, 1, 0), 1, 100_000) == pytest.approx(2.8016 / np.sqrt(100_000), rel=1e-4)
    assert detectable_difference((0, 1, 0), 3, 10_000) == pytest.approx(2.8016 / 100, rel=1e-3)  # the same prompts
    assert detectable_difference((0.01, 1, 0), 1, 100) == np.inf  # seeds vary and there is one
    assert detectable_difference((0, 0, 0), 3, 100) == 0


@pytest.mark.parametrize("sds", [(0.0, 1.0, 0.5), (0.1, 1.0, 0.5)])
def test_the_detectable_difference_is_found_in_80_percent(sds: tuple[float, float, float]) -> None:
    seed, prompt, noise = sds
    effect = detectable_difference((seed**2, prompt**2, noise**2), 4, 96)
    rng = np.random.default_rng(15)
    found = [p_value(effect + simulate(rng, sds, 4)) < 0.05 for _ in range(1_500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_what_is_needed_is_the_least_that_is_enough() -> None:
    variances = (0.01, 1.0, 0.25)
    prompts, seeds = needed_prompts(0.3, variances, 3), needed_seeds(0.32, variances, 96)
    assert prompts is not None and seeds is not None
    assert detectable_difference(variances, 3, prompts) <= 0.3 < detectable_difference(variances, 3, prompts - 1)
    assert detectable_difference(variances, seeds, 96) <= 0.32 < detectable_difference(variances, seeds - 1, 96)
    assert needed_prompts(0.2, variances, 3) is None  # three seeds' own spread hides it
    assert needed_seeds(0.2, variances, 96) is None  # 96 prompts' own spread hides it
    both = needed_both(0.2, variances, 3, 96)
    assert both is not None and both[0] > 3 and both[1] > 96
    assert detectable_difference(variances, *both) <= 0.2
    assert needed_both(1e-6, variances, 3, 96) is None


@pytest.mark.parametrize(("share", "votes"), [(0.53, 2_178), (0.55, 783), (0.58, 305), (0.60, 194), (0.40, 194)])
def test_votes_that_tell_a_share_from_one_half(share: float, votes: int) -> None:
    assert needed_votes(share) == votes
    won = np.arange(votes + 1)  # the exact power of the z-test against one half that the approximation is of
    rejected = np.abs(won - votes / 2) > stats.norm.isf(0.025) * np.sqrt(votes) / 2
    assert stats.binom.pmf(won, votes, share)[rejected].sum() == pytest.approx(0.8, abs=0.01)


def test_votes_that_resemble_one_another_are_worth_less() -> None:
    assert needed_votes(0.55, votes_per_cluster=11, correlation=0.1) == pytest.approx(2 * 783, abs=1)
    assert needed_votes(0.55, votes_per_cluster=11) == 783
    for share in (0.5, 0.0, 1.0):
        with pytest.raises(ValueError, match="share"):
            needed_votes(share)


def test_settling_size() -> None:
    rng = np.random.default_rng(7)
    prompts_vary = 0.05 + rng.normal(size=(1, 400)) + 0.001 * rng.normal(size=(3, 400))
    effect = prompts_vary.mean()
    size = settling_size(prompts_vary)
    assert size is not None and size[0] == 3
    assert size[1] == pytest.approx((2.802 / effect) ** 2 * prompts_vary[0].var(), rel=0.1)
    seeds_vary = np.array([[-1.0], [0.2], [1.7]]) + 0.01 * rng.normal(size=(3, 50))
    size = settling_size(seeds_vary)
    assert size is not None and size[0] > 3 and size[1] == 50
    assert settling_size(prompts_vary[:1]) is None  # one seed: its variance is unknown
    assert settling_size(rng.normal(size=(3, 20)) * 0) is None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(np.zeros((3, 4)), np.zeros((1, 5)))
    with pytest.raises(ValueError, match="seeds, prompts"):
        mean_interval(np.zeros(4))


def test_crossing_interpolates_takes_the_first_and_may_never_happen() -> None:
    curve = np.array([[0.0, 0.0, 0.0, 2.0], [1.0, 4.0, 1.0, 1.0], [2.0, 0.0, 1.5, 0.0], [4.0, 4.0, 1.0, 3.0]])
    cost = np.array([0.0, 10.0, 20.0, 40.0])
    assert crossing(curve, cost, np.array([3.0, 2.0, 9.0, 1.5])).tolist() == [30.0, 5.0, np.inf, 0.0]


def climb(ends: list[float], seeds: int = 3, prompts: int = 40, noise: float = 0.0) -> np.ndarray:
    """A curve with these means at its checkpoints, the same prompts' ease throughout."""
    rng = np.random.default_rng(16)
    ease = rng.normal(size=(1, 1, prompts))
    return np.array(ends)[:, None, None] + ease + noise * rng.normal(size=(len(ends), seeds, prompts))


def test_cost_to_target_of_lines_is_exact() -> None:
    # The slow one ends at 1 after 40; the fast one gains 1 in 10, at three times the cost a step.
    fast, slow = climb([0, 1, 2]), climb([0, 0.5, 1])
    found = cost_to_target(fast, np.array([0, 10, 20.0]), slow, np.array([0, 20, 40.0]))
    assert (found.cost, found.cost_low, found.cost_high) == pytest.approx((10, 10, 10))
    assert (found.ratio, found.low, found.high) == pytest.approx((4, 4, 4))
    assert (found.never, found.untargeted, found.seeds, found.prompts) == (0, 0, 3, 40)
    in_time = cost_to_target(fast, np.array([0, 30, 60.0]), slow, np.array([0, 20, 40.0]))
    assert (in_time.cost, in_time.ratio) == pytest.approx((30, 4 / 3))


def test_a_target_that_is_never_reached_is_a_value() -> None:
    cost = np.array([0, 10, 20.0])
    found = cost_to_target(climb([0, 0.2, 0.4]), cost, climb([0, 0.5, 1]), cost)
    assert (found.cost, found.cost_low, found.cost_high, found.ratio) == (np.inf, np.inf, np.inf, 0)
    assert found.never == 1 and found.high == pytest.approx(1)  # it had spent 20 at its end, as the other at its target
    close = cost_to_target(climb([0, 0.7, 1], noise=0.5), cost, climb([0, 0.5, 1], noise=0.5)[:, :, ::-1], cost)
    assert 0.2 < close.never < 0.8 and close.low == 0 and np.isinf(close.cost_high) and np.isfinite(close.cost_low)


def test_without_a_gain_there_is_no_target() -> None:
    cost = np.array([0, 10.0])
    found = cost_to_target(climb([0, 1]), cost, climb([0, -0.1]), cost)
    assert found.ratio is None and found.untargeted == 1 and found.never == 0 and np.isinf(found.high)
    with pytest.raises(ValueError, match="do not fit"):
        cost_to_target(climb([0, 1]), cost, climb([0, 1], prompts=39), cost)


def test_the_interval_of_a_cost_covers_the_true_one() -> None:
    """Curves in which prompts vary most, as the bootstrap is good for: true crossing at cost 5 of 10."""
    rng, cost, covered = np.random.default_rng(17), np.array([0.0, 10.0]), []
    for _ in range(100):
        gain = np.array([0.0, 1.0])[:, None, None]
        fast = gain * (2 + 0.8 * rng.normal(size=(1, 1, 96))) + 0.2 * rng.normal(size=(2, 3, 96))
        slow = gain * (1 + 0.4 * rng.normal(size=(1, 1, 96))) + 0.2 * rng.normal(size=(2, 3, 96))
        found = cost_to_target(fast, cost, slow, cost)
        covered.append(found.cost_low <= 5 <= found.cost_high and found.low <= 2 <= found.high)
    assert 0.9 <= np.mean(covered) <= 1


def test_ties_with_a_target_are_ties_whatever_the_rounding() -> None:
    """Scores of three values, as those of scene graphs, whose sums are equal in many resamples."""
    rng = np.random.default_rng(0)
    curve, other = (rng.integers(0, 3, (3, 3, 12)) / 3 for _ in range(2))
    costs = np.array([0.0, 1.0, 2.0])
    found = cost_to_target(curve, costs, other, costs)
    noisy = [part * (1 + 1e-15 * rng.standard_normal(part.shape)) for part in (curve, other)]
    again = cost_to_target(noisy[0], costs, noisy[1], costs)
    assert 0 < found.untargeted < 1 and (found.never, found.untargeted) == (again.never, again.untargeted)
