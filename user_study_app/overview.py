"""What the experimenter sees while the study runs: how far it is, and whether raters agree. No method is named here,
and nothing says which of a pair's images is chosen more often.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

from user_study_app.stimuli import Stimuli
from user_study_app.storage import now_ms

MINUTE = 60_000

Row = Mapping[str, Any]


def outcome(stimuli: Stimuli, vote: Row) -> int | str:
    """What a vote says of its pair whatever the sides: the index of the chosen image, `tie` or `problem`."""
    if vote["choice"] not in ("left", "right"):
        return vote["choice"]
    left = stimuli.slots[vote["slot"]][vote["position"]].left
    return left if vote["choice"] == "left" else 1 - left


def totals(stimuli: Stimuli, raters: Sequence[Row], votes: Sequence[Row], now: int | None = None) -> dict[str, Any]:
    """Counts of people and votes, and votes a minute over the last ten minutes. Practice is not counted."""
    now = now_ms() if now is None else now
    counted = [vote for vote in votes if stimuli.slots[vote["slot"]][vote["position"]].kind != "practice"]
    recent = sum(vote["submitted_at"] > now - 10 * MINUTE for vote in counted)
    places = sum(trial.kind != "practice" for trials in stimuli.slots.values() for trial in trials)
    return {
        "entered or invited": len(raters),
        "consented": sum(row["slot"] is not None for row in raters),
        "finished": sum(row["finished_at"] is not None for row in raters),
        "votes": len(counted),
        "votes planned": places,
        "votes a minute": round(recent / 10, 1),
    }


def groups(stimuli: Stimuli, votes: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a group, over its trials without repeats and attention checks. `agreement`: of all two raters who judged
    the same pair, the share who gave the same answer (None where no pair has two); problems are left out of it.
    """
    outcomes: dict[str, dict[str, list[int | str]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        trial = stimuli.slots[vote["slot"]][vote["position"]]
        if trial.kind == "trial":
            outcomes[stimuli.pairs[trial.pair].group][trial.pair].append(outcome(stimuli, vote))
    rows = []
    for group in stimuli.manifest.groups:
        given = Counter(answer for answers in outcomes[group].values() for answer in answers)
        same = [
            one == other
            for answers in outcomes[group].values()
            for one, other in combinations([answer for answer in answers if answer != "problem"], 2)
        ]
        rows.append(
            {
                "group": group,
                "pairs": sum(pair.kind == "trial" and pair.group == group for pair in stimuli.manifest.pairs),
                "pairs with votes": len(outcomes[group]),
                "votes": given.total(),
                "ties": given["tie"],
                "problems": given["problem"],
                "agreement": round(statistics.fmean(same), 3) if same else None,
            }
        )
    return rows


def people(stimuli: Stimuli, raters: Sequence[Row], votes: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a participant who consented: progress, failed attention checks, repeats answered as before, speed."""
    by_rater: dict[str, list[Row]] = defaultdict(list)
    for vote in votes:
        by_rater[vote["rater"]].append(vote)
    rows = []
    for person in raters:
        if person["slot"] is None:
            continue
        trials, given = stimuli.slots[person["slot"]], by_rater[person["id"]]
        median = statistics.median(vote["response_ms"] for vote in given) if given else None
        answers = {vote["position"]: outcome(stimuli, vote) for vote in given}
        checks = [at for at in answers if trials[at].kind == "attention"]
        again = [at for at in answers if trials[at].kind == "repeat"]
        failed = sum(answers[at] != stimuli.pairs[trials[at].pair].expected for at in checks)
        same = sum(answers[at] == answers.get(trials[at].repeat_of) for at in again)
        rows.append(
            {
                "participant": person["id"],
                "slot": person["slot"],
                "came by": "platform" if person["platform"] else "link",
                "answered": f"{len(given)} of {len(trials)}",
                "attention failed": f"{failed} of {len(checks)}",
                "repeats as before": f"{same} of {len(again)}",
                "median s": None if median is None else round(median / 1000, 1),
                "last vote (UTC)": readable(given[-1]["submitted_at"]) if given else None,
            }
        )
    return rows


def readable(ms: int) -> str:
    """A stored time for people, UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
