"""A plan as tables for a terminal, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from invdpo.plan import Plan, Stage
from invdpo.plan_sizes import Download


def to_json(found: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(asdict(found) | {"hours": found.hours}, indent=2)


def to_text(found: Plan) -> str:
    """The plan as tables for a terminal."""
    machine, unit = found.machine, found.machine.unit
    count = f"{machine.devices} {unit}{'s' if machine.devices > 1 else ''}"
    lines = [f"{found.study}: {found.base}, planned for {count}, {machine.name} ({machine.memory:.3g} GB)", ""]
    for problem in found.problems:
        lines += [f"!! {problem}", ""]
    lines += _table(["jobs", ""], [[name, str(count)] for name, count in found.jobs.items()], sum(found.jobs.values()))
    lines += _download_table(found.downloads)
    lines += _stage_table(["stage", "jobs", "UNet evaluations", f"{unit}-hours"], found.stages)
    lines += _stage_table(["method", "arms", "UNet evaluations", f"{unit}-hours"], found.methods)

    def memory(gb: float) -> str:
        return _number(gb) + (" !" if machine.kind == "gpu" and gb > machine.memory else "")

    rows = [
        [name, str(arm.runs), _hours(arm.train_hours), _hours(arm.evaluate_hours)]
        + [memory(arm.train_memory), memory(arm.evaluate_memory), str(arm.devices)]
        for name, arm in found.arms.items()
    ]
    head = ["arm", "runs", "train h", "evaluate h", "train GB", "evaluate GB", f"{unit}s"]
    lines += _table(head, rows)
    rows = [[name, _number(gb)] for name, gb in found.disk.items()]
    if rows:
        lines += _table(["disk", "GB"], rows, _number(sum(found.disk.values())))
    rows = [[disk.name, _number(disk.needed), _number(disk.free)] for disk in found.disks]
    lines += _table(["where", "GB still needed", "GB free"], rows)
    lines += _table(["memory", "GB"], [[name, _number(gb)] for name, gb in found.memory.items() if gb])
    lines += [_wall_time(found, count), "", "Assumptions"]
    lines += [f"- {text}" for text in found.assumptions]
    return "\n".join(lines)


def _wall_time(found: Plan, count: str) -> str:
    """How long the whole takes: with all devices at work, or as long as the arm that trains longest."""
    shared = found.hours / found.machine.devices
    longest = max(found.arms, key=lambda name: found.arms[name].train_hours / found.arms[name].devices)
    arm = found.arms[longest]
    alone = arm.train_hours / arm.devices
    if alone <= shared:
        return f"With {count} at work all the time: {_duration(shared)}."
    return (
        f"With {count}: at least {_duration(alone)}, as long as `{longest}` trains on {arm.devices} of them "
        f"(`training.processes`); {_duration(shared)} with all at work all the time."
    )


def _stage_table(head: list[str], rows: dict[str, Stage]) -> list[str]:
    body = [[name, str(row.jobs), _number(row.evaluations), _hours(row.hours)] for name, row in rows.items()]
    jobs, evaluations, hours = (
        sum(getattr(row, name) for row in rows.values()) for name in ("jobs", "evaluations", "hours")
    )
    return _table(head, body, jobs, _number(evaluations), _hours(hours))


def _download_table(wanted: dict[str, Download]) -> list[str]:
    if not wanted:
        return ["downloads: none", ""]
    rows = []
    for name, download in wanted.items():
        bounded = "?" if download.at_most is None else f"at most {_number(download.at_most)}"
        rows.append([name, bounded if download.gb is None else _number(download.gb)])
    total = _number(sum(download.bound for download in wanted.values()))
    unknown = [download for download in wanted.values() if download.gb is None]
    if any(download.at_most is None for download in unknown):
        total += " + ?"
    elif unknown:
        total = f"at most {total}"
    return _table(["downloads", "GB"], rows, total)


def _table(head: list[str], rows: Iterable[list[str]], *total: object) -> list[str]:
    """A table with its first column to the left and numbers to the right, a total below, and an empty line."""
    body = [head, *rows]
    if total:
        body.append(["total", *map(str, total)])
    widths = [max(len(row[i]) for row in body) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in body
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [*(line.rstrip() for line in lines), ""]


def _number(value: float) -> str:
    """Three digits of what is estimated; large numbers in full thousands, millions and so on."""
    if value == 0:
        return "0"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{float(f'{value:.3g}'):,.10g}"


def _hours(value: float) -> str:
    return "<0.01" if 0 < value < 0.01 else _number(value)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{float(f'{hours / 24:.3g}'):,.10g} days"
