"""The study's figures as pdf and png: curves (Fig. 3, S7, S8), controls, inversion steps; `grids` has the pictures.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a method has the same colour in every figure,
and curves are named where they end instead of in a legend. Files carry no dates, so the same data gives the same bytes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdpo.evidence import paper
from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    comparison_arms,
    control_arms,
    load_evidence,
    scorer_title,
    step_families,
)
from invdpo.evidence.statistics import Interval, mean_interval, paired_difference
from invdpo.files import replace_when_done

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invdpo.config import StudyConfig

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#777777"
DARK_YELLOW = "#8a7d00"  # of words, and around lines: yellow alone is too pale on white
BASE_LINE = {"color": GREY, "linestyle": (0, (2, 2)), "linewidth": 1}
# Paul Tol's muted scheme, which readers without red-green vision can tell apart too, less what is too near the others.
OTHERS = ("#332288", "#44AA99", "#882255", "#999933", "#AA4499", "#DDCC77", "#CC6677", "#117733")
COLOURS = {
    "no_training": GREY,
    "diffusion_dpo": BLACK,
    "inversion_dpo_paper": VERMILION,
    "inversion_dpo_code": PURPLE,
    "inversion_dpo_implied": BLUE,
    "inversion_dpo_minus": YELLOW,
    "inversion_dpo_exact": SKY,
    "sft": ORANGE,
    "p_single": GREEN,
    "q_single": SKY,
}
# The curve figures of the paper, and the study's own on the primary score.
CURVES = {"fig3": "pickscore", "fig_s7": "aesthetic", "fig_s8": "clip", "fig_oracle": "primary"}


def method_colour(study: StudyConfig, arm: str) -> str:
    """The fixed colour of an arm's method; other methods share the remaining colours in the order of the study."""
    return colour_of(study.arms[arm].method, [entry.method for entry in study.arms.values()])


def colour_of(method: str, methods: list[str]) -> str:
    """The fixed colour of a recipe (a name or path), one of all `methods` that share a figure."""
    name = Path(method).stem
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in dict.fromkeys(Path(path).stem for path in methods) if other not in COLOURS]
    return OTHERS[others.index(name) % len(OTHERS)]


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure (inches) with a grid of axes, and the style of the study."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9,
            "axes.linewidth": 0.6,
            "axes.formatter.useoffset": False,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "pdf.fonttype": 42,
            "svg.hashsalt": "invdpo",
        }
    )
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return figure, axes


def framed(
    width: float,
    height: float,
    notes: Sequence[str],
    columns: int = 1,
    *,
    left: float,
    right: float,
    bottom: float,
    top: float,
    wspace: float = 0.2,
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure with a row of axes and these margins, in inches; notes stand below all of it and add to its height."""
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 16))]
    below = 0.14 * len(lines) + (0.06 if lines else 0)
    figure, axes = new_figure(width, height + below, 1, columns, **options)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=(bottom + below) / (height + below),
        top=1 - top / (height + below),
        wspace=wspace,
    )
    figure.text(0.1 / width, 0.06 / (height + below), "\n".join(lines), va="bottom", fontsize=7, color="#333333")
    return figure, axes


def not_drawn(evidence: Evidence, arms: Iterable[str | None], scorer: str) -> str:
    """Which of the arms have no curve of that score, and what of them is missing; empty where all have one."""
    known = dict.fromkeys(arm for arm in arms if arm is not None)
    lacking = [f"{arm_title(arm)} ({lack.what})" for arm in known if (lack := evidence.lack(arm, scorer))]
    return f"Not drawn: {'; '.join(lacking)}." if lacking else ""


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write folder/name.pdf and .png (150 dpi) without dates, and close the figure."""
    from matplotlib import pyplot

    paths = []
    for kind, metadata in (("pdf", {"CreationDate": None, "ModDate": None}), ("png", {"Software": None})):
        path = folder / f"{name}.{kind}"
        with replace_when_done(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
        paths.append(path)
    pyplot.close(figure)
    return paths


def placeholder(text: str) -> Figure:
    """A figure that says why there is nothing to draw, so that every declared file exists."""
    lines = textwrap.wrap(text, 90)
    figure, axes = new_figure(6, 1.4 + 0.14 * len(lines))
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, "\n".join(lines), ha="center", va="center", color=GREY)
    return figure


def spread_labels(positions: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Positions of labels of these heights, moved apart until they touch: as little as needed, in order, inside
    [low, high] if they fit.
    """
    order = np.argsort(positions, kind="stable")
    # Blocks of touching labels, each centred on the mean of what its labels want.
    blocks: list[list[int]] = []

    def places(block: list[int]) -> list[float]:
        """Of the labels, above the first."""
        steps = [(heights[a] + heights[b]) / 2 for a, b in pairwise(block)]
        return [0.0, *np.cumsum(steps).tolist()]

    def start(block: list[int]) -> float:
        above = places(block)
        wanted = float(np.mean([positions[i] - place for i, place in zip(block, above, strict=True)]))
        return max(low, min(wanted, high - above[-1]))

    for index in order:
        blocks.append([int(index)])
        while len(blocks) > 1:
            before, last = blocks[-2:]
            if start(last) >= start(before) + places([*before, last[0]])[-1] - 1e-12:
                break
            blocks[-2:] = [before + last]
    placed = [0.0] * len(positions)
    for block in blocks:
        for index, place in zip(block, places(block), strict=True):
            placed[index] = start(block) + place
    return placed


def short_title(arm: str) -> str:
    """The arm's title on short lines."""
    return arm_title(arm).replace(" (", "\n(").replace(", ", ",\n")


def _line(study: StudyConfig, arm: str) -> dict[str, Any]:
    """Line style of an arm: its method's colour; dashes for a variant of the method that is not the method itself."""
    from matplotlib.patheffects import withStroke

    same = [name for name in comparison_arms(study) if study.arms[name].method == study.arms[arm].method]
    styles = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))]
    markers = ["o", "s", "^", "D"]
    rank = same.index(arm) % len(styles)
    colour = method_colour(study, arm)
    edge = {"path_effects": [withStroke(linewidth=2.2, foreground=DARK_YELLOW)]} if colour == YELLOW else {}
    return {"color": colour, "linestyle": styles[rank], "marker": markers[rank], **edge}


