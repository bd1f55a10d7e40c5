"""Verdicts on made-up studies whose answers are known."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evidence_fixture import make_config, make_study, write_scores
from scipy.stats import spearmanr

from invdpo.config import StudyConfig, load_study
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, ledger, votes
from invdpo.evidence.load import Evidence, load_evidence
from invdpo.experiments.precision import agreement

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ROOT / "config" / "claims.yaml"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "threshold", "direction", "seeds", "verdict"),
    [
        (0.1, 0.3, 0.0, "higher", 3, ledger.SUPPORTED),
        (-0.1, 0.3, 0.0, "higher", 3, ledger.INCONCLUSIVE),
        (-0.3, -0.1, 0.0, "higher", 3, ledger.NOT_SUPPORTED),
        (0.0, 0.0, 0.0, "higher", 3, ledger.NOT_SUPPORTED),
        (-0.3, -0.1, 0.0, "lower", 3, ledger.SUPPORTED),
        (0.0, 0.0, 0.0, "lower", 3, ledger.NOT_SUPPORTED),
        (2.1, 3.0, 2.0, "higher", 3, ledger.SUPPORTED),
        (0.1, 0.3, 0.0, "higher", 1, ledger.INCONCLUSIVE),
        (0.1, 0.3, 0.0, "higher", None, ledger.SUPPORTED),
    ],
)
def test_decide(low: float, high: float, threshold: float, direction: str, seeds: int | None, verdict: str) -> None:
    assert ledger.decide(low, high, threshold, direction, seeds) == verdict


def rows(study) -> dict[tuple[str, str], ledger.Verdict]:
    found = claims.judge_all(load_evidence(study), ledger.load_claims(CLAIMS))
    return {(row.id, row.variant): row for row in found}


def test_verdicts_follow_what_was_put_in() -> None:
    found = rows(make_study(prompts=48))
    verdict = {key: row.verdict for key, row in found.items()}
    assert verdict["pickscore_above_diffusion_dpo", "inversion_dpo_implied"] == ledger.SUPPORTED
    assert verdict["pickscore_above_diffusion_dpo", "inversion_dpo_code"] == ledger.NOT_SUPPORTED
    assert verdict["dpo_above_base", ""] == ledger.SUPPORTED
    assert verdict["dpo_above_its_shuffled_control", ""] == ledger.SUPPORTED
    assert verdict["labels_matter", "inversion_dpo_paper"] == ledger.NOT_SUPPORTED  # [0, 0]: nothing moved
    assert verdict["labels_matter", "inversion_dpo_implied"] == ledger.SUPPORTED
    assert verdict["more_inversion_steps_pickscore", "p_single"] == ledger.SUPPORTED
    assert verdict["more_inversion_steps_pickscore", "inversion_dpo_code"] == ledger.NOT_RUN
    assert verdict["steady_rise", "inversion_dpo_implied"] == ledger.SUPPORTED
    assert verdict["steady_rise", "inversion_dpo_code"] == ledger.NOT_SUPPORTED
    assert verdict["zero_gradient_at_the_reference", "inversion_dpo_paper"] == ledger.SUPPORTED
    moved = found["released_learning_rate_moves_the_weights", "inversion_dpo_code"]
    assert moved.verdict == ledger.NOT_SUPPORTED and moved.value == pytest.approx(1e-5)


def test_speed_depends_on_the_axis() -> None:
    found = rows(make_study(prompts=48))
    by_step = found["twice_as_fast_by_step", "inversion_dpo_implied"]
    by_evals = found["twice_as_fast_by_unet_evals", "inversion_dpo_implied"]
    assert by_step.value is not None and by_evals.value is not None
    assert by_step.value > 2
    assert by_evals.value == pytest.approx(by_step.value / 20)  # 5,000 against 250 evaluations a step
    assert by_evals.verdict == ledger.NOT_SUPPORTED
    by_time = found["twice_as_fast_by_time", "inversion_dpo_implied"]
    assert by_time.value == pytest.approx(by_step.value * 1.25 / 6)  # the fixture's seconds a step
    most = found["four_times_as_fast_by_step", "p_single"]
    assert most.test["arms"] == ["p_single_n40", "diffusion_dpo"] and most.value is not None
    assert "p_single with the most" not in most.reason
    without = found["four_times_as_fast_by_step", "inversion_dpo_code"]
    assert without.verdict == ledger.NOT_RUN and "inversion_dpo_code with the most inversion steps" in without.reason
    never = found["twice_as_fast_by_step", "inversion_dpo_code"]
    assert never.value == 0 and never.high == pytest.approx(1) and never.verdict == ledger.NOT_SUPPORTED


def test_unequal_batches_are_said_beside_a_speed_by_step() -> None:
    study = make_study(prompts=8)
    for log in (study.root / "runs/inversion_dpo_implied").glob("*/train.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("\n".join(json.dumps(row | {"pairs_seen": 2 * row["step"]}) for row in lines))
    row = rows(study)["twice_as_fast_by_step", "inversion_dpo_implied"]
    assert "sees 2 pairs" in row.reason and row.reason in claims.to_markdown([row])


def test_a_dip_is_the_first_checkpoint_below_the_base() -> None:
    study = make_study(prompts=48)
    assert rows(study)["early_dip_of_diffusion_dpo", "diffusion_dpo"].verdict == ledger.NOT_SUPPORTED
    for path in (study.root / "scores/diffusion_dpo").glob("*.parquet"):
        frame = pd.read_parquet(path)
        frame.loc[frame["step"] == 10, "score"] -= 0.05
        write_scores(path, frame)
    row = rows(study)["early_dip_of_diffusion_dpo", "diffusion_dpo"]
    assert row.verdict == ledger.SUPPORTED and row.value is not None and row.high is not None and row.high < 0
    assert "first checkpoint minus base: Diffusion-DPO" in claims.to_markdown([row])
    evidence = load_evidence(study)
    curve = evidence.from_base("diffusion_dpo", "pickscore")
    assert curve is not None and row.value == pytest.approx((curve[1] - curve[0]).mean())


def test_cost_and_steadiness_are_ratios_of_the_logs_seed_by_seed() -> None:
    study = make_study(prompts=8)
    for log in (study.root / "runs/inversion_dpo_implied").glob("*/train.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        seed = int(log.parent.name.removeprefix("seed"))
        spread = [row | {"grad_norm": 2.0 + (-1) ** row["step"] * (1 + seed) / 4} for row in lines]
        log.write_text("\n".join(json.dumps(row | {"pairs_seen": row["step"]}) for row in spread))
    for log in (study.root / "runs/diffusion_dpo").glob("*/train.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("\n".join(json.dumps(row | {"grad_norm": 4.0 + (-1) ** row["step"]}) for row in lines))
    found = rows(study)
    cost = found["double_inference_costs_more", "inversion_dpo_implied"]
    assert cost.value == cost.low == cost.high == pytest.approx(5000 / (250 / 8)) and cost.verdict == ledger.SUPPORTED
    steady = found["steadier_training", "inversion_dpo_implied"]
    # relative spreads 1/8, 2/8 and 3/8 of the three seeds, against 1/4
    assert (steady.low, steady.value, steady.high) == pytest.approx((0.5, 1.0, 1.5))
    assert steady.verdict == ledger.INCONCLUSIVE and steady.seeds_agreeing == 2
    still = found["steadier_training", "inversion_dpo_paper"]
    assert still.verdict == ledger.NOT_RUN and "never had a gradient" in still.reason


def fid_row(arm: str, seed: int, value: float) -> dict[str, Any]:
    return {"method": arm, "seed": seed, "fid_standard": value, "fid_laionsg_compat": value, "images": 24}


def test_fid_is_judged_seed_by_seed() -> None:
    study = make_study(study=measured(distribution=DISTRIBUTION).study)
    fid = {("base", 0): 9.0, ("inversion_dpo_implied", 0): 8.0, ("inversion_dpo_implied", 1): 8.5}
    fid |= {("inversion_dpo_implied", 2): 7.0, ("inversion_dpo_code", 0): 8.0, ("inversion_dpo_code", 1): 9.5}
    fid |= {("inversion_dpo_code", 2): 8.0}
    table = [
        {"method": arm, "seed": seed, "fid_standard": value, "fid_laionsg_compat": value, "images": 24}
        for (arm, seed), value in fid.items()
    ]
    with pytest.raises(InvdpoError, match="distribution.csv is missing. Run `invdpo distribution --study"):
        rows(study)
    pd.DataFrame(table).to_csv(study.root / "distribution.csv", index=False)
    found = rows(study)
    row = found["fid_below_base", "inversion_dpo_implied"]
    assert row.value == pytest.approx(-7 / 6) and "| 3 x 24 pictures |" in claims.to_markdown([row])
    # Student's interval of -1, -0.5 and -2 with two degrees of freedom
    assert (row.low, row.high) == pytest.approx((-7 / 6 - 1.8974, -7 / 6 + 1.8974), abs=1e-3)
    assert row.verdict == ledger.INCONCLUSIVE and row.seeds_agreeing == 3 and row.would_settle == "6 seeds"
    fid |= {("inversion_dpo_implied", seed): 8.0 + seed / 100 for seed in range(3)}
    table = [
        {"method": arm, "seed": seed, "fid_standard": value, "fid_laionsg_compat": value, "images": 24}
        for (arm, seed), value in fid.items()
    ]
    pd.DataFrame(table).to_csv(study.root / "distribution.csv", index=False)
    assert rows(study)["fid_below_base", "inversion_dpo_implied"].verdict == ledger.SUPPORTED
    assert found["fid_below_base", "inversion_dpo_code"].verdict == ledger.INCONCLUSIVE
    assert "lacks inversion_dpo_paper" in found["fid_below_base", "inversion_dpo_paper"].reason
    pd.DataFrame(table[:-1] + [{**table[-1], "method": "base"}]).to_csv(study.root / "distribution.csv", index=False)
    with pytest.raises(InvdpoError, match="not the same seeds of"):
        rows(study)


def test_round_trips_are_judged_at_the_most_steps_over_pictures() -> None:
    study = make_study(study=measured(inversion_error=INVERSION_ERROR).study)
    folder = study.root / "experiments" / "inversion_error"
    folder.mkdir(parents=True)
    values = {(10, 1.0): [0.5] * 4, (20, 1.0): [0.04, 0.05, 0.06, 0.05], (20, 2.0): [0.01, 0.2, 0.05, 0.2]}
    table = [
        {"solver": solver, "steps": steps, "guidance_scale": scale, "rms_error": error * (1 + 9 * (solver != "ddim"))}
        for solver in ("ddim", "renoise")
        for (steps, scale), errors in values.items()
        for error in errors
    ]
    pd.DataFrame(table).to_csv(folder / "errors.csv", index=False)
    found = rows(study)
    row = found["trajectories_agree", ""]
    assert row.value == pytest.approx(0.05) and row.verdict == ledger.SUPPORTED and row.pictures == 4
    assert "guidance 1, N = 20 |" in claims.to_markdown([row])
    unsure = found["trajectories_agree_with_guidance", ""]
    assert unsure.verdict == ledger.INCONCLUSIVE and re.fullmatch(r"[\d,]+ pictures", unsure.would_settle)
    pd.DataFrame(table[:7]).to_csv(folder / "errors.csv", index=False)
    with pytest.raises(InvdpoError, match=r"3 pictures at N = 20.*invdpo experiment inversion_error"):
        rows(study)


def test_votes_are_those_that_the_exclusions_leave() -> None:
    study = make_study(prompts=8)
    (study.root / "tables").mkdir()
    asked = {"groups": [{"arms": ["base", "inversion_dpo_implied"]}]}
    for written in ([], votes.write(study.model_copy(update={"user_study": asked}))):
        row = rows(study)["people_prefer_it_to_the_base", "inversion_dpo_implied"]
        assert row.verdict == ledger.NOT_RUN and "no votes of people: `make user-study`" in row.reason, written
    place = {"arm": "inversion_dpo_implied", "baseline": "base", "raters": 10, "pairs": 100, "votes": 300}
    table = [
        place | {"raters_used": "all", "win_rate": 0.5, "win_rate_low": 0.45, "win_rate_high": 0.55},
        place | {"raters_used": "kept", "win_rate": 0.6, "win_rate_low": 0.52, "win_rate_high": 0.68},
    ]
    pd.DataFrame(table).to_csv(study.root / "tables" / "table_s4.csv", index=False)
    found = rows(study)
    row = found["people_prefer_it_to_the_base", "inversion_dpo_implied"]
    assert (row.value, row.low, row.high) == (0.6, 0.52, 0.68) and row.verdict == ledger.SUPPORTED
    assert "| 0.6 [0.52, 0.68] | 95 %, over raters and prompts | 100 pictures |" in claims.to_markdown([row])
    assert "300 votes of 10 raters" in row.reason
    other = found["people_prefer_it_to_diffusion_dpo", "inversion_dpo_implied"]
    assert other.verdict == ledger.NOT_RUN and "not asked" in other.reason


def test_the_summary_says_why_a_claim_was_not_run() -> None:
    study = make_study(prompts=8)
    text = claims.summary(claims.judge_all(load_evidence(study), ledger.load_claims(CLAIMS)))
    elsewhere = "asked in the study shapes_rewards (make reproduce STUDY=shapes_rewards)"
    assert f"| no comparison is given | **not run**: {elsewhere} |" in text
    assert "**not run**: the study has no arm ddpo" in text
    assert len(text.splitlines()) == 2 + len(ledger.load_claims(CLAIMS))


def test_a_claim_that_is_asked_elsewhere_has_its_arms_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = [claim for claim in ledger.load_claims(CLAIMS) if claim.run_in is not None]
    assert [claim.id for claim in named] == ["multi_objective_rewards_help"]
    for claim in named:
        study = load_study(f"config/{claim.run_in}.yaml")
        arms = {arm.format(variant=variant) for arm in claim.test.arms for variant in claim.variants}
        assert arms <= set(study.arms) and "inversion_dpo_code_fixed" in arms


def test_every_test_of_the_rewards_has_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study("config/shapes_rewards.yaml")
    assert study.claims == "config/claims_rewards.yaml"
    found = ledger.load_claims(Path(study.claims))
    arms = {arm.format(variant=variant) for claim in found for arm in claim.test.arms for variant in claim.variants}
    assert arms == set(study.arms) and {claim.written for claim in found} == {"before"}


def test_inconclusive_says_what_would_settle_it() -> None:
    found = rows(make_study(prompts=24))
    row = found["p_above_q_primary", "p_single"]
    assert row.low is not None and row.high is not None and row.low < 0 < row.high
    assert row.verdict == ledger.INCONCLUSIVE and "would" not in row.would_settle and row.would_settle
    assert row.p_holm is not None and row.p_value is not None and row.p_holm >= row.p_value


def test_an_interval_that_the_t_test_does_not_confirm_decides_nothing() -> None:
    """Three seeds whose means are 0.1, 0.1 and 0.9: their bootstrap never reaches 0, Student's interval does."""
    table = np.array([[0.1], [0.1], [0.9]]) + 0.01 * np.sin(np.arange(96))
    test = ledger.Test(kind="difference", arms=["a", "b"])
    row = ledger.judge_table(table, 3, test, ledger.Verdict("x", "", "", "", "", test.model_dump(), ""))
    assert row.low is not None and row.low > 0 and row.p_value is not None and row.p_value > 0.05
    assert row.verdict == ledger.INCONCLUSIVE and "t-test" in row.reason and "seeds" in row.would_settle
    steady = ledger.judge_table(table - table.mean(axis=1, keepdims=True) + 0.4, 3, test, row)
    assert steady.verdict == ledger.SUPPORTED and "t-test" not in steady.reason


