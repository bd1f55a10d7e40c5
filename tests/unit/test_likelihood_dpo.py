"""The sampler's own log-ratio and its gradient against determinants written out, closed forms and finite differences;
float64 unless a test says otherwise."""

import itertools
import math

import pytest
import torch
from test_likelihood import ABAR, SCHEDULE, coefficients, latents, log_normal, tiny_model
from test_objectives import _Saved, generators

from invdpo.errors import InvdpoError
from invdpo.experiments.precision import Pairs, surrogate
from invdpo.experiments.precision import true_log_prob as true_log_prob_of
from invdpo.likelihood import log_prob
from invdpo.objectives import backward, likelihood, load_recipe, preference_loss
from invdpo.types import Conditioning

N = 5
SHAPE = (1, 3, 1)
SIZE = math.prod(SHAPE)
BETA = 0.3


class Curved(torch.nn.Module):
    """eps = A x + 0.3 sin(B x) + c mean(embeds), the sine shifted by the level: J and its derivative are full."""

    def __init__(self, seed, size=SIZE):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        eye = torch.eye(size, dtype=torch.float64)
        self.a = torch.nn.Parameter(0.6 * eye + 0.2 * torch.randn(size, size, dtype=torch.float64, generator=g))
        self.b = torch.nn.Parameter(torch.randn(size, size, dtype=torch.float64, generator=g))
        self.c = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.latents = self.widest = 0

    def forward(self, x, t, cond):
        self.latents, self.widest = self.latents + len(x), max(self.widest, len(x))
        flat, phase = x.flatten(1), t.to(x)[:, None] / 1000
        out = (flat[:, None] * self.a).sum(-1) + 0.3 * torch.sin((flat[:, None] * self.b).sum(-1) + phase)
        return (out + self.c * cond.embeds.mean(dim=(1, 2))[:, None]).view_as(x)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters()])


class Gaussian(torch.nn.Module):
    """E[eps | x_t] of data N(mean, exp(log_std)^2)."""

    def __init__(self, mean, log_std):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = torch.nn.Parameter(torch.tensor(log_std, dtype=torch.float64))

    def affine(self, a):
        """eps = slope x + offset at the level of abar a."""
        slope = (1 - a) ** 0.5 / (a * (2 * self.log_std).exp() + 1 - a)
        return slope, -slope * a**0.5 * self.mean

    def forward(self, x, t, cond):
        slope, offset = self.affine(SCHEDULE.alpha_bar(t).to(x)[:, None, None, None])
        return slope * x + offset


def recipe(divergence="exact", probes=None, order=None, steps=N, **more):
    changes = {
        "beta": BETA,
        "trajectory": {"steps": steps},
        "log_ratio": {"divergence": divergence, "probes": probes, "order": order},
    }
    return load_recipe("likelihood_dpo").with_overrides(changes).with_overrides(more)


def pairs(count=3, shape=SHAPE):
    win, lose = latents(2 * count, shape).chunk(2)
    return win, lose, Conditioning(latents(count, (2, 4), seed=8))


def true_log_prob(model, x0, cond, label="previous"):
    """log p of each latent, every Jacobian written out row by row, differentiable in the model."""
    values = []
    for row in range(len(x0)):
        c = None if cond is None else cond.map(lambda value, row=row: value[row : row + 1])
        x, log_det = x0[row : row + 1].clone().requires_grad_(), 0.0
        for scale, factor, told in coefficients(N, label):
            after = scale * x + factor * model(x, torch.tensor([told]), c)
            rows = [torch.autograd.grad(value, x, create_graph=True)[0].flatten() for value in after.flatten()]
            x, log_det = after, log_det + torch.linalg.slogdet(torch.stack(rows)).logabsdet
        values.append(log_normal(x).squeeze() + log_det)
    return torch.stack(values)


def true_loss(policy, reference, win, lose, cond, label="previous"):
    ratios = [true_log_prob(policy, x0, cond, label) - true_log_prob(reference, x0, cond, label) for x0 in (win, lose)]
    return -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])).mean(), *ratios


def gradient_of(run, policy, *arguments, **more):
    """What `preference_loss` or `backward` leaves in `.grad`, and the output."""
    policy.zero_grad()
    out = run(*arguments, **more)
    if run is preference_loss:
        out.loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), out


