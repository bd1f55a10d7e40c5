"""Speed and memory of the study's own code against plain diffusers loops, as ratios within one run.

`python benchmarks/bench.py` takes minutes and writes a JSON, a markdown and a csv file. Competitors take turns
(A B A B …), so that a machine that slows down slows them all. Not a test: no number can fail here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import scaling
import torch
import typer
from loops import Models, load, plain_training_step, reference_loop, sdxl_shaped
from measure import Work, compared, flops, interleaved, matmul_peak, peak_growth, write_report
from scaling import random_stepper

from invdpo import objectives
from invdpo.config import StudyConfig, parse_study
from invdpo.device import autocast, resolve_device
from invdpo.errors import InvdpoError
from invdpo.provenance import device_name, stamp
from invdpo.training.ranks import Ranks

METHODS = ("inversion_dpo_code", "inversion_dpo_implied")
REFERENCE_LOOP, ONE, SEVERAL = "reference loop", "streamed, one pair", "streamed, several pairs"
STREAMS = (REFERENCE_LOOP, ONE, SEVERAL)
SCALING = "Diffusion-DPO by processes, pairs"


@dataclass(frozen=True)
class Scale:
    """How much each competitor is given: latents of a forward pass, pairs of a training step, pairs of an all-timestep
    step; the chunk (latents with their graph alive) and gradient checkpointing of our own code."""

    latents: int
    batch: int
    pairs: int
    chunk: int
    checkpointing: bool


# Three guided pairs are one call of 12. A larger chunk is faster and takes more memory; this shows both gains at once.
SMALL = Scale(latents=64, batch=32, pairs=3, chunk=12, checkpointing=False)
LARGE = Scale(latents=8, batch=2, pairs=2, chunk=4, checkpointing=True)


def scale_of(models: Models) -> Scale:
    """LARGE from Stable Diffusion 1.5's 64x64 latents on."""
    return LARGE if models.policy.config["sample_size"] >= 64 else SMALL


def checkpoint(models: Models, on: bool) -> None:
    """Switch the policy's gradient checkpointing."""
    if on:
        models.policy.enable_gradient_checkpointing()
    else:
        models.policy.disable_gradient_checkpointing()


def forward_pass(models: Models, rounds: int, peak: float) -> dict[str, Any]:
    """UNet forward passes without gradient."""
    n, name, baseline = scale_of(models).latents, "eps-model, batched", "plain, one latent a call"
    x, cond, model = models.latents(n, 1), models.prompts(n, 2), models.eps(models.reference)
    t = torch.arange(n, device=models.device)

    def plain(rows: Iterable[slice]) -> None:
        with torch.no_grad(), autocast(models.device, models.dtype):
            for row in rows:
                models.reference(x[row], t[row], cond.embeds[row])

    @torch.no_grad()
    def ours() -> None:
        model(x, t, cond)

    competitors: dict[str, Work] = {
        baseline: lambda: plain(slice(i, i + 1) for i in range(n)),
        "plain, batched": lambda: plain([slice(0, n)]),
        name: ours,
    }
    times = interleaved(competitors, rounds, models.device)
    found = compared(times, dict.fromkeys(competitors, n), baseline)
    return found | {name: with_share(found[name], flops(ours, models.device) / n, peak)}


def training_step(models: Models, study: StudyConfig, rounds: int, peak: float) -> dict[str, Any]:
    """Optimizer steps of Diffusion-DPO; ours with everything it does beside: seeded draws, checks, logged numbers."""
    name, baseline = "training loop", "plain diffusers loop"
    arm = study.arm("diffusion_dpo")
    n = arm.training.batch
    checkpoint(models, arm.training.gradient_checkpointing)
    ours = random_stepper(models, study, Ranks())
    cache, optimizer = ours.cache, ours.optimizer
    win, lose, embeds = (rows[range(len(rows))] for rows in (cache.win_mean, cache.lose_mean, cache.embeds))
    competitors: dict[str, Work] = {
        baseline: lambda: plain_training_step(models, optimizer, win, lose, embeds, arm.recipe.beta),
        name: ours.step,
    }
    times = interleaved(competitors, rounds, models.device)
    found = compared(times, dict.fromkeys(competitors, n), baseline)
    found[name] = with_share(found[name], flops(ours.step, models.device) / n, peak)
    models.policy.zero_grad(set_to_none=True)
    return found


def with_share(values: dict[str, Any], each: float, peak: float) -> dict[str, Any]:
    """Adds the FLOPs of one latent or pair, and the share of the machine's peak that they make at the measured rate."""
    return values | {"flops_each": each, "share_of_peak": each * values["per_second"] / peak}


def pairs_of(models: Models) -> dict[str, int]:
    """Competitor -> pairs it takes at a time. The reference loop, like the released script, can take but one."""
    return {REFERENCE_LOOP: 1, ONE: 1, SEVERAL: scale_of(models).pairs}


