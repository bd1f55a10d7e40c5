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
METHODS = Path("config/shapes_methods.yaml")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def study() -> StudyConfig:
    return load_study(SHAPES)


def test_every_method_gets_the_same_grid(study: StudyConfig) -> None:
    section = tuning.tuning_of(study)
    for arm in section.arms:
        points = tuning.grid(study, arm)
        tried = {(point.training["learning_rate"], point.training.get("beta")) for point in points.values()}
        betas = [None] if arm == "sft" else section.betas(arm)
        assert tried == {(rate, beta) for rate in section.learning_rate for beta in betas}
        assert not any(point.tuned for point in points.values())


def with_betas(beta: object, **changes: object) -> StudyConfig:
    data = read_yaml(SHAPES)
    data["tuning"] |= {"beta": beta} | changes
    return parse_study(data, "shapes.yaml")


def betas_tried(study: StudyConfig, arm: str) -> set[float | None]:
    return {point.training.get("beta") for point in tuning.grid(study, arm).values()}


def test_a_loss_of_another_scale_has_a_grid_of_its_own() -> None:
    study = with_betas({"default": [5.0, 50.0], "p_single": [0.1, 1.0]})
    assert betas_tried(study, "p_single") == {0.1, 1.0}
    assert betas_tried(study, "q_single") == {5.0, 50.0}


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ({"default": [5.0, 50.0], "p_single": [0.1]}, r"`tuning.beta.p_single` has 1 values .* 2\. Give every method"),
        ({"default": [5.0], "p_sinlge": [0.1]}, "names `p_sinlge`, not in `tuning.arms`. Did you mean `p_single`"),
        ({"p_single": [0.1]}, "`tuning.beta` has no key `default`"),
        ({"default": []}, r"`tuning.beta.default`: List should have at least 1 item"),
        ([0.0], r"`tuning.beta.default\[0\]`: Input should be greater than 0"),
        ("5.0", "`tuning.beta`: Input should be a valid dictionary"),
    ],
)
def test_an_unequal_or_impossible_grid_of_beta_is_refused(beta: object, message: str) -> None:
    with pytest.raises(InvdpoError, match=message):
        with_betas(beta)


def test_a_grid_of_beta_for_a_loss_without_one_is_refused() -> None:
    study = with_betas({"default": [5.0], "sft": [0.1]})
    with pytest.raises(InvdpoError, match="`tuning.beta.sft` of study `shapes`: the arm's loss has no beta"):
        tuning.grid(study, "sft")


def test_the_methods_are_tuned_as_shapes_tunes_its_own(study: StudyConfig) -> None:
    theirs, ours = tuning.tuning_of(load_study(METHODS)), tuning.tuning_of(study)
    same = {"learning_rate", "seeds", "prompts"}
    assert theirs.model_dump(include=same) == ours.model_dump(include=same)
    for arm in theirs.arms:
        low, middle, high = theirs.betas(arm)
        assert middle / low == pytest.approx(10) and high / middle == pytest.approx(10)
    assert theirs.betas("smpo") == ours.betas("diffusion_dpo")


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


def finish_grids(study: StudyConfig) -> None:
    """The csv of every arm's grid, below the working directory; 3e-5 is the best learning rate."""
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


def test_the_best_point_is_chosen(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = tuning.tuning_of(study)
    finish_grids(study)
    tuning.tune(study)
    chosen = yaml.safe_load(Path("config/tuned/shapes.yaml").read_text())
    assert chosen["diffusion_dpo"] == {"learning_rate": 3.0e-5, "beta": 500.0}
    assert set(chosen) == {study.arms[arm].method for arm in section.arms}
    assert len(pd.read_csv("config/tuned/shapes.csv")) == 3 * len(section.arms)


def test_a_study_is_read_before_its_grid_has_run_and_with_its_choices_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config/tuned").mkdir(parents=True)
    Path("config/tuned/shapes.yaml").write_text("sft: {learning_rate: 2.0e-4}\n")
    data = read_yaml(REPOSITORY / METHODS)
    before = parse_study(data, "shapes_methods.yaml")
    arms = tuning.tuning_of(before).arms
    assert all(before.awaits_tuning(arm) for arm in arms)
    assert before.awaits_tuning("mapo_shuffled") and not before.awaits_tuning("sft")
    finish_grids(before)
    tuning.tune(before)
    after = parse_study(data, "shapes_methods.yaml")
    assert not any(after.awaits_tuning(arm) for arm in after.arms)
    assert (after.arm("mapo_shuffled").learning_rate, after.arm("sft").learning_rate) == (3.0e-5, 2.0e-4)
