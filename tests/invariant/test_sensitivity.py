"""The study's checks pass on the study's code, and every bug that is planted in it fails at least one of them.

Without this, green tests could mean that nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from checks import CHECKS, Pieces

from invdpo import inversion, objectives
from invdpo.config import parse_study
from invdpo.inversion import guidance, trajectory
from invdpo.objectives import loss, pair_losses, points, streaming
from invdpo.preferences import reader
from invdpo.preferences.cache import PreferenceCache
from invdpo.sampling import ddim
from invdpo.schedule import NoiseSchedule
from invdpo.training import loop, optim

CPU = torch.device("cpu")
STUDY = {
    "study": "checks",
    "base": "none",
    "preferences": "none.parquet",
    "prompts": "none.txt",
    "scorers": {},
    "device": "cpu",
    "precision": "fp32",
    "seeds": [0],
    "training": {"steps": 8, "batch": 4, "learning_rate": 1.0e-3, "beta": 50.0},
    "sampling": {},
    "arms": {"dpo": {"method": "diffusion_dpo"}},
}


def stepper(base: Any) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
    """The policy and the optimizer step of a run on four pairs, winners 1 and losers -1, as `loop.Run` sets it up."""
    study = parse_study(STUDY, "checks")
    arm = study.arm("dpo")
    ones = torch.ones(4, *checks.LATENT)
    tokens = torch.zeros(1, *checks.TOKENS)
    index = torch.zeros(4, dtype=torch.int64)
    cache = PreferenceCache(ones, 0 * ones, -ones, 0 * ones, tokens, tokens, index, key="checks")
    policy = loop.initial_policy(base, None)
    reference = loop.frozen_reference(base, arm.recipe.reference_dtype, CPU)
    optimizer = optim.build_optimizer(policy.parameters(), arm.training, arm.learning_rate)
    run = loop.Run(study, arm, 0, CPU)
    made = loop.Stepper(
        run,
        policy,
        reference,
        base,
        optimizer,
        checks.clean_schedule(),
        cache,
        torch.float32,
        loop.state.Progress(),
    )
    return policy, made.step


def pieces(folder: Path) -> Pieces:
    """The implementation as it is now, planted bugs included."""
    return Pieces(
        schedule=checks.clean_schedule(),
        invert=inversion.invert,
        preference_loss=objectives.preference_loss,
        backward=objectives.backward,
        sample=ddim.sample,
        read_pairs=lambda path: list(reader.read_pairs([path], reader.Counts())),
        stepper=stepper,
        folder=folder,
    )


# --- the bugs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """A function `name` of every `place` (modules or classes) replaced by wrong(the right one).

    check: the one that is there for this bug; others may notice it, too.
    """

    check: Callable[[Pieces], None]
    name: str
    places: tuple[Any, ...]
    wrong: Callable[[Callable[..., Any]], Callable[..., Any]]

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for place in self.places:
            monkeypatch.setattr(place, self.name, self.wrong(getattr(place, self.name)))


def exchanged(values: torch.Tensor) -> torch.Tensor:
    """Winners and losers, (S,R) with the winners first, in each other's place."""
    return torch.cat(values.chunk(2, dim=1)[::-1], dim=1)


def change_points(check: Callable[[Pieces], None], change: Callable[[points.Points, int], points.Points]) -> Bug:
    """Points changed after they were made; the second argument is R."""

    def wrong(right: Callable[..., points.Points]) -> Callable[..., points.Points]:
        def make(*args: Any) -> points.Points:
            return change(right(*args), len(args[3]))

        return make

    return Bug(check, "make_points", (loss,), wrong)


