"""Which rows a study needs: enough, no more than its runs draw, and known from the labels alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_stub import Hub

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.preferences.order import drawn, pair_order
from invdpo.preferences.plan import Plan, make_plan
from invdpo.preferences.shards import decided

MakeStudy = Callable[..., StudyConfig]
DECIDED = 177  # rows of every shard that are no ties


@pytest.fixture
def plan(tiny_study: MakeStudy, many_shards: Path) -> Callable[..., Plan]:
    """The plan of a study of 100 steps of 3 pairs and two seeds: 600 pairs."""

    def make(shards: int | str | None = "auto", **changes: Any) -> Plan:
        settings: dict[str, Any] = {"preferences": str(many_shards), "training": {"steps": 100, "batch": 3}}
        return make_plan(tiny_study(**(settings | {"data": {"shards": shards, **changes.pop("data", {})}} | changes)))

    return make


def numbers(plan: Plan) -> list[int]:
    """The shards' places in the data set."""
    return [int(shard.name.split("train-")[1][:5]) for shard in plan.shards]


def test_local_files_are_taken_whole(plan: Callable[..., Plan]) -> None:
    for shards in (None, "all"):
        found = plan(shards)
        assert numbers(found) == list(range(60)) and found.sizes == [200] * 60
        assert found.pairs == 60 * DECIDED and found.ties == 60 * 23
        assert found.positions is None and found.order is None and found.digest == ""


def test_auto_takes_as_few_files_as_hold_enough_and_only_what_is_drawn(plan: Callable[..., Plan]) -> None:
    found = plan()
    assert len(found.shards) == 4 and found.order == 4 * DECIDED  # 3 * 177 < 600
    assert found.positions is not None and found.pairs == len(found.positions)
    wanted = {pair for seed in (0, 1) for step in range(1, 101) for pair in pair_order(seed, step, 3, 4 * DECIDED)}
    assert found.positions.tolist() == sorted(wanted) and 300 < len(wanted) < 600
    every = [(place, row) for place, shard in enumerate(found.shards) for row in np.flatnonzero(decided(shard))]
    planned = [(place, row) for place, rows in enumerate(found.rows) for row in rows]
    assert planned == [every[position] for position in found.positions]


def test_which_files_depends_on_the_seed_alone_and_more_pairs_only_add_files(plan: Callable[..., Plan]) -> None:
    first = plan()
    assert numbers(plan()) == numbers(first) != numbers(plan(data={"seed": 1}))
    assert numbers(first) == sorted(numbers(first)) != list(range(4))
    more = plan(training={"steps": 400, "batch": 3})
    assert len(more.shards) == 14 and set(numbers(first)) < set(numbers(more))
    chosen = [number for seed in range(40) for number in numbers(plan(1, data={"seed": seed}))]
    assert len(set(chosen)) > 20  # of 40 draws from 60 files


def test_a_number_of_files_is_kept_to_and_the_pairs_lie_in_all_of_them(plan: Callable[..., Plan]) -> None:
    found = plan(30)
    assert len(found.shards) == 30 and found.order == 30 * DECIDED
    assert 550 < found.pairs <= 600 and min(map(len, found.rows)) > 5
    with pytest.raises(InvdpoError, match="`data.shards: 61`: .* has 60 files"):
        plan(61)


def test_a_study_that_draws_everything_takes_everything(plan: Callable[..., Plan]) -> None:
    found = plan(training={"steps": 20_000, "batch": 3})
    assert len(found.shards) == 60 and found.positions is not None
    assert found.positions.tolist() == list(range(60 * DECIDED))


def test_every_arm_and_the_tuning_grid_count(tiny_study: MakeStudy) -> None:
    study = tiny_study(
        training={"steps": 10, "batch": 4},
        arms={"long": {"method": "sft", "training": {"batch": 32}}},
        tuning={"arms": ["dpo"], "learning_rate": [1e-4], "beta": [1.0], "seeds": [7], "prompts": "other.txt"},
    )
    assert study.draws == {0: 320, 1: 320, 7: 40}
    assert not study.samples_pairs and tiny_study(preferences="someone/pairs").samples_pairs
    untrained = tiny_study(arms={"dpo": {"method": "no_training"}}, preferences="someone/pairs")
    with pytest.raises(InvdpoError, match="No arm of study `tiny` trains"):
        make_plan(untrained)


def test_only_ties_are_no_pairs(tiny_study: MakeStudy, tmp_path: Path, many_shards: Path) -> None:
    table = pq.read_table(next(many_shards.rglob("train-00003-*")))
    pq.write_table(table.filter(np.array(table.column("label_0")) == 0.5), tmp_path / "ties.parquet")
    with pytest.raises(InvdpoError, match="No usable pair is left.*23 rows, 23 of them ties"):
        make_plan(tiny_study(preferences=str(tmp_path / "ties.parquet"), data={"shards": "auto"}))


def test_the_hub_is_asked_for_the_labels_of_chosen_shards_only(
    tiny_study: MakeStudy, hub: Hub, many_shards: Path
) -> None:
    files = sorted((many_shards / "data").iterdir())
    hub.repos["someone/pairs"] = {f"data/{file.name}": file.read_bytes() for file in files}
    training = {"steps": 100, "batch": 3}
    found = make_plan(tiny_study(preferences="someone/pairs", training=training))
    local = make_plan(tiny_study(preferences=str(many_shards), training=training, data={"shards": "auto"}))
    assert numbers(found) == numbers(local) and found.digest == local.digest
    touched = {name.split("/", 1)[1] for name in hub.sent()}
    assert touched == {shard.name.removeprefix("someone/pairs/") for shard in found.shards}


def test_a_shard_that_is_not_whole_is_named_before_anything_is_encoded(
    tiny_study: MakeStudy, tmp_path: Path, many_shards: Path
) -> None:
    for number in range(3):
        shutil.copy(next(many_shards.rglob(f"train-0000{number}-*")), tmp_path / f"train-{number}.parquet")
    content = (tmp_path / "train-1.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvdpoError, match="train-1.parquet cannot be read as parquet: it is cut off after"):
        make_plan(tiny_study(preferences=str(tmp_path)))


def test_drawn_names_the_first_entries_of_the_order() -> None:
    for count in (1, 40, 99, 100, 250):
        assert drawn(5, count, 100).tolist() == sorted(set(pair_order(5, 1, count, 100)))
