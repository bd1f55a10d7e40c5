"""log p(x_0) against closed forms, its own normalisation, and a Jacobian of the whole map; float64 throughout."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel

from invdpo.backbones.pipeline import UNetEps
from invdpo.errors import InvdpoError
from invdpo.inversion import invert
from invdpo.likelihood import log_prob, log_prob_estimate
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

MEAN, STD = 0.7, 0.5
SHAPE = (2, 3, 1)
SIZE = math.prod(SHAPE)
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULE = NoiseSchedule(ABAR, 1.0, 1, 1000)


def abar(t):
    return float(ABAR[t]) if t >= 0 else 1.0


def coefficients(steps, label):
    """(c, d, told) a step, of x_t = c x_{t-1} + d eps(x_{t-1}, told)."""
    for i in range(steps):
        t = 1 + i * (1000 // steps)
        a, b = abar(t - 1000 // steps), abar(t)
        yield (
            (b / a) ** 0.5,
            (1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5,
            t if label == "next" else max(t - 1000 // steps, 0),
        )


def log_normal(x, mean=0.0, std=1.0):
    return -0.5 * (((x - mean) / std) ** 2 + math.log(2 * math.pi * std**2)).flatten(1).sum(dim=1)


def latents(count, shape=SHAPE, seed=1):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(x, t, cond):
    """E[eps | x_t] of data N(MEAN, STD^2)."""
    a = SCHEDULE.alpha_bar(t).to(x)[:, None, None, None]
    return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)


class Linear:
    """eps = embeds A x + b: a full matrix that is not symmetric, for each latent scaled by its own conditioning."""

    def __init__(self, size=SIZE, seed=3):
        g = torch.Generator().manual_seed(seed)
        self.a = torch.eye(size, dtype=torch.float64) * 0.6
        self.a += 0.4 / size**0.5 * torch.randn(size, size, dtype=torch.float64, generator=g)
        self.b = torch.randn(size, dtype=torch.float64, generator=g)
        self.seen = []

    def __call__(self, x, t, cond):
        self.seen.append(len(x))
        scale = 1.0 if cond is None else cond.embeds[:, 0, :1]
        return (scale * (x.flatten(1) @ self.a.T) + self.b).view_as(x)


CENTRES = torch.tensor([[1.2, 0.4], [-0.8, 0.9], [0.1, -1.3]], dtype=torch.float64)
WEIGHTS, SPREADS = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.35, 0.5, 0.25]).double()


def mixture(x, t, cond):
    """E[eps | x_t] of three Gaussians in the plane, x (B,2,1,1)."""
    a = SCHEDULE.alpha_bar(t).to(x)[:, None]
    variance = a * SPREADS**2 + 1 - a  # (B,3)
    offset = x.flatten(1)[:, None] - a.sqrt()[..., None] * CENTRES  # (B,3,2)
    share = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance) - variance.log()).softmax(-1)
    return ((1 - a).sqrt() * (share[..., None] * offset / variance[..., None]).sum(1)).view_as(x)


def tiny_model():
    """An eps-model of random weights around eps = x, near which no step folds space, and its UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    unet = unet.double().eval()
    return lambda x, t, cond: x + 0.3 * UNetEps(unet)(x, t, cond), unet


@pytest.mark.parametrize("label", ["next", "previous"])
def test_gaussian_data_give_the_closed_form_of_the_affine_map(label):
    x0 = MEAN + STD * latents(5)
    x, log_det = x0, 0.0
    for c, d, told in coefficients(20, label):
        k = (1 - abar(told)) ** 0.5 / (abar(told) * STD**2 + 1 - abar(told))
        x, log_det = c * x + d * k * (x - abar(told) ** 0.5 * MEAN), log_det + SIZE * math.log(c + d * k)
    actual = log_prob(gaussian, x0, None, SCHEDULE, steps=20, label=label)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, log_normal(x) + log_det, rtol=0, atol=1e-10)


