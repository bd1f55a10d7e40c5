"""From a number in a table, a claim or a file of a study back to what it was made from, and with which commands."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.config import load_study, nearest
from invdpo.errors import InvdpoError
from invdpo.evidence.cells import CELLS, ENDS, Record, Source, address, find, source
from invdpo.evidence.claims import judge
from invdpo.evidence.comparisons import NOTE
from invdpo.evidence.experiments import EVIDENCE
from invdpo.evidence.figures import CURVES
from invdpo.evidence.grids import CHOICES
from invdpo.evidence.ledger import Verdict, load_claims, read_verdicts
from invdpo.evidence.lineage import (
    SPEED,
    Link,
    OneImage,
    benchmark,
    chain,
    distribution,
    experiment,
    recipe_of,
    votes,
)
from invdpo.evidence.load import (
    Evidence,
    baseline_arm,
    baseline_of,
    comparison_arms,
    config_file,
    control_arms,
    load_evidence,
    published,
    step_families,
)
from invdpo.evidence.printing import csv_cell
from invdpo.evidence.provenance import FILE
from invdpo.evidence.publish import figures_folder
from invdpo.evidence.rebuild import REFERENCE
from invdpo.evidence.tables import TABLES
from invdpo.provenance import sha256_file

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

NONE = "–"


@dataclass(frozen=True)
class Trace:
    """The way from a number or a file to where it comes from, nearest first."""

    address: str
    value: str
    links: list[Link] = field(default_factory=list)

    def text(self) -> str:
        """For people: a paragraph a link."""
        lines = [f"{self.address} = {self.value}"]
        for link in self.links:
            lines.append(f"\n{link.what}")
            known = {name: value for name, value in link.facts.items() if value not in (None, "", {}, [])}
            lines += [f"  {name}: {_shown(value)}".replace(": \n", ":\n") for name, value in known.items()]
            if link.command:
                lines.append(f"  made by: {link.command}")
        return "\n".join(lines)

    def content(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def _shown(value: Any, depth: int = 2) -> str:
    if isinstance(value, Mapping):
        return "".join(f"\n{'  ' * depth}{name}: {_shown(part, depth + 1)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Number:
    """A number as it is printed: with a sign or none, commas between thousands, a power of ten, a unit.

    value: without its unit. form: how numbers with as many digits are written. percent: whether it is in hundredths.
    """

    value: float
    form: str
    percent: bool

    @classmethod
    def read(cls, text: str) -> Number | None:
        """None where it is no number."""
        found = re.fullmatch(
            r"([+-]?)(\d[\d,]*(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*(%|percent|x|times)?",
            text.strip().replace("−", "-").replace("×", "x"),
            re.IGNORECASE,
        )
        if found is None:
            return None
        sign, digits, power, unit = found.groups()
        digits = digits.replace(",", "")
        form = f".{len(digits.partition('.')[2])}{'e' if power else 'f'}"
        return cls(float(f"{sign}{digits}{power or ''}"), form, unit in ("%", "percent"))

    def rounds(self, value: float) -> bool:
        """Whether that value is printed so."""
        return float(format(100 * value if self.percent else value, self.form)) == self.value

    def said(self, text: str) -> bool:
        """Whether a text has it, in the same unit."""
        found = re.findall(r"(-?\d*\.?\d+)( ?%)?", text)
        return any(
            bool(unit) is self.percent and float(format(float(word), self.form)) == self.value for word, unit in found
        )


def place(what: str, study: Path, reference: bool) -> tuple[str, StudyConfig]:
    """The address without its folder, and the study placed where its results are looked for.

    A path names its results itself: results/shapes/tables/table1.md:ROW:COLUMN, or any file of a study, also in
    paper_figures/. Any other address is looked up in the results of `study`, or with `reference` in those published of
    it. InvdpoError where there are none.
    """
    name, colon, rest = what.partition(":")
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    if "/" in name:
        root = next((parent for parent in path.parents if (parent / "study.json").is_file()), _shown_from(path))
        if root is None:
            raise InvdpoError(f"{path} is in no folder of a study's results (one with study.json).")
        part = path.relative_to(root) if path.is_relative_to(root) else _part(path)
        what = f"{part.stem}:{rest}" if colon else part.as_posix()
    else:
        root = load_study(study).root
        if reference:
            root = REFERENCE / root.name
    resolved = root / "study.json"
    if not resolved.is_file() or not (root / "tables").is_dir():
        raise InvdpoError(
            f"{root} holds no finished study (no study.json or no tables). Run it (`make reproduce`), or look in the "
            "published results with `--reference`."
        )
    return what, load_study(resolved).placed(root)


def _part(path: Path) -> Path:
    """Where a file of paper_figures/ lies below a study's results."""
    return Path("tables" if path.suffix in (".csv", ".md", ".tex") else "figures") / path.name


