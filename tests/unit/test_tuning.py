"""The tuning grid: which points it holds, that it is apart from what is reported, and what it chooses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from invdpo import tuning
from invdpo.config import StudyConfig, load_study, parse_study, read_yaml
from invdpo.errors import InvdpoError

SHAPES = Path("config/shapes.yaml")


@pytest.fixture
def study() -> StudyConfig:
    return load_study(SHAPES)


def test_every_method_gets_the_same_grid(study: StudyConfig) -> None:
    section = tuning.tuning_of(study)
    for arm in section.arms:
        points = tuning.grid(study, arm)
        tried = {(point.training["learning_rate"], point.training.get("beta")) for point in points.values()}
        betas = [None] if arm == "sft" else section.beta
        assert tried == {(rate, beta) for rate in section.learning_rate for beta in betas}
        assert not any(point.tuned for point in points.values())


@pytest.mark.parametrize(
    ("method", "varied"),
    [("diffusion_kto", True), ("mapo", True), ("dspo", True), ("smpo", True), ("sft", False)],
)
def test_beta_is_varied_for_every_loss_that_has_one(method: str, varied: bool) -> None:
    data = read_yaml(SHAPES)
    data["arms"] |= {"arm": {"method": method}}
    data["tuning"] |= {"arms": ["arm"], "learning_rate": [1.0e-5, 1.0e-4], "beta": [20.0, 100.0]}
    points = tuning.grid(parse_study(data, "shapes.yaml"), "arm")
    assert {point.training.get("beta") for point in points.values()} == ({20.0, 100.0} if varied else {None})
    assert len(points) == (4 if varied else 2)


def test_a_point_keeps_what_its_arm_sets(study: StudyConfig) -> None:
    points = tuning.grid(study, "inversion_dpo_implied")
    name, point = next(iter(points.items()))
    tuned = tuning.tuning_study(study, {name: point}).arm(name)
    assert tuned.training.batch == study.arm("inversion_dpo_implied").training.batch
    assert tuned.recipe.trajectory.steps == 20
    assert tuned.learning_rate == point.training["learning_rate"]
    assert tuned.recipe.beta == point.training["beta"]


def test_tuning_runs_share_no_seed_prompt_or_folder_with_the_study(study: StudyConfig) -> None:
    points = tuning.tuning_study(study, {})
    assert not set(points.seeds) & set(study.seeds)
    assert points.prompts != study.prompts
    assert points.root == study.root / "tuning"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "which the study reports"),
        ({"prompts": "assets/shapes/prompts/test.txt"}, "own prompt file"),
        ({"arms": ["diffusion_dop"]}, "Did you mean `diffusion_dpo`"),
        ({"arms": ["base"]}, "does not train"),
    ],
)
def test_tuning_on_what_is_reported_is_refused(change: dict[str, object], message: str) -> None:
    data = read_yaml(SHAPES)
    data["tuning"] |= change
    with pytest.raises(InvdpoError, match=message):
        parse_study(data, "shapes.yaml")


def test_the_best_point_is_chosen(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = tuning.tuning_of(study)
    for arm in section.arms:
        rows = [
            {
                "arm": arm,
                "method": study.arms[arm].method,
                "learning_rate": rate,
                "beta": 500.0,
                "metric": "oracle_utility",
            }
            | {"difference_from_base": gain}
            for rate, gain in [(1.0e-5, 0.1), (3.0e-5, 0.7), (1.0e-4, -4.0)]
        ]
        path = study.root / "tuning" / f"{arm}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)
    tuning.tune(study)
    chosen = yaml.safe_load(Path("config/tuned/shapes.yaml").read_text())
    assert chosen["diffusion_dpo"] == {"learning_rate": 3.0e-5, "beta": 500.0}
    assert set(chosen) == {study.arms[arm].method for arm in section.arms}
    assert len(pd.read_csv("config/tuned/shapes.csv")) == 3 * len(section.arms)
