"""What a claim of config/claims.yaml is, the tests that decide it, and the verdicts.

A claim is `supported` when its interval lies beyond the threshold, `not supported` when it lies on the other side (or
reaches the threshold from there without crossing it: a method that changed nothing has the interval [0, 0]),
`inconclusive` when the threshold is inside or only one training seed was run, and `not run` when an arm, a score, a
family or an experiment of the test does not exist. Where the mean of a table is tested, the t-test has to agree: the
bootstrap of three seeds is too narrow where seeds vary most (see `statistics`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from invdpo.errors import InvdpoError
from invdpo.evidence.statistics import ALPHA, mean_interval, p_value, settling_size

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = ("supported", "not supported", "inconclusive", "not run")

# kind of test -> how many arms it may name
ARMS_OF = {
    "difference": (2,),
    "speed": (2,),
    "distance": (2,),
    "steadiness": (2,),
    "cost": (2,),
    "distribution": (2,),
    "votes": (2,),
    "rise": (1,),
    "dip": (1,),
    "gradient": (1,),
    "trend": (0,),
    "round_trip": (0,),
    "agreement": (1, 2),
}
# What low and high are. A range has no level: it says what was seen, not what another run would show.
OVER_PROMPTS = "95 %, over seeds and prompts"
# setting of a test -> the only kind that reads it
ONLY_FOR = {"policy": "agreement", "draws": "agreement", "rounding": "gradient", "guidance_scale": "round_trip"}
# what of an experiment's files is measured -> how it is called in print
AGREEMENTS = {"spearman": "Spearman with the true log-ratio", "order": "pairs ordered as the truth orders them"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Strict):
    """How a claim is decided; the head of config/claims.yaml explains each kind."""

    __test__ = False  # not a test of pytest's

    kind: Literal[
        "difference",
        "speed",
        "trend",
        "rise",
        "dip",
        "gradient",
        "distance",
        "steadiness",
        "cost",
        "agreement",
        "round_trip",
        "distribution",
        "votes",
    ]
    arms: list[str] = []
    metric: str = "primary"
    axis: Literal["step", "unet_evals", "seconds"] = "step"
    direction: Literal["higher", "lower"] = "higher"
    threshold: float = 0.0
    policy: str | None = None
    draws: PositiveInt | None = None
    rounding: Literal["none", "float16", "bfloat16"] | None = None
    guidance_scale: float | None = None


class Claim(_Strict):
    """One sentence of the paper, or one question of the study. written: before any run was made, or after those that it
    rests on had been seen. run_in: the study of config/ that has the arms, where others that share the ledger have not.
    """

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    locus: str
    question: str
    written: Literal["before", "after"]
    quote: str = ""
    paper_value: str = ""
    variants: list[str] = []
    run_in: str | None = None
    test: Test


@dataclass(frozen=True)
class Verdict:
    """One row of claims.json. value, low and high are on the scale of the test (a difference, a ratio, a norm).

    interval: what low and high are. prompts: of a test on scores. pairs: held-out ones of a test on an experiment, in
    each of its `batches` if any. pictures: of a test on inversions or votes. deviations: ids of config/deviations.yaml
    that apply. artifacts: the files and folders behind the value, below the study's folder.
    """

    id: str
    variant: str
    locus: str
    quote: str
    question: str
    test: dict[str, Any]
    paper_value: str
    written: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    seeds: int = 0
    prompts: int = 0
    pairs: int = 0
    batches: int = 0
    pictures: int = 0
    seeds_agreeing: int | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str = NOT_RUN
    reason: str = ""
    would_settle: str = ""
    deviations: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def ranged(self) -> bool:
        """Whether low and high are the ends of what was seen, and no interval."""
        return self.interval.startswith("range")


def load_claims(path: Path) -> list[Claim]:
    """Read the claims; InvdpoError names what is wrong in the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvdpoError(f"{path}: no such file. Set `claims:` of the study to the claims file.") from error
    except yaml.YAMLError as error:
        raise InvdpoError(f"{path}: not valid YAML ({error}).") from error
    if not isinstance(content, dict) or set(content) != {"claims"} or not isinstance(content["claims"], list):
        raise InvdpoError(f"{path}: expected one key `claims` with a list.")
    try:
        claims = [Claim.model_validate(entry) for entry in content["claims"]]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvdpoError(f"{path}: `{place}`: {first['msg']}") from error
    names = [claim.id for claim in claims]
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise InvdpoError(f"{path}: the id `{name}` is used twice.")
    for claim in claims:
        if len(claim.quote.split()) > 25:
            raise InvdpoError(f"{path}: the quotation of `{claim.id}` is longer than 25 words.")
        _check_test(f"{path}: `{claim.id}`", claim.test)
    return claims