# --- value and gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["previous", "next"])
@pytest.mark.parametrize("count", [1, 3])
def test_exact_is_the_log_determinant_of_the_jacobian_and_its_gradient(label, count):
    policy, reference = Curved(1), Curved(2)
    win, lose, cond = pairs(count)
    loss, ratio_win, ratio_lose = true_loss(policy, reference, win, lose, cond, label)
    loss.backward()
    expected = policy.gradient()
    arguments = (recipe(trajectory={"label": label}), policy, reference, win, lose, cond, SCHEDULE, generators(count))
    runs = [(preference_loss, {}), *((backward, {"chunk": chunk}) for chunk in (None, 1, 2, 5, 256))]
    for run, more in runs:
        policy.widest = 0
        gradient, out = gradient_of(run, policy, *arguments, **more)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
        for found, truth in ((out.loss, loss), (out.logratio_win, ratio_win), (out.logratio_lose, ratio_lose)):
            torch.testing.assert_close(found.detach(), truth.detach(), rtol=1e-8, atol=1e-10)
        assert policy.widest <= (more.get("chunk") or 1000)
    assert float(expected.norm()) > 0.1 and not out.loss.requires_grad


def test_the_scale_and_the_mean_over_elements_divide_the_log_ratio_and_its_gradient():
    policy, reference = Curved(1), Curved(2)
    rest = (policy, reference, *pairs(), SCHEDULE, generators())
    plain, whole = gradient_of(backward, policy, recipe(), *rest)
    changed = recipe(log_ratio={"reduction": "mean", "scale": 0.5}, beta=BETA * 2 * SIZE)
    gradient, out = gradient_of(backward, policy, changed, *rest)
    torch.testing.assert_close(out.logratio_win, whole.logratio_win / (2 * SIZE))
    torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize("divergence", [{}, {"divergence": "hutchinson", "probes": 1, "order": 1}], ids=["exact", "1"])