def gradient(models: Models, method: str, steps: int, name: str) -> Work:
    """What competitor `name` does for the gradient of an all-timestep method at N = steps."""
    pairs, scale = pairs_of(models)[name], scale_of(models)
    win, lose, cond = models.latents(pairs, 1), models.latents(pairs, 2), models.prompts(pairs, 3)
    policy, reference, schedule = models.eps(models.policy), models.eps(models.reference), models.schedule
    # beta 1: a saturated sigmoid would fill the gradient with denormals, which are slow.
    recipe = objectives.load_recipe(method).with_overrides({"beta": 1.0, "trajectory": {"steps": steps}})

    def work() -> None:
        models.policy.zero_grad(set_to_none=True)
        if name == REFERENCE_LOOP:
            checkpoint(models, True)
            reference_loop(recipe, models, win, lose, cond)
        else:
            checkpoint(models, scale.checkpointing)
            draws = torch.Generator().manual_seed(0)
            objectives.backward(recipe, policy, reference, win, lose, cond, schedule, draws, chunk=scale.chunk)

    return work


def all_timesteps(models: Models, method: str, steps: int, rounds: int) -> dict[str, Any]:
    """Speed of one all-timestep gradient."""
    pairs = pairs_of(models)
    times = interleaved({name: gradient(models, method, steps, name) for name in STREAMS}, rounds, models.device)
    found = compared(times, pairs, REFERENCE_LOOP)
    return {name: found[name] | {"pairs": pairs[name]} for name in STREAMS}


def peak_bytes(models: Models, method: str, steps: int, name: str) -> int | None:
    """Peak memory of one all-timestep gradient, without what the first use of any network brings in (code pages)."""
    x, t = models.latents(1, 0), torch.zeros(1, dtype=torch.int64, device=models.device)
    models.eps(models.policy)(x, t, models.prompts(1, 0)).sum().backward()
    models.policy.zero_grad(set_to_none=True)
    return peak_growth(gradient(models, method, steps, name), models.device)


