"""Properties of every recipe and every solver, for any shape, number of steps, guidance, label and chunk.

The recipes are the files of config/methods, the solvers those that `invert` knows: a new one joins by being there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import ABAR, TIMESTEPS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from invdpo.inversion import invert
from invdpo.inversion.trajectory import SOLVERS
from invdpo.objectives import Recipe, backward, load_recipe, preference_loss
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "config" / "methods").glob("*.yaml"))
few = settings(max_examples=20, derandomize=True, deadline=None, database=None)

guidances = st.sampled_from([1.0, 0.0, 2.5])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
schedules = st.builds(
    lambda offset, to_one: NoiseSchedule(ABAR, 1.0 if to_one else float(ABAR[0]), offset, TIMESTEPS),
    st.integers(0, 1),
    st.booleans(),
)
seeds = st.integers(0, 2**31)


class Network(torch.nn.Module):
    """A smooth eps-model of any shape, without a matrix product, whose rounding would depend on the batch.

    Counts the latents that it sees, in all and with a graph.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        numbers = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.weights = torch.nn.Parameter(0.2 + 0.4 * numbers)
        self.latents = self.latents_with_gradient = 0

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        self.latents += len(x)
        self.latents_with_gradient += len(x) if torch.is_grad_enabled() and self.weights.requires_grad else 0
        own, neighbour, time, prompt = self.weights
        rolled = x.flatten(1).roll(1, dims=1).view_as(x)
        out = own * x + neighbour * rolled / (1 + rolled.square()) + time * t.to(x).view(-1, 1, 1, 1) / TIMESTEPS
        return out if cond is None else out + prompt * cond.embeds.to(x).mean(dim=(1, 2)).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Pairs:
    """B pairs and all that the objectives take with them; draws: one seed a pair."""

    win: Tensor
    lose: Tensor
    cond: Conditioning
    draws: list[int]
    strength: Tensor

    def rows(self, index: list[int]) -> Pairs:
        return Pairs(
            self.win[index],
            self.lose[index],
            self.cond.map(lambda value: value[index]),
            [self.draws[i] for i in index],
            self.strength[index],
        )

    def swapped(self) -> Pairs:
        return Pairs(self.lose, self.win, self.cond, self.draws, self.strength)

    def __call__(self, run: Any, recipe: Recipe, policy: Any, reference: Any, schedule: Any, **more: Any) -> Any:
        """`preference_loss` or `backward` on these pairs."""
        if recipe.loss.weight_by_strength:
            more["strength"] = self.strength
        generators = [torch.Generator().manual_seed(seed) for seed in self.draws]
        return run(recipe, policy, reference, self.win, self.lose, self.cond, schedule, generators, **more)


@st.composite
def pairs_of(draw: st.DrawFn) -> Pairs:
    generator = torch.Generator().manual_seed(draw(seeds))
    count, shape = draw(st.integers(1, 3)), draw(shapes)
    win, lose = torch.randn(2, count, *shape, generator=generator, dtype=torch.float64)
    embeds, empty = torch.randn(2, count, 2, 3, generator=generator, dtype=torch.float64)
    strength = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    return Pairs(win, lose, Conditioning(embeds, uncond=Conditioning(empty)), list(range(7, 7 + count)), strength)


@st.composite
def variants_of(draw: st.DrawFn, method: str) -> Recipe:
    """The recipe at a few steps and a beta that saturates nothing; inverted ones with any guidance and label."""
    recipe = load_recipe(method)
    changes: dict[str, Any] = {"beta": draw(st.floats(0.1, 2.0))}
    if recipe.trajectory.steps is not None:
        steps = draw(st.integers(1, 4))
        changes["trajectory"] = {"steps": steps}
        if recipe.subset_size is not None:
            changes["subset_size"] = min(steps, recipe.subset_size)
    if recipe.trajectory.kind == "inversion":
        changes["trajectory"] |= {
            "guidance_scale": 1.0 if recipe.log_ratio.form == "likelihood" else draw(guidances),
            "label": draw(labels_of(recipe.trajectory.solver)),
        }
    return recipe.with_overrides(changes)


