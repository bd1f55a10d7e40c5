"""Agreement with votes by PickScore's own rule, on votes whose answer is known and through the whole stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pairs_frame
from PIL import Image

from invdpo.config import StudyConfig, parse_study
from invdpo.errors import InvdpoError
from invdpo.evidence import experiments as evidence
from invdpo.experiments.preference_accuracy import (
    accuracies,
    agreement_with_votes,
    best_threshold,
    bradley_terry_scale,
    halves_by_prompt,
    preference_accuracy,
    probability_difference,
    score_votes,
)
from invdpo.experiments.stage import run
from invdpo.preferences.reader import Counts, read_votes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("difference", "label_0", "threshold", "credit"),
    [
        (0.4, 1.0, 0.1, 1.0),  # image 0 predicted, image 0 won
        (0.4, 0.0, 0.1, 0.0),
        (-0.4, 0.0, 0.1, 1.0),
        (-0.4, 0.5, 0.1, 0.5),  # a tie on the side of the vote alone
        (0.05, 1.0, 0.1, 0.5),  # and on the side of the prediction alone
        (0.05, 0.5, 0.1, 1.0),
        (0.5, 0.5, 0.5, 1.0),  # a difference of the threshold itself is a tie
        (0.0, 0.5, 0.0, 1.0),
        (1.0, 1.0, 1.0, 0.5),
    ],
)
def test_credit_of_a_vote(difference: float, label_0: float, threshold: float, credit: float) -> None:
    assert agreement_with_votes(np.array([difference]), np.array([label_0]), threshold).tolist() == [credit]


def test_the_first_best_threshold_is_chosen() -> None:
    # Small differences are ties, large ones are decided as the votes are: any t from 0.2 to below 0.6 is perfect.
    differences, labels = np.array([0.15, -0.2, 0.6, -0.7]), np.array([0.5, 0.5, 1.0, 0.0])
    assert best_threshold(differences, labels) == 0.2
    assert best_threshold(differences, np.array([1.0, 0.0, 1.0, 0.0])) == 0
    assert best_threshold(differences, np.full(4, 0.5)) == 0.7


def test_probabilities_are_a_softmax_of_scaled_scores() -> None:
    scores = np.array([[0.21, 0.2], [0.2, 0.23], [0.2, 0.2]])
    expected = torch.softmax(100 * torch.tensor(scores), dim=-1)
    assert probability_difference(scores, 100) == pytest.approx((expected[:, 0] - expected[:, 1]).numpy())


def votes_by(scale: float, n: int, seed: int, ties: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, 2) and labels of voters who prefer by a Bradley-Terry model of that scale."""
    rng = np.random.default_rng(seed)
    scores = 0.2 + 0.02 * rng.normal(size=(n, 2))
    won = rng.uniform(size=n) < (1 + probability_difference(scores, scale)) / 2
    return scores, np.where(rng.uniform(size=n) < ties, 0.5, won.astype(float))


def test_the_scale_of_the_voters_is_found() -> None:
    assert bradley_terry_scale(*votes_by(80, 20_000, 0, ties=0)) == pytest.approx(80, rel=0.05)
    scores, labels = votes_by(80, 500, 1)
    assert bradley_terry_scale(scores, 1 - labels) < 1  # scores against the votes: no positive scale helps
    assert np.isfinite(bradley_terry_scale(scores, (scores[:, 0] > scores[:, 1]).astype(float)))
    assert np.isfinite(bradley_terry_scale(np.ones((5, 2)), np.ones(5)))


def test_accuracy_is_measured_on_the_test_votes_alone() -> None:
    scores, labels = votes_by(60, 400, 2)
    validation = votes_by(60, 300, 3)
    prompts = [f"prompt {k // 4}" for k in range(400)]
    found = preference_accuracy(scores, labels, prompts, validation, scale=60)
    difference = probability_difference(scores, 60)
    threshold = best_threshold(probability_difference(validation[0], 60), validation[1])
    assert found.threshold == threshold != best_threshold(difference, labels), "these votes would choose another"
    assert found.interval.estimate == pytest.approx(agreement_with_votes(difference, labels, threshold).mean())
    assert (found.interval.prompts, found.votes, found.ties) == (100, 400, int((labels == 0.5).sum()))
    assert found.decided is not None
    won = labels != 0.5
    right = (scores[won, 0] > scores[won, 1]) == (labels[won] == 1)
    assert found.decided.estimate == pytest.approx(right.mean())
    assert found.interval.low < found.interval.estimate < found.interval.high


def test_votes_on_one_prompt_widen_the_interval() -> None:
    scores, labels = votes_by(60, 100, 4)
    many = (np.repeat(scores, 6, axis=0), np.repeat(labels, 6))
    prompts = [f"prompt {k // 6}" for k in range(600)]
    clustered = preference_accuracy(*many, prompts, many, scale=60).interval
    alone = preference_accuracy(*many, [str(k) for k in range(600)], many, scale=60).interval
    assert clustered.standard_error == pytest.approx(np.sqrt(6) * alone.standard_error, rel=0.1)


def test_halves_hold_whole_prompts() -> None:
    prompts = [f"prompt {k % 37}" for k in range(200)]
    half = halves_by_prompt(prompts)
    first = {prompt for prompt, chosen in zip(prompts, half, strict=True) if chosen}
    assert len(first) == 18 and first.isdisjoint({p for p, chosen in zip(prompts, half, strict=True) if not chosen})
    assert halves_by_prompt(prompts[::-1]).tolist() == half[::-1].tolist()


