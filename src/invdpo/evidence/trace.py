"""From a number in a table, a claim or a file of a study back to what it was made from, and with which commands."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.config import load_study, nearest
from invdpo.errors import InvdpoError
from invdpo.evidence.claims import judge
from invdpo.evidence.comparisons import NOTE
from invdpo.evidence.compositional import GRAPH_METRICS, SET_METRICS
from invdpo.evidence.experiments import EVIDENCE
from invdpo.evidence.figures import CURVES
from invdpo.evidence.grids import CHOICES
from invdpo.evidence.ledger import Verdict, load_claims, read_verdicts
from invdpo.evidence.lineage import Link, OneImage, chain, distribution, experiment, recipe_file
from invdpo.evidence.load import (
    SCORERS,
    Evidence,
    arm_title,
    baseline_arm,
    comparison_arms,
    config_file,
    control_arms,
    load_evidence,
    published,
    scorer_title,
    step_families,
)
from invdpo.evidence.printing import Table, csv_cell
from invdpo.evidence.publish import figures_folder
from invdpo.evidence.rebuild import REFERENCE
from invdpo.evidence.tables import TABLES
from invdpo.provenance import sha256_file
from invdpo.scorers.composition import BENCHMARKS

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

# table -> the columns of its csv file that tell its rows apart
KEYS = {
    "table1": ("arm",),
    "win_rates": ("arm", "against", "scorer"),
    "over_optimisation": ("arm", "from_step", "to_step"),
    "to_target": ("arm", "scorer", "axis"),
    "table2": ("arm", "base"),
    "table3": ("arm",),
    "table_s5": ("row",),
    "controls": ("arm", "scorer"),
    "composition": ("arm", "benchmark", "task"),
    "costs": ("arm",),
    "inversion_error": ("solver", "guidance_scale", "steps"),
    "precision": ("arm", "recipe", "steps", "draws"),
    "audit": ("recipe", "policy", "precision", "noise"),
    "preference_accuracy": ("scorer",),
}
# What is said of the number in the column before it.
ENDS = re.compile("_(prompts_low|prompts_high|seeds_low|seeds_high|low|high|p_holm|detectable|standing)$")
# column -> what it is the mean of, over training seeds
SPENT = {
    "optimizer_steps": "the last checkpoint's optimizer step",
    "pairs_seen": "pairs seen up to the last checkpoint, in the training log",
    "unet_evals": "UNet evaluations up to the last checkpoint, in the training log",
}


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


@dataclass(frozen=True)
class _Meaning:
    """What a cell of a table measures. scorers: None where it is not a score."""

    words: str
    arms: list[str]
    scorers: list[str] | None = None
    beside: tuple[Link, ...] = ()


def _shown(value: Any, depth: int = 2) -> str:
    if isinstance(value, Mapping):
        return "".join(f"\n{'  ' * depth}{name}: {_shown(part, depth + 1)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def place(what: str, study: Path, reference: bool) -> tuple[str, StudyConfig]:
    """The address without its folder, and the study placed where its results are looked for.

    A path names its results itself: results/shapes/tables/table1.md:ROW:COLUMN, or any file of a study, also in
    paper_figures/. Any other address is looked up in the results of `study`, or with `reference` in those published of
    it. InvdpoError where there are none.
    """
    name, colon, rest = what.partition(":")
    path = Path(name)
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
        judged = (root / "claims.json").is_file()
        if path.parent == figures_folder(Path(), root.name, judged) and (root / _part(path)).is_file():
            return root
    return None


def trace(what: str, study: StudyConfig, one: OneImage | None = None) -> list[Trace]:
    """Where a number comes from: `table1:ROW:COLUMN`, `claim:ID[:VARIANT]`, a file of the study, or a bare number,
    looked up everywhere.

    A row goes by the names of its columns in KEYS, as many as tell it apart, and they and columns by their names in
    the csv file or in print. Of a bare number that several cells and claims have, each is given without its way.
    """
    evidence, one = load_evidence(study), one or OneImage()
    if (study.root / what).is_file():
        return [_file(evidence, what, one)]
    if _number(what) is not None:
        hits = list(_lookup(evidence, what))
        if not hits:
            raise InvdpoError(f"{what} is in no table of {study.root / 'tables'} and no claim. Try fewer digits.")
        if len(hits) > 1:
            return hits
        what = hits[0].address
    head, _, rest = what.partition(":")
    if head == "claim":
        return [_claim(evidence, rest, one)]
    if head not in KEYS:
        raise InvdpoError(
            f"`{what}` is no address: write TABLE:ROW:COLUMN (tables: {', '.join(KEYS)}), claim:ID, a number, or a "
            "file of the study's results."
        )
    row, colon, column = rest.rpartition(":")
    if not colon:
        raise InvdpoError(f"`{what}` names no column: write {head}:ROW:COLUMN.")
    return [_cell(evidence, head, *_find(_read(study, head), head, row, column), one)]


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _read(study: StudyConfig, table: str) -> list[dict[str, str]]:
    path = study.root / "tables" / f"{table}.csv"
    if not path.is_file():
        raise InvdpoError(f"{path}: no such file. {_again_by(study, _stage(table))} makes it, where the study has it.")
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def _stage(table: str) -> str:
    return "tables" if table in TABLES else "present"


def _again_by(study: StudyConfig, stage: str) -> str:
    """The command that makes what a stage of evidence makes."""
    if study.root.parent == REFERENCE:
        return f"invdpo rebuild {study.study}"
    return f"invdpo {stage} --study {config_file(study)}"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", text.lower())


def _names(value: str) -> set[str]:
    """What a value of a key column may be called."""
    paired = {"Difference, paired"} if " - " in value else set()
    return {_plain(name) for name in {value, arm_title(value), scorer_title(value), *paired}}


def _address(table: str, record: Mapping[str, str]) -> str:
    return ":".join([table, *(record[key] for key in KEYS[table] if record[key])])


def _split(column: str) -> tuple[str | None, str]:
    """A csv column -> its score, if it is one of a score, and what of it: ``, `minus_base`, `win_rate_low`, …"""
    for scorer in sorted(SCORERS, key=len, reverse=True):
        if column == scorer or column.startswith(f"{scorer}_"):
            return scorer, column.removeprefix(scorer).removeprefix("_")
    return None, column


def _find(records: list[dict[str, str]], table: str, row: str, column: str) -> tuple[int, str]:
    """The row's place and the column's name."""
    parts = [_plain(part) for part in row.split(":")]
    found = [
        place
        for place, record in enumerate(records)
        if all(any(part in _names(record[key]) for key in KEYS[table]) for part in parts)
    ]
    if not found:
        known = [_address(table, record).removeprefix(f"{table}:") for record in records]
        raise InvdpoError(f"{table} has no row `{row}`.{nearest(row, known)}")
    if len(found) > 1:
        choices = ", ".join(f"{_address(table, records[place])}:{column}" for place in found[:12])
        raise InvdpoError(f"{table} has {len(found)} rows `{row}`. Name one: {choices}")
    columns = {}
    for key in records[0]:
        scorer, rest = _split(key)
        columns |= {_plain(key): key, _plain(f"{scorer_title(scorer)} {rest}" if scorer else key): key}
    if _plain(column) not in columns:
        raise InvdpoError(f"{table} has no column `{column}`.{nearest(column, records[0])}")
    return found[0], columns[_plain(column)]


def _lookup(evidence: Evidence, text: str) -> Iterator[Trace]:
    """Every cell and claim with that number, to the decimals it is given with."""
    wanted = text.removeprefix("+")
    decimals = len(wanted.partition(".")[2])
    for table in KEYS:
        if not (evidence.study.root / "tables" / f"{table}.csv").is_file():
            continue
        for record in _read(evidence.study, table):
            for column, cell in record.items():
                value = _number(cell)
                if value is None or f"{value:.{decimals}f}" != wanted or ENDS.search(column):
                    continue
                if column.startswith("paper_") or _meaning(evidence, table, column, record):
                    yield Trace(f"{_address(table, record)}:{column}", cell)
    for row in _verdicts(evidence.study):
        if row.value is not None and f"{row.value:.{decimals}f}" == wanted:
            yield Trace(f"claim:{row.id}" + (f":{row.variant}" if row.variant else ""), f"{row.value:g}")


def _verdicts(study: StudyConfig) -> list[Verdict]:
    path = study.root / "claims.json"
    return read_verdicts(path) if path.is_file() else []


def _cell(evidence: Evidence, table: str, row: int, name: str, one: OneImage) -> Trace:
    study = evidence.study
    stored = _read(study, table)[row]
    column = ENDS.sub("", name)
    low, high = (stored.get(f"{column}_{end}") for end in ("low", "high"))
    facts = {
        "file": str(study.root / "tables" / f"{table}.csv"),
        "row": _address(table, stored).partition(":")[2],
        "column": column,
        "value": stored.get(column),
        "interval": f"{low} to {high}" if low else "",
        "status": stored.get("status"),
    }
    links = [Link("Cell", facts, _again_by(study, _stage(table)))]
    if column.startswith("paper_") or stored.get("source") == "paper":
        links += _paper(column, stored, table)
    elif (meaning := _meaning(evidence, table, column, stored)) is None:
        raise InvdpoError(f"`{name}` of {table} is no number that was measured. Name a score, a difference or a cost.")
    else:
        built = TABLES[table](evidence) if table in TABLES else EVIDENCE[table][0](study)
        links.append(_statistic(evidence, meaning, built, row, column, stored))
        links += [*meaning.beside, *chain(evidence, meaning.arms, meaning.scorers, one)]
    return Trace(f"{_address(table, stored)}:{name}", stored[name], links)


def _meaning(evidence: Evidence, table: str, column: str, stored: Mapping[str, str]) -> _Meaning | None:
    """What a cell that is not the paper's measures; None where it is no number that was measured."""
    study = evidence.study
    base = [name] if (name := baseline_arm(study)) else []
    arm = stored.get("arm") or stored.get("row") or ""
    if table in EVIDENCE:
        if column in KEYS[table] or _number(stored.get(column)) is None:
            return None
        arms = [name for key in ("arm", "policy") if (name := stored.get(key, "").partition(",")[0]) in study.arms]
        return _Meaning(f"`{column}` over the experiment's latents, batches or votes", arms, None,
                        (experiment(study, table),))  # fmt: skip
    if column in SPENT:
        return _Meaning(f"mean over training seeds of {SPENT[column]}", [arm])
    if table == "win_rates" and column == "win_rate":
        words = "share of seeds and prompts where the first arm scores higher, a tie one half"
        return _Meaning(words, [arm, stored["against"]], [stored["scorer"]])
    if table == "to_target" and column in ("cost", "ratio", "never_reached", "no_target"):
        target = study.experiments.to_target
        words = f"when the arm's mean reaches the final one of the target, on the axis `{stored['axis']}`"
        return _Meaning(words, [arm, *([target.arm] if target else []), *base], [stored["scorer"]])
    if table == "composition" and column == "score":
        tasks = BENCHMARKS[stored["benchmark"]] if stored["task"] == "overall" else [stored["task"]]
        return _Meaning(
            "mean of the last checkpoint", [arm], [f"oracle_{stored['benchmark']}_{task}" for task in tasks]
        )
    if table == "table2" and column in SET_METRICS:
        return _Meaning(
            "mean over training seeds of the distance of a seed's images", [arm], [], (distribution(study),)
        )
    if table == "table2" and column.removesuffix("_minus_base") in GRAPH_METRICS:
        column = f"oracle_{column}"
    scorer, rest = _split(column)
    if table == "controls":
        scorer, rest = stored["scorer"], column
    if scorer is None:
        return None
    if " - " in arm:
        return _Meaning(
            "mean paired difference (by seed and prompt) of the last checkpoints", arm.split(" - "), [scorer]
        )
    if table == "over_optimisation":
        words = f"mean paired change from step {stored['from_step']} to step {stored['to_step']}"
        return _Meaning(words, [arm, *base], [scorer])
    fewest = next((arms for arms in step_families(study).values() if arm in arms.values()), {arm: arm})
    meanings = {
        "": ("mean score of the last checkpoint", [arm]),
        "minus_base": ("mean paired difference from the base model at the last checkpoint", [arm, *base]),
        "win_rate": ("share of seeds and prompts where the arm beats the base model, a tie one half", [arm, *base]),
        "minus_fewest": ("mean paired difference from the fewest inversion steps", [arm, next(iter(fewest.values()))]),
        "true_minus_control": ("mean paired difference, true labels minus these", [stored.get("method", ""), arm]),
    }
    if rest not in meanings:
        return None
    words, arms = meanings[rest]
    return _Meaning(words, list(dict.fromkeys(arms)), [scorer])


