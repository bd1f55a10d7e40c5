"""What a training takes of a device's memory, and whether what is advised lowers it, and in the order that is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from invdpo import cost
from invdpo.config import StudyConfig, parse_study
from invdpo.memory import Denoiser, _changed, _ways, remedies, scaled, training_memory, weights_memory
from invdpo.network_size import denoiser
from invdpo.plan_sizes import host_memory, networks_of, sizes

ROOT = Path(__file__).resolve().parents[2]
UNET = 2_567_463_684
PLAIN = {"steps": 100, "batch": 4, "micro_batch": 1, "resolution": 1024, "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def sdxl(arm: dict[str, Any], **training: Any) -> StudyConfig:
    study = {
        "study": "paper",
        "base": "stabilityai/stable-diffusion-xl-base-1.0",
        "preferences": "yuvalkirstain/pickapic_v2",
        "prompts": "partiprompts",
        "scorers": {},
        "seeds": [0],
        "training": PLAIN | training,
        "sampling": {"steps": 50, "guidance_scale": 7.5},
        "arms": {"x": arm},
    }
    return parse_study(study, "paper")


SIZES = networks_of(sdxl({"method": "diffusion_dpo"}), sizes(), [])


def needed(study: StudyConfig) -> float:
    arm = study.arm("x")
    return training_memory(arm, SIZES, cost.held(arm), "gpu") / 1e9


def advice(study: StudyConfig, **options: Any) -> dict[str, float]:
    """Setting -> GB with it, in the order of the advice."""
    found = {}
    for words in remedies(study.arm("x"), SIZES, **options):
        name, value, gb = re.fullmatch(r"`training\.(\w+): (.*?)`.*: about ([\d.]+) GB", words).groups()  # pyright: ignore
        found[f"{name}: {value}"] = float(gb)
    return found


def test_what_is_advised_lowers_memory_as_much_as_it_says() -> None:
    """SDXL with AdamW: one latent a call would set gradients aside, 10 GB of them, to save a graph of 0.9 GB."""
    study = sdxl({"method": "diffusion_dpo"})
    now = needed(study)
    assert now == pytest.approx((UNET * (8 + 4 + 8 + 2) + 2 * SIZES.checkpointed_bytes + 1e9) / 1e9)
    assert needed(sdxl({"method": "diffusion_dpo"}, chunk=1)) > now + 9
    found = advice(study)
    assert "chunk: 1" not in found
    assert found["optimizer: adafactor"] < found["reference_offload: true"] < now
    for words, settings in {
        "optimizer: adafactor": {"optimizer": "adafactor"},
        "reference_offload: true": {"reference_offload": True},
        "lora: {rank: 4}": {"lora": {"rank": 4}},
    }.items():
        assert found[words] == pytest.approx(needed(sdxl({"method": "diffusion_dpo"}, **settings)), abs=0.06), words
    # What makes another study comes last, though adapters would save most.
    assert list(found)[-2:] == ["lora: {rank: 4}", "resolution: 512"]
    assert found["lora: {rank: 4}"] < min(list(found.values())[:-2])


def test_a_smaller_call_is_advised_where_graphs_are_large() -> None:
    """The arm of the released script that has four latents in a call, on one GPU: fewer help, the reference more."""
    code = {"method": "inversion_dpo_code", "recipe": {"trajectory": {"steps": 20}}}
    lean = {"optimizer": "adafactor", "batch": 2, "chunk": 4}
    found = advice(sdxl(code, **lean))
    assert list(found)[:2] == ["reference_offload: true", "chunk: 2"]
    assert found["chunk: 2"] == pytest.approx(needed(sdxl(code, **lean | {"chunk": 2})), abs=0.06)
    large = advice(sdxl(code, **lean | {"gradient_checkpointing": False}))
    assert list(large)[0] == "gradient_checkpointing: true", "four graphs of 9 GB each"
    assert large["chunk: 2"] < large["reference_offload: true"]


def test_advice_is_possible_and_names_nothing_twice() -> None:
    found = advice(sdxl({"method": "diffusion_dpo"}, batch=12, micro_batch=6, processes=2))
    assert "micro_batch: 3" in found and "shard: true" in found and not any("processes" in name for name in found)
    cut = needed(sdxl({"method": "diffusion_dpo"}, batch=12, micro_batch=6, processes=2, shard=True))
    assert found["shard: true"] == pytest.approx(cut, abs=0.06)
    sharded = advice(sdxl({"method": "diffusion_dpo"}, batch=12, processes=2, micro_batch=1, shard=True))
    assert set(sharded) == {"processes: 3", "lora: {rank: 4}", "resolution: 512", "chunk: 1"}
    kto = advice(sdxl({"method": "diffusion_kto"}, micro_batch=4))
    assert "micro_batch: 2" not in kto and kto
    rounded = advice(sdxl({"method": "inversion_dpo_paper", "initial_rounding": "float16"}))
    assert "lora: {rank: 4}" not in rounded
    lean = {"batch": 1, "chunk": 1, "optimizer": "adafactor", "lora": {"rank": 4}}
    assert set(advice(sdxl({"method": "diffusion_dpo"}, **lean))) == {"resolution: 512"}
    before = advice(sdxl({"method": "diffusion_dpo"}, micro_batch=4, gradient_checkpointing=False), before_steps=True)
    assert list(before) == ["optimizer: adafactor", "reference_offload: true", "lora: {rank: 4}"]
    offloaded = sdxl({"method": "diffusion_dpo"}, processes=2, reference_offload=True)
    assert any(
        "`training.shard: true` without `reference_offload`" in words for words in remedies(offloaded.arm("x"), SIZES)
    )
    nothing = sdxl({"method": "diffusion_dpo"}, **lean).arm("x")
    assert list(remedies(nothing, SIZES, before_steps=True)) == ["a larger GPU"]


@pytest.mark.parametrize("method", sorted(path.stem for path in (ROOT / "config" / "methods").glob("*.yaml")))
def test_every_method_has_advice(method: str) -> None:
    """None of them fails, for it is asked for when something else has."""
    steps = {"recipe": {"trajectory": {"steps": 3}}} if "inversion" in method else {}
    arm = sdxl({"method": method, **steps}, micro_batch=4, processes=1).arm("x")
    assert list(remedies(arm, SIZES)) and list(remedies(arm, SIZES, before_steps=True))
    for way in _ways(arm, cost.held(arm).latents):
        assert weights_memory(_changed(arm, way.settings), SIZES, "gpu") > 0


def test_sharded_networks_are_in_parts() -> None:
    """Policy, base, gradients and AdamW's moments by four; a block's weights, their gradients and its half-precision
    weights whole, and the activations as ever."""
    sharded = needed(sdxl({"method": "diffusion_dpo"}, processes=4, shard=True))
    parts = UNET * (8 + 4 + 8) / 4 + SIZES.gathered_parameters * (4 + 4 + 2) + 2 * SIZES.checkpointed_bytes
    assert sharded == pytest.approx((parts + 1e9) / 1e9)
    fewer = needed(sdxl({"method": "diffusion_dpo"}, processes=2, shard=True))
    assert fewer == pytest.approx(sharded + UNET * 20 / 4 / 1e9)
    assert needed(sdxl({"method": "diffusion_dpo"}, shard=True)) == needed(sdxl({"method": "diffusion_dpo"}))
    graphs = needed(sdxl({"method": "diffusion_dpo"}, processes=4, shard=True, gradient_checkpointing=False))
    more = 2 * UNET - 2 * SIZES.gathered_parameters + 2 * (SIZES.graph_bytes - SIZES.checkpointed_bytes)
    assert graphs == pytest.approx(sharded + more / 1e9), "a graph holds all weights as they were cast"


def test_sharded_arms_sum_no_gradients_aside_and_count_the_pass_that_this_takes() -> None:
    """One pair at 20 points, four latents a call: gradients that are final at once take a forward pass more."""
    arm = {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 20}}}
    common = {"chunk": 4, "batch": 4, "processes": 2, "steps": 1}
    plain, cut = (sdxl(arm, **common, shard=shard).arm("x") for shard in (False, True))
    assert (cost.held(plain).gradients, cost.held(cut).gradients) == (2, 1)
    extra = cost.training(cut, 0).evaluations - cost.training(plain, 0).evaluations
    assert extra == 4 * 2 * 20


def test_the_machines_memory_holds_the_copies_that_every_process_makes() -> None:
    """Of a sharded network: the base, and the policy or the base again before it is cut. The first process then saves
    weights and moments whole."""
    weights = 4 * UNET

    def host(**training: Any) -> float:
        arm = sdxl({"method": "diffusion_dpo"}, **training).arm("x")
        return host_memory(arm, SIZES, "gpu")

    program = host() - weights
    assert host(processes=4) == pytest.approx(4 * (program + weights))
    assert host(processes=4, shard=True) == pytest.approx(4 * (program + 2 * weights))
    assert host(processes=2, shard=True) == pytest.approx(2 * program + 2 * weights + 3 * weights)
    assert host(reference_offload=True) == pytest.approx(program + 2 * weights)


def test_what_is_gathered_at_once_is_what_fsdp_cuts(tiny_base: Path) -> None:
    """The largest group of weights and the one of all that is in no block, by `training.shards` itself."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from invdpo.config import read_yaml
    from invdpo.training import shards

    config = read_yaml(tiny_base / "unet" / "config.json")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    blocks = [sum(v.numel() for v in m.parameters()) for m in unet.modules() if type(m).__name__ in shards.BLOCKS]
    whole = sum(value.numel() for value in unet.parameters())
    assert len(blocks) > 4 and not isinstance(unet, FSDPModule)
    assert denoiser(config, 4, 16)["gathered_parameters"] == max(blocks) + whole - sum(blocks)


def test_a_pass_without_a_graph_has_little_at_a_time(tiny_base: Path) -> None:
    from invdpo.config import read_yaml

    config = read_yaml(tiny_base / "unet" / "config.json")
    small, large = (Denoiser(**denoiser(config, side, 16)) for side in (8, 16))
    assert 0 < small.forward_bytes < small.graph_bytes / 2
    assert 2 < large.forward_bytes / small.forward_bytes <= 4
    # No product of all queries and keys: activations grow as the pixels do.
    assert 3.5 < large.graph_bytes / small.graph_bytes < 4.1
    assert scaled(small, 4).graph_bytes == 4 * small.graph_bytes