def _shown_from(path: Path) -> Path | None:
    """The published study whose file is put there for readers."""
    for file in sorted(REFERENCE.glob("*/study.json")):
        root = file.parent
        if path.parent == figures_folder(Path(), root.name) and (root / _part(path)).is_file():
            return root
    return None


def trace(what: str, study: StudyConfig, one: OneImage | None = None) -> list[Trace]:
    """Where a number comes from: `table1:ROW:COLUMN`, `claim:ID[:VARIANT]`, a file of the study, or a bare number,
    looked up everywhere.

    A row goes by the names of its key columns, as many as tell it apart, and they and columns by their names in the csv
    file or in print, there also below their block's caption (`table1:Mean score:SFT:CLIP`). Of a bare number that
    several cells and claims have, each is given without its way.
    """
    one = one or OneImage()
    if (number := Number.read(what)) is not None:
        hits = list(_places(study, number))
        if not hits:
            raise InvdpoError(f"{what} is in no table of {study.root / 'tables'} and no claim. Try fewer digits.")
        if len({hit.address for hit in hits}) > 1:
            return hits
        what = hits[0].address
    head, _, rest = what.partition(":")
    if (study.root / what).is_file():
        return [_file(load_evidence(study), what, one)]
    if head == "claim":
        return [_claim(study, rest, one)]
    if head in CELLS:
        return [_cell(study, head, rest, one)]
    if "/" in head:
        raise InvdpoError(_no_file(study, Path(head)))
    raise InvdpoError(
        f"`{what}` is no address: write TABLE:ROW:COLUMN (tables: {', '.join(_tables(study))}), claim:ID, a number, or "
        f"the path of a file below {study.root}."
    )


def _tables(study: StudyConfig) -> list[str]:
    """The tables that the study has, in the order of CELLS."""
    return [table for table in CELLS if (study.root / "tables" / f"{table}.csv").is_file()]


def _no_file(study: StudyConfig, name: Path) -> str:
    path, arms = study.root / name, ", ".join(study.arms)
    if len(name.parts) > 1 and name.parts[0] in ("scores", "images", "runs") and name.parts[1] not in study.arms:
        return f"{path}: no such file, and the study has no arm `{name.parts[1]}`. Arms: {arms}."
    there = sorted(file.name for file in path.parent.glob("*")) if path.parent.is_dir() else []
    command, _ = _maker(Evidence(study, {}, {}), name)
    near = nearest(name.name, there) if there else ""
    return f"{path}: no such file. `{command}` makes it, where the study has it.{near}"


def _read(study: StudyConfig, table: str) -> list[dict[str, str]]:
    path = study.root / "tables" / f"{table}.csv"
    if not path.is_file():
        raise InvdpoError(
            f"{path}: no such file. {_table_maker(study, table)} makes it, where the study has it. Tables that are "
            f"there: {', '.join(_tables(study))}."
        )
    return _rows_of(path)


def _rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def _table_maker(study: StudyConfig, table: str) -> str:
    if table == "speed":
        return "make bench"
    if table in ("table_s4", "user_study"):
        return f"make user-study-analysis STUDY={study.study}"
    return _again_by(study, "tables" if table in TABLES else "present")