def _statistic(
    evidence: Evidence, meaning: _Meaning, built: Table, row: int, column: str, stored: Mapping[str, str]
) -> Link:
    scorer = meaning.scorers[0] if meaning.scorers else None
    known = [evidence.scores[arm] for arm in meaning.arms if evidence.has(arm, scorer)]
    facts: dict[str, Any] = {"what": meaning.words, "arms": meaning.arms}
    if meaning.scorers:
        facts |= {"score": ", ".join(meaning.scorers), "interval": NOTE}
    if known and len(known) == len(meaning.arms):
        facts["checkpoints"] = {found.arm: f"step {found.steps[-1]}" for found in known}
        facts["training seeds"] = max(len(found.seeds) for found in known)
        if scorer is not None and scorer in known[0].values:
            facts["prompts"] = known[0].values[scorer].shape[-1]
    again = csv_cell(built.records[row].get(column)) if row < len(built.records) else ""
    same = "the same" if again == stored[column] else "NOT what is stored"
    facts["from the files, now"] = f"{again or 'nothing'} ({same})"
    lacks = [
        lack.command for arm in meaning.arms if arm in evidence.study.arms and (lack := evidence.lack(arm, scorer))
    ]
    return Link("Statistic", facts, "; ".join(lacks) if meaning.scorers else "")


