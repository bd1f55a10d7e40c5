"""Sample grids: the paper's Figures 1, 4, 5, S6 and S10, of this study's pictures.

The paper's were picked by hand. Here a rule picks the prompts, written in each figure: quantiles of a difference of
scores, or of a score. All pictures are of the first training seed, and pictures of a row start from the same noise.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.figures import new_figure, placeholder, save, short_title
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
LABEL, TITLE, LINE = 1.65, 0.75, 0.13  # inches: width of the prompts, height above the pictures, height of a score


def at_quantiles(values: np.ndarray, quantiles: Sequence[float]) -> list[int]:
    """Indices of the values (n,) nearest to those quantiles, in their order, none twice."""
    order = np.argsort(values, kind="stable")
    return list(dict.fromkeys(int(order[round(quantile * (len(order) - 1))]) for quantile in quantiles))


def evenly(count: int) -> list[float]:
    """`count` quantiles from the highest value to the lowest."""
    return np.linspace(1, 0, count).tolist()


def fig1(evidence: Evidence) -> Figure:
    """All arms of the grid: prompts from the best gain of the last arm over the first to its worst loss."""
    grids = evidence.study.experiments.grids
    return _compared(evidence, evidence.primary, evenly(grids.prompts if grids else 1), ("pickscore", evidence.primary))


def fig4(evidence: Evidence) -> Figure:
    """Details, which the aesthetic score judges: the pictures are larger."""
    return _compared(evidence, "aesthetic", ENDS, ("aesthetic",), size=1.9)


def fig5(evidence: Evidence) -> Figure:
    """Composition: prompts with a scene graph, and how much of it is in each picture."""
    scores = ("oracle_sg_iou", "oracle_entity_iou", "oracle_relation_iou")
    return _compared(evidence, "oracle_sg_iou", SPREAD, scores)


def fig_s6(evidence: Evidence) -> Figure:
    """More pictures of the last arm of the grid, from its best to its worst."""
    arms, scorer = _arms(evidence), evidence.primary
    if not arms or not evidence.has(arms[-1], scorer):
        return placeholder("The last arm of `experiments.grids` has no images")
    arm = arms[-1]
    final, judged = evidence.final(arm, scorer)[0], evidence.scores[arm].judged[scorer]
    chosen = [judged[place] for place in at_quantiles(final, evenly(EXAMPLES))]
    columns, size = 6, 1.3
    rows = -(-len(chosen) // columns)
    width, cell, head = columns * size, size + 0.55, 0.45
    height = head + rows * cell
    figure, axes = new_figure(width, height, rows, columns)
    pictures = _pictures(evidence.study, arm)
    for place, panel in enumerate(axes.flat):
        row, column = divmod(place, columns)
        top = 1 - (head + row * cell) / height
        panel.set_position(((column * size + 0.04) / width, top - size / height, (size - 0.08) / width, size / height))
        panel.axis("off")
        if place < len(chosen):
            _draw(panel, pictures(evidence.scores[arm].prompts[chosen[place]]))
            words = [_value(evidence, arm, scorer, chosen[place]), evidence.scores[arm].texts[chosen[place]]]
            text = textwrap.fill(textwrap.shorten(" · ".join(words), 78, placeholder="…"), 27)
            panel.text(0.5, -0.02, text, transform=panel.transAxes, ha="center", va="top", fontsize=5.5)
    note = (
        f"{arm_title(arm)}: {len(chosen)} prompts at evenly spaced quantiles of its {scorer_title(scorer)}, best first."
    )
    figure.text(0.06 / width, 1 - 0.08 / height, note, va="top", fontsize=7)
    return figure


def fig_s10(evidence: Evidence) -> Figure:
    """Failures: the prompts with the lowest scores of the last arm of the grid, and what the others make of them."""
    arms, scorer = _arms(evidence), evidence.primary
    arms = [arm for arm in arms if evidence.has(arm, scorer)]
    if not arms:
        return placeholder("No arm of `experiments.grids` has images")
    final, judged = evidence.final(arms[-1], scorer)[0], evidence.scores[arms[-1]].judged[scorer]
    chosen = [judged[place] for place in np.argsort(final, kind="stable")[:FAILURES]]
    rule = f"Rows: the {len(chosen)} prompts with the last column's lowest {scorer_title(scorer)}."
    return _sheet(evidence, arms, chosen, ("pickscore", scorer), rule)


def _compared(
    evidence: Evidence, scorer: str, quantiles: Sequence[float], shown: Sequence[str], size: float = 1.25
) -> Figure:
    """A column an arm, a row a prompt: at those quantiles of a score's difference, last arm minus first."""
    arms = [arm for arm in _arms(evidence) if evidence.has(arm, scorer)]
    if len(arms) < 2:
        return placeholder(f"Fewer than two arms of `experiments.grids` have images and {scorer_title(scorer)}")
    first, last = evidence.paired(arms[0], arms[-1], scorer)
    judged = evidence.scores[arms[0]].judged[scorer]
    chosen = [judged[place] for place in at_quantiles((last - first)[0], quantiles)]
    where = (
        "evenly spaced quantiles"
        if list(quantiles) == evenly(len(quantiles))
        else "the " + ", ".join(f"{quantile:.0%}" for quantile in quantiles).replace("%", "th") + " percentiles"
    )
    rule = f"Rows: {where} of the gain in {scorer_title(scorer)}, last column over first."
    return _sheet(evidence, arms, chosen, shown, rule, size)


