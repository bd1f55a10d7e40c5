"""Every inverter against closed forms, its own sampler, and diffusers."""

from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep_inverse import DPMSolverMultistepInverseScheduler

from invdpo.errors import InvdpoError
from invdpo.inversion import fixed_point, invert, invert_to, renoise, round_trip, round_trip_error, sample_back
from invdpo.inversion import step_residual as residual_of
from invdpo.inversion.trajectory import SOLVERS
from invdpo.objectives.recipe import TrajectorySpec
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

MEAN, STD = 0.7, 0.5
RUNS = [(name, label) for name, solver in SOLVERS.items() for label in solver.labels]
ONE_EPS = [run for run in RUNS if run[0] != "edict"]


def make_schedule(offset=1):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = torch.cumprod(1 - betas, 0)
    return NoiseSchedule(table, float(table[0]), offset, 1000)


def even_schedule(steps):
    """960 equal steps of log-SNR from 2 to -2, on which an N-step grid divides the same interval evenly: without the
    crowding of log-SNR at the clean end, the order of a solver shows at few steps."""
    table = torch.sigmoid(2 * torch.linspace(2, -2, 961, dtype=torch.float64))
    return NoiseSchedule(table, float(table[0]), 961 // steps, 961)


class Counting:
    """Counts the latents that a model is shown."""

    def __init__(self, model):
        self.model, self.latents = model, 0

    def __call__(self, x, t, cond):
        self.latents += len(x)
        return self.model(x, t, cond)


def gaussian(schedule):
    """E[eps | x_t] of data N(MEAN, STD^2)."""

    def model(x, t, cond):
        a = schedule.alpha_bar(t).to(x)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return model


def flow(schedule, x0, t):
    """Where the Gaussian's deterministic flow carries x0 from the clean level to t: it keeps the standardised value."""

    def spread(t):
        a = schedule.alpha_bar(t)
        return a.sqrt() * MEAN, (a * STD**2 + 1 - a).sqrt()

    (centre, scale), (centre_t, scale_t) = spread(-1), spread(t)
    return centre_t + scale_t * (x0 - centre) / scale


def nonlinear(x, t, cond):
    """A prediction of no particular meaning, in which all elements of a latent and the timestep interact."""
    return torch.sin(3 * x + t[:, None, None, None] / 100) + 0.5 * x.roll(1, dims=1) * x.mean(
        dim=(1, 2, 3), keepdim=True
    )


def guided_by(x, t, cond):
    return 0.3 * x * cond.embeds[:, 0, 0][:, None, None, None]


@pytest.fixture
def x0():
    return MEAN + STD * torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_recipe_can_name_every_solver():
    assert set(TrajectorySpec.model_fields["solver"].annotation.__args__) == set(SOLVERS)
    assert all(name == solver.name for name, solver in SOLVERS.items())


# Order and accuracy


@pytest.mark.parametrize(("solver", "low", "high"), [("ddim", 1.8, 2.2), ("dpm_solver", 3.5, 4.5)])
def test_order_of_convergence_to_the_closed_form_flow(x0, solver, low, high):
    """The error of x_T halves with N doubled at order one, and falls to a quarter at order two."""
    errors = []
    for n in (20, 40, 80):
        schedule = even_schedule(n)
        trajectory = invert(gaussian(schedule), x0, None, schedule, n, solver, label="previous")
        assert int(trajectory.timesteps[-1]) == 960
        errors.append(float((trajectory.latents[-1] - flow(schedule, x0, 960)).abs().mean()))
    assert all(low < earlier / later < high for earlier, later in pairwise(errors)), errors


def test_dpm_solver_samples_at_second_order_too(x0):
    errors = []
    for n in (20, 40, 80):
        schedule = even_schedule(n)
        x_T = flow(schedule, x0, 960)
        back = sample_back(gaussian(schedule), x_T, None, schedule, n, "dpm_solver")
        errors.append(float((back.latents[0] - x0).abs().mean()))
    assert all(3.3 < earlier / later < 4.7 for earlier, later in pairwise(errors)), errors


def test_more_accurate_inverters_come_back_closer(x0):
    schedule = make_schedule()
    model = gaussian(schedule)
    for n in (10, 20, 40):
        ddim, *others = (
            float(round_trip_error(model, x0, None, schedule, n, name, label=SOLVERS[name].labels[0]).max())
            for name in ("ddim", "renoise", "fixed_point", "dpm_solver", "edict")
        )
        assert all(error < 0.7 * ddim for error in others), (n, ddim, others)


def test_converged_fixed_point_is_undone_by_ddim_sampling(x0):
    schedule = make_schedule()
    converged = fixed_point.solver(calls=30)
    assert float(round_trip_error(gaussian(schedule), x0, None, schedule, 20, converged).max()) < 1e-8
    # Not merely for a model whose every element is on its own.

    def mild(x, t, cond):
        return 0.3 * nonlinear(x, t, cond)

    assert float(round_trip_error(mild, x0, None, schedule, 20, converged).max()) < 1e-8


def test_acceleration_solves_a_linear_step_with_three_calls(x0):
    """One step of memory is the secant method, exact for a scalar linear map; the plain iteration is not."""
    schedule = make_schedule(offset=500)
    trajectory = invert(lambda x, t, cond: 0.4 * x, x0, None, schedule, 1, fixed_point.solver(calls=3))
    expected = schedule.ddim_inverse_step(x0, 0.4 * trajectory.latents[1], -1, 500)
    torch.testing.assert_close(trajectory.latents[1], expected, rtol=1e-12, atol=1e-12)
    plain = invert(lambda x, t, cond: 0.4 * x, x0, None, schedule, 1, renoise.solver(renoisings=2, averaged=1))
    assert float((plain.latents[1] - expected).abs().max()) > 1e-3


def test_step_residual_falls_with_calls_and_is_what_sampling_misses(x0):
    schedule, n = make_schedule(), 20
    means = []
    for calls in (1, 3, 5, 30):
        trajectory = invert(nonlinear, x0, None, schedule, n, fixed_point.solver(calls=calls))
        residual = residual_of(nonlinear, trajectory, None, schedule)
        assert residual.shape == (n, len(x0))
        means.append(float(residual.mean()))
        for i, t in enumerate(trajectory.timesteps.tolist()):
            x, before = trajectory.latents[i + 1], schedule.previous(t, n)
            missed = schedule.ddim_step(x, nonlinear(x, torch.full((5,), t), None), t, before) - trajectory.latents[i]
            shrink = (schedule.alpha_bar(t) / schedule.alpha_bar(before)).sqrt()
            torch.testing.assert_close(residual[i], shrink * missed.square().mean(dim=(1, 2, 3)).sqrt())
    assert all(later < 0.5 * earlier for earlier, later in pairwise(means)), means


@pytest.mark.parametrize(("label", "told"), [("next", 300), ("previous", 0)])
def test_renoise_is_the_mean_of_two_predictions_under_one_label(x0, label, told):
    """The released SmPO loop (train.py:1009-1022), by hand for one step."""
    schedule = make_schedule(offset=300)
    trajectory = invert(nonlinear, x0, None, schedule, 1, "renoise", label=label)
    told = torch.full((5,), told)
    first = nonlinear(x0, told, None)
    second = nonlinear(schedule.ddim_inverse_step(x0, first, -1, 300), told, None)
    torch.testing.assert_close(trajectory.eps[0], (first + second) / 2)
    torch.testing.assert_close(trajectory.latents[1], schedule.ddim_inverse_step(x0, (first + second) / 2, -1, 300))
    assert SOLVERS["renoise"].calls == 2


def test_renoising_averages_the_last_predictions_only(x0):
    schedule = make_schedule(offset=300)
    told = torch.full((5,), 300)
    predictions = [nonlinear(x0, told, None)]
    for _ in range(3):
        predictions.append(nonlinear(schedule.ddim_inverse_step(x0, predictions[-1], -1, 300), told, None))
    solver = renoise.solver(renoisings=3, averaged=2)
    trajectory = invert(nonlinear, x0, None, schedule, 1, solver)
    torch.testing.assert_close(trajectory.eps[0], (predictions[2] + predictions[3]) / 2)


# Exact invertibility


@pytest.mark.parametrize("steps", [1, 10, 40])
def test_edict_returns_x0_for_any_model(x0, steps):
    schedule = make_schedule()
    there, back = round_trip(nonlinear, x0, None, schedule, steps, "edict")
    torch.testing.assert_close(back.latents, there.latents, rtol=1e-10, atol=1e-10)
    assert float((there.latents[-1] - x0).abs().max()) > 0.01
    if steps > 1:
        # The pair is needed: two copies of x_T are another starting point.
        alone = sample_back(nonlinear, there.latents[-1], None, schedule, steps, "edict")
        assert float((alone.latents[0] - x0).abs().max()) > 1e-3
        twice = sample_back(nonlinear, there.latents[-1], None, schedule, steps, "edict", partner=there.latents[-1])
        assert torch.equal(alone.latents, twice.latents)


def test_edict_follows_the_flow_that_it_samples(x0):
    schedule = even_schedule(80)
    trajectory = invert(gaussian(schedule), x0, None, schedule, 80, "edict")
    expected = flow(schedule, x0, 960)
    for end in (trajectory.latents[-1], trajectory.partner):
        torch.testing.assert_close(end, expected, rtol=0, atol=0.05)


# What all share


@pytest.mark.parametrize(("solver", "label"), ONE_EPS)
@pytest.mark.parametrize("offset", [0, 1])
def test_a_ddim_step_with_the_steps_eps_leads_back(x0, solver, label, offset):
    schedule = make_schedule(offset)
    trajectory = invert(nonlinear, x0, None, schedule, 10, solver, label=label)
    for i, t in enumerate(trajectory.timesteps.tolist()):
        back = schedule.ddim_step(trajectory.latents[i + 1], trajectory.eps[i], t, schedule.previous(t, 10))
        torch.testing.assert_close(back, trajectory.latents[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_a_noiseless_clean_level_is_no_singularity(x0, solver, label):
    """set_alpha_to_one: the log-SNR of the clean level is infinite."""
    schedule = make_schedule()
    noiseless = NoiseSchedule(schedule.alphas_cumprod, 1.0, 1, 1000)
    for schedule in (noiseless, noiseless.with_offset(0)):
        there, back = round_trip(gaussian(schedule), x0, None, schedule, 40, solver, label=label)
        assert torch.isfinite(there.eps).all() and torch.isfinite(back.eps).all()
        assert float((back.latents[0] - x0).abs().max()) < 0.4


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_evaluations_are_counted_and_orders_agree(x0, solver, label, steps):
    schedule = make_schedule()
    model = Counting(nonlinear)
    there = invert(model, x0, None, schedule, steps, solver, label=label)
    assert there.latents.shape == (steps + 1, *x0.shape) and there.eps.shape == (steps, *x0.shape)
    assert there.unet_evals == model.latents == steps * 5 * SOLVERS[solver].calls
    assert torch.equal(there.latents[0], x0)
    model = Counting(nonlinear)
    back = sample_back(model, there.latents[-1], None, schedule, steps, solver, partner=there.partner)
    assert back.unet_evals == model.latents == steps * 5 * SOLVERS[solver].calls_back
    assert back.latents.shape == there.latents.shape and torch.equal(back.latents[-1], there.latents[-1])
    assert torch.equal(back.timesteps, there.timesteps)
    error = round_trip_error(nonlinear, x0, None, schedule, steps, solver, label=label)
    torch.testing.assert_close(error, (back.latents[0] - x0).square().mean(dim=(1, 2, 3)).sqrt())


def test_sampling_back_orders_eps_by_timestep(x0):
    schedule = make_schedule()
    back = sample_back(nonlinear, x0, None, schedule, 4)
    for i, t in enumerate(back.timesteps.tolist()):
        torch.testing.assert_close(back.eps[i], nonlinear(back.latents[i + 1], torch.full((5,), t), None))


@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_invert_to_stops_on_the_trajectory(x0, solver, label):
    schedule = make_schedule()
    full = invert(nonlinear, x0, None, schedule, 10, solver, label=label)
    model, rows, index = Counting(nonlinear), torch.arange(5), torch.tensor([3, 10, 1, 7, 3])
    arrival = invert_to(model, x0, None, schedule, index, 10, solver, label=label)
    exact = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(arrival.latents, full.latents[index, rows], **exact)
    torch.testing.assert_close(arrival.previous, full.latents[index - 1, rows], **exact)
    torch.testing.assert_close(arrival.eps, full.eps[index - 1, rows], **exact)
    assert torch.equal(arrival.timesteps, full.timesteps[index - 1])
    assert arrival.unet_evals == model.latents == 24 * SOLVERS[solver].calls


@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_rows_are_independent(x0, solver, label):
    schedule, order = make_schedule(), torch.tensor([3, 0, 4, 2, 1])
    there, back = round_trip(nonlinear, x0, None, schedule, 6, solver, label=label)
    there_, back_ = round_trip(nonlinear, x0[order], None, schedule, 6, solver, label=label)
    torch.testing.assert_close(there_.latents, there.latents[:, order], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(back_.latents, back.latents[:, order], rtol=1e-11, atol=1e-11)
    one = invert(nonlinear, x0[2:3], None, schedule, 6, solver, label=label)
    torch.testing.assert_close(one.latents, there.latents[:, 2:3], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_guidance(x0, solver, label):
    """Guidance of a model that is linear in its conditioning is the same model under another conditioning."""
    schedule = make_schedule()
    cond = Conditioning(torch.full((5, 1, 1), 2.0), uncond=Conditioning(torch.full((5, 1, 1), 0.5)))
    model = Counting(guided_by)
    there, back = round_trip(model, x0, cond, schedule, 4, solver, guidance_scale=3.0, label=label)
    assert there.unet_evals + back.unet_evals == model.latents
    stronger = Conditioning(torch.full((5, 1, 1), 0.5 + 3 * 1.5))
    expected, expected_back = round_trip(guided_by, x0, stronger, schedule, 4, solver, label=label)
    torch.testing.assert_close(there.latents, expected.latents)
    torch.testing.assert_close(back.latents, expected_back.latents)
    assert 2 * (expected.unet_evals + expected_back.unet_evals) == model.latents
    for run in (invert, sample_back):
        with pytest.raises(InvdpoError, match=r"trajectory\.guidance_scale"):
            options = {"label": label} if run is invert else {}
            run(guided_by, x0, cond.without_uncond(), schedule, 4, solver, guidance_scale=3.0, **options)


@pytest.mark.parametrize(("solver", "label"), [("dpm_solver", "next"), ("edict", "previous"), ("ddim", "nxt")])
def test_a_label_without_meaning_for_the_solver(x0, solver, label):
    schedule = make_schedule()
    with pytest.raises(InvdpoError, match=rf"trajectory\.label is '{label}'.*'{solver}'"):
        invert(nonlinear, x0, None, schedule, 4, solver, label=label)
    with pytest.raises(InvdpoError, match=rf"trajectory\.label is '{label}'"):
        invert_to(nonlinear, x0, None, schedule, torch.ones(5, dtype=torch.int64), 4, solver, label=label)


@pytest.mark.parametrize(("solver", "label"), RUNS)
def test_bad_steps_and_predictions(x0, solver, label):
    schedule = make_schedule()

    def broken(x, t, cond):
        return x / 0 if int(t[0]) == 501 else x

    for steps in (0, 1001):
        with pytest.raises(InvdpoError, match=r"trajectory\.steps"):
            invert(broken, x0, None, schedule, steps, solver, label=label)
        with pytest.raises(InvdpoError, match=r"trajectory\.steps"):
            sample_back(broken, x0, None, schedule, steps, solver)
    with pytest.raises(InvdpoError, match=r"inverting model.*non-finite"):
        invert(broken, x0, None, schedule, 4, solver, label=label)
    with pytest.raises(InvdpoError, match=r"sampling model.*step 2 \(timestep 501\)"):
        sample_back(broken, x0, None, schedule, 4, solver)


def test_bad_solver_and_partner(x0):
    with pytest.raises(InvdpoError, match=r"trajectory\.solver.*euler.*known solvers: ddim, dpm_solver, edict"):
        sample_back(nonlinear, x0, None, make_schedule(), 4, "euler")
    with pytest.raises(InvdpoError, match="'ddim' carries one latent.*partner"):
        sample_back(nonlinear, x0, None, make_schedule(), 4, "ddim", partner=x0)


# Parity with diffusers. Its inverse scheduler lays another grid (it starts at a noisy level, and spaces by N + 1), so
# the levels of this study's grid are put in place of its own; the steps between them are then its own arithmetic.

OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "lower_order_final": False}


def test_dpm_inversion_is_diffusers(x0):
    schedule, n = make_schedule(), 12
    trajectory = invert(nonlinear, x0, None, schedule, n, "dpm_solver", label="previous")
    levels = torch.cat([torch.tensor([0]), trajectory.timesteps])
    theirs = DPMSolverMultistepInverseScheduler(**OPTIONS)
    theirs.set_timesteps(n)
    a = schedule.alpha_bar(levels)
    theirs.timesteps, theirs.sigmas = levels[:-1], ((1 - a) / a).sqrt()
    x = x0
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(nonlinear(x, t.expand(5), None), t, x).prev_sample
        torch.testing.assert_close(x, trajectory.latents[i + 1], rtol=1e-8, atol=1e-8)


def test_dpm_sampling_is_diffusers(x0):
    schedule, n = make_schedule(), 12
    trajectory = sample_back(nonlinear, x0, None, schedule, n, "dpm_solver")
    levels = torch.cat([trajectory.timesteps.flip(0), torch.tensor([0])])
    # By default diffusers ends at a level without noise, and so at first order; this grid ends at abar_0. Its sampler
    # computes in float32, unlike its inverter.
    theirs = DPMSolverMultistepScheduler(**OPTIONS, final_sigmas_type="sigma_min")
    theirs.set_timesteps(n)
    a = schedule.alpha_bar(levels)
    theirs.timesteps, theirs.sigmas = levels[:-1], ((1 - a) / a).sqrt()
    x = x0
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(nonlinear(x, t.expand(5), None), t, x).prev_sample
        torch.testing.assert_close(x, trajectory.latents[n - 1 - i], rtol=1e-5, atol=1e-5)
