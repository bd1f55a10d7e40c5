"""What the study's arithmetic must satisfy if it is right: each check raises AssertionError where it does not.

The model is a Gaussian N(m, s^2) in every element of a latent, m given by the prompt. Its noise prediction is affine,

    eps(x, t) = g(t) x - h(t) m,   g = sqrt(1 - a) / v,   h = sqrt(a (1 - a)) / v,   v = a s^2 + 1 - a,   a = abar_t,

so trajectories, log-ratios, gradients and densities are formulas, written out here from nothing but the table of abar.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from invdpo.objectives import load_recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

TIMESTEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, 0)  # of Stable Diffusion
STD = 0.5
SHAPE = (2, 2, 1)
SIZE = math.prod(SHAPE)
N = 5
BETA = 3.0


@dataclass(frozen=True)
class Pieces:
    """The implementation under check, looked up when a check is about to run.

    stepper(base, cache) -> (policy UNet, what makes one optimizer step a call); `base` is the model that must not move.
    """

    schedule: NoiseSchedule
    invert: Callable[..., Any]
    preference_loss: Callable[..., Any]
    backward: Callable[..., Any]
    sample: Callable[..., Tensor]
    read_pairs: Callable[..., Any]
    stepper: Callable[..., tuple[torch.nn.Module, Callable[[], dict[str, Any]]]]
    folder: Path


# --- the Gaussian ------------------------------------------------------------------------------------------------


def clean_schedule() -> NoiseSchedule:
    """The schedule of Stable Diffusion 1.5: grids start at timestep 1, the clean level is that of timestep 0."""
    return NoiseSchedule(ABAR, float(ABAR[0]), 1, TIMESTEPS)


def abar(level: int) -> float:
    return float(ABAR[max(level, 0)])


def variance(a: float, std: float = STD) -> float:
    return a * std**2 + 1 - a


def g(t: int, std: float = STD) -> float:
    return math.sqrt(1 - abar(t)) / variance(abar(t), std)


def h(t: int, std: float = STD) -> float:
    return math.sqrt(abar(t)) * g(t, std)


class Gaussian(torch.nn.Module):
    """The exact noise prediction of N(gain * prompt + shift, std^2). Keeps the timesteps that it was told."""

    def __init__(self, gain: float = 1.0, std: float = STD) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
        self.gain, self.std = gain, std
        self.told: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.told += t.tolist()
        a = ABAR.to(x)[t][:, None, None, None]
        mean = self.gain * cond.embeds.mean(dim=(1, 2))[:, None, None, None].to(x) + self.shift.to(x)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * self.std**2 + 1 - a)


@dataclass(frozen=True)
class Step:
    """One inversion step of the reference on x0: inputs at level t_prev, told `told`, to x at level t."""

    x_prev: Tensor
    told: int
    eps: Tensor
    x: Tensor
    t: int


def ladder(x0: Tensor, mean: Tensor, n: int, label: str, first: int) -> list[Step]:
    """The DDIM inversion of x0 (B,C,H,W) under N(mean, s^2), every coefficient a plain number."""
    steps, x = [], x0
    for i in range(n):
        t = first + i * (TIMESTEPS // n)
        t_prev = t - TIMESTEPS // n
        told = t if label == "next" else max(t_prev, 0)
        eps = g(told) * x - h(told) * mean
        a, b = abar(t_prev), abar(t)
        steps.append(Step(x, told, eps, math.sqrt(b / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - b) * eps, t))
        x = steps[-1].x
    return steps


def pairs(count: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    """Winners and losers (B,C,H,W), and prompts whose mean embedding is the Gaussian's mean; "" has mean 0."""
    generator = torch.Generator().manual_seed(3)
    win, lose = 0.3 + STD * torch.randn(2, count, *SHAPE, generator=generator, dtype=torch.float64)
    embeds = torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)
    return win, lose, Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))


def means(cond: Conditioning) -> Tensor:
    return cond.embeds.mean(dim=(1, 2))[:, None, None, None]


def generators(count: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(50 + i) for i in range(count)]


def recipe(method: str) -> Any:
    """The study's own recipe, at N steps (where it has a grid) and a beta that saturates nothing."""
    found = load_recipe(method)
    return found.with_overrides({"beta": BETA} | ({"trajectory": {"steps": N}} if found.trajectory.steps else {}))


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), expected.detach(), rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}"
    )


