"""What a study will cost: evaluations against those of committed runs, and the rest against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from invdpo import cost
from invdpo import plan as module
from invdpo.cli import app
from invdpo.config import StudyConfig, load_study, parse_study
from invdpo.errors import InvdpoError
from invdpo.network_size import networks, networks_of
from invdpo.plan import plan, read_throughput, sizes, to_text

ROOT = Path(__file__).resolve().parents[2]
UNET, VAE, TEXT = 2_567_463_684, 83_653_863, 817_720_320  # parameters of SDXL's networks


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies name their files from there; the machine has no GPU, unless the test gives it one."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "this_gpu", lambda: None)


def sdxl(training: dict[str, Any] | None = None, arms: dict[str, Any] | None = None, **changes: Any) -> StudyConfig:
    """A study of SDXL with Pick-a-Pic v2, from the hub."""
    common = {"steps": 2000, "batch": 2048, "micro_batch": 1, "resolution": 1024, "optimizer": "adafactor"}
    study = {
        "study": "paper",
        "base": "stabilityai/stable-diffusion-xl-base-1.0",
        "preferences": "yuvalkirstain/pickapic_v2",
        "prompts": "partiprompts",
        "scorers": {"pickscore": {"model": "yuvalkirstain/PickScore_v1"}},
        "seeds": [0],
        "training": common | {"gradient_checkpointing": True, "checkpoints": [1000]} | (training or {}),
        "sampling": {"steps": 50, "guidance_scale": 7.5},
        "arms": {"base": {"method": "no_training"}, "dpo": {"method": "diffusion_dpo"}} | (arms or {}),
    }
    return parse_study(study | changes, "paper")


def committed_costs(name: str) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> seed -> what its committed run spent."""
    costs = json.loads((ROOT / "results" / "reference" / name / "costs.json").read_text())["arms"]
    return {arm: {key: run for key, run in runs.items() if key.startswith("seed")} for arm, runs in costs.items()}


@pytest.mark.parametrize(("name", "seeds"), [("shapes", 3), ("shapes_methods", 1)])
def test_evaluations_are_those_of_the_committed_runs(name: str, seeds: int) -> None:
    study, costs = load_study(f"config/{name}.yaml"), committed_costs(name)
    assert costs.keys() == study.arms.keys()
    for arm in map(study.arm, study.arms):
        for seed in study.seeds[:seeds] if arm.trains else []:
            assert cost.training(arm, seed).evaluations == costs[arm.name][f"seed{seed}"]["unet_evals"], arm.name


def test_a_long_run_that_draws_how_far_it_inverts_is_near_its_mean() -> None:
    """One point of 80, at 40.5 steps on average, and Diffusion-DPO's four evaluations: one of the reference, three of
    the policy."""
    study = sdxl(
        arms={"p": {"method": "p_single", "recipe": {"trajectory": {"steps": 80}}, "training": {"micro_batch": 32}}}
    )
    expected = 2000 * 2048 * 2 * (40.5 + 4)
    assert cost.training(study.arm("p"), 0).evaluations == pytest.approx(expected, rel=0.05)


def test_gradient_checkpointing_repeats_the_policys_forward_passes() -> None:
    spent = cost.training(sdxl().arm("dpo"), 0)
    assert spent == cost.Spent(2000 * 2048 * 2 * 4, 2000 * 2048 * 2)
    assert cost.training(sdxl({"gradient_checkpointing": False}).arm("dpo"), 0).repeated == 0