class Brightness:
    """A scorer: how light a picture is; of captions with a `square`, a second score that others have not."""

    version = "brightness:1"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        light = np.array([np.asarray(image).mean() for image in images], np.float32)
        square = np.array(["square" in prompt for prompt in prompts])
        return {"light": light, "square": np.where(square, light, np.nan).astype(np.float32)}


def test_every_vote_is_scored_ties_and_all(tiny_pairs: Path) -> None:
    counts = Counts()
    votes = score_votes(read_votes([tiny_pairs], counts), [Brightness()])
    assert (counts.rows, counts.ties, counts.kept) == (12, 2, 12)
    assert votes["label_0"].tolist() == tiny_pairs_frame()["label_0"].tolist()
    assert votes["square_0"].notna().sum() == 3
    pair = next(iter(read_votes([tiny_pairs], Counts())))
    assert votes["light_1"][0] == np.float32(np.asarray(pair.image_1).mean())
    with pytest.raises(InvdpoError, match="no vote"):
        score_votes([], [Brightness()])


def test_a_vote_without_a_score_is_left_out_of_that_score_alone() -> None:
    rng = np.random.default_rng(5)
    votes = pd.DataFrame({"caption": [f"p{k}" for k in range(60)], "label_0": rng.choice([0.0, 0.5, 1.0], 60)})
    votes["split"] = ["validation", "test"] * 30
    for name in ("a", "b"):
        votes[f"{name}_0"], votes[f"{name}_1"] = rng.normal(size=(2, 60))
    votes.loc[:9, "b_1"] = np.nan
    found = accuracies(votes, {"a": 3.0})
    assert [(name, f.votes, f.validation) for name, f in found.items()] == [("a", 30, 30), ("b", 25, 25)]
    assert found["a"].scale == 3
    with pytest.raises(InvdpoError, match="scales` names `c`"):
        accuracies(votes, {"c": 1.0})
    with pytest.raises(InvdpoError, match="No vote of the validation split"):
        accuracies(votes.assign(split="test"), {})


@pytest.fixture
def study(
    tiny_study: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., StudyConfig]:
    """Makes studies with 80 held-out votes and the scorer above."""
    monkeypatch.setattr("invdpo.experiments.stage.build_scorers", lambda scorers, device: [Brightness()])
    frame = tiny_pairs_frame(rows=80, ties=8, seed=3)
    frame["caption"] = [f"{text} {k // 2}" for k, text in enumerate(frame["caption"])]
    frame.to_parquet(tmp_path / "votes.parquet")

    def make(settings: dict[str, Any] | None = None, **changes: Any) -> StudyConfig:
        experiments = {"held_out": "votes.parquet", "preference_accuracy": settings or {}}
        return parse_study(tiny_study().model_dump() | {"experiments": experiments} | changes, "tiny")

    return make


def test_the_stage_and_its_table(study: Callable[..., StudyConfig]) -> None:
    folder = run(study(), "preference_accuracy", CPU)
    votes, accuracy = pd.read_csv(folder / "votes.csv"), pd.read_csv(folder / "accuracy.csv")
    assert "caption" not in votes and len(votes) == 80
    split = votes.groupby("prompt")["split"].nunique()
    assert (split == 1).all() and set(votes["split"]) == {"validation", "test"}
    row = accuracy.set_index("scorer").loc["light"]
    test = votes.query("split == 'test'")
    assert row["accuracy"] == pytest.approx(test["light_agrees"].mean())
    assert votes.query("split == 'validation'")["light_agrees"].isna().all()
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    run(study(), "preference_accuracy", CPU)
    assert {path: path.read_bytes() for path in folder.glob("*.csv")} == before

    paths = evidence.write(study())
    assert {path.name for path in paths} == {f"preference_accuracy.{kind}" for kind in ("csv", "md", "tex")}
    table = pd.read_csv(next(path for path in paths if path.suffix == ".csv")).set_index("scorer")
    assert table.loc["light", "accuracy"] == pytest.approx(row["accuracy"], rel=1e-5)
    assert table.loc["light", "standing"] == table.loc["square", "standing"] == "tied"


def test_validation_votes_of_their_own(study: Callable[..., StudyConfig]) -> None:
    frame = pd.read_parquet("votes.parquet")
    frame.head(30).to_parquet("validation.parquet")
    folder = run(study({"validation": "validation.parquet", "scales": {"light": 0.5}}), "preference_accuracy", CPU)
    row = pd.read_csv(folder / "accuracy.csv").set_index("scorer").loc["light"]
    assert (row["votes"], row["validation_votes"], row["scale"]) == (80, 30, 0.5)


def test_broken_images_and_missing_votes_are_named(study: Callable[..., StudyConfig]) -> None:
    frame = pd.read_parquet("votes.parquet")
    frame.loc[4:8, "jpg_1"] = [b"no image"] * 5
    frame.to_parquet("votes.parquet")
    with pytest.raises(InvdpoError, match=r"5 of 80 votes have an image that cannot be decoded, the first in row 4"):
        run(study(), "preference_accuracy", CPU)
    with pytest.raises(InvdpoError, match="needs votes that no method was trained on"):
        study(experiments={"preference_accuracy": {}})