def test_gaussians_give_the_closed_form(divergence):
    """The Jacobian is a number times the identity, of which one probe tells everything in one product."""

    def log_density(model, x0):
        x, log_det = x0, torch.zeros((), dtype=torch.float64)
        for scale, factor, told in coefficients(N, "previous"):
            slope, offset = model.affine(float(ABAR[told]))
            x, log_det = (scale + factor * slope) * x + factor * offset, log_det + (scale + factor * slope).log()
        return log_normal(x) + SIZE * log_det

    policy, reference = Gaussian(0.4, -0.9), Gaussian(0.1, -0.7)
    win, lose, _ = pairs()
    ratios = [log_density(policy, x0) - log_density(reference, x0) for x0 in (win, lose)]
    loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])).mean()
    expected = torch.stack(torch.autograd.grad(loss, list(policy.parameters())))
    arguments = (recipe(**divergence), policy, reference, win, lose, None, SCHEDULE, generators())
    for run in (preference_loss, backward):
        gradient, out = gradient_of(run, policy, *arguments)
        torch.testing.assert_close(out.logratio_win.detach(), ratios[0].detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


def test_a_unet_against_finite_differences_of_its_log_probability():
    """Through attention, whose fused kernels have no second derivative."""
    (model, unet), (other, other_unet) = tiny_model(), tiny_model()
    win, lose, _ = pairs(2, (4, 2, 2))
    cond = Conditioning(latents(2, (3, 8), seed=2))
    g = torch.Generator().manual_seed(4)
    direction = {p: torch.randn(p.shape, generator=g, dtype=torch.float64) for p in unet.parameters()}

    def difference(length):
        with torch.no_grad():
            for p, start in zip(unet.parameters(), other_unet.parameters(), strict=True):
                p.copy_(start + length * direction[p])
        win_, lose_ = (log_prob(model, x0, cond, SCHEDULE, 3, label="previous") for x0 in (win, lose))
        unet.load_state_dict(other_unet.state_dict())
        return win_ - lose_

    h = 1e-6
    slope = ((difference(h) - difference(-h)) / (2 * h)).mean()
    out = backward(recipe(steps=3), model, other, win, lose, cond, SCHEDULE, generators(2), chunk=64)
    assert torch.count_nonzero(torch.cat([out.logratio_win, out.logratio_lose])) == 0
    assert float(out.loss) == pytest.approx(math.log(2), rel=1e-15)
    found = sum(float((p.grad * d).sum()) for p, d in direction.items())
    assert found == pytest.approx(-BETA / 2 * float(slope), rel=1e-5)
    assert abs(found) > 1e-2


# --- random probes ------------------------------------------------------------------------------------------------


def every_sign(shape, generator, like):
    """In the place of random signs: all of them, once each."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=shape[-1])))
    return signs[:, None].expand(shape).to(like)


def test_all_signs_at_full_order_are_exact(monkeypatch):
    monkeypatch.setattr(likelihood, "random_signs", every_sign)
    policy, reference = Curved(1), Curved(2)
    rest = (policy, reference, *pairs(), SCHEDULE, generators())
    expected, exact = gradient_of(backward, policy, recipe(), *rest)
    for run, more in ((preference_loss, {}), (backward, {"chunk": 3}), (backward, {"chunk": None})):
        gradient, out = gradient_of(run, policy, recipe("hutchinson", 2**SIZE, SIZE), *rest, **more)
        torch.testing.assert_close(out.logratio_win.detach(), exact.logratio_win, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_probes_are_unbiased():
    """Policy and reference are equal, so that every slope is -beta/2 and the loss's gradient linear in the probes'."""
    policy, reference, runs, copies = Curved(1), Curved(1), 40, 16
    one = pairs(1)
    expected, _ = gradient_of(backward, policy, recipe(), policy, reference, *one, SCHEDULE, generators(1))
    win, lose, cond = (
        one[0].expand(copies, *SHAPE),
        one[1].expand(copies, *SHAPE),
        one[2].map(lambda v: v.expand(copies, -1, -1)),
    )
    drawn, g = recipe("hutchinson", 1, SIZE), torch.Generator().manual_seed(0)
    found = [
        gradient_of(backward, policy, drawn, policy, reference, win, lose, cond, SCHEDULE, g)[0] for _ in range(runs)
    ]
    found = torch.stack(found)
    error = (found.mean(dim=0) - expected) / (found.std(dim=0) / runs**0.5)
    assert float(error.abs().max()) < 4
    noise = float(found.std(dim=0).norm() / expected.norm())
    assert 0.1 < noise * copies**0.5 and noise / runs**0.5 < 0.05  # there was something to average, and it was

    win, cond = one[0].expand(1000, *SHAPE), one[2].map(lambda v: v.expand(1000, -1, -1))
    with torch.no_grad():
        values = preference_loss(drawn, policy, Curved(2), win, win, cond, SCHEDULE, g).logratio_win
    truth = float((true_log_prob(policy, *one[::2]) - true_log_prob(Curved(2), *one[::2])).detach())
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 1000**0.5 < 0.1 * abs(truth)


def test_more_probes_are_less_noisy_and_longer_krylov_spaces_less_wrong(monkeypatch):
    policy = Curved(1, 8)
    rest = (policy, Curved(2, 8), *pairs(2, (1, 8, 1)), SCHEDULE)
    expected, _ = gradient_of(backward, policy, recipe(), *rest, generators(2))

    def error(probes, order, seed=0):
        drawn = [torch.Generator().manual_seed(100 * seed + i) for i in range(2)]
        found, _ = gradient_of(backward, policy, recipe("hutchinson", probes, order), *rest, drawn, chunk=20_000)
        return float((found - expected).norm() / expected.norm())

    one, many = (sum(error(probes, 8, seed) for seed in range(5)) / 5 for probes in (1, 64))
    assert many < one / 4
    monkeypatch.setattr(likelihood, "random_signs", every_sign)
    truncated = [error(2**8, order) for order in (1, 2, 4, 8)]
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(truncated)), truncated


@pytest.mark.parametrize("count", [1, 3])
def test_streaming_is_the_full_graph_for_any_probes(count):
    policy, reference = Curved(1), Curved(2)
    rest = (policy, reference, *pairs(count), SCHEDULE)
    spec = recipe("hutchinson", 4, 2)
    expected, full = gradient_of(preference_loss, policy, spec, *rest, generators(count))
    for chunk in (None, 1, 3, 7, 100):
        gradient, out = gradient_of(backward, policy, spec, *rest, generators(count), chunk=chunk, loss_scale=3.0)
        torch.testing.assert_close(gradient, 3 * expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out.loss, full.loss.detach(), rtol=1e-12, atol=0)


def test_a_pair_shares_its_probes_with_no_other():
    policy, reference = Curved(1), Curved(2)
    win, _, cond = pairs()
    spec = recipe("hutchinson", 1, 2)
    same = Conditioning(cond.embeds[:1].expand(3, -1, -1))
    out = preference_loss(spec, policy, reference, win[:1].expand(3, -1, -1, -1), win, same, SCHEDULE, generators())
    assert out.logratio_win.unique().numel() == 3
    assert torch.equal(out.logratio_win[0], out.logratio_lose[0])


def test_it_is_the_truth_of_the_precision_experiment():
    policy, reference = Curved(1), Curved(2)
    held = Pairs(*pairs(4))
    truth = true_log_prob_of(policy, held, SCHEDULE, N) - true_log_prob_of(reference, held, SCHEDULE, N)
    values, evals = surrogate(recipe(), policy, reference, held, SCHEDULE, draws=1, seed=0, chunk=6)
    torch.testing.assert_close(values, truth, rtol=1e-9, atol=1e-10)
    assert evals == 2 * N * (2 + 2 * SIZE)


def test_values_without_a_graph_are_the_same():
    policy, reference = Curved(1), Curved(2)
    arguments = (recipe("hutchinson", 2, 3), policy, reference, *pairs(), SCHEDULE)
    with torch.no_grad():
        plain = preference_loss(*arguments, generators())
    whole = preference_loss(*arguments, generators())
    assert torch.equal(plain.logratio_win, whole.logratio_win.detach()) and not plain.loss.requires_grad
    assert plain.unet_evals == whole.unet_evals - 3 * 2 * N * 6


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [{}, {"divergence": "hutchinson", "probes": 1, "order": 3}], ids=["exact", "1"])
def test_it_leaves_the_reference_and_raises_winners_over_losers(divergence):
    policy, reference = Curved(1), Curved(1)
    win, lose, cond = pairs(8)

    def margin():
        at = [log_prob(policy, x0, cond, SCHEDULE, N, label="previous") for x0 in (win, lose)]
        return at[0] - at[1]

    before, g = margin(), torch.Generator().manual_seed(0)
    first = backward(recipe(**divergence), policy, reference, win, lose, cond, SCHEDULE, g)
    assert torch.count_nonzero(first.logratio_win) == 0 and float(policy.gradient().norm()) > 0.1
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        backward(recipe(**divergence), policy, reference, win, lose, cond, SCHEDULE, g)
        optimizer.step()
    assert float((margin() - before).mean()) > 0.05


def test_evaluations_are_counted_as_the_docstring_says():
    """A forward pass is 1, a product with a Jacobian 2, and the way back through both of them 6."""
    probes, order, rows = 2, 3, 4
    spec = recipe("hutchinson", probes, order)
    policy, reference = Curved(1), Curved(2)
    arguments = (spec, policy, reference, *pairs(2), SCHEDULE, generators(2))
    value = N * rows * (1 + probes * (1 + 2 * order))
    out = backward(*arguments, chunk=2 * N * rows)
    assert reference.latents == N * rows * (1 + probes)
    assert policy.latents == N * rows * (1 + 2 * probes)
    assert out.unet_evals == 2 * value + N * rows * probes * 9
    out = backward(*arguments, chunk=1)
    assert out.unet_evals == 2 * N * rows * (2 + 2 * probes * order) + N * rows * probes * 9
    out = preference_loss(*arguments)
    assert out.unet_evals == 2 * N * rows * (2 + 2 * probes * order) + N * rows * probes * 3


@pytest.mark.parametrize("count", [1, 2])
def test_memory_for_gradients_is_flat_in_the_number_of_steps(count):
    peaks = []
    for steps in (5, 40):
        _Saved.alive = _Saved.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
            spec = recipe("hutchinson", 2, 2, steps=steps)
            backward(spec, Curved(1), Curved(2), *pairs(count), SCHEDULE, generators(count), chunk=4)
        peaks.append(_Saved.peak)
    assert peaks[0] == peaks[1] > 0


# --- refusals -----------------------------------------------------------------------------------------------------


class Slope(torch.autograd.Function):
    """The identity, with a derivative that it has not."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(slope)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def test_networks_without_a_density_are_refused():
    win, lose, cond = pairs()

    def refused(match, policy, spec, **more):
        with pytest.raises(InvdpoError, match=match):
            backward(spec, policy, Curved(2), win, lose, cond, SCHEDULE, generators(), **more)

    def steep(x, t, cond):
        return Slope.apply(0.5 * x, torch.where(t == 1, math.inf, 1.0)[:, None, None, None])

    exact, drawn = recipe(), recipe("hutchinson", 1, 3)
    for spec in (exact, drawn):
        refused("non-finite noise in step 3", lambda x, t, c: x / (t[0] != 201), spec)
        refused("no gradient in x", torch.no_grad()(Curved(1)), spec)
        refused("chunk is 0", Curved(1), spec, chunk=0)
    refused(r"Jacobian of inversion step 2 of 5 \(from timestep 1 to 201\) is singular or not finite", steep, exact)
    refused("derivative in one of 5 steps is not finite", steep, drawn)


def test_a_fold_is_no_error():
    """eps = -9 x turns space inside out in a step: log |det| has a value and a gradient there all the same."""

    class Scaling(torch.nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = torch.nn.Parameter(torch.tensor(k, dtype=torch.float64))

        def forward(self, x, t, cond):
            return self.k * x

    policy, reference = Scaling(-9.0), Scaling(0.5)
    win, lose, cond = pairs()
    win, lose = win / 1000, lose / 1000
    with pytest.raises(InvdpoError, match="folds space"):
        log_prob(policy, win, cond, SCHEDULE, N, label="previous")
    loss, *_ = true_loss(policy, reference, win, lose, cond)
    (expected,) = torch.autograd.grad(loss, policy.k)
    for spec in (recipe(), recipe("hutchinson", 1, 2)):
        gradient, out = gradient_of(backward, policy, spec, policy, reference, win, lose, cond, SCHEDULE, generators())
        torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trajectory": {"kind": "forward", "model": "reference", "label": "next"}},
            r"trajectory\.kind: .*'inversion'",
        ),
        ({"trajectory": {"solver": "fixed_point"}}, r"trajectory\.solver: .*'ddim'"),
        ({"trajectory": {"model": "reference"}}, r"trajectory\.model: .*'policy'"),
        ({"trajectory": {"guidance_scale": 2.0}}, r"trajectory\.guidance_scale: .*needs 1"),
        ({"timesteps": "single"}, r"timesteps: .*'all'"),
        ({"timesteps": "subset", "subset_size": 2}, r"timesteps: .*'all'"),
        ({"target": "implied"}, r"target: .*needs 'none'"),
        ({"log_ratio": {"form": "four_term"}}, r"target: 'none' needs log_ratio\.form 'likelihood'"),
        ({"log_ratio": {"over_timesteps": "mean"}}, r"log_ratio\.over_timesteps: .*'sum'"),
        ({"log_ratio": {"weight": "inverse_2alpha"}}, r"log_ratio\.weight: .*'none'"),
        ({"log_ratio": {"sign": "-"}}, r"log_ratio\.sign: only 'two_term'"),
        ({"log_ratio": {"at": "x_prev"}}, r"log_ratio\.at: .*'reference'"),
        ({"reference_dtype": "float16"}, r"reference_dtype: .*'float32'"),
        ({"loss": {"kind": "kto", "positive_share": 0.5}}, r"loss\.kind: .*needs 'dpo'"),
        ({"loss": {"kind": "winner_only"}}, r"log_ratio\.form: .*'denoising'"),
        ({"loss": {"kind": "dspo"}}, r"log_ratio\.form: .*'four_term'"),
        ({"pair_draws": "independent"}, "pair_draws: "),
        ({"log_ratio": {"divergence": None}}, r"log_ratio\.divergence: .*'exact' or 'hutchinson'"),
        ({"log_ratio": {"divergence": "trace"}}, r"log_ratio\.divergence: .*'trace'"),
        ({"log_ratio": {"divergence": "exact"}}, r"log_ratio\.probes: only"),
        ({"log_ratio": {"divergence": "exact", "probes": None}}, r"log_ratio\.order: only"),
        ({"log_ratio": {"probes": None}}, r"log_ratio\.probes: .*needs"),
        ({"log_ratio": {"probes": 0}}, r"log_ratio\.probes: .*got 0"),
        ({"log_ratio": {"order": None}}, r"log_ratio\.order: .*needs"),
    ],
)
def test_slots_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InvdpoError, match=message):
        load_recipe("likelihood_dpo").with_overrides(changes)


@pytest.mark.parametrize("key", ["divergence", "probes", "order"])
def test_only_this_form_takes_determinants(key):
    value = "exact" if key == "divergence" else 2
    with pytest.raises(InvdpoError, match=rf"log_ratio\.{key}: only log_ratio\."):
        load_recipe("diffusion_dpo").with_overrides({"log_ratio": {key: value}})
