"""Who sees which pair, when, and on which side: decided before the first vote, by one seeded generator.

A slot is the place of one participant. Its trials:

1. practice, in one order for all;
2. the slot's share of the pairs, shuffled. Every pair goes to `per_pair` slots and slots differ by at most one pair.
   No slot has two pairs of one prompt: the images of a method that is not trained are the same in all of them, and
   a rater would learn which side it is;
3. repeats, with sides swapped, of trials of the first half, among those of the second half, never adjacent;
4. attention trials, one in each of as many equal stretches of 2 and 3.

Sides are balanced where it matters, between the two *methods* of a group, up to one: for each pair over the slots that
see it, and in each slot, over all pairs and over those of each group. (Which of a pair's images the manifest names
first is random, so counts of `left` alone say nothing.) These sets are two laminar families, so the linear programme
with those bounds has whole-numbered vertices, and a random objective draws one of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack

from invdpo.errors import InvdpoError
from user_study_app.settings import UserStudyConfig


@dataclass(frozen=True)
class PairPlan:
    """A pair as the schedule sees it. `reference` is the image (0 or 1) whose side is balanced: the one of the
    group's first arm or, of an attention pair, the one that fits the prompt.
    """

    pair: str
    kind: Literal["trial", "attention", "practice"]
    group: str
    prompt: str
    reference: int


def draw(pairs: Sequence[PairPlan], settings: UserStudyConfig, rng: np.random.Generator) -> dict[str, Any]:
    """The content of schedule.json: {slots: [{slot, trials: [{pair, left, kind, repeat_of}]}]}.

    `left` is the image (0 or 1) on the left, `repeat_of` the index in the slot of the trial that is shown again.
    Raises InvdpoError where raters, pairs and repeats do not fit each other.
    """
    by_kind: dict[str, list[PairPlan]] = defaultdict(list)
    for plan in pairs:
        by_kind[plan.kind].append(plan)
    seen = {
        "trial": _deal(by_kind["trial"], settings, rng),
        "attention": [by_kind["attention"]] * settings.raters,
        "practice": [by_kind["practice"]] * settings.raters,
    }
    sided = {kind: _sides(plans, rng) for kind, plans in seen.items()}
    slots = []
    for slot in range(settings.raters):
        parts = {kind: plans[slot] for kind, plans in sided.items()}
        slots.append({"slot": slot, "trials": _order(parts, settings, rng)})
    return {"slots": slots}


def _deal(trials: list[PairPlan], settings: UserStudyConfig, rng: np.random.Generator) -> list[list[PairPlan]]:
    """Slot -> its pairs. All pairs of a prompt go to different slots, always to those that have fewest so far, which
    keeps their numbers equal up to one.
    """
    prompts: dict[tuple[str, str], list[PairPlan]] = defaultdict(list)
    for plan in trials:
        prompts[plan.group, plan.prompt].append(plan)
    seen: list[list[PairPlan]] = [[] for _ in range(settings.raters)]
    for pairs in prompts.values():
        places = len(pairs) * settings.per_pair
        if places > settings.raters:
            raise InvdpoError(
                f"user_study: the prompt `{pairs[0].prompt}` has {len(pairs)} pairs for {settings.per_pair} raters "
                f"each; with {settings.raters} raters one of them would meet it twice. Raise `raters` to {places}, or "
                "lower `per_pair` or a group's `pairs`."
            )
        load = np.array([len(slot) for slot in seen])
        emptiest = np.lexsort([rng.random(settings.raters), load])[:places]
        for place, slot in enumerate(rng.permutation(emptiest)):
            seen[slot].append(pairs[place // settings.per_pair])
    fewest = min(map(len, seen))
    for name, wanted, most in (
        ("repeats", settings.repeats, max(0, fewest // 2 - 1)),
        ("attention", settings.attention, fewest),
    ):
        if wanted > most:
            raise InvdpoError(
                f"user_study: `{name}: {wanted}` does not fit into a slot of {fewest} trials. It may be {most} there; "
                "for more, raise a group's `pairs` or lower `raters`."
            )
    return seen


def _sides(seen: list[list[PairPlan]], rng: np.random.Generator) -> list[list[tuple[str, int]]]:
    """Slot -> its pairs, each with the image (0 or 1) that is on the left."""
    shown = [(slot, plan) for slot, plans in enumerate(seen) for plan in plans]
    if not shown:
        return [[] for _ in seen]
    sets: dict[tuple[str | int, ...], list[int]] = defaultdict(list)
    for index, (slot, plan) in enumerate(shown):
        for name in (("pair", plan.pair), ("slot", slot), ("group", slot, plan.group)):
            sets[name].append(index)
    members = list(sets.values())
    rows = np.repeat(np.arange(len(members)), [len(indices) for indices in members])
    within = csr_array((np.ones(len(rows)), (rows, np.concatenate(members))), shape=(len(members), len(shown)))
    half = np.array([len(indices) / 2 for indices in members])
    reference_left = linprog(
        rng.normal(size=len(shown)),
        A_ub=vstack([within, -within]),
        b_ub=np.concatenate([np.ceil(half), -np.floor(half)]),
        bounds=(0, 1),
        method="highs-ds",
    ).x
    sided: list[list[tuple[str, int]]] = [[] for _ in seen]
    for (slot, plan), left in zip(shown, reference_left, strict=True):
        sided[slot].append((plan.pair, plan.reference if left > 0.5 else 1 - plan.reference))
    return sided


def _order(
    parts: dict[str, list[tuple[str, int]]], settings: UserStudyConfig, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The trials of one slot in the order they are shown."""
    trials: list[tuple[str, int]] = [parts["trial"][i] for i in rng.permutation(len(parts["trial"]))]
    half = len(trials) // 2
    # The last of the first half is never repeated, so that it keeps a repeat from its original.
    again = rng.choice(half - 1, settings.repeats, replace=False) if settings.repeats else []
    body: list[tuple[str, str, int]] = [("trial", *trial) for trial in trials[:half]]
    rest: list[tuple[str, str, int]] = [("trial", *trial) for trial in trials[half:]]
    rest += [("repeat", trials[i][0], 1 - trials[i][1]) for i in again]
    body += [rest[i] for i in rng.permutation(len(rest))]

    checks = [("attention", *parts["attention"][i]) for i in rng.permutation(len(parts["attention"]))]
    stretch = len(body) / max(1, len(checks))
    for number in reversed(range(len(checks))):
        start, end = math.ceil(number * stretch), math.ceil((number + 1) * stretch)
        body.insert(int(rng.integers(start, end)) + 1, checks[number])

    shown = [("practice", *trial) for trial in parts["practice"]] + body
    first = {pair: index for index, (kind, pair, _) in enumerate(shown) if kind == "trial"}
    return [
        {"pair": pair, "left": left, "kind": kind, "repeat_of": first[pair] if kind == "repeat" else None}
        for kind, pair, left in shown
    ]