def _sheet(
    evidence: Evidence, arms: Sequence[str], chosen: Sequence[int], shown: Sequence[str], rule: str, size: float = 1.25
) -> Figure:
    """Pictures of `arms` for the prompts at the places `chosen`, each with its scores `shown` below it."""
    shown = [name for name in dict.fromkeys(shown) if all(evidence.has(arm, name) for arm in arms)]
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
            _draw(panel, pictures(scores.prompts[prompt]))
            values = "\n".join(_value(evidence, arm, name, prompt) for name in shown)
            panel.text(0.5, -0.03, values, transform=panel.transAxes, ha="center", va="top", fontsize=6.5)
            if row == 0:
                panel.set_title(short_title(arm), fontsize=7.5)
    for row, prompt in enumerate(chosen):
        text = textwrap.shorten(evidence.scores[arms[0]].texts[prompt], 130, placeholder="…")
        middle = 1 - (TITLE + cell * row + size / 2) / height
        figure.text(0.06 / width, middle, textwrap.fill(text, 24), ha="left", va="center", fontsize=7.5)
    names = ", ".join(scorer_title(name) for name in shown)
    note = "\n".join(textwrap.wrap(f"Under each picture: {names}. {rule}", int(width * 15)))
    figure.text(0.06 / width, 1 - 0.08 / height, note, va="top", fontsize=7)
    return figure


def _arms(evidence: Evidence) -> list[str]:
    """Arms of the grid that have pictures."""
    grids = evidence.study.experiments.grids
    return [arm for arm in grids.arms if _images(evidence.study, arm)] if grids else []


def _images(study: StudyConfig, arm: str) -> Path | None:
    """The images of the arm's first seed; the base model has seed 0 alone."""
    names = [*(f"seed{seed}" for seed in study.seeds), "seed0"]
    paths = [study.root / "images" / arm / f"{name}.parquet" for name in names]
    return next((path for path in paths if path.exists()), None)


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


def _draw(panel: Axes, png: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        panel.imshow(np.asarray(image.convert("RGB")), interpolation="nearest", aspect="equal")


def _value(evidence: Evidence, arm: str, scorer: str, prompt: int) -> str:
    """A score as printed; a dash where the prompt has none."""
    judged = evidence.scores[arm].judged[scorer]
    return f"{evidence.final(arm, scorer)[0, judged.index(prompt)]:.3g}" if prompt in judged else "–"


def write(study: StudyConfig) -> list[Path]:
    """Write root/figures/{fig1,fig4,fig5,fig_s6,fig_s10}.{pdf,png}; the paths written."""
    evidence = load_evidence(study)
    written = []
    for draw in (fig1, fig4, fig5, fig_s6, fig_s10):
        written += save(draw(evidence), study.root / "figures", draw.__name__)
    return written
