"""A verdict on every sentence of config/claims.yaml, from the measured scores alone.

A claim is `supported` when its interval lies beyond the threshold, `not supported` when it lies on the other side (or
reaches the threshold from there without crossing it: a method that changed nothing has the interval [0, 0]),
`inconclusive` when the threshold is inside or only one training seed was run, and `not run` when an arm, a score or a
family of the test does not exist.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from invdpo.errors import InvdpoError
from invdpo.evidence.load import Evidence, arm_title, baseline_arm, load_evidence, scorer_title, step_families
from invdpo.evidence.statistics import LEVEL, bootstrap_means, holm, mean_interval, p_value, settling_size
from invdpo.evidence.tables import write_text
from invdpo.files import write_json

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = ("supported", "not supported", "inconclusive", "not run")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Strict):
    """How a claim is decided; the head of config/claims.yaml explains each kind."""

    __test__ = False  # not a test of pytest's

    kind: Literal["difference", "speed", "trend", "rise", "gradient", "distance"]
    arms: list[str] = []
    metric: str = "primary"
    axis: Literal["step", "unet_evals"] = "step"
    direction: Literal["higher", "lower"] = "higher"
    threshold: float = 0.0


class Claim(_Strict):
    """One sentence of the paper, or one question of the study."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    locus: str
    question: str
    quote: str = ""
    paper_value: str = ""
    variants: list[str] = []
    test: Test


@dataclass(frozen=True)
class Verdict:
    """One row of claims.json. value, low and high are on the scale of the test (a difference, a ratio, a norm)."""

    id: str
    variant: str
    locus: str
    quote: str
    question: str
    test: dict[str, Any]
    paper_value: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    prompts: int = 0
    seeds_agreeing: int | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str = NOT_RUN
    reason: str = ""
    would_settle: str = ""
    artifacts: list[str] = field(default_factory=list)
    command: str = ""


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
        expected = {"difference": 2, "speed": 2, "distance": 2, "rise": 1, "gradient": 1, "trend": 0}[claim.test.kind]
        if len(claim.test.arms) != expected:
            raise InvdpoError(f"{path}: `{claim.id}` needs {expected} arms for a test of kind {claim.test.kind}.")
    return claims


def decide(low: float, high: float, threshold: float, direction: str, seeds: int) -> str:
    """The verdict for an interval: `supported` beyond the threshold, `not supported` up to it, else `inconclusive`."""
    if seeds < 2:
        return INCONCLUSIVE
    if direction == "lower":
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return SUPPORTED
    return NOT_SUPPORTED if high <= threshold else INCONCLUSIVE


