"""What stands against what: differences with corrected tests, who leads a column, and the tables of comparisons.

A table's tests are one family: Holm's correction is over all of its rows and columns at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from invdpo.errors import InvdpoError
from invdpo.evidence import paper
from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    baseline_of,
    by_base,
    comparison_arms,
    scorer_title,
)
from invdpo.evidence.printing import Block, Table, format_interval, record_of, triple
from invdpo.evidence.statistics import (
    ALPHA,
    Interval,
    ToTarget,
    components,
    cost_to_target,
    detectable_difference,
    holm,
    mean_interval,
    p_value,
    prompt_interval,
)

Key = TypeVar("Key", bound=Hashable)

NOTE = (
    "95 % intervals: crossed bootstrap over training seeds and prompts (9,999 draws). Differences and win rates are "
    "paired by training seed and prompt; a tie counts one half."
)
LEADERS_NOTE = (
    "Bold: above every other row that it is compared with (p < 0.05, t-test with seeds and prompts random, Holm over "
    "all pairs of rows and all columns). =: the highest, or not told from it."
)
TESTED_NOTE = "*: told from {} at 5 % (the same test, Holm over all such cells of the table)."
BEST, TIED, BEHIND = "best", "tied", ""

# Verdicts on a gain in the score that a method was trained for, beside its gains in scores it was not trained for.
OVER_OPTIMISED = "over-optimised"
NOT_CONFIRMED = "not confirmed"
PARTLY = "partly confirmed"
CONFIRMED = "confirmed"
NO_GAIN = "no gain"
LOSS = "loss"


@dataclass(frozen=True)
class Difference:
    """A paired difference held against zero, as one of a family of tests.

    interval: crossed, of the method. prompts: BCa over prompts, of these runs. p_holm: `p_value` after Holm over the
    family. detectable: the true difference that a test of this size would find with 80 % power at 5 %, uncorrected.
    """

    interval: Interval
    prompts: Interval
    p_holm: float
    detectable: float

    @property
    def told(self) -> bool:
        """Whether it is told from zero, corrected."""
        return self.p_holm < ALPHA


def family(tables: Mapping[Key, np.ndarray]) -> dict[Key, Difference]:
    """Tables (seeds, prompts) of paired differences, each held against zero; Holm over all of them."""
    adjusted = holm([p_value(values) for values in tables.values()])
    return {
        key: Difference(
            mean_interval(values),
            prompt_interval(values),
            p,
            detectable_difference(components(values), *values.shape),
        )
        for (key, values), p in zip(tables.items(), adjusted, strict=True)
    }


def shifted(found: Difference, by: float) -> Difference:
    """The same measured from another zero: a win rate from its distance to one half."""
    ends = (
        replace(part, estimate=part.estimate + by, low=part.low + by, high=part.high + by)
        for part in (found.interval, found.prompts)
    )
    return replace(found, **dict(zip(("interval", "prompts"), ends, strict=True)))


def paired_table(evidence: Evidence, arm: str, baseline: str, scorer: str) -> np.ndarray | None:
    """(seeds, prompts) arm minus baseline; None where either has not been scored."""
    if not (evidence.has(arm, scorer) and evidence.has(baseline, scorer)):
        return None
    values, others = evidence.paired(arm, baseline, scorer)
    return values - others


def differences(evidence: Evidence, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str, str], Difference]:
    """(arm, baseline, scorer) -> that difference, for every scorer and all pairs that have been scored."""
    tables = {}
    for arm, baseline in pairs:
        for scorer in evidence.scorers:
            values = paired_table(evidence, arm, baseline, scorer)
            if values is not None:
                tables[arm, baseline, scorer] = values
    return family(tables)


def difference_columns(prefix: str) -> list[str]:
    """The csv columns of a difference."""
    return [*triple(prefix), *(f"{prefix}_{name}" for name in ("prompts_low", "prompts_high", "p_holm", "detectable"))]


def difference_record(prefix: str, found: Difference | None) -> dict[str, Any]:
    """Their values; none where there is no difference."""
    if found is None:
        return {}
    return record_of(prefix, found.interval) | {
        f"{prefix}_prompts_low": found.prompts.low,
        f"{prefix}_prompts_high": found.prompts.high,
        f"{prefix}_p_holm": found.p_holm,
        f"{prefix}_detectable": found.detectable,
    }


def difference_text(evidence: Evidence, scorer: str, found: Difference | None, *arms: str | None) -> str:
    """In print: the interval, starred where it is told from zero; without one, what is missing of the arms."""
    if found is None:
        return evidence.absent(scorer, *arms)
    return format_interval(found.interval, sign=True) + (" *" if found.told else "")


def detectable_note(evidence: Evidence, found: Mapping[tuple[str, str, str], Difference]) -> str:
    """What differences the table could have told from zero: per scorer, the median over its cells that vary."""
    parts = []
    for scorer in evidence.scorers:
        sizes = [d.detectable for (*_, name), d in found.items() if name == scorer and 0 < d.detectable < math.inf]
        if sizes:
            parts.append(f"{scorer_title(scorer)} {np.median(sizes):.2g}")
    if not parts:
        return "No difference varies, so none has a smallest detectable size."
    return (
        "Smallest true difference that one such test finds with 80 % power at 5 %, uncorrected (median over the "
        f"table's cells): {', '.join(parts)}."
    )


def standings(evidence: Evidence, groups: Mapping[str, Sequence[str]]) -> dict[tuple[str, str, str], str]:
    """(group, arm, scorer) -> its standing among the arms of the group, as `ranked` gives it."""
    means, tables = {}, {}
    for group, arms in groups.items():
        for scorer in evidence.scorers:
            scored = [arm for arm in dict.fromkeys(arms) if evidence.has(arm, scorer)]
            means[group, scorer] = {arm: float(evidence.final(arm, scorer).mean()) for arm in scored}
            for pair in combinations(scored, 2):
                values, others = evidence.paired(*pair, scorer)
                tables[(group, scorer), frozenset(pair)] = values - others
    found = ranked(means, tables)
    return {(group, arm, scorer): standing for ((group, scorer), arm), standing in found.items()}


def ranked(
    means: Mapping[Key, Mapping[str, float]], tables: Mapping[tuple[Key, frozenset[str]], np.ndarray]
) -> dict[tuple[Key, str], str]:
    """(column, name) -> `best` if it beats every other name of the column, `tied` if it is the highest but does not, or
    is not told from the highest, otherwise empty.

    means: of each column, which have two names or more to be ranked. tables: paired differences (seeds, prompts) of
    every two names of a column. Holm over all of them: which name is highest was picked after looking.
    """
    adjusted = dict(zip(tables, holm([p_value(values) for values in tables.values()]), strict=True))
    found = {}
    for column, names in means.items():
        if len(names) < 2:
            continue
        highest = max(names, key=lambda name: names[name])
        level = {name for name in names if name != highest and adjusted[column, frozenset((name, highest))] >= ALPHA}
        found |= {(column, name): TIED if name in level else BEHIND for name in names}
        found[column, highest] = TIED if level else BEST
    return found


def marked(text: str, standing: str) -> str:
    """A cell as its standing is printed."""
    return {BEST: f"**{text}**", TIED: f"{text} ="}.get(standing, text)


def win_rates(evidence: Evidence) -> Table:
    """Every pair of the comparison's arms: the share of prompts and seeds in which the first scores higher."""
    arms, scorers = comparison_arms(evidence.study), evidence.scorers
    pairs = [pair for group in by_base(evidence.study, arms).values() for pair in combinations(group, 2)]
    tables = {}
    for scorer in scorers:
        for first, second in pairs:
            values = paired_table(evidence, first, second, scorer)
            if values is not None:
                tables[first, second, scorer] = np.sign(values) / 2
    adjusted = dict(zip(tables, holm([p_value(values) for values in tables.values()]), strict=True))
    columns = ["scorer", "arm", "against", "status", "seeds", "prompts", *triple("win_rate"), "ties", "p_holm"]
    records, blocks = [], []
    for scorer in scorers:
        cells = {}
        for first, second in pairs:
            record: dict[str, Any] = {"scorer": scorer, "arm": first, "against": second}
            record["status"] = evidence.status(scorer, first, second)
            values = tables.get((first, second, scorer))
            cells[first, second] = evidence.absent(scorer, first, second)
            if values is not None:
                rate, p = mean_interval(values + 0.5), adjusted[first, second, scorer]
                record |= {"seeds": rate.seeds, "prompts": rate.prompts, "p_holm": p}
                record |= record_of("win_rate", rate) | {"ties": float((values == 0).mean())}
                cells[first, second] = marked(format_interval(rate), BEST if p < ALPHA else "")
            records.append(record)
        rows = [[arm_title(row), *(cells.get((row, column), "–") for column in arms[1:])] for row in arms[:-1]]
        blocks.append(Block(scorer_title(scorer), ["Row against column", *map(arm_title, arms[1:])], rows))
    notes = [
        NOTE,
        "Share of training seeds and prompts in which the row's picture scores higher than the column's, on the same "
        "prompt and noise. Bold: told from one half at 5 % (t-test with seeds and prompts random, Holm over all pairs "
        "and scores).",
        *evidence.missing(arms),
    ]
    return Table("Win rates between methods", notes, records, columns, blocks)


