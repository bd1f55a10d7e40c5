"""Where the networks are compared, and with what: the trajectory, timesteps and target slots of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import guided, invert, invert_to
from invdpo.inversion.cache import Inverter
from invdpo.inversion.guidance import evaluations
from invdpo.inversion.trajectory import plan
from invdpo.objectives.recipe import Recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, select


@dataclass(frozen=True)
class Points:
    """K points a latent for R latents (winners, then losers), flattened to K*R with the latents varying fastest.

    x, target (K*R,C,H,W); t (K*R,) the timestep told to the networks; weight (K,R) with the average or sum over the
    grid included; calls: the slices of K*R that go through a network together. reference: eps_ref at the points, where
    a four-term log-ratio finds it already known or a loss needs it more than once.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    calls: list[slice]
    unet_evals: int
    reference: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.x)


def comparison_guidance(recipe: Recipe) -> float:
    """Guidance of the compared networks: the reference target is the inversion's own guided prediction
    (train_ddim.py:1237-1247 guides both networks); every other target is a noise, met without guidance."""
    return recipe.trajectory.guidance_scale if recipe.target == "reference" else 1.0


def as_list(generator: torch.Generator | Sequence[torch.Generator], pairs: int) -> list[torch.Generator]:
    """One generator a pair, as diffusers' pipelines take them; a single one is drawn from pair after pair."""
    generators = [generator] * pairs if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != pairs:
        raise InvdpoError(f"generator: got {len(generators)} generators for {pairs} pairs; give one, or one a pair")
    return generators


@torch.no_grad()
def make_points(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generators: list[torch.Generator],
    chunk: int | None,
    inverter: Inverter = invert,
) -> Points:
    """The points of x0 (R,C,H,W), R = B or 2B latents of the B pairs that `generators` has one entry for.

    A pair's winner and loser share their timesteps and forward noise (Diffusion-DPO train.py:1053-1055) unless
    pair_draws is `independent` (the winner's are then drawn first). All come from the pair's generator alone, first the
    timesteps and then the noise: results do not depend on micro-batching. inverter: what inverts whole trajectories of
    the reference.
    """
    rows = len(x0)
    levels = _levels(recipe, schedule)
    index, noise = _draw(recipe, len(levels), x0, generators)
    t = levels[index]
    weight = _weight(recipe, schedule, t, len(levels))
    calls = _calls(recipe, len(t), rows, chunk)
    clean = x0.repeat(len(t), *[1] * (x0.ndim - 1))
    if recipe.trajectory.kind == "forward":
        eps = noise.flatten(0, 1)
        points = Points(schedule.add_noise(clean, eps, t.flatten()), t.flatten(), eps, weight, calls, 0)
    else:
        by_policy = recipe.trajectory.model == "policy"
        model = policy if by_policy else reference
        if recipe.timesteps == "single":
            inverted = _one_point
        else:
            inverted = partial(_points_of_all, invert if by_policy else inverter)
        blocks = [
            inverted(recipe, model, x0[block], select(cond, _row(block, rows)), schedule, index[:, block])
            for block in _blocks(rows, _per_call(recipe.trajectory.guidance_scale, chunk))
        ]
        x, told, eps = (
            torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*(arrays for arrays, _ in blocks), strict=True)
        )
        # Target `step` is eps itself: its solvers step as DDIM does, and a DDIM step with the same eps undoes that.
        points = Points(x, told, eps, weight, calls, sum(evals for _, evals in blocks))
    if recipe.target == "implied":
        points = replace(points, target=schedule.implied_noise(points.x, clean, points.t))
    if recipe.target == "reference":
        target, evals = _reference_eps(recipe, reference, points, eps, cond, rows)
        return replace(points, target=target, unet_evals=points.unet_evals + evals)
    if recipe.loss.kind == "dspo" or (recipe.log_ratio.form == "four_term" and _next_step_tells(recipe)):
        known, evals = _reference_eps(recipe, reference, points, eps, cond, rows)
        return replace(points, reference=known, unet_evals=points.unet_evals + evals)
    return points


def _levels(recipe: Recipe, schedule: NoiseSchedule) -> Tensor:
    if recipe.trajectory.steps is None:
        return torch.arange(schedule.num_train_timesteps, device=schedule.alphas_cumprod.device)
    return schedule.timesteps(recipe.trajectory.steps)


