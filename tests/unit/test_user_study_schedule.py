"""What every schedule must keep, whatever the numbers: balance, blinding within a slot, order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from judged_study import settings

from invdpo.errors import InvdpoError
from user_study_app.schedule import PairPlan, _sides, draw
from user_study_app.settings import UserStudyConfig


def plans(prompts: int, per_prompt: int, attention: int, practice: int, seed: int = 0) -> list[PairPlan]:
    """Two groups of `prompts` prompts each, `per_prompt` pairs of each prompt."""
    rng = np.random.default_rng(seed)
    made = [
        PairPlan(f"{group}{prompt}-{number}", "trial", group, f"{group}{prompt}", int(rng.integers(2)))
        for number in range(per_prompt)
        for group in "AB"
        for prompt in range(prompts)
    ]
    made += [
        PairPlan(f"attention{n}", "attention", "A", f"attention{n}", int(rng.integers(2))) for n in range(attention)
    ]
    return made + [PairPlan(f"practice{n}", "practice", "B", f"practice{n}", 0) for n in range(practice)]


def scheme(**changes: Any) -> UserStudyConfig:
    return UserStudyConfig.model_validate(settings(**changes))


def sides(made: list[PairPlan], trials: list[dict[str, Any]]) -> list[tuple[dict[str, Any], PairPlan, int]]:
    """Trials that count with their plan and +1 where the reference image is on the left, -1 where it is not."""
    known = {plan.pair: plan for plan in made}
    return [
        (trial, known[trial["pair"]], 1 if trial["left"] == known[trial["pair"]].reference else -1)
        for trial in trials
        if trial["kind"] == "trial"
    ]


CASES = st.fixed_dictionaries(
    {
        "raters": st.integers(6, 14),
        "per_pair": st.integers(1, 3),
        "prompts": st.integers(12, 25),
        "per_prompt": st.integers(1, 2),
        "repeats": st.integers(0, 1),
        "attention": st.integers(0, 2),
        "practice": st.integers(0, 3),
        "seed": st.integers(0, 999),
    }
)


@given(case=CASES)
@profile(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_schedule_keeps_its_promises(case: dict[str, int]) -> None:
    prompts, per_prompt, seed = case.pop("prompts"), case.pop("per_prompt"), case.pop("seed")
    made = plans(prompts, per_prompt, case["attention"], case["practice"], seed)
    config = scheme(**case)
    if 2 * prompts * per_prompt * config.per_pair // config.raters < 4 and config.repeats:
        config = scheme(**case | {"repeats": 0})
    slots = draw(made, config, np.random.default_rng(seed))["slots"]
    assert [slot["slot"] for slot in slots] == list(range(config.raters))

    of_pair: Counter[str] = Counter()
    balance: dict[Any, int] = Counter()
    for slot in slots:
        trials = slot["trials"]
        assert [t["kind"] for t in trials[: config.practice]] == ["practice"] * config.practice
        kinds = Counter(t["kind"] for t in trials)
        assert (kinds["practice"], kinds["attention"], kinds["repeat"]) == (
            config.practice,
            config.attention,
            config.repeats,
        )
        counted = sides(made, trials)
        of_pair.update(plan.pair for _, plan, _ in counted)
        seen = [(plan.group, plan.prompt) for _, plan, _ in counted]
        assert len(set(seen)) == len(seen), "a rater meets a prompt twice"
        for _, plan, side in counted:
            for name in (slot["slot"], (slot["slot"], plan.group), plan.pair):
                balance[name] += side
        for index, trial in enumerate(trials):
            assert (trial["repeat_of"] is None) == (trial["kind"] != "repeat")
            if trial["kind"] == "repeat":
                first = trials[trial["repeat_of"]]
                assert (first["kind"], first["pair"], first["left"]) == ("trial", trial["pair"], 1 - trial["left"])
                assert index - trial["repeat_of"] > 1
    assert set(of_pair.values()) == {config.per_pair} and len(of_pair) == 2 * prompts * per_prompt
    sizes = [sum(t["kind"] == "trial" for t in slot["trials"]) for slot in slots]
    assert max(sizes) - min(sizes) <= 1
    assert {name: total for name, total in balance.items() if abs(total) > 1} == {}


def test_same_seed_same_schedule_and_every_slot_its_own_order() -> None:
    made, config = plans(24, 2, 2, 2), scheme()
    first, again, other = (draw(made, config, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    orders = [[t["pair"] for t in slot["trials"] if t["kind"] == "trial"] for slot in first["slots"]]
    assert all(a != b and set(a) != set(b) for i, a in enumerate(orders) for b in orders[:i])


def test_sides_and_raters_are_mixed_and_not_dealt_in_turn() -> None:
    """All pairs with the reference on the left, or fixed teams of raters, would pass every balance above."""
    made, config = plans(40, 1, 0, 0), scheme(raters=9, per_pair=3, attention=0, practice=0, repeats=0)
    slots = draw(made, config, np.random.default_rng(0))["slots"]
    flips = [side for slot in slots for _, _, side in sides(made, slot["trials"])]
    runs = 1 + sum(a != b for a, b in zip(flips, flips[1:], strict=False))
    assert 0.35 * len(flips) < runs < 0.65 * len(flips), "sides follow a pattern"
    together = Counter(
        (a["slot"], b["slot"])
        for a in slots
        for b in slots[: a["slot"]]
        for _ in {t["pair"] for t in a["trials"]} & {t["pair"] for t in b["trials"]}
    )
    assert len(together) > 30, "the same raters always meet on the same pairs"


def test_sides_are_drawn_and_not_worked_out() -> None:
    seen = [plans(20, 1, 0, 0)] * 3
    first, other = ([left for slot in _sides(seen, np.random.default_rng(s)) for _, left in slot] for s in (1, 2))
    assert 0.3 < np.mean(np.array(first) != np.array(other)) < 0.7


def test_attention_trials_are_spread_and_their_sides_balanced() -> None:
    made, config = plans(60, 1, 4, 0), scheme(attention=4, practice=0, per_pair=4)
    known = {plan.pair: plan for plan in made}
    slots = draw(made, config, np.random.default_rng(3))["slots"]
    for slot in slots:
        trials = slot["trials"]
        places = [index for index, trial in enumerate(trials) if trial["kind"] == "attention"]
        assert [int(4 * place / len(trials)) for place in places] == [0, 1, 2, 3] and places[0] > 0
        assert sum(trials[p]["left"] == known[trials[p]["pair"]].reference for p in places) == 2
    positions = {tuple(i for i, t in enumerate(s["trials"]) if t["kind"] == "attention") for s in slots}
    assert len(positions) == len(slots), "the same places in every slot"


@pytest.mark.parametrize(
    ("changes", "made", "words"),
    [
        ({"raters": 5}, plans(12, 2, 2, 2), "Raise `raters` to 6"),
        ({"repeats": 9}, plans(12, 1, 2, 2), "`repeats: 9` does not fit into a slot of 9 trials. It may be 3"),
        ({"attention": 40}, plans(12, 1, 40, 2), "`attention: 40` does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(changes: dict[str, Any], made: list[PairPlan], words: str) -> None:
    with pytest.raises(InvdpoError, match=words.replace("(", r"\(")):
        draw(made, scheme(**changes), np.random.default_rng(0))