def test_a_verdict_says_whether_it_outlasts_the_correction() -> None:
    found = rows(make_study(prompts=48))
    strong = [row for row in found.values() if claims.corrected(row)]
    assert strong and all(row.p_holm is not None and row.p_holm <= 0.05 for row in strong)
    assert claims.verdict_text(strong[0]) == f"**{strong[0].verdict}**\\*"
    assert claims.verdict_text(ledger.replace(strong[0], p_holm=0.2)) == f"**{strong[0].verdict}**"


def test_an_arm_that_falls_again_says_so() -> None:
    study = make_study(prompts=48)
    for path in (study.root / "scores/p_single").glob("*.parquet"):
        frame = pd.read_parquet(path)
        frame.loc[frame["step"] == frame["step"].min(), "score"] += 0.5
        write_scores(path, frame)
    found = rows(study)
    first = load_evidence(study).scores["p_single"].steps[0]
    assert f"p_single was at its best at step {first}" in found["p_above_q_pickscore", "p_single"].reason
    assert "at its best" not in found["pickscore_above_base", "inversion_dpo_implied"].reason


def test_one_seed_decides_nothing_about_a_method() -> None:
    found = rows(make_study(seeds=1))
    row = found["dpo_above_base", ""]
    assert row.verdict == ledger.INCONCLUSIVE and "one training seed" in row.reason
    assert "; at least 3 training seeds, to know their variance |" in claims.to_markdown([row])
    assert found["zero_gradient_at_the_reference", "inversion_dpo_paper"].verdict == ledger.SUPPORTED


