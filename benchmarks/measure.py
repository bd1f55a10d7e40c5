"""Stopwatch, memory gauge and FLOP counter, and the files of a benchmark."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from invdpo.files import replace_when_done
from invdpo.provenance import write_json

Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Wall time of one call; infinite where it does not fit the GPU, which is a result too."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    try:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return math.inf
    return time.perf_counter() - began


def interleaved(competitors: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, all of them taking turns, after one round that is not counted."""
    table = [{name: seconds(work, device) for name, work in competitors.items()} for _ in range(rounds + 1)]
    return {name: [row[name] for row in table[1:]] for name in competitors}


def compared(times: Mapping[str, list[float]], amount: Mapping[str, int], baseline: str) -> dict[str, Any]:
    """Of each competitor the median rate (amount a second, 0: did not fit), and the median and range over the rounds of
    its rate over the baseline's in the same round (None where the baseline did not fit)."""
    rates = {name: [amount[name] / t for t in taken] for name, taken in times.items()}
    found: dict[str, Any] = {}
    for name, rate in rates.items():
        ratios = [own / other for own, other in zip(rate, rates[baseline], strict=True) if other]
        found[name] = {
            "per_second": statistics.median(rate),
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_range": [min(ratios), max(ratios)] if ratios else None,
        }
    return found


def flops(work: Work, device: torch.device) -> int:
    """Floating-point operations of the matrix products and convolutions in one call."""
    # The counter has no formula for the CPU's fused attention, so there it runs as plain products meanwhile.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, plain:
        work()
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a large square matrix product in ten tries."""
    size, products = (8192, 20) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def work() -> None:
        for _ in range(products):
            torch.mm(a, b)

    return 2 * size**3 * products / min(seconds(work, device) for _ in range(10))


def peak_growth(work: Work, device: torch.device) -> int | None:
    """Bytes by which one call raises the peak over what is held before it; None where it does not fit the GPU.

    On the CPU the resident high-water mark, which proc(5)'s clear_refs sets back to the present. Not ru_maxrss: a
    process inherits that from its parent. Call it in a fresh process, whose allocator has no freed memory to reuse.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fits = seconds(work, device) < math.inf
        return torch.cuda.max_memory_allocated(device) - before if fits else None
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[0])


def write_report(report: dict[str, Any], text: str, table: pd.DataFrame, hardware: str, out: Path | None) -> None:
    """Write a report as JSON to `out` (default: results/benchmarks/, named after the hardware), its text as markdown
    and its table as csv beside it, and print the text."""
    out = out or Path("results/benchmarks", "-".join(re.findall("[a-z0-9]+", hardware.lower())) + ".json")
    write_json(out, report)
    with replace_when_done(out.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replace_when_done(out.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g", lineterminator="\n")
    print(f"{text}\nwritten to {out}, and as a table to {out.with_suffix('.md')} and .csv")
