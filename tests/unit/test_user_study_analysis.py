"""The analysis against published examples and against raters whose behaviour is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from judged_study import fix_salt, make_study, settings, votes, write_votes
from typer.testing import CliRunner

from invdpo.cli import app
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.evidence import votes as table_s4
from user_study_app.analysis import Votes, analyse, measures, rater_facts, read_votes, win_rates
from user_study_app.bundle import build
from user_study_app.settings import Places
from user_study_app.simulate import Behaviour, World, simulate
from user_study_app.statistics import davidson, krippendorff, robust_interval, share, strengths

BASE, DPO = ("walrus_base", "gecko_inverted"), ("marmot_dpo", "gecko_inverted")
LARGE = settings(groups=[{"arms": list(BASE), "pairs": 34}, {"arms": list(DPO), "pairs": 34}], raters=12, per_pair=6)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory):
    """A study of 12 raters, 34 pairs a group and 6 votes a pair, frozen once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("judged"))
        patch.delenv("INVDPO_USER_STUDY_DB", raising=False)
        study = make_study(user_study=LARGE)
        fix_salt(study, 1)
        build(study)
        yield study


def behaviour(base: float = 0.7, dpo: float = 0.5, **changes: Any) -> Behaviour:
    return Behaviour({BASE: base, DPO: dpo}, **{"tie_rate": 0.2} | changes)


def joined(study: StudyConfig, behaviours: list[Behaviour], seed: int = 0, **options: Any) -> Votes:
    path = write_votes(study, votes(study, behaviours, seed=seed, **options))
    return read_votes(path, Places(study))[0]


def rate(study: StudyConfig, found: Votes, arms: tuple[str, str]) -> dict[str, Any]:
    return next(record for record in win_rates(found) if (record["baseline"], record["arm"]) == arms)


def measure(found: Votes, quantity: str, group: str = "all") -> dict[str, Any]:
    return next(r for r in measures(found) if (r["quantity"], r["group"]) == (quantity, group))


# ------------------------------------------------------------------------------------------------ single statistics


def counts(*observers: str) -> np.ndarray:
    """(units, categories) from one line of values an observer; a dot is no value."""
    values = sorted(set("".join(observers)) - {"."})
    return np.array([[column.count(value) for value in values] for column in zip(*observers, strict=True)], float)


