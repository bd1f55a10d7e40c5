"""The study's tables: methods and scores, inversion steps, q against p, label controls and what was spent.

Nothing that differs between two runs of the same study (seconds, memory, commit) is in a table; seconds and memory go
to `costs.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdpo.evidence import paper
from invdpo.evidence.comparisons import (
    LEADERS_NOTE,
    NOTE,
    TESTED_NOTE,
    Difference,
    contenders,
    detectable_note,
    difference_columns,
    difference_record,
    difference_text,
    differences,
    family,
    marked,
    over_optimisation,
    paired_table,
    reach,
    reach_record,
    shifted,
    standings,
    to_target,
    win_rates,
)
from invdpo.evidence.compositional import composition, table2
from invdpo.evidence.load import (
    Evidence,
    arm_title,
    baseline_arm,
    baseline_of,
    by_base,
    comparison_arms,
    control_arms,
    load_evidence,
    load_run,
    scorer_title,
    step_families,
)
from invdpo.evidence.printing import Block, Table, format_interval, record_of, steady, triple, write_table
from invdpo.evidence.statistics import Interval, mean_interval
from invdpo.files import write_json

if TYPE_CHECKING:
    from invdpo.config import StudyConfig


def _mean(evidence: Evidence, arm: str, scorer: str) -> Interval | None:
    return mean_interval(evidence.final(arm, scorer)) if evidence.has(arm, scorer) else None


def _mean_text(evidence: Evidence, arm: str, scorer: str, mean: Interval | None, standing: str = "") -> str:
    return evidence.absent(scorer, arm) if mean is None else marked(format_interval(mean), standing)


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


def _spent(evidence: Evidence, record: dict[str, Any], columns: Iterable[str]) -> list[str]:
    """What an arm cost, or what is missing before that can be said."""
    return [f"{record[name]:,}" if name in record else evidence.absent(None, record["arm"]) for name in columns]


def table1(evidence: Evidence) -> Table:
    """Methods x scores: means, differences from the base model, win rate on the primary score, and what was spent."""
    study, scorers, primary = evidence.study, evidence.scorers, evidence.primary
    groups = by_base(study, comparison_arms(study)) or {None: []}
    arms = [arm for group in groups.values() for arm in group]
    columns = ["arm", *(["base"] if len(groups) > 1 else []), "status", "seeds", "prompts"]
    columns += ["optimizer_steps", "pairs_seen", "unet_evals"]
    for scorer in scorers:
        columns += [*triple(scorer), f"{scorer}_standing", *difference_columns(f"{scorer}_minus_base")]
    columns += [*triple(f"{primary}_win_rate"), f"{primary}_win_rate_p_holm"]
    columns += paper.columns()
    place = standings(evidence, {str(base): group for base, group in groups.items()})
    found, wins = _gains_and_wins(evidence, arms)
    records, means, gains, sizes, other = [], {}, {}, {}, {}
    for arm in arms:
        base, group = baseline_of(study, arm), study.arms[arm].base
        record: dict[str, Any] = {"arm": arm, "status": evidence.status(None, arm), **_costs(evidence, arm)}
        record["base"] = study.with_base_of(arm).base
        if evidence.has(arm):
            record["seeds"] = len(evidence.scores[arm].seeds)
            record["prompts"] = len(evidence.scores[arm].prompts)
        mean_cells, gain_cells, size_cells = [], [], []
        for scorer in scorers:
            mean, standing = _mean(evidence, arm, scorer), place.get((str(group), arm, scorer), "")
            gain = found.get((arm, scorer))
            record |= record_of(scorer, mean) | {f"{scorer}_standing": standing}
            record |= difference_record(f"{scorer}_minus_base", gain)
            mean_cells.append(_mean_text(evidence, arm, scorer, mean, standing))
            gain_cells.append("–" if arm == base else difference_text(evidence, scorer, gain, arm, base))
            size_cells.append(f"{gain.detectable:.2g}" if gain and gain.detectable else "–")
        won = wins.get(arm)
        if won is not None:
            record |= record_of(f"{primary}_win_rate", won.interval) | {f"{primary}_win_rate_p_holm": won.p_holm}
        record |= paper.beside(study, arm, "1")
        records.append(record)
        name = arm_title(arm)
        means.setdefault(group, []).append([name, *mean_cells])
        rate = "–" if arm == base else evidence.absent(primary, arm, base)
        if won is not None:
            rate = format_interval(won.interval) + (" *" if won.told else "")
        gains.setdefault(group, []).append([name, *gain_cells, rate])
        if arm != base:
            sizes.setdefault(group, []).append([name, *size_cells])
        spent = _spent(evidence, record, ("optimizer_steps", "pairs_seen", "unet_evals"))
        other.setdefault(group, []).append([name, *spent, *paper.quoted(record)])
    lacking = _unfilled(study, "1", arms, list(groups))
    for name, (group, record) in lacking.items():
        records.append({"arm": name, **record})
        means.setdefault(group, []).append([name, *[record["status"]] * len(scorers)])
        other.setdefault(group, []).append([name, *[record["status"]] * 3, *paper.quoted(record)])
    titles = [scorer_title(scorer) for scorer in scorers]
    heads = {
        "Mean score": (["Method", *titles], means),
        "Difference from the base model": (["Method", *titles, f"Win rate ({scorer_title(primary)})"], gains),
        "Smallest true difference from the base model that one such test finds with 80 % power at 5 %, uncorrected": (
            ["Method", *titles],
            sizes,
        ),
        "What was spent, and what the paper reports (SDXL / SD1.5)": (
            ["Method", "Steps", "Pairs", "UNet evaluations", "paper PickScore", "paper CLIP", "paper Aesthetic"],
            other,
        ),
    }
    # A study with one base says so elsewhere.
    models = dict.fromkeys(groups, "")
    if len(groups) > 1:
        named = {group: "" if group is None else f"{group}: " for group in groups}
        models = {group: f" ({named[group]}{study.with_base_of(own[0]).base})" for group, own in groups.items()}
    blocks = [
        Block(caption + models[group], head, rows.get(group, []))
        for caption, (head, rows) in heads.items()
        for group in groups
    ]
    bases = dict.fromkeys(baseline_of(study, arm) for arm in arms)
    notes = [NOTE, LEADERS_NOTE, TESTED_NOTE.format("the base model"), paper.settings_note("1")]
    notes += [*_unfilled_note(lacking), *evidence.missing([*arms, *bases])]
    if len(groups) > 1:
        notes.insert(2, "A row is compared with those of its own base model.")
    return Table("Table 1: methods and scores", notes, records, columns, blocks)


def _unfilled(
    study: StudyConfig, table: str, arms: list[str], groups: list[str | None]
) -> dict[str, tuple[str | None, dict[str, str]]]:
    """Name -> group and columns of the paper's methods that no arm is; in their base's group, if there is one."""
    found: dict[str, tuple[str | None, dict[str, str]]] = {}
    first = None if None in groups else groups[0]
    for row in paper.unfilled(study, table, arms):
        group = row.base if row.base in groups else first
        name = row.method if group == first else f"{row.method} ({paper.BASES[row.base]})"
        _, known = found.get(name, (group, {}))
        found[name] = group, {**known, "status": row.absent, **row.columns}
    return found


def _unfilled_note(names: Iterable[str]) -> list[str]:
    listed = ", ".join(names)
    return [f"In the paper's table, and no arm of this study: {listed}."] if listed else []


def _gains_and_wins(
    evidence: Evidence, arms: list[str]
) -> tuple[dict[tuple[str, str], Difference], dict[str, Difference]]:
    """Differences from the base model by (arm, scorer), and win rates on the primary score by arm: one family."""
    tables: dict[tuple[str, str, str], np.ndarray] = {}
    for arm in arms:
        for scorer in evidence.scorers:
            base = baseline_of(evidence.study, arm)
            values = paired_table(evidence, arm, base, scorer) if base and arm != base else None
            if values is not None:
                tables["gain", arm, scorer] = values
                if scorer == evidence.primary:
                    tables["win", arm, scorer] = np.sign(values) / 2
    found = family(tables)
    gains = {(arm, scorer): difference for (kind, arm, scorer), difference in found.items() if kind == "gain"}
    wins = {arm: shifted(difference, 0.5) for (kind, arm, _), difference in found.items() if kind == "win"}
    return gains, wins


def table3(evidence: Evidence) -> Table:
    """Number of inversion steps: means, and differences from the fewest steps of the same family."""
    study, scorers = evidence.study, evidence.scorers
    columns = ["family", "inversion_steps", "arm", "status", "optimizer_steps", "unet_evals"]
    for scorer in scorers:
        columns += [*triple(scorer), f"{scorer}_standing", *difference_columns(f"{scorer}_minus_fewest")]
    columns += paper.columns(["sdxl"])
    families = step_families(study)
    place = standings(evidence, {name: list(arms.values()) for name, arms in families.items()})
    pairs = [(arm, min(arms.items())[1]) for arms in families.values() for arm in arms.values()]
    found = differences(evidence, [(arm, fewest) for arm, fewest in pairs if arm != fewest])
    records, means, gains = [], [], []
    for name, arms in families.items():
        fewest = next(iter(arms.values()))
        for count, arm in arms.items():
            record: dict[str, Any] = {"family": name, "inversion_steps": count, "arm": arm}
            record |= {"status": evidence.status(None, arm), **_costs(evidence, arm)}
            mean_cells, gain_cells = [], []
            for scorer in scorers:
                mean, standing = _mean(evidence, arm, scorer), place.get((name, arm, scorer), "")
                gain = found.get((arm, fewest, scorer))
                record |= record_of(scorer, mean) | {f"{scorer}_standing": standing}
                record |= difference_record(f"{scorer}_minus_fewest", gain)
                mean_cells.append(_mean_text(evidence, arm, scorer, mean, standing))
                gain_cells.append("–" if arm == fewest else difference_text(evidence, scorer, gain, arm, fewest))
            record |= paper.beside(study, arm, "3", str(count))
            quoted = " / ".join(record.get(column, "–") for column in paper.columns(["sdxl"]))
            records.append(record)
            means.append([arm_title(name), str(count), *mean_cells, *_spent(evidence, record, ["unet_evals"]), quoted])
            gains.append([arm_title(name), str(count), *gain_cells])
    printed, reported = _reported_steps(study, families)
    records += printed
    titles = [scorer_title(scorer) for scorer in scorers]
    heads = ["Method", "N", "Steps", *map(scorer_title, paper.SCORES), "Where", "Here"]
    blocks = [
        Block("Mean score", ["Family", "N", *titles, "UNet evaluations", "paper PickScore / CLIP / Aesthetic"], means),
        Block("Difference from the fewest steps of the family", ["Family", "N", *titles], gains),
        Block(paper.REPORTED, heads, reported),
    ]
    notes = [NOTE, f"{LEADERS_NOTE} A row is compared with those of its family."]
    notes += [TESTED_NOTE.format("the fewest steps"), detectable_note(evidence, found), paper.settings_note("3")]
    notes += evidence.missing(arm for arms in families.values() for arm in arms.values())
    return Table("Table 3: number of inversion steps N", notes, records, columns, blocks)


def _reported_steps(
    study: StudyConfig, families: Mapping[str, Mapping[int, str]]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The paper's own numbers by inversion steps, of Table 3 and of section 5.4, as records and as rows in print."""
    records, printed = [], []
    for table in ("3", "fig3"):
        for row in paper.rows(table):
            own = [
                arm_title(arm)
                for arms in families.values()
                for count, arm in arms.items()
                if str(count) == row.steps and paper.stands_for(study, arm, row)
            ]
            here = ", ".join(own) or row.absent if table == "3" else "Figure 3"
            name = ", ".join([row.method, *([f"N = {row.steps}"] if row.steps else []), f"step {row.optimizer_steps}"])
            records.append({"family": row.method, "inversion_steps": row.steps, "arm": name, "status": here})
            records[-1] |= {"optimizer_steps": row.optimizer_steps, **row.columns}
            values = [row.values.get(score, "–") for score in paper.SCORES]
            printed.append([row.method, row.steps or "–", row.optimizer_steps, *values, row.source, here])
    return records, printed


