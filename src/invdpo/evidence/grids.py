"""Sample grids: the paper's Figures 1, 4, 5, S6 and S10, of this study's pictures.

The paper's were picked by hand. Here a rule picks the prompts, written in each figure: quantiles of a difference of
scores, or of a score, beside each of which stands where it lies. All pictures are of the first training seed, and
pictures of a row start from the same noise.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.figures import GREY, new_figure, placeholder, save, short_title
from invdpo.evidence.load import Evidence, arm_title, load_evidence, scorer_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invdpo.config import StudyConfig

Key = tuple[str, str]  # prompt set and prompt id
ENDS = (0.95, 0.5, 0.05)  # what a reader shall see of a distribution: near its best, its middle, near its worst
SPREAD = (0.95, 0.75, 0.5, 0.25, 0.05)
EXAMPLES = 24
FAILURES = 6
SMALL, LARGE = 1.25, 1.9  # inches of a picture
LABEL, TITLE, LINE = 1.65, 0.75, 0.13  # inches: width of the prompts, height above the pictures, height of a score


def at_quantiles(values: np.ndarray, quantiles: Sequence[float]) -> list[int]:
    """Indices of the values (n,) nearest to those quantiles, in their order, none twice."""
    order = np.argsort(values, kind="stable")
    return list(dict.fromkeys(int(order[round(quantile * (len(order) - 1))]) for quantile in quantiles))


def evenly(count: int) -> list[float]:
    """`count` quantiles from the highest value to the lowest."""
    return np.linspace(1, 0, count).tolist()


@dataclass(frozen=True)
class Choice:
    """What a figure shows: a column an arm, a row a prompt (its place among the arm's prompts), scores below a picture.

    places: of each prompt, which quantile it is and what is ranked. rule: how the prompts were chosen, or why there is
    nothing to show where `arms` is empty.
    """

    arms: Sequence[str] = ()
    prompts: Sequence[int] = ()
    shown: Sequence[str] = ()
    places: Sequence[Sequence[str]] = ()
    rule: str = ""


def choose_fig1(evidence: Evidence) -> Choice:
    """Prompts from the best primary gain of the last arm over the first to its worst loss."""
    grids = evidence.study.experiments.grids
    return _by_gain(evidence, evidence.primary, evenly(grids.prompts if grids else 1), ("pickscore", evidence.primary))


def choose_fig4(evidence: Evidence) -> Choice:
    """Details, which the aesthetic score judges."""
    return _by_gain(evidence, "aesthetic", ENDS, ("aesthetic",))


def choose_fig5(evidence: Evidence) -> Choice:
    """Composition: prompts with a scene graph, and how much of it is in each picture."""
    scores = ("oracle_sg_iou", "oracle_entity_iou", "oracle_relation_iou")
    return _by_gain(evidence, "oracle_sg_iou", SPREAD, scores)


def choose_fig_s6(evidence: Evidence) -> Choice:
    """More pictures of the last arm of the grid, from its best to its worst."""
    if not (arms := _arms(evidence, evidence.primary)):
        return Choice(rule="No arm of `experiments.grids` has images")
    final, judged = _final(evidence, arms[-1], evidence.primary)
    found = at_quantiles(final, evenly(EXAMPLES))
    rule = f"prompts at {len(found)} evenly spaced quantiles of its {scorer_title(evidence.primary)}, best first."
    places = [[percentile(final, place)] for place in found]
    rule = f"{arm_title(arms[-1])}, {_seeds(evidence.study, arms[-1:])}: {rule} Below each: the score, its percentile."
    return Choice(arms[-1:], [judged[place] for place in found], (evidence.primary,), places, rule)


def choose_fig_s10(evidence: Evidence) -> Choice:
    """Failures: the prompts with the lowest scores of the last arm of the grid, and what the others make of them."""
    scorer = evidence.primary
    if not (arms := _arms(evidence, scorer)):
        return Choice(rule="No arm of `experiments.grids` has images")
    final, judged = _final(evidence, arms[-1], scorer)
    found = np.argsort(final, kind="stable")[:FAILURES].tolist()
    places = [[percentile(final, place), f"{scorer_title(scorer)} {final[place]:.3g}"] for place in found]
    rule = f"Rows: the {len(found)} prompts of {len(final)} with the last column's lowest {scorer_title(scorer)}."
    return Choice(arms, [judged[place] for place in found], ("pickscore", scorer), places, rule)


CHOICES = {
    "fig1": choose_fig1,
    "fig4": choose_fig4,
    "fig5": choose_fig5,
    "fig_s6": choose_fig_s6,
    "fig_s10": choose_fig_s10,
}


def pictured(evidence: Evidence) -> dict[Path, list[Key]]:
    """Every image file that a figure draws from, with the prompts whose images it shows, in their order."""
    shown: dict[Path, set[Key]] = {}
    for choose in CHOICES.values():
        choice = choose(evidence)
        for arm in choice.arms:
            path = _images(evidence.study, arm)
            assert path is not None, "only arms with images are chosen"
            shown.setdefault(path, set()).update(evidence.scores[arm].prompts[place] for place in choice.prompts)
    return {path: sorted(keys) for path, keys in shown.items()}


def draw(evidence: Evidence, name: str) -> Figure:
    """One of the figures of CHOICES."""
    choice = CHOICES[name](evidence)
    if not choice.arms:
        return placeholder(choice.rule)
    if name == "fig_s6":
        return _contact_sheet(evidence, choice)
    return _sheet(evidence, choice, LARGE if name == "fig4" else SMALL)


def _by_gain(evidence: Evidence, scorer: str, quantiles: Sequence[float], shown: Sequence[str]) -> Choice:
    """Prompts at those quantiles of a score's difference, last arm of the grid minus the first."""
    arms = _arms(evidence, scorer)
    if len(arms) < 2:
        return Choice(rule=f"Fewer than two arms of `experiments.grids` have images and {scorer_title(scorer)}")
    first, last = evidence.paired(arms[0], arms[-1], scorer)
    _, judged = _final(evidence, arms[0], scorer)
    gain = (last - first)[_row(evidence, arms[0], arms[-1])]
    found = at_quantiles(gain, quantiles)
    places = [[percentile(gain, place), f"{scorer_title(scorer)} {gain[place]:+.3g}"] for place in found]
    where = (
        "evenly spaced quantiles"
        if list(quantiles) == evenly(len(quantiles))
        else "nearest to the " + ", ".join(ordinal(round(100 * quantile)) for quantile in quantiles) + " percentiles"
    )
    rule = f"Rows: {where} of the gain in {scorer_title(scorer)} of {len(gain)} prompts, last column over first."
    return Choice(arms, [judged[place] for place in found], shown, places, rule)


def percentile(values: np.ndarray, place: int) -> str:
    """Where a value stands among all (n,) of them, from the 0th (lowest) to the 100th percentile, in words."""
    below = np.argsort(np.argsort(values, kind="stable"))[place]
    return f"{ordinal(round(100 * below / max(1, len(values) - 1)))} percentile"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _seeds(study: StudyConfig, arms: Sequence[str]) -> str:
    trained = any(study.arm(arm).trains for arm in arms)
    return f"training seed {study.seeds[0]}" if trained else "not trained here"


def _row(evidence: Evidence, *arms: str) -> int:
    """The place of the training seed that is shown among the seeds of these arms' scores."""
    trained = [evidence.scores[arm] for arm in arms if evidence.scores[arm].trained]
    return trained[0].seeds.index(evidence.study.seeds[0]) if trained else 0


def _final(evidence: Evidence, arm: str, scorer: str) -> tuple[np.ndarray, list[int]]:
    """Scores of the seed that is shown at the last checkpoint, and the places of their prompts."""
    return evidence.final(arm, scorer)[_row(evidence, arm)], evidence.scores[arm].judged[scorer]


def _contact_sheet(evidence: Evidence, choice: Choice) -> Figure:
    """Pictures of one arm, each with its score and prompt below it."""
    (arm,), (scorer,) = choice.arms, choice.shown
    columns, size = 6, 1.3
    rows = -(-len(choice.prompts) // columns)
    width, cell, head = columns * size, size + 0.55, 0.45
    height = head + rows * cell
    figure, axes = new_figure(width, height, rows, columns)
    pictures, scores = _pictures(evidence.study, arm), evidence.scores[arm]
    for place, panel in enumerate(axes.flat):
        row, column = divmod(place, columns)
        top = 1 - (head + row * cell) / height
        panel.set_position(((column * size + 0.04) / width, top - size / height, (size - 0.08) / width, size / height))
        panel.axis("off")
        if place < len(choice.prompts):
            prompt = choice.prompts[place]
            _show(panel, pictures(scores.prompts[prompt]))
            first = " · ".join([_value(evidence, arm, scorer, prompt), *choice.places[place]])
            text = textwrap.fill(textwrap.shorten(scores.texts[prompt], 78, placeholder="…"), 27)
            panel.text(0.5, -0.02, f"{first}\n{text}", transform=panel.transAxes, ha="center", va="top", fontsize=5.5)
    note = "\n".join(textwrap.wrap(choice.rule, int(width * 15)))
    figure.text(0.06 / width, 1 - 0.08 / height, note, va="top", fontsize=7)
    return figure


def _sheet(evidence: Evidence, choice: Choice, size: float) -> Figure:
    """Pictures in rows and columns, each with its scores below it; size: of a picture, in inches."""
    arms, chosen = choice.arms, choice.prompts
    shown = [name for name in dict.fromkeys(choice.shown) if all(evidence.has(arm, name) for arm in arms)]
    cell = size + LINE * len(shown) + 0.06
    width, height = LABEL + size * len(arms), TITLE + cell * len(chosen)
    figure, axes = new_figure(width, height, len(chosen), len(arms))
    for column, arm in enumerate(arms):
        pictures, scores = _pictures(evidence.study, arm), evidence.scores[arm]
        for row, prompt in enumerate(chosen):
            panel = axes[row, column]
            left, top = LABEL + size * column + 0.03, TITLE + cell * row + size - 0.03
            panel.set_position((left / width, 1 - top / height, (size - 0.06) / width, (size - 0.06) / height))
            panel.axis("off")
            _show(panel, pictures(scores.prompts[prompt]))
            values = "\n".join(_value(evidence, arm, name, prompt) for name in shown)
            panel.text(0.5, -0.03, values, transform=panel.transAxes, ha="center", va="top", fontsize=6.5)
            if row == 0:
                panel.set_title(short_title(arm), fontsize=7.5)
    for row, prompt in enumerate(chosen):
        text = textwrap.shorten(evidence.scores[arms[0]].texts[prompt], 130, placeholder="…")
        middle = 1 - (TITLE + cell * row + size / 2) / height
        figure.text(0.06 / width, middle, textwrap.fill(text, 24), ha="left", va="center", fontsize=7.5)
        upper = 1 - (TITLE + cell * row + 0.03) / height
        figure.text(0.06 / width, upper, "\n".join(choice.places[row]), va="top", fontsize=6.5, color=GREY)
    names = ", ".join(scorer_title(name) for name in shown)
    seeds = _seeds(evidence.study, arms).capitalize()
    note = "\n".join(textwrap.wrap(f"{seeds}. Under each picture: {names}. {choice.rule}", int(width * 15)))
    figure.text(0.06 / width, 1 - 0.08 / height, note, va="top", fontsize=7)
    return figure


def _arms(evidence: Evidence, scorer: str) -> list[str]:
    """Arms of the grid that have pictures and that score."""
    grids = evidence.study.experiments.grids
    return [arm for arm in grids.arms if _images(evidence.study, arm) and evidence.has(arm, scorer)] if grids else []


def _images(study: StudyConfig, arm: str) -> Path | None:
    """The images of the arm's first training seed; one that does not train has files of seed 0 alone."""
    path = study.root / "images" / arm / f"seed{study.seeds[0] if study.arm(arm).trains else 0}.parquet"
    return path if path.exists() else None


def _pictures(study: StudyConfig, arm: str) -> Callable[[Key], bytes]:
    """The last checkpoint's PNG of each prompt."""
    path = _images(study, arm)
    assert path is not None, "arms without images are not drawn"
    frame = pd.read_parquet(path, columns=["step", "prompt_set", "prompt_id", "png"])
    frame = frame[frame["step"] == frame["step"].max()]
    stored = frame.set_index([frame["prompt_set"].astype(str), frame["prompt_id"].astype(str)])["png"].to_dict()

    def picture(key: Key) -> bytes:
        if key not in stored:
            raise InvdpoError(f"{path}: no image of prompt {key}. Evaluate {arm} again.")
        return stored[key]

    return picture


def _show(panel: Axes, png: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        panel.imshow(np.asarray(image.convert("RGB")), interpolation="nearest", aspect="equal")


def _value(evidence: Evidence, arm: str, scorer: str, prompt: int) -> str:
    """A score as printed; a dash where the prompt has none."""
    values, judged = _final(evidence, arm, scorer)
    return f"{values[judged.index(prompt)]:.3g}" if prompt in judged else "–"


def write(study: StudyConfig) -> list[Path]:
    """Write root/figures/{fig1,fig4,fig5,fig_s6,fig_s10}.{pdf,png}; the paths written."""
    evidence = load_evidence(study)
    written = []
    for name in CHOICES:
        written += save(draw(evidence, name), study, name)
    return written
