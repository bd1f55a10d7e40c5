"""docs/deviations.md is what config/deviations.yaml says, and what it names exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdpo.config import load_study
from invdpo.errors import InvdpoError
from invdpo.evidence.deviations import SOURCE, deviations_page, load_deviations
from invdpo.evidence.ledger import load_claims
from invdpo.objectives.recipe import known_methods

ENTRY = """deviations:
  - {id: a, title: A, paper: {says: p, where: s1}, code: {says: c, where: l1}, study: {says: s, where: f},
     why: w, expected: e, measured: {nothing: cheap}}
"""


def test_the_committed_page_is_up_to_date() -> None:
    assert Path("docs/deviations.md").read_text() == deviations_page(), "run `invdpo deviations`"


def test_arms_claims_and_recipes_that_it_names_exist() -> None:
    arms = {
        f"{study}:{arm}" for study in ("shapes", "shapes_methods") for arm in load_study(f"config/{study}.yaml").arms
    }
    claims = {claim.id for claim in load_claims(Path("config/claims.yaml"))}
    for one in load_deviations():
        assert set(one.measured.arms) <= arms, one.id
        assert set(one.measured.claims) <= claims, one.id
        assert set(one.measured.recipes) <= set(known_methods()), one.id


def test_it_covers_what_a_reader_asks_for() -> None:
    wanted = """sign two_terms half_precision_reference learning_rate guidance_in_inversion label_shift timestep_weights
    mean_or_sum half batch flips inversion_steps base_model data evaluation_prompts clip_model fid table_s5_rows
    user_study_votes tuning seeds optimizer"""
    assert set(wanted.split()) <= {one.id for one in load_deviations()}


def test_numbers_in_it_are_the_studys() -> None:
    study, entries = load_study("config/shapes.yaml"), {one.id: one for one in load_deviations()}
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
