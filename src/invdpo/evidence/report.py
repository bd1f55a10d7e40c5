"""The report: one HTML page that shows a finished study without a server, a network or an installation.

Verdicts and tables are plain HTML; `report_page/page.js` adds filters, sorting, curves and the image browser from data
embedded as JSON. The page's own policy forbids every request and every script but that one, whatever a prompt holds.
Pictures are packed as WebP, one sheet an arm and seed, up to IMAGE_BUDGET. Same inputs, same bytes.

`invdpo rebuild` makes the same page from what is published of a study: all but the pictures that no figure shows.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from invdpo.config import MEASURED, tuned_file
from invdpo.errors import InvdpoError
from invdpo.evidence.claims import measured_text, size_text, value_text
from invdpo.evidence.deviations import Deviation, load_deviations
from invdpo.evidence.figures import BLACK, curve_intervals, method_colour
from invdpo.evidence.ledger import INCONCLUSIVE, NOT_RUN, NOT_SUPPORTED, SUPPORTED, Verdict, read_verdicts
from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    comparison_arms,
    load_evidence,
    load_run,
    scorer_title,
)
from invdpo.evidence.printing import Block, write_text
from invdpo.provenance import git_commit, git_dirty

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

# Characters of base64 that all pictures may take: with the rest, the page stays below 15 MB.
IMAGE_BUDGET = 10_000_000
PROBE = 8  # pictures of a sheet that are packed first, to estimate how many will fit
THUMBNAIL = 192  # pixels; larger pictures are scaled down to this side
QUALITY = 95  # of WebP
DARK_BACKGROUND = "#14171b"  # --card of page.css in dark mode
MODES = ("light", "dark")
MARKS = {SUPPORTED: "✓", NOT_SUPPORTED: "✗", INCONCLUSIVE: "?", NOT_RUN: "–"}
PAPER, OWN = "What the paper says", "What this study asks"
# Where a sentence of the paper stands, in the paper's order -> what it is about. Of several places the first counts.
PLACES = {
    "Table 1": "scores",
    "Table 2": "composition",
    "Table 3": "number of inversion steps",
    "Table S4": "votes of people",
    "Table S5": "one timestep of p or of q",
    "Figure 3": "speed by optimizer step",
    "section 1": "speed by work and time",
    "section 4.1": "the loss",
    "section 4.2": "rewards and pairs",
    "section 5.4": "the course of training",
    "section S10": "inversion and sampling",
    "section S14": "cost",
}
# kind of test -> what a question of the study with such a test is about
THEMES = {
    "gradient": "the gradient where training starts",
    "difference": "scores and label controls",
    "agreement": "the log-ratio and the true one",
    "distance": "movement of the weights",
    "round_trip": "inversion and sampling",
}
COLUMN = 5  # tests that name a reading of the method before it has a column of its own in the overview


@dataclass(frozen=True)
class Section:
    """A part of the page that holds tables, and what in them to look at first."""

    id: str
    title: str
    read: str
    tables: Sequence[str]


# A table that is not listed goes into the first section.
SECTIONS = (
    Section(
        "tables",
        "Tables",
        "Differences from the base model are paired by seed and prompt, so they tell methods apart far better than "
        "the means do: read them first. A click on a column's head sorts by it.",
        ("table1", "table2", "table3", "table_s4", "table_s5"),
    ),
    Section(
        "audit",
        "Gradient audit",
        "Where does each objective push the weights? A norm of exactly 0 at the base model means that training cannot "
        "begin. A cosine of -1 with the gradient of swapped labels means that the labels decide the direction, +1 that "
        "they do not matter. A cosine with PickScore above 0 means that a step raises PickScore.",
        ("audit",),
    ),
    Section(
        "controls",
        "Label controls",
        "A method that has learnt a preference gains from true labels, not from shuffled ones, and loses from swapped "
        "ones. One whose three marks lie on top of each other has not, whatever its score.",
        ("controls",),
    ),
    Section(
        "costs",
        "Cost",
        "An optimizer step is no unit of work: compare UNet evaluations of methods with as many steps. One is a "
        "forward pass of one latent; a backward pass counts two. The speed of the code was measured by its benchmark, "
        "not by this study.",
        ("costs", "speed"),
    ),
    Section(
        "log-ratios",
        "Log-ratios and inversion",
        "A rank correlation near +1 means that an objective's log-ratio orders images as the sampler's true one does; "
        "near -1, that it orders them the other way round. The inversion error is how far sampling from the end of an "
        "inversion misses the picture that was inverted.",
        ("precision", "inversion_error"),
    ),
    Section(
        "weights",
        "Distance of the weights",
        "How far training moved each network from its base, by layer. Weights that lie farther away than a recipe's "
        "steps can reach were not made by that recipe.",
        ("weight_distances",),
    ),
    Section(
        "tuning",
        "Tuning",
        "Every method had the same grid, on seeds and prompts that are never reported. A method that is best at the "
        "edge of its grid might do better outside it.",
        ("tuning",),
    ),
)
# table -> figures shown below it, with their text for readers who do not see them
FIGURES = {
    "audit": {"audit": "Cosines and norms of each recipe's gradient, as in the table."},
    "weight_distances": {"weight_distances": "Change of each arm's weights by block and kind of layer."},
    "precision": {"precision": "Agreement of each surrogate log-ratio with the true one, as in the table."},
    "inversion_error": {
        "inversion_error": "Round-trip error of each solver against UNet evaluations, as in the table.",
        "inversion_levels": "Error of each solver along the way from the picture to noise.",
        "fig_s9": "Held-out pictures, each beside what sampling from the end of its inversion gives.",
    },
}
TITLES = {"speed": "Speed and memory of the code", "tuning": "The tuning grid"}
HEADS = {"peak_mib": "Peak MiB"}  # columns of a csv file that are not called by their name


@dataclass(frozen=True)
class ShownTable:
    """One table of the page. source: the file it was read from. command: what makes that file; empty where none."""

    name: str
    title: str
    notes: Sequence[str]
    blocks: Sequence[Block]
    source: str
    command: str
    figures: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Missing:
    """A part that the page has to do without, and the command that makes it."""

    what: str
    command: str


def published(study: StudyConfig) -> bool:
    """Whether these are the results that were published of a study, or were made from them."""
    return (study.root / "provenance.json").is_file()  # `invdpo publish` writes it, and no stage of a run


def command_for(study: StudyConfig, *paths: Path) -> str:
    """The command that makes files of the study from what is there, or runs what they are made from.

    Targets stand first: --configfile takes all that follows it.
    """
    if published(study):
        return f"make reproduce STUDY={study.study}"
    return f"uv run snakemake {' '.join(map(str, paths))} --configfile config/{study.study}.yaml"


def read_markdown(text: str) -> tuple[str, list[str], list[Block]]:
    """Title, notes and blocks of a table that `tables.to_markdown` wrote."""
    title, notes, blocks, caption = "", [], [], ""
    for part in filter(None, (part.strip() for part in text.split("\n\n"))):
        if part.startswith("|"):
            head, _, *rows = [_cells(line) for line in part.split("\n")]
            blocks.append(Block(caption, head, rows))
            caption = ""
        elif part.startswith("# "):
            title = part.removeprefix("# ")
        elif part.startswith("**") and part.endswith("**"):
            caption = part.strip("*")
        else:
            notes.append(part)
    return title, notes, blocks


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def read_csv_block(path: Path) -> Block:
    """A csv file for readers: a column and its `_low` and `_high` become one, arms get their titles."""
    with path.open(encoding="utf-8", newline="") as stream:
        records = list(csv.DictReader(stream))
    names = list(records[0]) if records else []
    bounds = {name: (f"{name}_low", f"{name}_high") for name in names}
    bounded = {name: pair for name, pair in bounds.items() if set(pair) <= set(names)}
    hidden = {bound for pair in bounded.values() for bound in pair}
    shown = [name for name in names if name not in hidden]

    def cell(record: dict[str, str], name: str) -> str:
        value = record[name]
        if name in ("arm", "method", "what"):
            return arm_title(value)
        if name == "metric":
            return scorer_title(value)
        if name in bounded and value and all(record[bound] for bound in bounded[name]):
            low, high = (record[bound] for bound in bounded[name])
            return f"{value} [{low}, {high}]"
        return value or "–"

    rows = [[cell(record, name) for name in shown] for record in records]
    return Block("", [HEADS.get(name, name.replace("_", " ").capitalize()) for name in shown], rows)


def load_tables(study: StudyConfig) -> dict[str, ShownTable]:
    """Every table of the study that has a row: root/tables, as md or else csv, and the tuning grid, by name."""
    folder = study.root / "tables"
    # Left by an earlier configuration; the grid's table is read where it is committed.
    foreign = {"tuning", *MEASURED} - set(study.experiments.measured)
    found = {}
    for path in sorted(folder.glob("*.csv")):
        name = path.stem
        if name in foreign:
            continue
        text = path.with_suffix(".md")
        if text.exists():
            title, notes, blocks = read_markdown(text.read_text(encoding="utf-8"))
        else:
            title, notes, blocks = TITLES.get(name, name), [], [read_csv_block(path)]
        figures = []
        for figure, alt in FIGURES.get(name, {}).items():
            picture = study.root / "figures" / f"{figure}.png"
            if picture.exists():
                figures.append(_figure(picture, alt))
        command = f"uv run invdpo rebuild {study.study}" if published(study) else command_for(study, path)
        found[name] = ShownTable(name, title, notes, blocks, str(path), command, figures)
    if "costs" in found and (study.root / "costs.json").is_file():
        found["costs"] = with_seconds(found["costs"], study)
    grid = tuned_file(study.study).with_suffix(".csv")
    if study.tuning and grid.exists():
        command = f"make tune STUDY={study.study}"
        found["tuning"] = ShownTable("tuning", TITLES["tuning"], [], [read_csv_block(grid)], str(grid), command)
    return {name: table for name, table in found.items() if any(block.rows for block in table.blocks)}


def _figure(picture: Path, alt: str) -> dict[str, Any]:
    with Image.open(picture) as image:
        width, height = image.size  # the page keeps the place of what it has not decoded yet
    data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    return {"alt": alt, "source": str(picture), "data": data, "width": width, "height": height}


def with_seconds(table: ShownTable, study: StudyConfig) -> ShownTable:
    """The cost table with what differs between two runs and is in costs.json alone: seconds, and peak memory in GiB."""
    spent = json.loads((study.root / "costs.json").read_text(encoding="utf-8"))["arms"]
    with (study.root / "tables" / "costs.csv").open(encoding="utf-8", newline="") as stream:
        arms = [row["arm"] for row in csv.DictReader(stream)]
    (block,) = table.blocks

    def cells(arm: str) -> list[str]:
        runs = [run for name, run in spent.get(arm, {}).items() if name.startswith("seed") and "step" in run]
        if not any(run["step"] for run in runs):
            return ["–", "–"]
        seconds = [run["seconds"] for run in runs]
        mean, low, high = (
            f"{x:,.0f}" if x >= 100 else f"{x:.1f}" for x in (float(np.mean(seconds)), min(seconds), max(seconds))
        )
        memory = max(run["peak_memory_bytes"] for run in runs) / 2**30
        return [f"{mean} ({low} to {high})", f"{memory:#.3g}"]

    rows = [[*row, *cells(arm)] for row, arm in zip(block.rows, arms, strict=True)]
    head = [*block.head, "Seconds", "Peak memory, GiB"]
    note = (
        f"Seconds of training (mean and range over training seeds) and the highest peak memory, on {machines(study)}, "
        "where other jobs of the study may have run at the same time. They differ between two runs, so no other table "
        f"holds them: they are in `{study.root / 'costs.json'}`."
    )
    return replace(table, notes=[*table.notes, note], blocks=[replace(block, head=head, rows=rows)])


def machines(study: StudyConfig) -> str:
    """What the study was trained on, by name."""
    names = dict.fromkeys(str(run["device"]) for kind, run in records(study) if kind == "training" and run["device"])
    return ", ".join(names) or "a machine that no run names"


def sections(tables: Mapping[str, ShownTable]) -> list[dict[str, Any]]:
    """The sections that have a table, each with its tables in order."""
    unlisted = [name for name in tables if not any(name in section.tables for section in SECTIONS)]
    built = []
    for section in SECTIONS:
        names = [*section.tables, *(unlisted if section is SECTIONS[0] else [])]
        if shown := [tables[name] for name in names if name in tables]:
            built.append({"section": section, "tables": shown})
    return built


def verdict_parts(rows: Sequence[Verdict], deviations: Mapping[str, Deviation]) -> list[dict[str, Any]]:
    """The verdicts for the page: the paper's sentences by the place where they stand, then the study's own questions,
    which quote nothing, by what they are about; each claim with its readings.

    deviations: by id, those that the page explains.
    """
    claims: dict[str, list[Verdict]] = {}
    for row in rows:
        claims.setdefault(row.id, []).append(row)
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {
        PAPER: {place: [] for place in PLACES},
        OWN: {kind: [] for kind in THEMES},
    }
    for readings in claims.values():
        first = readings[0]
        part, name = (PAPER, first.locus.split(",")[0]) if first.quote else (OWN, first.test["kind"])
        parts[part].setdefault(name, []).append(_claim(readings, deviations))
    return [
        {"title": part, "own": part == OWN, "groups": [_group(name, found) for name, found in groups.items() if found]}
        for part, groups in parts.items()
        if any(groups.values())
    ]


def _group(name: str, claims: list[dict[str, Any]]) -> dict[str, Any]:
    words = f"{name}: {PLACES[name]}" if name in PLACES else THEMES.get(name, name)
    anchor = re.sub("[^a-z0-9]+", "-", name.lower())
    return {"id": f"claims-{anchor}", "title": f"{words[0].upper()}{words[1:]}", "claims": claims}


def _claim(readings: Sequence[Verdict], deviations: Mapping[str, Deviation]) -> dict[str, Any]:
    first, scale = readings[0], _scale(readings)
    return {
        "id": first.id,
        "question": first.question,
        "locus": "" if first.locus == "this study" else first.locus,
        "quote": first.quote,
        "paper_value": first.paper_value,
        "readings": [_reading(row, scale, deviations) for row in readings],
    }


def overview(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All verdicts in one table: a row a group, a column a reading of the method, a mark a test.

    Readings with fewer than COLUMN tests share the last column.
    """
    claims = [claim for part in parts for group in part["groups"] for claim in group["claims"]]
    tests = Counter(reading["variant"] for claim in claims for reading in claim["readings"])
    columns = {variant: arm_title(variant) for variant, n in tests.items() if variant and n >= COLUMN}
    if set(tests) - set(columns):
        columns[""] = "Others" if columns else "Tests"

    def line(group: Mapping[str, Any]) -> dict[str, Any]:
        cells: dict[str, list[dict[str, str]]] = {variant: [] for variant in columns}
        for claim in group["claims"]:
            for reading in claim["readings"]:
                mark = {"verdict": reading["verdict"], "mark": reading["mark"], "claim": claim["id"]}
                mark["words"] = f"{claim['question']} {reading['name']}: {reading['verdict']}"
                cells[reading["variant"] if reading["variant"] in columns else ""].append(mark)
        return {"id": group["id"], "title": group["title"], "cells": list(cells.values())}

    rows = []
    for part in parts:
        lines = [line(group) for group in part["groups"]]
        marks = [mark for row in lines for cell in row["cells"] for mark in cell]
        count = sum(len(group["claims"]) for group in part["groups"])
        rows.append(
            {"title": part["title"], "own": part["own"], "claims": count, "tests": tally(marks), "lines": lines}
        )
    return {"columns": list(columns.values()), "parts": rows}


