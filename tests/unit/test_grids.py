"""Sample grids: the rule picks the prompts, and each picture and score is that of its arm and prompt."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evidence_fixture import SPREAD, make_config, make_study, write_scores
from matplotlib.figure import Figure
from PIL import Image

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evidence import grids
from invdpo.evidence.load import load_evidence

ARMS = ("base", "diffusion_dpo", "inversion_dpo_implied")  # the columns of the fixture's grid
LAST = ARMS[-1]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cells(figure: Figure) -> list[list[str]]:
    """The scores below the pictures, a list a picture, as they are drawn: row by row."""
    return [panel.texts[0].get_text().split("\n") for panel in figure.axes if panel.texts]


def prompts_of(figure: Figure) -> list[int]:
    """The fixture's prompts end in their number."""
    return [int(text.get_text().split()[-1]) for text in figure.texts if "take" in text.get_text()]


def gain(study: StudyConfig, scorer: str) -> np.ndarray:
    first, last = load_evidence(study).paired(ARMS[0], LAST, scorer)
    return (last - first)[0]


def test_quantiles_are_found_from_the_best_to_the_worst_and_none_twice() -> None:
    values = np.array([0.0, 3.0, -2.0, 1.0, 9.0])
    assert grids.at_quantiles(values, grids.evenly(3)) == [4, 3, 2]
    assert grids.at_quantiles(np.array([1.0, 2.0]), grids.evenly(6)) == [1, 0]
    assert grids.at_quantiles(np.arange(101.0), grids.ENDS) == [95, 50, 5]


def test_figure_1_has_rows_at_quantiles_of_the_primary_gain_and_the_right_scores() -> None:
    study = make_study()
    evidence = load_evidence(study)
    figure = grids.draw(evidence, "fig1")
    expected = grids.at_quantiles(gain(study, "oracle_utility"), grids.evenly(4))
    keys = [int(evidence.scores["base"].prompts[place][1]) for place in expected]
    assert prompts_of(figure) == keys
    shown = cells(figure)
    assert len(shown) == 4 * len(ARMS)
    for row, place in enumerate(expected):
        for column, arm in enumerate(ARMS):
            scores = [f"{evidence.final(arm, name)[0, place]:.3g}" for name in ("pickscore", "oracle_utility")]
            assert shown[row * len(ARMS) + column] == scores


