"""Planning against known numbers, and against simulated power."""

from __future__ import annotations

import numpy as np
import pytest
from judged_study import settings
from scipy.stats import binom, norm

from invdpo.errors import InvdpoError
from user_study_app.power import decisive_votes, design_effect, detectable, of_study, plan
from user_study_app.settings import UserStudyConfig


@pytest.mark.parametrize(("rate", "votes"), [(0.53, 2178), (0.55, 783), (0.58, 305), (0.60, 194)])
def test_decisive_votes_of_the_literature(rate: float, votes: int) -> None:
    assert decisive_votes(rate) == votes == decisive_votes(1 - rate)


@pytest.mark.parametrize("rate", [0.55, 0.6, 0.7])
def test_that_many_votes_have_the_power(rate: float) -> None:
    """Exact binomial power of the two-sided test of one half."""
    n = decisive_votes(rate)
    wins = np.arange(n + 1)
    rejected = np.abs(wins - n / 2) > norm.isf(0.025) * np.sqrt(n) / 2
    assert binom.pmf(wins[rejected], n, rate).sum() == pytest.approx(0.8, abs=0.03)


def test_ties_and_correlation_cost_votes() -> None:
    assert design_effect(3, 0.2) == pytest.approx(1.4)
    assert design_effect(3, 0.2, 31, 0.01) == pytest.approx(1.7)
    assert plan(0.6).votes == 194
    found = plan(0.6, tie_rate=0.2, per_pair=3, trials=60, comparisons=2, rho_pair=0.2, rho_rater=0.01)
    effect = 1 + 2 * 0.2 + 29 * 0.01
    assert found.design_effect == pytest.approx(effect)
    assert found.votes == int(np.ceil(194 * effect / 0.8)) == 410
    assert found.pairs == 137 and found.raters == 14  # 137 x 3 votes x 2 groups over 60 trials
    assert plan(0.9, per_pair=12).raters == 12, "a pair needs that many different raters"


def test_detectable_is_the_inverse() -> None:
    votes = plan(0.58, tie_rate=0.1, per_pair=3, rho_pair=0.1).votes
    assert detectable(votes, 0.1, design_effect(3, 0.1)) == pytest.approx(0.58, abs=2e-4)
    assert detectable(2, 0.1, 1.0) is None


def test_a_study_as_it_is() -> None:
    config = UserStudyConfig.model_validate(settings())
    found = of_study(config, tie_rate=0.0, rho_pair=0.0, rho_rater=0.0, power=0.8, level=0.05)
    assert [(name, votes) for name, votes, _ in found] == [
        ("gecko_inverted against walrus_base", 72),
        ("gecko_inverted against marmot_dpo", 72),
    ]
    assert decisive_votes(float(found[0][2] or 0)) == 72


@pytest.mark.parametrize("arguments", [{"win_rate": 0.5}, {"win_rate": 1.0}, {"win_rate": 0.6, "power": 0.01}])
def test_nonsense_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InvdpoError):
        decisive_votes(**arguments)
    with pytest.raises(InvdpoError, match="tie rate 1"):
        plan(0.6, tie_rate=1.0)
