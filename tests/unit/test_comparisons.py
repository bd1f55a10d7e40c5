"""Who leads a column, what a gain is worth, and the tables of comparisons, on scores whose answers are known."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from evidence_fixture import make_config, make_study, write_scores

from invdpo.config import StudyConfig, parse_study
from invdpo.errors import InvdpoError
from invdpo.evidence import comparisons, printing, tables
from invdpo.evidence.load import Evidence, arm_title, comparison_arms, load_evidence
from invdpo.evidence.statistics import Interval, holm, p_value, prompt_interval


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(build: Callable[[Evidence], printing.Table], evidence: Evidence) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(printing.to_csv(build(evidence)))))


def column(gains: dict[str, float], noise: float = 1.0) -> tuple[dict[str, float], dict]:
    """Means and paired tables of names with these gains, 3 seeds and 60 prompts."""
    rng = np.random.default_rng(0)
    scores = {name: gain + noise * rng.normal(size=(3, 60)) for name, gain in gains.items()}
    pairs = {("x", frozenset(pair)): scores[pair[0]] - scores[pair[1]] for pair in combinations(scores, 2)}
    return {name: float(values.mean()) for name, values in scores.items()}, pairs


def test_one_that_beats_all_others_is_best_and_nothing_is_tied() -> None:
    means, pairs = column({"a": 0.0, "b": 3.0, "c": 0.1})
    assert comparisons.ranked({"x": means}, pairs) == {("x", "a"): "", ("x", "b"): "best", ("x", "c"): ""}


def test_the_highest_is_tied_with_all_it_is_not_told_from() -> None:
    means, pairs = column({"a": 2.0, "b": 2.05, "c": 0.0})
    assert comparisons.ranked({"x": means}, pairs) == {("x", "a"): "tied", ("x", "b"): "tied", ("x", "c"): ""}
    same = {"a": 1.0, "b": 1.0}
    assert set(comparisons.ranked({"x": same}, {("x", frozenset("ab")): np.zeros((3, 9))}).values()) == {"tied"}
    assert comparisons.ranked({"x": {"a": 1.0}}, {}) == {}  # alone, it beats nobody


def test_leading_is_corrected_for_every_comparison_of_the_table() -> None:
    """What is told from the next alone, is not among many columns."""
    gap = 0.3 + np.random.default_rng(1).normal(size=(1, 60))
    assert 0.002 < p_value(gap) < 0.05
    means, pairs = {"x": {"a": 0.0, "b": float(gap.mean())}}, {("x", frozenset("ab")): gap}
    assert comparisons.ranked(means, pairs)["x", "b"] == "best"
    others = {(f"y{k}", frozenset("ab")): np.random.default_rng(k).normal(size=(1, 60)) for k in range(50)}
    assert comparisons.ranked(means, pairs | others)["x", "b"] == "tied"


def test_marks_in_print() -> None:
    block = printing.Block("c", ["Method", "A_1"], [["x", comparisons.marked("0.5 [0.4, 0.6]", "best")], ["y", "1 ="]])
    table = printing.Table("t", [], [], ["x"], [block])
    assert "| x | **0.5 [0.4, 0.6]** |\n| y | 1 = |" in printing.to_markdown(table)
    assert "x & \\textbf{0.5 [0.4, 0.6]} \\\\\ny & 1 = \\\\" in printing.to_tex(table)


def test_table_1_says_who_leads_and_corrects_over_methods_and_scores() -> None:
    evidence = load_evidence(make_study(prompts=48, seeds=8))
    table = tables.table1(evidence)
    rows = {row["arm"]: row for row in rows_of(lambda _: table, evidence) if row["arm"] in evidence.study.arms}
    assert {arm for arm, row in rows.items() if row["pickscore_standing"] == "best"} == {"inversion_dpo_implied"}
    tied = {arm for arm, row in rows.items() if row["pickscore_standing"] == "tied"}
    assert not tied
    text = printing.to_markdown(table)
    assert text.count("| **") >= 5 and " = |" not in text.split("**Difference")[0].split("**Mean score**")[1]

    lines = text.split("**Difference")[1].split("**Smallest")[0].splitlines()
    gains = {cells[1]: cells for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 5}
    values = {}
    arms = [arm for arm in rows if arm != "base"]
    for arm in arms:
        for scorer in evidence.scorers:
            first, base = evidence.paired(arm, "base", scorer)
            values[arm, scorer] = first - base
            if scorer == evidence.primary:
                values[arm, "win"] = np.sign(first - base) / 2
    adjusted = dict(zip(values, holm([p_value(part) for part in values.values()]), strict=True))
    for arm in arms:
        row = rows[arm]
        assert float(row["clip_minus_base_p_holm"]) == pytest.approx(adjusted[arm, "clip"], rel=1e-5)
        assert float(row["oracle_utility_win_rate_p_holm"]) == pytest.approx(adjusted[arm, "win"], rel=1e-5)
        interval = prompt_interval(values[arm, "clip"])
        assert float(row["clip_minus_base_prompts_low"]) == pytest.approx(interval.low, rel=1e-4, abs=1e-9)
        starred = gains[arm_title(arm)][7].endswith(" *")
        assert starred == (adjusted[arm, "clip"] < 0.05)
    assert rows["inversion_dpo_paper"]["clip_minus_base_p_holm"] == "1"
    assert float(rows["sft"]["clip_minus_base_detectable"]) > 0


def test_rows_that_are_equal_are_shown_as_ties() -> None:
    evidence = load_evidence(make_study(prompts=24, seeds=8))
    s5 = {row["row"]: row for row in rows_of(tables.table_s5, evidence)}  # gains 0.7 and 0.75
    assert {s5[arm]["hps_standing"] for arm in ("q_single", "p_single")} == {"tied"}
    steps = [row for row in rows_of(tables.table3, evidence) if row["arm"] in evidence.study.arms]
    assert [row["pickscore_standing"] for row in steps] == ["", "tied", "tied"]
    control = {(r["arm"], r["scorer"]): r for r in rows_of(tables.controls, evidence)}
    assert control["diffusion_dpo", "clip"]["standing"] == "best"
    assert control["inversion_dpo_paper", "clip"]["standing"] == "tied"  # nothing moved under any labels


def test_win_rates_of_every_pair() -> None:
    evidence = load_evidence(make_study(prompts=48, seeds=8))
    rows = {(r["scorer"], r["arm"], r["against"]): r for r in rows_of(comparisons.win_rates, evidence)}
    arms = comparison_arms(evidence.study)
    assert len(rows) == 5 * len(list(combinations(arms, 2)))
    first, second = evidence.paired("sft", "diffusion_dpo", "hps")
    row = rows["hps", "sft", "diffusion_dpo"]
    assert float(row["win_rate"]) == pytest.approx((first > second).mean(), rel=1e-5)
    assert float(row["win_rate_low"]) < float(row["win_rate"]) < float(row["win_rate_high"]) < 0.5
    assert float(row["p_holm"]) < 0.05
    still = rows["hps", "base", "inversion_dpo_paper"]
    assert (still["win_rate"], still["ties"], still["p_holm"]) == ("0.5", "1", "1")
    # A win rate is told from one half by a family of its own: all pairs and scores.
    tested = [np.sign(np.subtract(*evidence.paired(a, b, s))) / 2 for s, a, b in rows]
    adjusted = dict(zip(rows, holm([p_value(values) for values in tested]), strict=True))
    assert float(row["p_holm"]) == pytest.approx(adjusted["hps", "sft", "diffusion_dpo"], rel=1e-5)


ALL_ARMS = tuple(make_config().arms)
UP, DOWN, LEVEL = Interval(1, 0.5, 1.5, 0, 3, 9), Interval(-1, -1.5, -0.5, 0, 3, 9), Interval(0, -1, 1, 0, 3, 9)
STILL = Interval(0, 0, 0, 0, 3, 9)


@pytest.mark.parametrize(
    ("trained", "held_out", "verdict"),
    [
        (UP, [UP, DOWN], comparisons.OVER_OPTIMISED),
        (UP, [LEVEL, DOWN], comparisons.OVER_OPTIMISED),
        (UP, [UP, UP], comparisons.CONFIRMED),
        (UP, [UP, LEVEL], comparisons.PARTLY),
        (UP, [LEVEL, STILL], comparisons.NOT_CONFIRMED),
        (LEVEL, [DOWN, DOWN], comparisons.NO_GAIN),
        (STILL, [UP], comparisons.NO_GAIN),
        (DOWN, [UP], comparisons.LOSS),
    ],
)
def test_what_a_gain_is_worth(trained: Interval, held_out: list[Interval], verdict: str) -> None:
    assert comparisons.optimisation_verdict(trained, held_out) == verdict


def with_hps_falling(study: StudyConfig, arm: str) -> None:
    """Let an arm's HPS fall from its second checkpoint on, while the other scores stay as they are."""
    import pandas as pd

    for path in (study.root / "scores" / arm).glob("*.parquet"):
        frame = pd.read_parquet(path)
        fall = (frame["scorer"] == "hps") * frame["step"].map({10: 0.0, 20: 0.005, 40: 0.02})
        write_scores(path, frame.assign(score=frame["score"] - fall))


