"""The paper's numbers, in the digits that it prints: which stand beside which arm, and which beside none of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.evidence.load import published
from invdpo.evidence.printing import NOT_RUN

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

REPORTED = "What the paper reports"  # caption of a block that repeats its rows
BASES = {"sdxl": "SDXL", "sd15": "SD1.5"}
SCORES = ("pickscore", "clip", "aesthetic")
NOTE = (
    "The paper's values belong to another model, other prompts and other scorers: compare signs and order, never the "
    "numbers themselves."
)


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables. base: a key of BASES where the paper says it. recipes: those of this package
    that train what the paper trained; a method without any can only be had as weights. steps: of inversion.
    optimizer_steps: where it was scored. n: images or pairs. All three are empty or `not stated` where the paper's row
    has none. values: metric -> number as it is printed.
    """

    method: str
    base: str
    recipes: Sequence[str]
    steps: str
    optimizer_steps: str
    n: str
    source: str
    values: Mapping[str, str]

    @property
    def absent(self) -> str:
        """What stands in place of a study's own value where no arm of it is this row's method."""
        return f"{NOT_RUN}: no arm" if self.recipes else f"{NOT_RUN}: no weights"

    @property
    def columns(self) -> dict[str, str]:
        """Its values as columns of a csv file with scores."""
        return {f"paper_{metric}_{self.base}": number for metric, number in self.values.items()}


def rows(table: str) -> list[Row]:
    """The rows of that table of published.csv, in its order."""
    found: dict[tuple[str, str, str], Row] = {}
    for entry in published():
        if entry["table"] != table:
            continue
        key = (entry["method"], entry["base"], entry["inversion_steps"])
        values = {**(found[key].values if key in found else {}), entry["metric"]: entry["value"]}
        recipes = tuple(filter(None, entry["recipes"].split(";")))
        found[key] = Row(*key[:2], recipes, key[2], entry["optimizer_steps"], entry["n"], entry["source"], values)
    return list(found.values())


def stands_for(study: StudyConfig, arm: str, row: Row) -> bool:
    """Whether an arm is what that row of the paper is: its recipe on true labels, or its weights.

    Where the study calls one of its `bases` by a name of BASES, the base has to be the row's as well.
    """
    entry = study.arms[arm]
    named = [base for base in BASES if base in study.bases]
    if entry.labels != "true" or (named and row.base != entry.base and (entry.base in named or row.base in named)):
        return False
    return Path(entry.method).stem in row.recipes if entry.weights is None else row.method == entry.published


def beside(study: StudyConfig, arm: str, table: str, steps: str = "") -> dict[str, str]:
    """Columns with the paper's values of what an arm is, with that many inversion steps where the table has them."""
    own = [row for row in rows(table) if row.steps == steps and stands_for(study, arm, row)]
    return {column: number for row in own for column, number in row.columns.items()}


def unfilled(study: StudyConfig, table: str, arms: Iterable[str]) -> list[Row]:
    """The rows of that table that none of these arms is."""
    known = list(arms)
    return [row for row in rows(table) if not any(stands_for(study, arm, row) for arm in known)]


def columns(bases: Iterable[str] = BASES) -> list[str]:
    """The columns of the three scores on those bases."""
    return [f"paper_{score}_{base}" for score in SCORES for base in bases]


def quoted(record: Mapping[str, Any]) -> list[str]:
    """Those columns in print: a cell a score, with its values on the two bases."""
    return [" / ".join(record.get(f"paper_{score}_{base}") or "–" for base in BASES) for score in SCORES]


def minus(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Differences of the columns that both have, to the digits that are printed."""
    return {name: f"{Decimal(first[name]) - Decimal(second[name])}" for name in first if name in second}


def settings_note(table: str) -> str:
    """What a table's numbers can be compared for, and how they were taken, as far as that is known."""
    names = ("prompt_set", "n", "settings_confidence", "settings_source")
    known = dict.fromkeys(tuple(entry[name] for name in names) for entry in published() if entry["table"] == table)
    return " ".join([NOTE, *(f"Prompts: {which}; number: {n} ({grade}: {why})." for which, n, grade, why in known)])


def speed_note() -> str:
    """The numbers that the paper's speed-up by optimizer step rests on."""
    parts = [
        f"{row.values['pickscore']} for {row.method}{f' with N = {row.steps}' if row.steps else ''} at step "
        f"{int(row.optimizer_steps):,}"
        for row in rows("fig3")
    ]
    return f"The paper, section 5.4 (PickScore as a raw cosine, SDXL, prompts not stated): {'; '.join(parts)}."
