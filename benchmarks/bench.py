"""Speed and memory of the study's own code against plain diffusers loops, as ratios within one run.

`python benchmarks/bench.py` measures the cases of cases.py, and what two processes gain, and writes a JSON, a markdown
and a csv file after each case: a run that is stopped leaves a whole report, which says what is missing, and `--cases`
adds that. Competitors take turns (A B A B …), so that a machine that slows down slows them all. Not a test: no number
can fail here.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import goals
import pandas as pd
import scaling
import torch
import typer
from cases import Case, Competitor, Scale, all_cases, checkpoint, scale_of
from measure import (
    FreshProcess,
    Gauge,
    Work,
    compared,
    flops,
    interleaved,
    matmul_peak,
    report_path,
    resident_growth,
    write_files,
)
from models import Models, load, sdxl_shaped

from invdpo.device import memory_for, resolve_device
from invdpo.errors import InvdpoError
from invdpo.lease import devices, lease
from invdpo.provenance import device_name, git_commit, stamp

SCALING = "scaling"
NOT_ASKED = "not among --cases"
NO_TIME = "the run ended before it"
UNBUILT = "any: not even models and optimizer fit"


@dataclass(frozen=True)
class Machine:
    """peak: FLOP/s of a large matrix product. FLOPs of one latent: forward: of its forward pass; again: those that
    gradient checkpointing adds to its backward pass, which are fewer."""

    peak: float
    forward: float
    again: float


def main(
    base: Annotated[str, typer.Option(help="Pipeline folder, or hub id.")] = "assets/shapes/base",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores it may use.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file. Default: results/benchmarks/<hardware>.json", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of a case; fewer where they are long.")] = 3,
    steps: Annotated[str, typer.Option(help="Inversion steps N, comma-separated.")] = "20,40,80",
    cases: Annotated[
        str | None, typer.Option(help="Cases, comma-separated; the others are kept as the file has them. Default: all.")
    ] = None,
    max_seconds: Annotated[float, typer.Option(min=0, help="No case begins later.")] = math.inf,
    sdxl: Annotated[bool, typer.Option("--sdxl-shaped", help="Random weights of SDXL's shape; CUDA only.")] = False,
) -> None:
    """Measure speed and memory; write a JSON file, and its table as markdown and csv beside it."""
    started = time.time()
    deadline = started + max_seconds
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    numbers = [int(number) for number in steps.split(",")]
    known = all_cases(numbers)
    names = [*known, SCALING]
    asked = chosen(cases, names)
    # Where there are no two, that case says so itself.
    lease(device, max(1, min(len(devices()), scaling.PROCESSES if SCALING in asked else 1)))
    place = resolve_device(device)
    if sdxl and place.type != "cuda":
        raise InvdpoError("--sdxl-shaped: SDXL's UNet needs a CUDA device with some 80 GB; leave the option out here")

    def tell(what: str) -> None:
        print(f"[{time.time() - started:4.0f} s] {what}", file=sys.stderr, flush=True)

    def models() -> Models:
        return sdxl_shaped(place) if sdxl else load(base, place)

    tell("the machine")
    with memory_for("a forward and a backward pass", scaling.REMEDIES):
        machine, scale, dtype = inspected(models())
    model = "random weights of SDXL's shape" if sdxl else base
    options = {"model": model, "threads": threads, "rounds": rounds, "dtype": dtype, "scale": asdict(scale)}
    config_hash = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    path = report_path(f"{device_name(place)} {threads} threads{' sdxl shaped' * sdxl}", out)
    found = earlier(path, config_hash)
    missing = {name: NO_TIME if name in asked else NOT_ASKED for name in names if name not in found}

    def write() -> dict[str, Any]:
        report = {
            **stamp(None, config_hash=config_hash, device=place, dtype=dtype, started=started),
            "options": options,
            "device_type": place.type,
            "device_memory_bytes": torch.cuda.get_device_properties(place).total_memory
            if place.type == "cuda"
            else None,
            "matmul_peak_flops": machine.peak,
            "forward_flops": machine.forward,
            "checkpointing_flops": machine.again,
            "cases": {name: found[name] for name in dict.fromkeys([*names, *found]) if name in found},
            "missing": missing,
        }
        report["goals"] = goals.goals(report)
        write_files(report, markdown(report), pd.DataFrame(rows(report), columns=COLUMNS), path)
        return report

    report = write()
    fresh = FreshProcess("torch", "diffusers", "transformers", "pandas", "invdpo.training.loop")
    for name in asked:
        if time.time() > deadline:
            break
        tell(name)
        try:
            if name == SCALING:
                found[name] = {"title": scaling.TITLE, "competitors": two_processes(base, place, rounds, sdxl)}
            else:

                def growth(competitor: str, name: str = name) -> int:
                    return fresh.run(growth_of, base, threads, numbers, name, competitor)

                found[name] = measured(known[name], models(), rounds, deadline, machine, growth)
            missing.pop(name, None)
        except torch.OutOfMemoryError:  # while its models and optimizer were built: a turn's own is counted
            found[name] = unbuilt(known[name])
            missing.pop(name, None)
        except InvdpoError as error:
            if name not in found:
                missing[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
        report = write()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{markdown(report)}\nwritten to {path}, and as a table to {path.with_suffix('.md')} and .csv")


def chosen(cases: str | None, known: Sequence[str]) -> list[str]:
    """The cases named, comma-separated, or all, in their own order; InvdpoError for a name that is none."""
    if cases is None:
        return list(known)
    named = cases.split(",")
    if unknown := [name for name in named if name not in known]:
        raise InvdpoError(f"--cases: there is no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in named]


def inspected(models: Models) -> tuple[Machine, Scale, str]:
    """What the machine reaches and a forward pass costs, how much a case is given, and the precision."""
    x, t, cond = models.latents(1, 0), torch.zeros(1, dtype=torch.int64, device=models.device), models.prompts(1, 0)

    @torch.no_grad()
    def forward() -> None:
        models.eps(models.reference)(x, t, cond)

    def backward(checkpointing: bool) -> int:
        checkpoint(models.policy, checkpointing)
        found = flops(lambda: models.eps(models.policy)(x, t, cond).sum().backward(), models.device)
        models.policy.zero_grad(set_to_none=True)
        return found

    again = backward(checkpointing=True) - backward(checkpointing=False)
    machine = Machine(matmul_peak(models.device, models.dtype), flops(forward, models.device), again)
    return machine, scale_of(models), str(models.dtype).removeprefix("torch.")


def earlier(path: Path, config_hash: str) -> dict[str, Any]:
    """The cases of a report at `path` of the same commit, machine and options; none where there is no such."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    same = (report.get("config_hash"), report.get("git_commit")) == (config_hash, git_commit())
    return report["cases"] if same else {}


