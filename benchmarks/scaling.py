"""Two processes that train together against one, as `training.ranks` runs them: started by bench.py once a process.

Both take as many pairs a step each as the one does alone. Apart, without a sum of gradients, they show what the machine
itself costs them (shared memory, caches, cores).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from loops import Models, load, sdxl_shaped
from measure import compared, interleaved

from invdpo.device import resolve_device
from invdpo.preferences.cache import PreferenceCache
from invdpo.training.loop import Run, Stepper
from invdpo.training.optim import build_optimizer
from invdpo.training.ranks import Ranks, join, launch
from invdpo.training.state import Progress

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

PROCESSES, STEPS = 2, 3  # of a competitor's turn
ALONE, APART, TOGETHER = "one process", "two processes, apart", "two processes, together"


def random_stepper(models: Models, study: StudyConfig, ranks: Ranks) -> Stepper:
    """Steps of the study's Diffusion-DPO on random latents, as many as a batch."""
    arm = study.arm("diffusion_dpo")
    n = arm.training.batch
    win, lose, cond = models.latents(n, 1), models.latents(n, 2), models.prompts(n, 3)
    assert cond.uncond is not None
    still, rows = torch.zeros_like(win), torch.arange(n, device=models.device)
    cache = PreferenceCache(win, still, lose, still, cond.embeds, cond.uncond.embeds[:1], rows, "random latents")
    optimizer = build_optimizer(models.policy.parameters(), arm.training, arm.learning_rate)
    run = Run(study, arm, 0, models.device, ranks)
    base = models.reference
    return Stepper(run, models.policy, base, base, optimizer, models.schedule, cache, models.dtype, Progress())


def measure(base: str, device: str, pairs: int, rounds: int, sdxl: bool) -> dict[str, Any]:
    """Of each competitor the pairs a second, all its processes together, and the ratio to one process."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        options = ["--base", base, "--device", device, "--pairs", str(pairs), "--rounds", str(rounds)]
        launch(PROCESSES, [sys.executable, __file__, *options, *["--sdxl-shaped"] * sdxl, "--out", str(found)])
        return json.loads(found.read_text(encoding="utf-8"))


def main(
    out: Annotated[Path, typer.Option()],
    base: Annotated[str, typer.Option()],
    device: Annotated[str, typer.Option()],
    pairs: Annotated[int, typer.Option()],
    rounds: Annotated[int, typer.Option()],
    sdxl: Annotated[bool, typer.Option("--sdxl-shaped")] = False,
) -> None:
    """One of the processes."""
    from bench import scale_of, study_of

    torch.set_num_threads(1)
    ranks, place = join(resolve_device(device))
    models = sdxl_shaped(place) if sdxl else load(base, place)
    scale = scale_of(models)
    if scale.checkpointing:
        models.policy.enable_gradient_checkpointing()
    own = random_stepper(models, study_of(base, device, scale, pairs), Ranks())
    shared = random_stepper(models, study_of(base, device, scale, pairs * ranks.size), ranks)

    def steps(stepper: Stepper) -> None:
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
        out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