def ticked(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))


def tally(marks: Iterable[Mapping[str, str]]) -> list[tuple[str, str, int]]:
    """(verdict, mark, how many) of those that there are."""
    counts = Counter(mark["verdict"] for mark in marks)
    return [(name, mark, counts[name]) for name, mark in MARKS.items() if counts[name]]


def _scale(readings: Sequence[Verdict]) -> tuple[float, float] | None:
    """The range that holds the thresholds, values and intervals of a claim's readings; None without a value."""
    numbers = [x for row in readings if row.value is not None for x in (row.value, row.low, row.high) if x is not None]
    if not numbers:
        return None
    numbers += [float(row.test["threshold"]) for row in readings]
    low, high = min(numbers), max(numbers)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _reading(row: Verdict, scale: tuple[float, float] | None, deviations: Mapping[str, Deviation]) -> dict[str, Any]:
    plot = None
    if row.value is not None and scale is not None:

        def place(x: float | None, otherwise: float) -> float:
            return otherwise if x is None else round(100 * (x - scale[0]) / (scale[1] - scale[0]), 2)

        value = place(row.value, 0)
        plot = {
            "value": value,
            "low": place(row.low, value),
            "high": place(row.high, value if row.low is None else 100),
            "threshold": place(float(row.test["threshold"]), 0),
        }
    facts = {
        "Measured": measured_text(row),
        "Interval": row.interval,
        "Test": f"{row.test['kind']}: {row.test['direction']} than {row.test['threshold']:g}",
        "Seeds x prompts": size_text(row),
        "Seeds that agree": "" if row.seeds_agreeing is None else f"{row.seeds_agreeing} of {row.seeds}",
        "p": "" if row.p_value is None else f"{row.p_value:.2g}",
        "p, Holm over all claims": "" if row.p_holm is None else f"{row.p_holm:.2g}",
        "Note": row.reason,
        "Would settle it": row.would_settle,
    }
    return {
        "variant": row.variant,
        "name": arm_title(row.variant) if row.variant else measured_text(row),
        "verdict": row.verdict,
        "mark": MARKS[row.verdict],
        "ours": value_text(row),
        "plot": plot,
        "settle": row.would_settle if row.would_settle[:1].isdigit() else "",
        "facts": {name: text for name, text in facts.items() if text and text != "–"},
        "deviations": [(name, deviations[name].title if name in deviations else "") for name in row.deviations],
        "artifacts": row.artifacts,
        "command": row.command,
    }