def _again_by(study: StudyConfig, stage: str) -> str:
    """The command that makes what a stage of evidence makes."""
    if study.root.parent == REFERENCE:
        return f"invdpo rebuild {study.study}"
    return f"invdpo {stage} --study {config_file(study)}"


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _places(study: StudyConfig, number: Number) -> Iterator[Trace]:
    """Every claim and cell with that number: values of claims, ends of their intervals, what they quote, cells, and
    last the ends of intervals and what else a table says of a cell.
    """
    rows = _verdicts(study)
    for row in rows:
        if row.value is not None and number.rounds(row.value):
            yield Trace(_claimed(row), f"{row.value:g}")
    for row in rows:
        ends = [end for end in (row.low, row.high) if end is not None and number.rounds(end)]
        if ends:
            yield Trace(_claimed(row), f"{ends[0]:g}, an end of the interval of {row.value:g}")
    for row in rows:
        if number.said(row.paper_value):
            yield Trace(_claimed(row), f"{row.paper_value}, which the paper says")
    cells = [
        Trace(f"{address(table, record)}:{column}", text)
        for table in _tables(study)
        for record in _read(study, table)
        for column, text in record.items()
        if column not in (*CELLS[table].keys, *CELLS[table].also)
        if (value := _number(text)) is not None and number.rounds(value)
    ]
    yield from sorted(cells, key=lambda cell: ENDS.search(cell.address) is not None)


def _verdicts(study: StudyConfig) -> list[Verdict]:
    path = study.root / "claims.json"
    return read_verdicts(path) if path.is_file() else []


def _claimed(row: Verdict) -> str:
    return f"claim:{row.id}" + (f":{row.variant}" if row.variant else "")


def _cell(study: StudyConfig, table: str, asked: str, one: OneImage) -> Trace:
    records = _read(study, table)
    if not records:
        raise InvdpoError(f"{study.root / 'tables' / table}.csv has no rows: nothing that it shows was run.")
    cell = find(table, records, asked)
    stored = records[cell.row]
    facts = {
        "file": str(study.root / "tables" / f"{table}.csv"),
        "row": address(table, stored).partition(":")[2],
        "status": stored.get("status"),
    }
    mains = list(dict.fromkeys(ENDS.sub("", name) for name in cell.columns))
    for column in mains:
        low, high = (stored.get(f"{column}_{end}") for end in ("low", "high"))
        facts[column] = (stored.get(column) or "no number") + (f", interval {low} to {high}" if low else "")
    links = [Link("Cell", facts, _table_maker(study, table))]
    ours = [column for column in mains if not (column.startswith("paper_") or stored.get("source") == "paper")]
    links += [link for column in mains if column not in ours for link in _paper(study, column, stored, table)]
    if ours:
        evidence = load_evidence(study)
        made = source(evidence, table, stored, ours[0])
        links.append(_statistic(evidence, made, table, ours, stored))
        links += [*made.beside, *chain(evidence, made.arms, made.scorers, one)]
    value = " / ".join(stored[name] or NONE for name in cell.columns)
    return Trace(f"{address(table, stored)}:{cell.column}", value, links)


def _statistic(evidence: Evidence, made: Source, table: str, columns: Sequence[str], stored: Record) -> Link:
    scorer = made.scorers[0] if made.scorers else None
    known = [evidence.scores[arm] for arm in made.arms if evidence.has(arm, scorer)]
    facts: dict[str, Any] = {"what": made.words, "arms": list(made.arms)}
    if made.scorers:
        facts |= {"score": ", ".join(made.scorers), "interval": NOTE}
    if known and len(known) == len(made.arms):
        facts["checkpoints"] = {found.arm: f"step {found.steps[-1]}" for found in known}
        facts["training seeds"] = max(len(found.seeds) for found in known)
        if scorer is not None and scorer in known[0].values:
            facts["prompts"] = known[0].values[scorer].shape[-1]
    if (records := _again(evidence, table)) is not None:
        keys = CELLS[table].keys
        found = next((row for row in records if all(csv_cell(row.get(key)) == stored[key] for key in keys)), {})
        again = [csv_cell(found.get(column)) for column in columns]
        same = "the same" if again == [stored[column] for column in columns] else "NOT what is stored"
        facts["from the files, now"] = f"{' / '.join(text or 'nothing' for text in again)} ({same})"
    study = evidence.study
    lacks = [lack.command for arm in made.arms if arm in study.arms and (lack := evidence.lack(arm, scorer))]
    return Link("Statistic", facts, "; ".join(lacks) if made.scorers else "")


def _again(evidence: Evidence, table: str) -> Sequence[Mapping[str, Any]] | None:
    """A table's rows from the files that they are made from; None where another program makes them."""
    if table in TABLES:
        return TABLES[table](evidence).records
    if table in EVIDENCE:
        return EVIDENCE[table][0](evidence.study).records
    return _rows_of(SPEED) if table == "speed" and SPEED.is_file() else None


