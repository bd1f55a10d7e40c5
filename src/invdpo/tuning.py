"""Equal tuning: the same grid of learning rate and beta for every method, on seeds and prompts never reported."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from invdpo.config import ArmEntry, ScorersConfig, StudyConfig, TuningConfig, tuned_file
from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done

if TYPE_CHECKING:
    import torch


def tuning_of(study: StudyConfig) -> TuningConfig:
    """The study's grid; InvdpoError where it has none."""
    if study.tuning is None:
        raise InvdpoError(f"Study `{study.study}` has no `tuning:` section, so there is no grid to run. Add one.")
    return study.tuning


def grid(study: StudyConfig, arm: str) -> dict[str, ArmEntry]:
    """The grid points of one arm as arms of their own; beta is not varied where the loss has none.

    Raises InvdpoError where the study gives such an arm a grid of beta of its own.
    """
    tuning, entry = tuning_of(study), study.arms[arm]
    rates = [{"learning_rate": rate} for rate in tuning.learning_rate]
    has_beta = study.arm(arm).recipe.loss.kind != "winner_only"
    if not has_beta and arm in tuning.beta:
        raise InvdpoError(f"`tuning.beta.{arm}` of study `{study.study}`: the arm's loss has no beta. Leave it out.")
    betas = [{"beta": beta} for beta in tuning.betas(arm)] if has_beta else [{}]
    return {
        f"{arm}_point{number}": entry.model_copy(
            update={"tuned": False, "training": {**entry.training, **rate, **beta}}
        )
        for number, (rate, beta) in enumerate(product(rates, betas), start=1)
    }


def tuning_study(study: StudyConfig, arms: dict[str, ArmEntry]) -> StudyConfig:
    """The study with the tuning seeds and prompts, those arms and only the last checkpoint, under <root>/tuning.

    Only what methods are tuned for is scored: the world's hidden utility, else the held-out preference model.
    """
    tuning = tuning_of(study)
    family = "oracle" if study.scorers.oracle is not None else "hps"
    changes = {
        "study": f"{study.study}/tuning",
        "seeds": tuning.seeds,
        "prompts": tuning.prompts,
        "arms": arms,
        "training": study.training.model_copy(update={"checkpoints": []}),
        "scorers": ScorersConfig(**{family: getattr(study.scorers, family)}),
    }
    return study.model_copy(update=changes)


def tune_arm(study: StudyConfig, arm: str, device: torch.device) -> Path:
    """Train and score every grid point of one arm; writes <root>/tuning/<arm>.csv, a row a grid point."""
    from invdpo.evaluate import evaluate
    from invdpo.training.loop import train

    base = {"base": ArmEntry.model_validate({"method": "no_training"})}
    points = tuning_study(study, base | grid(study, arm))
    _share_pairs(study.root, points.root)
    for name in points.arms:
        train(points, name, points.seeds, device)
        evaluate(points, name, points.seeds, device)
    metric = "oracle_utility" if points.scorers.oracle is not None else "hps"
    untouched = _by_prompt(points, "base", [0], metric)
    rows = []
    for name, entry in grid(study, arm).items():
        difference = _by_prompt(points, name, points.seeds, metric) - untouched
        rows.append(
            {
                "arm": arm,
                "method": entry.method,
                "learning_rate": entry.training["learning_rate"],
                "beta": entry.training.get("beta"),
                "metric": metric,
                "difference_from_base": round(float(difference.mean()), 5),
                "standard_error": round(float(difference.std(ddof=1) / len(difference) ** 0.5), 5),
                "prompts": len(difference),
                "seeds": len(points.seeds),
            }
        )
    path = points.root / f"{arm}.csv"
    with replace_when_done(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    return path


def tune(study: StudyConfig) -> list[Path]:
    """All grids as one table, and each method's best point.

    Writes <root>/tables/tuning.csv, and for the repository config/tuned/<study>.csv (the same table) and .yaml (the
    choice, which `tuned:` of the study names).
    """
    tuning = tuning_of(study)
    parts = [pd.read_csv(study.root / "tuning" / f"{arm}.csv") for arm in tuning.arms]
    rows = pd.concat(parts, ignore_index=True)
    chosen: dict[str, dict[str, Any]] = {}
    for part in parts:
        best = part.to_dict("records")[int(part["difference_from_base"].to_numpy().argmax())]
        values = {key: float(best[key]) for key in ("learning_rate", "beta") if not pd.isna(best[key])}
        chosen[str(best["method"])] = values
    choice = tuned_file(study.study)
    tables = [study.root / "tables" / "tuning.csv", choice.with_suffix(".csv")]
    for table in tables:
        with replace_when_done(table) as temporary:
            rows.to_csv(temporary, index=False)
    header = (
        f"# Made by `make tune STUDY={study.study}`: each method's best point by {rows['metric'].iloc[0]},\n"
        f"# on seeds {tuning.seeds} and the prompts of {tuning.prompts}. The whole grid: {tables[1].name}\n"
    )
    with replace_when_done(choice) as temporary:
        temporary.write_text(header + yaml.safe_dump(chosen, sort_keys=True))
    return [*tables, choice]


def _share_pairs(root: Path, tuning_root: Path) -> None:
    """The tuning runs learn from the study's own prepared pairs."""
    link = tuning_root / "preferences"
    tuning_root.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(os.path.relpath(root / "preferences", tuning_root), target_is_directory=True)


def _by_prompt(study: StudyConfig, arm: str, seeds: list[int], metric: str) -> np.ndarray:
    """(prompts,) scores of an arm's last checkpoint, averaged over training seeds."""
    files = [study.root / "scores" / arm / f"seed{seed}.parquet" for seed in seeds]
    scores = [pd.read_parquet(file).sort_values("prompt_id") for file in files]
    return np.mean([frame.loc[frame["scorer"] == metric, "score"].to_numpy(np.float64) for frame in scores], axis=0)
