"""Verdicts from what is no score of a prompt: experiments on held-out pairs, distributions, votes of people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel
from scipy.stats import rankdata

from invdpo.errors import InvdpoError
from invdpo.evidence.ledger import (
    INCONCLUSIVE,
    Test,
    Verdict,
    agreeing_seeds,
    all_or_none,
    decide,
    judge_table,
    one_seed,
)
from invdpo.evidence.statistics import DRAWS, LEVEL, SEED, mean_interval

if TYPE_CHECKING:
    from invdpo.config import StudyConfig


def judge_agreement(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
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
            row = judge_table(_shares(surrogates, truth), len(truth), test, row, "pairs")
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
        seeds_agreeing=agreeing_seeds(values, test),
        verdict=decide(low, high, test.threshold, test.direction, seeds),
        reason=one_seed(seeds) or spread,
    )


def judge_round_trip(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
    """Tests on the experiment `inversion_error`: DDIM at the most inversion steps, pictures as the unit."""
    settings = study.experiments.inversion_error
    wanted = {"solvers": ["ddim"], "guidance_scales": [test.guidance_scale]}
    if lacking := _lacking("inversion_error", settings, wanted):
        return replace(row, reason=lacking)
    assert settings is not None  # nothing is lacking
    errors = _result(study, "inversion_error", "errors.csv")
    place = {"solver": "ddim", "steps": max(settings.steps), "guidance_scale": test.guidance_scale}
    values = _where(errors, place)["rms_error"].to_numpy(np.float64)
    if len(values) != settings.latents:
        raise _stale(study, "inversion_error", "errors.csv", f"{len(values)} pictures at N = {max(settings.steps)}")
    interval = mean_interval(values[None])
    return replace(
        row,
        test=row.test | {"inversion_steps": [max(settings.steps)]},
        artifacts=[f"results/{study.study}/experiments/inversion_error"],
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        pictures=len(values),
        verdict=decide(interval.low, interval.high, test.threshold, test.direction, None),
        reason="the interval is over pictures, of one base model",
    )


def judge_distribution(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
    """Tests on distribution.csv, which has one value a set of pictures: facts of the runs, as those on the logs."""
    settings = study.experiments.distribution
    if lacking := _lacking("distribution", settings, {"arms": test.arms}):
        return replace(row, reason=lacking)
    path = study.root / "distribution.csv"
    if not path.is_file():
        raise InvdpoError(f"{path} is missing. Run `invdpo distribution --study config/{study.study}.yaml` first.")
    table = pd.read_csv(path)
    first, second = (_where(table, {"method": arm}).set_index("seed")[test.metric] for arm in test.arms)
    if set(second.index) == {0} and len(first) > 1:  # the base has one set of pictures
        second = pd.Series(float(second.iloc[0]), index=first.index)
    values = (first - second).dropna().tolist()
    if len(values) != len(first):
        raise InvdpoError(f"{path} has not the same seeds of {' and '.join(test.arms)}. Run the study again.")
    beyond = [value < test.threshold if test.direction == "lower" else value > test.threshold for value in values]
    return replace(
        row,
        artifacts=[f"results/{study.study}/distribution.csv"],
        value=float(np.mean(values)),
        low=min(values),
        high=max(values),
        seeds=len(values),
        seeds_agreeing=sum(beyond),
        pictures=min(_where(table, {"method": test.arms[0]})["images"].tolist()),
        verdict=all_or_none(sum(beyond), len(values)),
        reason="the range is over training seeds",
    )


def judge_votes(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
    """Tests on Table S4: the share of arms[0]'s wins over arms[1] among the votes that the exclusions leave."""
    path = study.root / "tables" / "table_s4.csv"
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"raters_used": []})
    if "kept" not in table["raters_used"].tolist():
        return replace(row, reason="no votes of people: `make user-study`, then `make user-study-analysis`")
    rows = _where(table, {"raters_used": "kept", "arm": test.arms[0], "baseline": test.arms[1]})
    if rows.empty:
        return replace(row, reason=f"people were not asked to compare {test.arms[0]} with {test.arms[1]}")
    found = rows.iloc[0]
    value, low, high = (float(found[name]) for name in ("win_rate", "win_rate_low", "win_rate_high"))
    return replace(
        row,
        artifacts=[f"results/{study.study}/tables/table_s4.csv"],
        value=value,
        low=low,
        high=high,
        pictures=int(found["pairs"]),
        verdict=decide(low, high, test.threshold, test.direction, None),
        reason=f"{int(found['votes'])} votes of {int(found['raters'])} raters",
    )


def judge_audit(study: StudyConfig, test: Test, row: Verdict) -> Verdict:
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
        verdict=all_or_none(agreeing, len(values)),
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
