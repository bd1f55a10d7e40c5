"""What a study's stages spend, counted by running the stages' own code on networks that cost nothing: UNet evaluations,
network calls, and what is alive at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo.inversion.guidance import evaluations
from invdpo.inversion.trajectory import SOLVERS
from invdpo.objectives import backward, points
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
    """An eps-model with one weight. calls: how often it was called, one that a backward pass follows counting three
    times. with_graph: the latents of those."""

    def __init__(self, trained: bool = True) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(0.5), requires_grad=trained)
        self.calls = self.with_graph = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        graph = torch.is_grad_enabled() and self.weight.requires_grad
        self.calls += 3 if graph else 1
        self.with_graph += len(x) * graph
        return self.weight * x


class _Watched(_Free):
    """The same, with a look at what its graphs keep alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = Held(0, 0, 1)
        self.most = self.alive

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().__call__(x, t, cond)
        graph = _Graph(self, len(x))
        # The graph of this one product holds `graph` as long as autograd holds the graph.
        with torch.autograd.graph.saved_tensors_hooks(lambda value: (value, graph), lambda kept: kept[0]):
            return super().__call__(x, t, cond)

    def change(self, latents: int, calls: int) -> None:
        self.alive = Held(self.alive.latents + latents, self.alive.calls + calls, self.alive.gradients)
        self.most = self.most.at_least(self.alive)


class _Graph:
    """Counts the latents of a call while it lives."""

    def __init__(self, model: _Watched, latents: int) -> None:
        self.model, self.latents = model, latents
        model.change(latents, 1)

    def __del__(self) -> None:
        self.model.change(-self.latents, -1)


@dataclass(frozen=True)
class Held:
    """latents, calls: whose graph is alive at once, at most. gradients: of all trained weights, kept at once."""

    latents: int
    calls: int
    gradients: int

    def at_least(self, other: Held) -> Held:
        return Held(
            max(self.latents, other.latents), max(self.calls, other.calls), max(self.gradients, other.gradients)
        )


@dataclass(frozen=True)
class Spent:
    """evaluations: of the UNet, a forward pass of one latent counting 1 and its backward pass 2. repeated: forward
    passes that gradient checkpointing makes a second time, which no count of evaluations has. calls: of the network,
    with however many latents."""

    evaluations: float
    repeated: float
    calls: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.evaluations + other.evaluations, self.repeated + other.repeated, self.calls + other.calls)

    def times(self, factor: float) -> Spent:
        return Spent(factor * self.evaluations, factor * self.repeated, factor * self.calls)


NOTHING = Spent(0, 0, 0)


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
    known: dict[tuple[int, ...], Spent] = {}
    for step in range(1, steps + 1):
        for first in range(0, counted * size, size):
            depths = _depths(recipe, seed, step, range(first, first + size)) if drawn else ()
            if depths not in known:
                policy, reference = _Free(), _Free(trained=False)
                evals = _backward(arm, policy, reference, seed, step, first)
                known[depths] = Spent(evals, policy.with_graph, policy.calls + reference.calls)
            spent += known[depths]
    found = spent.times((passes / counted) * (settings.steps / steps))
    return found if settings.gradient_checkpointing else Spent(found.evaluations, 0, found.calls)


def _depths(recipe: Recipe, seed: int, step: int, places: range) -> tuple[int, ...]:
    """How far the pairs at these places of a step are inverted: all that what a pass spends depends on."""
    draws = _generators(seed, step, places)
    index, _ = points._draw(recipe, len(points._levels(recipe, SCHEDULE)), torch.zeros(2 * len(draws), 1), draws)
    return tuple(index[0].tolist())


def _generators(seed: int, step: int, places: range) -> list[torch.Generator]:
    """Of the noise of the pairs at these places of a step, as `training.data` makes them."""
    return [generator(seed, step, place, "noise") for place in places]


def held(arm: ArmConfig) -> Held:
    """What a process of a run holds at most, beside weights: seen in the first two backward passes of its first step,
    after which gradients are accumulated as in all others."""
    settings, policy = arm.training, _Watched()
    passes = settings.batch // settings.processes // settings.pairs_a_pass(settings.processes)
    for number in range(min(2, passes)):
        earlier: Any = policy.weight.grad

        def compare(weight: Tensor, earlier: Any = earlier) -> None:
            # Autograd adds to a gradient in place: another tensor there means that the earlier one was set aside.
            if earlier is not None and weight.grad is not earlier:
                policy.most = policy.most.at_least(Held(0, 0, 2))

        watching = policy.weight.register_post_accumulate_grad_hook(compare)
        _backward(arm, policy, _Free(trained=False), 0, 1, number * settings.pairs_a_pass(settings.processes))
        watching.remove()
    return policy.most


def _backward(arm: ArmConfig, policy: _Free, reference: _Free, seed: int, step: int, first: int) -> int:
    """One backward pass of an arm, its first pair at position `first` of the step; the UNet evaluations it took."""
    settings, recipe = arm.training, arm.recipe
    pairs = settings.pairs_a_pass(settings.processes)
    side = math.isqrt(max(1, (recipe.log_ratio.order or 1) - 1)) + 1  # latents as large as a Krylov space needs
    clean = torch.randn(pairs, 1, side, side, generator=generator(0))
    embeds = torch.zeros(pairs, 1, 1)
    cond = Conditioning(embeds, uncond=Conditioning(embeds))
    draws = _generators(seed, step, range(first, first + pairs))
    output = backward(
        recipe,
        policy,
        reference,
        clean,
        clean,
        cond,
        SCHEDULE,
        draws,
        strength=torch.ones(pairs, dtype=torch.float64),
        chunk=settings.chunk,
        reference_first=settings.reference_offload,
        final_at_once=settings.shard and settings.processes > 1,
    )
    return output.unet_evals


def drawing(arm: ArmConfig, sampling: SamplingConfig, prompts: int) -> Spent:
    """What sampling every checkpoint of one seed spends."""
    return sampled(sampling, prompts).times(len(arm.training.grid) if arm.trains else 1)


def sampled(sampling: SamplingConfig, prompts: int) -> Spent:
    """What sampling an image of each prompt spends."""
    calls = sampling.steps * math.ceil(prompts / sampling.batch)
    return Spent(unet_evaluations(prompts, sampling.steps, sampling.guidance_scale), 0, calls)


def inversion_error(settings: InversionErrorConfig) -> Spent:
    """What that experiment spends: all round trips, and those of the pictures that it shows."""
    solvers = [SOLVERS[name] for name in settings.solvers]
    calls = sum(solver.calls + solver.calls_back for solver in solvers)
    guided = sum(map(evaluations, settings.guidance_scales))
    shown = min(settings.pictures, settings.latents) * sum({min(settings.steps), max(settings.steps)})
    first = (solvers[0].calls + solvers[0].calls_back) * evaluations(settings.guidance_scales[0])
    found = settings.latents * sum(settings.steps) * calls * guided + shown * first
    return Spent(found, 0, sum(settings.steps) * calls * len(settings.guidance_scales))
