"""The relatives of Diffusion-DPO against formulas written out here, the bias of subsets, and the page of recipes."""

import itertools
from pathlib import Path

import pytest
import torch
from test_objectives import (
    METHODS,
    SCHEDULE,
    SHAPE,
    Linear,
    N,
    abar,
    batch,
    generators,
    networks,
    small,
    strengths,
)
from torch.nn.functional import logsigmoid, mse_loss

from invdpo.errors import InvdpoError
from invdpo.inversion.guidance import guided, two_model_guidance
from invdpo.inversion.trajectory import SOLVERS, invert
from invdpo.objectives import backward, load_recipe, preference_loss
from invdpo.objectives.page import methods_page
from invdpo.objectives.pair_losses import bounded_link
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

NEW = ["ddim_inpo", "smpo", "mapo", "dspo", "diffusion_kto", "diffusion_npo"]


def gradient_of(loss, policy):
    policy.zero_grad()
    loss.backward()
    return policy.gradient()


# --- the objectives written out, one pair at a time ---------------------------------------------------------------


def draw(g, n=1000):
    k = int(torch.randint(n, (1,), generator=g))
    return k, torch.randn(1, *SHAPE, generator=g).double()


def q(x0, t, noise):
    return abar(t).sqrt() * x0 + (1 - abar(t)).sqrt() * noise