def measured(
    case: Case, models: Models, rounds: int, deadline: float, machine: Machine, growth: Callable[[str], int]
) -> dict[str, Any]:
    """A case's competitors: rates, ratios to the first one's, shares of the machine's peak, and, where it is a result,
    memory: on a GPU by its own count, else by `growth` of the competitor."""
    competitors = case.build(models)
    device, amounts = models.device, {name: each.amount for name, each in competitors.items()}
    counted = case.memory and device.type == "cuda"
    gauges = {name: Gauge(each.work, device) for name, each in competitors.items() if counted}
    works: dict[str, Work] = {name: gauges.get(name, each.work) for name, each in competitors.items()}
    memory: dict[str, dict[str, int | None]] = {
        name: {"peak_bytes": growth(name)} for name in competitors if case.memory and not counted
    }
    limit = min(scale_of(models).seconds, deadline - time.time())
    times = interleaved(works, rounds, device, limit)
    memory |= {name: {"peak_bytes": gauge.growth, "total_bytes": gauge.total} for name, gauge in gauges.items()}
    present = sum(each.held for each in competitors.values())  # on the GPU in everyone's turns
    found = compared(times, amounts, next(iter(competitors)))
    for name, each in competitors.items():
        found[name] |= {"at_a_time": each.amount, "rounds": len(times[name])}
        found[name] |= shares(each, found[name]["per_second"], machine)
        for key, more in (("peak_bytes", each.held), ("total_bytes", each.held - present)):
            if key in memory.get(name, {}):
                size = memory[name][key]
                found[name][key] = None if size is None else size + more
    return {"title": case.title, "steps": case.steps, "competitors": found}


def unbuilt(case: Case) -> dict[str, Any]:
    """In the place of a case's competitors, where not even what they start from fits the GPU."""
    nothing = {"per_second": 0.0, "ratio": None, "ratio_range": None, "rounds": 0}
    return {
        "title": case.title,
        "steps": case.steps,
        "competitors": {UNBUILT: nothing | {"peak_bytes": None, "total_bytes": None}},
    }


