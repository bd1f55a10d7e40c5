"""How many raters, pairs and votes a comparison needs, by the normal approximation of a share against one half.

Decisive, independent votes for 80 % power at the two-sided 5 % level: 2,178 for a win rate of 53 %, 783 for 55 %, 305
for 58 %, 194 for 60 %. Ties decide nothing, and votes on one pair, or of one rater, resemble each other: the number
grows by 1 / (1 - tie rate) and by the design effect 1 + (m - 1) rho of each level, m votes a cluster with intraclass
correlation rho (for pairs about Krippendorff's alpha of a pilot). The robust interval of the analysis has this power;
the crossed bootstrap is wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from invdpo.errors import InvdpoError
from invdpo.evidence.statistics import independent_votes
from user_study_app.settings import UserStudyConfig

RESOLUTION = 1e-6  # of a win rate, below which it is one half


@dataclass(frozen=True)
class Plan:
    """What one comparison of two methods needs. `raters` is for all comparisons of the study together."""

    decisive: int
    design_effect: float
    votes: int
    pairs: int
    raters: int


def decisive_votes(win_rate: float, power: float = 0.8, level: float = 0.05) -> int:
    """Decisive, independent votes that tell `win_rate` from one half with this power, two-sided."""
    _check(win_rate, power, level)
    return math.ceil(independent_votes(win_rate, power, level))


def _check(win_rate: float, power: float, level: float) -> None:
    if not 0 < win_rate < 1 or abs(win_rate - 0.5) < RESOLUTION:
        raise InvdpoError(
            f"A win rate of {win_rate:g} cannot be planned for: it must lie between 0 and 1 and not be 0.5."
        )
    if not level < power < 1 or not 0 < level < 1:
        raise InvdpoError(f"power {power:g} and level {level:g}: give shares with 0 < level < power < 1.")


def design_effect(per_pair: float, rho_pair: float, per_rater: float = 1, rho_rater: float = 0) -> float:
    """1 + (m - 1) rho, summed over the votes a pair and the votes a rater of one comparison."""
    return 1 + max(0.0, per_pair - 1) * rho_pair + max(0.0, per_rater - 1) * rho_rater


def plan(
    win_rate: float,
    *,
    tie_rate: float = 0.0,
    per_pair: int = 1,
    trials: int = 60,
    comparisons: int = 1,
    rho_pair: float = 0.0,
    rho_rater: float = 0.0,
    power: float = 0.8,
    level: float = 0.05,
) -> Plan:
    """What each comparison needs where raters see `trials` trials in all and a pair gets `per_pair` votes.

    win_rate: among decisive votes. Raises InvdpoError for values that make no plan.
    """
    for name, share in (("tie rate", tie_rate), ("rho of pairs", rho_pair), ("rho of raters", rho_rater)):
        if not 0 <= share < 1:
            raise InvdpoError(f"The {name} {share:g} must lie between 0 and 1.")
    decisive = decisive_votes(win_rate, power, level)
    effect = design_effect(per_pair, rho_pair, trials / comparisons, rho_rater)
    votes = math.ceil(decisive * effect / (1 - tie_rate))
    pairs = math.ceil(votes / per_pair)
    raters = max(per_pair, math.ceil(pairs * per_pair * comparisons / trials))
    return Plan(decisive, effect, votes, pairs, raters)


def detectable(votes: int, tie_rate: float, effect: float, power: float = 0.8, level: float = 0.05) -> float | None:
    """The smallest win rate above one half that so many votes of one comparison detect; None where none is."""
    effective = votes * (1 - tie_rate) / effect
    top = 1 - RESOLUTION
    if independent_votes(top, power, level) > effective:
        return None
    bottom = 0.5 + RESOLUTION
    return float(brentq(lambda rate: independent_votes(rate, power, level) - effective, bottom, top))  # pyright: ignore


def of_study(
    settings: UserStudyConfig, *, tie_rate: float, rho_pair: float, rho_rater: float, power: float, level: float
) -> list[tuple[str, int, float | None]]:
    """Of every group of a study: its arms in words, its votes when all raters finish, and what these detect."""
    found = []
    for group in settings.groups:
        votes = group.pairs * settings.per_pair
        effect = design_effect(settings.per_pair, rho_pair, votes / settings.raters, rho_rater)
        found.append((" against ".join(group.arms[::-1]), votes, detectable(votes, tie_rate, effect, power, level)))
    return found