def table_s5(evidence: Evidence) -> Table:
    """One timestep drawn from q against ones from the inversion p: every later arm minus the first."""
    study, scorers = evidence.study, evidence.scorers
    arms = list(study.experiments.q_vs_p.arms) if study.experiments.q_vs_p else []
    columns = ["row", "status", "optimizer_steps", "unet_evals"]
    for scorer in scorers:
        columns += [*difference_columns(scorer), f"{scorer}_standing"]
    columns += paper.columns()
    place = standings(evidence, {"all": arms})
    found = differences(evidence, [(arm, arms[0]) for arm in arms[1:]])
    records, rows = [], []
    for arm in arms:
        record: dict[str, Any] = {"row": arm, "status": evidence.status(None, arm), **_costs(evidence, arm)}
        cells = []
        for scorer in scorers:
            mean, standing = _mean(evidence, arm, scorer), place.get(("all", arm, scorer), "")
            record |= record_of(scorer, mean) | {f"{scorer}_standing": standing}
            cells.append(_mean_text(evidence, arm, scorer, mean, standing))
        record |= paper.beside(study, arm, "s5")
        records.append(record)
        rows.append([arm_title(arm), *cells, *paper.quoted(record)])
    for arm in arms[1:]:
        first = arms[0]
        record = {"row": f"{arm} - {first}", "status": evidence.status(None, arm, first)}
        cells = []
        for scorer in scorers:
            gain = found.get((arm, first, scorer))
            record |= difference_record(scorer, gain)
            cells.append(difference_text(evidence, scorer, gain, arm, first))
        record |= paper.minus(paper.beside(study, arm, "s5"), paper.beside(study, first, "s5"))
        records.append(record)
        rows.append([f"{arm_title(arm)} minus {arm_title(first)}, paired", *cells, *paper.quoted(record)])
    lacking = _unfilled(study, "s5", arms, [None])
    for name, (_, record) in lacking.items():
        records.append({"row": name, **record})
        rows.append([name, *[record["status"]] * len(scorers), *paper.quoted(record)])
    head = ["Noise from", *[scorer_title(scorer) for scorer in scorers]]
    head += [f"paper {scorer_title(scorer)} (SDXL / SD1.5)" for scorer in paper.SCORES]
    blocks = [Block("Mean score", head, rows)]
    notes = [NOTE, LEADERS_NOTE, TESTED_NOTE.format("zero"), detectable_note(evidence, found)]
    notes += [paper.settings_note("s5"), *_unfilled_note(lacking), *evidence.missing(arms)]
    return Table("Table S5: one timestep of q against one of p", notes, records, columns, blocks)