def inverted_by_hand(method, policy, x0, cond, k):
    """x at point k of the grid of N, its level, and the noise that leads there from x0."""
    x, grid = x0, [1 + i * (1000 // N) for i in range(N)]
    with torch.no_grad():
        for t in grid[: k + 1]:
            t_prev = t - 1000 // N
            a, b = abar(t_prev), abar(t)

            def up(e, x=x, a=a, b=b):
                return (b / a).sqrt() * x + ((1 - b).sqrt() - (b / a - b).sqrt()) * e

            told = torch.tensor([max(t_prev, 0)])
            e = policy(x, told, cond)
            if method == "smpo":
                e = (e + policy(up(e), told, cond)) / 2
            x = up(e)
    return x, grid[k], (x - abar(grid[k]).sqrt() * x0) / (1 - abar(grid[k])).sqrt()


def hand_loss(method, policy, reference, win, lose, cond):
    beta = small(method).beta
    losses, kto = [], []
    for i, g in enumerate(generators(len(win))):
        one = slice(i, i + 1)
        images, c = (win[one], lose[one]), Conditioning(cond.embeds[one])

        def error(net, x, t, y, c=c):
            return mse_loss(net(x, torch.tensor([t]), c), y)

        if method == "diffusion_kto":  # every image has a timestep and a noise of its own
            rewards = []
            for x0 in images:
                t, noise = draw(g)
                x = q(x0, t, noise)
                rewards.append(error(reference, x, t, noise) - error(policy, x, t, noise))
            kto.append(torch.stack(rewards))
            continue
        if method in ("ddim_inpo", "smpo"):
            k = int(torch.randint(N, (1,), generator=g))
            points = [inverted_by_hand(method, policy, x0, c, k) for x0 in images]
        else:
            t, noise = draw(g)
            points = [(q(x0, t, noise), t, noise) for x0 in images]
        ours_w, ours_l = (error(policy, *point) for point in points)
        theirs_w, theirs_l = (error(reference, *point) for point in points)
        inside = -0.5 * beta * ((ours_w - ours_l) - (theirs_w - theirs_l))
        if method == "ddim_inpo":
            losses.append(-logsigmoid(inside))
        elif method == "smpo":
            losses.append(-logsigmoid(inside * strengths()[i] * 10))
        elif method == "diffusion_npo":
            losses.append(-logsigmoid(beta * ((theirs_l - theirs_w) - (ours_l - ours_w))))
        elif method == "mapo":
            link_w, link_l = (0.5 * error / (torch.exp(0.5 * error) - 1) for error in (ours_w, ours_l))
            losses.append(ours_w - beta * logsigmoid(3.0 * (link_w - link_l)))
        else:
            x, t, y = points[0]
            e, e_ref = (net(x, torch.tensor([t]), c) for net in (policy, reference))
            residual = (e - y) - beta * (1 - torch.sigmoid(inside)) * (e - e_ref)
            losses.append(residual.square().mean())
    if method == "diffusion_kto":
        reward_w, reward_l = torch.stack(kto).T
        kl = (0.8 * reward_w.mean() + 0.2 * reward_l.mean()).detach().clamp(min=0)
        return (
            0.8 * (1 - torch.sigmoid(beta * (reward_w - kl))).mean()
            + 0.2 * (1 - torch.sigmoid(-beta * (reward_l - kl))).mean()
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("method", NEW)
def test_loss_and_gradient_are_the_written_out_formula(method, pairs):
    policy, reference = networks()
    win, lose, cond = batch(pairs)
    expected = hand_loss(method, policy, reference, win, lose, cond)
    expected_gradient = gradient_of(expected, policy)
    arguments = (small(method), policy, reference, win, lose, cond, SCHEDULE)
    out = preference_loss(*arguments, generators(pairs), strengths(pairs))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradient_of(out.loss, policy), expected_gradient, rtol=1e-9, atol=1e-12)
    assert float(expected_gradient.norm()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [1, 3])
def test_streaming_is_exact_in_float64(method, pairs):
    policy, reference = networks()
    win, lose, cond = batch(pairs)
    arguments = (small(method), policy, reference, win, lose, cond, SCHEDULE)
    full = preference_loss(*arguments, generators(pairs), strengths(pairs))
    expected = gradient_of(full.loss, policy)
    for chunk in (1, 3):
        policy.zero_grad()
        out = backward(*arguments, generators(pairs), strengths(pairs), chunk=chunk)
        assert float((policy.gradient() - expected).norm() / expected.norm()) < 1e-12
        torch.testing.assert_close(out.loss, full.loss.detach(), rtol=1e-12, atol=0)


# --- relations between recipes ------------------------------------------------------------------------------------


def test_npo_is_dpo_with_winner_and_loser_exchanged():
    policy, reference = networks()
    win, lose, cond = batch()
    npo = small("diffusion_npo")
    dpo = small("diffusion_dpo", beta=npo.beta, log_ratio={"scale": npo.log_ratio.scale})
    ours = preference_loss(npo, policy, reference, win, lose, cond, SCHEDULE, generators())
    swapped = preference_loss(dpo, policy, reference, lose, win, cond, SCHEDULE, generators())
    assert torch.equal(ours.loss, swapped.loss)
    assert torch.equal(ours.logratio_win, swapped.logratio_lose)  # named as they were passed
    torch.testing.assert_close(gradient_of(ours.loss, policy), gradient_of(swapped.loss, policy), rtol=1e-12, atol=0)
    assert npo.sampling_branch == "unconditional" and dpo.sampling_branch == "both"


@pytest.mark.parametrize("method", ["diffusion_dpo", "inversion_dpo_implied", "smpo", "mapo", "dspo", "diffusion_kto"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("pairs", [1, 3])
def test_reversed_is_an_exchange_under_every_loss(method, chunk, pairs):
    policy, reference = networks()
    win, lose, cond = batch(pairs)
    recipe = small(method, pair_draws="shared")
    gradients = []
    for turned, first, second in ((True, win, lose), (False, lose, win)):
        policy.zero_grad()
        changed = recipe.with_overrides({"loss": {"reversed": turned}})
        arguments = (changed, policy, reference, first, second, cond, SCHEDULE)
        backward(*arguments, generators(pairs), strengths(pairs), chunk=chunk)
        gradients.append(policy.gradient())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["p_single", "ddim_inpo", "smpo"])
def test_one_inverted_timestep_is_diffusion_dpo_where_points_and_targets_agree(method):
    """An inverting model that always predicts the added noise walks q's own points, and implies that very noise."""
    policy, reference = networks()
    win, lose, cond = batch()
    schedule = NoiseSchedule(SCHEDULE.alphas_cumprod, 1.0, 1, 1000)
    noises = []
    for g in generators():
        torch.randint(N, (1,), generator=g)
        noises.append(torch.randn(SHAPE, generator=g).double())

    def inverting(network):
        def model(x, t, c):
            if not inverting.now:
                return network(x, t, c)
            inverting.left -= len(x)
            inverting.now = inverting.left > 0
            pair = (c.embeds.flatten(1)[:, None] - cond.embeds.flatten(1)[None]).abs().sum(-1).argmin(dim=1)
            return torch.stack(noises)[pair]

        return model

    recipe = small(method, log_ratio={"scale": 0.5})
    steps = sum(int(torch.randint(N, (1,), generator=g)) + 1 for g in generators())
    inverting.left, inverting.now = 2 * steps * SOLVERS[recipe.trajectory.solver].calls, True
    models = (inverting(policy), reference) if recipe.trajectory.model == "policy" else (policy, inverting(reference))
    ours = preference_loss(recipe, *models, win, lose, cond, schedule, generators(), torch.ones(3))
    dpo = small("diffusion_dpo", trajectory={"steps": N})
    theirs = preference_loss(dpo, policy, reference, win, lose, cond, schedule, generators())
    assert not inverting.now
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logratio_win, theirs.logratio_win)
    torch.testing.assert_close(gradient_of(ours.loss, policy), gradient_of(theirs.loss, policy))


def test_dspo_at_its_published_beta_is_sft_to_a_thousandth():
    """Its coefficient lies between 0 and beta, so at 0.001 the pull away from the reference is all but absent."""
    policy, reference = networks()
    win, lose, cond = batch()
    dspo = preference_loss(load_recipe("dspo"), policy, reference, win, lose, cond, SCHEDULE, generators())
    sft = preference_loss(load_recipe("sft"), policy, reference, win, None, cond, SCHEDULE, generators())
    pulled, plain = gradient_of(dspo.loss, policy), gradient_of(sft.loss, policy)
    assert 0 < float((pulled - plain).norm() / plain.norm()) < 1e-3


def test_the_bounded_link_falls_from_one_to_zero_without_overflow():
    error = torch.tensor([1e-9, 1.0, 30.0, 1e4], dtype=torch.float32, requires_grad=True)
    link = bounded_link(error, 0.5)
    link.sum().backward()
    torch.testing.assert_close(link.detach()[:2], torch.tensor([1.0, 0.5 / (2.718281828459045**0.5 - 1)]))
    assert bool((link[:-1] > link[1:]).all()) and float(link.detach()[-1]) == 0
    assert bool(torch.isfinite(error.grad).all()) and bool((error.grad[1:3] < 0).all())


# --- Diffusion-KTO ------------------------------------------------------------------------------------------------


def test_kto_measures_from_the_batchs_mean_log_ratio_but_never_from_below_zero():
    policy, reference = networks()
    win, lose, cond = batch()
    recipe = small("diffusion_kto")
    zeros = []
    for policy_, reference_ in ((policy, reference), (reference, policy)):
        out = preference_loss(recipe, policy_, reference_, win, lose, cond, SCHEDULE, generators())
        mean = float((0.8 * out.logratio_win + 0.2 * out.logratio_lose).mean().detach())
        zero = max(0.0, mean)
        expected = 0.8 * torch.sigmoid(-recipe.beta * (out.logratio_win - zero)).mean()
        expected = expected + 0.2 * torch.sigmoid(recipe.beta * (out.logratio_lose - zero)).mean()
        torch.testing.assert_close(out.loss, expected)
        zeros.append(zero)
    assert min(zeros) == 0 < max(zeros)


def test_independent_draws_differ_within_a_pair_and_still_belong_to_the_pair():
    policy, reference = networks()
    win, _, cond = batch()
    recipe = small("diffusion_kto")
    together = preference_loss(recipe, policy, reference, win, win, cond, SCHEDULE, generators())
    assert bool((together.logratio_win != together.logratio_lose).all())
    for i in range(3):
        one = slice(i, i + 1)
        alone = preference_loss(
            recipe,
            policy,
            reference,
            win[one],
            win[one],
            cond.map(lambda value, one=one: value[one]),
            SCHEDULE,
            generators()[one],
        )
        torch.testing.assert_close(alone.logratio_win, together.logratio_win[one])
        torch.testing.assert_close(alone.logratio_lose, together.logratio_lose[one])


# --- strengths ----------------------------------------------------------------------------------------------------


def test_strength_multiplies_beta_and_is_ignored_by_other_recipes():
    policy, reference = networks()
    win, lose, cond = batch(1)
    recipe = small("smpo")
    arguments = (policy, reference, win, lose, cond, SCHEDULE)
    plain = recipe.with_overrides({"loss": {"weight_by_strength": False}})
    for strength in (0.25, 1.0):
        weighted = preference_loss(recipe, *arguments, generators(1), torch.tensor([strength]))
        scaled = plain.with_overrides({"beta": recipe.beta * strength})
        torch.testing.assert_close(weighted.loss, preference_loss(scaled, *arguments, generators(1)).loss)
    undecided = preference_loss(recipe, *arguments, generators(1), torch.zeros(1))
    assert float(gradient_of(undecided.loss, policy).norm()) == 0
    ignored = preference_loss(plain, *arguments, generators(1), torch.zeros(1))
    assert torch.equal(ignored.loss, preference_loss(plain, *arguments, generators(1)).loss)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (None, r"'smpo': loss\.weight_by_strength needs .*`strength`"),
        (torch.ones(2), r"strength must be 3 numbers in \[-1, 1\]"),
        (torch.tensor([0.0, 1.5, 0.0]), r"strength must be 3 numbers.*1\.5"),
        (torch.tensor([0.0, float("nan"), 0.0]), "strength must be 3 numbers.*nan"),
    ],
)
def test_strengths_that_are_missing_or_out_of_range_are_refused(strength, message):
    policy, reference = networks()
    win, lose, cond = batch()
    with pytest.raises(InvdpoError, match=message):
        backward(small("smpo"), policy, reference, win, lose, cond, SCHEDULE, generators(), strength)