def test_missing_arms_and_scores_are_not_run() -> None:
    found = rows(make_study(scorers=("clip", "hps"), skip=("diffusion_dpo_shuffled",)))
    assert found["dpo_above_its_shuffled_control", ""].verdict == ledger.NOT_RUN
    assert found["pickscore_above_diffusion_dpo", "inversion_dpo_implied"].verdict == ledger.NOT_RUN
    assert found["dpo_above_base", ""].test["metric"] == "hps"


PRECISION = {
    "arms": ["diffusion_dpo", "sft"],
    "recipes": {"diffusion_dpo": {}, "inversion_dpo_implied": {}, "inversion_dpo_paper": {}},
    "pairs": 16,
    "steps": [10, 20],
    "draws": [1, 64],
    "truth_steps": 40,
}
AUDIT = {
    "arms": ["inversion_dpo_paper", "inversion_dpo_code"],
    "pairs": 4,
    "batches": 3,
    "images": 4,
    "roundings": ["none", "float16"],
}


DISTRIBUTION = {
    "arms": ["base", "inversion_dpo_implied", "inversion_dpo_code"],
    "reference": {"world": "shapes", "images": 10},
}
INVERSION_ERROR = {"solvers": ["ddim", "renoise"], "steps": [10, 20], "guidance_scales": [1.0, 2.0], "latents": 4}