def test_over_optimisation_is_flagged_where_it_was_planted() -> None:
    study = make_study(prompts=48)
    with_hps_falling(study, "diffusion_dpo")
    table = comparisons.over_optimisation(load_evidence(study))
    rows = rows_of(lambda _: table, load_evidence(study))
    verdicts = {(r["arm"], r["from_step"], r["to_step"]): r["verdict"] for r in rows}
    assert verdicts["diffusion_dpo", "0", "40"] == "over-optimised"
    assert verdicts["diffusion_dpo", "0", "10"] == "confirmed"  # so far HPS had gained as well
    assert verdicts["diffusion_dpo", "20", "40"] == "over-optimised"
    assert verdicts["inversion_dpo_implied", "0", "40"] == "confirmed"
    assert verdicts["inversion_dpo_paper", "0", "40"] == "no gain"
    assert verdicts["inversion_dpo_code", "0", "40"] == "loss"
    assert "base" not in {row["arm"] for row in rows}
    text = printing.to_markdown(table)
    assert "**over-optimised**" in text and "PickScore (trained on)" in text and "HPS (held out)" in text


def test_a_score_that_the_study_has_not_is_named() -> None:
    study = make_study(prompts=8)
    content = study.model_dump(mode="json")
    content["experiments"]["over_optimisation"]["held_out"] = ["hsp"]
    content["claims"] = None
    with pytest.raises(InvdpoError, match="`experiments.over_optimisation` names the score `hsp`"):
        comparisons.over_optimisation(load_evidence(parse_study(content, "toy")))
    content["experiments"]["over_optimisation"]["held_out"] = ["pickscore"]
    with pytest.raises(InvdpoError, match="held against itself"):
        parse_study(content, "toy")
    content["experiments"]["over_optimisation"] = None
    content["experiments"]["to_target"] = {"arm": "base"}
    with pytest.raises(InvdpoError, match="`experiments.to_target` names `base`, which does not train"):
        parse_study(content, "toy")


