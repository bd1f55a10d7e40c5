"""Table S4: what people preferred, beside the paper's shares; where nobody voted, what to run.

The app's analysis counts the votes into user_study.json. The table is made from that alone, so it can be made again
from a published study, which has no vote of a single person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.evidence import paper
from invdpo.evidence.load import arm_title
from invdpo.evidence.printing import NOT_RUN, Block, Table, format_interval, triple, write_table
from invdpo.evidence.statistics import Interval

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

NONE = "–"
ABSENT = f"{NOT_RUN}: `make user-study`, then `make user-study-analysis`"
SETS = {"all": "All raters", "kept": "After the exclusions written before the study"}
HEAD = ["Comparison", "Raters", "Pairs", "Votes", "Win / tie / loss", "Win rate, ties as half"]
HEAD += ["Two-way robust interval", "Win rate without ties", "p (Holm)", "Paper"]
COLUMNS = ["source", "raters_used", "status", "group", "baseline", "arm", "raters", "pairs", "votes", "wins", "ties"]
COLUMNS += ["losses", "problems", *triple("win_rate"), "win_rate_robust_low", "win_rate_robust_high"]
COLUMNS += [*triple("tie_free"), "p", "p_holm", "paper"]
PAPER_NOTE = (
    "Paper: section S7, 500 pairs a comparison of SDXL images, 10 participants, no ties; its number of votes is not "
    "stated (66.53 % and 72.67 % are both possible with 1,500 votes, neither with 5,000). Another model and other "
    "prompts: compare the direction, never the numbers themselves."
)


def table_s4(study: StudyConfig, counted: Mapping[str, Any] | None) -> Table:
    """Win rates beside the paper's and the common scale of the methods.

    counted: content of user_study.json; None where nobody has voted. Of its two sets of raters, the one that the
    exclusions leave is printed only where they exclude somebody; the csv file has both.
    """
    groups, records, blocks, notes = _unasked(study) if counted is None else _counted(study, counted)
    reported = []
    for ours, theirs in _comparisons():
        own = [pair for pair in groups if _is_compared(study, *pair, theirs)]
        here = "; ".join(_names(*pair) for pair in own) or f"{NOT_RUN}: no such group in `user_study`"
        record = {"source": "paper", "status": here, "baseline": ours.method.partition(" against ")[2]}
        records.append(record | {"arm": "Inversion-DPO", "pairs": ours.n, "win_rate": _share(ours)})
        reported.append([ours.method, _share(theirs), _share(ours), ours.n, here])
    heads = ["Comparison", "The other method", "Inversion-DPO", "Pairs", "Here"]
    blocks.append(Block(paper.REPORTED, heads, reported))
    return Table(f"Table S4: human preference ({study.study})", [*notes, PAPER_NOTE], records, COLUMNS, blocks)


Parts = tuple[list[tuple[str, str]], list[dict[str, Any]], list[Block], list[str]]  # groups, records, blocks, notes


def _unasked(study: StudyConfig) -> Parts:
    """The comparisons that people are to be asked about."""
    assert study.user_study is not None, "only a study with people has this table"
    groups: list[tuple[str, str]] = [tuple(group["arms"]) for group in study.user_study["groups"]]
    records = [_record(study, {"baseline": baseline, "arm": arm}, status=ABSENT) for baseline, arm in groups]
    return groups, records, [Block("Votes", HEAD, [_row(record) for record in records])], []


def _counted(study: StudyConfig, counted: Mapping[str, Any]) -> Parts:
    """The comparisons that people voted on."""
    rates = {
        used: [_record(study, record, status="ok", raters_used=used) for record in counted["win_rates"][used]]
        for used in SETS
    }
    groups = [(record["baseline"], record["arm"]) for record in rates["all"]]
    excluded = any(rater["excluded"] for rater in counted["raters"])
    shown = [used for used in SETS if used == "all" or excluded]
    blocks = [Block(SETS[used], HEAD, [_row(record) for record in rates[used]]) for used in shown]
    scales = [(used, found) for used in shown if (found := counted["strengths"][used]) is not None]
    blocks += [_scale(SETS[used], groups, found) for used, found in scales]
    notes = [
        "95 % intervals: crossed bootstrap over raters and prompts (9,999 draws); the robust one sums the variances "
        "clustered by rater and by prompt. p: against one half, Holm over the comparisons."
    ]
    if not excluded:
        notes.append("The rules of exclusion that were written before the study exclude nobody.")
    return groups, [record for used in SETS for record in rates[used]], blocks, notes


def _record(study: StudyConfig, found: Mapping[str, Any], **facts: str) -> dict[str, Any]:
    share = paper_share(study, found["baseline"], found["arm"])
    return {"source": "this study", **found, **facts, "paper": share}


def paper_share(study: StudyConfig, baseline: str, arm: str) -> str | None:
    """The paper's share of votes for an arm over a baseline; None where it compared no such methods."""
    return next((_share(ours) for ours, theirs in _comparisons() if _is_compared(study, baseline, arm, theirs)), None)


