"""A report's own numbers against what was asked of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cases import METHODS, ONE
from scaling import PROCESSES, TOGETHER

STEPS, GPU_BYTES, SHARE, EFFICIENCY = 80, 80e9, 0.5, 0.9
MET, MISSED, OPEN = "met", "missed", "not measured here"


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each goal what is wanted and what was measured (bytes, or a share; None: nothing), its range where it has
    one, and the verdict: met, missed, or not measured here."""
    return [memory(report), rate(report), efficiency(report)]


def memory(report: Mapping[str, Any]) -> dict[str, Any]:
    """The larger of both methods', all that torch holds; a GPU that is sold as one of 80 GB has some 85e9 bytes, which
    leaves CUDA its own part. What does not fit a smaller GPU says nothing."""
    sizes = [row.get("total_bytes") for row in steps_of(report)]
    full, measured = None in sizes, max((size for size in sizes if size is not None), default=None)
    if full:
        verdict = MISSED if report["device_memory_bytes"] >= GPU_BYTES else OPEN
    else:
        verdict = OPEN if measured is None else verdict_of(measured <= GPU_BYTES)
    goal = f"Inversion-DPO's step at N = {STEPS} fits one GPU of 80 GB, in all"
    return {"goal": goal, "at_most": GPU_BYTES, "measured": None if full else measured, "verdict": verdict}


def rate(report: Mapping[str, Any]) -> dict[str, Any]:
    """The smaller of both methods', of what is computed."""
    shares = [row.get("hardware_share_of_peak") or None for row in steps_of(report)]  # 0: it did not fit
    known = bool(shares) and None not in shares and report["dtype"] == "bfloat16"
    measured = min(share for share in shares if share is not None) if known else None
    return {
        "goal": f"Inversion-DPO's step at N = {STEPS} computes at the rate of a large matrix product in bf16",
        "at_least": SHARE,
        "measured": measured,
        "verdict": OPEN if measured is None else verdict_of(measured >= SHARE),
    }


def efficiency(report: Mapping[str, Any]) -> dict[str, Any]:
    """What two processes train a second over twice what one does, by the rounds' median; on a CPU a thread each."""
    row = report["cases"].get("scaling", {"competitors": {}})["competitors"].get(TOGETHER, {"ratio": None})
    known = row["ratio"] is not None
    measured = row["ratio"] / PROCESSES if known else None
    found = {"goal": f"scaling efficiency of {PROCESSES} processes", "at_least": EFFICIENCY, "measured": measured}
    if known:
        found["range"] = [ratio / PROCESSES for ratio in row["ratio_range"]]
    return found | {"verdict": OPEN if measured is None else verdict_of(measured >= EFFICIENCY)}


def steps_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of both methods at N = 80 and SDXL's size on a GPU; none where one of them was not measured."""
    if report["device_type"] != "cuda" or not report["options"]["scale"].get("paper", False):
        return []
    cases = [report["cases"].get(f"{method}_n{STEPS}") for method in METHODS]
    if None in cases:
        return []
    return [case["competitors"].get(ONE, {"total_bytes": None}) for case in cases]


def verdict_of(met: bool) -> str:
    return MET if met else MISSED


def table(known: Sequence[Mapping[str, Any]]) -> list[str]:
    """`goals` as lines of markdown."""
    lines = ["Goals, from the medians above:", "", "| goal | wanted | measured | |", "|---|--:|--:|---|"]
    for found in known:
        wanted = [f"{words} {amount(found[key])}" for key, words in LIMITS.items() if key in found]
        measured = "" if found["measured"] is None else amount(found["measured"])
        if "range" in found:
            measured += " ({} to {})".format(*map(amount, found["range"]))
        lines.append(f"| {found['goal']} | {wanted[0]} | {measured} | {found['verdict']} |")
    return lines


LIMITS = {"at_most": "at most", "at_least": "at least"}


def amount(value: float) -> str:
    """GB, or percent."""
    return f"{value / 1e9:.1f} GB" if value > 1e6 else f"{value:.1%}"
