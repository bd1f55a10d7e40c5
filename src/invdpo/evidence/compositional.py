"""Compositional generation: the paper's Table 2, and the benchmark-style scores of the world's parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invdpo.evidence import paper
from invdpo.evidence.comparisons import NOTE, paired_table
from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_of,
    comparison_arms,
    config_file,
)
from invdpo.evidence.printing import NOT_RUN, Block, Table, format_interval, record_of, triple
from invdpo.evidence.statistics import Interval, mean_interval
from invdpo.scorers.composition import BENCHMARKS, TITLES, geneval_overall

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

SET_METRICS = ("fid_standard", "fid_laionsg_compat", "kid", "precision", "recall")
GRAPH_METRICS = ("sg_iou", "entity_iou", "relation_iou")


def table2(evidence: Evidence) -> Table:
    """Compositional generation: distances of the image sets, scene-graph agreement, and what the paper printed."""
    study = evidence.study
    settings = study.experiments.distribution
    arms = list(settings.arms) if settings else comparison_arms(study)
    sets, lacking = _distances(study)
    measure = f"invdpo distribution --study {config_file(study)}"
    columns = ["source", "arm", "base", "status", "seeds", "prompts", "images", "reference_images", "features", "rank"]
    for metric in SET_METRICS:
        columns += [metric, f"{metric}_seeds_low", f"{metric}_seeds_high"]
    for metric in GRAPH_METRICS:
        columns += triple(metric) + triple(f"{metric}_minus_base")
    # The paper does not say which reading of FID it has, so its number is under neither.
    columns += ["kid_subset_sd", "fid"]
    records, distances, graphs, gains = [], [], [], []
    for arm in arms:
        base = baseline_of(study, arm)
        record: dict[str, Any] = {"source": "this study", "arm": arm, "status": evidence.status(None, arm)}
        if evidence.has(arm):
            record |= {"seeds": len(evidence.scores[arm].seeds), "prompts": len(evidence.scores[arm].prompts)}
        measured, cells = sets.get(arm), [lacking.get(arm, NOT_RUN)] * len(SET_METRICS)
        if settings and measured is None and record["status"] == "ok":
            record["status"] = f"sets of images, {cells[0]}: {measure}"
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
            agreement.append(_text(evidence, mean, f"oracle_{metric}", arm))
            change.append("–" if arm == base else _text(evidence, gain, f"oracle_{metric}", arm, base, sign=True))
        records.append(record)
        distances.append([arm_title(arm), *cells])
        graphs.append([arm_title(arm), *agreement])
        gains.append([arm_title(arm), *change])
    quoted = []
    for row in paper.rows("2"):
        here = ", ".join(arm_title(arm) for arm in arms if paper.stands_for(study, arm, row)) or row.absent
        records.append({"source": "paper", "arm": row.method, "base": row.base, "status": here, **row.values})
        base_title = paper.BASES.get(row.base, row.base)
        quoted.append([row.method, base_title, *(row.values[name] for name in ("fid", *GRAPH_METRICS)), here])
    titles = ["SG-IoU", "Entity-IoU", "Relation-IoU"]
    blocks = [
        Block(
            "Sets of images against the reference set",
            ["Method", "FID (standard)", "FID (LAION-SG's script)", "KID", "Precision", "Recall"],
            distances,
        ),
        Block("Scene graphs", ["Method", *titles], graphs),
        Block("Scene graphs, difference from the base model", ["Method", *titles], gains),
        Block(paper.REPORTED, ["Method", "Base", "FID", *titles, "Here"], quoted),
    ]
    notes = [NOTE, *_set_notes(sets), paper.settings_note("2"), *evidence.missing([*arms, base])]
    if settings and any(arm not in sets for arm in arms):
        notes.append(f"Sets of images: `{measure}` measures those of every seed.")
    return Table("Table 2: compositional generation", notes, records, columns, blocks)


def _distances(study: StudyConfig) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Of distribution.csv: arm -> column -> (seeds,) numbers of the arms whose seeds are all there, and arm -> which
    are not of the others.
    """
    path = study.root / "distribution.csv"
    if study.experiments.distribution is None or not path.is_file():
        return {}, {}
    rows = pd.read_csv(path)
    found, lacking = {}, {}
    for arm, part in rows.groupby("method"):
        seeds = study.seeds if study.arm(str(arm)).trains else [0]
        part = part[part["seed"].isin(seeds)]
        if missing := sorted(set(seeds) - set(part["seed"])):
            lacking[str(arm)] = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} missing"
        else:
            found[str(arm)] = {str(name): np.array(part[name], np.float64) for name in part.columns[1:]}
    return found, lacking


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


def benchmark_table(
    scores: Mapping[str, Mapping[str, np.ndarray]], arms: Sequence[str], lacks: Mapping[str, str] | None = None
) -> Table:
    """GenEval-, T2I-CompBench- and DPG-style scores of methods.

    scores[arm][task of TASKS]: (seeds, prompts) in 0..1, nan for a prompt that does not ask for the task. lacks[arm]:
    what an arm without scores lacks.
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
            lack = (lacks or {}).get(arm, NOT_RUN)
            cells = [format_interval(means[task]) if task in means else lack for task in shown]
            rows.append([arm_title(arm), *cells])
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
    lacks = {arm: evidence.absent(None, arm) for arm in arms if not evidence.has(arm)}
    table = benchmark_table(scores, arms, lacks)
    missing = evidence.missing(arms)
    if not table.blocks:
        note = "Only a world's parser scores these. For real images `invdpo composition` reads the benchmarks' files."
        rows = [[arm_title(arm), lacks.get(arm, NOT_RUN)] for arm in arms]
        block = Block("Compositional benchmarks", ["Method", "Score"], rows)
        return replace(table, notes=[note, *missing], blocks=[block])
    note = (
        "The looker is the world's parser, not the benchmarks' detectors and VQA models, and a prompt here asks for "
        "several tasks at once: the rules are theirs, the numbers compare with no published ones."
    )
    return replace(table, notes=[*table.notes, note, *missing])


def _mean(evidence: Evidence, arm: str, scorer: str) -> Interval | None:
    return mean_interval(evidence.final(arm, scorer)) if evidence.has(arm, scorer) else None


def _difference(evidence: Evidence, arm: str, base: str, scorer: str) -> Interval | None:
    values = paired_table(evidence, arm, base, scorer)
    return None if values is None else mean_interval(values)


def _text(evidence: Evidence, interval: Interval | None, scorer: str, *arms: str | None, sign: bool = False) -> str:
    return evidence.absent(scorer, *arms) if interval is None else format_interval(interval, sign=sign)
