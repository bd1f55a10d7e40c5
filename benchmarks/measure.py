"""Stopwatch, memory gauge and FLOP counter, and the files of a benchmark."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done

Work = Callable[[], object]
Result = TypeVar("Result")


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
        return time.perf_counter() - began
    except torch.OutOfMemoryError:
        pass  # the exception still holds what had been computed
    torch.cuda.empty_cache()
    return math.inf


def interleaved(
    competitors: Mapping[str, Work], rounds: int, device: torch.device, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, all of them taking turns, after one round that warms up.

    No round begins when `limit` seconds have passed; the first one then counts where it is the only one. What did not
    fit the GPU once is not tried again.
    """
    began = time.perf_counter()
    table: list[dict[str, float]] = []
    while not table or (len(table) <= rounds and time.perf_counter() - began < limit):
        fits = {name: not table or table[-1][name] < math.inf for name in competitors}
        table.append({name: seconds(work, device) if fits[name] else math.inf for name, work in competitors.items()})
    return {name: [row[name] for row in table[1:] or table] for name in competitors}


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


class Gauge:
    """A work that notes, at each turn on a GPU, by how many bytes it raised the peak over what was held before it, and
    the peak itself. `growth` and `total` are the largest of all turns; None where no turn fitted."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device
        self.growth: int | None = None
        self.total: int | None = None

    def __call__(self) -> object:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        found = self._work()
        peak = torch.cuda.max_memory_allocated(self._device)
        self.growth, self.total = max(self.growth or 0, peak - before), max(self.total or 0, peak)
        return found


def resident_growth(work: Work) -> int:
    """The same growth on the CPU: of the resident high-water mark, which proc(5)'s clear_refs sets back to the present.

    Not ru_maxrss: a process inherits that from its parent. Call it in a fresh process, whose allocator has no freed
    memory to reuse.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[0])


class FreshProcess:
    """Runs functions each in a process of its own, forked from one that has only imported some slow modules."""

    def __init__(self, *modules: str) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function of an importable module returns. Raises InvdpoError when the process dies."""
        with ProcessPoolExecutor(1, self._context) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool as error:
                what = f"{function.__name__}({', '.join(map(str, arguments))})"
                raise InvdpoError(f"The process of {what} was killed: most likely memory ran out.") from error


def report_path(hardware: str, out: Path | None) -> Path:
    """`out`, or a JSON file under results/benchmarks/ named after the hardware."""
    return out or Path("results/benchmarks", "-".join(re.findall("[a-z0-9]+", hardware.lower())) + ".json")


def write_files(report: Mapping[str, Any], text: str, table: pd.DataFrame, path: Path) -> None:
    """Write a report as JSON, and its text as markdown and its table as csv beside it.

    The JSON keeps the report's own order: the first competitor is what ratios are to.
    """
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    with replace_when_done(path.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replace_when_done(path.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g", lineterminator="\n")


def write_report(report: Mapping[str, Any], text: str, table: pd.DataFrame, hardware: str, out: Path | None) -> None:
    """`write_files` at `report_path`, and the text printed."""
    path = report_path(hardware, out)
    write_files(report, text, table, path)
    print(f"{text}\nwritten to {path}, and as a table to {path.with_suffix('.md')} and .csv")
