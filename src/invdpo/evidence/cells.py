"""The cells of every table of a study: how they are called, in the csv file and in print, and what they were made from.

`CELLS` has an entry a table; `find` reads an address by it, and `source` says what the cell that was found measures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from invdpo.config import nearest
from invdpo.errors import InvdpoError
from invdpo.evidence.comparisons import AXES
from invdpo.evidence.compositional import GRAPH_METRICS, SET_METRICS
from invdpo.evidence.experiments import SOLVERS, policy_title
from invdpo.evidence.lineage import Link, benchmark, distribution, experiment, recipe_of, votes
from invdpo.evidence.load import SCORERS, Evidence, arm_title, baseline_arm, baseline_of, scorer_title, step_families
from invdpo.scorers.composition import BENCHMARKS, TITLES

Record = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """What a number was made from. words: what it is. arms: whose runs it rests on. scorers: by which scores of these
    arms' images; empty: by the images alone; None: by neither. beside: what else it rests on.
    """

    words: str
    arms: Sequence[str] = ()
    scorers: Sequence[str] | None = None
    beside: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Printed:
    """A printed block of a table. caption: its own, or the beginning of it. heads: heading -> csv column, or several
    joined by " / " as their numbers are in print; `{}` is any score, by its title and by its name. where: csv values
    that the rows of the block have.
    """

    caption: str
    heads: Mapping[str, str]
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """A table's cells. keys: csv columns that tell its rows apart. source: (evidence, row, csv column) -> what the cell
    was made from. printed: blocks whose headings are not the csv file's. also: csv columns that may name a row beside
    the keys. main: the csv column of an address that names none.
    """

    keys: tuple[str, ...]
    source: Callable[[Evidence, Record, str], Source]
    printed: tuple[Printed, ...] = ()
    also: tuple[str, ...] = ()
    main: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell that an address names. row: its place in the csv file. column: how the address calls it. columns: those of
    the csv file whose numbers it has in print, mostly one.
    """

    table: str
    row: int
    column: str
    columns: tuple[str, ...]


SPENT = {
    "optimizer_steps": "the last checkpoint's optimizer step",
    "pairs_seen": "pairs seen up to the last checkpoint, in the training log",
    "unet_evals": "UNet evaluations up to the last checkpoint, in the training log",
}
OF_SCORES = {
    "status": "whether all that the row needs is there, or what is missing and the command that makes it",
    "seeds": "how many training seeds were scored",
    "prompts": "how many prompts were scored",
}
# What is said of the number in the column before it.
ENDS = re.compile("_(prompts_low|prompts_high|seeds_low|seeds_high|low|high|p_holm|detectable|standing)$")


def split(column: str) -> tuple[str | None, str]:
    """A csv column -> its score, if it is one of a score, and what of it: ``, `minus_base`, `win_rate_low`, …"""
    for scorer in sorted(SCORERS, key=len, reverse=True):
        if column == scorer or column.startswith(f"{scorer}_"):
            return scorer, column.removeprefix(scorer).removeprefix("_")
    return None, column


def _base(evidence: Evidence, arm: str) -> list[str]:
    base = baseline_of(evidence.study, arm) if arm in evidence.study.arms else None
    return [base] if base is not None else []


def _scored(evidence: Evidence, record: Record, column: str) -> Source:
    """A table of arms and scores."""
    arm = record.get("arm") or record["row"]
    arms = arm.split(" - ")
    if not set(arms) <= set(evidence.study.arms):
        return Source(f"nothing of this study's: {record.get('status') or 'no such arm'}")
    if column in SPENT:
        return Source(f"mean over training seeds of {SPENT[column]}", arms)
    scorer, rest = split(column)
    if scorer is None:
        return Source(OF_SCORES.get(column, f"`{column}` of the row"), arms, evidence.scorers)
    if len(arms) > 1:
        return Source("mean paired difference (by seed and prompt) of the last checkpoints", arms, [scorer])
    return _of_score(evidence, arm, scorer, rest)


def _of_score(evidence: Evidence, arm: str, scorer: str, rest: str) -> Source:
    """What is reported of one arm's score at its last checkpoint."""
    base = _base(evidence, arm)
    fewest = next((arms for arms in step_families(evidence.study).values() if arm in arms.values()), {0: arm})
    reported = {
        "": ("mean score of the last checkpoint", []),
        "minus_base": ("mean paired difference from the base model at the last checkpoint", base),
        "win_rate": ("share of seeds and prompts where the arm beats the base model, a tie one half", base),
        "minus_fewest": ("mean paired difference from the fewest inversion steps", [next(iter(fewest.values()))]),
    }
    words, others = reported.get(rest, (f"`{rest}` of the score", base))
    return Source(words, list(dict.fromkeys([arm, *others])), [scorer])