# --- labels in half precision -------------------------------------------------------------------------------------


class Labels:
    """A model that records the timesteps it is told."""

    def __init__(self, model):
        self.model, self.told = model, []

    def __call__(self, x, t, cond):
        self.told += t.tolist()
        return self.model(x, t, cond)


@pytest.mark.parametrize(("steps", "shifted"), [(20, 5), (40, 20), (80, 0)])
def test_bfloat16_moves_the_references_labels_and_no_others(steps, shifted):
    network = Linear(1).requires_grad_(False)
    win, lose, cond = batch(1)
    gradients = {}
    for dtype in ("float32", "float16", "bfloat16"):
        policy, reference = Linear(1), Labels(network)
        watched = Labels(policy)
        recipe = load_recipe("inversion_dpo_code").with_overrides(
            {"trajectory": {"steps": steps}, "reference_label_dtype": dtype, "beta": 1.0}
        )
        preference_loss(recipe, watched, reference, win, lose, cond, SCHEDULE, generators(1)).loss.backward()
        grid = [i * (1000 // steps) for i in range(steps)]
        assert sorted(set(watched.told)) == grid
        told = sorted(set(reference.told))
        moved = [abs(now - then) for now, then in zip(told, grid, strict=True) if now != then]
        assert len(moved) == (shifted if dtype == "bfloat16" else 0)
        assert max(moved, default=0) <= 2
        gradients[dtype] = float(policy.gradient().norm())
    # Policy and reference are one network, so only misread labels can tell them apart.
    assert gradients["float32"] == gradients["float16"] == 0
    assert (gradients["bfloat16"] > 0) == (shifted > 0)


# --- subsets of timesteps -----------------------------------------------------------------------------------------


def every_subset(n, size):
    """A seed for each subset of the grid that `torch.randperm` draws first."""
    seeds = {}
    for seed in range(1000):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]
        seeds.setdefault(tuple(sorted(order.tolist())), seed)
    assert sorted(seeds) == list(itertools.combinations(range(n), size))
    return list(seeds.values())


@pytest.fixture(scope="module")
def subsets():
    """s = beta (u_w - u_l) and its gradient, on all of 5 timesteps, on each pair of them, and on each alone."""
    policy, reference = networks()
    win, lose, cond = batch(1)
    whole = small("inversion_dpo_implied", beta=0.6, trajectory={"steps": 5})

    def evaluate(recipe, seed):
        g = torch.Generator().manual_seed(seed)
        out = preference_loss(recipe, policy, reference, win, lose, cond, SCHEDULE, g)
        s = recipe.beta * (out.logratio_win - out.logratio_lose).squeeze()
        grad_loss = torch.cat(
            [p.flatten() for p in torch.autograd.grad(out.loss, policy.parameters(), retain_graph=True)]
        )
        grad_s = torch.cat([p.flatten() for p in torch.autograd.grad(s, policy.parameters())])
        return s.detach(), out.loss.detach(), grad_s, grad_loss

    def all_of(size):
        recipe = whole.with_overrides({"timesteps": "subset", "subset_size": size})
        return [
            torch.stack(column)
            for column in zip(*(evaluate(recipe, seed) for seed in every_subset(5, size)), strict=True)
        ]

    return evaluate(whole, 0), all_of(2), all_of(1)


def test_the_inner_sum_of_a_subset_is_unbiased(subsets):
    (s, _, grad_s, _), (part, _, grad_part, _), (one, _, _, _) = subsets
    torch.testing.assert_close(part.mean(), s, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad_part.mean(dim=0), grad_s, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(part.var(correction=0), (1 - 2 / 5) / 2 * one.var(correction=1))


def test_the_outer_sigmoid_adds_the_second_order_bias(subsets):
    (s, loss, grad_s, grad_loss), (part, part_loss, grad_part, grad_part_loss), _ = subsets
    variance = part.var(correction=0)
    p = torch.sigmoid(s)
    second, third = p * (1 - p), p * (1 - p) * (1 - 2 * p)  # derivatives of -log sigmoid
    bias = part_loss.mean() - loss
    torch.testing.assert_close(bias, second * variance / 2, rtol=0.05, atol=0)
    assert float(bias) > 0
    covariance = ((part - s)[:, None] * (grad_part - grad_s)).mean(dim=0)
    expected = second * covariance + third * variance * grad_s / 2
    error = grad_part_loss.mean(dim=0) - grad_loss - expected
    assert float(error.norm() / expected.norm()) < 0.05


# --- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_target_step_is_allowed_exactly_where_a_ddim_step_leads_back(solver):
    network = Linear(1).requires_grad_(False)
    win, _, cond = batch()
    label = SOLVERS[solver].labels[0]
    trajectory = invert(network, win, cond.without_uncond(), SCHEDULE, N, solver, label=label)
    returned = [
        SCHEDULE.ddim_step(trajectory.latents[i + 1], trajectory.eps[i], t, SCHEDULE.previous(t, N))
        for i, t in enumerate(trajectory.timesteps.tolist())
    ]
    leads_back = torch.allclose(torch.stack(returned), trajectory.latents[:-1], rtol=1e-9, atol=1e-12)
    changes = {"trajectory": {"solver": solver, "label": label}}
    if leads_back:
        assert load_recipe("inversion_dpo_exact").with_overrides(changes).target == "step"
    else:
        with pytest.raises(InvdpoError, match=f"target: 'step' is the eps .*'{solver}' has none"):
            load_recipe("inversion_dpo_exact").with_overrides(changes)
    assert leads_back == (solver != "edict")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("smpo", {"trajectory": {"kind": "forward", "model": "reference"}, "target": "noise"}, r"trajectory\.solver: "),
        ("ddim_inpo", {"trajectory": {"solver": "edict"}}, r"trajectory\.label: .*'edict'.*use 'next'"),
        ("p_single", {"trajectory": {"solver": "dpm_solver"}}, r"trajectory\.label: .*'dpm_solver'.*use 'previous'"),
        ("mapo", {"loss": {"weight_by_strength": True}}, r"loss\.weight_by_strength: .*only 'dpo'"),
        ("diffusion_kto", {"loss": {"positive_share": None}}, r"loss\.positive_share: .*needs it"),
        ("diffusion_npo", {"sampling_branch": "conditional"}, "sampling_branch"),
        ("inversion_dpo_code", {"reference_label_dtype": "int8"}, "reference_label_dtype"),
    ],
)
def test_slots_that_do_not_fit_are_named(method, changes, message):
    with pytest.raises(InvdpoError, match=message):
        load_recipe(method).with_overrides(changes)


