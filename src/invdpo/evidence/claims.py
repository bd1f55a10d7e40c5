"""A verdict on every sentence of config/claims.yaml, from scores, training logs and experiments on held-out pairs.

A claim is `supported` when its interval lies beyond the threshold, `not supported` when it lies on the other side (or
reaches the threshold from there without crossing it: a method that changed nothing has the interval [0, 0]),
`inconclusive` when the threshold is inside or only one training seed was run, and `not run` when an arm, a score, a
family or an experiment of the test does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from scipy.stats import rankdata

from invdpo.errors import InvdpoError
from invdpo.evidence.load import Evidence, arm_title, load_evidence, scorer_title, step_families
from invdpo.evidence.printing import write_text
from invdpo.evidence.statistics import (
    DRAWS,
    LEVEL,
    SEED,
    cost_to_target,
    holm,
    mean_interval,
    p_value,
    settling_size,
)
from invdpo.files import write_json

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = ("supported", "not supported", "inconclusive", "not run")

# kind of test -> how many arms it may name
ARMS_OF = {
    "difference": (2,),
    "speed": (2,),
    "distance": (2,),
    "rise": (1,),
    "gradient": (1,),
    "trend": (0,),
    "agreement": (1, 2),
}
# setting of a test -> the only kind that reads it
ONLY_FOR = {"policy": "agreement", "draws": "agreement", "rounding": "gradient"}
# what of an experiment's files is measured -> how it is called in print
AGREEMENTS = {"spearman": "Spearman with the true log-ratio", "order": "pairs ordered as the truth orders them"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Strict):
    """How a claim is decided; the head of config/claims.yaml explains each kind."""

    __test__ = False  # not a test of pytest's

    kind: Literal["difference", "speed", "trend", "rise", "gradient", "distance", "agreement"]
    arms: list[str] = []
    metric: str = "primary"
    axis: Literal["step", "unet_evals"] = "step"
    direction: Literal["higher", "lower"] = "higher"
    threshold: float = 0.0
    policy: str | None = None
    draws: PositiveInt | None = None
    rounding: Literal["none", "float16", "bfloat16"] | None = None


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
    """One row of claims.json. value, low and high are on the scale of the test (a difference, a ratio, a norm).

    prompts: of a test on scores. pairs: held-out ones of a test on an experiment, in each of its `batches` if any.
    """

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
    pairs: int = 0
    batches: int = 0
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


def decide(low: float, high: float, threshold: float, direction: str, seeds: int) -> str:
    """The verdict for an interval: `supported` beyond the threshold, `not supported` up to it, else `inconclusive`."""
    if seeds < 2:
        return INCONCLUSIVE
    if direction == "lower":
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return SUPPORTED
    return NOT_SUPPORTED if high <= threshold else INCONCLUSIVE


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
        test.model_dump(exclude_none=True) | {"metric": metric if test.kind not in ("gradient", "distance") else None},
        claim.paper_value,
        command=f"uv run snakemake results/{study.study}/claims.json --configfile config/{study.study}.yaml",
    )
    if test.kind == "agreement":
        return _judge_agreement(study, test, row)
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
    if test.rounding is not None:
        return _judge_audit(study, test, row)
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
    row = _judge_table(values - baseline, _trained_seeds(evidence, test.arms), test, row)
    return replace(row, prompts=values.shape[1])


def _judge_table(table: np.ndarray, seeds: int, test: Test, row: Verdict, unit: str = "prompts") -> Verdict:
    """The mean of a table (seeds, `unit`) against the threshold. seeds: how many of its rows are trainings."""
    interval = mean_interval(table)
    verdict = decide(interval.low, interval.high, test.threshold, test.direction, seeds)
    settle = ""
    if verdict == INCONCLUSIVE:
        settle = _settle_text(settling_size(table, test.threshold), table.shape, unit)
    return replace(
        row,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        seeds=seeds,
        seeds_agreeing=_agreeing(table.mean(axis=1), test),
        p_value=p_value(table, test.threshold),
        verdict=verdict,
        reason=_one_seed(seeds),
        would_settle=settle,
    )


def _agreeing(by_seed: np.ndarray, test: Test) -> int:
    """How many of the seeds' own values lie beyond the threshold."""
    sign = 1 if test.direction == "higher" else -1
    return int((sign * (by_seed - test.threshold) > 0).sum())