def write(study: StudyConfig, folder: Path | None = None) -> list[Path]:
    """Write folder/table_s4.{csv,md,tex} (default: the study's tables) from user_study.json beside them, if it is
    there; the paths written.
    """
    folder = folder or study.root / "tables"
    path = folder / "user_study.json"
    counted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return write_table(folder, "table_s4", table_s4(study, counted))


def _comparisons() -> list[tuple[paper.Row, paper.Row]]:
    """The paper's comparisons: the row of Inversion-DPO's share and that of the other method's."""
    by_name = {row.method: row for row in paper.rows("s4")}
    names = [(name, *name.split(" against ")) for name in by_name]
    return [(by_name[n], by_name[f"{other} against {own}"]) for n, own, other in names if own == "Inversion-DPO"]


def _is_compared(study: StudyConfig, baseline: str, arm: str, theirs: paper.Row) -> bool:
    """Whether a baseline is the paper's and the arm some form of Inversion-DPO, whose own it does not state."""
    entry = study.arms[arm]
    inverted = Path(entry.method).stem.startswith("inversion_dpo") and entry.labels == "true"
    return inverted and paper.stands_for(study, baseline, theirs)


def _share(row: paper.Row) -> str:
    return row.values["human_preference"]


def _names(baseline: str, arm: str) -> str:
    return f"{arm_title(arm)} against {arm_title(baseline)}"


def _row(record: Mapping[str, Any]) -> list[str]:
    """A comparison in print."""
    quoted = NONE if record["paper"] is None else f"{Decimal(record['paper']).scaleb(2)} %"
    if "votes" not in record:
        return [_names(record["baseline"], record["arm"]), *[NONE] * 4, record["status"], *[NONE] * 3, quoted]
    return [
        _names(record["baseline"], record["arm"]),
        *(f"{record[name]:,}" for name in ("raters", "pairs", "votes")),
        f"{record['wins']} / {record['ties']} / {record['losses']}",
        percent(record, "win_rate"),
        percent(record, "win_rate_robust", ends_only=True),
        percent(record, "tie_free"),
        NONE if record.get("p_holm") is None else f"{record['p_holm']:.2g}",
        quoted,
    ]


def _scale(words: str, groups: Sequence[tuple[str, str]], found: Mapping[str, Mapping[str, Any]]) -> Block:
    """The methods' log-strengths over the first group's baseline."""
    first, *others = dict.fromkeys(arm for pair in groups for arm in pair)
    strengths = {arm: format_interval(Interval(**found[arm]), sign=True) for arm in (*others, "tie")}
    rows = [[arm_title(first), "0"], *([arm_title(arm), strengths[arm]] for arm in others)]
    rows.append(["log of the tie parameter", strengths["tie"]])
    return Block(f"Log-strength, Bradley-Terry with Davidson's ties. {words}", ["Method", "Value"], rows)


def percent(record: Mapping[str, Any], prefix: str, ends_only: bool = False) -> str:
    """A share with its interval, or the interval alone; a dash where there is none."""
    low, high = record.get(f"{prefix}_low"), record.get(f"{prefix}_high")
    if low is None or high is None:
        return NONE
    ends = f"[{100 * low:.1f}, {100 * high:.1f}] %"
    return ends if ends_only else f"{100 * record[prefix]:.1f} {ends}"