def _draw(recipe: Recipe, n: int, x0: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """index (K,R) into the grid, and forward noise (K,R,C,H,W) (empty for an inversion), both on x0's device."""
    sides = len(x0) // len(generators)
    draws = sides if recipe.pair_draws == "independent" else 1
    indices: list[list[Tensor]] = [[] for _ in range(draws)]
    noises: list[list[Tensor]] = [[] for _ in range(draws)]
    for g in generators:
        for side in range(draws):
            if recipe.timesteps == "single":
                index = torch.randint(n, (1,), generator=g, device=g.device)
            elif recipe.timesteps == "subset":
                assert recipe.subset_size is not None  # the recipe is valid
                index = torch.randperm(n, generator=g, device=g.device)[: recipe.subset_size].sort().values
            else:
                index = torch.arange(n)
            indices[side].append(index.to(x0.device))
            if recipe.trajectory.kind == "forward":
                # float32 whatever the latents' type: the draw is then the same under every precision.
                shape = (len(index), *x0.shape[1:])
                noises[side].append(torch.randn(shape, generator=g, device=g.device).to(x0))
    shared_by = sides // draws
    index = torch.stack(sum(indices, []) * shared_by, dim=1)
    return index, torch.stack(sum(noises, []) * shared_by, dim=1) if noises[0] else x0[:0]


def _weight(recipe: Recipe, schedule: NoiseSchedule, t: Tensor, n: int) -> Tensor:
    """(K,R): w_t times 1/K for a mean over the grid, or n/K for a sum (unbiased when only K of n were drawn)."""
    w = (
        schedule.inverse_two_alpha_bar(t)
        if recipe.log_ratio.weight == "inverse_2alpha"
        else torch.ones_like(t, dtype=torch.float64)
    )
    return w / len(t) if recipe.log_ratio.over_timesteps == "mean" else w * (n / len(t))


def _points_of_all(
    inverter: Inverter,
    recipe: Recipe,
    model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    index: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """x, told timestep and step eps at index (K,R) of the full trajectory of x0 (R,C,H,W), and UNet evaluations."""
    spec = recipe.trajectory
    assert spec.steps is not None
    trajectory = inverter(model, x0, cond, schedule, spec.steps, spec.solver, spec.guidance_scale, spec.label)
    if recipe.log_ratio.at == "x_t":
        x, told = trajectory.latents[1:], trajectory.timesteps
    else:
        x, told = trajectory.latents[:-1], _told(recipe, schedule)
    row = torch.arange(len(x0), device=x0.device)
    return (x[index, row], told[index], trajectory.eps[index, row]), trajectory.unet_evals


def _one_point(
    recipe: Recipe,
    model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    index: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The same for one point a latent, index (1,R), without inverting any further than it."""
    spec = recipe.trajectory
    assert spec.steps is not None
    arrival = invert_to(
        model, x0, cond, schedule, index[0] + 1, spec.steps, spec.solver, spec.guidance_scale, spec.label
    )
    if recipe.log_ratio.at == "x_t":
        x, told = arrival.latents, arrival.timesteps
    else:
        x, told = arrival.previous, _told(recipe, schedule)[index[0]]
    return (x[None], told[None], arrival.eps[None]), arrival.unet_evals


def _told(recipe: Recipe, schedule: NoiseSchedule) -> Tensor:
    """(N,) the timestep that each inversion step tells the network."""
    assert recipe.trajectory.steps is not None
    told = [label for _, _, label in plan(schedule, recipe.trajectory.steps, recipe.trajectory.label)]
    return torch.tensor(told, device=schedule.alphas_cumprod.device)


def _next_step_tells(recipe: Recipe) -> bool:
    """Whether the inversion's step t+1 predicted eps_ref(x_t, t), the very value wanted at point t."""
    spec = recipe.trajectory
    return (
        spec.kind == "inversion"
        and spec.solver == "ddim"
        and spec.model == "reference"
        and spec.label == "previous"
        and spec.guidance_scale == comparison_guidance(recipe)
        and recipe.timesteps == "all"
        and recipe.log_ratio.at == "x_t"
    )


def _reference_eps(
    recipe: Recipe, reference: EpsModel, points: Points, eps: Tensor, cond: Conditioning | None, rows: int
) -> tuple[Tensor, int]:
    """eps_ref at every point, (K*R,C,H,W), and the UNet evaluations it took beyond the inversion's own eps."""
    calls, known, spec = points.calls, eps, recipe.trajectory
    told = recipe.log_ratio.at == "x_prev" and spec.model == "reference" and spec.solver == "ddim"
    if told and recipe.timesteps != "single":
        return eps, 0
    if _next_step_tells(recipe):
        # Only the last point was never seen by the reference.
        known = torch.cat([eps[rows:], eps[:rows]])
        calls = [slice(max(c.start, points.size - rows), c.stop) for c in calls if c.stop > points.size - rows]
    # A single point is predicted again, at under 1/N of the inversion's cost: rows that left its shrinking batch
    # would carry the rounding of another batch size, and the paper's objective must be exactly zero at the reference.
    guidance = comparison_guidance(recipe)
    predicted, latents = predict(guided(reference, guidance), points, calls, cond, rows, known)
    return predicted, latents * evaluations(guidance)


@torch.no_grad()
def predict(
    model: EpsModel,
    points: Points,
    calls: list[slice],
    cond: Conditioning | None,
    rows: int,
    known: Tensor | None = None,
) -> tuple[Tensor, int]:
    """What a model predicts at the points, (K*R,C,H,W), and at how many: those in `calls`, the others being `known`."""
    predicted = torch.empty_like(points.x) if known is None else known.clone()
    for call in calls:
        output = model(points.x[call], points.t[call], select(cond, _row(call, rows)))
        predicted[call] = output.to(predicted)
    return predicted, sum(call.stop - call.start for call in calls)


def _row(call: slice, rows: int) -> Tensor:
    """The latent (of R) that each flattened point in `call` belongs to."""
    return torch.arange(call.start, call.stop) % rows


def _per_call(guidance_scale: float, chunk: int | None) -> int | None:
    """Points a network call, when each call may see `chunk` latents and guidance shows it every point twice."""
    if chunk is None:
        return None
    if chunk < 1:
        raise InvdpoError(f"chunk is {chunk}: a network call needs at least 1 latent")
    return max(1, chunk // evaluations(guidance_scale))


def _blocks(n: int, size: int | None) -> list[slice]:
    return [slice(start, min(start + (size or n), n)) for start in range(0, n, size or n)]


def _calls(recipe: Recipe, k: int, rows: int, chunk: int | None) -> list[slice]:
    """How K*R points are shared out among network calls.

    With target `reference` a call holds the very latents of one inversion call: kernels round differently at another
    batch size, and Adam would turn that rounding into full-size updates where the true gradient is exactly zero.
    """
    size = _per_call(comparison_guidance(recipe), chunk)
    if recipe.target != "reference":
        return _blocks(k * rows, size)
    return [slice(i * rows + b.start, i * rows + b.stop) for i in range(k) for b in _blocks(rows, size)]