def _win_rate(evidence: Evidence, record: Record, column: str) -> Source:
    arms = [record["arm"], record["against"]]
    words = {
        "win_rate": "share of seeds and prompts where the first arm scores higher, a tie one half",
        "ties": "share of seeds and prompts where both score the same",
        "p_holm": "test of the win rate against one half, corrected over all pairs and scores",
    }
    return Source((words | OF_SCORES).get(column, f"`{column}` of the pair"), arms, [record["scorer"]])


def _change(evidence: Evidence, record: Record, column: str) -> Source:
    settings = evidence.study.experiments.over_optimisation
    judged = [settings.trained, *settings.held_out] if settings else []
    arms = [record["arm"], *_base(evidence, record["arm"])]
    if column not in judged:
        return Source(OF_SCORES.get(column, f"`{column}` by the changes of all these scores"), arms, judged)
    words = f"mean paired change from step {record['from_step']} to step {record['to_step']}"
    return Source(words, arms, [column])


def _to_target(evidence: Evidence, record: Record, column: str) -> Source:
    target, arm = evidence.study.experiments.to_target, record["arm"]
    arms = dict.fromkeys([arm, *[each.arm for each in [target] if each], *_base(evidence, arm)])
    words = f"when the arm's mean reaches the final one of the target, on the axis `{record['axis']}`"
    return Source(OF_SCORES.get(column, words), list(arms), [record["scorer"]])


def _composed(evidence: Evidence, record: Record, column: str) -> Source:
    """Table 2: sets of images, and scene graphs."""
    arm = record["arm"]
    metric, _, difference = column.partition("_minus_")
    if metric in GRAPH_METRICS:
        return _of_score(evidence, arm, f"oracle_{metric}", "minus_base" if difference else "")
    if column in OF_SCORES:
        return Source(OF_SCORES[column], [arm], evidence.scorers)
    words = "mean over training seeds of the distance of a seed's images"
    words = words if column in SET_METRICS else f"`{column}` of that distance"
    return Source(words, [arm], [], (distribution(evidence.study),))


def _control(evidence: Evidence, record: Record, column: str) -> Source:
    arm, scorer = record["arm"], [record["scorer"]]
    if column == "minus_base":
        return _of_score(evidence, arm, record["scorer"], column)
    if column == "true_minus_control":
        arms = list(dict.fromkeys([record["method"], arm]))
        return Source("mean paired difference, true labels minus these", arms, scorer)
    return Source(OF_SCORES.get(column, f"`{column}` among the labels of the method"), [arm], scorer)


def _task(evidence: Evidence, record: Record, column: str) -> Source:
    tasks = BENCHMARKS[record["benchmark"]] if record["task"] == "overall" else [record["task"]]
    words = "mean of the last checkpoint" if column == "score" else f"`{column}` of that mean"
    return Source(words, [record["arm"]], [f"oracle_{record['benchmark']}_{task}" for task in tasks])


def _experiment(name: str, words: str, evidence: Evidence, record: Record, column: str) -> Source:
    """A table of an experiment on held-out pairs."""
    study = evidence.study
    named = [record.get(key, "").partition("/")[0] for key in ("arm", "policy")]
    arms = [arm for arm in named if arm in study.arms] or [arm for arm in [baseline_arm(study)] if arm]
    recipes = [recipe_of(study, name, record["recipe"])] if "recipe" in record else []
    return Source(f"`{column}`, {words}", arms, None, (experiment(study, name), *recipes))


def _speed(evidence: Evidence, record: Record, column: str) -> Source:
    return Source("median over rounds of `make bench`; of no study", beside=(benchmark(),))


def _voted(evidence: Evidence, record: Record, column: str) -> Source:
    arms = [arm for key in ("arm", "baseline") if (arm := record.get(key)) in evidence.study.arms and arm]
    return Source(f"`{column}` of people's votes", arms, [], (votes(evidence.study),))


_COSTS = {"Optimizer steps": "optimizer_steps", "Steps": "optimizer_steps", "Pairs": "pairs_seen"}
_COSTS |= {"UNet evaluations": "unet_evals"}
_JUDGED = {"{} (trained on)": "{}", "{} (held out)": "{}"}
_PAPERS = "PickScore / CLIP / Aesthetic"
_GRAPHS = {"SG-IoU": "sg_iou", "Entity-IoU": "entity_iou", "Relation-IoU": "relation_iou"}