def measured(seeds: int = 3, **experiments: dict[str, Any]) -> Evidence:
    """A study without scores and runs that has these experiments, before any has run."""
    content = make_config(seeds=seeds).model_dump(mode="json")
    content["experiments"] |= experiments
    return Evidence(StudyConfig.model_validate(content), {}, {})


def write_precision(study: StudyConfig, noise: dict[tuple[str, int, int], float], sign: dict[str, int]) -> pd.DataFrame:
    """The experiment's files: the truth is normal, a surrogate `sign` times it plus normal noise of that size.

    noise: (recipe, steps, draws) -> size. Under the policy `sft` every surrogate is the negative of that.
    """
    assert study.experiments.precision is not None
    rng, rows = np.random.default_rng(3), []
    pairs = study.experiments.precision.pairs
    for arm, seed in [(arm, seed) for arm in ("diffusion_dpo", "sft") for seed in study.seeds]:
        truth = rng.normal(size=2 * pairs)
        for (recipe, steps, draws), size in noise.items():
            side = (1 if arm == "diffusion_dpo" else -1) * sign.get(recipe, 1)
            frame = pd.DataFrame({"pair": np.tile(np.arange(pairs), 2), "side": np.repeat(["win", "lose"], pairs)})
            values = {"truth": truth, "surrogate": side * truth + size * rng.normal(size=2 * pairs)}
            place = {"policy": f"{arm}/seed{seed}", "arm": arm, "seed": seed, "recipe": recipe, "steps": steps}
            rows.append(frame.assign(**values, **place, draws=draws, unet_evals=3.0 * draws))
    latents = pd.concat(rows, ignore_index=True)
    write_latents(study, latents)
    return latents