def curve_intervals(evidence: Evidence, arm: str, base: str | None, scorer: str) -> list[Interval]:
    """Mean score at every checkpoint. The band is that of the paired gain over the base, drawn around the mean:

    how much prompts differ from each other is common to all curves and would only blur the comparison.
    """
    if base is None:
        return [mean_interval(table) for table in evidence.scores[arm].values[scorer]]
    curve, start = evidence.paired_curves(arm, base, scorer)
    level = float(start[-1].mean())
    gains = [mean_interval(table - start[-1]) for table in curve]
    return [
        Interval(g.estimate + level, g.low + level, g.high + level, g.standard_error, g.seeds, g.prompts) for g in gains
    ]


def curves(evidence: Evidence, metric: str) -> Figure:
    """Mean score of every arm of the comparison against optimizer steps, UNet evaluations and training seconds."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    study = evidence.study
    scorer = evidence.primary if metric == "primary" else metric
    base = baseline_arm(study)
    compared = comparison_arms(study)
    arms = [arm for arm in compared if evidence.has(arm, scorer) and evidence.scores[arm].trained]
    absent = not_drawn(evidence, [*compared, base], scorer)
    if not arms:
        return placeholder(f"{scorer_title(scorer)}: no arm of the comparison has this score. {absent}")
    unlogged = [arm for arm in arms if not evidence.cost(arm, "seconds").keys() >= set(evidence.scores[arm].steps)]
    notes = (
        [paper.speed_note() + " Another model and other prompts: not on these axes."] if metric == "pickscore" else []
    )
    notes += [absent] if absent else []
    if unlogged:
        named = ", ".join(map(arm_title, unlogged))
        notes.append(f"Not drawn whole against evaluations and seconds: {named} (no training log of every seed).")
    figure, axes = framed(11.7, 3.6, notes, 3, left=0.8, right=2.75, bottom=0.54, top=0.36, sharey=True, wspace=0.10)
    panels = axes[0]
    has_base = base is not None and evidence.has(base, scorer)
    start = float(evidence.final(base, scorer).mean()) if base and has_base else None
    ends: dict[str, tuple[float, float]] = {}
    intervals = {arm: curve_intervals(evidence, arm, base if has_base else None, scorer) for arm in arms}
    for panel, column in zip(panels, ("step", "unet_evals", "seconds"), strict=True):
        for arm in arms:
            steps = evidence.scores[arm].steps
            cost = {step: float(step) for step in steps} if column == "step" else evidence.cost(arm, column)
            known = [k for k, step in enumerate(steps) if step in cost]
            if not known:
                continue
            x = [cost[steps[k]] for k in known]
            rows = [intervals[arm][k] for k in known]
            if start is not None and column != "unet_evals" and steps[0] > 0:
                x, rows = [0.0, *x], [Interval(start, start, start, 0.0, 1, 1), *rows]
            style = _line(study, arm)
            panel.plot(x, [row.estimate for row in rows], linewidth=1.4, markersize=3, zorder=3, **style)
            lows, highs = [row.low for row in rows], [row.high for row in rows]
            panel.fill_between(x, lows, highs, color=style["color"], alpha=0.13, linewidth=0, zorder=2)
            if column == "seconds":
                ends[arm] = (x[-1], rows[-1].estimate)
        if start is not None:
            panel.axhline(start, zorder=1, **BASE_LINE)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_xlabel("optimizer steps")
    panels[1].set_xscale("log")
    # Decades alone are too few ticks here, and matplotlib's own labels between them overlap.
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    panels[1].set_xlabel("UNet evaluations (log scale)")
    panels[2].set_xlabel("training seconds (this machine)")
    for panel in (panels[0], panels[2]):
        panel.set_xlim(left=0)
    panels[0].set_ylabel(scorer_title(scorer))
    seeds = sorted({len(evidence.scores[arm].seeds) for arm in arms})
    prompts = len(evidence.scores[arms[0]].prompts)
    counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    noun = "seed" if counted == "1" else "seeds"
    title = f"{scorer_title(scorer)}: mean over {counted} training {noun} and {prompts} prompts; " + (
        "bands: 95 % interval of the paired gain over the base" if has_base else "bands: 95 % interval"
    )
    panels[0].text(0, 1.07, title, transform=panels[0].transAxes, fontsize=9)
    styles = {arm: {"markersize": 3, "linewidth": 1.4, **_line(study, arm)} for arm in arms}
    heights = {arm: intervals[arm][-1].estimate for arm in arms}
    if start is not None and base:
        styles[base], heights[base] = BASE_LINE, start
    _label_ends(panels[2], styles, heights, ends)
    return figure


def _label_ends(
    panel: Axes,
    styles: Mapping[str, dict[str, Any]],
    heights: Mapping[str, float],
    ends: Mapping[str, tuple[float, float]],
) -> None:
    """Line and name of each arm right of the panel, joined by a thin line to the height where its curve ends."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    right = panel.get_xlim()[1]
    panel.set_xlim(right=right)
    inches = panel.get_position().height * panel.figure.get_size_inches()[1]  # pyright: ignore
    names = {arm: textwrap.wrap(arm_title(arm), 44) for arm in styles}
    room = [(0.03 + 0.115 * len(lines)) * (high - low) / inches for lines in names.values()]
    places = spread_labels([heights[arm] for arm in names], room, low, high)
    to_axes = panel.get_yaxis_transform()
    for (arm, lines), place in zip(names.items(), places, strict=True):
        height, colour = heights[arm], styles[arm]["color"]
        if arm in ends and right > 0:
            panel.plot([ends[arm][0] / right, 1.0], [height, height], transform=to_axes, color=colour, linewidth=0.5,
                       alpha=0.5, zorder=1)  # fmt: skip
        panel.plot([1.0, 1.05], [height, place], transform=to_axes, color=colour, linewidth=0.6, clip_on=False)
        panel.plot([1.06, 1.10, 1.14], [place] * 3, transform=to_axes, clip_on=False, markevery=[1], **styles[arm])
        ink = DARK_YELLOW if colour == YELLOW else colour
        panel.text(1.16, place, "\n".join(lines), transform=to_axes, color=ink, va="center", ha="left", fontsize=7,
                   linespacing=1.0)  # fmt: skip