CELLS = {
    "table1": Cells(
        ("arm",),
        _scored,
        (
            Printed("Mean score", {"{}": "{}"}),
            Printed("Difference from the base model", {"{}": "{}_minus_base", "Win rate ({})": "{}_win_rate"}),
            Printed("Smallest true difference from the base model", {"{}": "{}_minus_base_detectable"}),
            Printed(
                "What was spent, and what the paper reports", _COSTS | {"paper {}": "paper_{}_sdxl / paper_{}_sd15"}
            ),
        ),
    ),
    "win_rates": Cells(("arm", "against", "scorer"), _win_rate, main="win_rate"),
    "over_optimisation": Cells(
        ("arm", "from_step", "to_step"),
        _change,
        (Printed("Last checkpoint minus the base model", _JUDGED), Printed("Along training", _JUDGED)),
    ),
    "to_target": Cells(("arm", "scorer", "axis"), _to_target, main="cost"),
    "table2": Cells(
        ("arm", "base"),
        _composed,
        (
            Printed(
                "Sets of images against the reference set",
                {"FID (standard)": "fid_standard", "FID (LAION-SG's script)": "fid_laionsg_compat"},
                {"source": "this study"},
            ),
            Printed("Scene graphs", _GRAPHS, {"source": "this study"}),
            Printed(
                "Scene graphs, difference from the base model",
                {title: f"{metric}_minus_base" for title, metric in _GRAPHS.items()},
                {"source": "this study"},
            ),
            Printed("What the paper reports", _GRAPHS, {"source": "paper"}),
        ),
        also=("source",),
    ),
    "table3": Cells(
        ("arm",),
        _scored,
        (
            Printed(
                "Mean score",
                {"{}": "{}"}
                | _COSTS
                | {f"paper {_PAPERS}": "paper_pickscore_sdxl / paper_clip_sdxl / paper_aesthetic_sdxl"},
            ),
            Printed("Difference from the fewest steps of the family", {"{}": "{}_minus_fewest"}),
        ),
        also=("family", "inversion_steps"),
    ),
    "table_s5": Cells(
        ("row",),
        _scored,
        (Printed("Mean score", {"{}": "{}", "paper {} (SDXL / SD1.5)": "paper_{}_sdxl / paper_{}_sd15"}),),
    ),
    "controls": Cells(
        ("arm", "scorer"),
        _control,
        (Printed("", {"True labels minus these": "true_minus_control"}),),
        ("method", "labels"),
    ),
    "composition": Cells(("arm", "benchmark", "task"), _task, main="score"),
    "costs": Cells(("arm",), _scored, (Printed("Training cost", _COSTS),)),
    "inversion_error": Cells(
        ("solver", "guidance_scale", "steps"),
        partial(_experiment, "inversion_error", "mean over held-out pictures"),
        (
            Printed(
                "Inversion and sampling back",
                {
                    "UNet evaluations": "unet_evals",
                    "Round-trip error": "rms_error",
                    "Second moment of x_T": "terminal_second_moment",
                    "z of |x_T|²": "terminal_norm_z",
                },
            ),
            Printed("Score of the picture returned minus that of the picture inverted", {"{}": "{}_change"}),
        ),
    ),
    "precision": Cells(
        ("arm", "recipe", "steps", "draws"),
        partial(_experiment, "precision", "over training seeds and held-out pairs"),
        (
            Printed(
                "Agreement with the truth",
                {
                    "UNet evaluations a latent": "unet_evals_per_latent",
                    "Pair accuracy of the truth": "true_pair_accuracy",
                    "Same order as the truth": "sign_agreement",
                },
            ),
        ),
    ),
    "audit": Cells(
        ("recipe", "policy", "precision", "noise"),
        partial(_experiment, "audit", "mean over batches of held-out pairs"),
        (
            Printed(
                "Gradients",
                {
                    "Norm / weights": "relative_norm",
                    "Cosine: PickScore": "cosine_with_reward",
                    "Cosine: swapped labels": "cosine_with_swapped",
                    "Cosine: fp32": "cosine_with_fp32",
                    "UNet evaluations": "unet_evals",
                },
            ),
        ),
    ),
    "preference_accuracy": Cells(
        ("scorer",),
        partial(_experiment, "preference_accuracy", "over held-out votes"),
        (
            Printed(
                "Agreement with held-out votes",
                {"Decided pairs": "decided", "Ties predicted": "predicted_ties"},
            ),
        ),
    ),
    "weight_distances": Cells(
        ("arm", "grouping", "group"),
        partial(_experiment, "weight_distances", "mean over training seeds"),
        (
            Printed(
                "Whole network",
                {
                    "Stored as": "dtype / base_dtype",
                    "RMS of the change": "rms",
                    "both rounded": "rounded_rms",
                    "at least": "least_rms",
                    "Norm / base's norm": "relative_l2",
                    "Changed": "changed",
                    "Largest": "max",
                    "Recipe's bound": "bound",
                },
                {"grouping": "total"},
            ),
            Printed("Norm of the change over the base's, by block", {}, {"grouping": "block"}),
            Printed("The same by kind of layer", {}, {"grouping": "kind"}),
        ),
        main="relative_l2",
    ),
    "speed": Cells(("what", "N", "competitor"), _speed),
    "table_s4": Cells(("raters_used", "group", "baseline", "arm"), _voted, main="win_rate"),
    "user_study": Cells(("raters_used", "quantity", "group"), _voted, main="value"),
}