@pytest.mark.parametrize("solver", ["fixed_point", "renoise", "dpm_solver", "edict"])
@pytest.mark.parametrize("method", ["inversion_dpo_paper", "inversion_dpo_code", "inversion_dpo_implied"])
def test_what_a_solver_used_is_not_taken_for_the_references_own_prediction(method, solver):
    """Only plain DDIM's eps is a prediction; with every other solver the reference is asked again at each point."""
    network = Linear(1)
    reference = Linear(1).requires_grad_(False)
    win, lose, cond = batch(1)
    label = SOLVERS[solver].labels[0]
    recipe = small(method, trajectory={"solver": solver, "label": label, "guidance_scale": 1.0})
    out = preference_loss(recipe, network, reference, win, lose, cond, SCHEDULE, generators(1))
    # Policy and reference are the same, so every log-ratio is zero.
    torch.testing.assert_close(out.logratio_win, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-20)
    assert reference.latents == 2 * N * (SOLVERS[solver].calls + 1)


def test_published_numbers_of_the_relatives():
    def numbers(name):
        recipe = load_recipe(name)
        return recipe.beta, recipe.learning_rate, recipe.log_ratio.scale, recipe.trajectory.steps

    assert numbers("ddim_inpo") == (5000, 1.024e-5, 0.5, 10)
    assert numbers("smpo") == (5000, 1.024e-5, 5, 10)
    assert numbers("mapo") == (0.1, 1e-5, 1, None)
    assert numbers("dspo") == (0.001, 2.048e-5, 0.5, None)
    assert numbers("diffusion_kto") == (1000, 1e-7, 1, None)
    assert numbers("diffusion_npo") == (500, 5e-6, 1, None)
    code = load_recipe("inversion_dpo_code")
    assert (code.reference_dtype, code.reference_label_dtype) == ("float16", "float16")
    assert (load_recipe("mapo").loss.link_scale, load_recipe("mapo").loss.margin_scale) == (0.5, 1000)