def _trained_seeds(evidence: Evidence, arms: list[str]) -> int:
    counts = [len(evidence.scores[arm].seeds) for arm in arms if evidence.scores[arm].trained]
    return min(counts, default=0)


def _one_seed(seeds: int) -> str:
    return "" if seeds > 1 else "one training seed says nothing about a method"


def _settle_text(size: tuple[int, int] | None, shape: tuple[int, ...], unit: str = "prompts") -> str:
    if size is not None:
        return f"{size[0]} seeds x {size[1]} {unit}"
    if shape[0] < 2:
        return "at least 3 training seeds, to know their variance"
    return "the observed effect is too small to settle with 1,000 times the data"


def _judge_speed(evidence: Evidence, test: Test, metric: str, row: Verdict) -> Verdict:
    fast, slow = test.arms
    if any(evidence.from_base(arm, metric) is None for arm in test.arms):
        return replace(row, reason="the base model has not been scored")
    costs = [evidence.costs_from_base(arm, test.axis) for arm in test.arms]
    if not all(np.isfinite(cost).all() for cost in costs):
        return replace(row, reason="the training log lacks the checkpoints' UNet evaluations")
    curves = evidence.paired_from_base(fast, slow, metric)
    if curves is None:
        return replace(row, reason=f"{fast} and {slow} share no training seed")
    seeds, prompts = curves[0].shape[1:]
    row = replace(row, seeds=seeds, prompts=prompts)
    found = cost_to_target(curves[0], costs[0], curves[1], costs[1])
    if found.ratio is None:
        return replace(row, verdict=INCONCLUSIVE, reason=f"{slow} does not end above the base model")
    reasons = [_one_seed(seeds)]
    pairs = [evidence.cost(arm, "pairs_seen").get(evidence.scores[arm].steps[-1], 0) for arm in test.arms]
    a_step = [count / evidence.scores[arm].steps[-1] for count, arm in zip(pairs, test.arms, strict=True)]
    if test.axis == "step" and a_step[0] != a_step[1]:
        reasons.append(f"a step of {fast} sees {a_step[0]:g} pairs, one of {slow} {a_step[1]:g}")
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
        verdict=decide(found.low, found.high, test.threshold, test.direction, seeds),
        reason="; ".join(reason for reason in reasons if reason),
    )


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
    return replace(
        row,
        value=float(np.mean(values)),
        low=min(values),
        high=max(values),
        seeds=len(values),
        seeds_agreeing=agreeing,
        verdict=_all_or_none(agreeing, len(values)),
        reason="the range is over training seeds",
    )


def _all_or_none(agreeing: int, values: int) -> str:
    return SUPPORTED if agreeing == values else NOT_SUPPORTED if agreeing == 0 else INCONCLUSIVE


