"""Recipes and their gradients, against formulas written out here by hand on tiny models with float64 arithmetic."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml

from invdpo.backbones import pipeline
from invdpo.errors import InvdpoError
from invdpo.inversion import invert
from invdpo.objectives import backward, load_recipe, make_recipe, preference_loss
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "config" / "methods").glob("*.yaml"))
INVERTED = [
    "inversion_dpo_paper",
    "inversion_dpo_minus",
    "inversion_dpo_code",
    "inversion_dpo_implied",
    "inversion_dpo_exact",
]
WRITTEN_OUT = [*INVERTED, "diffusion_dpo", "p_single", "q_single", "sft"]  # the others are in test_recipes.py
PAIRED = [method for method in METHODS if method != "sft"]
SHARED = [method for method in PAIRED if method != "diffusion_kto"]
# The other's values and gradients are in test_likelihood_dpo.py: they take products with Jacobians, which no network
# sees.
SURROGATES = [method for method in METHODS if method != "likelihood_dpo"]
SHAPE = (2, 3, 3)
N = 6

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, 0)
SCHEDULE = NoiseSchedule(ABAR, float(ABAR[0]), 1, 1000)


class Linear(torch.nn.Module):
    """eps = A x + b t/1000 + c mean(embeds), elementwise b; counts the latents it sees, forward and with gradient."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        size = math.prod(SHAPE)
        self.a = torch.nn.Parameter(
            0.5 * torch.eye(size, dtype=dtype) + 0.05 * torch.randn(size, size, generator=g).to(dtype)
        )
        self.b = torch.nn.Parameter(0.3 * torch.randn(size, generator=g).to(dtype))
        self.c = torch.nn.Parameter(torch.tensor(0.2, dtype=dtype))
        self.latents = self.latents_with_gradient = self.widest = 0

    def forward(self, x, t, cond=None):
        self.latents += len(x)
        self.latents_with_gradient += len(x) if torch.is_grad_enabled() and self.a.requires_grad else 0
        self.widest = max(self.widest, len(x))
        # Not a matrix product: its rounding would depend on a latent's place in the batch.
        out = (x.flatten(1)[:, None] * self.a).sum(-1) + self.b * (t.to(x)[:, None] / 1000)
        if cond is not None:
            out = out + self.c * cond.embeds.to(x).mean(dim=(1, 2))[:, None]
        return out.view_as(x)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters()])


def small(method, **more):
    """The method's recipe at N = 6 (where it has a grid) and a beta at which the sigmoid is not saturated."""
    recipe = load_recipe(method)
    changes = {"beta": 0.05 if recipe.log_ratio.reduction == "sum" else 2.0}
    if recipe.loss.kind == "dspo":
        changes["beta"] = 0.5  # at 2 its gradient at the reference vanishes
    if recipe.loss.kind == "mapo":
        changes["loss"] = {"margin_scale": 3.0}
    if recipe.trajectory.steps is not None:
        changes["trajectory"] = {"steps": N}
    return recipe.with_overrides(changes).with_overrides(more)


def networks(dtype=torch.float64):
    return Linear(1, dtype), Linear(2, dtype).requires_grad_(False)


def batch(pairs=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    win, lose = torch.randn(2, pairs, *SHAPE, generator=g).to(dtype)
    embeds = torch.randn(pairs, 2, 4, generator=g).to(dtype)
    cond = Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))
    return win, lose, cond


def strengths(pairs=3):
    """What smpo needs, and no other recipe looks at."""
    return torch.tensor([0.8, -0.3, 0.5, 1.0, 0.1, 0.2, 0.9, -0.6])[:pairs]


def generators(pairs=3):
    return [torch.Generator().manual_seed(100 + i) for i in range(pairs)]


# --- the objectives written out, one pair and one latent at a time -----------------------------------------------


def abar(t):
    return ABAR[max(t, 0)]


def hand_loss(method, policy, reference, win, lose, cond):
    """-log sigmoid(beta (L(win) - L(lose))) with each method's log-ratio L spelled out on its own."""
    losses = [
        hand_pair_loss(
            method,
            policy,
            reference,
            win[i : i + 1],
            lose[i : i + 1],
            cond.embeds[i : i + 1],
            generators()[i],
        )
        for i in range(len(win))
    ]
    return torch.stack(losses).mean()


