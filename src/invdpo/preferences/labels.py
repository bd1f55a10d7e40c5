"""Who is preferred: the label controls, labels of another column, and the strengths of a method that asks a scorer.

A control is the same pairs with the preference drawn by a coin, or reversed, whoever states it. Votes: winner and loser
exchange their latents. A scorer (SmPO): the latents are exchanged just so, and each pair keeps the strength, sign
included, that it has in the order of the votes. So `swapped` trains towards what the scorer likes less, and `shuffled`
towards a coin's choice. A strength taken from the exchanged latents would change its sign with them and undo the
control.

A column of the pairs' file (`label_0_…`) may decide in place of label_0: a pair that it orders the other way round is
exchanged, one that it calls a tie is not drawn. Pairs that label_0 calls a tie are in no cache, whatever a column says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from invdpo.config import LABEL_COLUMN, nearest
from invdpo.errors import InvdpoError
from invdpo.preferences.shards import Shard, opened, values, winners


def drawn_pairs(labels: str, pairs: int, columns: Mapping[str, Tensor]) -> Tensor:
    """Which of a cache's `pairs` an arm's order goes over, ascending: (m,) int64; all but those that its column calls
    ties. columns: of the cache, as `flips` has them.
    """
    if not labels.startswith(LABEL_COLUMN):
        return torch.arange(pairs)
    return torch.nonzero(columns[labels] != 0.5).flatten()


def flips(labels: str, pairs: int, seed: int, columns: Mapping[str, Tensor] | None = None) -> Tensor:
    """(pairs,) bool: which pairs exchange winner and loser.

    `shuffled` flips each pair by a fair coin of the seed, once for the whole run: a label that carries
    nothing. columns: column -> (pairs,), 1 where it has label_0's winner, 0 where the loser, 0.5 where none.
    """
    if columns is not None and labels.startswith(LABEL_COLUMN):
        return columns[labels] == 0
    if labels == "true":
        return torch.zeros(pairs, dtype=torch.bool)
    if labels == "swapped":
        return torch.ones(pairs, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(pairs, generator=generator) < 0.5


def strengths(scores: Tensor, among: Tensor | None = None) -> Tensor:
    """(n,) preference strengths 2p - 1 of n pairs, from the PickScores (raw cosines) of their images (n,2), the votes'
    winner first; negative where the scorer likes the other image more, which is SmPO's relabelling.

    p is the softmax of a pair's two scores after min-max scaling (SmPO's train.py:739-747), so 2p - 1 is
    tanh((score_win - score_lose) / (2 span)), within +-0.46. The span is that of the scores `among` which the pairs
    are seen (m,2), a training set's, or else of those given: 0.2820 - 0.1154 in the released code is this quantity for
    PickScore on Pick-a-Pic, and another scorer or other images have another.
    """
    among = scores if among is None else among
    span = among.max() - among.min()
    return torch.tanh((scores[:, 0] - scores[:, 1]) / (2 * span))


def check_columns(shards: Sequence[Shard], columns: Sequence[str]) -> None:
    """Raises InvdpoError, naming file and column, where a file of pairs lacks one of the columns."""
    for shard in shards if columns else []:
        with opened(shard) as parquet:
            there = parquet.schema_arrow.names
        for column in columns:
            if column not in there:
                known = [name for name in there if name.startswith(LABEL_COLUMN)]
                hint = nearest(column, known) if known else " It has none beside label_0."
                raise InvdpoError(
                    f"{shard.name} has no column `{column}`, which an arm takes its labels from.{hint} `invdpo rank` "
                    "writes one for each score that it ranks by."
                )


def agreements(shards: Sequence[Shard], rows: Sequence[np.ndarray], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Column -> what it says of the n given rows of all files, in their order: (n,) float64, 1 where it has label_0's
    winner, 0 where its loser, 0.5 where none. rows: of each file, decided ones, ascending.

    Only these columns are read. Raises InvdpoError as `check_columns`, and where a column decides no row.
    """
    check_columns(shards, columns)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for shard, chosen in zip(shards, rows, strict=True):
        with opened(shard) as parquet:
            table = parquet.read(columns=["label_0", *columns])
        won = winners(table.column("label_0"))[1]
        for name, found in parts.items():
            told = values(table.column(name))
            found.append(np.where(won, told, 1 - told)[chosen])
    joined = {name: np.concatenate(found) for name, found in parts.items()}
    for name, found in joined.items():
        if (found == 0.5).all():
            raise InvdpoError(
                f"The column `{name}` decides none of the {len(found)} pairs that label_0 decides. Leave out the arms "
                "that take their labels from it."
            )
    return joined
