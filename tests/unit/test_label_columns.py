"""Labels of a column of the pairs' file in place of label_0's: what is exchanged, not drawn and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pairs_frame

from invdpo.check import check
from invdpo.config import StudyConfig, load_study, parse_study
from invdpo.errors import InvdpoError
from invdpo.experiments.stage import unseen_pairs
from invdpo.preferences import cache as caching
from invdpo.preferences.cache import load_cache, prepare
from invdpo.preferences.labels import drawn_pairs, flips
from invdpo.preferences.order import pair_order
from invdpo.training import loop

CPU = torch.device("cpu")
FOLDER = Path("results/tiny/preferences")
MakeStudy = Callable[..., StudyConfig]
# of the ten pairs that label_0 decides: 1 as label_0, 0 the other image, 0.5 neither
SAYS = [1, 0, 0.5, 0, 1, 1, 0.5, 0, 1, 0]


def column(frame: pd.DataFrame, says: list[float]) -> list[float]:
    """A column that agrees with label_0 as `says`, and decides what label_0 does not."""
    decided = frame["label_0"] != 0.5
    told = np.ones(len(frame))
    told[decided] = [
        value if label == 1 else 1 - value for label, value in zip(frame["label_0"][decided], says, strict=True)
    ]
    return told.tolist()


@pytest.fixture
def columns(tmp_path: Path) -> str:
    """Two files of pairs with label columns: `other` as SAYS, `reversed` always the other image, `none` only ties."""
    frame = tiny_pairs_frame()
    frame["label_0_other"] = column(frame, SAYS)
    frame["label_0_reversed"] = column(frame, [0.0] * 10)
    frame["label_0_none"] = 0.5
    (tmp_path / "columns").mkdir()
    frame.iloc[:5].to_parquet(tmp_path / "columns" / "a.parquet")
    frame.iloc[5:].to_parquet(tmp_path / "columns" / "b.parquet")
    return str(tmp_path / "columns")


def arms(**labels: str) -> dict[str, Any]:
    return {name: {"method": "diffusion_dpo", "labels": told} for name, told in labels.items()}


def weights(arm: str) -> bytes:
    return (Path("results/tiny/runs") / arm / "seed0" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_flips_and_draws_follow_the_column() -> None:
    said = {"label_0_x": torch.tensor([1, 0, 0.5, 0])}
    assert flips("label_0_x", 4, 0, said).tolist() == [False, True, False, True]
    assert drawn_pairs("label_0_x", 4, said).tolist() == [0, 1, 3]
    assert drawn_pairs("shuffled", 4, said).tolist() == [0, 1, 2, 3]


def test_the_cache_holds_what_a_column_says_of_each_pair(tiny_study: MakeStudy, columns: str) -> None:
    study = tiny_study(preferences=columns, arms=arms(other="label_0_other", reversed="label_0_reversed"))
    assert study.label_columns == ["label_0_other", "label_0_reversed"]
    prepare(study, CPU)
    cache = load_cache(FOLDER, CPU, columns=study.label_columns)
    assert cache.labels["label_0_other"].tolist() == SAYS and cache.labels["label_0_reversed"].tolist() == [0.0] * 10
    assert load_cache(FOLDER, CPU).labels == {}
    with pytest.raises(InvdpoError, match="holds no labels of `label_0_absent`.*invdpo prepare"):
        load_cache(FOLDER, CPU, columns=["label_0_absent"])


def test_undecodable_pairs_leave_the_others_their_labels(tiny_study: MakeStudy, columns: str) -> None:
    frame = pd.read_parquet(Path(columns) / "a.parquet")
    jpegs = list(frame["jpg_1"])
    jpegs[1] = b"no image"
    frame["jpg_1"] = jpegs
    frame.to_parquet(Path(columns) / "a.parquet")
    study = tiny_study(preferences=columns, arms=arms(other="label_0_other"), training={"max_undecodable": 0.1})
    prepare(study, CPU)
    assert load_cache(FOLDER, CPU, columns=["label_0_other"]).labels["label_0_other"].tolist() == [SAYS[0], *SAYS[2:]]


def test_an_arm_that_comes_later_encodes_nothing_and_keeps_the_key(
    tiny_study: MakeStudy, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = prepare(tiny_study(preferences=columns), CPU)
    assert "label_0_other" not in pd.read_parquet(FOLDER / "pairs.parquet")
    monkeypatch.setattr(caching, "_encode_pairs", None)
    again = prepare(tiny_study(preferences=columns, arms=arms(other="label_0_other")), CPU)
    assert again == report
    cache = load_cache(FOLDER, CPU, columns=["label_0_other"])
    assert cache.key == report["key"] and cache.labels["label_0_other"].tolist() == SAYS
    content = {key: report["content"][key] for key in ("files", "encoders", "resolution", "max_undecodable")}
    assert report["key"] == caching._digest(content), "nothing else is in the key of a plain cache"


def test_a_column_that_is_label_0_reversed_trains_the_swapped_controls_weights(
    tiny_study: MakeStudy, columns: str
) -> None:
    told = {"reversed": "label_0_reversed", "swapped": "swapped", "true": "true"}
    study = tiny_study(preferences=columns, arms=arms(**told))
    prepare(study, CPU)
    for arm in told:
        loop.train(study, arm, [0], CPU)
    assert weights("reversed") == weights("swapped") != weights("true")
    run = json.loads(Path("results/tiny/runs/reversed/seed0/run.json").read_text())
    assert run["labels"] == "label_0_reversed" and run["pairs"] == 10


def test_a_tie_is_never_drawn_and_all_others_are(
    tiny_study: MakeStudy, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(preferences=columns, arms=arms(other="label_0_other"), training={"steps": 4, "batch": 4})
    prepare(study, CPU)
    drawn: list[int] = []
    real = loop.draw

    def listening(cache: Any, flipped: Any, pairs: list[int], *rest: Any) -> Any:
        drawn.extend(pairs)
        assert flipped.tolist() == [value == 0 for value in SAYS]
        return real(cache, flipped, pairs, *rest)

    monkeypatch.setattr(loop, "draw", listening)
    loop.train(study, "other", [0], CPU)
    decided = [place for place, value in enumerate(SAYS) if value != 0.5]
    assert drawn == [decided[place] for step in range(1, 5) for place in pair_order(0, step, 4, 8)]
    assert sorted(drawn[:8]) == sorted(drawn[8:]) == decided
    run = json.loads(Path("results/tiny/runs/other/seed0/run.json").read_text())
    assert run["pairs"] == 8


def test_pairs_that_a_column_ties_are_seen_by_no_arm_of_it(tiny_study: MakeStudy) -> None:
    study = tiny_study(arms=arms(other="label_0_other"), training={"steps": 8, "batch": 4})
    said = {"label_0_other": torch.tensor(SAYS)}
    assert unseen_pairs(study, ["other"], 10, said) == [2, 6] and unseen_pairs(study, ["dpo"], 10) == []


def test_a_missing_column_is_named_by_check_and_prepare(tiny_study: MakeStudy, columns: str) -> None:
    study = tiny_study(preferences=columns, arms=arms(other="label_0_othr"))
    words = r"a\.parquet has no column `label_0_othr`.*Did you mean `label_0_other`\? `invdpo rank` writes one"
    with pytest.raises(InvdpoError, match=words):
        prepare(study, CPU)
    (problem,) = check(study).problems
    assert "has no column `label_0_othr`" in problem
    plain = tiny_study(arms=arms(other="label_0_other"))
    assert "It has none beside label_0." in check(plain).problems[0]


def test_a_column_that_decides_nothing_is_refused(tiny_study: MakeStudy, columns: str) -> None:
    with pytest.raises(InvdpoError, match="`label_0_none` decides none of the 10 pairs"):
        prepare(tiny_study(preferences=columns, arms=arms(other="label_0_none")), CPU)
    assert not (FOLDER / "report.json").exists()


def test_labels_are_named_where_they_are_wrong(tiny_study: MakeStudy, columns: str) -> None:
    for wrong in ("shufled", "label_0", "label_0_"):
        with pytest.raises(InvdpoError, match=r"`arms\.x\.labels`.*pattern"):
            tiny_study(arms=arms(x=wrong))
    words = r"`arms\.x\.labels: label_0_other` needs every pair encoded.*Set `data\.shards: all`"
    for sampled in ({"data": {"shards": 1}, "preferences": columns}, {"preferences": "owner/pairs"}):
        with pytest.raises(InvdpoError, match=words):
            tiny_study(arms=arms(x="label_0_other"), **sampled)
    assert tiny_study(arms=arms(x="label_0_other"), preferences="owner/pairs", data={"shards": "all"}).label_columns


OWN = {"prompts": "train.txt", "seed": 7, "by": ["a"]}


def test_own_samples_need_a_place_and_prompts_of_their_own(tiny_study: MakeStudy, tiny_prompts: Path) -> None:
    with pytest.raises(
        InvdpoError, match=r"set `preferences` to a path that ends in \.parquet \(found 'owner/pairs'\)"
    ):
        tiny_study(preferences="owner/pairs", own_samples=OWN)
    with pytest.raises(InvdpoError, match="`own_samples.prompts` is the file of `prompts`. Train on other prompts"):
        tiny_study(preferences="made.parquet", own_samples=OWN | {"prompts": str(tiny_prompts)})
    study = tiny_study(preferences="made.parquet", own_samples=OWN, arms=arms(x="label_0_a"))
    assert not study.samples_pairs, "a file that is still to be made is no data set of the hub"
    found = check(study)
    assert found.problems == ["prompts: there is no file train.txt; set `prompts:` to a file of prompts"]
    assert "preferences still to be made of 4 samples for each prompt of train.txt, 4 prompts" in found.lines[0]


def test_how_samples_are_made_is_part_of_an_arms_hash(tiny_study: MakeStudy) -> None:
    def arm_hash(**changes: Any) -> str:
        sampling = {"steps": 2, "guidance_scale": changes.pop("guidance", 3.0), "batch": 2}
        return tiny_study(preferences="made.parquet", own_samples=OWN | changes, sampling=sampling).arm("dpo").hash

    assert len({arm_hash(), arm_hash(seed=8), arm_hash(by=["a", "b"]), arm_hash(guidance=4.0)}) == 4
    assert arm_hash(guidance_scale=2.0) == arm_hash(guidance_scale=2.0, guidance=4.0)
    assert arm_hash() != tiny_study(preferences="made.parquet").arm("dpo").hash


@pytest.mark.parametrize("name", ["shapes", "shapes_methods"])
def test_published_arms_keep_their_hashes(name: str) -> None:
    folder = Path(f"results/reference/{name}")
    study = load_study(folder / "study.json")
    made = {arm: json.loads((folder / f"runs/{arm}/seed0/run.json").read_text())["config_hash"] for arm in study.arms}
    assert made == {arm: study.arm(arm).hash for arm in study.arms}
    now = load_study(f"config/{name}.yaml")
    assert made == {arm: now.arm(arm).hash for arm in now.arms}


def test_a_column_is_part_of_an_arms_hash() -> None:
    base = {"base": "b", "preferences": "p", "prompts": "q", "scorers": {}, "seeds": [0], "sampling": {}}
    study = parse_study(
        base | {"study": "x", "data": {"shards": "all"}, "arms": arms(a="true", b="label_0_x", c="label_0_y")}, "x"
    )
    assert len({study.arm(name).hash for name in "abc"}) == 3
