"""Verdicts on made-up studies whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evidence_fixture import make_study

from invdpo.errors import InvdpoError
from invdpo.evidence import claims
from invdpo.evidence.load import load_evidence

CLAIMS = Path(__file__).resolve().parents[2] / "config" / "claims.yaml"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "threshold", "direction", "seeds", "verdict"),
    [
        (0.1, 0.3, 0.0, "higher", 3, claims.SUPPORTED),
        (-0.1, 0.3, 0.0, "higher", 3, claims.INCONCLUSIVE),
        (-0.3, -0.1, 0.0, "higher", 3, claims.NOT_SUPPORTED),
        (0.0, 0.0, 0.0, "higher", 3, claims.NOT_SUPPORTED),
        (-0.3, -0.1, 0.0, "lower", 3, claims.SUPPORTED),
        (0.0, 0.0, 0.0, "lower", 3, claims.NOT_SUPPORTED),
        (2.1, 3.0, 2.0, "higher", 3, claims.SUPPORTED),
        (0.1, 0.3, 0.0, "higher", 1, claims.INCONCLUSIVE),
    ],
)
def test_decide(low: float, high: float, threshold: float, direction: str, seeds: int, verdict: str) -> None:
    assert claims.decide(low, high, threshold, direction, seeds) == verdict


def test_crossing_interpolates_takes_the_first_and_may_never_happen() -> None:
    curve = np.array([[0.0, 0.0, 0.0], [1.0, 4.0, 1.0], [2.0, 0.0, 1.5], [4.0, 4.0, 1.0]])
    cost = np.array([0.0, 10.0, 20.0, 40.0])
    assert claims.crossing(curve, cost, np.array([3.0, 2.0, 9.0])).tolist() == [30.0, 5.0, np.inf]


def rows(study) -> dict[tuple[str, str], claims.Verdict]:
    found = claims.judge_all(load_evidence(study), claims.load_claims(CLAIMS))
    return {(row.id, row.variant): row for row in found}


def test_verdicts_follow_what_was_put_in() -> None:
    found = rows(make_study(prompts=48))
    verdict = {key: row.verdict for key, row in found.items()}
    assert verdict["pickscore_above_diffusion_dpo", "inversion_dpo_implied"] == claims.SUPPORTED
    assert verdict["pickscore_above_diffusion_dpo", "inversion_dpo_code"] == claims.NOT_SUPPORTED
    assert verdict["dpo_above_base", ""] == claims.SUPPORTED
    assert verdict["dpo_above_its_shuffled_control", ""] == claims.SUPPORTED
    assert verdict["labels_matter", "inversion_dpo_paper"] == claims.NOT_SUPPORTED  # [0, 0]: nothing moved
    assert verdict["labels_matter", "inversion_dpo_implied"] == claims.SUPPORTED
    assert verdict["more_inversion_steps_pickscore", "p_single"] == claims.SUPPORTED
    assert verdict["more_inversion_steps_pickscore", "inversion_dpo_code"] == claims.NOT_RUN
    assert verdict["steady_rise", "inversion_dpo_implied"] == claims.SUPPORTED
    assert verdict["steady_rise", "inversion_dpo_code"] == claims.NOT_SUPPORTED
    assert verdict["zero_gradient_at_the_reference", "inversion_dpo_paper"] == claims.SUPPORTED
    moved = found["released_learning_rate_moves_the_weights", "inversion_dpo_code"]
    assert moved.verdict == claims.NOT_SUPPORTED and moved.value == pytest.approx(1e-5)


def test_speed_depends_on_the_axis() -> None:
    found = rows(make_study(prompts=48))
    by_step = found["twice_as_fast_by_step", "inversion_dpo_implied"]
    by_evals = found["twice_as_fast_by_unet_evals", "inversion_dpo_implied"]
    assert by_step.value is not None and by_evals.value is not None
    assert by_step.value > 2
    assert by_evals.value == pytest.approx(by_step.value / 20)  # 5,000 against 250 evaluations a step
    assert by_evals.verdict == claims.NOT_SUPPORTED
    never = found["twice_as_fast_by_step", "inversion_dpo_code"]
    assert never.value == 0 and never.high == pytest.approx(1) and never.verdict == claims.NOT_SUPPORTED


def test_unequal_batches_are_said_beside_a_speed_by_step() -> None:
    study = make_study(prompts=8)
    for log in (study.root / "runs/inversion_dpo_implied").glob("*/train.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("\n".join(json.dumps(row | {"pairs_seen": 2 * row["step"]}) for row in lines))
    row = rows(study)["twice_as_fast_by_step", "inversion_dpo_implied"]
    assert "sees 2 pairs" in row.reason and row.reason in claims.to_markdown([row])


def test_inconclusive_says_what_would_settle_it() -> None:
    found = rows(make_study(prompts=24))
    row = found["p_above_q_primary", "p_single"]
    assert row.low is not None and row.high is not None and row.low < 0 < row.high
    assert row.verdict == claims.INCONCLUSIVE and "would" not in row.would_settle and row.would_settle
    assert row.p_holm is not None and row.p_value is not None and row.p_holm >= row.p_value


def test_one_seed_decides_nothing_about_a_method() -> None:
    found = rows(make_study(seeds=1))
    row = found["dpo_above_base", ""]
    assert row.verdict == claims.INCONCLUSIVE and "one training seed" in row.reason
    assert found["zero_gradient_at_the_reference", "inversion_dpo_paper"].verdict == claims.SUPPORTED


def test_missing_arms_and_scores_are_not_run() -> None:
    found = rows(make_study(scorers=("clip", "hps"), skip=("diffusion_dpo_shuffled",)))
    assert found["dpo_above_its_shuffled_control", ""].verdict == claims.NOT_RUN
    assert found["pickscore_above_diffusion_dpo", "inversion_dpo_implied"].verdict == claims.NOT_RUN
    assert found["dpo_above_base", ""].test["metric"] == "hps"


def test_files_are_complete_and_stable() -> None:
    study = make_study()
    first = [path.read_bytes() for path in claims.write(study)]
    assert [path.read_bytes() for path in claims.write(study)] == first
    content = json.loads((study.root / "claims.json").read_text())["claims"]
    needed = {"id", "variant", "value", "low", "high", "seeds", "prompts", "artifacts", "command", "verdict"}
    assert all(needed <= set(row) for row in content)
    ids = {claim.id for claim in claims.load_claims(CLAIMS)}
    assert {row["id"] for row in content} == ids
    lines = (study.root / "claims.md").read_text().splitlines()
    assert len(lines) == len(content) + 2
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: [{id: a, locus: x, question: q, test: {kind: difference, arms: [a]}}]", "needs 2 arms"),
        ("claims: [{id: a, locus: x, question: q, tset: {}}]", "tset|test"),
        ("claims: [{id: a, locus: x, question: q, test: {kind: guess}}]", "kind"),
        ("claims: {}", "list"),
        ("claims: [", "YAML"),
        (f"claims: [{{id: a, locus: x, question: q, quote: '{'word ' * 26}', test: {{kind: trend}}}}]", "25 words"),
        ("claims: [&x {id: a, locus: x, question: q, test: {kind: trend}}, *x]", "twice"),
    ],
)
def test_bad_claims_files_are_refused(text: str, message: str) -> None:
    path = Path("claims.yaml")
    path.write_text(text)
    with pytest.raises(InvdpoError, match=message):
        claims.load_claims(path)


def test_a_missing_claims_file_is_named() -> None:
    with pytest.raises(InvdpoError, match=r"nowhere\.yaml"):
        claims.load_claims(Path("nowhere.yaml"))