def controls(evidence: Evidence) -> Table:
    """What each method gains over the base model with true, shuffled and swapped labels, and true minus control."""
    study, primary = evidence.study, evidence.primary
    base = baseline_arm(study)
    columns = ["method", "labels", "arm", "status", "scorer", *difference_columns("minus_base"), "standing"]
    columns += difference_columns("true_minus_control")
    groups = {method: {"true": method, **arms} for method, arms in control_arms(study).items()}
    place = standings(evidence, {method: list(arms.values()) for method, arms in groups.items()})
    every = [(method, arm) for method, arms in groups.items() for arm in arms.values()]
    margins = [(method, arm) for method, arm in every if arm != method]
    found = differences(evidence, [*([(arm, base) for _, arm in every] if base else []), *margins])
    records, by_scorer = [], {scorer: [] for scorer in evidence.scorers}
    for method, arms in groups.items():
        for labels, arm in arms.items():
            for scorer in evidence.scorers:
                gain, margin = found.get((arm, base or "", scorer)), found.get((method, arm, scorer))
                standing = place.get((method, arm, scorer), "")
                record = {"method": method, "labels": labels, "arm": arm, "status": evidence.status(scorer, arm)}
                record |= {"scorer": scorer}
                record |= difference_record("minus_base", gain) | {"standing": standing}
                records.append(record | difference_record("true_minus_control", margin))
                shown = "–" if labels == "true" else difference_text(evidence, scorer, margin, arm, method)
                gained = marked(difference_text(evidence, scorer, gain, arm, base), standing)
                by_scorer[scorer].append([arm_title(method), labels, gained, shown])
    order = [primary, *[s for s in evidence.scorers if s != primary]] if primary in by_scorer else evidence.scorers
    head = ["Method", "Labels", "Minus base", "True labels minus these"]
    blocks = [Block(scorer_title(scorer), head, by_scorer[scorer]) for scorer in order]
    note = "A method that gains as much from shuffled labels as from true ones has not learnt a preference."
    notes = [NOTE, note, f"{LEADERS_NOTE} A row is compared with those of its method."]
    notes += [TESTED_NOTE.format("zero"), detectable_note(evidence, found)]
    notes += evidence.missing([base, *(arm for _, arm in every)])
    return Table("Label controls", notes, records, columns, blocks)