def test_hours_follow_from_evaluations_and_a_rate() -> None:
    study = sdxl()
    found = plan(study, throughput=50.0, gpu="h100", gpus=4)
    assert found.arms["dpo"].train_hours == pytest.approx(2000 * 2048 * 8 / 50 / 3600)
    assert found.arms["dpo"].train_evaluations == 2000 * 2048 * 8
    drawn = 1632 * 50 * 2
    assert found.arms["base"].evaluate_evaluations == drawn and found.arms["dpo"].evaluate_evaluations == 2 * drawn
    stated = plan(study, gpu="h100")
    rate = 989e12 * module.EFFICIENCY / sizes()["pipelines"]["sdxl"]["unet_flops"]
    assert stated.evaluations_per_second == pytest.approx(rate)
    assert stated.arms["dpo"].train_hours == pytest.approx(2000 * 2048 * 10 / rate / 3600)
    assert stated.hours == pytest.approx(sum(stage["hours"] for stage in stated.stages.values()))


def test_the_default_study_takes_the_time_that_it_took() -> None:
    """Given one method's measured rate, the hours of all trainings are within a factor of two of the measured ones."""
    seconds = {arm: sum(run["seconds"] for run in runs.values()) for arm, runs in committed_costs("shapes").items()}
    found = plan(load_study("config/shapes.yaml"), throughput=3 * 18432 / seconds["diffusion_dpo"])
    assert 0.5 < found.stages["train"]["hours"] * 3600 / sum(seconds.values()) < 2
    assert found.machine.kind == "cpu" and found.downloads == {} and found.problems == []


def test_memory_is_the_sum_of_its_parts() -> None:
    known = sizes()["pipelines"]["sdxl"]
    # Policy and base, gradients and half-precision weights, and two latents with checkpointed graphs.
    expected = UNET * (8 + 4 + 0.02 + 2) + 2 * known["checkpointed_bytes"] + 1e9
    assert plan(sdxl(), gpu="h100").arms["dpo"].memory == pytest.approx(expected / 1e9)
    more = UNET * 7.98 + 2 * (known["graph_bytes"] - known["checkpointed_bytes"])
    found = plan(sdxl({"optimizer": "adamw", "gradient_checkpointing": False}), gpu="h100")
    assert found.arms["dpo"].memory == pytest.approx((expected + more) / 1e9)
    offloaded = plan(sdxl({"reference_offload": True}), gpu="h100").arms["dpo"].memory
    assert offloaded < expected / 1e9 < plan(sdxl({"micro_batch": 2}), gpu="h100").arms["dpo"].memory
    assert plan(sdxl({"lora": {"rank": 8}}), gpu="h100").arms["dpo"].memory < 20


def test_what_does_not_fit_is_said() -> None:
    study = sdxl({"optimizer": "adamw", "gradient_checkpointing": False, "processes": 2})
    problems = plan(study, gpu="h100").problems
    assert any("`dpo` needs about" in text and "gradient_checkpointing: true" in text for text in problems)
    assert any("trains with 2 processes" in text for text in problems)
    assert plan(sdxl(), gpu="h100").problems == []
    assert any("does not fit" in text for text in plan(sdxl(), gpu_memory=24).problems)
    assert any("This machine has no GPU" in text for text in plan(sdxl()).problems)


def test_this_machines_gpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85.5))
    monkeypatch.setattr(module, "devices", lambda: ["a", "b"])
    machine = plan(sdxl()).machine
    assert (machine.devices, machine.tflops, machine.memory) == (2, 989, 85.5)


def test_downloads_are_what_is_not_here() -> None:
    found = plan(sdxl(), gpu="h100").downloads
    assert found.pop("preferences: yuvalkirstain/pickapic_v2 (645 files)") == 335
    assert found == {
        "base: stabilityai/stable-diffusion-xl-base-1.0": pytest.approx((UNET + VAE + TEXT) * 4 / 1e9),
        "scorer: yuvalkirstain/PickScore_v1": 3.94,
    }
    half = plan(sdxl(variant="fp16", vae="madebyollin/sdxl-vae-fp16-fix"), gpu="h100").downloads
    assert half["base: stabilityai/stable-diffusion-xl-base-1.0"] == pytest.approx((UNET + TEXT) * 2 / 1e9)
    assert half["vae: madebyollin/sdxl-vae-fp16-fix"] == 0.335
    unknown = plan(sdxl(scorers={"pickscore": {"model": "somebody/else"}}), gpu="h100")
    assert unknown.downloads["scorer: somebody/else"] is None and "?" in to_text(unknown)