def whisker(panel: Axes, x: float, interval: Interval, colour: str) -> None:
    """The interval as a vertical line at x."""
    panel.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.1, zorder=4)


def controls(evidence: Evidence) -> Figure:
    """Gain over the base model in the primary score with true, shuffled and swapped labels, per method."""
    study, scorer, base = evidence.study, evidence.primary, baseline_arm(evidence.study)
    every = {method: {"true": method, **arms} for method, arms in control_arms(study).items()}
    absent = not_drawn(evidence, [base, *(arm for arms in every.values() for arm in arms.values())], scorer)
    groups = {
        method: {labels: arm for labels, arm in arms.items() if evidence.has(arm, scorer)}
        for method, arms in every.items()
    }
    groups = {method: arms for method, arms in groups.items() if arms}
    if not groups or base is None or not evidence.has(base, scorer):
        return placeholder(f"No control has been scored. {absent}")
    across = max(4.5, 1.1 + 1.75 * len(groups))
    figure, axes = framed(across, 3.6, [absent], left=0.9, right=0.02 * across, bottom=0.58, top=0.43)
    panel = axes[0, 0]
    order = [labels for labels in ("true", "shuffled", "swapped") if any(labels in arms for arms in groups.values())]
    width = 0.8 / len(order)
    for group, (method, arms) in enumerate(groups.items()):
        colour = method_colour(study, method)
        for rank, labels in enumerate(order):
            if labels not in arms:
                continue
            gain = paired_difference(*evidence.paired(arms[labels], base, scorer))
            x = group + (rank - (len(order) - 1) / 2) * width
            face = {"true": colour, "shuffled": "white", "swapped": "white"}[labels]
            panel.bar(x, gain.estimate, width * 0.88, facecolor=face, edgecolor=colour, linewidth=1,
                      hatch="/////" if labels == "swapped" else None, zorder=3)  # fmt: skip
            whisker(panel, x, gain, BLACK if colour != BLACK or labels != "true" else GREY)
            if gain.low == gain.high:
                panel.plot([x], [gain.estimate], marker="_", color=colour, markersize=7, zorder=4)
    panel.axhline(0, color=BLACK, linewidth=0.7, zorder=2)
    panel.set_xticks(range(len(groups)), [short_title(method) for method in groups])
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(-0.6, len(groups) - 0.4)
    panel.set_ylabel(f"{scorer_title(scorer)}, minus base")
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    from matplotlib.patches import Patch

    faces, hatches = {"true": GREY}, {"swapped": "/////"}
    handles = [
        Patch(facecolor=faces.get(k, "white"), edgecolor=GREY, hatch=hatches.get(k), label=f"{k} labels") for k in order
    ]
    figure.legend(handles=handles, loc="upper right", ncols=len(order), frameon=False, fontsize=7.5)
    return figure


