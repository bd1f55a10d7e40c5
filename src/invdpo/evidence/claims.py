"""A verdict on every sentence of config/claims.yaml, from scores, training logs and experiments on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdpo.errors import InvdpoError
from invdpo.evidence.claims_held_out import (
    judge_agreement,
    judge_audit,
    judge_distribution,
    judge_round_trip,
    judge_votes,
)
from invdpo.evidence.deviations import deviations_by_claim
from invdpo.evidence.ledger import (
    AGREEMENTS,
    INCONCLUSIVE,
    NOT_RUN,
    NOT_SUPPORTED,
    OVER_PROMPTS,
    SUPPORTED,
    Claim,
    Test,
    Verdict,
    all_or_none,
    decide,
    judge_table,
    load_claims,
    one_seed,
    settle_text,
)
from invdpo.evidence.load import Evidence, arm_title, config_file, load_evidence, scorer_title, step_families
from invdpo.evidence.printing import write_text
from invdpo.evidence.provenance import study_provenance
from invdpo.evidence.statistics import ALPHA, LEVEL, cost_to_target, holm, mean_interval, settling_size
from invdpo.files import write_json

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

# Before the table of claims.md.
HEAD_OF_LEDGER = """\
Paths of artifacts (in claims.json) are below the folder of this file. An end with a level belongs to an interval; a
range says what the runs were, not what others would be. A verdict with * holds after Holm's correction over all rows
that have a p-value; without, it is that row's alone. A reading that changes nothing ([0, 0]) is *not supported*.
† A test written after the runs it rests on had been seen. Deviations are those of docs/deviations.md that apply.
"""
AXES = {"step": "optimizer steps", "unet_evals": "UNet evaluations", "seconds": "seconds of training"}
# kind of test -> columns of the training log, and what is made of them; two arms are compared as a ratio
LOGGED: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "gradient": (("grad_norm",), lambda norms: norms.iloc[0]),
    "distance": (("reference_distance",), lambda distances: distances.iloc[-1]),
    "cost": (("unet_evals", "pairs_seen"), lambda evals, pairs: evals.iloc[-1] / pairs.iloc[-1]),
    # nan where there is no gradient
    "steadiness": (("grad_norm",), lambda norms: norms.std(ddof=0) / norms.mean() if norms.any() else math.nan),
}
UNSCORED = {*LOGGED, "round_trip", "votes"}
RATIOS = {
    "distance": "distance from the reference",
    "cost": "UNet evaluations a pair",
    "steadiness": "relative spread of the gradient norm over steps",
}
DISTRIBUTIONS = {"fid_standard": "FID (standard)", "fid_laionsg_compat": "FID (LAION-SG's script)", "kid": "KID"}


def judge(evidence: Evidence, claim: Claim, variant: str = "") -> Verdict:
    """Apply one claim's test to one variant."""
    study = evidence.study
    family = step_families(study).get(variant, {})
    names = {"variant": variant, "most": family[max(family)] if family else f"{variant} with the most inversion steps"}
    test = claim.test.model_copy(update={"arms": [arm.format(**names) for arm in claim.test.arms]})
    metric = evidence.primary if test.metric == "primary" else test.metric
    row = Verdict(
        claim.id,
        variant,
        claim.locus,
        claim.quote,
        claim.question,
        test.model_dump(exclude_none=True) | {"metric": None if test.kind in UNSCORED else metric},
        claim.paper_value,
        claim.written,
        command=f"uv run snakemake results/{study.study}/claims.json --configfile config/{study.study}.yaml",
    )
    if test.kind in ("agreement", "round_trip"):
        return (judge_agreement if test.kind == "agreement" else judge_round_trip)(study, test, row)
    if test.kind == "trend":
        if len(family) < 2:
            return replace(row, reason=f"the study has no inversion-step family `{variant}`")
        fewest, most = min(family), max(family)
        test = test.model_copy(update={"arms": [family[most], family[fewest]]})
        row = replace(row, test=row.test | {"arms": test.arms, "inversion_steps": [most, fewest]})
    absent = [arm for arm in test.arms if arm not in study.arms]
    if absent and claim.run_in is not None:
        return replace(row, reason=f"asked in the study {claim.run_in} (make reproduce STUDY={claim.run_in})")
    if absent:
        return replace(row, reason=f"the study has no arm {', '.join(absent)}")
    if test.rounding is not None:
        return judge_audit(study, test, row)
    if test.kind in ("distribution", "votes"):
        return (judge_distribution if test.kind == "distribution" else judge_votes)(study, test, row)
    if test.kind in LOGGED:
        return _judge_log(evidence, test, row)
    row = replace(row, artifacts=[f"scores/{arm}" for arm in test.arms])
    lacks = [f"{arm}: {lack.what} (`{lack.command}`)" for arm in test.arms if (lack := evidence.lack(arm, metric))]
    if lacks:
        return replace(row, reason="; ".join(lacks))
    if test.kind in ("difference", "trend"):
        return _judge_difference(evidence, test, metric, row)
    judges = {"speed": _judge_speed, "rise": _judge_rise, "dip": _judge_dip}
    return judges[test.kind](evidence, test, metric, row)