# --- two-model guidance -------------------------------------------------------------------------------------------


def test_two_model_guidance_takes_each_half_from_its_model():
    first, second = networks()
    x, _, cond = batch()
    t = torch.tensor([7, 300, 900])
    with torch.no_grad():
        for scale in (0.0, 1.0, 5.0):
            expected = (1 - scale) * second(x, t, cond.uncond) + scale * first(x, t, cond.without_uncond())
            torch.testing.assert_close(two_model_guidance(first, second, scale)(x, t, cond), expected)
            torch.testing.assert_close(
                two_model_guidance(first, first, scale)(x, t, cond), guided(first, scale)(x, t, cond)
            )
    with pytest.raises(InvdpoError, match=r"Conditioning\.uncond"):
        two_model_guidance(first, second, 5.0)(x, t, cond.without_uncond())
    torch.testing.assert_close(two_model_guidance(first, second, 1.0)(x, t, None), first(x, t))


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_committed_page_is_what_the_recipes_give():
    committed = Path(__file__).parents[2] / "docs" / "methods.md"
    assert committed.read_text(encoding="utf-8") == methods_page()


def test_the_page_shows_every_recipe_in_one_row_and_one_section():
    page = methods_page()
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) == len(METHODS)
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1
    for method in METHODS:
        recipe = load_recipe(method)
        (row,) = [row for row in rows if row.startswith(f"| [{method}](")]
        assert f"| {recipe.learning_rate:g} |" in row and recipe.source.replace("|", r"\|") in row
        section = page.split(f"\n## {method}\n")[1].split("\n## ")[0]
        assert section.count("$$") % 2 == 0 and section.count("$$") >= 6
        assert section.count("{") == section.count("}")
    assert page.split("## inversion_dpo_paper\n")[1].count("u = \\sum") == 1
    assert "u = -\\sum" in page.split("## inversion_dpo_minus\n")[1].split("\n## ")[0]