def labels_of(solver: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(SOLVERS[solver].labels)


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-11)


# --- the objectives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data(), pairs=pairs_of(), schedule=schedules)
def test_a_pair_knows_nothing_of_the_others(
    method: str, data: st.DataObject, pairs: Pairs, schedule: NoiseSchedule
) -> None:
    """Permuted pairs give permuted log-ratios, and so do pairs alone: draws belong to the pair, not to its place."""
    recipe, count = data.draw(variants_of(method)), len(pairs.win)
    order = data.draw(st.permutations(range(count)))
    policy, reference = Network(1), Network(2)
    together = pairs(preference_loss, recipe, policy, reference, schedule)
    permuted = pairs.rows(order)(preference_loss, recipe, policy, reference, schedule)
    alone = [pairs.rows([i])(preference_loss, recipe, policy, reference, schedule) for i in range(count)]
    close(permuted.loss, together.loss)
    if recipe.loss.kind != "kto":  # whose zero point is a mean over the batch
        close(torch.stack([out.loss for out in alone]).mean(), together.loss)
    for name in ("logratio_win", "logratio_lose"):
        ratios = getattr(together, name)
        if ratios is not None:
            close(getattr(permuted, name), ratios[order])
            close(torch.cat([getattr(out, name) for out in alone]), ratios)


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data(), pairs=pairs_of(), schedule=schedules, chunk=st.none() | st.integers(1, 9))
def test_any_chunk_gives_the_gradient_of_the_loss_and_an_honest_count(
    method: str, data: st.DataObject, pairs: Pairs, schedule: NoiseSchedule, chunk: int | None
) -> None:
    recipe = data.draw(variants_of(method))
    policy, reference = Network(1), Network(2).requires_grad_(False)
    counted = recipe.log_ratio.form != "likelihood"  # whose products with Jacobians no network sees
    full = pairs(preference_loss, recipe, policy, reference, schedule)
    assert not counted or full.unet_evals == policy.latents + reference.latents
    full.loss.backward()
    expected, policy.weights.grad = policy.weights.grad, None
    assert expected is not None
    policy.latents = policy.latents_with_gradient = reference.latents = 0
    out = pairs(backward, recipe, policy, reference, schedule, chunk=chunk)
    forwards = policy.latents + reference.latents
    assert not counted or out.unet_evals == forwards + 2 * policy.latents_with_gradient
    close(policy.weights.grad, expected)
    close(out.loss, full.loss)
    close(out.logratio_win, full.logratio_win)


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data(), pairs=pairs_of(), schedule=schedules)
def test_the_reference_itself_has_no_log_ratio(
    method: str, data: st.DataObject, pairs: Pairs, schedule: NoiseSchedule
) -> None:
    """theta = theta_ref: log-ratios are exactly 0 and a DPO loss is log 2. Without a reference, it has no say."""
    # Labels rounded for the reference alone would make the two networks differ, as that recipe wants it.
    recipe = data.draw(variants_of(method)).with_overrides({"reference_label_dtype": "float32"})
    out = pairs(preference_loss, recipe, Network(1), Network(1), schedule)
    if recipe.log_ratio.form == "denoising":
        other = pairs(preference_loss, recipe, Network(1), Network(2), schedule)
        assert recipe.trajectory.kind == "inversion" or torch.equal(out.loss, other.loss)
    else:
        assert not bool(torch.cat([out.logratio_win, out.logratio_lose]).any())
        if recipe.loss.kind == "dpo" and recipe.loss.margin == 0:
            assert out.loss.item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data(), pairs=pairs_of(), schedule=schedules)
