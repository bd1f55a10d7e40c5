"""The study's tables as csv (6 significant digits), md and tex (booktabs). Same scores, same bytes.

Nothing that differs between two runs of the same study (seconds, memory, commit) is in a table; seconds and memory go
to `costs.json`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    comparison_arms,
    control_arms,
    load_evidence,
    load_run,
    scorer_title,
    step_families,
)
from invdpo.evidence.statistics import Interval, mean_interval, paired_difference, win_rate
from invdpo.files import replace_when_done, write_json
from invdpo.scorers.composition import BENCHMARKS, TITLES, geneval_overall

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

NOT_RUN = "not run"
NOTE = (
    "95 % intervals: crossed bootstrap over training seeds and prompts (9,999 draws). Differences and win rates are "
    "paired by training seed and prompt; a tie counts one half."
)
PAPER_NOTE = (
    "The paper's values belong to another model, another prompt set (not stated) and other scorers: compare signs and "
    "order, never the numbers themselves."
)


@dataclass(frozen=True)
class Block:
    """One printed table: a caption, column heads, and rows of text."""

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


def published() -> list[dict[str, str]]:
    """The rows of published.csv: numbers printed in the paper, with their place in it."""
    text = resources.files("invdpo.evidence").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def format_interval(interval: Interval, sign: bool = False) -> str:
    """`0.2134 [0.2101, 0.2170]`, with as many decimals as make two significant digits of the half-width."""
    half = (interval.high - interval.low) / 2
    values = (interval.estimate, interval.low, interval.high)
    mark = "+" if sign else ""
    if half < 1e-12:  # nothing varies, up to rounding: three times the same number
        numbers = ["0" if abs(x) < 1e-12 else f"{x:{mark}.4g}" for x in values]
    else:
        decimals = min(8, max(0, 1 - math.floor(math.log10(half))))
        numbers = [f"{x:{mark}.{decimals}f}" for x in values]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


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
    }
    return "".join(special.get(character, character) for character in text)


def to_csv(table: Table) -> str:
    """Comma-separated, full records; floats with 6 significant digits, empty where there is no value."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    for record in table.records:
        writer.writerow([cell(record.get(column)) for column in table.columns])
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
            cells = ["{}" + escape_tex(cell) if cell[:1] == "[" else escape_tex(cell) for cell in row]
            lines.append(" & ".join(cells) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


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


def _text(interval: Interval | None, sign: bool = False) -> str:
    return NOT_RUN if interval is None else format_interval(interval, sign)


def _mean(evidence: Evidence, arm: str, scorer: str) -> Interval | None:
    return mean_interval(evidence.final(arm, scorer)) if evidence.has(arm, scorer) else None


def _difference(evidence: Evidence, arm: str, baseline: str, scorer: str) -> Interval | None:
    if not (evidence.has(arm, scorer) and evidence.has(baseline, scorer)):
        return None
    return paired_difference(*evidence.paired(arm, baseline, scorer))


def _wins(evidence: Evidence, arm: str, baseline: str, scorer: str) -> Interval | None:
    if not (evidence.has(arm, scorer) and evidence.has(baseline, scorer)):
        return None
    return win_rate(*evidence.paired(arm, baseline, scorer))


def _paper(study: StudyConfig, arm: str, table: str, scorer: str, base: str, steps: str = "") -> float | None:
    """The paper's number for this arm's recipe, only where the labels are the true ones."""
    if study.arms[arm].labels != "true":
        return None
    for row in published():
        same = (row["table"], row["metric"], row["base"], row["inversion_steps"]) == (table, scorer, base, steps)
        if same and Path(study.arms[arm].method).stem in row["recipes"].split(";"):
            return float(row["value"])
    return None


def _costs(evidence: Evidence, arm: str) -> dict[str, int]:
    """Optimizer steps, pairs and UNet evaluations at the end of training (mean over seeds, rounded)."""
    if not evidence.has(arm):
        return {}
    last = evidence.scores[arm].steps[-1]
    found = {"optimizer_steps": last}
    for column in ("pairs_seen", "unet_evals"):
        cost = evidence.cost(arm, column)
        if last in cost:
            found[column] = round(cost[last])
    return found


def table1(evidence: Evidence) -> Table:
    """Methods x scores: means, differences from the base model, win rate on the primary score, and what was spent."""
    study, scorers, primary = evidence.study, evidence.scorers, evidence.primary
    base, arms = baseline_arm(study), comparison_arms(study)
    papers = [(scorer, world) for scorer in ("pickscore", "clip", "aesthetic") for world in ("sdxl", "sd15")]
    columns = ["arm", "status", "seeds", "prompts", "optimizer_steps", "pairs_seen", "unet_evals"]
    for scorer in scorers:
        columns += triple(scorer) + triple(f"{scorer}_minus_base")
    columns += triple(f"{primary}_win_rate") + [f"paper_{scorer}_{world}" for scorer, world in papers]
    records, means, gains, other = [], [], [], []
    for arm in arms:
        done = evidence.has(arm)
        record: dict[str, Any] = {"arm": arm, "status": "ok" if done else NOT_RUN, **_costs(evidence, arm)}
        if done:
            record["seeds"] = len(evidence.scores[arm].seeds)
            record["prompts"] = len(evidence.scores[arm].prompts)
        mean_cells, gain_cells = [], []
        for scorer in scorers:
            mean = _mean(evidence, arm, scorer)
            gain = _difference(evidence, arm, base, scorer) if base and arm != base else None
            record |= record_of(scorer, mean) | record_of(f"{scorer}_minus_base", gain)
            mean_cells.append(_text(mean))
            gain_cells.append("–" if arm == base else _text(gain, sign=True))
        wins = _wins(evidence, arm, base, primary) if base and arm != base else None
        record |= record_of(f"{primary}_win_rate", wins)
        for scorer, world in papers:
            record[f"paper_{scorer}_{world}"] = _paper(study, arm, "1", scorer, world)
        records.append(record)
        name = arm_title(arm)
        means.append([name, *mean_cells])
        gains.append([name, *gain_cells, "–" if arm == base else _text(wins)])
        quoted = [
            " / ".join("–" if (v := record[f"paper_{s}_{w}"]) is None else f"{v:g}" for w in ("sdxl", "sd15"))
            for s in ("pickscore", "clip", "aesthetic")
        ]
        spent = [f"{record[c]:,}" if c in record else NOT_RUN for c in ("optimizer_steps", "pairs_seen", "unet_evals")]
        other.append([name, *spent, *quoted])
    titles = [scorer_title(scorer) for scorer in scorers]
    blocks = [
        Block("Mean score", ["Method", *titles], means),
        Block("Difference from the base model", ["Method", *titles, f"Win rate ({scorer_title(primary)})"], gains),
        Block(
            "What was spent, and what the paper reports (SDXL / SD1.5)",
            ["Method", "Steps", "Pairs", "UNet evaluations", "paper PickScore", "paper CLIP", "paper Aesthetic"],
            other,
        ),
    ]
    return Table("Table 1: methods and scores", [NOTE, PAPER_NOTE], records, columns, blocks)


def table3(evidence: Evidence) -> Table:
    """Number of inversion steps: means, and differences from the fewest steps of the same family."""
    study, scorers = evidence.study, evidence.scorers
    papers = ("pickscore", "clip", "aesthetic")
    columns = ["family", "inversion_steps", "arm", "status", "optimizer_steps", "unet_evals"]
    for scorer in scorers:
        columns += triple(scorer) + triple(f"{scorer}_minus_fewest")
    columns += [f"paper_{scorer}_sdxl" for scorer in papers]
    records, means, gains = [], [], []
    for family, arms in step_families(study).items():
        fewest = next(iter(arms.values()))
        for count, arm in arms.items():
            done = evidence.has(arm)
            record: dict[str, Any] = {"family": family, "inversion_steps": count, "arm": arm}
            record |= {"status": "ok" if done else NOT_RUN, **_costs(evidence, arm)}
            mean_cells, gain_cells = [], []
            for scorer in scorers:
                mean = _mean(evidence, arm, scorer)
                gain = _difference(evidence, arm, fewest, scorer) if arm != fewest else None
                record |= record_of(scorer, mean) | record_of(f"{scorer}_minus_fewest", gain)
                mean_cells.append(_text(mean))
                gain_cells.append("–" if arm == fewest else _text(gain, sign=True))
            for scorer in papers:
                record[f"paper_{scorer}_sdxl"] = _paper(study, arm, "3", scorer, "sdxl", str(count))
            quoted = " / ".join("–" if (v := record[f"paper_{s}_sdxl"]) is None else f"{v:g}" for s in papers)
            records.append(record)
            spent = f"{record['unet_evals']:,}" if "unet_evals" in record else NOT_RUN
            means.append([arm_title(family), str(count), *mean_cells, spent, quoted])
            gains.append([arm_title(family), str(count), *gain_cells])
    titles = [scorer_title(scorer) for scorer in scorers]
    blocks = [
        Block("Mean score", ["Family", "N", *titles, "UNet evaluations", "paper PickScore / CLIP / Aesthetic"], means),
        Block("Difference from the fewest steps of the family", ["Family", "N", *titles], gains),
    ]
    return Table("Table 3: number of inversion steps N", [NOTE, PAPER_NOTE], records, columns, blocks)


def table_s5(evidence: Evidence) -> Table:
    """One timestep drawn from q against one from the inversion p: the last arm minus the first."""
    study, scorers = evidence.study, evidence.scorers
    arms = list(study.experiments.q_vs_p.arms) if study.experiments.q_vs_p else []
    columns = ["row", "status", "optimizer_steps", "unet_evals"]
    for scorer in scorers:
        columns += triple(scorer)
    papers = [(scorer, world) for scorer in ("pickscore", "clip", "aesthetic") for world in ("sdxl", "sd15")]
    columns += [f"paper_{scorer}_{world}" for scorer, world in papers]
    records, rows = [], []
    for arm in arms:
        record: dict[str, Any] = {"row": arm, "status": "ok" if evidence.has(arm) else NOT_RUN}
        record |= _costs(evidence, arm)
        cells = []
        for scorer in scorers:
            mean = _mean(evidence, arm, scorer)
            record |= record_of(scorer, mean)
            cells.append(_text(mean))
        record |= {f"paper_{s}_{w}": _paper(study, arm, "s5", s, w) for s, w in papers}
        records.append(record)
        rows.append([arm_title(arm), *cells, *_quoted_pairs(record)])
    if len(arms) > 1:
        first, last = arms[0], arms[-1]
        record = {"row": f"{last} - {first}", "status": "ok"}
        if not (evidence.has(first) and evidence.has(last)):
            record["status"] = NOT_RUN
        cells = []
        for scorer in scorers:
            gain = _difference(evidence, last, first, scorer)
            record |= record_of(scorer, gain)
            cells.append(_text(gain, sign=True))
        for scorer, world in papers:
            values = [_paper(study, arm, "s5", scorer, world) for arm in (last, first)]
            if values[0] is not None and values[1] is not None:
                record[f"paper_{scorer}_{world}"] = round(values[0] - values[1], 6)
        records.append(record)
        rows.append(["Difference, paired", *cells, *_quoted_pairs(record)])
    head = ["Noise from", *[scorer_title(scorer) for scorer in scorers]]
    head += [f"paper {scorer_title(scorer)} (SDXL / SD1.5)" for scorer in ("pickscore", "clip", "aesthetic")]
    blocks = [Block("Mean score", head, rows)]
    return Table("Table S5: one timestep of q against one of p", [NOTE, PAPER_NOTE], records, columns, blocks)


def _quoted_pairs(record: dict[str, Any]) -> list[str]:
    return [
        " / ".join("–" if (v := record.get(f"paper_{s}_{w}")) is None else f"{v:g}" for w in ("sdxl", "sd15"))
        for s in ("pickscore", "clip", "aesthetic")
    ]


def controls(evidence: Evidence) -> Table:
    """What each method gains over the base model with true, shuffled and swapped labels, and true minus control."""
    study, primary = evidence.study, evidence.primary
    base = baseline_arm(study)
    columns = ["method", "labels", "arm", "status", "scorer"] + triple("minus_base") + triple("true_minus_control")
    records, by_scorer = [], {scorer: [] for scorer in evidence.scorers}
    for method, arms in control_arms(study).items():
        for labels, arm in {"true": method, **arms}.items():
            for scorer in evidence.scorers:
                gain = _difference(evidence, arm, base, scorer) if base else None
                margin = _difference(evidence, method, arm, scorer) if labels != "true" else None
                status = "ok" if evidence.has(arm, scorer) else NOT_RUN
                record = {"method": method, "labels": labels, "arm": arm, "status": status, "scorer": scorer}
                records.append(record | record_of("minus_base", gain) | record_of("true_minus_control", margin))
                shown = "–" if labels == "true" else _text(margin, sign=True)
                by_scorer[scorer].append([arm_title(method), labels, _text(gain, sign=True), shown])
    order = [primary, *[s for s in evidence.scorers if s != primary]] if primary in by_scorer else evidence.scorers
    head = ["Method", "Labels", "Minus base", "True labels minus these"]
    blocks = [Block(scorer_title(scorer), head, by_scorer[scorer]) for scorer in order]
    note = "A method that gains as much from shuffled labels as from true ones has not learnt a preference."
    return Table("Label controls", [NOTE, note], records, columns, blocks)


def costs(evidence: Evidence) -> Table:
    """What each arm spent per training seed. Seconds and memory differ between runs: they are in costs.json."""
    columns = ["arm", "status", "optimizer_steps", "pairs_seen", "unet_evals"]
    records, rows = [], []
    for arm in evidence.study.arms:
        record = {"arm": arm, "status": "ok" if evidence.has(arm) else NOT_RUN, **_costs(evidence, arm)}
        records.append(record)
        rows.append([arm_title(arm), *[f"{record[c]:,}" if c in record else NOT_RUN for c in columns[2:]]])
    note = "Per training seed. One UNet evaluation is one forward pass of one latent; a backward pass counts two."
    blocks = [Block("Training cost", ["Arm", "Optimizer steps", "Pairs", "UNet evaluations"], rows)]
    return Table("Training cost", [note], records, columns, blocks)


SET_METRICS = ("fid_standard", "fid_laionsg_compat", "kid", "precision", "recall")
GRAPH_METRICS = ("sg_iou", "entity_iou", "relation_iou")


def table2(evidence: Evidence) -> Table:
    """Compositional generation: distances of the image sets, scene-graph agreement, and what the paper printed."""
    study = evidence.study
    settings = study.experiments.distribution
    arms = list(settings.arms) if settings else comparison_arms(study)
    base = baseline_arm(study)
    sets = _distances(study)
    columns = ["source", "arm", "base", "seeds", "prompts", "images", "reference_images", "features", "rank"]
    for metric in SET_METRICS:
        columns += [metric, f"{metric}_seeds_low", f"{metric}_seeds_high"]
    for metric in GRAPH_METRICS:
        columns += triple(metric) + triple(f"{metric}_minus_base")
    # The paper does not say which reading of FID it has, so its number is under neither.
    columns += ["kid_subset_sd", "fid"]
    records, distances, graphs, gains = [], [], [], []
    for arm in arms:
        record: dict[str, Any] = {"source": "this study", "arm": arm}
        if evidence.has(arm):
            record |= {"seeds": len(evidence.scores[arm].seeds), "prompts": len(evidence.scores[arm].prompts)}
        measured, cells = sets.get(arm), [NOT_RUN] * len(SET_METRICS)
        if measured is not None:
            record |= {name: int(measured[name].min()) for name in ("images", "reference_images", "features", "rank")}
            record["kid_subset_sd"] = float(measured["kid_subset_sd"].mean())
            for metric in SET_METRICS:
                record[metric] = float(measured[metric].mean())
                record[f"{metric}_seeds_low"], record[f"{metric}_seeds_high"] = _ends(measured[metric])
            cells = [_over_seeds(measured[metric]) for metric in SET_METRICS]
        agreement, change = [], []
        for metric in GRAPH_METRICS:
            mean = _mean(evidence, arm, f"oracle_{metric}")
            gain = _difference(evidence, arm, base, f"oracle_{metric}") if base and arm != base else None
            record |= record_of(metric, mean) | record_of(f"{metric}_minus_base", gain)
            agreement.append(_text(mean))
            change.append("–" if arm == base else _text(gain, sign=True))
        records.append(record)
        distances.append([arm_title(arm), *cells])
        graphs.append([arm_title(arm), *agreement])
        gains.append([arm_title(arm), *change])
    printed = [row for row in published() if row["table"] == "2"]
    paper = {(row["method"], row["base"]): {} for row in printed}
    for row in printed:
        paper[row["method"], row["base"]][row["metric"]] = float(row["value"])
    quoted = []
    for (method, world), values in paper.items():
        records.append({"source": "paper", "arm": method, "base": world, **values})
        quoted.append([method, world, *(f"{values[metric]:g}" for metric in ("fid", *GRAPH_METRICS))])
    titles = ["SG-IoU", "Entity-IoU", "Relation-IoU"]
    blocks = [
        Block(
            "Sets of images against the reference set",
            ["Method", "FID (standard)", "FID (LAION-SG's script)", "KID", "Precision", "Recall"],
            distances,
        ),
        Block("Scene graphs", ["Method", *titles], graphs),
        Block("Scene graphs, difference from the base model", ["Method", *titles], gains),
        Block("What the paper reports", ["Method", "Base", "FID", *titles], quoted),
    ]
    return Table("Table 2: compositional generation", [NOTE, *_set_notes(sets), PAPER_NOTE], records, columns, blocks)


def _distances(study: StudyConfig) -> dict[str, dict[str, np.ndarray]]:
    """Arm -> column of distribution.csv -> (seeds,) numbers; empty where that was not measured."""
    path = study.root / "distribution.csv"
    found: dict[str, dict[str, list[float]]] = {}
    if study.experiments.distribution is not None and path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                columns = found.setdefault(row.pop("method"), {name: [] for name in row})
                for name, value in row.items():
                    columns[name].append(float(value))
    return {arm: {name: np.array(values) for name, values in columns.items()} for arm, columns in found.items()}


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _over_seeds(values: np.ndarray) -> str:
    """The mean over training seeds and, where there are several, the lowest and the highest."""
    mean = f"{values.mean():.4g}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.4g} to {values.max():.4g})"


def _set_notes(sets: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """What the numbers of the sets of images rest on, in words."""
    if not sets:
        return []
    rows = {name: np.concatenate([columns[name] for columns in sets.values()]) for name in next(iter(sets.values()))}
    images, reference, features = (int(rows[name].min()) for name in ("images", "reference_images", "features"))
    low, high = (int(end) for end in _ends(rows["rank"]))
    rank = f"{low}" if low == high else f"{low} to {high}"
    full = "full" if low >= features else f"not full: more than {features} images are needed"
    return [
        f"FID, KID, precision and recall: {images:,} images of each training seed against {reference:,} reference "
        f"images, {features} features, covariance rank {rank} ({full}); mean over seeds, and from the lowest to the "
        "highest seed. No bootstrap: FID is biased by the number of images, and resampling them biases it again. "
        "Compare within this table alone.",
        "FID (LAION-SG's script) repeats that script's preparation, which scales images twice; the paper does not say "
        "how it took its own.",
    ]


def benchmark_table(scores: Mapping[str, Mapping[str, np.ndarray]], arms: Sequence[str]) -> Table:
    """GenEval-, T2I-CompBench- and DPG-style scores of methods.

    scores[arm][task of TASKS]: (seeds, prompts) in 0..1, nan for a prompt that does not ask for the task.
    """
    columns = ["arm", "benchmark", "task", "seeds", "prompts", "scale", *triple("score")]
    records, blocks, absent = [], [], []
    for benchmark, tasks in BENCHMARKS.items():
        names = {task: f"{benchmark}_{task}" for task in tasks}
        present = [task for task, name in names.items() if any(name in scores.get(arm, {}) for arm in arms)]
        absent += [f"{TITLES[benchmark]} {tasks[task]}" for task in tasks if task not in present]
        if not present:
            continue
        scale = 100.0 if benchmark == "dpg" else 1.0
        rows = []
        for arm in arms:
            found = {task: scores[arm][names[task]] for task in present if names[task] in scores.get(arm, {})}
            means = {task: mean_interval(scale * _asked(table)) for task, table in found.items()}
            if benchmark == "geneval" and found:
                means["overall"] = mean_of_means(list(found.values()))
            for task, mean in means.items():
                head = {"arm": arm, "benchmark": benchmark, "task": task, "scale": scale}
                size = {"seeds": mean.seeds, "prompts": mean.prompts}
                records.append(head | size | record_of("score", mean))
            shown = [*present, *(["overall"] if benchmark == "geneval" else [])]
            rows.append([arm_title(arm), *(_text(means.get(task)) for task in shown)])
        heads = [f"{tasks[task]} (n = {_prompts(scores, names[task])})" for task in present]
        heads += ["overall"] if benchmark == "geneval" else []
        blocks.append(Block(TITLES[benchmark], ["Method", *heads], rows))
    notes = [
        NOTE.split(" Differences")[0] + " n: prompts that ask for the task.",
        "GenEval: share of images that are correct; overall is the mean of the tasks. T2I-CompBench: mean of a "
        "category. DPG-Bench: share of questions answered yes, none of them below one answered no, times 100.",
    ]
    if absent:
        notes.append(f"Not here, because no prompt asks for them: {', '.join(absent)}.")
    return Table("Compositional benchmarks", notes, records, columns, blocks)


def _asked(table: np.ndarray) -> np.ndarray:
    """The columns (seeds, prompts) of the prompts that ask for the task."""
    return table[:, ~np.isnan(table).any(axis=0)]


def _prompts(scores: Mapping[str, Mapping[str, np.ndarray]], task: str) -> str:
    counts = sorted({_asked(tables[task]).shape[1] for tables in scores.values() if task in tables})
    return " or ".join(map(str, counts))


def mean_of_means(tables: Sequence[np.ndarray]) -> Interval:
    """The mean over tasks of each task's mean. tables: (seeds, prompts) each, the same prompts, nan where one does not
    ask for the task.

    The interval is that of the mean linearised in the prompts: a prompt's value is the whole plus, for every task it
    asks for, its distance from the task's mean by its share in it. So a prompt that asks for several tasks is resampled
    with all of them.
    """
    asked = [_asked(table) for table in tables]
    overall = geneval_overall({str(k): float(table.mean()) for k, table in enumerate(asked)})
    values = np.full(tables[0].shape, overall)
    for table, own in zip(tables, asked, strict=True):
        share = table.shape[1] / (own.shape[1] * len(tables))
        values += np.nan_to_num(table - own.mean()) * share
    return mean_interval(values)


def composition(evidence: Evidence) -> Table:
    """The benchmark-style scores that the world's parser gives each arm's last images."""
    arms = comparison_arms(evidence.study)
    scores = {arm: evidence.scores[arm].tasks for arm in arms if evidence.has(arm)}
    table = benchmark_table(scores, arms)
    if not table.blocks:
        note = "Only a world's parser scores these. For real images `invdpo composition` reads the benchmarks' files."
        block = Block("Compositional benchmarks", ["Method", "Score"], [[arm_title(arm), NOT_RUN] for arm in arms])
        return replace(table, notes=[note], blocks=[block])
    note = (
        "The looker is the world's parser, not the benchmarks' detectors and VQA models, and a prompt here asks for "
        "several tasks at once: the rules are theirs, the numbers compare with no published ones."
    )
    return replace(table, notes=[*table.notes, note])


TABLES = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table_s5": table_s5,
    "controls": controls,
    "composition": composition,
    "costs": costs,
}


def write(study: StudyConfig) -> list[Path]:
    """Write root/tables/NAME.{csv,md,tex} of every table in TABLES and root/costs.json; the paths written."""
    evidence = load_evidence(study)
    written = []
    for name, build in TABLES.items():
        written += write_table(study.root / "tables", name, build(evidence))
    spent = {}
    for arm, logs in evidence.logs.items():
        for seed, log in logs.items():
            run = load_run(study.root / "runs" / arm / f"seed{seed}")
            if run is None:
                continue
            last = log.to_dict("records")[-1] if len(log) else {}
            wanted = ("step", "pairs_seen", "unet_evals", "seconds")
            spent.setdefault(arm, {})[f"seed{seed}"] = {key: float(last.get(key, 0)) for key in wanted} | {
                "peak_memory_bytes": float(log["memory_bytes"].to_numpy().max()) if "memory_bytes" in log else 0.0
            }
    path = study.root / "costs.json"
    write_json(path, spent)
    return [*written, path]