def crossing(curve: np.ndarray, cost: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cost at which a curve first reaches its target, by linear interpolation between checkpoints; inf if never.

    curve: (T, R) scores of R resamples at T checkpoints, the first at cost 0. cost: (T,) ascending. target: (R,).
    """
    reached = np.full(target.shape, np.inf)
    for k in range(len(cost) - 1, 0, -1):
        before, after = curve[k - 1], curve[k]
        hit = (after >= target) & (before < target)
        share = (target - before) / np.where(after == before, 1.0, after - before)
        reached = np.where(hit, cost[k - 1] + share * (cost[k] - cost[k - 1]), reached)
    return np.where(curve[0] >= target, 0.0, reached)


def judge(evidence: Evidence, claim: Claim, variant: str = "") -> Verdict:
    """Apply one claim's test to one variant."""
    test = claim.test.model_copy(update={"arms": [arm.format(variant=variant) for arm in claim.test.arms]})
    metric = evidence.primary if test.metric == "primary" else test.metric
    study = evidence.study
    row = Verdict(
        claim.id,
        variant,
        claim.locus,
        claim.quote,
        claim.question,
        test.model_dump() | {"metric": metric if test.kind not in ("gradient", "distance") else None},
        claim.paper_value,
        command=f"uv run snakemake --configfile config/{study.study}.yaml results/{study.study}/claims.json",
    )
    if test.kind == "trend":
        family = step_families(study).get(variant)
        if family is None or len(family) < 2:
            return replace(row, reason=f"the study has no inversion-step family `{variant}`")
        fewest, most = min(family), max(family)
        test = test.model_copy(update={"arms": [family[most], family[fewest]]})
        row = replace(row, test=row.test | {"arms": test.arms, "inversion_steps": [most, fewest]})
    absent = [arm for arm in test.arms if arm not in study.arms]
    if absent:
        return replace(row, reason=f"the study has no arm {', '.join(absent)}")
    if test.kind in ("gradient", "distance"):
        return _judge_log(evidence, test, row)
    row = replace(row, artifacts=[f"results/{study.study}/scores/{arm}" for arm in test.arms])
    unscored = [arm for arm in test.arms if not evidence.has(arm, metric)]
    if unscored:
        return replace(row, reason=f"{', '.join(unscored)}: no {metric} scores")
    if test.kind in ("difference", "trend"):
        return _judge_difference(evidence, test, metric, row)
    return (_judge_speed if test.kind == "speed" else _judge_rise)(evidence, test, metric, row)


def _judge_difference(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    values, baseline = evidence.paired(test.arms[0], test.arms[1], metric)
    difference = values - baseline
    interval = mean_interval(difference)
    seeds = _trained_seeds(evidence, test.arms)
    sign = 1 if test.direction == "higher" else -1
    agreeing = int((sign * (difference.mean(axis=1) - test.threshold) > 0).sum())
    verdict = decide(interval.low, interval.high, test.threshold, test.direction, seeds)
    settle = ""
    if verdict == INCONCLUSIVE:
        settle = _settle_text(settling_size(difference, test.threshold), difference.shape)
    return replace(
        row,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        seeds=seeds,
        prompts=interval.prompts,
        seeds_agreeing=agreeing,
        p_value=p_value(difference, test.threshold),
        verdict=verdict,
        reason=_one_seed(seeds),
        would_settle=settle,
    )


def _trained_seeds(evidence: Evidence, arms: list[str]) -> int:
    counts = [len(evidence.scores[arm].seeds) for arm in arms if evidence.scores[arm].trained]
    return min(counts, default=0)


def _one_seed(seeds: int) -> str:
    return "" if seeds > 1 else "one training seed says nothing about a method"


def _settle_text(size: tuple[int, int] | None, shape: tuple[int, ...]) -> str:
    if size is not None:
        return f"{size[0]} seeds x {size[1]} prompts"
    if shape[0] < 2:
        return "at least 3 training seeds, to know their variance"
    return "the observed effect is too small to settle with 1,000 times the data"


def _with_base(evidence: Evidence, arm: str, metric: str) -> np.ndarray | None:
    """(1 + checkpoints, seeds, prompts): the base model's scores, then those of every checkpoint of `arm`."""
    base = baseline_arm(evidence.study)
    if base is None or not evidence.has(base, metric):
        return None
    curve, start = evidence.paired_curves(arm, base, metric)
    return np.concatenate([start[-1:], curve])


def _judge_speed(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    fast, slow = test.arms
    found = [curve for arm in test.arms if (curve := _with_base(evidence, arm, metric)) is not None]
    if len(found) < 2:
        return replace(row, reason="the base model has not been scored")
    costs = []
    for arm in test.arms:
        steps = evidence.scores[arm].steps
        spent = {step: float(step) for step in steps} if test.axis == "step" else evidence.cost(arm, "unet_evals")
        costs.append(np.array([0.0, *[spent.get(step, np.nan) for step in steps]]))
    if not all(np.isfinite(cost).all() for cost in costs):
        return replace(row, reason="the training log lacks the checkpoints' UNet evaluations")
    common = sorted(set(evidence.scores[fast].seeds) & set(evidence.scores[slow].seeds))
    if not common:
        return replace(row, reason=f"{fast} and {slow} share no training seed")
    curves = [
        curve[:, [evidence.scores[arm].seeds.index(seed) for seed in common]]
        for arm, curve in zip(test.arms, found, strict=True)
    ]

    def ratio(fast_curve: np.ndarray, slow_curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        target = slow_curve[-1]
        slow_cost = crossing(slow_curve, costs[1], target)
        fast_cost = crossing(fast_curve, costs[0], target)
        never = ~np.isfinite(fast_cost)
        # A run that ended below the target bounds its ratio from above by the cost at which it ended.
        least = np.where(never, 0.0, slow_cost / np.where(never | (fast_cost == 0), 1.0, fast_cost))
        most = np.where(never, slow_cost / costs[0][-1], least)
        gained = target > slow_curve[0]
        return np.where(gained, least, 0.0), np.where(gained, most, np.inf)

    means = [curve.mean(axis=(1, 2))[:, None] for curve in curves]
    seeds, prompts = len(common), curves[0].shape[2]
    row = replace(row, seeds=seeds, prompts=prompts)
    if means[1][-1, 0] <= means[1][0, 0]:
        return replace(row, verdict=INCONCLUSIVE, reason=f"{slow} does not end above the base model")
    value = float(ratio(*means)[0][0])
    least, most = ratio(bootstrap_means(curves[0]), bootstrap_means(curves[1]))
    low = float(np.quantile(least, (1 - LEVEL) / 2, method="lower"))
    high = float(np.quantile(most, (1 + LEVEL) / 2, method="higher"))
    reasons = [_one_seed(seeds)]
    pairs = [evidence.cost(arm, "pairs_seen").get(evidence.scores[arm].steps[-1], 0) for arm in test.arms]
    a_step = [count / evidence.scores[arm].steps[-1] for count, arm in zip(pairs, test.arms, strict=True)]
    if test.axis == "step" and a_step[0] != a_step[1]:
        reasons.append(f"a step of {fast} sees {a_step[0]:g} pairs, one of {slow} {a_step[1]:g}")
    if value == 0:
        reasons.append(f"{fast} does not reach the final score of {slow} within its run")
    if not np.isfinite(high):
        reasons.append(f"in some resamples {slow} does not end above the base model")
    return replace(
        row,
        value=value,
        low=low,
        high=high if np.isfinite(high) else None,
        verdict=decide(low, high, test.threshold, test.direction, seeds),
        reason="; ".join(reason for reason in reasons if reason),
    )


def _judge_rise(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    curve = _with_base(evidence, test.arms[0], metric)
    if curve is None:
        return replace(row, reason="the base model has not been scored")
    increments = np.diff(curve, axis=0)
    if test.direction == "lower":
        increments = -increments
    least = int(np.argmin(increments.mean(axis=(1, 2))))
    # The smallest of several increments was picked after looking: Bonferroni over all of them.
    interval = mean_interval(increments[least], level=1 - (1 - LEVEL) / len(increments))
    seeds, prompts = increments.shape[1:]
    steps = [0, *evidence.scores[test.arms[0]].steps]
    verdict = decide(interval.low, interval.high, test.threshold, "higher", seeds)
    if verdict == SUPPORTED:
        lows = [mean_interval(part, level=1 - (1 - LEVEL) / len(increments)).low for part in increments]
        verdict = SUPPORTED if min(lows) > test.threshold else INCONCLUSIVE
    settle = _settle_text(settling_size(increments[least], test.threshold), (seeds, prompts))
    where = f"the smallest of {len(increments)} increments is from step {steps[least]} to {steps[least + 1]}"
    return replace(
        row,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        seeds=seeds,
        prompts=prompts,
        verdict=verdict,
        reason="; ".join(part for part in (where, _one_seed(seeds)) if part),
        would_settle=settle if verdict == INCONCLUSIVE else "",
    )


def _judge_log(evidence: Evidence, test: Test, row: Verdict) -> Verdict:
    """Tests on the training logs. They state facts of the runs, so one seed is enough and there is no interval."""
    study = evidence.study
    row = replace(row, artifacts=[f"results/{study.study}/runs/{arm}" for arm in test.arms])
    column, which = ("grad_norm", 0) if test.kind == "gradient" else ("reference_distance", -1)
    found: list[dict[int, float]] = []
    for arm in test.arms:
        logs = {seed: log for seed, log in evidence.logs.get(arm, {}).items() if len(log) and column in log}
        if not logs:
            return replace(row, reason=f"{arm}: no training log")
        found.append({seed: float(log[column].iloc[which]) for seed, log in logs.items()})
    if test.kind == "gradient":
        values = list(found[0].values())
    else:
        common = [seed for seed in found[0] if seed in found[1]]
        if not common or any(found[1][seed] == 0 for seed in common):
            return replace(row, reason=f"{test.arms[1]} did not move, or shares no seed with {test.arms[0]}")
        values = [found[0][seed] / found[1][seed] for seed in common]
    if test.direction == "lower":
        agreeing = sum(value <= test.threshold for value in values)
    else:
        agreeing = sum(value >= test.threshold for value in values)
    verdict = SUPPORTED if agreeing == len(values) else NOT_SUPPORTED if agreeing == 0 else INCONCLUSIVE
    return replace(
        row,
        value=float(np.mean(values)),
        low=min(values),
        high=max(values),
        seeds=len(values),
        seeds_agreeing=agreeing,
        verdict=verdict,
        reason="the range is over training seeds",
    )


def judge_all(evidence: Evidence, claims: list[Claim]) -> list[Verdict]:
    """Every claim and variant in order, with Holm-adjusted p-values over all that have one."""
    rows = [judge(evidence, claim, variant) for claim in claims for variant in claim.variants or [""]]
    tested = [index for index, row in enumerate(rows) if row.p_value is not None]
    adjusted = holm([rows[index].p_value or 0.0 for index in tested])
    for index, value in zip(tested, adjusted, strict=True):
        rows[index] = replace(rows[index], p_holm=value)
    return rows


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _ours(row: Verdict) -> str:
    if row.value is None:
        return "–"
    if row.test["kind"] == "speed" and row.value == 0:
        return "never reached" + ("" if row.high is None else f" (ratio at most {row.high:.3g})")
    text = f"{row.value:.3g}" if row.test["kind"] in ("speed", "distance", "gradient") else f"{row.value:+.3g}"
    if row.low is None:
        return text
    high = "∞" if row.high is None else f"{row.high:.3g}"
    return f"{text} [{row.low:.3g}, {high}]"


def _label(row: Verdict) -> str:
    """What was measured, in a few words."""
    kind, arms = row.test["kind"], [arm_title(arm) for arm in row.test["arms"]]
    if kind == "gradient":
        return f"gradient norm at step 1: {arms[0]}"
    if kind == "distance":
        return f"distance from the reference: {arms[0]} / {arms[1]}"
    metric = scorer_title(row.test["metric"])
    if kind == "speed":
        axis = "optimizer steps" if row.test["axis"] == "step" else "UNet evaluations"
        return f"{metric}, ratio of {axis}: {arms[0]} against {arms[1]}"
    if kind == "rise":
        return f"{metric}, smallest increment: {arms[0]}"
    if kind == "trend":
        counts = row.test.get("inversion_steps")
        between = f", N = {counts[0]} minus N = {counts[1]}" if counts else ""
        return f"{metric}{between}: {arm_title(row.variant)}"
    return f"{metric}: {arms[0]} minus {arms[1]}"


def to_markdown(rows: list[Verdict]) -> str:
    """The verdicts as a GitHub table."""
    head = ["Claim", "Where", "Measured", "Paper", "This study [95 %]", "Seeds x prompts", "Verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    previous = ""
    for row in rows:
        first = row.id != previous
        previous = row.id
        undecided = row.verdict in (NOT_RUN, INCONCLUSIVE)
        note = f" ({row.reason})" if row.reason and (undecided or row.test["kind"] == "speed") else ""
        settle = f"; {row.would_settle} would settle it" if row.would_settle else ""
        size = f"{row.seeds} x {row.prompts}" if row.prompts else f"{row.seeds}" if row.seeds else "–"
        paper = (row.paper_value or "–") if first else "″"
        cells = [row.question if first else "″", row.locus if first else "″", _label(row), paper, _ours(row), size]
        verdict = f"**{row.verdict}**{note}{settle}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, verdict]) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Verdict]) -> str:
    """The verdicts for the README: one line a claim with every reading of the method that was run."""
    lines = ["| Question | The paper | This study |", "| --- | --- | --- |"]
    for claim in dict.fromkeys(row.id for row in rows):
        readings = [row for row in rows if row.id == claim and row.verdict != NOT_RUN]
        if not readings:
            continue
        first = readings[0]
        cells = []
        for row in readings:
            name = f"{arm_title(row.variant)}: " if row.variant else ""
            cells.append(f"{name}**{row.verdict}** ({_ours(row)})")
        question = f"{first.question} ({first.locus})"
        line = [question, first.paper_value or "–", "<br>".join(cells)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
    return "\n".join(lines) + "\n"


def read_verdicts(path: Path) -> list[Verdict]:
    """The rows of a claims.json."""
    return [Verdict(**row) for row in json.loads(path.read_text(encoding="utf-8"))["claims"]]


def write(study: StudyConfig) -> list[Path]:
    """Judge the study's claims; write root/claims.json and root/claims.md. InvdpoError if the study names no claims."""
    if study.claims is None:
        raise InvdpoError(f"The study {study.study} has no `claims:`; set it to config/claims.yaml.")
    rows = judge_all(load_evidence(study), load_claims(Path(study.claims)))
    content = [{key: _round(value) for key, value in asdict(row).items()} for row in rows]
    write_json(study.root / "claims.json", {"study": study.study, "claims": content})
    write_text(study.root / "claims.md", to_markdown(rows))
    return [study.root / "claims.json", study.root / "claims.md"]