def write_latents(study: StudyConfig, latents: pd.DataFrame) -> None:
    folder = study.root / "experiments" / "precision"
    folder.mkdir(parents=True, exist_ok=True)
    latents.to_csv(folder / "latents.csv", index=False)
    names = latents[["policy", "arm", "seed"]].drop_duplicates()
    agreement(latents).merge(names, on="policy").to_csv(folder / "agreement.csv", index=False)


NOISE = {
    ("diffusion_dpo", 1000, 1): 6.0,
    ("diffusion_dpo", 1000, 64): 0.1,
    ("inversion_dpo_implied", 10, 1): 9.0,
    ("inversion_dpo_implied", 20, 1): 0.02,
    ("inversion_dpo_paper", 10, 1): 9.0,
    ("inversion_dpo_paper", 20, 1): 0.02,
}


def judged(evidence: Evidence, arms: list[str], **test: Any) -> ledger.Verdict:
    settings = {"kind": "agreement", "arms": arms, "policy": "diffusion_dpo", "metric": "spearman"} | test
    content = {"id": "x", "locus": "y", "question": "z", "written": "after", "test": settings}
    return claims.judge(evidence, ledger.Claim.model_validate(content))


def test_agreement_is_the_precision_tables_at_the_most_steps() -> None:
    evidence = measured(precision=PRECISION)
    write_precision(evidence.study, NOISE, {"inversion_dpo_paper": -1})
    close = judged(evidence, ["inversion_dpo_implied"], threshold=0.95)
    rows = pd.read_csv(evidence.study.root / "experiments/precision/agreement.csv")
    rows = rows.query("arm == 'diffusion_dpo' and recipe == 'inversion_dpo_implied' and steps == 20")
    assert (close.value, close.low, close.high) == pytest.approx(
        (rows["spearman"].mean(), rows["low"].min(), rows["high"].max())
    )
    assert (close.verdict, close.seeds, close.pairs, close.prompts) == (ledger.SUPPORTED, 3, 16, 0)
    assert "lowest to the highest end" in close.interval and not close.would_settle
    unsure = judged(evidence, ["inversion_dpo_implied"], threshold=0.999)
    assert unsure.verdict == ledger.INCONCLUSIVE and re.fullmatch(r"[\d,]+ pairs a seed", unsure.would_settle)
    assert close.seeds_agreeing == 3 and close.p_value is None
    assert close.artifacts == ["experiments/precision"]
    mirrored = judged(evidence, ["inversion_dpo_paper"], threshold=0.0)
    assert mirrored.verdict == ledger.NOT_SUPPORTED and mirrored.value is not None and mirrored.value < -0.95
    assert judged(evidence, ["inversion_dpo_implied"], policy="sft").verdict == ledger.NOT_SUPPORTED
    text = claims.to_markdown([close])
    assert "policies of Diffusion-DPO: Inversion-DPO (implied noise), N = 20 |" in text
    assert "| 3 x 16 pairs |" in text and "3 UNet evaluations a latent" in text


def test_draws_are_those_of_the_test_or_the_most() -> None:
    evidence = measured(precision=PRECISION)
    write_precision(evidence.study, NOISE, {})
    most, one = judged(evidence, ["diffusion_dpo"]), judged(evidence, ["diffusion_dpo"], draws=1)
    assert most.value is not None and one.value is not None and most.value > 0.95 and one.value < 0.6
    assert [row.test["measured"][0]["draws"] for row in (most, one)] == [64, 1]
    assert one.test["measured"][0]["inversion_steps"] is None, "1000 training timesteps are no inversion"
    both = judged(evidence, ["inversion_dpo_implied", "diffusion_dpo"], draws=1)
    assert "Inversion-DPO (implied noise), N = 20 minus Diffusion-DPO, 1 draw |" in claims.to_markdown([both])
    assert "3 UNet evaluations a latent against 3" not in both.reason and "3 against 3 UNet" in both.reason
    alone = judged(evidence, ["inversion_dpo_implied"], draws=64)
    assert alone.value == judged(evidence, ["inversion_dpo_implied"]).value, "it draws nothing"