def in_fresh_process(case: str, arguments: list[str]) -> int | None:
    """`peak_bytes` of the case METHOD:N:COMPETITOR. Raises InvdpoError when the process dies."""
    command = [sys.executable, __file__, *arguments, "--peak", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InvdpoError(
            f"peak memory of {case}: the measuring process ended with code {done.returncode} (its message is above; "
            "-9 means that the machine ran out of memory: leave the largest of --steps out)"
        )
    return json.loads(done.stdout.splitlines()[-1])


def two_processes(base: str, device: torch.device, pairs: int, rounds: int, sdxl: bool) -> dict[str, Any] | None:
    """Training by two processes against one, on one thread or GPU each; None where the machine has no two."""
    places = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    return scaling.measure(base, device.type, pairs, rounds, sdxl) if places >= scaling.PROCESSES else None


def study_of(base: str, device: str, scale: Scale, pairs: int) -> StudyConfig:
    """The study whose training step of so many pairs is measured; none of its files is read."""
    study = {
        "study": "benchmark",
        "base": base,
        "preferences": "random latents",
        "prompts": "none",
        "scorers": {},
        "device": device,
        "seeds": [0],
        "training": {"steps": 1000, "batch": pairs, "gradient_checkpointing": scale.checkpointing},
        "sampling": {},
        "arms": {"diffusion_dpo": {"method": "diffusion_dpo"}},
    }
    return parse_study(study, "benchmark")


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    options = report["options"]
    lines = [
        f"# Speed and memory: {report['device']}, {options['threads']} CPU threads, {report['dtype']}",
        "",
        f"Model: {options['model']}. Rates are medians of {options['rounds']} interleaved rounds, ratios medians (and",
        "ranges) of each round's ratio to the first competitor. A matrix product reaches "
        f"{report['matmul_peak_flops'] / 1e9:,.0f} GFLOP/s.",
        "",
        "| what | competitor | per second | ratio | share of peak |",
        "|---|---|--:|--:|--:|",
    ]
    for what, part in (("forward pass, latents", "forward_pass"), ("Diffusion-DPO step, pairs", "training_step")):
        for name, values in report[part].items():
            share = f"{values['share_of_peak']:.0%}" if "share_of_peak" in values else ""
            lines.append(f"| {what} | {name} | {speed(values)} | {share} |")
    each = "GPU" if report["device_type"] == "cuda" else "CPU thread"
    for name, values in (report["scaling"] or {}).items():
        lines.append(f"| {SCALING}, one {each} a process | {name} | {speed(values)} | |")
    if report["scaling"] is None:
        lines.append(f"| {SCALING} | not measured: needs two {each}s | | | |")
    lines += ["", "| method | N | competitor | pairs at a time | pairs/s | ratio | MiB above the models |"]
    lines += ["|---|--:|---|--:|--:|--:|--:|"]
    for method, by_steps in report["all_timesteps"].items():
        for steps, found in by_steps.items():
            for name, values in found.items():
                peak = values["peak_bytes"]
                memory = "out of memory" if peak is None else f"{peak / 2**20:,.1f}"
                lines.append(f"| {method} | {steps} | {name} | {values['pairs']} | {speed(values)} | {memory} |")
    return "\n".join(lines) + "\n"


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report as one table, a row a measurement, for the report of a study."""
    found: list[dict[str, Any]] = []
    for what, part in (("forward pass", "forward_pass"), ("Diffusion-DPO step", "training_step"), (SCALING, "scaling")):
        found += [{"what": what, "competitor": name} | values for name, values in (report[part] or {}).items()]
    for method, by_steps in report["all_timesteps"].items():
        for steps, competitors in by_steps.items():
            found += [{"what": method, "N": steps, "competitor": name} | row for name, row in competitors.items()]
    for row in found:
        low, high = row.pop("ratio_range", None) or (None, None)
        peak = row.pop("peak_bytes", None)
        row |= {"ratio_low": low, "ratio_high": high, "peak_mib": None if peak is None else peak / 2**20}
    return found


def speed(values: dict[str, Any]) -> str:
    """`rate | ratio (low to high)`; no ratio where the baseline did not fit."""
    rate = f"{values['per_second']:,.4g}"
    if values["ratio"] is None:
        return f"{rate} | -"
    low, high = values["ratio_range"]
    return f"{rate} | {values['ratio']:.2f} ({low:.2f} to {high:.2f})"


def main(
    base: Annotated[str, typer.Option(help="Pipeline folder of the SD1.5 family, or hub id.")] = "assets/shapes/base",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores it may use.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file. Default: results/benchmarks/<hardware>.json", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    steps: Annotated[str, typer.Option(help="Inversion steps N, comma-separated.")] = "10,20,40,80",
    sdxl: Annotated[bool, typer.Option("--sdxl-shaped", help="Random weights of SDXL's shape; CUDA only.")] = False,
    peak: Annotated[str | None, typer.Option(hidden=True, help="Print METHOD:N:COMPETITOR's peak memory.")] = None,
) -> None:
    """Measure speed and memory; write a JSON file, and its tables as markdown and csv beside it."""
    started = time.time()
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    place = resolve_device(device)
    if sdxl and place.type != "cuda":
        raise InvdpoError("--sdxl-shaped: SDXL's UNet needs a CUDA device with some 80 GB; leave the option out here")
    if peak is not None:
        method, number, name = peak.split(":")
        models = sdxl_shaped(place) if sdxl else load(base, place)
        print(json.dumps(peak_bytes(models, method, int(number), name)))
        return

    def tell(*what: object) -> None:
        print(f"[{time.time() - started:4.0f} s]", *what, file=sys.stderr, flush=True)

    # Memory first: a GPU is then all the measured process's.
    arguments = ["--base", base, "--device", device, "--threads", str(threads), *["--sdxl-shaped"] * sdxl]
    cases, peaks = list(product(METHODS, map(int, steps.split(",")))), {}
    for (method, number), name in product(cases, STREAMS):
        tell("memory:", method, f"N = {number},", name)
        peaks[method, number, name] = in_fresh_process(f"{method}:{number}:{name}", arguments)

    models = sdxl_shaped(place) if sdxl else load(base, place)
    scale, attainable = scale_of(models), matmul_peak(place, models.dtype)
    study = study_of(base, device, scale, scale.batch)
    tell("speed: forward pass")
    forward = forward_pass(models, rounds, attainable)
    tell("speed: training step")
    training = training_step(models, study, rounds, attainable)
    tell("speed: two processes")
    together = two_processes(base, place, scale.batch, rounds, sdxl)
    found: dict[str, dict[int, Any]] = {method: {} for method in METHODS}
    for method, number in cases:
        tell("speed:", method, f"N = {number}")
        rates = all_timesteps(models, method, number, rounds)
        found[method][number] = {name: rates[name] | {"peak_bytes": peaks[method, number, name]} for name in STREAMS}

    model = "random weights of SDXL's shape" if sdxl else base
    options = {"model": model, "threads": threads, "rounds": rounds, "steps": steps, "scale": asdict(scale)}
    config_hash = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    dtype = str(models.dtype).removeprefix("torch.")
    report = {
        **stamp(study, config_hash=config_hash, device=place, dtype=dtype, started=started),
        "options": options,
        "matmul_peak_flops": attainable,
        "forward_pass": forward,
        "training_step": training,
        "device_type": place.type,
        "scaling": together,
        "all_timesteps": found,
    }
    columns = ["what", "N", "competitor", "pairs", "per_second", "ratio", "ratio_low", "ratio_high", "share_of_peak"]
    table = pd.DataFrame(rows(report), columns=[*columns, "peak_mib"])
    hardware = f"{device_name(place)} {threads} threads{' sdxl shaped' * sdxl}"
    write_report(report, markdown(report), table, hardware, out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InvdpoError as error:
        sys.exit(f"error: {error}")