def _paper(column: str, stored: Mapping[str, str], table: str) -> list[Link]:
    """The rows of published.csv that a cell of the paper's repeats."""
    value = _number(stored[column])
    if table == "table2":
        wanted = {"table": "2", "metric": column, "method": stored["arm"], "base": stored["base"]}
    else:
        _, metric, base = column.split("_")
        number = {"table1": "1", "table3": "3", "table_s5": "s5"}[table]
        wanted = {"table": number, "metric": metric, "base": base, "inversion_steps": stored.get("inversion_steps", "")}
    found = [row for row in published() if wanted.items() <= row.items() and float(row["value"]) == value]
    return [Link("The paper's own number", {key: row[key] for key in row if row[key]}) for row in found]


def _claim(evidence: Evidence, address: str, one: OneImage) -> Trace:
    study = evidence.study
    name, _, variant = address.partition(":")
    rows = [row for row in _verdicts(study) if row.id == name and variant in ("", row.variant)]
    if not rows:
        known = {f"{row.id}:{row.variant}" if row.variant else row.id for row in _verdicts(study)}
        raise InvdpoError(f"{study.root / 'claims.json'} has no claim `{address}`.{nearest(address, known)}")
    if len(rows) > 1:
        choices = ", ".join(f"claim:{row.id}:{row.variant}" for row in rows)
        raise InvdpoError(f"`claim:{name}` has several readings. Name one: {choices}")
    row = rows[0]
    claim = next((claim for claim in load_claims(Path(str(study.claims))) if claim.id == name), None)
    if claim is None:
        raise InvdpoError(f"{study.claims} has no claim `{name}` any more. {_again_by(study, 'claims')}")
    again = judge(evidence, claim, row.variant)
    facts = {
        "file": str(study.root / "claims.json"),
        "question": row.question,
        "where": row.locus,
        "quotation": row.quote,
        "the paper's value": row.paper_value,
        "verdict": row.verdict,
        "value": row.value,
        "interval": None if row.low is None else f"{row.low:g} to {'∞' if row.high is None else f'{row.high:g}'}",
        "reason": row.reason,
        "what would settle it": row.would_settle,
    }
    same = (again.verdict, csv_cell(again.value)) == (row.verdict, csv_cell(row.value))
    statistic = {
        "test": {key: value for key, value in row.test.items() if value not in (None, "", [])},
        "training seeds": row.seeds,
        "prompts": row.prompts or None,
        "held-out pairs": row.pairs or None,
        "batches": row.batches or None,
        "p": row.p_value,
        "p, Holm": row.p_holm,
        "from the files, now": f"{again.verdict}, {csv_cell(again.value) or 'no value'} "
        f"({'the same' if same else 'NOT what is stored'})",
    }
    links = [Link("Claim", facts, _again_by(study, "claims")), Link("Statistic", statistic)]
    value = row.verdict if row.value is None else f"{row.value:g} ({row.verdict})"
    address = f"claim:{row.id}" + (f":{row.variant}" if row.variant else "")
    return Trace(address, value, [*links, *_behind(evidence, row, one)])


