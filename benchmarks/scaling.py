"""Two processes that train together against one, as `training.ranks` runs them: started by bench.py once a process.

Both take as many pairs a step each as the one does alone. Apart, without a sum of gradients, they show what the machine
itself costs them (shared memory, caches, cores).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cases import optimizer_of, random_cache, scale_of, stepper_of, study_of
from measure import compared, interleaved
from models import Models, load, sdxl_shaped

from invdpo.device import memory_for, resolve_device
from invdpo.errors import InvdpoError
from invdpo.lease import lease
from invdpo.training.loop import Stepper
from invdpo.training.ranks import Ranks, join, launch

PROCESSES, STEPS = 2, 3  # of a competitor's turn
TITLE = "Diffusion-DPO step by processes, pairs"
REMEDIES = ("larger GPUs", "a smaller --base")
ALONE, APART, TOGETHER = "one process", "two processes, apart", "two processes, together"


def measure(base: str, device: str, rounds: int, sdxl: bool) -> dict[str, Any]:
    """Of each competitor the pairs a second, all its processes together, and the ratio to one process.

    Raises InvdpoError when a process dies; the other is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        options = ["--base", base, "--device", device, "--rounds", str(rounds)]
        launch(PROCESSES, [sys.executable, __file__, *options, *["--sdxl-shaped"] * sdxl, "--out", str(found)])
        return json.loads(found.read_text(encoding="utf-8"))


def steppers(models: Models, ranks: Ranks) -> tuple[Stepper, Stepper]:
    """Steps of this process alone and of all together, as many pairs a process, by one optimizer of one policy."""
    pairs = scale_of(models).batch
    cache, optimizer = random_cache(models, ranks.size * pairs), optimizer_of(models)
    alone, shared = (study_of(models, "diffusion_dpo", size * pairs) for size in (1, ranks.size))
    return stepper_of(models, alone, cache, optimizer), stepper_of(models, shared, cache, optimizer, ranks)


def main(
    out: Annotated[Path, typer.Option()],
    base: Annotated[str, typer.Option()],
    device: Annotated[str, typer.Option()],
    rounds: Annotated[int, typer.Option()],
    sdxl: Annotated[bool, typer.Option("--sdxl-shaped")] = False,
) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    lease(device, PROCESSES)  # bench.py's own, which is kept if it dies first
    ranks, place = join(resolve_device(device))
    with memory_for("the models and the optimizer", REMEDIES):
        models = sdxl_shaped(place) if sdxl else load(base, place)
        pairs = scale_of(models).batch
        own, shared = steppers(models, ranks)

    def steps(stepper: Stepper) -> None:
        # Not as a result, as elsewhere: the other process waits for this one's part of the sum.
        with memory_for("a step", REMEDIES):
            for _ in range(STEPS):
                stepper.step()

    def alone() -> None:
        ranks.wait()
        if ranks.writes:
            steps(own)

    def apart() -> None:
        ranks.wait()
        steps(own)
        ranks.wait()

    def together() -> None:
        ranks.wait()
        steps(shared)

    times = interleaved({ALONE: alone, APART: apart, TOGETHER: together}, rounds, place)
    both = ranks.size * STEPS * pairs
    if ranks.writes:
        found = compared(times, {ALONE: STEPS * pairs, APART: both, TOGETHER: both}, ALONE)
        for name, processes in ((ALONE, 1), (APART, ranks.size), (TOGETHER, ranks.size)):
            found[name] |= {"at_a_time": processes * pairs, "rounds": len(times[name])}
        out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InvdpoError as error:
        sys.exit(f"error: {error}")