def _paper(study: StudyConfig, column: str, stored: Record, table: str) -> list[Link]:
    """The rows of published.csv that a cell of the paper's repeats, or is the difference of."""
    if table == "table2":
        wanted = {"table": "2", "metric": column, "method": stored["arm"], "base": stored["base"]}
        found = [row for row in published() if wanted.items() <= row.items()]
    else:
        _, metric, base = column.split("_")
        number = {"table1": "1", "table3": "3", "table_s5": "s5"}[table]
        wanted = {"table": number, "metric": metric, "base": base, "inversion_steps": stored.get("inversion_steps", "")}
        arms = (stored.get("arm") or stored["row"]).split(" - ") if stored[column] else []
        rows = [row for row in published() if wanted.items() <= row.items()]
        found = [row for arm in arms for row in rows if _is_of(study, arm, row)]
    facts = [{key: row[key] for key in row if row[key]} for row in found]
    none = {"what": "none: src/invdpo/evidence/published.csv has no number of the paper's for this row"}
    return [Link("The paper's own number", fact) for fact in facts or [none]]


def _is_of(study: StudyConfig, arm: str, row: Mapping[str, str]) -> bool:
    """Whether a published row is of that arm's recipe, or of its weights."""
    if arm not in study.arms:  # a row that this study cannot fill goes by the paper's name for it
        return row["method"] == arm
    entry = study.arms[arm]
    recipes = row["recipes"].split(";")
    return Path(entry.method).stem in recipes if entry.weights is None else row["method"] == entry.published


def _claim(study: StudyConfig, asked: str, one: OneImage) -> Trace:
    name, _, variant = asked.partition(":")
    every = _verdicts(study)
    rows = [row for row in every if row.id == name and variant in ("", row.variant)]
    if not rows:
        known = {_claimed(row).removeprefix("claim:") for row in every}
        ids = ", ".join(dict.fromkeys(row.id for row in every)) or "none"
        near = nearest(asked, known)
        raise InvdpoError(
            f"{study.root / 'claims.json'} has no claim `{asked}`.{near if near.startswith(' Did') else ''} "
            f"Claims: {ids}."
        )
    if len(rows) > 1:
        raise InvdpoError(f"`claim:{name}` has several readings. Name one: {', '.join(map(_claimed, rows))}")
    row = rows[0]
    claim = next((claim for claim in load_claims(Path(str(study.claims))) if claim.id == name), None)
    if claim is None:
        raise InvdpoError(f"{study.claims} has no claim `{name}` any more. {_again_by(study, 'claims')}")
    evidence = load_evidence(study)
    again = judge(evidence, claim, row.variant)
    facts = {
        "file": str(study.root / "claims.json"),
        "written down in": str(study.claims),
        "question": row.question,
        "where": row.locus,
        "quotation": row.quote,
        "the paper's value": row.paper_value,
        "verdict": row.verdict,
        "value": row.value,
        "from, to": None if row.low is None else f"{row.low:g} to {'∞' if row.high is None else f'{row.high:g}'}",
        "which are": row.interval,
        "reason": row.reason,
        "what would settle it": row.would_settle,
        "deviations that apply": row.deviations,
    }
    same = _judged(again) == _judged(row)
    statistic = {
        "test": {key: value for key, value in row.test.items() if value not in (None, "", [])},
        "training seeds": row.seeds or None,
        "prompts": row.prompts or None,
        "held-out pairs": row.pairs or None,
        "batches": row.batches or None,
        "pictures": row.pictures or None,
        "p": row.p_value,
        "p, Holm": row.p_holm,
        "read from": row.artifacts,
        "from the files, now": f"{again.verdict}, {csv_cell(again.value) or 'no value'} "
        f"({'the same' if same else 'NOT what is stored'})",
    }
    links = [Link("Claim", facts, _again_by(study, "claims")), Link("Statistic", statistic)]
    value = row.verdict if row.value is None else f"{row.value:g} ({row.verdict})"
    return Trace(_claimed(row), value, [*links, *_behind(evidence, row, one)])