def deviations_beside(study: StudyConfig) -> dict[str, Deviation]:
    """The list of deviations that lies beside the study's claims, by id; empty where there is none."""
    path = Path(study.claims or "").with_name("deviations.yaml") if study.claims else None
    return {one.id: one for one in load_deviations(path).deviations} if path is not None and path.is_file() else {}


def deviation_entries(deviations: Mapping[str, Deviation], rows: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The deviations for the page, with the questions that measure them where the page has them."""
    questions = {row.id: row.question for row in rows}
    return [
        {
            "id": one.id,
            "title": one.title,
            "sides": [("Paper", one.paper), ("Released code", one.code), ("This study", one.study)],
            "why": one.why,
            "expected": one.expected,
            "claims": [(name, questions.get(name, "")) for name in one.measured.claims],
            "arms": one.measured.arms,
            "leaves_open": one.measured.leaves_open,
            "nothing": one.measured.nothing or "",
        }
        for one in deviations.values()
    ]


def number(value: float, digits: int = 6) -> float | None:
    """A float for JSON with that many significant digits; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def curve_data(evidence: Evidence) -> dict[str, Any] | None:
    """What the curves and the controls are drawn from; None where no trained arm has been scored.

    `curves[scorer][arm]`: (mean, low, high) a checkpoint, of the paired gain over the base drawn around the mean.
    `costs[arm]`: checkpoints as steps, UNet evaluations and seconds (mean over seeds, None where unknown).
    """
    study, base = evidence.study, baseline_arm(evidence.study)
    order = dict.fromkeys([*comparison_arms(study), *study.arms])
    arms = [arm for arm in order if evidence.has(arm) and evidence.scores[arm].trained]
    if not arms:
        return None
    curves: dict[str, dict[str, Any]] = {}
    start = {}
    for scorer in evidence.scorers:
        paired = base if base is not None and evidence.has(base, scorer) else None
        if paired is not None:
            start[scorer] = number(float(evidence.final(paired, scorer).mean()))
        curves[scorer] = {
            arm: [
                [number(x) for x in (row.estimate, row.low, row.high)]
                for row in curve_intervals(evidence, arm, paired, scorer)
            ]
            for arm in arms
            if evidence.has(arm, scorer)
        }
    costs = {}
    for arm in arms:
        steps = evidence.scores[arm].steps
        costs[arm] = {"step": list(steps)}
        for column in ("unet_evals", "seconds"):
            cost = evidence.cost(arm, column)
            costs[arm][column] = [number(cost[step]) if step in cost else None for step in steps]
    grids = study.experiments.grids
    compared = comparison_arms(study)
    return {
        "arms": arms,
        "first": [arm for arm in (grids.arms if grids else compared or arms) if arm in arms] or arms,
        "compared": [arm for arm in compared if arm in arms],
        "scorers": evidence.scorers,
        "primary": evidence.primary,
        "base": base if start else None,
        "start": start,
        "curves": curves,
        "costs": costs,
        "seeds": max(len(evidence.scores[arm].seeds) for arm in arms),
        "prompts": len(evidence.scores[arms[0]].prompts),
        "machine": machines(study),
    }


def controls_data(study: StudyConfig) -> list[dict[str, Any]]:
    """Rows of tables/controls.csv that were run: method, labels, scorer and the gain over the base with interval."""
    path = study.root / "tables" / "controls.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["minus_base"]]
    return [
        {key: row[key] for key in ("method", "labels", "scorer")}
        | {"gain": [float(row[f"minus_base{suffix}"]) for suffix in ("", "_low", "_high")]}
        for row in rows
    ]


def styles(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Arm -> title, colour on light and on dark, and which of the four dash patterns tells it from its variants."""
    order = list(dict.fromkeys([*comparison_arms(study), *study.arms]))
    found = {}
    for arm in order:
        same = [name for name in order if study.arms[name].method == study.arms[arm].method]
        colour = method_colour(study, arm)
        found[arm] = {
            "title": arm_title(arm),
            "light": colour,
            "dark": on_dark(colour),
            "dash": same.index(arm) % 4,
        }
    return found


def on_dark(colour: str) -> str:
    """A colour of the figures for a dark page: black becomes white, others are lightened to a contrast of 4:1."""
    if colour == BLACK:
        return "#ffffff"
    channels = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    for share in range(0, 101, 5):
        mixed = [round(channel + (255 - channel) * share / 100) for channel in channels]
        text = "#" + "".join(f"{channel:02x}" for channel in mixed)
        if contrast(text, DARK_BACKGROUND) >= 4:
            return text
    raise AssertionError("white is far lighter than the background")


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio of two colours `#rrggbb`."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def image_data(evidence: Evidence, budget: int = IMAGE_BUDGET) -> dict[str, Any] | None:
    """What the image browser shows; None without pictures.

    Pictures of the last checkpoint of every arm and seed that has a file, for the first prompts in the order of the
    prompt file that all these files hold: as many as fit `budget` characters of base64. `sheets[arm][k]` holds them for
    seed `seeds[arm][k]`, row by row with `columns` tiles each; `scores[arm][scorer][k]` one number a prompt, None where
    the score does not exist. The arms that are compared at first: the base, and the arm of the comparison with the
    highest mean of the primary score. `pictured` of `total` prompts and `runs[0]` of `runs[1]` arms and seeds that were
    scored have pictures.
    """
    study = evidence.study
    order = dict.fromkeys([*comparison_arms(study), *study.arms])
    files = {arm: _pictured(study, arm, evidence.scores[arm].seeds) for arm in order if evidence.has(arm)}
    files = {arm: found for arm, found in files.items() if found}
    if not files:
        return None
    entry = evidence.scores[next(iter(files))]
    # A published study comes with the pictures that its figures show, and its columns do not all show the same prompts.
    last = {arm: evidence.scores[arm].steps[-1] for arm in files}
    held = set.intersection(*(_held(study, arm, seed, last[arm]) for arm, found in files.items() for seed in found))
    prompts = [prompt for prompt in zip(entry.prompts, entry.texts, strict=True) if prompt[0] in held]
    if not prompts:
        return None
    prompts.sort(key=lambda prompt: _file_order(prompt[0]))
    keys = [key for key, _ in prompts]

    def pack(count: int, seeds: int | None = None) -> dict[str, list[_Sheet]]:
        return {
            arm: [_sheet(study, arm, seed, last[arm], keys[:count]) for seed in found[:seeds]]
            for arm, found in files.items()
        }

    def size(sheets: dict[str, list[_Sheet]]) -> int:
        return sum(len(sheet.webp) for found in sheets.values() for sheet in found)

    # A few pictures of every arm say how many will fit, before all of a large study are read.
    probed = min(len(keys), PROBE)
    seeds = sum(map(len, files.values())) / len(files)
    count = max(1, min(len(keys), int(0.95 * budget * probed / (seeds * size(pack(probed, seeds=1))))))
    sheets = pack(count)
    while size(sheets) > budget:
        count = min(count - 1, int(count * budget / size(sheets)))
        if count < 1:
            return None
        sheets = pack(count)
    base = baseline_arm(study)
    primary = evidence.primary
    gains = {
        arm: float(np.mean(evidence.final(arm, primary)))
        for arm in comparison_arms(study)
        if arm in files and arm != base and evidence.has(arm, primary)
    }
    best = max(gains, key=lambda arm: gains[arm]) if gains else list(files)[-1]
    grids = study.experiments.grids
    shape = next(iter(sheets.values()))[0]
    return {
        "arms": list(files),
        "seeds": {arm: list(found) for arm, found in files.items()},
        "prompts": [text for _, text in prompts[:count]],
        "pictured": len(keys),
        "total": len(entry.prompts),
        "runs": [sum(map(len, files.values())), sum(len(scored.seeds) for scored in evidence.scores.values())],
        "base": base,
        "first": base if base in files else list(files)[0],
        "second": best,
        "others": [arm for arm in (grids.arms if grids else []) if arm in files],
        "scorers": evidence.scorers,
        "primary": primary,
        "scores": {
            arm: {scorer: [sheet.scores.get(scorer, [None] * count) for sheet in found] for scorer in evidence.scorers}
            for arm, found in sheets.items()
        },
        "side": shape.side,
        "columns": shape.columns,
        "rows": math.ceil(count / shape.columns),
        "sheets": {arm: [sheet.webp for sheet in found] for arm, found in sheets.items()},
    }


def _file_order(key: tuple[str, str]) -> tuple[str, int, str]:
    """Prompt ids are numbers kept as text: 2 comes before 10."""
    return key[0], int(key[1]) if key[1].isdigit() else 0, key[1]


def _pictured(study: StudyConfig, arm: str, seeds: Iterable[int]) -> list[int]:
    return [seed for seed in seeds if (study.root / "images" / arm / f"seed{seed}.parquet").exists()]


def _held(study: StudyConfig, arm: str, seed: int, step: int) -> set[tuple[str, str]]:
    """The prompts of a file's pictures at that step."""
    path = study.root / "images" / arm / f"seed{seed}.parquet"
    rows = pq.read_table(path, columns=["prompt_set", "prompt_id"], filters=[("step", "=", step)]).to_pydict()
    return {(str(name), str(number)) for name, number in zip(rows["prompt_set"], rows["prompt_id"], strict=True)}


@dataclass(frozen=True)
class _Sheet:
    """Pictures of one arm and seed. webp: base64. side: of a tile, in pixels. scores[scorer]: one a picture."""

    webp: str
    side: int
    columns: int
    scores: dict[str, list[float | None]]


def _sheet(study: StudyConfig, arm: str, seed: int, step: int, keys: Sequence[tuple[str, str]]) -> _Sheet:
    """The pictures of those prompts with their scores; InvdpoError where they do not belong to each other."""
    file = Path(arm) / f"seed{seed}.parquet"
    pictures, hashes = _pictures(study.root / "images" / file, step, keys)
    columns = ["prompt_set", "prompt_id", "image_sha256", "scorer", "score"]
    rows = pq.read_table(study.root / "scores" / file, columns=columns, filters=[("step", "=", step)]).to_pydict()
    known = dict(zip(keys, hashes, strict=True))
    found: dict[str, dict[tuple[str, str], float]] = {}
    for prompt_set, prompt_id, digest, scorer, score in zip(*(rows[name] for name in columns), strict=True):
        key = (str(prompt_set), str(prompt_id))
        if known.get(key, digest) != digest:
            raise InvdpoError(
                f"{study.root / 'images' / file}: not the pictures that were scored (their hashes differ). Evaluate "
                f"the arm again: invdpo evaluate --study config/{study.study}.yaml --arm {arm} --seed {seed}"
            )
        found.setdefault(scorer, {})[key] = score
    scores = {
        scorer: [number(column[key]) if key in column else None for key in keys] for scorer, column in found.items()
    }
    side = min(THUMBNAIL, max(pictures[0].size))
    across = math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (side * across, side * math.ceil(len(pictures) / across)))
    for k, picture in enumerate(pictures):
        scaled = picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(scaled, (k % across * side, k // across * side))
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=QUALITY, method=2)
    return _Sheet(base64.b64encode(stream.getvalue()).decode(), side, across, scores)


def _pictures(path: Path, step: int, keys: Sequence[tuple[str, str]]) -> tuple[list[Image.Image], list[str]]:
    """One picture and its hash a prompt, in order. A few rows are held at a time: a file may be a gigabyte.

    keys: prompts whose pictures the file holds.
    """
    wanted, found = set(keys), {}
    columns = ["step", "prompt_set", "prompt_id", "sha256", "png"]
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
        rows = batch.to_pydict()
        for at, prompt_set, prompt_id, digest, png in zip(*(rows[name] for name in columns), strict=True):
            key = (str(prompt_set), str(prompt_id))
            if key in wanted and at == step:
                with Image.open(io.BytesIO(png)) as image:
                    found[key] = image.convert("RGB"), digest
        if len(found) == len(wanted):
            break
    return [found[key][0] for key in keys], [found[key][1] for key in keys]


def records(study: StudyConfig) -> list[tuple[str, dict[str, Any]]]:
    """Provenance of every training, evaluation and experiment of the study: (kind, fields)."""
    found = []
    for arm in study.arms:
        for seed in study.seeds:
            run = load_run(study.root / "runs" / arm / f"seed{seed}")
            if run is not None and study.arms[arm].method != "no_training":
                found.append(("training", run))
        for path in sorted((study.root / "scores" / arm).glob("seed*.parquet")):
            metadata = pq.read_schema(path).metadata or {}
            if b"provenance" in metadata:
                found.append(("evaluation", json.loads(metadata[b"provenance"])))
    for name in study.experiments.measured:
        path = study.root / "experiments" / name / "provenance.json"
        if path.exists():
            found.append(("experiment", json.loads(path.read_text(encoding="utf-8"))))
    return found


def environment(study: StudyConfig, found: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, list[str]]]:
    """What the results say about where they came from: (field, values); values that differ say how many have each."""
    found = list(found)

    def commit(record: Mapping[str, Any]) -> str | None:
        name = record.get("git_commit")
        return f"{name}{' with local changes' if record.get('git_dirty') else ''}" if name else None

    def versions(record: Mapping[str, Any]) -> str | None:
        return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()) or None

    fields = {
        "Commit": commit,
        "Lock (sha256 of uv.lock)": lambda record: record.get("lock_hash"),
        "Device": lambda record: record.get("device"),
        "Precision": lambda record: record.get("dtype"),
        "Python": lambda record: record.get("python"),
        "Libraries": versions,
        "Scorers": lambda record: ", ".join(map(str, record.get("scorer_versions", []))) or None,
    }
    rows = []
    for label, read in fields.items():
        values: dict[str, Counter[str]] = {}
        for kind, record in found:
            value = read(record)
            if value is not None:
                values.setdefault(str(value), Counter())[kind] += 1
        shares = [
            value + (f" ({', '.join(_count(n, kind) for kind, n in kinds.items())})" if len(values) > 1 else "")
            for value, kinds in values.items()
        ]
        if shares:
            rows.append((label, shares))
    rows.append(("Training seeds", [", ".join(map(str, study.seeds))]))
    for kind in ("training", "evaluation", "experiment"):
        part = [record for name, record in found if name == kind]
        if part:
            seconds = sum(float(record.get("wall_seconds") or 0) for record in part)
            evals = sum(int(record.get("unet_evals") or 0) for record in part)
            memory = max(int(record.get("peak_memory_bytes") or 0) for record in part)
            rows.append(
                (
                    _count(len(part), kind),
                    [f"{evals:,} UNet evaluations, {seconds / 60:,.1f} minutes, {memory / 2**30:.2f} GiB at the peak"],
                )
            )
    if (commit_now := git_commit()) is not None:
        rows.append(("This page made by", [f"{commit_now}{' with local changes' if git_dirty() else ''}"]))
    return rows