def source(evidence: Evidence, table: str, record: Record, column: str) -> Source:
    """What a cell of this study's own (not of the paper's) was made from. column: without what ENDS names.

    InvdpoError for a column that names the row.
    """
    cells = CELLS[table]
    if column in (*cells.keys, *cells.also):
        known = ", ".join(name for name in record if name not in cells.keys and not ENDS.search(name))
        raise InvdpoError(f"`{column}` of {table} names the row and was not measured. Its other columns: {known}.")
    return cells.source(evidence, record, column)


def address(table: str, record: Record) -> str:
    """`table:key:key` of a row."""
    return ":".join([table, *(record[key] for key in CELLS[table].keys if record[key])])


def find(table: str, records: Sequence[Record], asked: str) -> Cell:
    """The cell that `asked`, the part of an address behind the table, names: names of the row, as many as tell it
    apart, then the column. A printed block's caption may stand among them.

    InvdpoError where there is none or are several, with those that there are.
    """
    cells, parts = CELLS[table], asked.split(":") if asked else []
    named = [_names(record, cells) for record in records]
    for size in range(1, len(parts) + 1):  # some headings hold a colon
        column = ":".join(parts[-size:])
        row, blocks = _without_captions(parts[:-size], cells, named)
        found = _columns(column, list(records[0]), blocks, cells)
        if found is not None:
            break
    else:
        row, blocks = _without_captions(parts, cells, named)
        known_row = bool(_rows(row, cells, named))
        if not cells.main or not known_row:
            raise _no_column(table, records, parts, named_row=known_row)
        column, found = cells.main, ((cells.main,), {})
    columns, where = found
    where = dict(where) or next((dict(block.where) for block in blocks if block.where), {})
    places = _rows(row, cells, named)
    narrowed = [place for place in places if all(records[place].get(key) == value for key, value in where.items())]
    places = narrowed or places
    if len(places) != 1:
        raise _no_row(table, records, ":".join(row), places, column)
    return Cell(table, places[0], columns[0] if len(columns) == 1 else column, columns)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", re.sub(r"\(n = [^)]*\)", "", text.lower()))


def _names(record: Record, cells: Cells) -> dict[str, set[str]]:
    """Key column of a row -> what its value may be called."""
    return {key: _called(record[key]) for key in (*cells.keys, *cells.also) if key in record}


@cache
def _called(value: str) -> set[str]:
    tasks = {task: title for each in BENCHMARKS.values() for task, title in each.items()}
    names = {value, arm_title(value), scorer_title(value), policy_title(value), AXES.get(value, value)}
    names |= {TITLES.get(value, value), tasks.get(value, value), SOLVERS.get(value, (value,))[0]}
    return {_plain(name) for name in (*names, *(["Difference, paired"] if " - " in value else []))}


def _without_captions(
    parts: Sequence[str], cells: Cells, named: Sequence[Mapping[str, set[str]]]
) -> tuple[list[str], list[Printed]]:
    """The parts of an address that name its row, and the blocks whose captions the others are."""
    known = set().union(*(names for row in named for names in row.values()))
    row, blocks = [], []
    for part in parts:
        block = None if _plain(part) in known else _captioned(_plain(part), cells.printed)
        (row if block is None else blocks).append(part if block is None else block)
    return row, blocks


def _captioned(plain: str, printed: Sequence[Printed]) -> Printed | None:
    """The block with that caption, or one that begins so."""
    captions = {_plain(block.caption): block for block in printed if block.caption}
    whole = [caption for caption in captions if plain.startswith(caption)]
    begun = [caption for caption in captions if plain and caption.startswith(plain)]
    return captions[max(whole, key=len)] if whole else captions[begun[0]] if begun else None


