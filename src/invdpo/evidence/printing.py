"""Tables as csv (6 significant digits), md and tex (booktabs), and how numbers and intervals are printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdpo.evidence.statistics import Interval
from invdpo.files import replace_when_done

NOT_RUN = "not run"


@dataclass(frozen=True)
class Block:
    """One printed table: a caption, column heads, and rows of text; a cell between two `**` is bold."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table in its two forms: flat records for the csv, blocks for md and tex."""

    title: str
    notes: Sequence[str]
    records: Sequence[dict[str, Any]]
    columns: Sequence[str]
    blocks: Sequence[Block]


def format_interval(interval: Interval, sign: bool = False) -> str:
    """`0.2134 [0.2101, 0.2170]`, with as many decimals as make two significant digits of the half-width."""
    half = (interval.high - interval.low) / 2
    # A share of prompts often ends in a five, and processors differ in the sixteenth digit, which would decide it.
    values = [steady(value) for value in (interval.estimate, interval.low, interval.high)]
    mark = "+" if sign else ""
    if half < 1e-12:  # nothing varies, up to rounding: three times the same number
        numbers = ["0" if abs(x) < 1e-12 else f"{x:{mark}.4g}" for x in values]
    else:
        decimals = min(8, max(0, 1 - math.floor(math.log10(half))))
        numbers = [f"{x:{mark}.{decimals}f}" for x in values]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def steady(value: float) -> float:
    """A number to the 12 digits that all processors agree on."""
    return float(f"{value:.12g}")


def escape_tex(text: str) -> str:
    """Text that is safe in LaTeX's text mode."""
    special = {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "∞": r"$\infty$",
        "θ": r"$\theta$",
        "√": r"$\surd$",
        "₀": r"\textsubscript{0}",
    }
    return "".join(special.get(character, character) for character in text)


def csv_cell(value: Any) -> str:
    """A value in a csv file: floats with 6 significant digits, empty where there is no value."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def to_csv(table: Table) -> str:
    """Comma-separated, full records."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    for record in table.records:
        writer.writerow([csv_cell(record.get(column)) for column in table.columns])
    return buffer.getvalue()


def to_markdown(table: Table) -> str:
    """GitHub Markdown, one table a block."""
    parts = [f"# {table.title}", *table.notes]
    for block in table.blocks:
        rows = [block.head, ["---"] * len(block.head), *block.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append(f"**{block.caption}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_tex(table: Table) -> str:
    """LaTeX `tabular`s with booktabs rules, one a block, to be \\input inside a table environment."""
    lines = [f"% {table.title}. Needs \\usepackage{{booktabs}}.".replace("\n", " ")]
    lines += [f"% {note}" for note in table.notes]
    for block in table.blocks:
        lines += [f"\\par\\medskip\\noindent {escape_tex(block.caption)}\\par\\smallskip"]
        lines += ["\\begin{tabular}{l" + "r" * (len(block.head) - 1) + "}", "\\toprule"]
        lines += [" & ".join(escape_tex(cell) for cell in block.head) + r" \\", "\\midrule"]
        # A row that starts with "[" would be read as the optional argument of the line break before it.
        for row in block.rows:
            cells = ["{}" + _cell_tex(cell) if cell[:1] == "[" else _cell_tex(cell) for cell in row]
            lines.append(" & ".join(cells) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def _cell_tex(cell: str) -> str:
    bold = len(cell) > 4 and cell.startswith("**") and cell.endswith("**")
    return rf"\textbf{{{escape_tex(cell[2:-2])}}}" if bold else escape_tex(cell)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replace_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(folder: Path, name: str, table: Table) -> list[Path]:
    """Write folder/name.{csv,md,tex}; the paths written."""
    paths = []
    for suffix, render in (("csv", to_csv), ("md", to_markdown), ("tex", to_tex)):
        paths.append(folder / f"{name}.{suffix}")
        write_text(paths[-1], render(table))
    return paths


def record_of(prefix: str, interval: Interval | None) -> dict[str, Any]:
    """The three fields of an interval in a csv record; none where there is no interval."""
    if interval is None:
        return {}
    return {prefix: interval.estimate, f"{prefix}_low": interval.low, f"{prefix}_high": interval.high}


def triple(prefix: str) -> list[str]:
    """Their column names."""
    return [prefix, f"{prefix}_low", f"{prefix}_high"]
