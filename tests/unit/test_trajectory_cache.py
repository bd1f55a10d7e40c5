"""Inversions kept on disk: the same bits as computed ones, never another's, and never more than the limit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from invdpo.inversion import cache as module
from invdpo.inversion import invert
from invdpo.inversion.cache import Savings, TrajectoryCache, identity
from invdpo.objectives import backward, load_recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
SCHEDULE = NoiseSchedule(ABAR, float(ABAR[0]), 1, 1000)
GB = 10**9


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.4))
        self.calls = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning | None) -> torch.Tensor:
        self.calls += 1
        shift = 0.0 if cond is None else cond.embeds.mean(dim=(1, 2))[:, None, None, None]
        return self.scale * x + (t / 1000)[:, None, None, None] + shift


def drawn(seed: int = 0, rows: int = 3) -> tuple[torch.Tensor, Conditioning]:
    g = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, 5, 4, generator=g)
    return torch.randn(rows, 2, 4, 4, generator=g), Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))


def test_a_found_trajectory_is_the_computed_one_and_costs_no_call(tmp_path: Path) -> None:
    model, (x0, cond) = Model(), drawn()
    options: dict[str, Any] = {"steps": 5, "guidance_scale": 2.0, "label": "previous"}
    expected = invert(model, x0, cond, SCHEDULE, **options)
    first = TrajectoryCache(tmp_path, GB, "m")
    second = TrajectoryCache(tmp_path, GB, "m")
    assert first.invert(model, x0, cond, SCHEDULE, **options).unet_evals == expected.unet_evals
    model.calls = 0
    found = second.invert(model, x0.clone(), cond, SCHEDULE, **options)
    assert model.calls == 0
    for name in ("latents", "timesteps", "eps"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.partner is None and found.unet_evals == expected.unet_evals
    assert (first.savings.asked, first.savings.found, first.savings.unet_evals) == (1, 0, 0)
    saved = second.savings
    assert (saved.asked, saved.found, saved.unet_evals) == (1, 1, expected.unet_evals) and saved.seconds > 0


def test_edict_keeps_its_partner(tmp_path: Path) -> None:
    model, (x0, cond) = Model(), drawn()
    kept = [TrajectoryCache(tmp_path, GB, "m").invert(model, x0, cond, SCHEDULE, 4, "edict") for _ in range(2)]
    assert kept[1].partner is not None and torch.equal(kept[0].partner, kept[1].partner)


CHANGES: dict[str, dict[str, Any]] = {
    "latents": {"x0": drawn(1)[0]},
    "order of the latents": {"x0": drawn()[0].flip(0)},
    "prompts": {"cond": drawn(1)[1]},
    "unconditional": {"cond": replace(drawn()[1], uncond=Conditioning(torch.ones(3, 5, 4)))},
    "no prompts": {"cond": None, "guidance_scale": 1.0},
    "N": {"steps": 6},
    "solver": {"solver": "renoise"},
    "guidance": {"guidance_scale": 3.0},
    "label": {"label": "previous"},
    "offset": {"schedule": SCHEDULE.with_offset(0)},
    "clean level": {"schedule": replace(SCHEDULE, final_alpha_cumprod=1.0)},
    "noise levels": {"schedule": replace(SCHEDULE, alphas_cumprod=ABAR * 0.99)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_trajectory_depends_on_is_in_its_key(tmp_path: Path, change: str) -> None:
    model, (x0, cond) = Model(), drawn()
    cache = TrajectoryCache(tmp_path, GB, "m")
    settings = {"steps": 5, "solver": "ddim", "guidance_scale": 2.0, "label": "next"}
    arguments: dict[str, Any] = {"x0": x0, "cond": cond, "schedule": SCHEDULE} | settings
    cache.invert(model, **arguments)
    arguments |= CHANGES[change]
    found = cache.invert(model, **arguments)
    assert cache.savings.found == 0
    assert torch.equal(found.latents, invert(model, **arguments).latents)


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    model, (x0, cond) = Model(), drawn()
    before = identity(model, torch.float32)
    with torch.no_grad():
        model.scale.add_(1e-6)
    after = identity(model, torch.float32)
    assert len({before, after, identity(model, torch.bfloat16)}) == 3
    TrajectoryCache(tmp_path, GB, before).invert(model, x0, cond, SCHEDULE, 5)
    other = TrajectoryCache(tmp_path, GB, after)
    other.invert(model, x0, cond, SCHEDULE, 5)
    assert other.savings.found == 0


def test_a_damaged_file_is_computed_again_and_mended(tmp_path: Path) -> None:
    model, (x0, cond) = Model(), drawn()
    expected = TrajectoryCache(tmp_path, GB, "m").invert(model, x0, cond, SCHEDULE, 5)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    for found in (0, 1):
        cache = TrajectoryCache(tmp_path, GB, "m")
        assert torch.equal(cache.invert(model, x0, cond, SCHEDULE, 5).latents, expected.latents)
        assert cache.savings.found == found


def test_the_files_unused_for_longest_go_first(tmp_path: Path) -> None:
    model, batches = Model(), [drawn(seed) for seed in range(6)]
    one = TrajectoryCache(tmp_path, GB, "m")
    one.invert(model, *batches[0], SCHEDULE, 5)
    (path,) = tmp_path.glob("*/*.safetensors")
    limit = 3 * path.stat().st_size + 100
    cache = TrajectoryCache(tmp_path, limit, "m")
    for age, batch in enumerate(batches[:3]):
        cache.invert(model, *batch, SCHEDULE, 5)
        for file in tmp_path.glob("*/*.safetensors"):  # a file system may tell no two of them apart
            os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**9 * (10 - age)))
    assert cache.savings.found == 1
    assert cache.invert(model, *batches[0], SCHEDULE, 5) is not None  # used again, so the second is now the oldest
    cache.invert(model, *batches[3], SCHEDULE, 5)
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) <= limit
    found = cache.savings.found
    cache.invert(model, *batches[0], SCHEDULE, 5)
    cache.invert(model, *batches[3], SCHEDULE, 5)
    assert cache.savings.found == found + 2
    cache.invert(model, *batches[1], SCHEDULE, 5)
    assert cache.savings.found == found + 2


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = TrajectoryCache(tmp_path, 100, "m")
    cache.invert(Model(), *drawn(), SCHEDULE, 5)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_full_disk_only_means_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    (x0, cond), model = drawn(), Model()
    cache = TrajectoryCache(tmp_path, GB, "m")
    assert torch.equal(cache.invert(model, x0, cond, SCHEDULE, 5).latents, invert(model, x0, cond, SCHEDULE, 5).latents)
    monkeypatch.setattr(module, "save_file", lambda *_, **__: (_ for _ in ()).throw(InvdpoError("another reason")))
    with pytest.raises(InvdpoError, match="another reason"):
        cache.invert(model, x0, cond, SCHEDULE, 5)


def test_a_half_written_file_is_never_seen(tmp_path: Path) -> None:
    model, (x0, cond) = Model(), drawn()
    cache = TrajectoryCache(tmp_path, GB, "m")
    cache.invert(model, x0, cond, SCHEDULE, 5)
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    path.unlink()
    with replace_when_done(path) as temporary:
        temporary.write_bytes(whole[:50])  # another process, in the middle of it
        cache.invert(model, x0, cond, SCHEDULE, 5)
        assert cache.savings.found == 0
        temporary.write_bytes(whole)
    cache.invert(model, x0, cond, SCHEDULE, 5)
    assert cache.savings.found == 1


@pytest.mark.parametrize("method", ["inversion_dpo_paper", "inversion_dpo_code", "inversion_dpo_implied"])
def test_the_gradient_is_the_same_to_the_bit(tmp_path: Path, method: str) -> None:
    recipe = load_recipe(method).with_overrides({"trajectory": {"steps": 4}, "beta": 0.5})
    (win, cond), (lose, _) = drawn(), drawn(1)
    found = []
    for inverter in (invert, *(TrajectoryCache(tmp_path, GB, "m", Savings()).invert for _ in range(2))):
        policy, reference = Model(), Model().requires_grad_(False)
        with torch.no_grad():
            policy.scale.add_(0.01)
        out = backward(
            recipe, policy, reference, win, lose, cond, SCHEDULE, torch.Generator(), chunk=4, inverter=inverter
        )
        assert policy.scale.grad is not None
        found.append((out.unet_evals, float(out.loss), float(policy.scale.grad)))
    assert found[0] == found[1] == found[2] and found[0][2] != 0
    assert len(list(tmp_path.glob("*/*.safetensors"))) > 0


def test_inversions_by_the_policy_are_never_kept(tmp_path: Path) -> None:
    recipe = load_recipe("inversion_dpo_implied").with_overrides({"trajectory": {"steps": 4, "model": "policy"}})
    (win, cond), (lose, _) = drawn(), drawn(1)
    cache = TrajectoryCache(tmp_path, GB, "m")
    backward(recipe, Model(), Model(), win, lose, cond, SCHEDULE, torch.Generator(), inverter=cache.invert)
    assert cache.savings.asked == 0