def test_cost_to_target_by_step_by_evaluation_and_in_time() -> None:
    study = make_study(prompts=48)
    tables.write(study)
    found = rows_of(comparisons.to_target, load_evidence(study))
    rows = {(r["scorer"], r["axis"], r["arm"]): r for r in found}
    step, evals = (rows["pickscore", axis, "inversion_dpo_implied"] for axis in ("step", "unet_evals"))
    assert step["status"] == "ok" and 5 < float(step["cost"]) < 40
    assert float(step["ratio_low"]) < float(step["ratio"]) < float(step["ratio_high"]) and float(step["ratio"]) > 2
    assert float(evals["cost"]) == pytest.approx(5000 * float(step["cost"]), rel=1e-4)
    assert float(evals["ratio"]) == pytest.approx(float(step["ratio"]) / 20, rel=1e-4)  # 5,000 against 250 a step
    never = rows["pickscore", "step", "inversion_dpo_code"]
    assert (never["status"], never["cost"], never["ratio"], never["never_reached"]) == ("never reached", "", "0", "1")
    assert not [key for key in rows if key[2] in ("base", "diffusion_dpo")]

    spent = json.loads((study.root / "costs.json").read_text())["arms"]
    timed = spent["inversion_dpo_implied"]["seconds_to_target"]
    assert timed["target"] == "diffusion_dpo"
    seconds = 0.02 * float(step["cost"]) * (1 + 5000 / 1000)
    assert timed["pickscore"]["cost"] == pytest.approx(seconds, rel=1e-4)
    assert spent["inversion_dpo_code"]["seconds_to_target"]["pickscore"]["cost"] is None
    assert "seconds_to_target" not in spent["diffusion_dpo"]


def test_arms_that_have_not_run_have_their_rows() -> None:
    evidence = load_evidence(make_study(skip=("diffusion_dpo",), prompts=8))
    for build in (comparisons.win_rates, comparisons.over_optimisation, comparisons.to_target):
        assert any(row["status"].startswith("not run: invdpo train") for row in rows_of(build, evidence))
    nothing = load_evidence(make_study(study=make_config().model_copy(update={"study": "bare"}), skip=ALL_ARMS))
    for build in (comparisons.over_optimisation, comparisons.to_target):
        assert all(row["status"].startswith("not run: invdpo train") for row in rows_of(build, nothing))