def test_difference_of_correlations_is_paired_by_seed_and_pair() -> None:
    evidence = measured(precision=PRECISION)
    latents = write_precision(evidence.study, NOISE, {})
    row = judged(evidence, ["inversion_dpo_implied", "diffusion_dpo"], draws=1)

    def by_seed(recipe: str, steps: int) -> list[float]:
        rows = latents.query(f"arm == 'diffusion_dpo' and recipe == '{recipe}' and steps == {steps} and draws == 1")
        return [float(np.asarray(spearmanr(part[["surrogate", "truth"]]))[0]) for _, part in rows.groupby("seed")]

    expected = np.mean(np.subtract(by_seed("inversion_dpo_implied", 20), by_seed("diffusion_dpo", 1000)))
    assert row.value == pytest.approx(expected) and row.low is not None and row.high is not None
    assert 0 < row.low < expected < row.high and row.verdict == ledger.SUPPORTED
    assert (row.seeds, row.pairs, row.seeds_agreeing) == (3, 16, 3)
    back = judged(evidence, ["diffusion_dpo", "inversion_dpo_implied"], draws=1)
    assert (back.low, back.high) == pytest.approx((-row.high, -row.low)) and back.verdict == ledger.NOT_SUPPORTED
    same = judged(evidence, ["diffusion_dpo", "diffusion_dpo"], draws=1)
    assert (same.value, same.low, same.high) == (0, 0, 0), "two surrogates that agree have no spread between them"


def test_difference_of_correlations_varies_over_seeds_as_well() -> None:
    """One seed of three on which the first recipe is the worse by far: resampling pairs alone would not show it."""
    evidence = measured(precision=PRECISION)
    latents = write_precision(evidence.study, dict.fromkeys(NOISE, 0.05), {})
    implied = (latents["recipe"] == "inversion_dpo_implied") & (latents["seed"] == 2)
    latents.loc[implied, "surrogate"] *= -1
    write_latents(evidence.study, latents)
    row = judged(evidence, ["inversion_dpo_implied", "diffusion_dpo"], draws=1)
    assert row.low is not None and row.high is not None
    assert row.low < -1.9 and row.high > -0.05 and row.seeds_agreeing is not None and row.seeds_agreeing < 3
    assert row.verdict != ledger.SUPPORTED


def test_order_counts_pairs_as_the_truth_has_them() -> None:
    evidence = measured(precision=PRECISION | {"pairs": 4})
    latents = write_precision(evidence.study, NOISE, {})
    sides = latents["side"] == "win"
    latents["truth"] = np.where(sides, 1.0, 0.0)
    latents.loc[latents["pair"] == 3, "truth"] = np.where(latents["seed"] == 1, np.nan, 1.0)[latents["pair"] == 3]
    # Of the three pairs with a truth: one ordered as it, one against it, one tied.
    order = np.array([1.0, -1.0, 0.0, 1.0])[latents["pair"]]
    latents["surrogate"] = np.where(sides, order, 0.0)
    latents.loc[latents["recipe"] == "inversion_dpo_implied", "surrogate"] = np.where(sides, 1.0, 0.0)[
        latents["recipe"] == "inversion_dpo_implied"
    ]
    write_latents(evidence.study, latents)
    share = judged(evidence, ["diffusion_dpo"], metric="order")
    assert share.value == pytest.approx(0.5) and share.pairs == 3
    assert "| 0.5 [" in claims.to_markdown([share])
    row = judged(evidence, ["inversion_dpo_implied", "diffusion_dpo"], metric="order")
    assert row.value == pytest.approx(0.5) and (row.low, row.high) == pytest.approx((0, 1))
    assert row.p_value is not None and row.verdict == ledger.INCONCLUSIVE and row.would_settle.endswith(" pairs")


def test_agreement_under_one_seed_is_inconclusive() -> None:
    evidence = measured(seeds=1, precision=PRECISION)
    write_precision(evidence.study, NOISE, {})
    for test in ({}, {"metric": "order"}):
        row = judged(evidence, ["inversion_dpo_implied"], **test)
        assert row.verdict == ledger.INCONCLUSIVE and "one training seed" in row.reason and row.value is not None


def test_no_pair_with_a_truth_under_every_seed() -> None:
    evidence = measured(precision=PRECISION)
    latents = write_precision(evidence.study, NOISE, {})
    latents.loc[latents["pair"] % 3 == latents["seed"], "truth"] = np.nan
    write_latents(evidence.study, latents)
    assert judged(evidence, ["diffusion_dpo"]).pairs == 10, "the fewest that a seed has, of 16"
    for metric in ("spearman", "order"):
        row = judged(evidence, ["inversion_dpo_implied", "diffusion_dpo"], metric=metric)
        assert row.verdict == ledger.INCONCLUSIVE and row.value is None and "under every seed" in row.reason


def test_a_surrogate_that_never_changes_has_no_correlation() -> None:
    evidence = measured(precision=PRECISION)
    latents = write_precision(evidence.study, NOISE, {})
    latents.loc[(latents["recipe"] == "inversion_dpo_paper") & (latents["seed"] == 1), "surrogate"] = 0.0
    write_latents(evidence.study, latents)
    for arms in (["inversion_dpo_paper"], ["inversion_dpo_paper", "diffusion_dpo"]):
        row = judged(evidence, arms)
        assert row.verdict == ledger.INCONCLUSIVE and row.value is None and "same for all latents" in row.reason


