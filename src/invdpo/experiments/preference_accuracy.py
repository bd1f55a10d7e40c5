"""How often a score agrees with held-out votes, ties included, as PickScore's authors count it.

`trainer/scripts/eval_preference_predictor.py` of yuvalkirstain/PickScore: a scorer gives each image of a pair a
probability, the softmax of scale times its score. It predicts a tie where the two differ by at most a threshold t. A
prediction (image 0, image 1 or tie) that equals the vote counts 1; where exactly one of the two is a tie, one half;
otherwise 0. The first of t = 0, 0.1, ..., 1 that does best on one set of votes is applied to another.

PickScore's scale is its checkpoint's logit scale. A score that has none (an aesthetic score, the oracle) needs one
before its difference is a probability: the Bradley-Terry scale of largest likelihood on the votes that choose t.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit

from invdpo.errors import InvdpoError
from invdpo.evidence.statistics import SEED, Interval, cluster_interval
from invdpo.preferences.reader import Vote
from invdpo.scorers import Scorer
from invdpo.scorers.composition import TASKS

THRESHOLDS = tuple(step / 10 for step in range(11))
SCORED_AT_ONCE = 64  # votes, of two images each
MOST_DECIDED = 1e4  # largest scale that is looked for, in units of one over the scores' spread


@dataclass(frozen=True)
class Accuracy:
    """Agreement with the votes of a test set.

    interval: clustered by prompt, `prompts` of which there are. threshold, scale: as chosen on `validation` votes.
    decided: the share of pairs with a winner whose winner scores higher (a tie of scores counts one half), which needs
    neither. predicted_ties: how many ties were predicted.
    """

    interval: Interval
    threshold: float
    scale: float
    decided: Interval | None
    votes: int
    ties: int
    predicted_ties: int
    validation: int


def agreement_with_votes(differences: np.ndarray, label_0: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) 1, 0.5 or 0 for each vote.

    differences: (n,) probability of image 0 minus that of image 1, -1 to 1. label_0: (n,) 1 where image 0 won, 0 where
    image 1 did, 0.5 for a tie. threshold: a difference of at most this size predicts a tie.
    """
    predicted = np.where(np.abs(differences) <= threshold, 0.0, np.sign(differences))
    return 1 - np.abs(predicted - np.sign(label_0 - 0.5)) / 2


def best_threshold(differences: np.ndarray, label_0: np.ndarray) -> float:
    """The first of THRESHOLDS with the highest mean agreement."""
    return THRESHOLDS[int(np.argmax([agreement_with_votes(differences, label_0, t).mean() for t in THRESHOLDS]))]


def probability_difference(scores: np.ndarray, scale: float) -> np.ndarray:
    """(n,) p_0 - p_1 of the softmax of scale times scores (n, 2)."""
    return 2 * expit(scale * (scores[:, 0] - scores[:, 1])) - 1


def bradley_terry_scale(scores: np.ndarray, label_0: np.ndarray) -> float:
    """The positive scale of score differences under which the votes are likeliest; a tie is half a vote for each.

    scores: (n, 2). One over the scores' spread times 1e-4 to 1e4; the ends stand for scores that tell nothing, or all.
    """
    difference = scores[:, 0] - scores[:, 1]
    spread = float(difference.std()) or 1.0
    scaled = difference / spread

    def loss(log_scale: float) -> float:
        logit = np.exp(log_scale) * scaled
        return float(np.mean(np.logaddexp(0, logit) - label_0 * logit))

    bound = np.log(MOST_DECIDED)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x) / spread)  # pyright: ignore[reportAttributeAccessIssue]