def _judged(row: Verdict) -> tuple[str, ...]:
    return (row.verdict, *map(csv_cell, (row.value, row.low, row.high)))


def _behind(evidence: Evidence, row: Verdict, one: OneImage) -> list[Link]:
    """What a claim's test read: the files that its verdict names, and of them the arms and the score of the test."""
    study, test, base = evidence.study, row.test, baseline_arm(evidence.study)
    if not row.artifacts:
        return [Link("Nothing was measured", {"why": row.reason}, row.command)]
    tested = {*test.get("arms", []), test.get("policy"), base}
    beside: dict[str, Link] = {}
    arms: dict[str, None] = {}
    scorers: Sequence[str] | None = None
    for artifact in row.artifacts:
        name = Path(artifact)
        _, made = _maker(evidence, name)
        recipes = test.get("arms", []) if name.parts[0] == "experiments" else []
        links = [*made.beside, *(recipe_of(study, name.parts[1], label) for label in recipes)]
        beside |= {link.what: link for link in links}
        arms |= dict.fromkeys(arm for arm in made.arms if arm in tested)
        if made.scorers is not None and (test.get("metric") or not made.scorers):
            scorers = [test["metric"]] if made.scorers else scorers or []
    known = [arm for arm in dict.fromkeys([*test.get("arms", []), *arms]) if arm in arms]
    known = known or [arm for arm in [base] if arm is not None]
    return [*beside.values(), *chain(evidence, known, scorers, one)]


def _file(evidence: Evidence, name: str, one: OneImage) -> Trace:
    """A file of a study's results."""
    path = evidence.study.root / name
    command, made = _maker(evidence, Path(name))
    digest = sha256_file(path)
    facts = {"path": str(path), "bytes": f"{path.stat().st_size:,}", "sha256": digest, "arms": list(made.arms)}
    links = [Link("File", facts, command), *made.beside]
    seed = re.search(r"seed(\d+)", name)
    if seed is not None and one.seed is None:
        one = OneImage(int(seed[1]), one.prompt)
    return Trace(name, f"sha256 {digest}", [*links, *chain(evidence, made.arms, made.scorers, one)])


def _maker(evidence: Evidence, name: Path) -> tuple[str, Source]:
    """The command that makes a file or folder of the results, by its path in them, and what it is made from."""
    made = MAKERS.get(name.parts[0])
    found = made(evidence, name) if made is not None else None
    if found is None:
        raise InvdpoError(
            f"{evidence.study.root / name} is no file of the stages that lead to a result. Those are below "
            f"{', '.join(part for part in MAKERS if '.' not in part)}, or one of "
            f"{', '.join(part for part in MAKERS if '.' in part)}."
        )
    return found


def _of_arm(stage: str, evidence: Evidence, name: Path) -> tuple[str, Source] | None:
    """scores/ARM/, images/ARM/ and runs/ARM/."""
    study = evidence.study
    if len(name.parts) < 2 or name.parts[1] not in study.arms:
        return None
    command = f"invdpo {stage} --study {config_file(study)} --arm {name.parts[1]}"
    return command, Source("", [name.parts[1]], evidence.scorers)


def _of_experiment(evidence: Evidence, name: Path) -> tuple[str, Source] | None:
    study = evidence.study
    if len(name.parts) < 2 or name.parts[1] not in EVIDENCE:
        return None
    link = experiment(study, name.parts[1])
    return link.command, Source("", _arms_of_experiment(study, name.parts[1]), None, (link,))


def _arms_of_experiment(study: StudyConfig, name: str) -> list[str]:
    """Those whose runs it reads; without any, its latents are the base model's."""
    return study.experiments.trained_arms(name) or [arm for arm in [baseline_arm(study)] if arm is not None]


def _of_sets(evidence: Evidence, name: Path) -> tuple[str, Source] | None:
    settings, link = evidence.study.experiments.distribution, distribution(evidence.study)
    return link.command, Source("", settings.arms if settings else [], [], (link,))