# --- the checks --------------------------------------------------------------------------------------------------


def inversion_is_the_recursion(pieces: Pieces) -> None:
    """Latents, eps and timesteps of an inversion, for both labels, with and without guidance (which moves the mean)."""
    x0, _, cond = pairs()
    for label in ("next", "previous"):
        for scale in (1.0, 3.0):
            found = pieces.invert(Gaussian(), x0, cond, pieces.schedule, steps=N, guidance_scale=scale, label=label)
            steps = ladder(x0, scale * means(cond), N, label, 1)
            where = f"inversion, label {label}, guidance {scale:g}"
            close(found.latents, torch.stack([x0, *(step.x for step in steps)]), f"{where}, latents")
            close(found.eps, torch.stack([step.eps for step in steps]), f"{where}, eps")
            assert found.timesteps.tolist() == [step.t for step in steps], where


def inversion_approaches_the_flow(pieces: Pieces) -> None:
    """The deterministic flow of a Gaussian keeps the standardised value (x - sqrt(a) m) / sqrt(v), at every level."""
    x0, _, cond = pairs()
    found = pieces.invert(Gaussian(), x0, cond, pieces.schedule, steps=250, label="previous")
    levels = [0, *found.timesteps.tolist()]
    standardised = [
        (x - math.sqrt(abar(t)) * means(cond)) / math.sqrt(variance(abar(t)))
        for x, t in zip(found.latents, levels, strict=True)
    ]
    drift = max(float((value - standardised[0]).abs().max()) for value in standardised)
    assert drift < 0.05, f"the inverted Gaussian leaves its flow by {drift:.3g} standard deviations"