def hand_pair_loss(method, policy, reference, win, lose, c, g):
    recipe = small(method)
    offset = 0 if method == "inversion_dpo_code" else 1
    grid = [offset + i * (1000 // N) for i in range(N)]
    u = torch.zeros_like(c)

    def eps(net, x, t, c=c):
        return net(x, torch.tensor([t]), Conditioning(c))

    def cfg(net, x, t):
        return eps(net, x, t, u) + 2 * (eps(net, x, t, c) - eps(net, x, t, u))

    def up(x, e, t_prev, t):  # Eq. 9
        a, b = abar(t_prev), abar(t)
        return (b / a).sqrt() * x + ((1 - b).sqrt() - (b / a - b).sqrt()) * e

    def trajectory(x0, told, net=eps):
        """[(x_{t-1}, told, eps, x_t, t)] by the reference."""
        x, steps = x0, []
        for t in grid:
            t_prev = t - 1000 // N
            label = t if told == "next" else max(t_prev, 0)
            with torch.no_grad():
                e = net(reference, x, label)
            steps.append((x, label, e, up(x, e, t_prev, t), t))
            x = steps[-1][3]
        return steps

    k = None
    if recipe.timesteps == "single":
        k = int(torch.randint(1000 if recipe.trajectory.steps is None else N, (1,), generator=g))
    noise = torch.randn(1, *SHAPE, generator=g).double()

    def log_ratio(x0):
        if method in ("sft", "diffusion_dpo", "q_single"):
            t = grid[k] if method == "q_single" else k
            x = abar(t).sqrt() * x0 + (1 - abar(t)).sqrt() * noise
            own = ((eps(policy, x, t) - noise) ** 2).mean()
            if method == "sft":
                return -own
            return -0.5 * (own - ((eps(reference, x, t) - noise) ** 2).mean())
        if method in ("inversion_dpo_paper", "inversion_dpo_minus"):
            total = sum(
                ((eps(policy, x, t) - eps(reference, x, t)) ** 2).sum() for _, _, _, x, t in trajectory(x0, "previous")
            )
            return total if method == "inversion_dpo_paper" else -total
        if method == "inversion_dpo_code":
            return 0.5 * sum(
                ((cfg(policy, x, label) - e) ** 2).mean() / (2 * abar(t)) / N
                for x, label, e, _, t in trajectory(x0, "next", cfg)
            )
        if method == "inversion_dpo_exact":
            return -sum(
                ((eps(policy, x, t) - e) ** 2).sum() - ((eps(reference, x, t) - e) ** 2).sum()
                for _, _, e, x, t in trajectory(x0, "previous")
            )
        assert method in ("inversion_dpo_implied", "p_single")
        points = trajectory(x0, "next")
        points = points if method == "inversion_dpo_implied" else points[k : k + 1]
        total = 0
        for _, _, _, x, t in points:
            implied = (x - abar(t).sqrt() * x0) / (1 - abar(t)).sqrt()
            own, other = eps(policy, x, t) - implied, eps(reference, x, t) - implied
            total = total - 0.5 * ((own**2).mean() - (other**2).mean()) / len(points)
        return total

    if method == "sft":
        return -log_ratio(win)
    return -torch.nn.functional.logsigmoid(recipe.beta * (log_ratio(win) - log_ratio(lose))).squeeze()


@pytest.mark.parametrize("method", WRITTEN_OUT)
def test_loss_and_gradient_are_the_written_out_formula(method):
    policy, reference = networks()
    win, lose, cond = batch()
    hand_loss(method, policy, reference, win, lose, cond).backward()
    expected = policy.gradient()
    policy.zero_grad()
    out = preference_loss(small(method), policy, reference, win, lose, cond, SCHEDULE, generators())
    out.loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(out.loss, hand_loss(method, policy, reference, win, lose, cond))
    torch.testing.assert_close(policy.gradient(), expected, rtol=1e-9, atol=1e-12)
    assert float(expected.norm()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_two_term_objectives_are_stationary_at_the_reference(method, dtype):
    policy, reference = networks(dtype)
    policy.load_state_dict(reference.state_dict())
    win, lose, cond = batch(dtype=dtype)
    for chunk in (None, 6, 4):
        policy.zero_grad()
        backward(small(method), policy, reference, win, lose, cond, SCHEDULE, generators(), strengths(), chunk=chunk)
        if method in ("inversion_dpo_paper", "inversion_dpo_minus", "inversion_dpo_code"):
            assert torch.count_nonzero(policy.gradient()) == 0
        else:
            assert float(policy.gradient().norm()) > 1e-4


@pytest.mark.parametrize("method", SHARED)
def test_swapping_winner_and_loser_negates_the_difference_exactly(method):
    policy, reference = networks(torch.float32)
    win, lose, cond = batch(dtype=torch.float32)
    recipe = small(method)
    there = preference_loss(recipe, policy, reference, win, lose, cond, SCHEDULE, generators(), strengths())
    back = preference_loss(recipe, policy, reference, lose, win, cond, SCHEDULE, generators(), strengths())
    difference = there.logratio_win - there.logratio_lose
    assert torch.equal(difference, -(back.logratio_win - back.logratio_lose))
    assert float(difference.detach().abs().min()) > 0


@pytest.mark.parametrize("method", SHARED)
def test_losers_may_be_conditioned_on_something_else(method):
    """As in SDXL, which is told the size of each image: every log-ratio is the one of its own conditioning."""
    policy, reference = networks()
    win, lose, cond = batch()
    other = cond.map(lambda value: value + 0.5)

    def ratios(first, second=None):
        out = preference_loss(
            small(method), policy, reference, win, lose, first, SCHEDULE, generators(), strengths(), second
        )
        return out.logratio_win, out.logratio_lose

    for found, expected in zip(ratios(cond, other), (ratios(cond)[0], ratios(other)[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (ratios(cond, other)[1] - ratios(cond)[1]).abs().min() > 1e-6
    preference_loss(
        small(method), policy, reference, win, lose, cond, SCHEDULE, generators(), strengths(), other
    ).loss.backward()
    expected = policy.gradient()
    for chunk in (None, 4):
        policy.zero_grad()
        options = {"strength": strengths(), "chunk": chunk, "cond_lose": other}
        backward(small(method), policy, reference, win, lose, cond, SCHEDULE, generators(), **options)
        torch.testing.assert_close(policy.gradient(), expected, rtol=1e-8, atol=1e-11)


def test_a_pair_shares_timestep_and_noise():
    policy, reference = networks()
    win, _, cond = batch()
    for method in SHARED:
        out = preference_loss(small(method), policy, reference, win, win, cond, SCHEDULE, generators(), strengths())
        assert torch.equal(out.logratio_win, out.logratio_lose)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 1000])
def test_streaming_is_the_full_graph(method, pairs, chunk):
    policy, reference = networks(torch.float32)
    win, lose, cond = batch(pairs, torch.float32)
    recipe = small(method)
    arguments = (recipe, policy, reference, win, lose, cond, SCHEDULE)
    full = preference_loss(*arguments, generators(pairs), strengths(pairs))
    (full.loss * 3 + policy.c.square()).backward()
    expected = policy.gradient()
    policy.zero_grad()
    policy.c.square().backward()  # a gradient already there is added to, and scaled by nothing
    policy.latents = policy.latents_with_gradient = policy.widest = reference.latents = 0
    out = backward(*arguments, generators(pairs), strengths(pairs), loss_scale=3.0, chunk=chunk)
    error = (policy.gradient() - expected).norm() / expected.norm()
    assert float(error) < 1e-5
    torch.testing.assert_close(out.loss, full.loss.detach())
    torch.testing.assert_close(out.logratio_win, full.logratio_win.detach(), rtol=1e-4, atol=1e-6)
    assert not out.loss.requires_grad
    assert not out.logratio_win.requires_grad
    assert policy.widest <= max(chunk, 2 if method == "inversion_dpo_code" else 1)
    if method in SURROGATES:
        assert out.unet_evals == policy.latents + 2 * policy.latents_with_gradient + reference.latents


@pytest.mark.parametrize("pairs", [1, 3])
def test_passes_are_as_few_as_they_can_be(pairs):
    """One pass where it all fits or the pair is alone; else a second; the reference never where it is known already."""
    win, lose, cond = batch(pairs)
    for method, guidance, reference_calls in (
        ("inversion_dpo_paper", 1, N + 1),  # N inversion steps and the last point
        ("inversion_dpo_code", 2, N),  # the inversion's own predictions
        ("inversion_dpo_exact", 1, N + 1),
        ("inversion_dpo_implied", 1, 2 * N),  # every point again, with its own label
        ("diffusion_dpo", 1, 1),
        ("dspo", 1, 1),  # once for its coefficient and its regression
    ):
        rows = 2 * pairs * guidance
        single = method in ("diffusion_dpo", "dspo")
        for chunk, passes in ((None, 1), (rows, 1 if pairs == 1 or single else 2)):
            policy, reference = networks()
            backward(small(method), policy, reference, win, lose, cond, SCHEDULE, generators(pairs), chunk=chunk)
            assert reference.latents == reference_calls * rows
            points = 1 if single else N
            assert policy.latents == passes * points * rows
            assert policy.latents_with_gradient == points * rows


@pytest.mark.parametrize("method", SURROGATES)
def test_counts_are_what_the_networks_saw(method):
    policy, reference = networks()
    win, lose, cond = batch()
    out = preference_loss(small(method), policy, reference, win, lose, cond, SCHEDULE, generators(), strengths())
    assert out.unet_evals == policy.latents + reference.latents
    if method == "sft":
        assert (out.unet_evals, reference.latents, out.logratio_lose) == (3, 0, None)


def test_single_timestep_inversion_stops_at_its_timestep():
    policy, reference = networks()
    win, lose, cond = batch()
    index = [int(torch.randint(N, (1,), generator=g)) + 1 for g in generators()]
    preference_loss(small("p_single"), policy, reference, win, lose, cond, SCHEDULE, generators())
    assert reference.latents == 2 * sum(index) + 6


@pytest.mark.parametrize("method", [method for method in METHODS if method != "diffusion_kto"])
def test_micro_batches_of_one_pair_give_the_same_step(method):
    win, lose, cond = batch(8)
    policy, reference = networks()
    backward(small(method), policy, reference, win, lose, cond, SCHEDULE, generators(8), strengths(8), chunk=7)
    together = policy.gradient()
    policy.zero_grad()
    for i in range(8):
        one = slice(i, i + 1)
        backward(
            small(method),
            policy,
            reference,
            win[one],
            lose[one],
            cond.map(lambda value, one=one: value[one]),
            SCHEDULE,
            generators(8)[one],
            strengths(8)[one],
            loss_scale=1 / 8,
            chunk=7,
        )
    torch.testing.assert_close(policy.gradient(), together, rtol=1e-9, atol=1e-12)


def test_one_generator_is_drawn_from_pair_after_pair():
    policy, reference = networks()
    win, lose, cond = batch(2)
    recipe = small("q_single")
    g = torch.Generator().manual_seed(3)
    both = preference_loss(recipe, policy, reference, win, lose, cond, SCHEDULE, g).logratio_win
    g = torch.Generator().manual_seed(3)
    for i in range(2):
        one = slice(i, i + 1)
        alone = preference_loss(
            recipe, policy, reference, win[one], lose[one], cond.map(lambda v, one=one: v[one]), SCHEDULE, g
        )
        torch.testing.assert_close(alone.logratio_win, both[one])


def test_single_inverted_recipe_is_diffusion_dpo_where_points_and_targets_agree():
    """An inverting model that always predicts the added noise walks q's own points, so p_single must be q_single."""
    policy, reference = networks()
    win, lose, cond = batch()
    schedule = NoiseSchedule(ABAR, 1.0, 1, 1000)
    _, noises = zip(
        *((torch.randint(N, (1,), generator=g), torch.randn(1, *SHAPE, generator=g)) for g in generators()),
        strict=True,
    )
    noise = torch.cat(noises).double()

    class Oracle:
        """Predicts each pair's noise while inverting, and as the linear model when compared."""

        inverting = True

        def __call__(self, x, t, c):
            if not self.inverting:
                return reference(x, t, c)
            pair = (c.embeds.flatten(1)[:, None] - cond.embeds.flatten(1)[None]).abs().sum(-1).argmin(dim=1)
            return noise[pair]

    trajectory = invert(Oracle(), win, cond, schedule, steps=N)
    for i, t in enumerate(trajectory.timesteps.tolist(), start=1):
        torch.testing.assert_close(trajectory.latents[i], schedule.add_noise(win, noise, t))

    oracle = Oracle()
    p = preference_loss(
        small("p_single"),
        policy,
        # The inversion comes first, on rows of its own; the comparison follows.
        _Switch(oracle, 2 * sum(int(torch.randint(N, (1,), generator=g)) + 1 for g in generators())),
        win,
        lose,
        cond,
        schedule,
        generators(),
    )
    q = preference_loss(small("q_single"), policy, reference, win, lose, cond, schedule, generators())
    torch.testing.assert_close(p.logratio_win, q.logratio_win)
    torch.testing.assert_close(p.logratio_lose, q.logratio_lose)
    torch.testing.assert_close(p.loss, q.loss)


class _Switch:
    """An oracle that stops inverting after `latents` latents."""

    def __init__(self, oracle, latents):
        self.oracle, self.left = oracle, latents

    def __call__(self, x, t, c):
        self.oracle.inverting = self.left > 0
        self.left -= len(x)
        return self.oracle(x, t, c)


@pytest.mark.parametrize("over_timesteps", ["mean", "sum"])
def test_a_subset_is_unbiased(over_timesteps):
    policy, reference = networks()
    win, lose, cond = batch(1)
    whole = small("inversion_dpo_paper", log_ratio={"over_timesteps": over_timesteps})
    part = whole.with_overrides({"timesteps": "subset", "subset_size": 2})
    with torch.no_grad():
        exact = preference_loss(whole, policy, reference, win, lose, cond, SCHEDULE, generators(1)).logratio_win
        draws = [
            preference_loss(
                part, policy, reference, win, lose, cond, SCHEDULE, torch.Generator().manual_seed(seed)
            ).logratio_win
            for seed in range(400)
        ]
    draws = torch.cat(draws)
    assert draws.unique().numel() == 15  # all pairs of 6 timesteps
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std()) / 20


def test_policy_may_invert():
    policy, reference = networks()
    win, lose, cond = batch()
    recipe = small("inversion_dpo_implied", trajectory={"model": "policy"})
    out = backward(recipe, policy, reference, win, lose, cond, SCHEDULE, generators(), chunk=6)
    assert policy.latents == 3 * 6 * N  # inversion and two passes
    assert reference.latents == 6 * N
    assert out.unet_evals == 6 * 6 * N


def test_label_smoothing_and_margin():
    policy, reference = networks()
    win, lose, cond = batch()
    plain = preference_loss(small("q_single"), policy, reference, win, lose, cond, SCHEDULE, generators())
    recipe = small("q_single", loss={"label_smoothing": 0.1, "margin": 0.3})
    out = preference_loss(recipe, policy, reference, win, lose, cond, SCHEDULE, generators())
    s = recipe.beta * (plain.logratio_win - plain.logratio_lose) - 0.3
    expected = -(0.9 * torch.sigmoid(s).log() + 0.1 * torch.sigmoid(-s).log()).mean()
    torch.testing.assert_close(out.loss, expected)


def test_half_precision_reference_is_compared_in_the_policys_precision():
    policy, _ = networks(torch.float32)
    win, lose, cond = batch(dtype=torch.float32)
    half = Linear(1, torch.float32).requires_grad_(False)

    def rounded(x, t, cond):
        return half(x, t, cond).half()

    recipe = small("inversion_dpo_code")
    out = backward(recipe, policy, rounded, win, lose, cond, SCHEDULE, generators())
    assert out.loss.dtype == torch.float32
    assert 0 < float(policy.gradient().norm()) < 1e-2  # rounding alone, as in the released script


class _Saved:
    """A tensor kept for the backward pass; `alive` and `peak` count their elements."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        _Saved.alive += tensor.numel()
        _Saved.peak = max(_Saved.peak, _Saved.alive)

    def __del__(self):
        _Saved.alive -= self.tensor.numel()


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("method", INVERTED)
def test_memory_for_gradients_is_flat_in_the_number_of_steps(method, pairs):
    policy, reference = networks(torch.float32)
    win, lose, cond = batch(pairs, torch.float32)
    peaks = []
    for steps in (5, 40):
        _Saved.alive = _Saved.peak = 0
        recipe = load_recipe(method).with_overrides({"trajectory": {"steps": steps}})
        with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
            backward(recipe, policy, reference, win, lose, cond, SCHEDULE, generators(pairs), chunk=4)
        peaks.append(_Saved.peak)
    assert peaks[0] == peaks[1] > 0


def test_a_toy_world_learns_from_true_labels_and_not_from_shuffled_ones():
    """Two-dimensional mixture of modes at x = -1.5 and +1.5, annotators who prefer larger x."""
    centres = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
    spread = 0.4

    def base(x, t, cond=None):
        a = SCHEDULE.alpha_bar(t).float()[:, None]
        flat = x.flatten(1)
        variance = a * spread**2 + 1 - a
        away = flat[:, None] - a.sqrt()[..., None] * centres
        responsibility = (-away.square().sum(-1) / (2 * variance)).softmax(dim=1)
        return ((1 - a).sqrt() / variance * (responsibility[..., None] * away).sum(1)).view_as(x)

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
            torch.nn.init.zeros_(self.net[2].weight)
            torch.nn.init.zeros_(self.net[2].bias)

        def forward(self, x, t, cond=None):
            features = torch.cat([x.flatten(1), t[:, None] / 1000], dim=1)
            return base(x, t) + self.net(features).view_as(x)

    def data(n, g):
        mode = torch.randint(2, (n,), generator=g)
        return (centres[mode] + spread * torch.randn(n, 2, generator=g))[:, :, None, None]

    @torch.no_grad()
    def reward(model):
        x = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        for t in SCHEDULE.timesteps(20).flip(0).tolist():
            x = SCHEDULE.ddim_step(x, model(x, torch.full((2000,), t)), t, SCHEDULE.previous(t, 20))
        return float(x[:, 0].mean())

    def trained(shuffled):
        torch.manual_seed(0)
        policy, g = Policy(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
        recipe = load_recipe("diffusion_dpo").with_overrides({"beta": 20.0})
        for _ in range(150):
            first, second = data(128, g), data(128, g)
            better = (first[:, :1] > second[:, :1]).expand_as(first)
            if shuffled:
                better = (torch.rand(128, 1, 1, 1, generator=g) < 0.5).expand_as(first)
            win, lose = torch.where(better, first, second), torch.where(better, second, first)
            backward(recipe, policy, base, win, lose, None, SCHEDULE, g)
            optimizer.step()
            optimizer.zero_grad()
        return reward(policy)

    start = reward(base)
    assert trained(shuffled=False) > start + 0.5
    assert abs(trained(shuffled=True) - start) < 0.25


@pytest.mark.parametrize("method", ["inversion_dpo_paper", "inversion_dpo_minus", "inversion_dpo_code"])
@pytest.mark.parametrize("chunk", [None, 256, 8, 5])
def test_stationary_at_the_reference_through_convolutions_and_matrix_products(method, chunk):
    """Kernels round by batch size, so exact zeros need the policy's calls to be shaped as the reference's."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = (
                torch.nn.Conv2d(4, 32, 3, padding=1),
                torch.nn.Conv2d(32, 4, 3, padding=1),
            )
            self.text, self.mix = torch.nn.Linear(8, 32), torch.nn.Linear(32, 32)

        def forward(self, x, t, cond):
            h = self.enter(x) + self.text(cond.embeds.mean(1) + t[:, None] / 1000)[:, :, None, None]
            h = h + self.mix(torch.nn.functional.silu(h).flatten(2).transpose(1, 2)).transpose(1, 2).view_as(h)
            return self.leave(torch.nn.functional.silu(h))

    policy, reference = Net(), Net().requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    win, lose = torch.randn(2, 7, 4, 8, 8)
    cond = Conditioning(torch.randn(7, 3, 8), uncond=Conditioning(torch.zeros(7, 3, 8)))
    for changes in ({}, {"timesteps": "single"}, {"timesteps": "subset", "subset_size": 3}):
        recipe = small(method, **changes)
        backward(recipe, policy, reference, win, lose, cond, SCHEDULE, generators(7), chunk=chunk)
        assert all(torch.count_nonzero(p.grad) == 0 for p in policy.parameters())


@pytest.mark.parametrize("method", ["inversion_dpo_paper", "inversion_dpo_code"])
def test_a_real_unet_has_exactly_no_gradient_at_the_reference_in_any_memory_format(method: str) -> None:
    """Kernels round by memory format, and a trajectory need not come back in that of the latents it started from."""
    reference = pipeline.load_unet("assets/shapes/base", torch.device("cpu")).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    win, lose = (
        x.to(memory_format=torch.channels_last)
        for x in torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    width = int(reference.config["cross_attention_dim"])
    embeds = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))
    recipe = small(method, reference_label_dtype="float32", reference_dtype="float32")
    networks = pipeline.UNetEps(policy), pipeline.UNetEps(reference)
    backward(recipe, *networks, win, lose, cond, SCHEDULE, generators(2), chunk=512)
    assert all(p.grad is None or torch.count_nonzero(p.grad) == 0 for p in policy.parameters())


# --- recipes as data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_loads_under_its_own_name_and_survives_a_round_trip(method):
    recipe = load_recipe(method)
    assert recipe.name == method
    assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))), "again") == recipe