def _table(evidence: Evidence, name: Path) -> tuple[str, Source] | None:
    if name.name == FILE:
        return _of_all("tables", evidence, name)
    study, table = evidence.study, name.stem
    command = _table_maker(study, table)
    if table in EVIDENCE:
        return command, Source("", _arms_of_experiment(study, table), None, (experiment(study, table),))
    if table == "speed":
        return command, Source("", beside=(benchmark(),))
    if table not in CELLS:
        return None
    rows = _read(study, table) if (study.root / "tables" / f"{table}.csv").is_file() else []
    keys = ("arm", "against", "baseline", "row")
    named = dict.fromkeys(arm for row in rows for key in keys for arm in row.get(key, "").split(" - "))
    arms = [arm for arm in named if arm in study.arms]
    if table not in TABLES:
        return command, Source("", arms, [], (votes(study),))
    bases = [base for arm in arms if (base := baseline_of(study, arm)) is not None]
    beside = (distribution(study),) if table == "table2" else ()
    return command, Source("", list(dict.fromkeys([*arms, *bases])), evidence.scorers, beside)


def _figure(evidence: Evidence, name: Path) -> tuple[str, Source] | None:
    if name.name == FILE:
        return _of_all("figures", evidence, name)
    study, stem = evidence.study, name.stem
    measured = next((experiment for experiment, (_, drawn) in EVIDENCE.items() if stem in drawn), None)
    if measured is not None:
        arms, link = _arms_of_experiment(study, measured), experiment(study, measured)
        return _again_by(study, "present"), Source("", arms, None, (link,))
    if stem in CHOICES:
        choice = CHOICES[stem](evidence)
        prompts = [evidence.scores[choice.arms[0]].prompts[place] for place in choice.prompts] if choice.arms else []
        facts = {"rule": choice.rule, "prompts": [number for _, number in prompts]}
        return _again_by(study, "figures"), Source("", choice.arms, choice.shown, (Link("Pictures shown", facts),))
    drawn = {
        **dict.fromkeys(CURVES, comparison_arms(study)),
        "controls": [arm for method, arms in control_arms(study).items() for arm in (method, *arms.values())],
        "inversion_steps": [arm for arms in step_families(study).values() for arm in arms.values()],
    }
    if stem not in drawn:
        return None
    metric = CURVES.get(stem)
    scorers = [evidence.primary if metric == "primary" else metric] if metric else evidence.scorers
    base = [arm for arm in [baseline_arm(study)] if arm is not None]
    return _again_by(study, "figures"), Source("", list(dict.fromkeys([*drawn[stem], *base])), scorers)


def _judged_claims(evidence: Evidence, name: Path) -> tuple[str, Source]:
    verdicts = {_claimed(row): row.verdict for row in _verdicts(evidence.study)}
    return _again_by(evidence.study, "claims"), Source(
        "", beside=(Link("Verdicts, each with a way of its own", verdicts),)
    )


def _of_all(stage: str, evidence: Evidence, name: Path) -> tuple[str, Source]:
    """A file that shows all arms of the study."""
    study = evidence.study
    command = _again_by(study, stage) if stage == "tables" else f"invdpo {stage} --study {config_file(study)}"
    return command, Source("", list(study.arms), evidence.scorers)


def _of_study(how: str, evidence: Evidence, name: Path) -> tuple[str, Source]:
    """A file about the study, of no arm."""
    return how.format(config_file(evidence.study)), Source("")


def _of_people(evidence: Evidence, name: Path) -> tuple[str, Source]:
    return _table_maker(evidence.study, "table_s4"), Source("", beside=(votes(evidence.study),))


# first part of a path below a study's results -> how it is made; None for what lies there and no stage made
MAKERS: dict[str, Callable[[Evidence, Path], tuple[str, Source] | None]] = {
    "scores": partial(_of_arm, "evaluate"),
    "images": partial(_of_arm, "evaluate"),
    "runs": partial(_of_arm, "train"),
    "experiments": _of_experiment,
    "tables": _table,
    "figures": _figure,
    "user_study": _of_people,
    "distribution.csv": _of_sets,
    "distribution.json": _of_sets,
    "claims.json": _judged_claims,
    "claims.md": _judged_claims,
    "costs.json": partial(_of_all, "tables"),
    "report.html": partial(_of_all, "report"),
    "mlflow.db": partial(_of_all, "mlflow"),
    "study.json": partial(_of_study, "{}, resolved"),
    "provenance.json": partial(_of_study, "invdpo publish --study {}"),
    "ro-crate-metadata.json": partial(_of_study, "invdpo publish --study {}"),
}
