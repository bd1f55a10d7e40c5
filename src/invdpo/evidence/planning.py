"""How much to measure: what `invdpo power` says about prompts, training seeds and votes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from invdpo.errors import InvdpoError
from invdpo.evidence.load import baseline_of, load_evidence, scorer_title
from invdpo.evidence.statistics import (
    components,
    detectable_difference,
    needed_both,
    needed_prompts,
    needed_seeds,
    needed_votes,
)

if TYPE_CHECKING:
    from invdpo.config import StudyConfig


@dataclass(frozen=True)
class Spread:
    """Variances of a paired difference: (training seeds, prompts, residual), and how much they were measured on."""

    variances: tuple[float, float, float]
    seeds: int
    prompts: int
    source: str
    observed: float | None = None


def spread_of_study(study: StudyConfig, arm: str, baseline: str | None = None, scorer: str | None = None) -> Spread:
    """Variance components of arm minus baseline (default: the base model) in a finished study.

    Raises InvdpoError for arms or scores that the study has not, or has not measured.
    """
    study.arm(arm)
    against = baseline or baseline_of(study, arm)
    if against is None:
        raise InvdpoError(f"Study `{study.study}` has no arm without training; name one with --baseline.")
    study.arm(against)
    if arm == against:
        raise InvdpoError(f"--arm and --baseline are both `{arm}`; name two arms.")
    evidence = load_evidence(study)
    name = scorer or evidence.primary
    for side in (arm, against):
        if not evidence.has(side, name):
            known = ", ".join(evidence.scorers) or "none"
            raise InvdpoError(
                f"{study.root / 'scores' / side} has no {name} scores (scores of the study: {known}). Evaluate the "
                "arm, or name another --scorer."
            )
    values, others = evidence.paired(arm, against, name)
    table = values - others
    source = f"{study.study}: {arm} minus {against}, {scorer_title(name)}"
    seeds, prompts = table.shape
    return Spread(components(table), seeds, prompts, source, float(table.mean()))


def plan_difference(
    spread: Spread, difference: float | None, seeds: int, prompts: int, power: float, alpha: float
) -> str:
    """Lines on what `seeds` and `prompts` can find and, given a difference, how many of each would find it."""
    sds = [math.sqrt(variance) for variance in spread.variances]
    lines = [
        f"{spread.source}",
        f"standard deviations: training seeds {sds[0]:.3g}, prompts {sds[1]:.3g}, residual {sds[2]:.3g}"
        + ("" if spread.observed is None else f" (from {spread.seeds} seeds x {spread.prompts} prompts)"),
        f"{power:.0%} power, two-sided {alpha:.3g}, t-test with seeds and prompts random:",
        f"  {_count(seeds, 'seed')} x {_count(prompts, 'prompt')}: a difference of "
        f"{_size(detectable_difference(spread.variances, seeds, prompts, power, alpha))}",
    ]
    if spread.observed is not None:
        lines.append(f"  the study's own difference: {spread.observed:+.3g}")
    if difference is not None:
        effect = abs(difference)
        if effect == 0:
            raise InvdpoError("--difference is 0, which no number of prompts tells from 0; give the size to find.")
        more = needed_prompts(effect, spread.variances, seeds, power, alpha)
        trained = needed_seeds(effect, spread.variances, prompts, power, alpha)
        lines += [
            f"a difference of {effect:.3g} needs",
            f"  with {_count(seeds, 'seed')}: {_needed(more, 'prompt')}",
            f"  with {_count(prompts, 'prompt')}: {_needed(trained, 'training seed')}",
        ]
        if more is None and trained is None:
            both = needed_both(effect, spread.variances, seeds, prompts, power, alpha)
            sizes = f"{_count(both[0], 'seed')} x {_count(both[1], 'prompt')}" if both else "not 1,000 times of each"
            lines.append(f"  with more of both: {sizes}")
    if seeds == 1 or spread.seeds == 1:
        lines.append("One training seed says nothing about a method: this is about those runs' prompts alone.")
    return "\n".join(lines)


def plan_votes(share: float, power: float, alpha: float, votes_per_cluster: float, correlation: float) -> str:
    """A line on how many decided votes tell a share from one half."""
    try:
        votes = needed_votes(share, power, alpha, votes_per_cluster, correlation)
    except ValueError as error:
        raise InvdpoError(f"--share {share:g}: {error}.") from error
    alike = f", {votes_per_cluster:g} a cluster with correlation {correlation:g}" if votes_per_cluster > 1 else ""
    return f"{votes:,} decided votes{alike} tell {share:.1%} from one half ({power:.0%} power, two-sided {alpha:.3g})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(difference: float) -> str:
    return "no size: a level that varies is seen once" if math.isinf(difference) else f"{difference:.3g}"


def _needed(number: int | None, noun: str) -> str:
    return f"no number of {noun}s up to a million is enough" if number is None else _count(number, noun)