def test_only_files_that_hold_the_pairs_of_the_runs_are_fetched() -> None:
    """2 x 5,000 pairs of files with 1,320 decided rows each."""
    found = plan(sdxl({"steps": 500, "batch": 10}, seeds=[0, 1]), gpu="h100")
    assert found.downloads["preferences: yuvalkirstain/pickapic_v2 (8 files)"] == pytest.approx(335 * 8 / 645)
    pairs = next(text for text in found.assumptions if text.startswith("preferences:"))
    # Each seed draws 5,000 of the 8 x 1,320 pairs, so both draw some.
    assert "7,632 pairs" in pairs or "7,633 pairs" in pairs, pairs


def test_disk_counts_every_checkpoint_once() -> None:
    found = plan(sdxl(seeds=[0, 1, 2]), gpu="h100").disk
    assert found["checkpoints (6)"] == pytest.approx(6 * UNET * 4 / 1e9)
    assert found["preference files"] == 335
    assert found["latents and embeddings"] == pytest.approx(851_293 * 4 * (4 * 65536 + 158976) / 1e9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "somebody/else"}, "`base: somebody/else` is no folder here, and its size is not known"),
    ],
)
def test_what_is_not_known_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvdpoError, match=words):
        plan(sdxl(**changes))
    with pytest.raises(InvdpoError, match="--gpu abacus: not known"):
        plan(sdxl(), gpu="abacus")


def test_a_rate_is_a_number_or_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    run.write_text('{"unet_evals": 300, "seconds": 2.0}')
    assert read_throughput("12.5") == 12.5 and read_throughput(str(run)) == 150
    run.write_text('{"unet_evals": 300}')
    with pytest.raises(InvdpoError, match="expected `unet_evals` and `seconds`"):
        read_throughput(str(run))
    with pytest.raises(InvdpoError, match="must be positive"):
        read_throughput("0")


def test_the_command_prints_tables_or_json() -> None:
    text = CliRunner().invoke(app, ["plan", "--study", "config/smoke.yaml", "--throughput", "1000"]).output
    for words in ("downloads: none", "UNet evaluations", "inversion_dpo_code", "Assumptions", "as given with"):
        assert words in text
    printed = CliRunner().invoke(app, ["plan", "--study", "config/smoke.yaml", "--throughput", "1000", "--json"]).output
    found = json.loads(printed)
    assert found["study"] == "smoke" and found["jobs"]["train"] == len(load_study("config/smoke.yaml").arms)


def test_a_folders_networks_are_counted(tiny_base: Path) -> None:
    """The tiny pipeline: parameters as in its files, and with four times the pixels, four times the convolutions."""
    from safetensors.torch import load_file

    stored = sum(map(torch.numel, load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors").values()))
    small, large = networks_of(tiny_base, 32), networks_of(tiny_base, 64)
    assert small["unet_parameters"] == large["unet_parameters"] == stored
    assert small["latent_elements"] == 64 and large["latent_elements"] == 256
    for name in ("unet_flops", "encode_flops", "decode_flops"):
        assert 3 < large[name] / small[name] < 5
    assert small["checkpointed_bytes"] < small["graph_bytes"] < large["graph_bytes"]


SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768}  # the rest is the default
CODEC = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}


@pytest.mark.parametrize(("name", "unet"), [("sd15", SD15), ("sdxl", SDXL)])
def test_known_sizes_are_those_of_the_architectures(name: str, unet: dict[str, Any]) -> None:
    entry = sizes()["pipelines"][name]
    for key, value in networks(unet, CODEC, entry["resolution"]).items():
        assert entry[key] == value, key
