"""Schedule arithmetic against diffusers' own schedulers, on Stable Diffusion 1.5's scheduler config."""

import pytest
import torch
from diffusers.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from invdpo.errors import InvdpoError
from invdpo.schedule import NoiseSchedule

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "trained_betas": None,
}


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.from_scheduler(DDIMScheduler.from_config(SD15))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("n", [1, 10, 20, 40, 80, 999])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_ddims(n, offset):
    theirs = DDIMScheduler.from_config(SD15 | {"steps_offset": offset})
    theirs.set_timesteps(n)
    ours = NoiseSchedule.from_scheduler(theirs).timesteps(n)
    assert ours.dtype == torch.int64
    assert ours.tolist() == theirs.timesteps.tolist()[::-1]


def test_released_code_grid():
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(SD15)).with_offset(0)
    assert [(int(schedule.timesteps(n)[0]), int(schedule.timesteps(n)[-1])) for n in (20, 40, 80)] == [
        (0, 950),
        (0, 975),
        (0, 948),
    ]


def test_add_noise_is_diffusers(schedule, tensors):
    x0, noise = tensors
    t = torch.tensor([0, 499, 999])
    theirs = DDIMScheduler.from_config(SD15).add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.implied_noise(theirs, x0, t), noise, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("n", [10, 20, 40, 80])
@pytest.mark.parametrize("to_one", [False, True])
def test_every_step_is_ddims_and_its_inverse(n, to_one, tensors):
    x, eps = tensors
    config = SD15 | {"set_alpha_to_one": to_one}
    down, up = DDIMScheduler.from_config(config), DDIMInverseScheduler.from_config(config)
    down.set_timesteps(n)
    up.set_timesteps(n)
    schedule = NoiseSchedule.from_scheduler(down)
    for t in schedule.timesteps(n).tolist():
        t_prev = schedule.previous(t, n)
        stepped = schedule.ddim_step(x, eps, t, t_prev)
        inverted = schedule.ddim_inverse_step(x, eps, t_prev, t)
        torch.testing.assert_close(stepped, down.step(eps, t, x).prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inverted, up.step(eps, t, x).prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            schedule.ddim_step(inverted.double(), eps.double(), t, t_prev), x.double(), rtol=1e-4, atol=1e-5
        )


def test_a_step_takes_one_timestep_a_sample(schedule, tensors):
    x, eps = tensors
    t = torch.tensor([51, 501, 1])
    together = schedule.ddim_inverse_step(x, eps, schedule.previous(t, 20), t)
    for i in range(3):
        alone = schedule.ddim_inverse_step(x[i : i + 1], eps[i : i + 1], int(t[i]) - 50, int(t[i]))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_alpha_bar_of_the_clean_level(schedule):
    a = schedule.alpha_bar(torch.tensor([-49, 0, 999]))
    assert a[0] == a[1] == schedule.final_alpha_cumprod  # set_alpha_to_one False
    assert float(schedule.alpha_bar(999)) == pytest.approx(0.0047, abs=1e-4)
    to_one = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(SD15 | {"set_alpha_to_one": True}))
    assert float(to_one.alpha_bar(-1)) == 1.0


def test_half_precision_keeps_its_type_and_loses_nothing_but_rounding(schedule, tensors):
    x, eps = (tensor.bfloat16() for tensor in tensors)
    stepped = schedule.ddim_inverse_step(x, eps, 451, 501)
    assert stepped.dtype == torch.bfloat16
    exact = schedule.ddim_inverse_step(x.double(), eps.double(), 451, 501)
    torch.testing.assert_close(stepped.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding of the result


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_any_scheduler_class_gives_the_schedule_of_ddim(scheduler_class):
    for config in (SD15, {key: SD15[key] for key in ("beta_start", "beta_end", "beta_schedule")}):
        scheduler = scheduler_class.from_config(config)
        theirs = DDIMScheduler.from_config(scheduler.config)
        theirs.set_timesteps(20)
        ours = NoiseSchedule.from_scheduler(scheduler)
        assert ours.timesteps(20).tolist() == theirs.timesteps.tolist()[::-1]
        assert ours.final_alpha_cumprod == pytest.approx(float(theirs.final_alpha_cumprod), rel=1e-6)
        assert torch.equal(ours.alphas_cumprod.float(), theirs.alphas_cumprod)


@pytest.mark.parametrize("n", [0, -1, 1001, 1000])
def test_impossible_grids_name_the_field(schedule, n):
    with pytest.raises(InvdpoError, match=r"trajectory\.steps"):  # 1000 + offset 1 would need timestep 1000
        schedule.timesteps(n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"timestep_spacing": "trailing"}, "trailing"),
        ({"rescale_betas_zero_snr": True}, "alphas_cumprod"),
    ],
)
def test_unusable_schedulers(changes, message):
    with pytest.raises(InvdpoError, match=message):
        NoiseSchedule.from_scheduler(DDIMScheduler.from_config(SD15 | changes))