def optimisation_verdict(trained: Interval, held_out: Iterable[Interval]) -> str:
    """What a gain in the score that a method was trained for is worth, by its change in scores it was not.

    A score is up where its interval lies above 0 and down where it lies below. `loss`: the trained score is down. `no
    gain`: it is neither. Otherwise `over-optimised` where some held-out score is down, `confirmed` where all are up,
    `partly confirmed` where some are, and `not confirmed` where none is.
    """
    others = list(held_out)
    if trained.low <= 0:
        return LOSS if trained.high < 0 else NO_GAIN
    if any(other.high < 0 for other in others):
        return OVER_OPTIMISED
    up = sum(other.low > 0 for other in others)
    return CONFIRMED if up == len(others) else PARTLY if up else NOT_CONFIRMED


def over_optimisation(evidence: Evidence) -> Table:
    """Gains on the score whose votes a method was trained on, beside those on the held-out ones, along training."""
    settings = evidence.study.experiments.over_optimisation
    title = "Over-optimisation"
    if settings is None:
        return Table(title, ["The study names no `experiments.over_optimisation`."], [], ["arm", "status"], [])
    judged = [settings.trained, *settings.held_out]
    _check_scorers(evidence, judged, "experiments.over_optimisation")
    columns = ["arm", "status", "from_step", "to_step", "seeds", "prompts", "verdict"]
    columns += [column for scorer in judged for column in triple(scorer)]
    records, finals, changes = [], [], []
    for arm in comparison_arms(evidence.study):
        base = baseline_of(evidence.study, arm)
        if arm == base:
            continue
        curves = [evidence.from_base(arm, s) if evidence.has(arm, s) else None for s in judged]
        known = [curve for curve in curves if curve is not None]
        if len(known) < len(judged):
            lacks = [evidence.absent(scorer, arm, base) for scorer in judged]
            records.append({"arm": arm, "status": evidence.status(None, arm, base) if base else lacks[0]})
            finals.append([arm_title(arm), *lacks, "–"])
            continue
        steps = [0, *evidence.scores[arm].steps]
        last = len(steps) - 1
        spans = [(0, k) for k in range(1, last + 1)] + [(k - 1, k) for k in range(2, last + 1)]
        for start, end in spans:
            gains = [mean_interval(curve[end] - curve[start]) for curve in known]
            verdict = optimisation_verdict(gains[0], gains[1:])
            record: dict[str, Any] = {"arm": arm, "status": "ok", "from_step": steps[start], "to_step": steps[end]}
            record |= {"seeds": gains[0].seeds, "prompts": gains[0].prompts, "verdict": verdict}
            for scorer, gain in zip(judged, gains, strict=True):
                record |= record_of(scorer, gain)
            records.append(record)
            cells = [format_interval(gain, sign=True) for gain in gains]
            shown = marked(verdict, BEST if verdict == OVER_OPTIMISED else "")
            if (start, end) == (0, last):
                finals.append([arm_title(arm), *cells, shown])
            else:
                changes.append([arm_title(arm), f"{steps[start]} to {steps[end]}", *cells, shown])
    heads = [f"{scorer_title(s)} ({'trained on' if s == settings.trained else 'held out'})" for s in judged]
    blocks = [
        Block("Last checkpoint minus the base model", ["Method", *heads, "Verdict"], finals),
        Block("Along training", ["Method", "Steps", *heads, "Verdict"], changes),
    ]
    notes = [
        NOTE,
        f"The pairs that all methods train on are votes of the kind {scorer_title(settings.trained)} was trained on. A "
        "score is up where its interval lies above 0, down where it lies below; intervals are not corrected for their "
        f"number. {OVER_OPTIMISED}: {scorer_title(settings.trained)} is up and a held-out score down. {CONFIRMED}: it "
        f"is up and so are all held-out ones. {PARTLY}: some of them are, none is down. {NOT_CONFIRMED}: none is up, "
        f"none down. {NO_GAIN}: it is neither up nor down. {LOSS}: it is down.",
        *evidence.missing(
            [arm for each in comparison_arms(evidence.study) for arm in (each, baseline_of(evidence.study, each))]
        ),
    ]
    return Table(title, notes, records, columns, blocks)


