"""docs/deviations.md is what config/deviations.yaml says, and what it names exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdpo.config import load_study
from invdpo.errors import InvdpoError
from invdpo.evidence.deviations import SOURCE, deviations_by_claim, deviations_page, load_deviations
from invdpo.evidence.ledger import load_claims

ENTRY = """deviations:
  - {id: a, title: A, paper: {says: p, where: s1}, code: {says: c, where: l1}, study: {says: s, where: f},
     why: w, expected: e, measured: {nothing: cheap}}
"""


def test_the_committed_page_is_up_to_date() -> None:
    assert Path("docs/deviations.md").read_text() == deviations_page(), "run `invdpo deviations`"


def test_arms_that_it_names_exist() -> None:
    studies = ("shapes", "shapes_methods", "shapes_rewards")
    arms = {f"{study}:{arm}" for study in studies for arm in load_study(f"config/{study}.yaml").arms}
    for one in load_deviations().deviations:
        assert set(one.measured.arms) <= arms, one.id


def test_every_claim_is_in_one_group() -> None:
    grouped = [claim for group in load_deviations().groups.values() for claim in group.claims]
    assert sorted(grouped) == sorted(claim.id for claim in load_claims(Path("config/claims.yaml")))


def test_deviations_of_a_claim() -> None:
    found = deviations_by_claim()
    assert list(found) == [claim.id for claim in load_claims(Path("config/claims.yaml"))]
    assert found["rounding_gives_a_gradient"] == ["half_precision_reference", "base_model", "data"]
    assert "axis_of_speed" in found["twice_as_fast_by_time"] and "axis_of_speed" not in found["steady_rise"]
    assert "fid" in found["fid_below_base"], "a claim that measures a deviation is one that it applies to"
    assert all("base_model" in names for names in found.values())


def test_a_claim_says_what_its_quantity_needs() -> None:
    """Deviations that follow from a claim's own test, whatever the lists say."""
    found, readings = deviations_by_claim(), {"inversion_dpo_paper", "inversion_dpo_code"}
    for claim in load_claims(Path("config/claims.yaml")):
        names, test = set(found[claim.id]), claim.test
        assert ("axis_of_speed" in names) == (test.kind == "speed"), claim.id
        assert ("user_study_votes" in names) == (test.kind == "votes"), claim.id
        assert ("inversion_steps" in names) or not test.kind == "trend", claim.id
        assert ("scene_graphs" in names) == (claim.locus == "Table 2" or "_iou" in test.metric), claim.id
        if test.kind in ("difference", "speed", "rise", "dip", "trend", "votes"):
            assert {"learning_rate", "tuning", "seeds", "training_length", "data", "batch"} <= names, claim.id
            assert ("clip_model" in names) == (test.metric in ("pickscore", "clip", "aesthetic")), claim.id
            assert ("sign" in names) >= bool(readings & {*claim.variants, *test.arms}), claim.id


def test_it_covers_what_a_reader_asks_for() -> None:
    wanted = """sign two_terms half_precision_reference learning_rate guidance_in_inversion label_shift timestep_weights
    mean_or_sum half batch flips inversion_steps base_model data evaluation_prompts clip_model fid table_s5_rows
    user_study_votes tuning seeds optimizer"""
    assert set(wanted.split()) <= {one.id for one in load_deviations().deviations}


def test_numbers_in_it_are_the_studys() -> None:
    study, entries = load_study("config/shapes.yaml"), {one.id: one for one in load_deviations().deviations}
    batches = {
        arm: study.arm(arm).training.batch for arm in ("diffusion_dpo", "inversion_dpo_paper", "q_single", "p_single")
    }
    assert list(batches.values()) == [96, 4, 32, 32] and "96 pairs for one random" in entries["batch"].study.says
    assert f"{study.sampling.prompts} held-out prompts" in entries["evaluation_prompts"].study.says
    assert f"DDIM with {study.sampling.steps} steps at guidance {study.sampling.guidance_scale:g}" in (
        entries["evaluation_prompts"].study.says
    )
    assert entries["training_length"].study.says.startswith(f"{study.training.steps} steps")
    assert study.training.optimizer == "adamw" and study.training.caption_dropout == 0 and len(study.seeds) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("why: w, ", ""), "why.*required"),
        (("measured: {nothing: cheap}", "measured: {}"), "not both"),
        (("measured: {nothing: cheap}", "measured: {nothing: cheap, arms: [x]}"), "not both"),
        (("measured: {nothing: cheap}", "measured: {nothing: cheap, leaves_open: x}"), "here nothing does"),
        (("measured: {nothing: cheap}", "measured: {claims: [x]}"), "`a` names `x`, which is no claim"),
        (("cheap}}", "cheap}, applies: [x]}"), "`a` names `x`, which is no claim of .*config/claims.yaml and no group"),
        (("deviations:", "groups: {b: {title: B, claims: [x]}}\ndeviations:"), "group `b` holds `x`"),
        (("deviations:", "groups: {steady_rise: {title: B, claims: []}}\ndeviations:"), "has the id of a claim"),
        (("title: A", "title: A, heading: B"), "heading"),
        ((ENTRY, ENTRY + ENTRY.removeprefix("deviations:\n")), "`a` is used twice"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "deviations.yaml"
    path.write_text(ENTRY.replace(*change))
    with pytest.raises(InvdpoError, match=words):
        load_deviations(path)
    assert SOURCE.is_file()