def test_published_numbers():
    paper, code, dpo = (load_recipe(name) for name in ("inversion_dpo_paper", "inversion_dpo_code", "diffusion_dpo"))
    assert (paper.beta, paper.learning_rate, paper.trajectory.steps) == (2000, 1e-6, 80)
    assert (code.beta, code.learning_rate, code.trajectory.guidance_scale) == (2000, 2e-8, 2)
    assert (dpo.beta, dpo.log_ratio.scale, dpo.trajectory.steps) == (5000, 0.5, None)
    minus = load_recipe("inversion_dpo_minus")
    same = {"name": paper.name, "source": paper.source, "log_ratio": {"sign": "+"}}
    assert minus.with_overrides(same) == paper


def test_frozen_and_overrides_are_deep():
    recipe = load_recipe("p_single")
    changed = recipe.with_overrides({"trajectory": {"steps": 10}, "beta": 7})
    assert (changed.trajectory.steps, changed.beta, changed.trajectory.label) == (10, 7.0, "next")
    assert recipe.trajectory.steps == 80
    with pytest.raises(Exception, match="frozen"):
        recipe.beta = 3.0


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("p_single", {"target": "reference"}, r"log_ratio\.form.*two_term"),
        ("inversion_dpo_paper", {"target": "implied"}, r"target.*two_term"),
        ("p_single", {"target": "noise"}, r"target.*'noise' needs trajectory\.kind 'forward'"),
        ("q_single", {"target": "implied"}, r"target.*'implied' needs trajectory\.kind 'inversion'"),
        ("q_single", {"target": "step"}, r"target.*'step' needs trajectory\.kind 'inversion'"),
        (
            "inversion_dpo_paper",
            {"trajectory": {"kind": "forward"}},
            r"target.*'reference' needs trajectory\.kind 'inversion'",
        ),
        ("inversion_dpo_paper", {"log_ratio": {"sign": None}}, r"log_ratio\.sign"),
        ("p_single", {"log_ratio": {"sign": "+"}}, r"log_ratio\.sign"),
        ("p_single", {"log_ratio": {"at": "x_prev"}}, r"log_ratio\.at.*'reference'"),
        ("diffusion_dpo", {"loss": {"kind": "winner_only"}}, r"log_ratio\.form.*denoising"),
        ("sft", {"loss": {"kind": "dpo"}}, r"loss\.kind.*winner_only"),
        ("sft", {"loss": {"margin": 1.0}}, r"loss\.margin: .*'winner_only'"),
        ("p_single", {"timesteps": "subset"}, "subset_size"),
        ("p_single", {"timesteps": "subset", "subset_size": 81}, r"subset_size.*trajectory\.steps 80"),
        ("p_single", {"subset_size": 3}, "subset_size"),
        ("p_single", {"trajectory": {"steps": None}}, r"trajectory\.steps"),
        ("diffusion_dpo", {"timesteps": "all"}, r"trajectory\.steps"),
        ("diffusion_dpo", {"trajectory": {"guidance_scale": 2.0}}, r"trajectory\.guidance_scale"),
        ("p_single", {"trajectory": {"steps": 0}}, r"trajectory\.steps.*greater than or equal to 1, got 0"),
        ("p_single", {"trajectory": {"steps": 1001}}, r"trajectory\.steps"),
        ("p_single", {"trajectory": {"steps": "twenty"}}, r"trajectory\.steps"),
        ("p_single", {"trajectory": {"solver": "rk4"}}, r"trajectory\.solver.*ddim"),
        ("p_single", {"trajectory": {"setps": 20}}, r"trajectory\.setps: unknown key; did you mean 'steps'"),
        ("p_single", {"log_ration": {}}, r"log_ration: unknown key; did you mean 'log_ratio'"),
        ("p_single", {"trajectory": 5}, "trajectory"),
        ("p_single", {"beta": -1}, "beta"),
        ("p_single", {"beta": math.nan}, "beta"),
        ("p_single", {"loss": {"label_smoothing": 0.5}}, r"loss\.label_smoothing"),
        ("q_single", {"trajectory": {"model": "policy"}}, r"trajectory\.model: a forward trajectory"),
        ("q_single", {"trajectory": {"label": "previous"}}, r"trajectory\.label: a forward trajectory"),
        ("diffusion_dpo", {"trajectory": {"steps_offset": 1}}, r"trajectory\.steps_offset: .*grid"),
        ("sft", {"reference_dtype": "float16"}, r"reference_dtype: .*never calls the reference"),
        ("mapo", {"reference_label_dtype": "bfloat16"}, r"reference_label_dtype: .*never calls the reference"),
        ("sft", {"pair_draws": "independent"}, r"pair_draws: .*'winner_only'"),
        ("sft", {"loss": {"reversed": True}}, r"loss\.reversed: .*no loser"),
        ("inversion_dpo_paper", {"pair_draws": "independent"}, r"pair_draws: .*draws nothing"),
        ("diffusion_dpo", {"loss": {"kind": "kto"}}, r"loss\.positive_share: .*'kto' needs it"),
        ("diffusion_dpo", {"loss": {"positive_share": 0.5}}, r"loss\.positive_share: only loss\.kind 'kto'"),
        ("diffusion_kto", {"loss": {"positive_share": 1.0}}, r"loss\.positive_share: .*less than 1"),
        ("diffusion_kto", {"loss": {"margin": 0.1}}, r"loss\.margin: .*'kto'"),
        ("diffusion_kto", {"loss": {"label_smoothing": 0.1}}, r"loss\.label_smoothing: .*'kto'"),
        ("diffusion_kto", {"loss": {"weight_by_strength": True}}, r"loss\.weight_by_strength: .*'kto'"),
        ("diffusion_kto", {"log_ratio": {"form": "denoising"}}, r"loss\.kind: .*'winner_only' or 'mapo'"),
        ("mapo", {"log_ratio": {"form": "four_term"}}, r"log_ratio\.form: .*'mapo' needs 'denoising'"),
        ("mapo", {"loss": {"link_scale": None}}, r"loss\.link_scale: .*'mapo' needs it"),
        ("mapo", {"loss": {"margin_scale": None}}, r"loss\.margin_scale: .*'mapo' needs it"),
        ("dspo", {"loss": {"link_scale": 1.0}}, r"loss\.link_scale: only loss\.kind 'mapo'"),
        ("dspo", {"loss": {"margin_scale": 1.0}}, r"loss\.margin_scale: only loss\.kind 'mapo'"),
        ("dspo", {"timesteps": "all", "trajectory": {"steps": 5}}, r"timesteps: .*'dspo' needs 'single'"),
        ("dspo", {"log_ratio": {"weight": "inverse_2alpha"}}, r"log_ratio\.weight: .*'dspo'"),
        ("dspo", {"log_ratio": {"over_timesteps": "sum"}}, r"log_ratio\.over_timesteps: .*'dspo'"),
        ("inversion_dpo_paper", {"loss": {"kind": "dspo"}}, r"log_ratio\.form: .*'dspo' needs 'four_term'"),
    ],
)
def test_slots_that_do_not_fit_are_named(method, changes, message):
    with pytest.raises(InvdpoError, match=message):
        load_recipe(method).with_overrides(changes)