def costs(evidence: Evidence) -> Table:
    """What each arm spent per training seed. Seconds and memory differ between runs: they are in costs.json."""
    columns = ["arm", "status", "optimizer_steps", "pairs_seen", "unet_evals"]
    records, rows = [], []
    for arm in evidence.study.arms:
        record: dict[str, Any] = {"arm": arm, "status": evidence.status(None, arm), **_costs(evidence, arm)}
        records.append(record)
        rows.append([arm_title(arm), *_spent(evidence, record, columns[2:])])
    note = "Per training seed. One UNet evaluation is one forward pass of one latent; a backward pass counts two."
    blocks = [Block("Training cost", ["Arm", "Optimizer steps", "Pairs", "UNet evaluations"], rows)]
    return Table("Training cost", [note, *evidence.missing(evidence.study.arms)], records, columns, blocks)


TABLES = {
    "table1": table1,
    "win_rates": win_rates,
    "over_optimisation": over_optimisation,
    "to_target": to_target,
    "table2": table2,
    "table3": table3,
    "table_s5": table_s5,
    "controls": controls,
    "composition": composition,
    "costs": costs,
}


def write(study: StudyConfig) -> list[Path]:
    """Write every table as root/tables/NAME.{csv,md,tex}, and root/costs.json; the paths written."""
    evidence = load_evidence(study)
    written = []
    for name, build in TABLES.items():
        written += write_table(study.root / "tables", name, build(evidence))
    spent: dict[str, dict[str, Any]] = {}
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
    target, arms = contenders(evidence)
    for arm in arms:
        soon = {scorer: reach(evidence, arm, target, scorer, "seconds") for scorer in evidence.scorers}
        spent.setdefault(arm, {})["seconds_to_target"] = {"target": target} | {
            scorer: {key: steady(value) if isinstance(value, float) else value for key, value in record.items()}
            for scorer, found in soon.items()
            if found and (record := reach_record(found))
        }
    path = study.root / "costs.json"
    write_json(path, spent)
    return [*written, path]