def _check_scorers(evidence: Evidence, names: Sequence[str], where: str) -> None:
    """A score that nothing in the study has is a typing error, unless nothing has run yet."""
    for name in names:
        if evidence.scores and name not in evidence.scorers:
            raise InvdpoError(f"`{where}` names the score `{name}`, which is none of {', '.join(evidence.scorers)}.")


# axis of `to_target` -> how it is called in print; seconds differ between two runs and stay out of tables
AXES = {"step": "Optimizer steps", "unet_evals": "UNet evaluations"}


def reach(evidence: Evidence, arm: str, target: str, scorer: str, axis: str) -> ToTarget | None:
    """How soon `arm` reaches the final score of `target`; None where curves or costs are missing or share no seed."""
    if not (evidence.has(arm, scorer) and evidence.has(target, scorer)):
        return None
    curves = evidence.paired_from_base(arm, target, scorer)
    costs = [evidence.costs_from_base(name, axis) for name in (arm, target)]
    if curves is None or not all(np.isfinite(cost).all() for cost in costs):
        return None
    return cost_to_target(curves[0], costs[0], curves[1], costs[1])


def contenders(evidence: Evidence) -> tuple[str, list[str]]:
    """The arm whose final score is the target, and the trained arms of the comparison that are timed against it.

    Both empty where the study names no `experiments.to_target`.
    """
    settings = evidence.study.experiments.to_target
    if settings is None:
        return "", []
    base = baseline_arm(evidence.study)
    return settings.arm, [arm for arm in comparison_arms(evidence.study) if arm not in (base, settings.arm)]