def test_the_density_of_gaussian_data_is_approached_as_n_grows():
    x0 = MEAN + STD * latents(5)
    errors = {}
    for label in ("next", "previous"):
        for n in (25, 50, 100, 200):  # a grid of N that divides T reaches the last level
            error = log_prob(gaussian, x0, None, SCHEDULE, n, label=label) - log_normal(x0, MEAN, STD)
            errors.setdefault(label, []).append(float(error.abs().mean()))
        assert all(later < 0.62 * earlier for earlier, later in pairwise(errors[label])), errors
    assert errors["next"][-1] < 0.1 and errors["previous"][-1] < 0.06, errors


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_full_matrix_and_guidance(guidance_scale):
    x0, model = latents(4), Linear()
    scale = torch.tensor([0.5, 1.0, 1.4, 0.7], dtype=torch.float64)
    cond = Conditioning(scale[:, None, None], uncond=Conditioning(torch.full((4, 1, 1), 0.8, dtype=torch.float64)))
    actual = log_prob_estimate(model, x0, cond, SCHEDULE, 10, guidance_scale=guidance_scale, chunk=3)
    log_det = 0.0
    for c, d, _ in coefficients(10, "next"):
        factor = 0.8 + guidance_scale * (scale - 0.8)
        jacobian = c * torch.eye(SIZE, dtype=torch.float64) + d * factor[:, None, None] * model.a
        log_det = log_det + torch.linalg.det(jacobian).log()
    assert max(model.seen) == (3 if guidance_scale == 1 else 2)
    # Of four latents, three go together and the last is there three times; with guidance each goes alone, twice.
    assert actual.unet_evals == 10 * (3 * (1 + 2 * 6) + 3 * (1 + 2 * 2) if guidance_scale == 1 else 4 * 2 * (1 + 2 * 6))
    end = invert(model, x0, cond, SCHEDULE, 10, guidance_scale=guidance_scale).latents[-1]
    torch.testing.assert_close(actual.value, log_normal(end) + log_det, rtol=0, atol=1e-10)
    assert not actual.standard_error.any()


def test_a_mixture_integrates_to_one():
    axis = torch.linspace(-3.6, 3.6, 61, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, :, None, None]
    for label in ("next", "previous"):
        density = log_prob(mixture, points, None, SCHEDULE, 40, label=label, chunk=30_000).exp()
        assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-3)


def test_a_unet_against_the_jacobian_of_the_whole_map():
    (model, unet), x0 = tiny_model(), latents(2, (4, 2, 2))
    cond = Conditioning(latents(2, (3, 8), seed=2))

    def whole(x):
        for i, (_, _, told) in enumerate(coefficients(3, "next")):
            t = torch.full((2,), told)
            x = SCHEDULE.ddim_inverse_step(x, model(x, t, cond), 1 + (i - 1) * 333, 1 + i * 333)
        return x

    jacobian = torch.autograd.functional.jacobian(whole, x0).flatten(1, 3).flatten(2, 5)  # (B,D,B*D)
    blocks = torch.stack([jacobian[i, :, i * 16 : (i + 1) * 16] for i in range(2)])
    expected = log_normal(whole(x0).detach()) + torch.linalg.slogdet(blocks).logabsdet
    actual = log_prob(model, x0, cond, SCHEDULE, steps=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert not actual.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_hutchinson_on_a_unet():
    (model, _), x0 = tiny_model(), latents(2, (4, 2, 2))
    cond = Conditioning(latents(2, (3, 8), seed=2))
    exact = log_prob(model, x0, cond, SCHEDULE, 10)
    estimate = log_prob_estimate(model, x0, cond, SCHEDULE, 10, "hutchinson", probes=24)
    assert ((estimate.value - exact).abs() < 4 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.01 * exact.abs()).all()
    longer = log_prob(model, x0, cond, SCHEDULE, 10, "hutchinson", probes=24, order=16)  # nothing left to add
    torch.testing.assert_close(longer, estimate.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "steps"),
    [(Linear(), SHAPE, 10), (Linear(24, seed=4), (2, 3, 4), 5), (mixture, (2, 1, 1), 40)],
    ids=["6 dimensions", "24 dimensions", "mixture"],
)
def test_hutchinson_errs_by_its_standard_error(model, shape, steps):
    x0 = latents(64, shape)
    exact = log_prob(model, x0, None, SCHEDULE, steps)
    errors = {}
    for probes in (16, 64):
        estimate = log_prob_estimate(model, x0, None, SCHEDULE, steps, "hutchinson", probes=probes, chunk=4096)
        standardised = (estimate.value - exact) / estimate.standard_error
        assert 0.75 < float(standardised.square().mean().sqrt()) < 1.25
        assert abs(float(standardised.mean())) < 0.4
        errors[probes] = float(estimate.standard_error.mean())
    assert errors[64] == pytest.approx(errors[16] / 2, rel=0.1)


