"""Every number that README.md prints outside its verdict table comes from an artifact or is no measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from invdpo.config import load_study
from invdpo.evidence.ledger import Verdict, read_verdicts
from invdpo.evidence.publish import BEGIN, END

REFERENCE = Path("results/reference")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d(?:[\d,.]*\d)?")

# What no run decides: names, sections, dates, and what a level of confidence is.
NAMES = [
    r"ACM MM 2025, arXiv:2507\.11554",
    r"Eqs?\. \d+",
    r"Tables? (?:\d|S\d)(?:(?:, | and )(?:\d|S\d+))*",
    r"Figures? (?:\d|S\d)(?:(?:, | and )(?:\d|S\d+))*",
    r"the 95 % interval",
    r"paper's 20/40/80 inversion steps",
    r"instead of 20, 40 or 80",
    r"with N = 80, the released",
    r"SDXL's shape at 1024 pixels",
]


def prose() -> str:
    """README on one line without the verdict table, code, links' targets."""
    text = Path("README.md").read_text(encoding="utf-8")
    begin, end = (mark.format(study="shapes") for mark in (BEGIN, END))
    text = text.split(begin)[0] + text.split(end)[1]
    for pattern in (r"(?s)```.*?```", r"`[^`]*`", r"(?<=\])\([^)]*\)", r"\[[\w/.-]+\](?=\W)"):
        text = re.sub(pattern, "", text)
    return " ".join(text.split())


def row(claim: str, variant: str = "") -> Verdict:
    (found,) = [
        entry
        for entry in read_verdicts(REFERENCE / "shapes/claims.json")
        if (entry.id, entry.variant) == (claim, variant)
    ]
    return found


def whole(claim: str, variant: str = "") -> Callable[[], list[float]]:
    """A row's value with its interval."""

    def values() -> list[float]:
        found = row(claim, variant)
        assert found.value is not None and found.low is not None and found.high is not None
        return [found.value, found.low, found.high]

    return values


def value(claim: str, variant: str = "", scale: float = 1) -> Callable[[], list[float]]:
    return lambda: [scale * (row(claim, variant).value or 0.0)]


def batches(*arms: str) -> Callable[[], list[float]]:
    """Pairs a step of arms of the default study."""
    return lambda: [float(load_study("config/shapes.yaml").arm(arm).training.batch) for arm in arms]


def lost_by_the_other_sign() -> list[float]:
    (found,) = [
        entry
        for entry in read_verdicts(REFERENCE / "shapes_methods/claims.json")
        if (entry.id, entry.variant) == ("methods_above_base", "inversion_dpo_minus_rounded")
    ]
    assert found.value is not None and found.low is not None and found.high is not None
    return [-found.value, -found.high, -found.low]


def cost_of_a_step() -> list[float]:
    """The least and the most UNet evaluations of a step, but for SFT, q_single and other numbers of inversion steps."""
    runs = [json.loads(path.read_text()) for path in (REFERENCE / "shapes/runs").glob("*/seed*/run.json")]
    cheap = ("base", "sft", "q_single")
    steps = [
        run["unet_evals"] / run["steps"]
        for run in runs
        if run["arm"] not in cheap and not re.search(r"_n\d+$", run["arm"])
    ]
    return [min(steps), max(steps)]


def moved_by_rounding() -> list[float]:
    """Eq. 16's true minus shuffled labels in the run before this one, on another processor, and in this one."""
    before = re.search(r"from \+(0\.\d+) to \+0\.\d+", Path("docs/history.md").read_text(encoding="utf-8"))
    assert before is not None
    return [float(before[1]), row("labels_matter", PAPER).value or 0.0]


def benchmark(case: str, *wanted: tuple[str, str]) -> Callable[[], list[float]]:
    """Numbers of a case of the benchmark, each of a competitor; bytes in MiB."""

    def values() -> list[float]:
        found = json.loads((REFERENCE / "benchmarks/cpu-2-threads.json").read_text())["cases"][case]["competitors"]
        return [found[name][key] / (2**20 if key.endswith("_bytes") else 1) for name, key in wanted]

    return values


IMPLIED, PAPER, CODE = "inversion_dpo_implied", "inversion_dpo_paper", "inversion_dpo_code"
INTERVAL = r"([-+\d.]+) \[([-+\d.]+), ([-+\d.]+)\]"