def write_gradients(study: StudyConfig, norms: dict[tuple[str, str], list[float]]) -> None:
    """norms: (recipe, rounding) -> one a batch, at the base; at a checkpoint and in bf16 every one is 9."""
    rows = [
        {"recipe": recipe, "policy": policy, "precision": precision, "noise": noise, "batch": batch, "pairs": 4}
        | {"gradient_norm": norm if (policy, precision) == ("initial", "fp32") else 9.0}
        for (recipe, noise), found in norms.items()
        for policy, precision in (("initial", "fp32"), ("initial", "bf16"), ("diffusion_dpo/step8", "fp32"))
        for batch, norm in enumerate(found)
    ]
    folder = study.root / "experiments" / "audit"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "gradients.csv", index=False)


@pytest.mark.parametrize(
    ("norms", "lower", "higher"),
    [
        ([0.0, 0.0, 0.0], ledger.SUPPORTED, ledger.NOT_SUPPORTED),
        ([0.0, 0.0, 1e-30], ledger.INCONCLUSIVE, ledger.INCONCLUSIVE),
        ([2.0, 3.0, 7.0], ledger.NOT_SUPPORTED, ledger.SUPPORTED),
    ],
)
def test_gradients_of_the_audit(norms: list[float], lower: str, higher: str) -> None:
    evidence = measured(seeds=1, audit=AUDIT)
    other = [5.0, 5.0, 5.0] if lower == ledger.SUPPORTED else [0.0, 0.0, 0.0]
    arm = "inversion_dpo_paper"
    write_gradients(
        evidence.study, {(arm, "none"): other, (arm, "float16"): norms, ("inversion_dpo_code", "none"): other}
    )
    test = {"kind": "gradient", "policy": None, "metric": "primary", "rounding": "float16"}
    for direction, verdict in (("lower", lower), ("higher", higher)):
        row = judged(evidence, [arm], **test, direction=direction)
        assert row.verdict == verdict and (row.low, row.high) == (min(norms), max(norms))
        assert row.value == pytest.approx(np.mean(norms)) and (row.batches, row.pairs) == (3, 4)
    text = claims.to_markdown([row])
    assert "| 3 batches x 4 pairs |" in text and "weights rounded to float16: Inversion-DPO (Eq. 16)" in text


@pytest.mark.parametrize(
    ("settings", "test", "reason"),
    [
        ({}, {}, r"no `experiments.precision`; add it"),
        ({"precision": PRECISION | {"arms": ["sft"]}}, {}, r"`experiments.precision.arms` lacks diffusion_dpo"),
        ({"precision": PRECISION}, {"arms": ["inversion_dpo_exact"]}, r"precision.recipes` lacks inversion_dpo_exact"),
        ({"precision": PRECISION}, {"draws": 8}, r"precision.draws` lacks 8"),
        ({}, {"rounding": "none"}, r"no `experiments.audit`; add it"),
        ({"audit": AUDIT}, {"arms": ["diffusion_dpo"], "rounding": "none"}, r"audit.arms` lacks diffusion_dpo"),
        ({"audit": AUDIT}, {"rounding": "bfloat16"}, r"audit.roundings` lacks bfloat16"),
        ({"audit": AUDIT | {"precisions": ["bf16"]}}, {"rounding": "none"}, r"audit.precisions` lacks fp32"),
    ],
)
def test_experiments_that_are_lacking_are_not_run(settings: dict, test: dict, reason: str) -> None:
    if "rounding" in test:
        test = {"kind": "gradient", "policy": None} | test
    row = judged(measured(**settings), test.pop("arms", ["inversion_dpo_paper"]), **test)
    assert row.verdict == ledger.NOT_RUN and re.search(reason, row.reason) and row.reason in claims.to_markdown([row])


def test_missing_and_stale_files_of_an_experiment_name_the_command() -> None:
    evidence = measured(precision=PRECISION, audit=AUDIT)
    gradient = {"kind": "gradient", "policy": None, "rounding": "none"}
    for arms, test, name in ((["diffusion_dpo"], {}, "precision"), (["inversion_dpo_paper"], gradient, "audit")):
        with pytest.raises(InvdpoError, match=rf"missing. Run `invdpo experiment {name} --study config/toy.yaml`"):
            judged(evidence, arms, **test)
    latents = write_precision(evidence.study, NOISE, {})
    write_latents(evidence.study, latents.loc[latents["seed"] != 2])
    with pytest.raises(InvdpoError, match=r"seeds \[0, 1\] of diffusion_dpo.*invdpo experiment precision .* again"):
        judged(evidence, ["diffusion_dpo"])
    write_latents(evidence.study, latents.loc[(latents["recipe"] != "diffusion_dpo") | (latents["draws"] == 64)])
    with pytest.raises(InvdpoError, match=r"draws \[64\]"):
        judged(evidence, ["diffusion_dpo"])
    write_latents(evidence.study, latents.loc[latents["recipe"] != "diffusion_dpo"])
    with pytest.raises(InvdpoError, match=r"draws \[\]"):
        judged(evidence, ["diffusion_dpo"])
    write_gradients(evidence.study, {("inversion_dpo_paper", "none"): [0.0]})
    with pytest.raises(InvdpoError, match=r"1 batches of inversion_dpo_paper.*invdpo experiment audit"):
        judged(evidence, ["inversion_dpo_paper"], **gradient)