def _behind(evidence: Evidence, row: Verdict, one: OneImage) -> list[Link]:
    """What a claim's test reads: scores, training logs, or an experiment's files."""
    study, kind = evidence.study, row.test["kind"]
    arms = [arm for arm in row.test["arms"] if arm in study.arms]
    if kind == "agreement":
        settings = study.experiments.precision
        recipes = {arm: settings.recipes.get(arm) for arm in row.test["arms"]} if settings else {}
        links = [experiment(study, "precision")]
        for label, entry in recipes.items():
            if entry is not None:
                facts = {"file": recipe_file(entry.method or label), "overrides": entry.recipe}
                links.append(Link(f"Recipe {label}", facts))
        return links + chain(evidence, [arm for arm in [row.test["policy"]] if arm in study.arms], None, one)
    if row.test.get("rounding") is not None:
        return [experiment(study, "audit"), *chain(evidence, arms, None, one)]
    return chain(evidence, arms, None if kind in ("gradient", "distance") else [row.test["metric"]], one)


def _file(evidence: Evidence, name: str, one: OneImage) -> Trace:
    """A file of a study's results."""
    path = evidence.study.root / name
    digest = sha256_file(path)
    command, arms, beside = _makers(evidence, Path(name))
    facts = {"path": str(path), "bytes": f"{path.stat().st_size:,}", "sha256": digest, "arms": arms}
    links = [Link("File", facts, command), *beside]
    if arms:
        links += chain(evidence, arms, evidence.scorers, one)
    return Trace(name, f"sha256 {digest}", links)