def inversion_steps(evidence: Evidence) -> Figure:
    """Difference from the base model against the number of inversion steps, one panel a score."""
    study, base = evidence.study, baseline_arm(evidence.study)
    metrics = list(dict.fromkeys(["pickscore", "clip", "aesthetic", evidence.primary]))
    metrics = [m for m in metrics if base and evidence.has(base, m)]
    families = step_families(study)
    every = [base, *(arm for arms in families.values() for arm in arms.values())]
    absent = list(filter(None, dict.fromkeys(not_drawn(evidence, every, scorer) for scorer in metrics)))
    families = {name: arms for name, arms in families.items() if any(evidence.has(arm) for arm in arms.values())}
    if not families or not metrics or base is None:
        return placeholder(
            f"No inversion-step ablation has been scored. {not_drawn(evidence, every, evidence.primary)}"
        )
    counts = sorted({n for arms in families.values() for n in arms})
    width = 1.8 + 2.35 * len(metrics)
    figure, axes = framed(
        width, 3.2, absent, len(metrics), left=0.95, right=0.01 * width, bottom=0.48, top=0.70, wspace=0.36
    )
    handles = {}
    for panel, scorer in zip(axes[0], metrics, strict=True):
        for rank, (family, arms) in enumerate(families.items()):
            known = [n for n, arm in arms.items() if evidence.has(arm, scorer)]
            gains = [paired_difference(*evidence.paired(arms[n], base, scorer)) for n in known]
            if not known:
                continue
            colour = method_colour(study, arms[known[-1]])
            # Families stand a little beside each other, so that their intervals can be told apart.
            shift = (rank - (len(families) - 1) / 2) * 0.07
            x = [counts.index(n) + shift for n in known]
            (handles[family],) = panel.plot(
                x, [g.estimate for g in gains], color=colour, marker="os^Dv"[rank % 5], markersize=4, linewidth=1.3,
                zorder=3, label=arm_title(family),
            )  # fmt: skip
            for place, gain in zip(x, gains, strict=True):
                whisker(panel, place, gain, colour)
        panel.axhline(0, color=GREY, linestyle=(0, (2, 2)), linewidth=1)
        panel.set_xticks(range(len(counts)), [str(n) for n in counts])
        panel.set_xlim(-0.35, len(counts) - 0.65)
        panel.set_xlabel("inversion steps N")
        panel.set_title(scorer_title(scorer), loc="left")
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
    axes[0, 0].set_ylabel("minus base, with 95 % interval")
    figure.legend(
        handles=list(handles.values()),
        loc="upper left",
        ncols=min(4, len(handles)),
        frameon=False,
        bbox_to_anchor=(0.01, 1.0),
        fontsize=8,
    )
    return figure


def write(study: StudyConfig) -> list[Path]:
    """Write root/figures/{fig3,fig_s7,fig_s8,fig_oracle,controls,inversion_steps}.{pdf,png}; the paths written."""
    evidence = load_evidence(study)
    folder = study.root / "figures"
    written = []
    for name, metric in CURVES.items():
        written += save(curves(evidence, metric), folder, name)
    for draw in (controls, inversion_steps):
        written += save(draw(evidence), folder, draw.__name__)
    return written