def _judge_difference(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    values, baseline = evidence.paired(test.arms[0], test.arms[1], metric)
    row = judge_table(values - baseline, _trained_seeds(evidence, test.arms), test, row)
    fell = [text for arm in test.arms if (text := _earlier_best(evidence, arm, metric))]
    return replace(row, prompts=values.shape[1], reason="; ".join(filter(None, [row.reason, *fell])))


def _earlier_best(evidence: Evidence, arm: str, metric: str) -> str:
    """Which earlier checkpoint an arm's mean score was clearly higher at than at its last, in words; or nothing.

    Clearly: the interval of the difference excludes zero. The metrics of a ledger are all better when higher.
    """
    scores = evidence.scores[arm]
    if len(scores.steps) < 2:
        return ""
    values = scores.values[metric]
    best = int(np.argmax(values.mean(axis=(1, 2))))
    if mean_interval(values[best] - values[-1]).low <= 0:
        return ""
    ends = [f"{values[place].mean():.3g}" for place in (best, -1)]
    return f"{arm} was at its best at step {scores.steps[best]} ({ends[0]}; {ends[1]} at its last)"


def _trained_seeds(evidence: Evidence, arms: list[str]) -> int:
    counts = [len(evidence.scores[arm].seeds) for arm in arms if evidence.scores[arm].trained]
    return min(counts, default=0)


def _judge_speed(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    fast, slow = test.arms
    if any(evidence.from_base(arm, metric) is None for arm in test.arms):
        return replace(row, reason="the base model has not been scored")
    costs = [evidence.costs_from_base(arm, test.axis) for arm in test.arms]
    if not all(np.isfinite(cost).all() for cost in costs):
        return replace(row, reason=f"the training log lacks the checkpoints' {AXES[test.axis]}")
    curves = evidence.paired_from_base(fast, slow, metric)
    if curves is None:
        return replace(row, reason=f"{fast} and {slow} share no training seed")
    seeds, prompts = curves[0].shape[1:]
    row = replace(row, seeds=seeds, prompts=prompts)
    found = cost_to_target(curves[0], costs[0], curves[1], costs[1])
    if found.ratio is None:
        return replace(row, verdict=INCONCLUSIVE, reason=f"{slow} does not end above the base model")
    reasons = [one_seed(seeds), _batches(evidence, test) if test.axis == "step" else ""]
    if found.ratio == 0:
        reasons.append(f"{fast} does not reach the final score of {slow} within its run")
    if found.never:
        reasons.append(f"never reached in {found.never:.2%} of the resamples")
    if found.untargeted:
        reasons.append(f"in {found.untargeted:.2%} of the resamples {slow} does not end above the base model")
    return replace(
        row,
        value=found.ratio,
        low=found.low,
        high=found.high if np.isfinite(found.high) else None,
        interval=OVER_PROMPTS,
        verdict=decide(found.low, found.high, test.threshold, test.direction, seeds),
        reason="; ".join(reason for reason in reasons if reason),
    )


def _batches(evidence: Evidence, test: Test) -> str:
    """That the two arms saw other numbers of pairs a step, in words; or nothing."""
    last = [next(iter(evidence.logs[arm].values())).iloc[-1] for arm in test.arms]
    if any("pairs_seen" not in row for row in last):
        return ""
    first, second = (float(row["pairs_seen"] / row["step"]) for row in last)
    if first == second:
        return ""
    return f"a step of {test.arms[0]} sees {first:g} pairs, one of {test.arms[1]} {second:g}"


def _judge_rise(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    curve = evidence.from_base(test.arms[0], metric)
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
    settle = settle_text(settling_size(increments[least], test.threshold), (seeds, prompts))
    where = f"the smallest of {len(increments)} increments is from step {steps[least]} to {steps[least + 1]}"
    return replace(
        row,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        interval=f"95 % of {len(increments)} increments together, over seeds and prompts",
        seeds=seeds,
        prompts=prompts,
        verdict=verdict,
        reason="; ".join(part for part in (where, one_seed(seeds)) if part),
        would_settle=settle if verdict == INCONCLUSIVE else "",
    )


def _judge_dip(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    curve = evidence.from_base(test.arms[0], metric)
    if curve is None:
        return replace(row, reason="the base model has not been scored")
    row = judge_table(curve[1] - curve[0], _trained_seeds(evidence, test.arms), test, row)
    row = replace(row, prompts=curve.shape[2])
    return replace(row, reason=row.reason or f"the first checkpoint is step {evidence.scores[test.arms[0]].steps[0]}")


def _judge_log(evidence: Evidence, test: Test, row: Verdict) -> Verdict:
    """Tests on the training logs. They state facts of the runs, so one seed is enough and there is no interval."""
    study = evidence.study
    row = replace(row, artifacts=[f"runs/{arm}" for arm in test.arms])
    columns, measure = LOGGED[test.kind]
    found: list[dict[int, float]] = []
    for arm in test.arms:
        logs = {seed: log for seed, log in evidence.logs.get(arm, {}).items() if len(log) and set(columns) <= set(log)}
        missing = [str(seed) for seed in study.seeds if seed not in logs]
        if missing:
            command = f"invdpo train --study {config_file(study)} --arm {arm}"
            return replace(row, reason=f"{arm}: no training log of seed {', '.join(missing)} (`{command}`)")
        found.append({seed: float(measure(*(log[column] for column in columns))) for seed, log in logs.items()})
    if len(found) == 1:
        values = list(found[0].values())
    else:
        common = [seed for seed in found[0] if seed in found[1]]
        sides = [[side[seed] for seed in common] for side in found]
        if not common or not np.isfinite(sides).all() or not all(sides[1]):
            still = "never had a gradient" if test.kind == "steadiness" else f"{test.arms[1]} did not move"
            return replace(row, reason=f"{still}, or {test.arms[0]} and {test.arms[1]} share no seed")
        values = [first / second for first, second in zip(*sides, strict=True)]
    if test.direction == "lower":
        agreeing = sum(value <= test.threshold for value in values)
    else:
        agreeing = sum(value >= test.threshold for value in values)
    return replace(
        row,
        value=float(np.mean(values)),
        low=min(values),
        high=max(values),
        interval=f"range of {len(values)} seeds",
        seeds=len(values),
        seeds_agreeing=agreeing,
        verdict=all_or_none(agreeing, len(values)),
        reason=_batches(evidence, test) if test.kind == "steadiness" else "",
    )


def judge_all(evidence: Evidence, claims: list[Claim]) -> list[Verdict]:
    """Every claim and variant in order, with Holm-adjusted p-values over all that have one."""
    applying = deviations_by_claim()
    rows = [
        replace(judge(evidence, claim, variant), deviations=applying.get(claim.id, []))
        for claim in claims
        for variant in claim.variants or [""]
    ]
    tested = [index for index, row in enumerate(rows) if row.p_value is not None]
    adjusted = holm([rows[index].p_value or 0.0 for index in tested])
    for index, value in zip(tested, adjusted, strict=True):
        rows[index] = replace(rows[index], p_holm=value)
    return rows


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def value_text(row: Verdict) -> str:
    """This study's value with its interval; a dash where nothing was measured."""
    if row.value is None:
        return "–"
    if row.test["kind"] == "speed" and row.value == 0:
        return "never reached" + ("" if row.high is None else f" (ratio at most {row.high:.3g})")
    kind, share = row.test["kind"], row.test["metric"] == "order" and len(row.test["arms"]) == 1
    text = f"{row.value:.3g}" if share or kind in {"speed", *UNSCORED} else f"{row.value:+.3g}"
    if row.low is None:
        return text
    if row.ranged:
        return f"{text} ({row.low:.3g} to {row.high:.3g})"
    high = "∞" if row.high is None else f"{row.high:.3g}"
    return f"{text} [{row.low:.3g}, {high}]"


def corrected(row: Verdict) -> bool:
    """Whether the row's t-test still finds its difference after Holm's correction over all rows of the ledger."""
    return row.p_holm is not None and row.p_holm <= ALPHA


def verdict_text(row: Verdict) -> str:
    return f"**{row.verdict}**" + ("\\*" if corrected(row) and row.verdict in (SUPPORTED, NOT_SUPPORTED) else "")


def p_text(row: Verdict) -> str:
    """p of the t-test, and after Holm's correction."""
    if row.p_value is None or row.p_holm is None:
        return "–"
    return " / ".join("< 0.0001" if p < 1e-4 else f"{p:.2g}" for p in (row.p_value, row.p_holm))


def measured_text(row: Verdict) -> str:
    """What was measured, in a few words."""
    kind, arms = row.test["kind"], [arm_title(arm) for arm in row.test["arms"]]
    if kind == "gradient":
        rounding = row.test.get("rounding")
        weights = "" if rounding in (None, "none") else f", weights rounded to {rounding}"
        return f"gradient norm {'at step 1' if rounding is None else f'at the base{weights}'}: {arms[0]}"
    if kind in RATIOS:
        return f"{RATIOS[kind]}: {arms[0]} / {arms[1]}"
    if kind == "round_trip":
        counts = row.test.get("inversion_steps")
        steps = f", N = {counts[0]}" if counts else ""
        return f"DDIM there and back, RMS error of the latents: guidance {row.test['guidance_scale']:g}{steps}"
    if kind == "votes":
        return f"votes of people for {arms[0]} against {arms[1]}"
    if kind == "agreement":
        measured = row.test.get("measured") or [{"recipe": arm} for arm in row.test["arms"]]
        sides = " minus ".join(_setting_title(**setting) for setting in measured)
        return f"{AGREEMENTS[row.test['metric']]}, policies of {arm_title(row.test['policy'])}: {sides}"
    metric = DISTRIBUTIONS.get(row.test["metric"]) or scorer_title(row.test["metric"])
    if kind == "speed":
        return f"{metric}, ratio of {AXES[row.test['axis']]}: {arms[0]} against {arms[1]}"
    if kind == "dip":
        return f"{metric}, first checkpoint minus base: {arms[0]}"
    if kind == "rise":
        return f"{metric}, smallest increment: {arms[0]}"
    if kind == "trend":
        counts = row.test.get("inversion_steps")
        between = f", N = {counts[0]} minus N = {counts[1]}" if counts else ""
        return f"{metric}{between}: {arm_title(row.variant)}"
    return f"{metric}: {arms[0]} minus {arms[1]}"


def _setting_title(recipe: str, inversion_steps: int | None = None, draws: int | None = None, **_: Any) -> str:
    steps = f", N = {inversion_steps}" if inversion_steps else ""
    return f"{arm_title(recipe)}{steps}" + (f", {draws} draw{'s' if draws > 1 else ''}" if draws else "")


def size_text(row: Verdict) -> str:
    """How much was measured: seeds and what else."""
    if row.batches:
        return f"{row.batches} batches x {row.pairs} pairs"
    if row.pairs:
        return f"{row.seeds} x {row.pairs} pairs"
    if row.pictures:
        return f"{row.seeds} x {row.pictures} pictures" if row.seeds else f"{row.pictures} pictures"
    return f"{row.seeds} x {row.prompts}" if row.prompts else f"{row.seeds}" if row.seeds else "–"


def to_markdown(rows: list[Verdict]) -> str:
    """The verdicts as a GitHub table."""
    head = ["Claim", "Where", "Measured", "Paper", "This study", "What the ends are", "Seeds x prompts", "p / Holm"]
    head += ["Verdict", "Deviations"]
    lines = [HEAD_OF_LEDGER, "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    previous = ""
    for row in rows:
        first = row.id != previous
        previous = row.id
        note = f" ({row.reason})" if row.reason else ""
        sized = row.would_settle[:1].isdigit()  # and not a sentence on why there is no size
        settle = f"; {row.would_settle}{' would settle it' if sized else ''}" if row.would_settle else ""
        same = "″"
        question, locus, paper, deviations = (
            (asked(row), row.locus, row.paper_value or "–", ", ".join(row.deviations) or "–") if first else [same] * 4
        )
        cells = [question, locus, measured_text(row), paper, value_text(row), row.interval or "–", size_text(row)]
        cells += [p_text(row), f"{verdict_text(row)}{note}{settle}", deviations]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Verdict]) -> str:
    """The verdicts for the README: one line a claim with every reading of the method, the paper's own claims first."""
    lines = ["| Question | The paper | This study |", "| --- | --- | --- |"]
    for claim in sorted(dict.fromkeys(row.id for row in rows), key=lambda name: not _of_paper(rows, name)):
        entries = [row for row in rows if row.id == claim]
        readings = [row for row in entries if row.verdict != NOT_RUN]
        cells = []
        for row in readings:
            name = f"{arm_title(row.variant)}: " if row.variant else ""
            cells.append(f"{name}{verdict_text(row)} {bracketed(value_text(row))}")
        absent = [row for row in entries if row.verdict == NOT_RUN]
        if readings and absent:
            cells.append(f"{', '.join(arm_title(row.variant) for row in absent)}: **{NOT_RUN}**")
        elif absent:
            cells.append(f"**{NOT_RUN}**: {'; '.join(dict.fromkeys(row.reason for row in absent))}")
        first = entries[0]
        question = f"{asked(first)} ({first.locus})"
        line = [question, first.paper_value or "–", "<br>".join(cells)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
    return "\n".join(lines) + "\n"


def asked(row: Verdict) -> str:
    """The question, marked where it was written after the runs it rests on had been seen."""
    return f"{row.question}{'' if row.written == 'before' else ' †'}"


def _of_paper(rows: list[Verdict], claim: str) -> bool:
    return any(row.id == claim and row.quote for row in rows)


def bracketed(text: str) -> str:
    """A value set apart from the verdict before it, in parentheses unless it has its own."""
    return text if text.endswith(")") else f"({text})"


def write(study: StudyConfig) -> list[Path]:
    """Judge the study's claims; write root/claims.json and root/claims.md. InvdpoError if the study names no claims."""
    if study.claims is None:
        raise InvdpoError(f"The study {study.study} has no `claims:`; set it to config/claims.yaml.")
    rows = judge_all(load_evidence(study), load_claims(Path(study.claims)))
    content = [{key: _round(value) for key, value in asdict(row).items()} for row in rows]
    write_json(
        study.root / "claims.json", {"study": study.study, "claims": content, "provenance": study_provenance(study)}
    )
    write_text(study.root / "claims.md", to_markdown(rows))
    return [study.root / "claims.json", study.root / "claims.md"]