def _check_test(where: str, test: Test) -> None:
    expected = ARMS_OF[test.kind]
    if len(test.arms) not in expected:
        counts = " or ".join(map(str, expected))
        raise InvdpoError(f"{where} needs {counts} arms for a test of kind {test.kind}.")
    for name, kind in ONLY_FOR.items():
        if getattr(test, name) is not None and test.kind != kind:
            raise InvdpoError(f"{where}: `{name}` belongs to tests of kind {kind}, not {test.kind}; leave it out.")
    if test.kind == "agreement" and (test.policy is None or test.metric not in AGREEMENTS):
        raise InvdpoError(
            f"{where}: a test of kind agreement needs `policy`, an arm, and as `metric` one of {', '.join(AGREEMENTS)}."
        )


def decide(low: float, high: float, threshold: float, direction: str, seeds: int | None) -> str:
    """The verdict for an interval: `supported` beyond the threshold, `not supported` up to it, else `inconclusive`.

    seeds: trainings behind it, of which one decides nothing; None where nothing was trained.
    """
    if seeds is not None and seeds < 2:
        return INCONCLUSIVE
    if direction == "lower":
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return SUPPORTED
    return NOT_SUPPORTED if high <= threshold else INCONCLUSIVE


def judge_table(table: np.ndarray, seeds: int, test: Test, row: Verdict, unit: str = "prompts") -> Verdict:
    """The mean of a table (seeds, `unit`) against the threshold. seeds: how many of its rows are trainings.

    The interval decides, unless the t-test of the same table does not see what it sees.
    """
    interval, p = mean_interval(table), p_value(table, test.threshold)
    verdict = decide(interval.low, interval.high, test.threshold, test.direction, seeds)
    reason = one_seed(seeds)
    if verdict != INCONCLUSIVE and p > ALPHA and interval.low < interval.high:
        verdict, reason = (
            INCONCLUSIVE,
            f"the interval lies on one side of {test.threshold:g}, the t-test does not see it",
        )
    settle = ""
    if verdict == INCONCLUSIVE:
        settle = settle_text(settling_size(table, test.threshold), table.shape, unit)
    return replace(
        row,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        interval=OVER_PROMPTS.replace("prompts", unit),
        seeds=seeds,
        seeds_agreeing=agreeing_seeds(table.mean(axis=1), test),
        p_value=p,
        verdict=verdict,
        reason=reason,
        would_settle=settle,
    )


def agreeing_seeds(by_seed: np.ndarray, test: Test) -> int:
    """How many of the seeds' own values lie beyond the threshold."""
    sign = 1 if test.direction == "higher" else -1
    return int((sign * (by_seed - test.threshold) > 0).sum())


def all_or_none(agreeing: int, values: int) -> str:
    return SUPPORTED if agreeing == values else NOT_SUPPORTED if agreeing == 0 else INCONCLUSIVE


def one_seed(seeds: int) -> str:
    return "" if seeds > 1 else "one training seed says nothing about a method"


def settle_text(size: tuple[int, int] | None, shape: tuple[int, ...], unit: str = "prompts") -> str:
    if size is not None:
        return f"{size[0]} seeds x {size[1]} {unit}"
    if shape[0] < 2:
        return "at least 3 training seeds, to know their variance"
    return "the observed effect is too small to settle with 1,000 times the data"


def read_verdicts(path: Path) -> list[Verdict]:
    """The rows of a claims.json."""
    return [Verdict(**row) for row in json.loads(path.read_text(encoding="utf-8"))["claims"]]
