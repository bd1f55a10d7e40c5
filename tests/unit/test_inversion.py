"""Inversion against a closed-form model: for Gaussian data the exact noise prediction is affine."""

from itertools import pairwise

import pytest
import torch

from invdpo.errors import InvdpoError
from invdpo.inversion import guided, invert, invert_to
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

MEAN, STD = 0.7, 0.5


def make_schedule(offset=1):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = torch.cumprod(1 - betas, 0)
    return NoiseSchedule(table, float(table[0]), offset, 1000)


class Gaussian:
    """E[eps | x_t] of data N(MEAN, STD^2); records the calls it gets."""

    def __init__(self, schedule):
        self.schedule, self.seen = schedule, []

    def __call__(self, x, t, cond):
        self.seen.append((len(x), t.tolist()))
        a = self.schedule.alpha_bar(t).to(x)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)


@pytest.fixture
def x0():
    return MEAN + STD * torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("label", ["next", "previous"])
def test_sampling_undoes_inversion_ever_better_as_n_grows(x0, label):
    schedule = make_schedule()
    model = Gaussian(schedule)
    errors = []
    for n in (10, 20, 40, 80):
        x = invert(model, x0, None, schedule, steps=n, label=label).latents[-1]
        for t in schedule.timesteps(n).flip(0).tolist():
            told = torch.full((len(x),), t)
            x = schedule.ddim_step(x, model(x, told, None), t, schedule.previous(t, n))
        errors.append(float((x - x0).abs().mean()))
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.05


def test_inverted_gaussian_follows_the_closed_form_flow(x0):
    """The deterministic flow of a Gaussian keeps the standardised value: (x_t - sqrt(a) m) / sqrt(a s^2 + 1 - a)."""
    schedule = make_schedule()
    trajectory = invert(Gaussian(schedule), x0, None, schedule, steps=500, label="previous")

    def standardised(x, t):
        a = schedule.alpha_bar(t)
        return (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()

    start = standardised(trajectory.latents[0], -1)
    for i in (100, 300, 500):
        end = standardised(trajectory.latents[i], int(trajectory.timesteps[i - 1]))
        assert float((end - start).abs().max()) < 0.03


def test_shapes_labels_and_count(x0):
    schedule = make_schedule()
    for label, first in (("next", [1, 101, 201]), ("previous", [0, 1, 101])):
        model = Gaussian(schedule)
        trajectory = invert(model, x0, None, schedule, steps=10, label=label)
        assert trajectory.latents.shape == (11, *x0.shape)
        assert trajectory.eps.shape == (10, *x0.shape)
        assert trajectory.timesteps.tolist() == list(range(1, 1000, 100))
        assert torch.equal(trajectory.latents[0], x0)
        assert [call[1][0] for call in model.seen[:3]] == first
        assert trajectory.unet_evals == 50 == sum(rows for rows, _ in model.seen)


def test_the_steps_eps_maps_back_exactly(x0):
    schedule = make_schedule()
    trajectory = invert(Gaussian(schedule), x0, None, schedule, steps=20)
    for i, t in enumerate(trajectory.timesteps.tolist()):
        back = schedule.ddim_step(trajectory.latents[i + 1], trajectory.eps[i], t, schedule.previous(t, 20))
        torch.testing.assert_close(back, trajectory.latents[i], rtol=1e-10, atol=1e-10)


def test_offset_zero_starts_with_an_identity_step(x0):
    schedule = make_schedule(offset=0)
    latents = invert(Gaussian(schedule), x0, None, schedule, steps=20).latents
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [[3, 10, 1, 7, 3], [2, 2, 2, 2, 2]])
def test_invert_to_is_the_trajectory_and_drops_arrived_samples(x0, index):
    schedule = make_schedule()
    full = invert(Gaussian(schedule), x0, None, schedule, steps=10, label="previous")
    model = Gaussian(schedule)
    arrival = invert_to(model, x0, None, schedule, torch.tensor(index), steps=10, label="previous")
    rows = torch.arange(5)
    at = torch.tensor(index)
    assert torch.equal(arrival.latents, full.latents[at, rows])
    assert torch.equal(arrival.previous, full.latents[at - 1, rows])
    assert torch.equal(arrival.eps, full.eps[at - 1, rows])
    assert torch.equal(arrival.timesteps, full.timesteps[at - 1])
    assert arrival.unet_evals == sum(index) == sum(n for n, _ in model.seen)


def test_invert_to_keeps_each_samples_conditioning(x0):
    schedule = make_schedule()
    cond = Conditioning(torch.arange(5, dtype=torch.float64).reshape(5, 1, 1))

    def model(x, t, cond):
        return cond.embeds[:, :, :, None].expand_as(x)

    arrival = invert_to(model, x0, cond, schedule, torch.tensor([1, 4, 2, 4, 3]), steps=4)
    assert arrival.eps[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def conditional(x, t, cond):
    return x * cond.embeds[:, 0, 0][:, None, None, None]


def test_guidance_is_one_call_of_both_halves():
    x, t = torch.randn(3, 2, 2, 2), torch.zeros(3, dtype=torch.int64)
    cond = Conditioning(torch.full((3, 1, 1), 2.0), uncond=Conditioning(torch.full((3, 1, 1), 0.5)))
    sizes = []

    def model(x, t, cond):
        sizes.append(len(x))
        return conditional(x, t, cond)

    torch.testing.assert_close(guided(model, 3.0)(x, t, cond), x * (0.5 + 3 * 1.5))
    assert sizes == [6]
    assert guided(model, 1.0) is model
    trajectory = invert(model, x, cond, make_schedule(), steps=4, guidance_scale=2.0)
    assert trajectory.unet_evals == 24 == sum(sizes[1:])


@pytest.mark.parametrize("cond", [None, Conditioning(torch.ones(5, 1, 1))])
def test_guidance_needs_an_unconditional_half(x0, cond):
    with pytest.raises(InvdpoError, match=r"trajectory\.guidance_scale"):
        invert(conditional, x0, cond, make_schedule(), steps=4, guidance_scale=2.0)


@pytest.mark.parametrize("run", [invert, lambda *a, **k: invert_to(*a, torch.full((5,), 4), **k)])
def test_bad_solver_steps_and_predictions(x0, run):
    schedule = make_schedule()

    def broken(x, t, cond):
        return x / 0 if int(t[0]) == 501 else x

    with pytest.raises(InvdpoError, match=r"trajectory\.solver.*euler"):
        run(broken, x0, None, schedule, steps=4, solver="euler")
    with pytest.raises(InvdpoError, match=r"trajectory\.steps"):
        run(broken, x0, None, schedule, steps=0)
    with pytest.raises(InvdpoError, match=r"timestep 501.*reference_dtype.*trajectory\.guidance_scale"):
        run(broken, x0, None, schedule, steps=4)


@pytest.mark.parametrize("index", [[0, 1, 1, 1, 1], [1, 1, 1, 1, 5], [1, 1]])
def test_impossible_index(x0, index):
    with pytest.raises(InvdpoError, match="index"):
        invert_to(Gaussian(make_schedule()), x0, None, make_schedule(), torch.tensor(index), steps=4)