def per_point(values: torch.Tensor, rows: int, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`change` applied to (K,R,…), given and returned as (K*R,…)."""
    return change(values.unflatten(0, (-1, rows))).flatten(0, 1)


def rows_exchanged(values: torch.Tensor, rows: int) -> torch.Tensor:
    return per_point(values, rows, lambda value: value.roll(rows // 2, dims=1))


def swapped_pair(right: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any) -> Any:
        for pair in right(*args):
            yield replace(
                pair,
                winner=pair.loser,
                loser=pair.winner,
                winner_image=pair.loser_image,
                loser_image=pair.winner_image,
            )

    return read


def swapped_batch(right: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any) -> Any:
        batch = right(*args)
        return replace(batch, x0_win=batch.x0_lose, x0_lose=batch.x0_win)

    return draw


def earlier_eps(right: Callable[..., Any]) -> Callable[..., Any]:
    def invert(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return replace(found, eps=found.eps.roll(1, dims=0))

    return invert


def earlier_point(right: Callable[..., Any]) -> Callable[..., Any]:
    def invert_to(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return replace(found, latents=found.previous)

    return invert_to


def moving_reference(right: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: loop.Stepper, *args: Any) -> None:
        right(self, *args)
        for ours, theirs in zip(self.parameters, self.base_parameters, strict=True):
            theirs.copy_(ours.detach())

    return update


def told(right: Callable[..., Any], change: Callable[[int, int], int]) -> Callable[..., Any]:
    """`plan` with its third entry, the timestep told, made of (level before, told)."""

    def plan(schedule: NoiseSchedule, steps: int, label: str) -> list[tuple[int, int, int]]:
        return [(t_prev, t, change(t_prev, told)) for t_prev, t, told in right(schedule, steps, label)]

    return plan


def told_one_more(right: Callable[..., Any]) -> Callable[..., Any]:
    def guided(eps_model: Any, scale: float) -> Any:
        model = right(eps_model, scale)
        return lambda x, t, cond: model(x, t + 1, cond)

    return guided


BUGS = {
    "labels swapped: the loser of the vote comes first": Bug(
        checks.the_vote_decides_the_winner, "read_pairs", (reader,), swapped_pair
    ),
    "labels swapped: the true labels are flipped": Bug(
        checks.training_prefers_the_winners, "flips", (loop,), lambda f: lambda *a: ~f(*a)
    ),
    "labels swapped: a batch's winners are its losers": Bug(
        checks.training_prefers_the_winners, "draw", (loop,), swapped_batch
    ),
    "trajectories exchanged: points and targets": change_points(
        checks.descent_makes_the_winner_likelier,
        lambda p, rows: replace(p, x=rows_exchanged(p.x, rows), target=rows_exchanged(p.target, rows)),
    ),
    "trajectories exchanged: points alone": change_points(
        checks.log_ratios_are_the_formulas, lambda p, rows: replace(p, x=rows_exchanged(p.x, rows))
    ),
    "trajectories exchanged: the log-ratios": Bug(
        checks.descent_makes_the_winner_likelier, "measure", (loss, streaming), lambda f: lambda *a: exchanged(f(*a))
    ),
    "target one step off: the eps of the step before": Bug(
        checks.log_ratios_are_the_formulas,
        "_points_of_all",
        (points,),
        lambda f: lambda inverter, *a: f(earlier_eps(inverter), *a),
    ),
    "target one step off: that of the point before": change_points(
        checks.inverted_gradient_is_the_formula,
        lambda p, rows: replace(p, target=per_point(p.target, rows, lambda value: value.roll(1, dims=0))),
    ),
    "target one step off: implied at the timestep before": Bug(
        checks.inverted_gradient_is_the_formula,
        "implied_noise",
        (NoiseSchedule,),
        lambda f: lambda self, x, x0, t: f(self, x, x0, t - 1),
    ),
    "target one step off: a single point is the one before": Bug(
        checks.one_log_ratio_is_the_formula, "invert_to", (points,), earlier_point
    ),
    "abar of the wrong level: everywhere one timestep late": Bug(
        checks.inversion_is_the_recursion, "alpha_bar", (NoiseSchedule,), lambda f: lambda self, t: f(self, t + 1)
    ),
    "abar of the wrong level: a step starts one timestep early": Bug(
        checks.inversion_approaches_the_flow,
        "previous",
        (NoiseSchedule,),
        lambda f: lambda self, t, n: f(self, t, n) - 1,
    ),
    "abar of the wrong level: noise is added one timestep early": Bug(
        checks.forward_gradient_is_the_formula,
        "add_noise",
        (NoiseSchedule,),
        lambda f: lambda self, x0, noise, t: f(self, x0, noise, t - 1),
    ),
    "abar of the wrong level: the weight of another timestep": Bug(
        checks.log_ratios_are_the_formulas,
        "inverse_two_alpha_bar",
        (NoiseSchedule,),
        lambda f: lambda self, t: f(self, t - 1),
    ),
    "beta with the wrong sign": Bug(
        checks.descent_makes_the_winner_likelier,
        "dpo",
        (pair_losses,),
        lambda f: lambda difference, *rest: f(-difference, *rest),
    ),
    "reference not frozen: it follows the policy": Bug(
        checks.training_leaves_the_reference_alone, "_update", (loop.Stepper,), moving_reference
    ),
    "reference not frozen: it is the policy": Bug(
        checks.forward_gradient_is_the_formula,
        "prepare",
        (loss, streaming),
        lambda f: lambda recipe, policy, reference, *rest: f(recipe, policy, policy, *rest),
    ),
    "guidance on one side: the compared policy has none": Bug(
        checks.two_terms_vanish_at_the_reference, "comparison_guidance", (loss,), lambda f: lambda recipe: 1.0
    ),
    "guidance on one side: the inversion has none": Bug(
        checks.log_ratios_are_the_formulas, "guided", (trajectory,), lambda f: lambda model, scale: model
    ),
    "guidance on one side: both halves see the prompt": Bug(
        checks.inversion_is_the_recursion, "concatenate", (guidance,), lambda f: lambda uncond, cond: f(cond, cond)
    ),
    "label off by one: every step tells the next timestep": Bug(
        checks.inversion_is_the_recursion, "plan", (trajectory, points), lambda f: told(f, lambda _, t: t + 1)
    ),
    "label off by one step: the level before, whatever is asked": Bug(
        checks.inversion_is_the_recursion,
        "plan",
        (trajectory, points),
        lambda f: told(f, lambda t_prev, _: max(t_prev, 0)),
    ),
    "label off by one: at the compared points": change_points(
        checks.log_ratios_are_the_formulas, lambda p, rows: replace(p, t=p.t - 1)
    ),
    "label off by one: in the sampler": Bug(checks.sampling_is_the_recursion, "guided", (ddim,), told_one_more),
}


def failures(folder: Path) -> dict[str, str]:
    """The checks that fail on the implementation as it is now, and what they say."""
    found = {}
    for check in CHECKS:
        try:
            check(pieces(folder))
        except AssertionError as error:
            found[check.__name__] = str(error)
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_study_passes(check: Callable[[Pieces], None], tmp_path: Path) -> None:
    check(pieces(tmp_path))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(
    bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    BUGS[bug].plant(monkeypatch)
    caught = failures(tmp_path)
    record_property("caught_by", sorted(caught))
    print(f"{bug}: caught by {', '.join(caught) or 'nothing'}")
    assert BUGS[bug].check.__name__ in caught, f"noticed only by {sorted(caught)}"


def test_no_check_is_idle() -> None:
    """With the test above: every check catches a bug."""
    assert {bug.check for bug in BUGS.values()} == set(CHECKS)