def test_unknown_and_unreadable_recipes(tmp_path):
    with pytest.raises(InvdpoError, match="did you mean 'diffusion_dpo'"):
        load_recipe("difusion_dpo")
    with pytest.raises(InvdpoError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(InvdpoError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- a list")
    with pytest.raises(InvdpoError, match="mapping"):
        load_recipe(broken)
    broken.write_text("name: x")
    with pytest.raises(InvdpoError, match=r"broken\.yaml: source: Field required"):
        load_recipe(str(broken))


def test_recipes_of_the_working_directory_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "config" / "methods"
    folder.mkdir(parents=True)
    own = load_recipe("p_single").with_overrides({"name": "mine", "beta": 11})
    (folder / "mine.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine") == own
    assert load_recipe("sft").name == "sft"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": [torch.Generator()]}, "generator"),
        ({"x0_lose": None}, "losers"),
        ({"x0_lose": torch.zeros(2, *SHAPE)}, "losers"),
        ({"x0_win": torch.zeros(0, *SHAPE)}, "no pair"),
        ({"chunk": 0}, "chunk"),
        ({"cond": None}, r"trajectory\.guidance_scale"),
    ],
)
def test_bad_arguments(change, message):
    policy, reference = networks()
    win, lose, cond = batch()
    arguments = {
        "x0_win": win,
        "x0_lose": lose,
        "cond": cond,
        "schedule": SCHEDULE,
        "generator": generators(),
        "chunk": 4,
    }
    with pytest.raises(InvdpoError, match=message):
        backward(small("inversion_dpo_code"), policy, reference, **(arguments | change))
