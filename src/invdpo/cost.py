"""UNet evaluations of a study's stages, counted by running the stages' own code on networks that cost nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invdpo.inversion.guidance import evaluations
from invdpo.inversion.trajectory import SOLVERS
from invdpo.objectives import backward
from invdpo.preferences.order import generator
from invdpo.sampling import unet_evaluations
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from invdpo.config import ArmConfig, InversionErrorConfig, SamplingConfig
    from invdpo.objectives import Recipe

# Where a recipe draws how far it inverts, this many pairs of a run are drawn as the run draws them; the mean over more
# than that is within 2 % (the standard error of a thousand uniform draws).
PAIRS_DRAWN = 1024
# An explicit schedule: the number of evaluations does not depend on its numbers.
SCHEDULE = NoiseSchedule(torch.linspace(0.9991, 0.0047, 1000, dtype=torch.float64), 0.9991, 1, 1000)


class _Free:
    """An eps-model with one weight. with_graph: latents that it has seen in passes that a backward pass follows."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.with_graph = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        self.with_graph += len(x) * torch.is_grad_enabled()
        return self.weight * x


@dataclass(frozen=True)
class Spent:
    """evaluations: of the UNet, a forward pass of one latent counting 1 and its backward pass 2. repeated: forward
    passes that gradient checkpointing makes a second time, which no count of evaluations has."""

    evaluations: float
    repeated: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.evaluations + other.evaluations, self.repeated + other.repeated)

    def times(self, factor: float) -> Spent:
        return Spent(factor * self.evaluations, factor * self.repeated)


NOTHING = Spent(0, 0)


def runs(arm: ArmConfig, seeds: Sequence[int]) -> Spent:
    """What the runs of all seeds spend: each by its own draws where all of them are drawn, else as the first."""
    if _draws(arm.recipe) and arm.training.steps * arm.training.batch <= PAIRS_DRAWN:
        return sum((training(arm, seed) for seed in seeds), NOTHING)
    return training(arm, seeds[0]).times(len(seeds))


def _draws(recipe: Recipe) -> bool:
    """Whether how far an inversion goes is drawn."""
    return recipe.trajectory.kind == "inversion" and recipe.timesteps == "single"


def training(arm: ArmConfig, seed: int) -> Spent:
    """What a run spends. The evaluations are those that its run.json will have: exact where they depend on no draw or
    the run is short, and else the mean of the run's first steps, on to its last one.

    Steps that fp16 makes again after an overflow are not counted; a study's trajectories are as if none were kept.
    """
    settings, recipe = arm.training, arm.recipe
    size = settings.pairs_a_pass(settings.processes)
    passes = settings.batch // size
    drawn = _draws(recipe)
    steps = min(settings.steps, max(1, PAIRS_DRAWN // settings.batch)) if drawn else 1
    counted = min(passes, max(1, PAIRS_DRAWN // size)) if drawn else 1
    spent = NOTHING
    for step in range(1, steps + 1):
        for first in range(counted):
            spent += _backward(recipe, size, settings.chunk, seed, step, first * size, settings.reference_offload)
    found = spent.times((passes / counted) * (settings.steps / steps))
    return found if settings.gradient_checkpointing else Spent(found.evaluations, 0)


def _backward(recipe: Recipe, pairs: int, chunk: int | None, seed: int, step: int, first: int, offload: bool) -> Spent:
    """One backward pass of `pairs` pairs, the first of them at position `first` of the step."""
    side = math.isqrt(max(1, (recipe.log_ratio.order or 1) - 1)) + 1  # latents as large as a Krylov space needs
    clean = torch.randn(pairs, 1, side, side, generator=generator(0))
    embeds = torch.zeros(pairs, 1, 1)
    cond = Conditioning(embeds, uncond=Conditioning(embeds))
    draws = [generator(seed, step, place, "noise") for place in range(first, first + pairs)]
    strength = torch.ones(pairs, dtype=torch.float64)
    policy = _Free()
    output = backward(
        recipe,
        policy,
        _Free(),
        clean,
        clean,
        cond,
        SCHEDULE,
        draws,
        strength=strength,
        chunk=chunk,
        reference_first=offload,
    )
    return Spent(output.unet_evals, policy.with_graph)


def drawing(arm: ArmConfig, sampling: SamplingConfig, prompts: int) -> int:
    """UNet evaluations of sampling every checkpoint of one seed."""
    checkpoints = len(arm.training.grid) if arm.trains else 1
    return unet_evaluations(checkpoints * prompts, sampling.steps, sampling.guidance_scale)


def inversion_error(settings: InversionErrorConfig) -> int:
    """UNet evaluations of that experiment: all round trips, and those of the pictures that it shows."""
    solvers = [SOLVERS[name] for name in settings.solvers]
    calls = sum(solver.calls + solver.calls_back for solver in solvers)
    guided = sum(map(evaluations, settings.guidance_scales))
    shown = min(settings.pictures, settings.latents) * sum({min(settings.steps), max(settings.steps)})
    first = (solvers[0].calls + solvers[0].calls_back) * evaluations(settings.guidance_scales[0])
    return settings.latents * sum(settings.steps) * calls * guided + shown * first
