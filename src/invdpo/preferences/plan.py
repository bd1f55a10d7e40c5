"""Which rows of a data set a study needs: known from its settings and the label columns, before images are fetched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from invdpo.errors import InvdpoError
from invdpo.preferences.labels import check_columns
from invdpo.preferences.order import drawn, generator
from invdpo.preferences.shards import Shard, all_decided, digest, list_shards

if TYPE_CHECKING:
    from invdpo.config import StudyConfig


@dataclass(frozen=True)
class Plan:
    """What is encoded. shards: the files that are touched, in the order of their names. rows: of each, the rows to
    encode, ascending. sizes: of each, all its rows. ties: undecided rows of all. of: files that the source has.

    positions, (n,) int64 ascending, and order: the n rows' places among the `order` decided rows of the files, over
    which the runs' orders go (`order.pair_order`). Both are None where every decided row is encoded: orders then go
    over those that can be decoded.
    """

    shards: list[Shard]
    rows: list[np.ndarray]
    sizes: list[int]
    ties: int
    of: int
    positions: np.ndarray | None = None
    order: int | None = None

    @property
    def pairs(self) -> int:
        """Rows to encode, before any is found undecodable."""
        return sum(map(len, self.rows))

    @property
    def bytes(self) -> int:
        """Size of the files that are touched."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """sha256 of the rows of a sample, and of what the runs' orders go over; empty where all are encoded."""
        return "" if self.order is None else f"{digest(self.rows)}:{self.order}"


def make_plan(study: StudyConfig) -> Plan:
    """The plan of a study.

    With `data.shards: all`, every decided row of every file. Otherwise a cluster sample: whole files are drawn at
    random, by `data.seed`, one after the other until they hold as many decided rows as the longest runs of all seeds
    draw together (`auto`), or as many files as the number says. Every seed draws its pairs from these files only, and
    only what some run draws is encoded. Rows drawn from all files alike would touch nearly every file: 2,000 rows all
    645 of Pick-a-Pic v2. The price: rows of one file may be alike (neighbours in time, by the same people, with the
    same captions), so that a sample of n pairs from few files says less than n pairs drawn from all, and since all
    seeds share the files, the spread over seeds does not show it. More files than `auto` takes make this smaller.

    Only footers and label columns are read. Raises InvdpoError where more files are asked for than there are, no row is
    decided, or a file lacks a column that an arm takes its labels from, and as `list_shards` and `opened` do.
    """
    shards = study.data.shards
    if study.samples_pairs and not any(study.draws.values()):
        raise InvdpoError(f"No arm of study `{study.study}` trains, so it needs no pair of `{study.preferences}`.")
    everything = list_shards(study.preferences, study.data.revision)
    if not study.samples_pairs:
        chosen, is_decided = list(range(len(everything))), all_decided(everything)
    elif isinstance(shards, int):
        if shards > len(everything):
            raise InvdpoError(
                f"`data.shards: {shards}`: `preferences: {study.preferences}` has {len(everything)} files. Ask for "
                "fewer, or for `all`."
            )
        chosen = sorted(_shuffled(study, everything)[:shards])
        is_decided = all_decided([everything[place] for place in chosen])
    else:
        chosen, is_decided = _enough(study, everything)
    touched = [everything[place] for place in chosen]
    check_columns(touched, study.label_columns)
    sizes = [len(flags) for flags in is_decided]
    rows = [np.flatnonzero(flags) for flags in is_decided]
    pairs = sum(map(len, rows))
    plan = Plan(touched, rows, sizes, sum(sizes) - pairs, len(everything))
    if pairs == 0:
        raise InvdpoError(
            f"No usable pair is left in `preferences: {study.preferences}`: {sum(sizes)} rows, {plan.ties} of them "
            "ties (label_0 neither 0 nor 1)."
        )
    return _sampled(plan, study.draws) if study.samples_pairs else plan


def _shuffled(study: StudyConfig, shards: list[Shard]) -> list[int]:
    import torch

    return torch.randperm(len(shards), generator=generator(study.data.seed, "shards")).tolist()


def _enough(study: StudyConfig, shards: list[Shard]) -> tuple[list[int], list[np.ndarray]]:
    """The first files of a random order that hold enough decided rows, in the order of their names; their labels."""
    needed, waiting = max(1, sum(study.draws.values())), _shuffled(study, shards)
    found: list[np.ndarray] = []
    held = np.zeros(1, dtype=np.int64)  # decided rows of the first 0, 1, … files
    while held[-1] < needed and len(found) < len(waiting):
        ask = max(1, math.ceil((needed - held[-1]) * len(found) / max(1, held[-1])))  # as those seen so far promise
        found += all_decided([shards[place] for place in waiting[len(found) : len(found) + ask]])
        held = np.cumsum([0, *(flags.sum() for flags in found)])
    files = min(int(np.searchsorted(held, needed)), len(found))
    return _by_name(dict(zip(waiting[:files], found[:files], strict=True)))


def _by_name(found: dict[int, np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    return sorted(found), [found[place] for place in sorted(found)]


def _sampled(plan: Plan, draws: dict[int, int]) -> Plan:
    """Only those of a plan's rows that some seed draws."""
    keep = np.zeros(plan.pairs, dtype=bool)
    for seed, count in draws.items():
        keep[drawn(seed, count, plan.pairs).numpy()] = True
    parts = np.split(keep, np.cumsum([len(rows) for rows in plan.rows])[:-1])
    rows = [rows[part] for rows, part in zip(plan.rows, parts, strict=True)]
    return replace(plan, rows=rows, positions=np.flatnonzero(keep), order=plan.pairs)
