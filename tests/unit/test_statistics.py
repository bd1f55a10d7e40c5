"""Closed-form and simulated checks of the intervals."""

from __future__ import annotations

import numpy as np
import pytest

from invdpo.evidence.statistics import (
    bootstrap_means,
    components,
    holm,
    mean_interval,
    p_value,
    paired_difference,
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


@pytest.mark.parametrize(
    ("by_seed", "by_prompt", "noise", "seeds", "at_least", "at_most"),
    [(0.1, 1.0, 0.5, 3, 0.90, 0.99), (0.0, 0.5, 1.0, 3, 0.94, 1.0), (1.0, 0.3, 0.3, 3, 0.65, 0.87)],
)
def test_coverage(by_seed: float, by_prompt: float, noise: float, seeds: int, at_least: float, at_most: float) -> None:
    """Near nominal where prompts vary most, too wide under noise, too narrow where three seeds vary most."""
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(120):
        table = by_seed * rng.normal(size=(seeds, 1)) + by_prompt * rng.normal(size=(1, 48))
        interval = mean_interval(table + noise * rng.normal(size=(seeds, 48)))
        covered.append(interval.low <= 0 <= interval.high)
    assert at_least <= np.mean(covered) <= at_most


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