def test_hutchinson_is_exact_where_the_probes_cannot_differ():
    """Signs square to one, so a diagonal Jacobian has no spread; here its stretch is far beyond log(1 + a)'s series."""
    slopes = torch.tensor([60.0, 20.0, 5.0, 1.0, 0.2, 0.0], dtype=torch.float64)

    def diagonal(x, t, cond):
        return (x.flatten(1) * slopes).view_as(x)

    x0 = torch.zeros(3, *SHAPE, dtype=torch.float64)  # stays there; elsewhere |x_T|^2 would drown the determinant
    for model, order in ((diagonal, SIZE), (diagonal, 50), (gaussian, 1), (gaussian, 4)):
        exact = log_prob(model, x0, None, SCHEDULE, 10)
        estimate = log_prob_estimate(model, x0, None, SCHEDULE, 10, "hutchinson", probes=3, order=order)
        torch.testing.assert_close(estimate.value, exact, rtol=0, atol=1e-9)
        assert float(estimate.standard_error.max()) < 1e-9
    exact = log_prob(diagonal, x0, None, SCHEDULE, 10)
    truncated = [log_prob(diagonal, x0, None, SCHEDULE, 10, "hutchinson", order=k) for k in range(1, 6)]
    errors = [float((value - exact).abs().max()) for value in truncated]
    assert errors[0] > 1 and all(later < 0.5 * earlier for earlier, later in pairwise(errors)), errors


def test_models_that_share_probes_differ_with_less_noise():
    reference, policy, x0 = Linear(24), Linear(24), latents(8, (2, 3, 4))
    policy.a = 1.02 * reference.a
    runs = torch.stack(
        [
            torch.stack(
                [
                    log_prob(model, x0, None, SCHEDULE, 5, "hutchinson", generator=torch.Generator().manual_seed(seed))
                    for model in (policy, reference)
                ]
            )
            for seed in range(20)
        ]
    )
    assert float((runs[:, 0] - runs[:, 1]).std(dim=0).mean()) < 0.1 * float(runs[:, 0].std(dim=0).mean())


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_chunk_changes_only_the_count(divergence):
    x0 = latents(5)
    cond = Conditioning(torch.rand(5, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    whole = log_prob_estimate(Linear(), x0, cond, SCHEDULE, 4, divergence, chunk=1000)
    for chunk in (1, 2, 12):
        model = Linear()
        part = log_prob_estimate(model, x0, cond, SCHEDULE, 4, divergence, chunk=chunk)
        torch.testing.assert_close(part.value, whole.value, rtol=0, atol=1e-10)
        torch.testing.assert_close(part.standard_error, whole.standard_error, rtol=0, atol=1e-10)
        assert max(model.seen) <= chunk
        if chunk == 1:
            products = SIZE if divergence == "exact" else 8 * 6
            assert part.unet_evals == 4 * 5 * (1 + 2 * products)
            assert sum(model.seen) == 4 * 5


def test_bad_arguments_and_models_are_named():
    x0 = latents(2, (1, 3, 1))

    def flipping(x, t, cond):
        return -9 * x

    def refused(match, model=gaussian, cond=None, steps=4, **options):
        with pytest.raises(InvdpoError, match=match):
            log_prob(model, x0, cond, SCHEDULE, steps, **options)

    refused("divergence.*'trace'", divergence="trace")
    refused("probes is 1", probes=1)
    refused("order is 0", order=0)
    refused("chunk is 0", chunk=0)
    refused(r"trajectory\.steps is 0", steps=0)
    refused(r"trajectory\.steps", steps=1001)
    refused(r"trajectory\.guidance_scale", guidance_scale=2.0)
    refused(r"non-finite.*step 3 of 4 \(from timestep 251 to 501\)", model=lambda x, t, c: x / (t[0] != 501))
    refused("step 1 of 4.*no gradient", model=torch.no_grad()(gaussian))
    refused("folded is 'drop'", folded="drop")
    for divergence in ("exact", "hutchinson"):
        refused(r"step 2 of 4 \(from timestep 1 to 251\) folds space at 2 of 2", model=flipping, divergence=divergence)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_folded_latents_can_be_marked(divergence):
    x0 = latents(3, (1, 3, 1))
    cond = Conditioning(torch.tensor([1.0, -9.0, 1.0], dtype=torch.float64)[:, None, None])

    def model(x, t, cond):
        return cond.embeds[:, :, :, None] * x

    whole = log_prob_estimate(model, x0, cond, SCHEDULE, 4, divergence, folded="nan")
    assert whole.value.isnan().tolist() == [False, True, False]
    kept = torch.tensor([0, 2])
    alone = log_prob(model, x0[kept], cond.map(lambda value: value[kept]), SCHEDULE, 4, divergence)
    torch.testing.assert_close(whole.value[kept], alone, rtol=0, atol=1e-10)  # its probes differ, but not tr log(cI)