def test_a_picture_is_that_of_its_arm_and_prompt() -> None:
    study = make_study()
    figure = grids.draw(load_evidence(study), "fig4")
    rows = prompts_of(figure)
    for number, panel in enumerate(panel for panel in figure.axes if panel.images):
        prompt, arm = rows[number // len(ARMS)], ARMS[number % len(ARMS)]
        images = pd.read_parquet(study.root / "images" / arm / "seed0.parquet").set_index("prompt_id")
        stored = np.asarray(Image.open(io.BytesIO(images.loc[prompt, "png"])))
        assert np.array_equal(np.asarray(panel.images[0].get_array()), stored)


def test_figure_4_goes_by_the_aesthetic_gain_alone() -> None:
    study = make_study()
    figure = grids.draw(load_evidence(study), "fig4")
    keys = [int(key) for _, key in load_evidence(study).scores["base"].prompts]
    assert prompts_of(figure) == [keys[place] for place in grids.at_quantiles(gain(study, "aesthetic"), grids.ENDS)]
    note = " ".join(figure.texts[-1].get_text().split())
    assert "95th, 50th, 5th percentiles of the gain in Aesthetic of 24 prompts" in note and "Training seed 0." in note


def places_of(figure: Figure) -> list[list[str]]:
    """What stands beside the rows, but for the prompts."""
    return [text.get_text().split("\n") for text in figure.texts if "percentile\n" in text.get_text()]


def test_every_row_says_which_percentile_it_is_and_what_it_gained() -> None:
    study = make_study(prompts=21)
    evidence = load_evidence(study)
    gains = gain(study, "aesthetic")
    expected = [
        [f"{words} percentile", f"Aesthetic {gains[place]:+.3g}"]
        for words, place in zip(("95th", "50th", "5th"), grids.at_quantiles(gains, grids.ENDS), strict=True)
    ]
    assert places_of(grids.draw(evidence, "fig4")) == expected
    lowest = places_of(grids.draw(evidence, "fig_s10"))
    final = np.sort(evidence.final(LAST, "oracle_utility")[0])
    assert lowest[:2] == [
        ["0th percentile", f"Oracle utility {final[0]:.3g}"],
        ["5th percentile", f"Oracle utility {final[1]:.3g}"],
    ]
    sheet = grids.draw(evidence, "fig_s6")
    assert [words[0].split(" · ")[1] for words in cells(sheet)[:2]] == ["100th percentile", "95th percentile"]
    assert "training seed 0" in sheet.texts[-1].get_text()


def test_percentiles_in_words() -> None:
    assert [grids.ordinal(number) for number in (0, 1, 2, 3, 11, 12, 13, 21, 92, 100)] == [
        "0th", "1st", "2nd", "3rd", "11th", "12th", "13th", "21st", "92nd", "100th",
    ]  # fmt: skip
    assert grids.percentile(np.array([5.0, 1.0, 3.0]), 2) == "50th percentile"
    assert grids.percentile(np.array([5.0]), 0) == "0th percentile"


def test_pictures_and_scores_are_of_the_studys_first_seed() -> None:
    config = make_config()
    study = make_study(prompts=8, study=config.model_copy(update={"seeds": [2, 0, 1]}))
    evidence = load_evidence(study)
    figure = grids.draw(evidence, "fig4")
    assert "Training seed 2." in figure.texts[-1].get_text()
    row = evidence.scores[LAST].seeds.index(2)
    gains = evidence.final(LAST, "aesthetic")[row] - evidence.final("base", "aesthetic")[0]
    assert places_of(figure)[0][1] == f"Aesthetic {gains[grids.at_quantiles(gains, grids.ENDS)[0]]:+.3g}"
    (study.root / "images" / LAST / "seed2.parquet").unlink()
    assert "Inversion" not in " ".join(axis.get_title() for axis in grids.draw(evidence, "fig4").axes)


def test_figure_5_leaves_out_prompts_without_a_scene_graph() -> None:
    study = make_study((*SPREAD, "oracle_sg_iou"))
    for path in study.root.glob("scores/*/*.parquet"):  # every second prompt has no relation
        frame = pd.read_parquet(path)
        write_scores(path, frame[(frame["scorer"] != "oracle_sg_iou") | (frame["prompt_id"] % 2 == 1)])
    evidence = load_evidence(study)
    figure = grids.draw(evidence, "fig5")
    assert len(prompts_of(figure)) == len(grids.SPREAD) and all(prompt % 2 for prompt in prompts_of(figure))
    judged = evidence.scores[LAST].judged["oracle_sg_iou"]
    place = grids.at_quantiles(gain(study, "oracle_sg_iou"), grids.SPREAD)[0]
    assert int(evidence.scores[LAST].prompts[judged[place]][1]) == prompts_of(figure)[0]
    assert cells(figure)[len(ARMS) - 1] == [f"{evidence.final(LAST, 'oracle_sg_iou')[0, place]:.3g}"]


def test_failures_are_the_lowest_scores_of_the_last_arm() -> None:
    study = make_study()
    evidence = load_evidence(study)
    final = evidence.final(LAST, "oracle_utility")[0]
    found = prompts_of(grids.draw(evidence, "fig_s10"))
    worst = [int(evidence.scores[LAST].prompts[place][1]) for place in np.argsort(final)[: grids.FAILURES]]
    assert found == worst


def test_more_samples_run_from_the_best_to_the_worst_of_the_last_arm() -> None:
    study = make_study(prompts=60)
    shown = cells(grids.draw(load_evidence(study), "fig_s6"))
    values = [float(words[0].split(" · ")[0]) for words in shown]
    assert len(values) == grids.EXAMPLES and values == sorted(values, reverse=True)
    final = load_evidence(study).final(LAST, "oracle_utility")[0]
    assert values[0] == float(f"{final.max():.3g}") and values[-1] == float(f"{final.min():.3g}")


def test_a_missing_picture_is_named() -> None:
    study = make_study()
    path = study.root / "images" / LAST / "seed0.parquet"
    pd.read_parquet(path).head(0).to_parquet(path)
    with pytest.raises(InvdpoError, match=f"{LAST}/seed0.parquet: no image of prompt"):
        grids.draw(load_evidence(study), "fig1")


@pytest.mark.parametrize("skip", [ARMS[1:], tuple(make_config().arms)])
def test_what_cannot_be_drawn_says_so(skip: tuple[str, ...]) -> None:
    study = make_study(skip=skip)
    assert len(grids.write(study)) == 10
    assert "Fewer than two arms" in grids.draw(load_evidence(study), "fig1").axes[0].texts[0].get_text()


def test_the_same_scores_and_pictures_give_the_same_bytes() -> None:
    study = make_study(tuple(SPREAD))

    def write() -> list[bytes]:
        return [path.read_bytes() for path in grids.write(study)]

    assert write() == write()
    assert {path.stem for path in (study.root / "figures").iterdir()} == {"fig1", "fig4", "fig5", "fig_s6", "fig_s10"}