def _makers(evidence: Evidence, name: Path) -> tuple[str, list[str], list[Link]]:
    """The command that makes a file of the results, the arms that it rests on, and what it rests on beside them."""
    study, part, stem = evidence.study, name.parts[0], name.stem
    base = [arm for arm in [baseline_arm(study)] if arm]
    if part in ("scores", "images", "runs") and name.parts[1] in study.arms:
        stage = "train" if part == "runs" else "evaluate"
        return f"invdpo {stage} --study {config_file(study)} --arm {name.parts[1]}", [name.parts[1]], []
    figures = {figure: title for title, (_, drawn) in EVIDENCE.items() for figure in drawn}
    measured = name.parts[1] if part == "experiments" else figures.get(stem, stem)
    if measured in EVIDENCE:
        link = experiment(study, measured)
        command = link.command if part == "experiments" else _again_by(study, "present")
        return command, study.experiments.trained_arms(measured), [link]
    if name.name in ("distribution.csv", "distribution.json"):
        settings = study.experiments.distribution
        return distribution(study).command, settings.arms if settings else [], [distribution(study)]
    if part == "tables" and stem in TABLES:
        rows = _read(study, stem)
        named = [arm for row in rows for key in ("arm", "against", "row") for arm in row.get(key, "").split(" - ")]
        return _again_by(study, "tables"), [arm for arm in dict.fromkeys([*named, *base]) if arm in study.arms], []
    if part == "figures":
        grids, families = study.experiments.grids, step_families(study)
        drawn = {
            **dict.fromkeys(CURVES, comparison_arms(study)),
            "controls": [arm for method, arms in control_arms(study).items() for arm in (method, *arms.values())],
            "inversion_steps": [arm for arms in families.values() for arm in arms.values()],
            **dict.fromkeys(CHOICES, list(grids.arms) if grids else []),
        }
        return _again_by(study, "figures"), list(dict.fromkeys([*drawn.get(stem, study.arms), *base])), []
    if stem == "claims":
        judged = {f"claim:{row.id}" + (f":{row.variant}" if row.variant else ""): row.verdict
                  for row in _verdicts(study)}  # fmt: skip
        return _again_by(study, "claims"), [], [Link("Verdicts, each with a way of its own", judged)]
    commands = {
        "costs.json": _again_by(study, "tables"),
        "tables/speed.csv": "make bench",
        "report.html": f"invdpo report --study {config_file(study)}",
        "mlflow.db": f"invdpo mlflow --study {config_file(study)}",
        "study.json": f"{config_file(study)}, resolved",
        "provenance.json": f"invdpo publish --study {config_file(study)}",
        "ro-crate-metadata.json": f"invdpo publish --study {config_file(study)}",
    }
    if name.as_posix() in commands:
        return commands[name.as_posix()], list(study.arms) if stem in ("costs", "report", "mlflow") else [], []
    if part == "user_study" or stem in ("table_s4", "user_study"):
        return f"make user-study-analysis STUDY={study.study}", [], []
    raise InvdpoError(f"{study.root / name} is no file of the stages that lead to a result.")