def shares(each: Competitor, per_second: float, machine: Machine) -> dict[str, float]:
    """Of the machine's peak: what the method asks for (model FLOPs), and what is computed, recomputation included
    (hardware FLOPs), a backward pass as two forward passes; none where that is not all of the work."""
    if each.needed is None:
        return {}
    rate = per_second / each.amount / machine.peak
    executed = each.executed * machine.forward + each.repeated * machine.again
    return {"model_share_of_peak": each.needed * machine.forward * rate, "hardware_share_of_peak": executed * rate}


def growth_of(base: str, threads: int, steps: list[int], case: str, competitor: str) -> int:
    """Bytes that one turn of a competitor adds to what its models hold; for a process of its own on the CPU."""
    torch.set_num_threads(threads)
    models = load(base, torch.device("cpu"))
    work = all_cases(steps)[case].build(models)[competitor].work
    return resident_growth(work)


def two_processes(base: str, device: torch.device, rounds: int, sdxl: bool) -> dict[str, Any]:
    """Training by two processes against one, on one thread or GPU each; InvdpoError where the machine has no two."""
    cuda = device.type == "cuda"
    places = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if places < scaling.PROCESSES:
        raise InvdpoError(f"it takes {scaling.PROCESSES} {'GPUs' if cuda else 'cores'}, and there is {places}")
    return scaling.measure(base, device.type, rounds, sdxl)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    options, each = report["options"], "GPU" if report["device_type"] == "cuda" else "CPU thread"
    lines = [
        f"# Speed and memory: {report['device']}, {options['threads']} CPU threads, {options['dtype']}",
        "",
        f"Model: {options['model']}. A rate is the median of at most {options['rounds']} interleaved rounds; a ratio",
        "is to the first competitor in the same round, with its range. A large matrix product reaches "
        f"{report['matmul_peak_flops'] / 1e9:,.0f}",
        "GFLOP/s: *needed* is the share of them that the method asks for (model FLOPs), *computed* the share with what",
        "is computed twice (hardware FLOPs); a backward pass counts two forward passes. *MiB* is above weights and",
        f"optimizer states, *in all* with them, by the GPU's count. Two processes have one {each} each.",
        "",
        "| what | N | competitor | at a time | per second | ratio | needed | computed | MiB | MiB in all |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in report["cases"].values():
        for name, values in case["competitors"].items():
            cells = [case["title"], case.get("steps") or "", name, values.get("at_a_time", ""), *speed(values)]
            cells += [f"{values[key]:.0%}" if key in values else "" for key in SHARES]
            cells += [mebibytes(values, key) for key in ("peak_bytes", "total_bytes")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *goals.table(report["goals"])]
    if report["missing"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in report["missing"].items()]
    return "\n".join(lines) + "\n"


SHARES = ("model_share_of_peak", "hardware_share_of_peak")
COLUMNS = [
    *("what", "N", "competitor", "at_a_time", "per_second", "ratio", "ratio_low", "ratio_high"),
    *SHARES,
    *("peak_mib", "total_mib"),
]


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report as one table, a row a measurement, for the report of a study."""
    found = []
    for case in report["cases"].values():
        for name, values in case["competitors"].items():
            low, high = values["ratio_range"] or (None, None)
            row = {"what": case["title"], "N": case.get("steps"), "competitor": name, **values}
            row |= {"ratio_low": low, "ratio_high": high}
            for key in ("peak", "total"):
                size = values.get(f"{key}_bytes")
                row[f"{key}_mib"] = None if size is None else size / 2**20
            found.append(row)
    return found


def speed(values: Mapping[str, Any]) -> tuple[str, str]:
    """Rate and ratio with its range; no ratio where the first competitor did not fit."""
    rate = f"{values['per_second']:,.4g}"
    if values["ratio"] is None:
        return rate, "-"
    low, high = values["ratio_range"]
    return rate, f"{values['ratio']:.2f} ({low:.2f} to {high:.2f})"


def mebibytes(values: Mapping[str, Any], key: str) -> str:
    """A number of bytes; empty where it was not measured."""
    if key not in values:
        return ""
    return "out of memory" if values[key] is None else f"{values[key] / 2**20:,.1f}"


if __name__ == "__main__":
    try:
        typer.run(main)
    except InvdpoError as error:
        sys.exit(f"error: {error}")