def to_target(evidence: Evidence) -> Table:
    """Steps and UNet evaluations after which each method reaches the target's final score, and the ratio of the two."""
    target, arms = contenders(evidence)
    base = baseline_arm(evidence.study)
    if not target:
        notes = ["The study names no `experiments.to_target`."]
        return Table("Cost to reach a score", notes, [], ["arm", "status"], [])
    columns = ["scorer", "axis", "arm", "status", "seeds", "prompts", *triple("cost"), *triple("ratio")]
    columns += ["never_reached", "no_target"]
    records, blocks = [], []
    for scorer in evidence.scorers:
        rows = []
        for arm in arms:
            cells, shares = [], "–"
            absent = evidence.absent(scorer, arm, target, base)
            state = evidence.status(scorer, arm, target, base)
            for axis in AXES:
                found = reach(evidence, arm, target, scorer, axis)
                record = {"scorer": scorer, "axis": axis, "arm": arm, "status": absent if state == "ok" else state}
                records.append(record | (reach_record(found) if found else {}))
                cells += _reach_text(found) if found else [absent, "–"]
                if found:  # the same on every axis
                    shares = f"{found.never:.0%}" + (f" (no target {found.untargeted:.0%})" if found.untargeted else "")
            rows.append([arm_title(arm), *cells, shares])
        head = [word for title in AXES.values() for word in (title, "Ratio")]
        blocks.append(Block(scorer_title(scorer), ["Method", *head, "Never reached"], rows))
    notes = [
        "95 % intervals: crossed bootstrap over training seeds and prompts (9,999 draws).",
        f"What a method has spent when its mean score, interpolated between checkpoints from the base model on, first "
        f"reaches the final one of {arm_title(target)}. Ratio: what {arm_title(target)} needs over what the method "
        "needs, above 1 where the method is faster, 0 where it never gets there; a resample that ends below the target "
        "bounds it from above by what was spent at its end. Never reached: share of resamples that end below the "
        f"target; no target: share in which {arm_title(target)} ends no higher than the base model.",
        f"{paper.speed_note()} From these it concludes that it is more than twice as fast by optimizer step.",
        *evidence.missing([*arms, target, base]),
    ]
    return Table(f"Cost to reach the final score of {arm_title(target)}", notes, records, columns, blocks)


def reach_record(found: ToTarget) -> dict[str, Any]:
    """As csv fields; a cost or bound that is infinite is left empty."""
    values = {
        "status": "no target" if found.ratio is None else "ok" if found.ratio else "never reached",
        "seeds": found.seeds,
        "prompts": found.prompts,
        "cost": found.cost,
        "cost_low": found.cost_low,
        "cost_high": found.cost_high,
        "ratio": found.ratio,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "never_reached": found.never,
        "no_target": found.untargeted,
    }
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}


def _reach_text(found: ToTarget) -> list[str]:
    """Cost and ratio in print."""
    if found.ratio is None:
        return ["no target", "–"]
    cost, low, high = (
        "never" if math.isinf(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        for value in (found.cost, found.cost_low, found.cost_high)
    )
    high_ratio = "∞" if math.isinf(found.high) else f"{found.high:.2f}"
    spent = cost if cost == low == high else f"{cost} [{low}, {high}]"
    return [spent, f"{found.ratio:.2f} [{found.low:.2f}, {high_ratio}]"]