def preference_accuracy(
    scores: np.ndarray,
    label_0: np.ndarray,
    prompts: Sequence[str],
    validation: tuple[np.ndarray, np.ndarray],
    scale: float | None = None,
) -> Accuracy:
    """Agreement of one score with test votes. scores: (n, 2). label_0, prompts: (n,).

    validation: (scores, label_0) of the votes that choose the threshold, and the scale where none is given.
    """
    if scale is None:
        scale = bradley_terry_scale(*validation)
    threshold = best_threshold(probability_difference(validation[0], scale), validation[1])
    differences = probability_difference(scores, scale)
    agreed = agreement_with_votes(differences, label_0, threshold)
    names = np.asarray(prompts, dtype=object)
    won = label_0 != 0.5
    higher = (1 + np.sign(scores[:, 0] - scores[:, 1]) * np.sign(label_0 - 0.5)) / 2
    return Accuracy(
        interval=_by_prompt(agreed, names),
        threshold=threshold,
        scale=scale,
        decided=_by_prompt(higher[won], names[won]) if won.any() else None,
        votes=len(label_0),
        ties=int((~won).sum()),
        predicted_ties=int((np.abs(differences) <= threshold).sum()),
        validation=len(validation[1]),
    )


def _by_prompt(agreed: np.ndarray, prompts: np.ndarray) -> Interval:
    """The mean over votes with its interval over prompts: votes on one prompt resemble one another."""
    _, place = np.unique(prompts.astype(str), return_inverse=True)
    return cluster_interval(np.bincount(place, weights=agreed), np.bincount(place).astype(float))


def halves_by_prompt(prompts: Sequence[str]) -> np.ndarray:
    """(n,) True for votes on a random half of the distinct prompts, the same for the same prompts in any order."""
    distinct = sorted(set(prompts))
    chosen = np.random.default_rng([SEED, len(distinct)]).permutation(len(distinct))[: len(distinct) // 2]
    half = {distinct[place] for place in chosen}
    return np.array([prompt in half for prompt in prompts])


def score_votes(votes: Iterable[Vote], scorers: Sequence[Scorer]) -> pd.DataFrame:
    """A row a vote: row, caption, label_0 and, of every score, NAME_0 and NAME_1; nan where a score does not exist.

    Without the compositional benchmarks' tasks, each of which few captions ask for.
    """
    rows, left = [], iter(votes)
    while part := list(islice(left, SCORED_AT_ONCE)):
        images = [image for vote in part for image in (vote.image_0, vote.image_1)]
        captions = [vote.caption for vote in part for _ in range(2)]
        found = pd.DataFrame({"row": [v.row for v in part], "caption": [v.caption for v in part]})
        found["label_0"] = [vote.label_0 for vote in part]
        for scorer in scorers:
            for name, values in scorer.score(images, captions).items():
                if name.removeprefix("oracle_") not in TASKS:
                    found[f"{name}_0"], found[f"{name}_1"] = values[0::2], values[1::2]
        rows.append(found)
    if not rows:
        raise InvdpoError("There is no vote to measure preference accuracy on; name a file with pairs.")
    return pd.concat(rows, ignore_index=True)


def score_names(votes: pd.DataFrame) -> list[str]:
    """The scores of a table that `score_votes` made, in its order."""
    return [str(column).removesuffix("_1") for column in votes.columns if str(column).endswith("_1")]


def accuracies(votes: pd.DataFrame, scales: Mapping[str, float]) -> dict[str, Accuracy]:
    """Every score's accuracy on the rows whose `split` is `test`, its threshold and scale from those of `validation`.

    votes: as `score_votes` makes it, with a column `split`. A vote that a score does not exist for is left out of that
    score's. InvdpoError where a split is empty, or a scale is for a score that there is not.
    """
    names = score_names(votes)
    if unknown := sorted(set(scales) - set(names)):
        raise InvdpoError(
            f"`experiments.preference_accuracy.scales` names `{unknown[0]}`, which is none of {', '.join(names)}."
        )
    found = {}
    for name in names:
        columns = [f"{name}_0", f"{name}_1"]
        known = votes.dropna(subset=columns)
        parts = {split: known.loc[known["split"] == split] for split in ("validation", "test")}
        if empty := [split for split, part in parts.items() if part.empty]:
            raise InvdpoError(f"No vote of the {empty[0]} split has a score of {name}; name more pairs.")
        validation, test = (
            (part[columns].to_numpy(np.float64), part["label_0"].to_numpy(np.float64)) for part in parts.values()
        )
        captions = parts["test"]["caption"].astype(str).tolist()
        found[name] = preference_accuracy(*test, captions, validation, scales.get(name))
    return found