def _count(n: int, kind: str) -> str:
    return f"{n} {kind}{'s' if n != 1 else ''}"


def missing_parts(evidence: Evidence, tables: Mapping[str, ShownTable]) -> list[Missing]:
    """What the study's file asks for and the results lack, each with the command that makes it."""
    study = evidence.study
    lacking = []
    if study.claims and not (study.root / "claims.json").exists():
        lacking.append(Missing("the verdicts have not been judged", command_for(study, study.root / "claims.json")))
    for arm in study.arms:
        seeds = [0] if study.arms[arm].method == "no_training" else study.seeds
        scored = [seed for seed in seeds if (study.root / "scores" / arm / f"seed{seed}.parquet").is_file()]
        # Of a published study's pictures the browser itself says which they are.
        pictured = seeds if published(study) else _pictured(study, arm, seeds)
        for part, there in (("scores", scored), ("images", pictured)):
            without = [seed for seed in seeds if seed not in there]
            if without:
                files = (study.root / part / arm / f"seed{seed}.parquet" for seed in without)
                which = f"seed{'s' if len(without) > 1 else ''} {', '.join(map(str, without))}"
                lacking.append(Missing(f"{arm_title(arm)}, {which}: no {part}", command_for(study, *files)))
    for name in study.experiments.measured:
        if name not in tables:
            path = study.root / "tables" / f"{name}.csv"
            lacking.append(Missing(f"the experiment {name} has no table", command_for(study, path)))
    if evidence.scores and not (study.root / "tables" / "table1.csv").exists():
        path = study.root / "tables" / "table1.csv"
        lacking.append(Missing("the tables have not been written", command_for(study, path)))
    return lacking