def _columns(
    asked: str, header: Sequence[str], blocks: Sequence[Printed], cells: Cells
) -> tuple[tuple[str, ...], Mapping[str, str]] | None:
    """The csv columns that a name or heading stands for, and the values that rows of its block have.

    Below a caption a heading is that block's; without one it is first a name of the csv file's.
    """
    plain = _plain(asked)
    names = {_plain(name): name for name in header}
    for name in header:
        scorer, rest = split(name)
        if scorer is not None:
            names.setdefault(_plain(f"{scorer_title(scorer)} {rest}"), name)
    if plain in names and not blocks:
        return (names[plain],), {}
    for block in blocks or cells.printed:
        for head, columns in block.heads.items():
            filled = _filled(head, columns, plain)
            if filled is not None and all(_plain(column) in names for column in filled):
                return tuple(names[_plain(column)] for column in filled), block.where
    return ((names[plain],), {}) if plain in names else None


def _filled(head: str, columns: str, plain: str) -> list[str] | None:
    """The csv columns of a heading with `{}` filled as `plain` fills it; None where that is another heading."""
    before, score, after = head.partition("{}")
    before, after = _plain(before), _plain(after)
    if not score:
        return columns.split(" / ") if plain == before else None
    if not (plain.startswith(before) and plain.endswith(after)):
        return None
    title = plain[len(before) : len(plain) - len(after)]
    scorer = next((name for name in SCORERS if title in (_plain(name), _plain(SCORERS[name]))), title)
    return columns.replace("{}", scorer).split(" / ")


def _rows(parts: Sequence[str], cells: Cells, named: Sequence[Mapping[str, set[str]]]) -> list[int]:
    """The rows each of whose parts names another key: by the keys, or where none is, by them and what else may name.

    Of several those whose keys the parts name in their order: a policy and a recipe may be called alike.
    """
    pieces = [_plain(piece) for part in parts for piece in re.sub(r"^(\d+) to (\d+)$", r"\1:\2", part).split(":")]
    for keys in (cells.keys, (*cells.keys, *cells.also)):
        names = {place: [row[key] for key in keys if key in row] for place, row in enumerate(named)}
        found = [place for place, known in names.items() if _fit(pieces, known)]
        if found:
            return [place for place in found if _fit_in_order(pieces, names[place])] or found
    return []


def _fit(parts: Sequence[str], names: Sequence[set[str]]) -> bool:
    """Whether each part can be given another one of the sets that has it."""
    if not parts:
        return True
    return any(
        parts[0] in known and _fit(parts[1:], [*names[:place], *names[place + 1 :]])
        for place, known in enumerate(names)
    )


def _fit_in_order(parts: Sequence[str], names: Sequence[set[str]]) -> bool:
    rest = iter(names)
    return all(any(part in known for known in rest) for part in parts)


def _no_column(table: str, records: Sequence[Record], parts: Sequence[str], named_row: bool) -> InvdpoError:
    cells = CELLS[table]
    columns = [name for name in records[0] if name not in (*cells.keys, *cells.also) and not ENDS.search(name)]
    known = f"Columns: {', '.join(columns)}; each also by its heading in print."
    if named_row:
        return InvdpoError(f"`{':'.join([table, *parts])}` names no column: write {table}:ROW:COLUMN. {known}")
    return InvdpoError(f"{table} has no column `{parts[-1]}`.{_perhaps(parts[-1], columns)} {known}")


def _perhaps(word: str, known: Iterable[str]) -> str:
    found = nearest(word, known)
    return found if found.startswith(" Did") else ""


def _no_row(table: str, records: Sequence[Record], row: str, places: Sequence[int], column: str) -> InvdpoError:
    """places: of the rows that go by that name, none or several."""
    if places:
        choices = ", ".join(f"{address(table, records[place])}:{column}" for place in places[:12])
        more = f", and {len(places) - 12} more" if len(places) > 12 else ""
        return InvdpoError(f"{table} has {len(places)} rows `{row}`. Name one: {choices}{more}")
    known = [address(table, record).removeprefix(f"{table}:") for record in records]
    values = {
        key: ", ".join(dict.fromkeys(record[key] for record in records if record[key])) for key in CELLS[table].keys
    }
    told = "; ".join(f"{key}: {names}" for key, names in values.items())
    return InvdpoError(f"{table} has no row `{row}`.{_perhaps(row, known)} Its rows go by {told}.")
