"""Objectives on a world of two numbers, where everything is known: do they teach a preference, and only a true one?

Latents (B,2,1,1) come from a mixture of two Gaussians whose noise prediction is a formula: the reference. The policy
adds a small network to it. Voters like the right-hand mode better, and sampling shows how much of that was learnt.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import clean_schedule
from scipy.stats import t as student
from torch import Tensor

from invdpo.objectives import LossOutput, backward, load_recipe, preference_loss
from invdpo.preferences.labels import flips
from invdpo.preferences.order import generator
from invdpo.types import Conditioning

SCHEDULE = clean_schedule()
CENTRES = torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=torch.float64)
STD = 0.5
PAIRS = 2048
SEEDS = range(6)


def reference(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
    """E[eps | x_t] of the mixture: its components' predictions, weighted by how likely each one made x_t."""
    a = SCHEDULE.alpha_bar(t).to(x).view(-1, 1, 1)
    v = a * STD**2 + 1 - a
    apart = x.flatten(1)[:, None] - a.sqrt() * CENTRES
    share = torch.softmax(-apart.square().sum(-1, keepdim=True) / (2 * v), dim=1)
    return ((1 - a).sqrt() * (share * apart / v).sum(1)[:, None]).view_as(x)


class Policy(torch.nn.Module):
    """The reference plus a correction by one hidden layer, zero at the start."""

    def __init__(self, seed: int, width: int = 32) -> None:
        super().__init__()
        hidden = torch.randn(width, 4, generator=generator(seed, "policy"), dtype=torch.float64)
        self.hidden = torch.nn.Parameter(hidden * torch.tensor([1.0, 1.0, 3.0, 1.0]))
        self.out = torch.nn.Parameter(torch.zeros(2, width, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        time = t.to(x)[:, None] / SCHEDULE.num_train_timesteps
        features = torch.cat([x.flatten(1), time, torch.ones_like(time)], dim=1)
        return reference(x, t, cond) + (torch.tanh(features @ self.hidden.T) @ self.out.T).view_as(x)


def reward(x: Tensor) -> Tensor:
    """(B,): near 1 in the right-hand mode, near -1 in the other."""
    return torch.tanh(x[:, 0, 0, 0])


def draw(count: int, draws: torch.Generator) -> Tensor:
    """Data of the mixture itself, (count,2,1,1)."""
    mode = torch.randint(2, (count,), generator=draws)
    noise = torch.randn(count, 2, generator=draws, dtype=torch.float64)
    return (CENTRES[mode] + STD * noise).view(count, 2, 1, 1)


def vote(labels: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Winners and losers (PAIRS,2,1,1) by Bradley-Terry votes on the reward, under a label control of the study."""
    draws = generator(seed, "votes")
    first, second = draw(PAIRS, draws), draw(PAIRS, draws)
    chance = torch.sigmoid(3 * (reward(first) - reward(second)))
    chosen = torch.rand(PAIRS, generator=draws, dtype=torch.float64) < chance
    wins = (chosen ^ flips(labels, PAIRS, seed))[:, None, None, None]
    return torch.where(wins, first, second), torch.where(wins, second, first)


@torch.no_grad()
def sample(model: Any, count: int, seed: int, steps: int = 20) -> Tensor:
    x = torch.randn(count, 2, 1, 1, generator=generator(seed, "samples"), dtype=torch.float64)
    for t in SCHEDULE.timesteps(steps).flip(0).tolist():
        eps = model(x, torch.full((count,), t), None)
        x = SCHEDULE.ddim_step(x, eps, t, SCHEDULE.previous(t, steps))
    return x


@dataclass(frozen=True)
class Run:
    """A trained policy, what its last step said, and how much its samples' mean reward rose over the reference's."""

    policy: Policy
    last: LossOutput
    gain: float


def train(recipe: Any, labels: str, seed: int, steps: int, batch: int, start: float = 0.0) -> Run:
    """Adam at 0.01; start: size of a random correction that the policy starts with, of either sign."""
    policy = Policy(seed)
    with torch.no_grad():
        policy.out.add_(torch.randn(policy.out.shape, generator=generator(seed, "start"), dtype=torch.float64) * start)
    win, lose = vote(labels, seed)
    draws = generator(seed, "training")
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(PAIRS, (batch,), generator=draws)
        optimizer.zero_grad()
        last = backward(recipe, policy, reference, win[rows], lose[rows], None, SCHEDULE, draws)
        optimizer.step()
    gained = reward(sample(policy, 1000, seed)) - reward(sample(reference, 1000, seed))
    return Run(policy, last, float(gained.mean()))


def interval(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean over seeds."""
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def test_the_reference_samples_its_mixture() -> None:
    x = sample(reference, 4000, 0, steps=200).flatten(1)
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(x[:, 0].abs().mean()) == pytest.approx(1.5, abs=0.03)
    assert float(x[:, 1].std()) == pytest.approx(STD, abs=0.03)


METHODS = {
    "diffusion_dpo": ({"beta": 5.0}, 50, 64),
    "inversion_dpo_implied": ({"beta": 20.0, "trajectory": {"steps": 10}}, 40, 32),
}


@pytest.mark.parametrize("method", METHODS)
def test_true_labels_teach_the_preference_and_shuffled_ones_do_not(method: str) -> None:
    changes, steps, batch = METHODS[method]
    recipe = load_recipe(method).with_overrides(changes)
    gains = {
        labels: interval([train(recipe, labels, seed, steps, batch).gain for seed in SEEDS])
        for labels in ("true", "shuffled", "swapped")
    }
    print(method, gains)
    assert gains["true"][0] > 0.5
    assert gains["shuffled"][0] <= 0 <= gains["shuffled"][1]
    assert gains["shuffled"][1] < 0.5
    assert gains["swapped"][1] < -0.5


def test_eq_16_teaches_what_its_start_says_and_not_what_the_labels_say() -> None:
    """Even in (eps_theta - eps_ref): starts of opposite sign see one loss and end in opposite places."""
    recipe = load_recipe("inversion_dpo_paper").with_overrides({"beta": 0.3, "trajectory": {"steps": 10}})
    gains = []
    for seed in SEEDS:
        plus, minus = (train(recipe, "true", seed, 40, 32, start=sign * 0.03) for sign in (1, -1))
        torch.testing.assert_close(plus.last.loss, minus.last.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(plus.policy.out, -minus.policy.out, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(plus.policy.hidden, minus.policy.hidden, rtol=1e-6, atol=1e-9)
        assert float(plus.last.loss) < 0.6  # it did learn to tell winners from losers
        gains.append((plus.gain, minus.gain))
    print("inversion_dpo_paper", gains)
    assert interval([(plus + minus) / 2 for plus, minus in gains])[0] <= 0
    assert interval([abs(plus - minus) for plus, minus in gains])[0] > 0.2


@pytest.mark.parametrize("method", ["inversion_dpo_paper", "inversion_dpo_minus", "inversion_dpo_code"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_eq_16_cannot_leave_the_reference(method: str, chunk: int | None) -> None:
    """Loss log 2 and a gradient of exactly 0, whatever the labels, while the four-term form has a direction."""
    win, lose = (part[:32] for part in vote("true", 0))
    policy, draws = Policy(0), generator(0, "training")
    changes = {"beta": 1.0, "trajectory": {"steps": 10, "guidance_scale": 1.0}}
    recipe = load_recipe(method).with_overrides(changes)
    out = backward(recipe, policy, reference, win, lose, None, SCHEDULE, draws, chunk=chunk)
    assert float(out.loss) == pytest.approx(math.log(2), rel=1e-15)
    assert all(parameter.grad is not None and not bool(parameter.grad.any()) for parameter in policy.parameters())
    four = load_recipe("inversion_dpo_exact").with_overrides({"beta": 1.0, "trajectory": {"steps": 10}})
    preference_loss(four, policy, reference, win, lose, None, SCHEDULE, draws).loss.backward()
    assert policy.out.grad is not None and float(policy.out.grad.norm()) > 1e-3