def commands(study: StudyConfig) -> list[tuple[str, str]]:
    """What to type, and what it does."""
    name = study.study
    arm = next((arm for arm in study.arms if study.arms[arm].method != "no_training"), next(iter(study.arms)))
    again = [
        (f"make tables STUDY={name}", "all but the pictures again from what is published, in minutes, and compared"),
        (
            f"uv run invdpo trace table1:{arm}:PickScore --reference --study config/{name}.yaml",
            "the way from a number to its scores, images and recipe",
        ),
    ]
    page = command_for(study, study.root / "report.html")
    return [
        *(again if published(study) else []),
        (f"make reproduce STUDY={name}", "the whole study, this page included; what is finished is kept"),
        *([] if published(study) else [(page, "this page, and whatever of its inputs is missing")]),
        (
            f"uv run invdpo train --study config/{name}.yaml --arm {arm} --seed {study.seeds[0]}",
            "one training run; with evaluate in place of train, its pictures and scores",
        ),
        (f"uv run invdpo results --study config/{name}.yaml", "where everything is"),
        (f"make mlflow STUDY={name}", "the runs in MLflow"),
        (f"make report STUDY={name}", "Snakemake's own report: the graph, run times and code of every job"),
    ]


def embedded(value: Any) -> Markup:
    """JSON that is safe inside a script element: no character in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(name: str) -> str:
    return resources.files("invdpo.evidence").joinpath("report_page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source expression of an inline script or style for the page's content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(study: StudyConfig, budget: int = IMAGE_BUDGET) -> str:
    """The whole report as HTML. InvdpoError where the study has no scores and no verdicts to show."""
    evidence = load_evidence(study)
    path = study.root / "claims.json"
    rows = read_verdicts(path) if study.claims and path.exists() else []
    if not evidence.scores and not rows:
        raise InvdpoError(
            f"{study.root} has neither scores nor verdicts to report. Run the study first: "
            f"make reproduce STUDY={study.study}"
        )
    tables, deviations = load_tables(study), deviations_beside(study)
    parts = verdict_parts(rows, deviations)
    images = image_data(evidence, budget) if evidence.scores else None
    looks = styles(study)
    light, dark = ("".join(f"--arm{k}:{look[mode]};" for k, look in enumerate(looks.values())) for mode in MODES)
    scheme = f":root {{{light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{dark}}} }}\n"
    style = f"{_source('page.css')}{scheme}"
    script = _source("page.js")
    curves = curve_data(evidence)
    arms = {
        arm: {"title": look["title"], "colour": f"var(--arm{k})", "dash": look["dash"]}
        for k, (arm, look) in enumerate(looks.items())
    }
    names = {scorer: scorer_title(scorer) for scorer in evidence.scorers}
    environment_of = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment_of.filters["ticked"] = ticked
    return environment_of.from_string(_source("page.html")).render(
        study=study,
        policy=f"default-src 'none'; img-src data: blob:; script-src {_digest(script)}; style-src {_digest(style)}",
        style=Markup(style),
        script=Markup(script),
        counts=tally({"verdict": row.verdict} for row in rows),
        verdicts=parts,
        overview=overview(parts),
        deviations=deviation_entries(deviations, rows) if rows else [],
        sections=sections(tables),
        missing=missing_parts(evidence, tables),
        environment=environment(study, records(study)),
        commands=commands(study),
        prompts=max((len(entry.prompts) for entry in evidence.scores.values()), default=0),
        curves=curves,
        images=images,
        published=published(study),
        quality=QUALITY,
        data=embedded({"arms": arms, "names": names, "chart": curves, "controls": controls_data(study)}),
        pictures=embedded(images),
    )


def write(study: StudyConfig) -> list[Path]:
    """Write root/report.html; the path written."""
    path = study.root / "report.html"
    write_text(path, page(study))
    return [path]