# sentence -> the values of its numbers, in order
FACTS: dict[str, Callable[[], list[float]]] = {
    r"three training seeds and (\d+) prompts": lambda: [float(row("dpo_above_base").prompts)],
    r"gradient at the reference is exactly (\d+)\.": value("zero_gradient_at_the_reference", PAPER),
    rf"alike within the intervals \({INTERVAL}\)": whole("labels_matter", PAPER),
    r"its own falls \(rank correlation ([-\d.]+)\)": value("eq16_rises_with_the_truth", PAPER),
    r"moved that first number from ([\d.]+) to ([\d.]+)": moved_by_rounding,
    rf"neither PickScore \({INTERVAL}\)": whole("p_above_q_pickscore", "p_single_as_q"),
    rf"true minus shuffled labels {INTERVAL}": whole("labels_matter", CODE),
    r"the weights move ([\d.]+) % as far": value("released_learning_rate_moves_the_weights", CODE, 100),
    r"true labels are worth ([\d.]+) of utility": value("labels_matter", IMPLIED),
    rf"not told from it on the utility \({INTERVAL}\)": whole("primary_above_diffusion_dpo", IMPLIED),
    r"a training pair costs ([\d.]+) times": value("double_inference_costs_more", IMPLIED),
    r"A step of theirs sees (\d+) or (\d+) pairs, one of Diffusion-DPO (\d+)": batches(
        IMPLIED, "p_single", "diffusion_dpo"
    ),
    r"gains ([\d.]+) of utility from": value("more_inversion_steps_primary", IMPLIED),
    r"from N = (\d+) to N = (\d+)": lambda: list(
        reversed(row("more_inversion_steps_primary", IMPLIED).test["inversion_steps"])
    ),
    rf"the chosen point lowers it by {INTERVAL}": lost_by_the_other_sign,
    r"(\d+) pairs for Diffusion-DPO, (\d+) for one point of an inversion, (\d+) where all": batches(
        "diffusion_dpo", "p_single", IMPLIED
    ),
    r"fall again after step (\d+)": lambda: [
        float(found[1])
        for found in [re.search(r"at its best at step (\d+)", row("p_above_q_pickscore", "p_single").reason)]
        if found
    ],
    r"([\d,]+) to ([\d,]+) UNet evaluations": cost_of_a_step,
    r"inversion takes (\d+), (\d+) or (\d+) steps": lambda: sorted(
        load_study("config/shapes.yaml").experiments.inversion_steps["p_single"]
    ),
    r"takes (\d+) MiB above the models in place of (\d+) in its own loop, at ([\d.]+) times the speed, "
    r"at ([\d.]+) times with three pairs": benchmark(
        "inversion_dpo_code_n80",
        ("streamed, one pair", "peak_bytes"),
        ("reference loop", "peak_bytes"),
        ("streamed, one pair", "ratio"),
        ("streamed, several pairs", "ratio"),
    ),
    r"embeddings is ([\d.]+) times as fast": benchmark("caching", ("cached", "ratio")),
    r"the stock pipeline \(([\d.]+) times,": benchmark("sampling", ("our sampler", "ratio")),
    r"([\d.]+) times with decoding": benchmark("sampling_decoded", ("our sampler", "ratio")),
    r"a plain diffusers loop \(([\d.]+) times\)": benchmark("training", ("training loop", "ratio")),
    r"two processes train ([\d.]+) times": benchmark("scaling", ("two processes, together", "ratio")),
    r"(\d+) simulated raters at once and ([\d,]+) votes": lambda: [
        float(json.loads((REFERENCE / "benchmarks/user-study-2-cores.json").read_text())["runs"]["as it is"][name])
        for name in ("raters", "acknowledged")
    ],
}


def printed_as(text: str, measured: float) -> bool:
    """Whether a number in print is that value to the decimals that are printed."""
    plain = text.replace(",", "")
    digits = len(plain.partition(".")[2])
    return abs(float(plain) - measured) <= 0.5 * 10.0**-digits * (1 + 1e-9)


def test_every_number_comes_from_an_artifact() -> None:
    text = prose()
    covered: list[tuple[int, int]] = []
    for pattern, measure in FACTS.items():
        found = list(re.finditer(pattern, text))
        assert len(found) == 1, f"README has {len(found)} sentences like: {pattern}"
        numbers, values = found[0].groups(), measure()
        assert len(numbers) == len(values), pattern
        for printed, measured in zip(numbers, values, strict=True):
            assert printed_as(printed, measured), f"README prints {printed}, the artifact has {measured}: {pattern}"
        covered.append(found[0].span())
    covered += [found.span() for pattern in NAMES for found in re.finditer(pattern, text)]
    loose = [
        text[max(0, found.start() - 40) : found.end() + 30]
        for found in NUMBER.finditer(text)
        if not any(start <= found.start() and found.end() <= end for start, end in covered)
    ]
    assert not loose, f"numbers without an artifact: {loose}"
