"""The tables of the experiment on inversion error, against the trajectories that they sum up."""

import pytest
import torch

from invdpo.errors import InvdpoError
from invdpo.experiments.inversion_error import inversion_errors, side_by_side
from invdpo.inversion import round_trip
from invdpo.inversion.trajectory import SOLVERS
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

ERRORS = [
    *("solver", "label", "steps", "guidance_scale", "latent"),
    *("unet_evals", "rms_error", "terminal_second_moment", "terminal_norm_z"),
]
LEVELS = ["solver", "label", "steps", "guidance_scale", "level", "timestep", "rms_difference"]


@pytest.fixture
def schedule():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = torch.cumprod(1 - betas, 0)
    return NoiseSchedule(table, float(table[0]), 1, 1000)


@pytest.fixture
def x0():
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


COND = Conditioning(torch.full((3, 1, 1), 0.5), uncond=Conditioning(torch.full((3, 1, 1), 0.4)))


def model(x, t, cond):
    return torch.sin(x + t[:, None, None, None] / 300) * cond.embeds[:, 0, 0][:, None, None, None]


def test_tables_sum_up_the_round_trips(schedule, x0):
    solvers, steps, scales = sorted(SOLVERS), [1, 5], [1.0, 2.0]
    result = inversion_errors(model, x0, COND, schedule, solvers, steps, scales)
    errors, levels = result.errors, result.levels
    assert list(errors.columns) == ERRORS and list(levels.columns) == LEVELS
    assert len(errors) == 5 * 2 * 2 * 3 and len(levels) == 5 * 2 * (2 + 6)
    assert not errors.isna().any(axis=None) and not levels.isna().any(axis=None)
    assert list(errors.index) == list(range(len(errors)))
    for solver in solvers:
        label = SOLVERS[solver].labels[0]
        there, back = round_trip(model, x0, COND, schedule, 5, solver, 2.0, label)
        rows = errors.query("solver == @solver and steps == 5 and guidance_scale == 2")
        assert rows.label.unique().tolist() == [label] and rows.latent.tolist() == [0, 1, 2]
        assert rows.unet_evals.tolist() == [2 * 5 * SOLVERS[solver].calls] * 3
        lost = (back.latents[0] - x0).square().mean(dim=(1, 2, 3)).sqrt()
        assert rows.rms_error.tolist() == pytest.approx(lost.tolist(), abs=1e-14)
        norms = there.latents[-1].square().sum(dim=(1, 2, 3))
        assert rows.terminal_second_moment.tolist() == pytest.approx((norms / 32).tolist())
        assert rows.terminal_norm_z.tolist() == pytest.approx(((norms - 32) / 8).tolist())
        rows = levels.query("solver == @solver and steps == 5 and guidance_scale == 2")
        assert rows.level.tolist() == list(range(6)) and rows.timestep.tolist() == [-1, 1, 201, 401, 601, 801]
        apart = [float((a - b).square().mean().sqrt()) for a, b in zip(there.latents, back.latents, strict=True)]
        assert rows.rms_difference.tolist() == pytest.approx(apart, abs=1e-14)
        assert rows.rms_difference.iloc[-1] == 0


def test_a_standard_normal_end_has_no_excess(schedule):
    """A model that predicts what keeps the latents' scale: 2,048 standard-normal elements stay within three sigmas."""

    def keep(x, t, cond):
        return (1 - schedule.alpha_bar(t)).sqrt().to(x)[:, None, None, None] * x

    x0 = torch.randn(8, 2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = inversion_errors(keep, x0, None, schedule, ["dpm_solver"], [200]).errors
    assert errors.terminal_norm_z.abs().max() < 3
    assert errors.terminal_second_moment.mean() == pytest.approx(1, abs=0.05)
    twice = inversion_errors(keep, 2 * x0, None, schedule, ["dpm_solver"], [200]).errors
    assert twice.terminal_norm_z.min() > 20


def test_side_by_side(schedule, x0):
    there, back = round_trip(model, x0, COND, schedule, 5, "renoise", 2.0)
    shown = side_by_side(model, x0, COND, schedule, "renoise", 5, columns=3, guidance_scale=2.0)
    assert torch.equal(shown.inversion, there.latents[[0, 2, 5]])
    assert torch.equal(shown.sampling, back.latents[[0, 2, 5]])
    assert shown.timesteps.tolist() == [-1, 201, 801]
    assert torch.equal(side_by_side(model, x0, COND, schedule, "ddim", 5, 6).inversion[0], x0)
    for columns in (1, 7):
        with pytest.raises(InvdpoError, match="columns"):
            side_by_side(model, x0, COND, schedule, "ddim", 5, columns)


def test_unknown_solver(schedule, x0):
    with pytest.raises(InvdpoError, match=r"trajectory\.solver.*euler"):
        inversion_errors(model, x0, COND, schedule, ["ddim", "euler"], [2])