@pytest.mark.parametrize(
    ("observers", "alpha"),
    [
        # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): its examples A, B and C.
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_alpha_of_the_published_examples(observers: tuple[str, ...], alpha: float) -> None:
    assert krippendorff(counts(*observers)) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_perfect_and_of_constant_answers() -> None:
    assert krippendorff(counts("0101", "0101")) == 1.0
    assert np.isnan(krippendorff(counts("0000", "0000")))


def test_davidson_finds_the_strengths_that_made_the_votes() -> None:
    strength, nu, n = np.array([0.0, 0.8, -0.5]), 0.7, 1e6
    matches, made = [(0, 1), (1, 2), (2, 0)], []
    for i, j in matches:
        parts = np.exp([strength[i], np.log(nu) + (strength[i] + strength[j]) / 2, strength[j]])
        made.append(n * parts / parts.sum())
    assert davidson(matches, np.array(made)) == pytest.approx([0.8, -0.5, np.log(0.7)], abs=1e-4)


def test_davidson_without_ties_is_bradley_terry() -> None:
    """Two methods: the log-odds of the wins. A method that never loses stays finite."""
    assert davidson([(0, 1)], np.array([[30.0, 0.0, 90.0]]))[0] == pytest.approx(np.log(3), abs=1e-3)
    assert np.isfinite(davidson([(0, 1)], np.array([[0.0, 0.0, 90.0]]))).all()


def clustered(raters: int, prompts: int, of_rater: float, of_prompt: float, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    logit = 0.5 + of_rater * rng.normal(size=(raters, 1)) + of_prompt * rng.normal(size=(1, prompts))
    value = (rng.random((raters, prompts)) < 1 / (1 + np.exp(-logit))).astype(float)
    at = np.indices(value.shape).reshape(2, -1)
    return pd.DataFrame({"rater": at[0].astype(str), "prompt_id": at[1], "value": value.ravel()})


def test_intervals_widen_with_clusters() -> None:
    """As many votes, but of raters with opinions of their own: both intervals must know that they say less."""
    alone, taste = clustered(8, 60, 0, 0, 1), clustered(8, 60, 2, 0, 1)
    for interval in (
        lambda rows: (lambda s: (s.low, s.high))(share(rows, rows["value"])),
        lambda rows: robust_interval(rows, rows["value"]),
    ):
        (a, b), (c, d) = interval(alone), interval(taste)
        assert d - c > 2 * (b - a)


@pytest.mark.parametrize(("of_rater", "of_prompt"), [(0.0, 0.0), (0.8, 0.0), (0.5, 1.0)])
def test_intervals_cover(of_rater: float, of_prompt: float) -> None:
    """Nominal 95 %; the bootstrap may cover more. 60 studies: under 0.87 would happen to a right one in a hundred."""
    wide = np.random.default_rng(0).normal(size=400_000) * np.hypot(of_rater, of_prompt)
    truth = (1 / (1 + np.exp(-0.5 - wide))).mean()
    hits = np.zeros(2)
    for seed in range(60):
        rows = clustered(12, 30, of_rater, of_prompt, seed)
        interval, robust = share(rows, rows["value"]), robust_interval(rows, rows["value"])
        assert interval is not None and robust is not None
        hits += [interval.low <= truth <= interval.high, robust[0] <= truth <= robust[1]]
    assert (hits / 60 > 0.87).all()


def test_one_rater_has_no_robust_interval() -> None:
    rows = clustered(1, 30, 0, 0, 0)
    assert robust_interval(rows, rows["value"]) is None
    interval = share(rows, rows["value"])
    assert interval is not None and interval.high > interval.low and interval.seeds == 1
    assert share(rows, rows["value"] * np.nan) is None


# ------------------------------------------------------------------------------------------------ planted behaviour


@pytest.mark.parametrize("base", [0.3, 0.5, 0.8])
def test_planted_win_rate_lies_in_its_interval(study: StudyConfig, base: float) -> None:
    plan = behaviour(base, 0.6)
    found = joined(study, [plan], seed=3)
    for arms in (BASE, DPO):
        record = rate(study, found, arms)
        assert record["votes"] == 204 and record["raters"] == 12 and record["pairs"] == 34
        assert record["wins"] + record["ties"] + record["losses"] == 204
        assert record["win_rate_low"] < plan.win_rate(arms) < record["win_rate_high"]
        assert record["win_rate_robust_low"] < plan.win_rate(arms) < record["win_rate_robust_high"]
        assert record["tie_free_low"] < plan.tie_free(arms) < record["tie_free_high"]
        assert record["win_rate_high"] - record["win_rate_low"] < 0.25
        assert record["tie_free"] == pytest.approx(record["wins"] / (record["wins"] + record["losses"]))
    record = rate(study, found, BASE)
    told = record["win_rate_low"] > 0.5 or record["win_rate_high"] < 0.5
    assert told == (base != 0.5) and (record["p"] < 0.05) == told


def test_a_shift_that_is_not_there_is_not_found(study: StudyConfig) -> None:
    """Biased and careless raters, sides balanced: the win rate of equal methods stays at one half."""
    found = joined(study, [behaviour(0.5, 0.5, left_bias=0.5)], seed=1)
    record = rate(study, found, BASE)
    assert record["win_rate_low"] < 0.5 < record["win_rate_high"]


def test_side_bias_is_detected(study: StudyConfig) -> None:
    fair = measure(joined(study, [behaviour()], seed=2), "left_share")
    assert fair["value_low"] < 0.5 < fair["value_high"]
    plan = behaviour(left_bias=0.3)
    biased = measure(joined(study, [plan], seed=2), "left_share")
    assert biased["value_low"] > 0.5
    assert biased["value_low"] < plan.left_share() < biased["value_high"]


def test_one_sided_rater_is_found_among_fair_ones(study: StudyConfig) -> None:
    found = joined(study, [behaviour(left_bias=0.9), *[behaviour()] * 11], seed=4)
    facts = rater_facts(found, LARGE["exclusions"])
    assert facts[0]["left_share"] > 0.85 and facts[0]["left_p"] < 1e-4
    assert min(fact["left_p"] for fact in facts[1:]) > 1e-3


def test_ties_and_repeats_are_counted(study: StudyConfig) -> None:
    plan = behaviour(tie_rate=0.4)
    found = joined(study, [plan], seed=5)
    tie = measure(found, "tie_share")
    assert tie["value_low"] < 0.4 < tie["value_high"]
    # A simulated rater keeps an opinion, so a fair one answers every repeat as before, whatever the sides.
    assert measure(found, "repeat_consistency")["value"] == 1.0
    assert measure(found, "attention_failures")["value"] == 0.0
    careless = joined(study, [behaviour(careless=1.0)], seed=5)
    assert 0.2 < measure(careless, "repeat_consistency")["value"] < 0.8
    assert 0.2 < measure(careless, "attention_failures")["value"] < 0.8


def test_alpha_follows_how_far_raters_agree(study: StudyConfig) -> None:
    apart = measure(joined(study, [behaviour(0.5, 0.5, tie_rate=0.0)], seed=6), "alpha")
    assert apart["value_low"] < 0 < apart["value_high"] or abs(apart["value"]) < 0.05
    agreed = measure(joined(study, [behaviour(0.5, 0.5, tie_rate=0.0, pair_correlation=0.6)], seed=6), "alpha")
    assert agreed["value_low"] < 0.6 < agreed["value_high"] and agreed["value"] > 0.4
    same = joined(study, [behaviour(0.5, 0.5, tie_rate=0.0, pair_correlation=0.98)], seed=6)
    assert measure(same, "rater_agreement")["value"] > 0.95


def test_exclusions_follow_the_frozen_rules_and_move_the_result(study: StudyConfig) -> None:
    """Careless raters dilute the win rate; without them it is the planted one."""
    plan = behaviour(0.9, 0.9)
    found = joined(study, [plan, behaviour(careless=1.0)], seed=7)
    facts = rater_facts(found, LARGE["exclusions"])
    excluded = {fact["rater"] for fact in facts if fact["excluded"]}
    careless = {fact["rater"] for number, fact in enumerate(facts) if number % 2}
    assert len(careless) == 6 and excluded <= careless and len(excluded) >= 4
    assert any("attention" in fact["excluded"] for fact in facts)
    everyone, kept = rate(study, found, BASE), rate(study, found.without(excluded), BASE)
    assert kept["raters"] == 12 - len(excluded)
    assert everyone["win_rate"] < kept["win_rate"] and everyone["win_rate_high"] < plan.win_rate(BASE) + 0.05
    assert (
        rater_facts(found, {"max_attention_failures": 9, "min_repeat_consistency": 0, "min_median_ms": 0})[1][
            "excluded"
        ]
        == ""
    )


def test_too_fast_raters_are_excluded(study: StudyConfig) -> None:
    found = joined(study, [behaviour(median_ms=300), behaviour()], seed=8)
    facts = rater_facts(found, LARGE["exclusions"])
    assert [fact["excluded"] for fact in facts] == ["too fast", ""] * 6


def test_agreement_with_scores_knows_which_score_raters_follow(study: StudyConfig) -> None:
    """Raters who choose the picture with the higher CLIP score agree with it always, with noise half of the time."""
    rows = votes(study, [behaviour(tie_rate=0.0)], seed=9)
    key = json.loads(Places(study).key.read_text())["images"]
    manifest = json.loads((Places(study).bundle / "manifest.json").read_text())
    shown = {pair["pair"]: [key[token]["scores"]["clip"] for token in pair["images"]] for pair in manifest["pairs"]}
    rows["choice"] = [
        "left" if shown[pair][left] > shown[pair][1 - left] else "right"
        for pair, left in zip(rows["pair"], rows["left"], strict=True)
    ]
    found = read_votes(write_votes(study, rows), Places(study))[0]
    assert found.scorers == ["pickscore", "clip", "aesthetic"]
    assert measure(found, "agreement_clip")["value"] == 1.0
    pickscore, aesthetic = (measure(found, f"agreement_{name}") for name in ("pickscore", "aesthetic"))
    assert pickscore["value_low"] > 0.5 and aesthetic["value_low"] < 0.5 < aesthetic["value_high"]


def test_strengths_put_all_methods_on_one_scale(study: StudyConfig) -> None:
    found = joined(study, [behaviour(0.8, 0.6)], seed=10)
    order = sorted(found.arms.items(), key=lambda item: item[1] != BASE)
    fits = strengths(found.trials(), dict(order))
    assert fits is not None and list(fits) == ["gecko_inverted", "marmot_dpo", "tie"]
    inverted, dpo = np.log(0.8 / 0.2), np.log(0.8 / 0.2) - np.log(0.6 / 0.4)
    assert fits["gecko_inverted"].low < inverted < fits["gecko_inverted"].high
    assert fits["marmot_dpo"].low < dpo < fits["marmot_dpo"].high
    assert fits["gecko_inverted"].high - fits["gecko_inverted"].low < 2
    one = {name: arms for name, arms in found.arms.items() if arms == BASE}
    assert strengths(found.trials(), one) is None, "two methods need no scale"
    apart = {"A": ("a", "b"), "B": ("c", "d")}
    assert strengths(found.trials(), apart) is None, "nothing connects these"


# ------------------------------------------------------------------------------------------------ tables and files


def test_tables_stand_beside_the_paper(study: StudyConfig, tmp_path: Path) -> None:
    careful, fast = behaviour(0.75, 0.6), behaviour(median_ms=200)
    path = write_votes(study, votes(study, [careful] * 5 + [fast]))
    paths = analyse(study, path, tmp_path / "out")
    assert sorted(p.name for p in paths) == sorted(
        [f"{name}.{suffix}" for name in ("table_s4", "user_study") for suffix in ("csv", "md", "tex")]
        + ["user_study.json"]
    )
    table = pd.read_csv(tmp_path / "out" / "table_s4.csv").set_index(["raters_used", "arm", "baseline"])
    ours, theirs = table[table["source"] == "this study"], table[table["source"] == "paper"]
    assert list(ours["paper"]) == [0.6653, 0.7267] * 2 and list(ours["raters"]) == [12, 12, 10, 10]
    assert list(theirs["win_rate"]) == [0.6653, 0.7267] and set(theirs["pairs"]) == {500}
    assert table.index[0] == ("all", "gecko_inverted", "walrus_base"), "the base model comes first, as in the paper"
    text = (tmp_path / "out" / "table_s4.md").read_text()
    assert "66.53 %" in text and "72.67 %" in text and "Davidson" in text
    assert "| Inversion-DPO against SDXL | 0.3347 | 0.6653 | 500 | gecko_inverted against walrus_base |" in text
    text = (tmp_path / "out" / "user_study.md").read_text()
    assert "too fast" in text and "PickScore" in text and "Krippendorff" in text
    content = json.loads((tmp_path / "out" / "user_study.json").read_text())
    assert content["exclusions"] == LARGE["exclusions"] and len(content["raters"]) == 12
    numbers = set(pd.read_csv(path, dtype=str)["rater"])
    assert not [(p.name, number) for p in paths for number in numbers if number in p.read_text()], "who took part"
    before = {p.name: p.read_bytes() for p in paths if p.suffix != ".json"}
    analyse(study, path, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in paths if p.suffix != ".json"} == before
    again = table_s4.write(study, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in again} == {p.name: before[p.name] for p in again}, "from the counts alone"


def test_without_votes_table_s4_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(prompts=2)
    resolved = tmp_path / "study.json"
    resolved.write_text(dump_study(study))
    folder = study.root / "tables"
    folder.mkdir()
    counted = folder / "user_study.json"
    counted.write_text("of votes that were deleted since")
    command = ["study", "analyse", "--study", str(resolved)]

    def check() -> None:
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        assert sorted(path.name for path in folder.iterdir()) == [f"table_s4.{kind}" for kind in ("csv", "md", "tex")]
        rows = pd.read_csv(folder / "table_s4.csv")
        assert list(rows["status"][:2]) == ["not run: `make user-study`, then `make user-study-analysis`"] * 2
        assert list(rows["paper"][:2]) == list(rows["win_rate"][2:]) == [0.6653, 0.7267]
        assert rows["win_rate"][:2].isna().all() and rows["raters_used"].isna().all()
        line = next(line for line in (folder / "table_s4.md").read_text().splitlines() if "walrus_base" in line)
        assert "`make user-study-analysis`" in line and line.endswith("66.53 % |")

    check()
    Places(study).votes.parent.mkdir()
    Places(study).votes.write_text("rater,slot,index\n")  # an export without a vote
    counted.write_text("of votes that were deleted since")
    check()
    wrong = CliRunner().invoke(app, [*command, "--votes", str(tmp_path / "mine.csv")])
    assert isinstance(wrong.exception, InvdpoError) and "mine.csv is missing" in str(wrong.exception)


def test_a_study_that_asks_something_else_says_so_beside_the_papers_comparisons(study: StudyConfig) -> None:
    asked = settings(groups=[{"arms": ["walrus_base", "marmot_dpo"], "pairs": 4}])
    table = table_s4.table_s4(study.model_copy(update={"user_study": asked}), None)
    assert [record["paper"] for record in table.records[:1]] == [None]
    assert {record["status"] for record in table.records[1:]} == {"not run: no such group in `user_study`"}


def test_unfinished_and_single_raters_are_analysed(study: StudyConfig, tmp_path: Path) -> None:
    rows = votes(study, [behaviour()])
    analyse(study, write_votes(study, rows[rows["rater"] == rows["rater"][0]].head(9)), tmp_path)
    table = pd.read_csv(tmp_path / "table_s4.csv")
    assert table["votes"].sum() > 0 and table["win_rate_robust_low"].isna().all()
    only_practice = rows[rows["kind"] == "practice"]
    analyse(study, write_votes(study, only_practice), tmp_path)
    assert pd.read_csv(tmp_path / "table_s4.csv")["votes"].sum() == 0


def test_problems_are_no_votes(study: StudyConfig) -> None:
    rows = votes(study, [behaviour()])
    rows.loc[rows["rater"] == rows["rater"][0], "choice"] = "problem"
    found = read_votes(write_votes(study, rows), Places(study))[0]
    records = win_rates(found)
    assert sum(r["votes"] for r in records) + sum(r["problems"] for r in records) == 408
    assert sum(r["problems"] for r in records) == 34 and records[0]["raters"] == 12
    assert measure(found, "problem_share")["value"] == pytest.approx(34 / 408)


def test_wrong_exports_are_refused(study: StudyConfig, tmp_path: Path) -> None:
    places, rows = Places(study), votes(study, [behaviour()])
    for wrong, words in (
        (pd.concat([rows, rows.head(1)]), "voted twice on trial 0"),
        (rows.head(0), "holds no vote yet"),
        (rows.assign(bundle="f" * 64), "whose key is neither"),
        (rows.assign(bundle=["e" * 64, *rows["bundle"][1:]]), "mixes votes on 2 bundles"),
        (rows.assign(pair="0" * 32), "unknown to the bundle"),
    ):
        with pytest.raises(InvdpoError, match=words):
            read_votes(write_votes(study, wrong), places)
    with pytest.raises(InvdpoError, match="is missing"):
        read_votes(tmp_path / "votes.csv", places)


def test_votes_on_a_replaced_bundle_are_still_analysed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INVDPO_USER_STUDY_DB", raising=False)
    study = make_study()
    build(study)
    rows = votes(study, [behaviour()])
    expected = win_rates(read_votes(write_votes(study, rows), Places(study))[0])
    build(study.model_copy(update={"user_study": settings(seed=99)}))
    assert win_rates(read_votes(Places(study).votes, Places(study))[0]) == expected


# ------------------------------------------------------------------------------------------------ through the server


def test_simulated_raters_vote_through_the_real_interface(study: StudyConfig, tmp_path: Path) -> None:
    """The votes that the server stores and exports are those that the same raters give without a server."""
    places, plan = Places(study), behaviour(0.8, 0.4, left_bias=0.1, careless=0.1)
    given = simulate(places.bundle, places.key, [plan], 12, 11, tmp_path / "votes.csv")
    exported, direct = pd.read_csv(tmp_path / "votes.csv"), votes(study, [plan], seed=11)
    columns = ["slot", "index", "pair", "group", "kind", "repeat_of", "left", "choice", "response_ms", "bundle"]
    assert given == len(exported)
    pd.testing.assert_frame_equal(
        exported[columns].sort_values(["slot", "index"], ignore_index=True), direct[columns], check_dtype=False
    )
    found = read_votes(tmp_path / "votes.csv", places)[0]
    for arms in (BASE, DPO):
        record = rate(study, found, arms)
        assert record["votes"] == 204
        assert record["win_rate_low"] < plan.win_rate(arms) < record["win_rate_high"]
    assert rate(study, found, BASE)["win_rate_low"] > 0.5
    left = measure(found, "left_share")
    assert left["value_low"] < plan.left_share() < left["value_high"]


def test_driver_notices_a_wrong_image(study: StudyConfig) -> None:
    places = Places(study)
    world = World(places.bundle, places.key, 0)
    images = [path.read_bytes() for path in sorted((places.bundle / "images").iterdir())[:2]]
    with pytest.raises(InvdpoError, match="side by side"):
        world.see(images[0], images[0])