@pytest.mark.parametrize("name", ["shapes", "shapes_full"])
def test_the_studies_can_run_every_claim_on_experiments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is `not run` for want of a recipe, a rounding or draws: all ask for files, which are not there."""
    monkeypatch.chdir(ROOT)
    study = load_study(f"config/{name}.yaml").model_copy(update={"study": "nowhere"})
    kinds = ("agreement", "round_trip", "distribution")
    asked = [claim for claim in ledger.load_claims(CLAIMS) if claim.test.kind in kinds or claim.test.rounding]
    assert len(asked) >= 9
    for claim in asked:
        for variant in claim.variants or [""]:
            with pytest.raises(InvdpoError, match=r"results/nowhere/[\w/]+.csv is missing"):
                claims.judge(Evidence(study, {}, {}), claim, variant)


def test_files_are_complete_and_stable() -> None:
    study = make_study(study=measured(precision=PRECISION, audit=AUDIT).study)
    write_precision(study, NOISE, {})
    arms = ("inversion_dpo_paper", "inversion_dpo_code")
    write_gradients(study, {(arm, rounding): [0.0] * 3 for arm in arms for rounding in ("none", "float16")})
    first = [path.read_bytes() for path in claims.write(study)]
    assert [path.read_bytes() for path in claims.write(study)] == first
    content = json.loads((study.root / "claims.json").read_text())["claims"]
    needed = {"id", "variant", "value", "low", "high", "seeds", "prompts", "artifacts", "command", "verdict"}
    assert all(needed <= set(row) for row in content)
    ids = {claim.id for claim in ledger.load_claims(CLAIMS)}
    assert {row["id"] for row in content} == ids
    assert [asdict(row) for row in ledger.read_verdicts(study.root / "claims.json")] == content
    of_deviations = {row["id"]: row["deviations"] for row in content}
    assert "sign" in of_deviations["labels_matter"] and all(isinstance(ids, list) for ids in of_deviations.values())
    assert all(row["interval"] for row in content if row["low"] is not None)
    assert {"draws", "policy", "rounding"}.isdisjoint(content[0]["test"]), "settings of other kinds"
    assert sum(row["test"]["kind"] == "agreement" and row["verdict"] != ledger.NOT_RUN for row in content) == 7
    lines = (study.root / "claims.md").read_text().splitlines()
    lines = [line for line in lines if line.startswith("|")]
    assert len(lines) == len(content) + 2
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "claims: [{id: a, HEAD, test: {kind: difference, arms: [a]}}]",
            "needs 2 arms",
        ),
        ("claims: [{id: a, HEAD, tset: {}}]", "tset|test"),
        ("claims: [{id: a, HEAD, test: {kind: guess}}]", "kind"),
        ("claims: [{id: a, locus: x, question: q, test: {kind: trend}}]", "written"),
        ("claims: {}", "list"),
        ("claims: [", "YAML"),
        (
            f"claims: [{{id: a, HEAD, quote: '{'word ' * 26}', test: {{kind: trend}}}}]",
            "25 words",
        ),
        ("claims: [&x {id: a, HEAD, test: {kind: trend}}, *x]", "twice"),
        ("claims: [{id: a, HEAD, test: {kind: agreement}}]", "needs 1 or 2 arms"),
        (
            "claims: [{id: a, HEAD, test: {kind: agreement, arms: [a], policy: b}}]",
            "one of spearman, order",
        ),
        (
            "claims: [{id: a, HEAD, test: {kind: agreement, arms: [a], metric: order}}]",
            "needs `policy`",
        ),
        (
            "claims: [{id: a, HEAD, test: {kind: trend, draws: 1}}]",
            "`draws` belongs to .* agreement",
        ),
        (
            "claims: [{id: a, HEAD, test: {kind: rise, arms: [a], rounding: none}}]",
            "`rounding` belongs",
        ),
    ],
)
def test_bad_claims_files_are_refused(text: str, message: str) -> None:
    path = Path("claims.yaml")
    path.write_text(text.replace("HEAD", "locus: x, question: q, written: after"))
    with pytest.raises(InvdpoError, match=message):
        ledger.load_claims(path)


def test_a_missing_claims_file_is_named() -> None:
    with pytest.raises(InvdpoError, match=r"nowhere\.yaml"):
        ledger.load_claims(Path("nowhere.yaml"))