def sampling_is_the_recursion(pieces: Pieces) -> None:
    """DDIM sampling of a Gaussian with guidance, from noise to the clean level."""
    _, _, cond = pairs()
    found = pieces.sample(Gaussian().float(), cond, pieces.schedule, N, 2.0, generators(), SHAPE)
    x = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators()]).double()
    for i in reversed(range(N)):
        t = 1 + i * (TIMESTEPS // N)
        a, b = abar(t), abar(t - TIMESTEPS // N)
        eps = g(t) * x - h(t) * 2 * means(cond)
        x = math.sqrt(b / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - b) * eps
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


def log_ratios_are_the_formulas(pieces: Pieces) -> None:
    """Every recipe on inverted points, between two Gaussians that differ in mean and width; and the loss from them."""
    win, lose, cond = pairs()
    gain, std = 1.4, 0.8
    for method in INVERTED:
        spec = recipe(method)
        scale = spec.trajectory.guidance_scale
        policy, reference = Gaussian(gain, std), Gaussian()
        out = pieces.preference_loss(spec, policy, reference, win, lose, cond, pieces.schedule, generators())
        expected = []
        for x0 in (win, lose):
            first = 0 if method == "inversion_dpo_code" else 1
            steps = ladder(x0, scale * means(cond), N, spec.trajectory.label, first)
            expected.append(INVERTED[method](steps, x0, scale * means(cond), scale * gain * means(cond), std))
        close(out.logratio_win, expected[0], f"{method}, log-ratio of the winner")
        close(out.logratio_lose, expected[1], f"{method}, log-ratio of the loser")
        loss = torch.nn.functional.softplus(-BETA * (expected[0] - expected[1])).mean()
        close(out.loss, loss, f"{method}, loss")


def one_log_ratio_is_the_formula(pieces: Pieces) -> None:
    """The same for the recipe that stops each pair's inversion at one point, drawn for winner and loser together."""
    win, lose, cond = pairs()
    gain, std = 1.4, 0.8
    policy = Gaussian(gain, std)
    out = pieces.preference_loss(recipe("p_single"), policy, Gaussian(), win, lose, cond, pieces.schedule, generators())
    t = policy.told
    assert len(t) == 6 and t[:3] == t[3:], f"p_single: a pair must share its timestep, got {t}"
    for found, x0 in ((out.logratio_win, win), (out.logratio_lose, lose)):
        points = {step.t: step for step in ladder(x0, means(cond), N, "next", 1)}
        assert points.keys() >= set(t), f"p_single: {t} are not on the grid {sorted(points)}"
        each = [implied([points[level]], x0, means(cond), gain * means(cond), std) for level in t[:3]]
        close(found, torch.stack(each).diagonal(), "p_single, log-ratio")


def implied(steps: list[Step], x0: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    total = torch.zeros(len(x0), dtype=torch.float64)
    for step in steps:
        noise = (step.x - math.sqrt(abar(step.t)) * x0) / math.sqrt(1 - abar(step.t))
        total += four_terms(step.x, step.t, noise, ours, theirs, std) / (2 * SIZE * len(steps))
    return total


def exact(steps: list[Step], x0: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    return sum((four_terms(step.x, step.t, step.eps, ours, theirs, std) for step in steps), torch.zeros(len(x0)))


def four_terms(x: Tensor, t: int, target: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    policy, reference = g(t, std) * x - h(t, std) * theirs, g(t) * x - h(t) * ours
    return (reference - target).square().flatten(1).sum(1) - (policy - target).square().flatten(1).sum(1)


def paper(steps: list[Step], x0: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    return sum((apart(step.x, step.t, ours, theirs, std) for step in steps), torch.zeros(len(x0)))


def minus(steps: list[Step], x0: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    return -paper(steps, x0, ours, theirs, std)


def code(steps: list[Step], x0: Tensor, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    weighted = (apart(step.x_prev, step.told, ours, theirs, std) / (2 * abar(step.t)) for step in steps)
    return sum(weighted, torch.zeros(len(x0))) / (2 * SIZE * len(steps))


def apart(x: Tensor, t: int, ours: Tensor, theirs: Tensor, std: float) -> Tensor:
    return ((g(t, std) - g(t)) * x - h(t, std) * theirs + h(t) * ours).square().flatten(1).sum(1)


INVERTED = {
    "inversion_dpo_implied": implied,
    "inversion_dpo_exact": exact,
    "inversion_dpo_paper": paper,
    "inversion_dpo_minus": minus,
    "inversion_dpo_code": code,
}


def forward_gradient_is_the_formula(pieces: Pieces) -> None:
    """At the reference a pair's shared noise cancels: d loss / d mean = -(beta / 2D) h(t)^2 (winner - loser)."""
    win, lose, cond = pairs()
    for method in ("diffusion_dpo", "q_single"):
        policy = Gaussian()
        pieces.backward(recipe(method), policy, Gaussian(), win, lose, cond, pieces.schedule, generators())
        t = policy.told
        assert len(t) == 6 and t[:3] == t[3:], f"{method}: a pair must share its timestep, got {t}"
        squares = torch.tensor([h(level) ** 2 for level in t[:3]], dtype=torch.float64)[:, None, None, None]
        assert policy.shift.grad is not None
        close(policy.shift.grad, -BETA / (2 * SIZE) * (squares * (win - lose)).mean(0), f"{method}, gradient")


def inverted_gradient_is_the_formula(pieces: Pieces) -> None:
    """The same on inverted points, for the whole graph and call by call, for several pairs and for one alone."""
    for count in (1, 3):
        win, lose, cond = pairs(count)
        pull = []
        for x0 in (win, lose):
            steps = ladder(x0, means(cond), N, "next", 1)
            noises = [(step.x - math.sqrt(abar(step.t)) * x0) / math.sqrt(1 - abar(step.t)) for step in steps]
            pull.append(
                sum(
                    h(step.t) * (g(step.t) * step.x - h(step.t) * means(cond) - noise)
                    for step, noise in zip(steps, noises, strict=True)
                )
                / (N * SIZE)
            )
        expected = -BETA / 2 * (pull[0] - pull[1]).mean(0)
        for chunk in (None, 1, 4):
            policy = Gaussian()
            pieces.backward(
                recipe("inversion_dpo_implied"),
                policy,
                Gaussian(),
                win,
                lose,
                cond,
                pieces.schedule,
                generators(count),
                chunk=chunk,
            )
            assert policy.shift.grad is not None
            close(policy.shift.grad, expected, f"gradient of {count} pairs, chunk {chunk}")


def descent_makes_the_winner_likelier(pieces: Pieces) -> None:
    """One step of gradient descent raises log p(winner) - log p(loser) of the policy's own density, pair by pair."""
    for method in ("diffusion_dpo", "q_single", "p_single", "inversion_dpo_implied"):
        for pair in range(3):
            one = slice(pair, pair + 1)
            win, lose, cond = pairs()
            win, lose, cond = win[one], lose[one], cond.map(lambda value, one=one: value[one])
            policy = Gaussian()
            pieces.backward(recipe(method), policy, Gaussian(), win, lose, cond, pieces.schedule, generators(1))
            assert policy.shift.grad is not None
            before = log_density_ratio(win, lose, means(cond))
            after = log_density_ratio(win, lose, means(cond) - 0.01 * policy.shift.grad)
            assert after > before, f"{method}, pair {pair}: log p(winner) - log p(loser) fell by {before - after:.3g}"


def log_density_ratio(win: Tensor, lose: Tensor, mean: Tensor) -> float:
    return float(((lose - mean).square() - (win - mean).square()).sum()) / (2 * STD**2)


def two_terms_vanish_at_the_reference(pieces: Pieces) -> None:
    """Eq. 16 compares two networks at one point with one guidance: equal networks give zero, and no gradient."""
    win, lose, cond = pairs()
    for method in ("inversion_dpo_paper", "inversion_dpo_minus", "inversion_dpo_code"):
        policy = Gaussian()
        out = pieces.backward(recipe(method), policy, Gaussian(), win, lose, cond, pieces.schedule, generators())
        assert policy.shift.grad is not None
        moved = (out.logratio_win, out.logratio_lose, policy.shift.grad)
        assert not any(bool(value.any()) for value in moved), f"{method}: at the reference {moved}"


def the_vote_decides_the_winner(pieces: Pieces) -> None:
    """Winner first, whichever image the vote chose, and no ties."""
    red, blue = (png(colour) for colour in ((255, 0, 0), (0, 0, 255)))
    frame = pd.DataFrame(
        {
            "jpg_0": [red, red, red],
            "jpg_1": [blue, blue, blue],
            "label_0": [1.0, 0.0, 0.5],
            "label_1": [0.0, 1.0, 0.5],
            "caption": ["left", "right", "tie"],
        }
    )
    frame.to_parquet(pieces.folder / "votes.parquet")
    found = pieces.read_pairs(pieces.folder / "votes.parquet")
    colours = [(pair.caption, pair.winner_image.getpixel((0, 0)), pair.loser_image.getpixel((0, 0))) for pair in found]
    assert colours == [("left", (255, 0, 0), (0, 0, 255)), ("right", (0, 0, 255), (255, 0, 0))], colours


def png(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stream, "PNG")
    return stream.getvalue()


def training_leaves_the_reference_alone(pieces: Pieces) -> None:
    """Steps move the policy, and not one bit of the reference."""
    base = tiny_unet()
    before = copy.deepcopy(base.state_dict())
    policy, step = pieces.stepper(base)
    rows = [step() for _ in range(2)]
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items()), "the reference moved"
    assert any(not torch.equal(before[key], value) for key, value in policy.state_dict().items()), "the policy did not"
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6, f"the first loss is {rows[0]['loss']}, not log 2"


def training_prefers_the_winners(pieces: Pieces) -> None:
    """Trained on winners of 1 and losers of -1, the policy denoises winners better than the base, more than losers."""
    base = tiny_unet()
    before = copy.deepcopy(base)
    policy, step = pieces.stepper(base)
    for _ in range(6):
        step()
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(12, *LATENT, generator=generator)
    t = torch.arange(50, 1000, 80)
    root, rest = (value.float()[:, None, None, None] for value in (ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()))
    gains = []
    with torch.no_grad():
        for x0 in (1.0, -1.0):
            errors = [
                (unet(root * x0 + rest * noise, t, encoder_hidden_states=torch.zeros(12, *TOKENS)).sample - noise)
                .square()
                .mean()
                for unet in (before, policy)
            ]
            gains.append(float(errors[0] - errors[1]))
    assert gains[0] > gains[1], f"the denoising error fell by {gains[0]:.3g} on winners, by {gains[1]:.3g} on losers"


LATENT, TOKENS = (2, 4, 4), (3, 8)


def tiny_unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=LATENT[-1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=TOKENS[-1],
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


CHECKS = [
    inversion_is_the_recursion,
    inversion_approaches_the_flow,
    sampling_is_the_recursion,
    log_ratios_are_the_formulas,
    one_log_ratio_is_the_formula,
    forward_gradient_is_the_formula,
    inverted_gradient_is_the_formula,
    descent_makes_the_winner_likelier,
    two_terms_vanish_at_the_reference,
    the_vote_decides_the_winner,
    training_leaves_the_reference_alone,
    training_prefers_the_winners,
]