def _judge_agreement(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
    """Tests on the experiment `precision`: surrogate log-ratios held against the true ones of trained policies."""
    settings = study.experiments.precision
    wanted = {"arms": [test.policy], "recipes": test.arms, "draws": [test.draws] if test.draws else []}
    if lacking := _lacking("precision", settings, wanted):
        return replace(row, reason=lacking)
    agreement = _result(study, "precision", "agreement.csv")
    found, measured = zip(*(_setting(study, agreement, recipe, test) for recipe in test.arms), strict=True)
    row = replace(
        row,
        test=row.test | {"measured": list(measured)},
        artifacts=[f"results/{study.study}/experiments/precision"],
    )
    if test.metric == "spearman" and len(found) == 1:
        row = _judge_correlation(found[0], test, row)
    else:
        latents = _result(study, "precision", "latents.csv")
        surrogates, truth = _log_ratios([_latents_of(latents, rows) for rows in found], study)
        if not truth.size:
            row = replace(row, verdict=INCONCLUSIVE, reason="no pair has a true log-ratio under every seed")
        elif test.metric == "order":
            row = _judge_table(_shares(surrogates, truth), len(truth), test, row, "pairs")
        else:
            row = _judge_correlation_difference(surrogates, truth, test, row)
        row = replace(row, pairs=truth.shape[1])
    evals = " against ".join(f"{setting['unet_evals_per_latent']:,.4g}" for setting in measured)
    return replace(row, reason="; ".join(part for part in (row.reason, f"{evals} UNet evaluations a latent") if part))


def _judge_correlation(rows: pd.DataFrame, test: Test, row: Verdict) -> Verdict:
    """The seeds' mean correlation. rows: of agreement.csv, one a seed."""
    values, low, high = (rows[column].to_numpy(np.float64) for column in ("spearman", "low", "high"))
    spread = "interval: from the lowest to the highest end of the seeds' own"
    return _judge_seeds(
        values, low.min(), high.max(), spread, test, replace(row, pairs=int(rows["pairs"].to_numpy().min()))
    )


def _judge_correlation_difference(surrogates: np.ndarray, truth: np.ndarray, test: Test, row: Verdict) -> Verdict:
    """Difference of two recipes' correlations with the truth, with a crossed percentile bootstrap over seeds and pairs.

    surrogates: (2, seeds, pairs, 2). truth: (seeds, pairs, 2).
    """
    first, second = (_rank_correlations(surrogate, truth) for surrogate in surrogates)
    difference = first - second
    seeds = len(truth)
    chosen = np.random.default_rng([SEED, seeds]).integers(seeds, size=(DRAWS, seeds))
    means = np.take_along_axis(difference[:, 1:], chosen.T, axis=0).mean(axis=0)
    means = means[~np.isnan(means)]  # of very few pairs, some resamples have a constant side
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if len(means) else (np.nan, np.nan)
    return _judge_seeds(difference[:, 0], low, high, "", test, row)


def _judge_seeds(values: np.ndarray, low: float, high: float, spread: str, test: Test, row: Verdict) -> Verdict:
    """The mean of the seeds' values (seeds,) with a given interval against the threshold. spread: what that is."""
    seeds = len(values)
    if not np.isfinite([*values, low, high]).all():
        reason = "no correlation under some seed: its surrogate or the truth is the same for all latents"
        return replace(row, seeds=seeds, verdict=INCONCLUSIVE, reason=reason)
    return replace(
        row,
        value=float(values.mean()),
        low=float(low),
        high=float(high),
        seeds=seeds,
        seeds_agreeing=_agreeing(values, test),
        verdict=decide(low, high, test.threshold, test.direction, seeds),
        reason=_one_seed(seeds) or spread,
    )


def _judge_audit(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
    """Tests on the experiment `audit`: gradients at the base. They state facts of its batches, as `_judge_log` does."""
    settings = study.experiments.audit
    if lacking := _lacking(
        "audit", settings, {"arms": test.arms, "precisions": ["fp32"], "roundings": [test.rounding]}
    ):
        return replace(row, reason=lacking)
    assert settings is not None  # nothing is lacking
    rows = _result(study, "audit", "gradients.csv")
    place = {"recipe": test.arms[0], "policy": "initial", "precision": "fp32", "noise": test.rounding}
    rows = _where(rows, place)
    values = rows["gradient_norm"].tolist()
    if len(values) != settings.batches:
        raise _stale(study, "audit", "gradients.csv", f"{len(values)} batches of {test.arms[0]} at the base")
    agreeing = sum(value <= test.threshold if test.direction == "lower" else value > test.threshold for value in values)
    return replace(
        row,
        artifacts=[f"results/{study.study}/experiments/audit"],
        value=float(np.mean(values)),
        low=min(values),
        high=max(values),
        pairs=settings.pairs,
        batches=len(values),
        verdict=_all_or_none(agreeing, len(values)),
        reason="the range is over batches",
    )


def _lacking(experiment: str, settings: BaseModel | None, wanted: Mapping[str, Sequence[Any]]) -> str:
    """What to add to the study before a test on that experiment can run; empty if it has all that is wanted."""
    if settings is None:
        return f"the study has no `experiments.{experiment}`; add it"
    for key, names in wanted.items():
        absent = [str(name) for name in names if name not in getattr(settings, key)]
        if absent:
            return f"`experiments.{experiment}.{key}` lacks {', '.join(absent)}; add it there"
    return ""


def _result(study: StudyConfig, experiment: str, file: str) -> pd.DataFrame:
    """A csv file of an experiment that the study has; InvdpoError names the command that makes it."""
    path = study.root / "experiments" / experiment / file
    if not path.is_file():
        raise InvdpoError(f"{path} is missing. Run {_command(study, experiment)} first.")
    return pd.read_csv(path)


def _command(study: StudyConfig, experiment: str) -> str:
    return f"`invdpo experiment {experiment} --study config/{study.study}.yaml`"


def _stale(study: StudyConfig, experiment: str, file: str, found: str) -> InvdpoError:
    path = study.root / "experiments" / experiment / file
    return InvdpoError(
        f"{path} holds {found}, which is not what the study asks. Run {_command(study, experiment)} again."
    )


def _where(rows: pd.DataFrame, place: Mapping[str, Any]) -> pd.DataFrame:
    """The rows with these values in these columns."""
    for column, value in place.items():
        rows = rows.loc[rows[column] == value]
    return rows


def _setting(
    study: StudyConfig, agreement: pd.DataFrame, recipe: str, test: Test
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of agreement.csv, one a seed, of the recipe at its most inversion steps, and what they were measured with.

    Where the recipe draws at random, with the draws of the test, or else the most that the study has. The latter's
    inversion_steps and draws are None for a recipe that has none.
    """
    settings = study.experiments.precision
    assert settings is not None  # the study has the experiment
    rows = _where(agreement, {"arm": test.policy, "recipe": recipe})
    rows = rows.loc[rows["steps"] == rows["steps"].max()]
    made, asked = sorted(set(rows["draws"].tolist())), sorted(set(settings.draws))
    # A recipe that draws nothing has one draw, whatever the study asks of the others.
    draws = test.draws if test.draws in made else max(made, default=0)
    rows = rows.loc[rows["draws"] == draws].sort_values("seed")
    seeds = rows["seed"].tolist()
    if made not in ([1], asked) or seeds != sorted(study.seeds):
        raise _stale(study, "precision", "agreement.csv", f"draws {made} and seeds {seeds} of {recipe}")
    steps, entry = int(rows["steps"].to_numpy()[0]), settings.recipes[recipe].recipe.get("trajectory", {})
    return rows, {
        "recipe": recipe,
        "inversion_steps": steps if steps in settings.steps or "steps" in entry else None,
        "draws": draws if made == asked != [1] else None,
        "unet_evals_per_latent": float(rows["unet_evals_per_latent"].to_numpy().mean()),
    }


def _latents_of(latents: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of latents.csv behind a setting's rows of agreement.csv."""
    return _where(latents, rows[["arm", "recipe", "steps", "draws"]].iloc[0].to_dict())


def _log_ratios(settings: list[pd.DataFrame], study: StudyConfig) -> tuple[np.ndarray, np.ndarray]:
    """Surrogates (settings, seeds, pairs, 2) and the truth (seeds, pairs, 2) of winners and losers.

    Pairs of which some seed has no true log-ratio are left out.
    """

    def table(rows: pd.DataFrame, column: str) -> np.ndarray:
        wide = rows.pivot(index="seed", columns=["side", "pair"], values=column).loc[sorted(study.seeds)]
        return np.stack([wide["win"].to_numpy(np.float64), wide["lose"].to_numpy(np.float64)], axis=-1)

    truth = table(settings[0], "truth")
    known = ~np.isnan(truth).any(axis=(0, 2))
    return np.stack([table(rows, "surrogate")[:, known] for rows in settings]), truth[:, known]


def _shares(surrogates: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(seeds, pairs): 1 where the surrogate orders winner and loser as the truth does, 0 where not, 1/2 for a tie.

    Of two surrogates, the first's minus the second's.
    """
    agrees = (1 + np.sign(surrogates[..., 0] - surrogates[..., 1]) * np.sign(truth[..., 0] - truth[..., 1])) / 2
    return agrees[0] - agrees[1] if len(agrees) == 2 else agrees[0]


def _rank_correlations(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman's correlation of two tables (seeds, pairs, 2) over each seed's latents: (seeds, 1 + DRAWS).

    First that of the sample, then those of resampled pairs, the same for every seed; nan where a side is constant.
    """
    pairs = values.shape[1]
    drawn = np.random.default_rng([SEED, pairs]).integers(pairs, size=(DRAWS, pairs))
    chosen = np.concatenate([np.arange(pairs)[None], drawn])
    rows = []
    for sides in zip(values, truth, strict=True):
        ranks = [rankdata(side[chosen].reshape(len(chosen), -1), axis=1) for side in sides]
        x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
        with np.errstate(invalid="ignore"):
            rows.append((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))
    return np.stack(rows)


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


def value_text(row: Verdict) -> str:
    """This study's value with its interval; a dash where nothing was measured."""
    if row.value is None:
        return "–"
    if row.test["kind"] == "speed" and row.value == 0:
        return "never reached" + ("" if row.high is None else f" (ratio at most {row.high:.3g})")
    kind, share = row.test["kind"], row.test["metric"] == "order" and len(row.test["arms"]) == 1
    text = f"{row.value:.3g}" if share or kind in ("speed", "distance", "gradient") else f"{row.value:+.3g}"
    if row.low is None:
        return text
    high = "∞" if row.high is None else f"{row.high:.3g}"
    return f"{text} [{row.low:.3g}, {high}]"


def measured_text(row: Verdict) -> str:
    """What was measured, in a few words."""
    kind, arms = row.test["kind"], [arm_title(arm) for arm in row.test["arms"]]
    if kind == "gradient":
        rounding = row.test.get("rounding")
        weights = "" if rounding in (None, "none") else f", weights rounded to {rounding}"
        return f"gradient norm {'at step 1' if rounding is None else f'at the base{weights}'}: {arms[0]}"
    if kind == "distance":
        return f"distance from the reference: {arms[0]} / {arms[1]}"
    if kind == "agreement":
        measured = row.test.get("measured") or [{"recipe": arm} for arm in row.test["arms"]]
        sides = " minus ".join(_setting_title(**setting) for setting in measured)
        return f"{AGREEMENTS[row.test['metric']]}, policies of {arm_title(row.test['policy'])}: {sides}"
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


def _setting_title(recipe: str, inversion_steps: int | None = None, draws: int | None = None, **_: Any) -> str:
    steps = f", N = {inversion_steps}" if inversion_steps else ""
    return f"{arm_title(recipe)}{steps}" + (f", {draws} draw{'s' if draws > 1 else ''}" if draws else "")


def size_text(row: Verdict) -> str:
    """How much was measured: seeds and what else."""
    if row.batches:
        return f"{row.batches} batches x {row.pairs} pairs"
    if row.pairs:
        return f"{row.seeds} x {row.pairs} pairs"
    return f"{row.seeds} x {row.prompts}" if row.prompts else f"{row.seeds}" if row.seeds else "–"


def to_markdown(rows: list[Verdict]) -> str:
    """The verdicts as a GitHub table."""
    head = ["Claim", "Where", "Measured", "Paper", "This study [95 %]", "Seeds x prompts", "Verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    previous = ""
    for row in rows:
        first = row.id != previous
        previous = row.id
        undecided = row.verdict in (NOT_RUN, INCONCLUSIVE)
        always = row.test["kind"] in ("speed", "gradient", "distance", "agreement")
        note = f" ({row.reason})" if row.reason and (undecided or always) else ""
        sized = row.would_settle[:1].isdigit()  # and not a sentence on why there is no size
        settle = f"; {row.would_settle}{' would settle it' if sized else ''}" if row.would_settle else ""
        paper = (row.paper_value or "–") if first else "″"
        question, locus = (row.question, row.locus) if first else ("″", "″")
        cells = [question, locus, measured_text(row), paper, value_text(row), size_text(row)]
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
            cells.append(f"{name}**{row.verdict}** ({value_text(row)})")
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