def test_exchanging_winner_and_loser_exchanges_the_log_ratios(
    method: str, data: st.DataObject, pairs: Pairs, schedule: NoiseSchedule
) -> None:
    """So their difference changes its sign; and exchanging twice, in the pairs and in the recipe, changes nothing."""
    recipe = data.draw(variants_of(method))
    policy, reference = Network(1), Network(2)
    there = pairs(preference_loss, recipe, policy, reference, schedule)
    back = pairs.swapped()(preference_loss, recipe, policy, reference, schedule)
    if recipe.loss.kind == "winner_only":
        assert there.logratio_lose is None and back.logratio_lose is None
        return
    if recipe.pair_draws == "independent":
        twice = Pairs(pairs.win, pairs.win, pairs.cond, pairs.draws, pairs.strength)
        out = twice(preference_loss, recipe, policy, reference, schedule)
        assert not bool((out.logratio_win == out.logratio_lose).any()), "winner and loser share their draws"
        return
    close(there.logratio_win, back.logratio_lose)
    close(there.logratio_lose, back.logratio_win)
    reversed_recipe = recipe.with_overrides({"loss": {"reversed": not recipe.loss.reversed}})
    close(pairs.swapped()(preference_loss, reversed_recipe, policy, reference, schedule).loss, there.loss)


# --- inversion and the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@few
@given(pairs=pairs_of(), steps=st.integers(1, 6), scale=guidances, data=st.data(), schedule=schedules)
def test_n_steps_give_n_plus_1_latents_and_an_honest_count(
    solver: str, pairs: Pairs, steps: int, scale: float, data: st.DataObject, schedule: NoiseSchedule
) -> None:
    model, label = Network(1), data.draw(labels_of(solver))
    found = invert(model, pairs.win, pairs.cond, schedule, steps, solver, scale, label)
    assert found.latents.shape == (steps + 1, *pairs.win.shape) and found.eps.shape == (steps, *pairs.win.shape)
    assert torch.equal(found.latents[0], pairs.win)
    assert torch.equal(found.timesteps, schedule.timesteps(steps))
    assert found.unet_evals == model.latents
    assert not found.latents.requires_grad


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@few
@given(pairs=pairs_of(), steps=st.integers(1, 6), scale=guidances, data=st.data(), schedule=schedules)
def test_without_noise_an_inversion_only_scales(
    solver: str, pairs: Pairs, steps: int, scale: float, data: st.DataObject, schedule: NoiseSchedule
) -> None:
    """eps = 0: x_t = sqrt(abar_t / abar_0) x_0 at every level."""
    label = data.draw(labels_of(solver))
    found = invert(lambda x, t, cond: torch.zeros_like(x), pairs.win, pairs.cond, schedule, steps, solver, scale, label)
    clean = schedule.final_alpha_cumprod
    # A grid that starts at timestep 0 starts on the level that some schedules call clean.
    factors = torch.stack([(ABAR[t] / clean).sqrt() for t in found.timesteps.tolist()])
    close(found.latents[1:], factors.view(-1, 1, 1, 1, 1) * pairs.win)


@few
@given(pairs=pairs_of(), schedule=schedules, data=st.data())
def test_the_noise_that_was_added_is_the_noise_implied(
    pairs: Pairs, schedule: NoiseSchedule, data: st.DataObject
) -> None:
    x0, noise = pairs.win, pairs.lose
    count = len(x0)
    levels = st.integers(0, TIMESTEPS - 1)
    t = data.draw(levels | st.lists(levels, min_size=count, max_size=count).map(torch.tensor))
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.implied_noise(x_t, x0, t), noise, rtol=1e-9, atol=1e-12)
    each = ABAR[torch.as_tensor(t)].expand(count).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, each.sqrt() * x0 + (1 - each).sqrt() * noise, rtol=1e-12, atol=1e-12)


@few
@given(pairs=pairs_of(), schedule=schedules, steps=st.integers(1, 50), data=st.data())
def test_a_step_down_undoes_a_step_up(pairs: Pairs, schedule: NoiseSchedule, steps: int, data: st.DataObject) -> None:
    x, eps = pairs.win, pairs.lose
    t = data.draw(st.sampled_from(schedule.timesteps(steps).tolist()))
    t_prev = schedule.previous(t, steps)
    there = schedule.ddim_inverse_step(x, eps, t_prev, t)
    torch.testing.assert_close(schedule.ddim_step(there, eps, t, t_prev), x, rtol=1e-9, atol=1e-9)
