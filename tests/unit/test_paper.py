"""The paper's numbers: complete, in its digits, and beside the arms that are what it trained."""

from __future__ import annotations

import re

import pytest
from evidence_fixture import make_config

from invdpo.config import StudyConfig
from invdpo.evidence import paper
from invdpo.evidence.load import published

GRADES = {"read in the paper", "very likely", "likely", "not stated"}
# table -> decimals of its numbers, by metric
DIGITS = {"pickscore": 3, "clip": 3, "aesthetic": 2, "fid": 1, "human_preference": 4}


def study(**changes: object) -> StudyConfig:
    return StudyConfig.model_validate(make_config().model_dump(mode="json") | changes)


def test_every_number_says_where_it_is_from_and_how_it_was_taken() -> None:
    entries = published()
    told = ("value", "scale", "prompt_set", "aggregation", "n", "source", "confidence", "settings_source")
    for entry in entries:
        assert all(entry[name] for name in told), entry
        assert entry["confidence"] in GRADES and entry["settings_confidence"] in GRADES
        unknown = {entry["prompt_set"], entry["aggregation"], entry["n"]} == {"not stated"}
        assert unknown == (entry["settings_confidence"] == "not stated"), entry
    keys = [(e["table"], e["method"], e["base"], e["inversion_steps"], e["metric"]) for e in entries]
    assert len(keys) == len(set(keys)) == 85


def test_numbers_keep_the_digits_that_the_paper_prints() -> None:
    for entry in published():
        digits = 4 if entry["table"] == "fig3" else DIGITS.get(entry["metric"], 3)
        assert re.fullmatch(rf"\d+\.\d{{{digits}}}", entry["value"]), entry
    fid = {row.method: row.values["fid"] for row in paper.rows("2")}
    assert fid["R3CD"] == "27.0" and paper.rows("2")[4].values["entity_iou"] == "0.830"
    assert paper.minus({"a": "0.212", "b": "6.11"}, {"a": "0.212", "b": "6.05", "c": "1"}) == {
        "a": "0.000",
        "b": "0.06",
    }


def test_tables_of_the_paper_agree_where_they_repeat_a_row() -> None:
    """Table 1's Inversion-DPO is Table 3's at 80 steps; the shares of Table S4 add up to one."""
    rows = {(row.method, row.base): row.values for row in paper.rows("1")}
    assert rows["Inversion-DPO", "sdxl"] == paper.rows("3")[-1].values and paper.rows("3")[-1].steps == "80"
    ours = [float(row.values["human_preference"]) for row in paper.rows("s4")]
    assert ours[0] + ours[1] == pytest.approx(1) and ours[2] + ours[3] == pytest.approx(1)


def test_an_arm_stands_beside_the_row_that_it_is() -> None:
    config = study()
    beside = {arm: paper.beside(config, arm, "1") for arm in config.arms}
    assert beside["diffusion_dpo"]["paper_clip_sdxl"] == "0.340" and beside["base"]["paper_aesthetic_sd15"] == "5.61"
    assert beside["diffusion_dpo_shuffled"] == beside["sft"] == beside["inversion_dpo_implied"] == {}
    left = paper.unfilled(config, "1", config.arms)
    assert [(row.method, row.absent) for row in left] == [
        (method, "not run: no weights") for method in ("DDPO", "D3PO", "Demon", "IterComp")
    ]
    missing = paper.unfilled(config, "1", ["base", "diffusion_dpo"])
    assert [(row.base, row.absent) for row in missing if row.method == "Inversion-DPO"] == [
        ("sdxl", "not run: no arm"),
        ("sd15", "not run: no arm"),
    ]


def test_of_a_study_with_several_bases_an_arm_stands_for_its_own() -> None:
    weights = {"method": "no_training", "weights": "some/weights", "published": "Inversion-DPO"}
    arms = {"base": {"method": "no_training"}, "ours": weights, "other": {"method": "no_training", "base": "sd15"}}
    config = study(arms=arms, bases={"sd15": {"model": "small"}}, experiments={}, claims=None)
    beside = {arm: paper.beside(config, arm, "1") for arm in arms}
    assert beside["base"] | beside["ours"] == {
        "paper_pickscore_sdxl": "0.232",
        "paper_clip_sdxl": "0.341",
        "paper_aesthetic_sdxl": "6.24",
    }
    assert set(beside["other"]) == {"paper_pickscore_sd15", "paper_clip_sd15", "paper_aesthetic_sd15"}
    missing = {(row.method, row.base) for row in paper.unfilled(config, "1", arms)}
    assert ("Inversion-DPO", "sd15") in missing and ("Inversion-DPO", "sdxl") not in missing
