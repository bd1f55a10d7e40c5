"""What a study will cost: evaluations against those of committed runs, and the rest against sums done by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from invdpo import cost, machine, prompts
from invdpo import plan as module
from invdpo.cli import app
from invdpo.config import StudyConfig, load_study, parse_study
from invdpo.errors import InvdpoError
from invdpo.machine import Disk
from invdpo.network_size import configurations, converted, networks
from invdpo.plan import plan, read_throughput
from invdpo.plan_sizes import Download, held_bytes, sizes
from invdpo.plan_text import to_json, to_text

REAL_GPU = machine.this_gpu
ROOT = Path(__file__).resolve().parents[2]
UNET, VAE, TEXT = 2_567_463_684, 83_653_863, 817_720_320  # parameters of SDXL's networks


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies name their files from there; the machine has no GPU, and room for everything, but where a test has."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    monkeypatch.setattr(module, "disk_at", lambda name, folder, needed: Disk(name, needed, 1e6, 0))


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


def test_passes_that_invert_as_far_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 passes of a pair, at one of five depths each, are what they are one by one; so are passes of two pairs, and
    those whose chunk cuts a pair in two."""
    passes = []
    counted = cost._backward
    monkeypatch.setattr(cost, "_backward", lambda *args: passes.append(args) or counted(*args))
    for size, most, chunk in ((1, 5, 4), (2, 25, 3), (1, 5, 1)):
        training = {"steps": 8, "batch": 8, "micro_batch": size, "checkpoints": [], "chunk": chunk}
        arm = {"method": "p_single", "recipe": {"trajectory": {"steps": 5}}, "training": training}
        resolved = sdxl(arms={"p": arm}).arm("p")
        found, expected = cost.training(resolved, 3), cost.NOTHING
        assert 1 < len(passes) <= most
        for step in range(1, 9):
            for first in range(0, 8, size):
                policy, reference = cost._Free(), cost._Free(trained=False)
                evals = counted(resolved, policy, reference, 3, step, first)
                expected += cost.Spent(evals, policy.with_graph, policy.calls + reference.calls)
        assert found == expected
        passes.clear()


def test_gradient_checkpointing_repeats_the_policys_forward_passes() -> None:
    spent = cost.training(sdxl().arm("dpo"), 0)
    # A call of the reference, a forward pass of the policy and its backward pass, which counts two.
    assert spent == cost.Spent(2000 * 2048 * 2 * 4, 2000 * 2048 * 2, 2000 * 2048 * 4)
    assert cost.training(sdxl({"gradient_checkpointing": False}).arm("dpo"), 0).repeated == 0


def test_hours_follow_from_evaluations_and_a_rate() -> None:
    study = sdxl()
    found = plan(study, throughput=50.0, gpu="h100", gpus=4)
    assert found.arms["dpo"].train_hours == pytest.approx(2000 * 2048 * 8 / 50 / 3600)
    assert found.arms["dpo"].train_evaluations == 2000 * 2048 * 8
    drawn = 1632 * 50 * 2
    assert found.arms["base"].evaluate_evaluations == drawn and found.arms["dpo"].evaluate_evaluations == 2 * drawn
    stated = plan(study, gpu="h100")
    rate = 989e12 * machine.EFFICIENCY / sizes()["pipelines"]["sdxl"]["unet_flops"]
    assert stated.evaluations_per_second == pytest.approx(rate)
    assert stated.arms["dpo"].train_hours == pytest.approx(2000 * 2048 * 10 / rate / 3600)
    assert stated.hours == pytest.approx(sum(stage.hours for stage in stated.stages.values()))
    both = stated.arms["dpo"].train_hours + stated.arms["dpo"].evaluate_hours
    assert stated.methods["diffusion_dpo"].hours == pytest.approx(both)
    evaluated = sum(method.hours for method in stated.methods.values())
    assert evaluated == pytest.approx(stated.stages["train"].hours + stated.stages["evaluate"].hours)


def test_the_default_study_takes_the_time_that_it_took() -> None:
    """Given one method's measured rate, the hours of all trainings are within a factor of two of the measured ones."""
    seconds = {arm: sum(run["seconds"] for run in runs.values()) for arm, runs in committed_costs("shapes").items()}
    found = plan(load_study("config/shapes.yaml"), throughput=3 * 18432 / seconds["diffusion_dpo"])
    assert 0.5 < found.stages["train"].hours * 3600 / sum(seconds.values()) < 2
    assert found.machine.kind == "cpu" and found.downloads == {} and found.problems == []


def test_small_networks_wait_for_their_calls_on_a_gpu() -> None:
    """A pair of latents of the shapes world: what the GPU could compute in the time of a call is next to nothing."""
    study = load_study("config/smoke.yaml")
    found = plan(study, gpu="h100")
    operations = networks(*configurations(Path(study.base)), study.training.resolution)["unet_operations"]
    calls = study.sampling.steps * 1  # all 16 prompts fit one batch
    decoded = 16 * networks(*configurations(Path(study.base)), 64)["decode_flops"] / (0.4 * 494.5e12)
    assert found.arms["base"].evaluate_hours * 3600 == pytest.approx(
        calls * operations * module.LAUNCH_SECONDS + decoded
    )


def test_preparation_takes_the_codec_in_fp32_and_the_decoding_of_images() -> None:
    """On an H100, whose TF32 units have half of its bf16 rate."""
    encode = 2 * 851_293 * sizes()["pipelines"]["sdxl"]["encode_flops"] / (0.4 * 494.5e12) / 3600
    decode = 2 * 851_293 * 1.05 * module.DECODE_SECONDS / 3600
    for workers, expected in {0: encode + decode, 1: max(encode, decode), 8: encode}.items():
        found = plan(sdxl(data={"workers": workers}), gpu="h100")
        assert found.stages["preferences"].hours == pytest.approx(expected), workers


def test_memory_is_the_sum_of_its_parts() -> None:
    known = sizes()["pipelines"]["sdxl"]
    # Policy and base, gradients and half-precision weights, and two latents with checkpointed graphs.
    expected = UNET * (8 + 4 + 0.02 + 2) + 2 * known["checkpointed_bytes"] + 1e9
    assert plan(sdxl(), gpu="h100").arms["dpo"].train_memory == pytest.approx(expected / 1e9)
    more = UNET * 7.98 + 2 * (known["graph_bytes"] - known["checkpointed_bytes"])
    found = plan(sdxl({"optimizer": "adamw", "gradient_checkpointing": False}), gpu="h100")
    assert found.arms["dpo"].train_memory == pytest.approx((expected + more) / 1e9)
    offloaded = plan(sdxl({"reference_offload": True}), gpu="h100").arms["dpo"].train_memory
    assert offloaded < expected / 1e9 < plan(sdxl({"micro_batch": 2}), gpu="h100").arms["dpo"].train_memory
    assert plan(sdxl({"lora": {"rank": 8}}), gpu="h100").arms["dpo"].train_memory < 20


def test_memory_of_evaluation_is_the_sum_of_its_parts() -> None:
    """The UNet in fp32, one checkpoint's at a time, the codec in fp32, PickScore, and what decodes (two images at a
    time) or, of a large batch, draws: each image twice for guidance."""
    alone = (4 * UNET + 4 * VAE + 1e9) / 1e9 + 3.94
    each = sizes()["pipelines"]["sdxl"]["forward_bytes"] / 1e9

    def evaluated(batch: int, **changes: Any) -> float:
        sampling = {"steps": 50, "guidance_scale": 7.5, "batch": batch} | changes.pop("sampling", {})
        found = plan(sdxl(sampling=sampling, **changes), gpu="h100").arms
        assert found["dpo"].evaluate_memory == pytest.approx(found["base"].evaluate_memory)
        return found["base"].evaluate_memory - alone

    assert evaluated(1) == pytest.approx(4) and evaluated(2) == evaluated(4) == pytest.approx(8)
    assert evaluated(32) == pytest.approx(64 * each) and 64 * each > 10
    assert evaluated(64, sampling={"guidance_scale": 1.0}) == pytest.approx(64 * each)
    assert evaluated(32, precision="fp32") == pytest.approx(128 * each)


def test_a_smaller_batch_is_advised_where_it_helps() -> None:
    def problem(batch: int) -> str:
        study = sdxl(sampling={"steps": 50, "guidance_scale": 7.5, "batch": batch})
        return next(text for text in plan(study, gpu_memory=16).problems if text.startswith("Sampling"))

    assert "`sampling.batch: 1` (now 64): about 19.5 GB; fewer `scorers`" in problem(64)
    assert "sampling.batch" not in problem(1) and "fewer `scorers`" in problem(1)


@pytest.mark.parametrize(
    ("method", "chunk", "latents"),
    [
        ("diffusion_dpo", 4, 2),  # a pair at one point
        ("inversion_dpo_implied", 4, 4),  # of 40 points, as many latents as a call may have
        ("inversion_dpo_implied", None, 40),
        ("inversion_dpo_code", 8, 4),  # a pair at one point, and guidance shows each latent twice
        ("sft", 4, 1),
    ],
)
def test_latents_with_a_graph_are_seen_in_the_training_code(method: str, chunk: int | None, latents: int) -> None:
    recipe = {"trajectory": {"steps": 20}} if method.startswith("inversion") else {}
    arm = {"method": method, "recipe": recipe, "training": {"chunk": chunk, "batch": 1}}
    assert cost.held(sdxl(arms={"x": arm}).arm("x")).latents == latents


def test_gradients_that_are_kept_beside_those_that_are_added_are_counted() -> None:
    """Where a pass of one pair sets aside what earlier ones accumulated (`objectives.streaming`), memory for that is in
    the plan, as often as gradients are seen to be other tensors in the second pass of a step."""
    training = {"chunk": 4, "batch": 8, "checkpoints": []}
    arm = {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 20}}, "training": training}
    study = sdxl(arms={"x": arm, "one": arm | {"training": training | {"batch": 1}}})
    policy, seen = cost._Free(), []
    policy.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    for place in range(2):
        cost._backward(study.arm("x"), policy, cost._Free(trained=False), 0, 1, place)
    copies = len({id(gradient) for gradient in seen})
    assert len(seen) > 2 and cost.held(study.arm("x")).gradients == copies
    assert cost.held(study.arm("one")).gradients == 1
    found = plan(study, gpu="h100").arms
    extra = 4 * UNET * (copies - 1) / 1e9
    assert found["x"].train_memory == pytest.approx(found["one"].train_memory + extra)


def test_what_does_not_fit_is_said() -> None:
    study = sdxl({"optimizer": "adamw", "gradient_checkpointing": False, "processes": 2, "micro_batch": 2})
    problems = plan(study, gpu="h100").problems
    assert any("`dpo` needs about" in text and "`training.gradient_checkpointing: true`" in text for text in problems)
    assert any("`training.shard: true`: about" in text for text in problems)
    assert plan(sdxl({"optimizer": "adamw", "processes": 2, "shard": True}), gpu="a100", gpus=2).problems == []
    assert any("trains with 2 processes" in text for text in problems)
    assert plan(sdxl(), gpu="h100").problems == []
    small = plan(sdxl(), gpu_memory=16)
    assert any("Training `dpo` needs about" in text and "does not fit" in text for text in small.problems)
    assert any("Sampling and scoring need about" in text for text in small.problems)
    assert "!" in next(line for line in to_text(small).splitlines() if line.startswith("dpo "))
    assert any("This machine has no GPU" in text for text in plan(sdxl()).problems)


def test_the_longest_arm_decides_how_long_many_gpus_take() -> None:
    """2000 x 2048 x 8 evaluations at 1000 a second: 9.1 hours on one GPU, however many others there are."""
    study = sdxl()
    text = to_text(plan(study, throughput=1000, gpu="h100", gpus=50))
    assert "at least 9.1 hours, as long as `dpo` trains on 1 of them" in text
    assert "With 1 GPU at work all the time" in to_text(plan(study, throughput=1000, gpu="h100"))
    quick = to_text(plan(sdxl({"processes": 16}), throughput=1000, gpu="h100", gpus=16))
    assert "at least" not in quick and "With 16 GPUs at work" in quick


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The results take 440 GB of latents and 21 GB of checkpoints, the hub's cache 352 GB."""
    study = sdxl(data={"storage": "float32"}).placed(tmp_path / "results")

    def disks(free: float, apart: bool) -> None:
        found = {"name": 0, "the hub's cache": int(apart)}
        monkeypatch.setattr(
            module, "disk_at", lambda name, folder, needed: Disk(name, needed, free, found.get(name, 0))
        )

    whole = plan(study, gpu="h100")
    results, hub = sum(whole.disk.values()), sum(download.bound for download in whole.downloads.values())
    disks(results + hub + 1, apart=False)
    assert plan(study, gpu="h100").problems == []
    disks(results + hub - 1, apart=False)
    (problem,) = plan(study, gpu="h100").problems
    assert "does not fit" in problem and "`data.storage: float16`" in problem and "`dpo` draws 4,096,000" in problem
    disks(results + 1, apart=True)
    assert plan(study, gpu="h100").problems == []
    # What lies in the results already is room for the rest.
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "latents").write_bytes(bytes(3_000_000))
    (tmp_path / "results" / "again").hardlink_to(tmp_path / "results" / "latents")
    assert plan(study, gpu="h100").disks[0].needed == pytest.approx(results - 0.003, abs=1e-6)


def test_disks_are_those_of_this_machine(tmp_path: Path) -> None:
    found = machine.disk_at("results/", tmp_path / "not" / "there", 12.0)
    assert found.needed == 12 and found.device == tmp_path.stat().st_dev
    assert found.free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)


def test_too_little_memory_of_the_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, two jobs, and each reads its networks into the machine's memory first."""
    monkeypatch.setattr(machine, "this_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85.5))
    monkeypatch.setattr(machine, "devices", lambda: ["a", "b"])
    for ram, fits in {1.0: False, 1e4: True}.items():
        monkeypatch.setattr(machine, "installed_memory", lambda ram=ram: ram)
        problems = plan(sdxl()).problems
        assert any("2 jobs at a time" in text for text in problems) is not fits
    monkeypatch.setattr(machine, "installed_memory", lambda: 1.0)
    assert plan(sdxl(), gpu="h100", gpus=2).problems == [], "another machine's memory is not known"


def test_this_machines_gpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85.5))
    monkeypatch.setattr(machine, "devices", lambda: ["a", "b"])
    found = plan(sdxl()).machine
    assert (found.devices, found.tflops, found.memory) == (2, 989, 85.5)


def _smi(folder: Path, monkeypatch: pytest.MonkeyPatch, listing: str, totals: str) -> None:
    """A machine whose nvidia-smi says so."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{listing}' || printf '{totals}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(machine, "this_gpu", REAL_GPU)


@pytest.mark.parametrize(
    ("visible", "name", "memory", "count"),
    [
        (None, "NVIDIA GeForce RTX 3090", 24576 * 2**20 / 1e9, 2),  # a job may get either
        ("0", "NVIDIA A100 80GB PCIe", 81920 * 2**20 / 1e9, 1),
        ("1", "NVIDIA GeForce RTX 3090", 24576 * 2**20 / 1e9, 1),
        ("GPU-bbbb", "NVIDIA GeForce RTX 3090", 24576 * 2**20 / 1e9, 1),
        ("GPU-aaaa-1", "NVIDIA A100 80GB PCIe", 81920 * 2**20 / 1e9, 1),
    ],
)
def test_the_smallest_visible_gpu_is_planned_for(
    visible: str | None, name: str, memory: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = "GPU 0: NVIDIA A100 80GB PCIe (UUID: GPU-aaaa-1)\\nGPU 1: NVIDIA GeForce RTX 3090 (UUID: GPU-bbbb-2)\\n"
    _smi(tmp_path, monkeypatch, listing, "NVIDIA A100 80GB PCIe, 81920\\nNVIDIA GeForce RTX 3090, 24576\\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = plan(sdxl()).machine
    assert (found.name, found.memory, found.devices) == (name, pytest.approx(memory), count)


@pytest.mark.parametrize("visible", [None, "1", "MIG-dddd-4"])
def test_a_part_of_a_gpu_has_its_profiles_memory_and_rate(
    visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = (
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa-1)\\n  MIG 1g.10gb     Device  0: (UUID: MIG-cccc-3)\\n"
        "  MIG 1g.10gb     Device  1: (UUID: MIG-dddd-4)\\n"
    )
    _smi(tmp_path, monkeypatch, listing, "NVIDIA A100-SXM4-80GB, 81920\\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = plan(sdxl())
    assert (found.machine.memory, found.machine.devices) == (10, 2 if visible is None else 1)
    assert found.machine.tflops == pytest.approx(312 / 7)
    assert any("the 10 GB of NVIDIA A100-SXM4-80GB MIG 1g.10gb" in text for text in found.problems)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("rtx4090", 165),
        ("h200", 989),
        ("a100", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("Tesla V100-SXM2-32GB", None),  # on which the lock's torch does not run
    ],
)
def test_gpus_are_known_by_their_names(name: str, tflops: float | None) -> None:
    if tflops is None:
        with pytest.raises(InvdpoError, match="not known"):
            plan(sdxl(), gpu=name)
    else:
        assert plan(sdxl(), gpu=name).machine.tflops == tflops


def test_a_study_for_the_cpu_is_not_told_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_gpu", lambda: ("NVIDIA H100 80GB HBM3", 85.5))
    problem = plan(sdxl(device="cpu")).problems[0]
    assert problem.startswith("The study says `device: cpu`, and this machine's") and "no GPU" not in problem


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15_published", "sdxl_published", "sdxl_released"])
def test_a_plan_answers_for_the_studies_at_paper_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PAIRS_DRAWN", 16)
    study = load_study(f"config/{name}.yaml")
    found = plan(study, gpu="h800", gpus=8)
    trains = [arm for arm in study.arms if study.arm(arm).trains]
    assert found.jobs["train"] == found.jobs["evaluate"] == len(study.arms) == len(found.arms)
    known = {download for download in found.downloads.values() if download.gb is not None}
    assert known and all(download.gb for download in known)
    assert f"base: {study.base}" in found.downloads and any(place.startswith("scorer") for place in found.downloads)
    # Of published weights alone some sizes are not known, and their most is.
    assert all(download.bound for download in found.downloads.values())
    assert set(found.stages) == {"train", "evaluate", *(["preferences"] if trains else [])}
    for stage, spent in found.stages.items():
        assert spent.jobs > 0 and (spent.hours > 0 or (stage == "train" and not trains)), stage
    methods = {arm.method for arm in found.arms.values()}
    assert set(found.methods) == methods and all(spent.hours > 0 for spent in found.methods.values())
    assert all(gb > 0 for gb in found.disk.values()) and "images" in found.disk
    for arm, spent in found.arms.items():
        assert spent.evaluate_memory > 5 and spent.evaluate_hours > 0
        assert (spent.train_memory > 8 and spent.train_hours > 0) is (arm in trains), arm
    assert found.memory["of the machine, beside a device"] > 3
    assert not any(text.startswith(("Training", "Sampling")) for text in found.problems), "all of them fit 80 GB"
    assert json.loads(to_json(found))["hours"] == found.hours > 0 and study.base in to_text(found)


def test_downloads_are_what_is_not_here() -> None:
    found = plan(sdxl(), gpu="h100").downloads
    assert found.pop("preferences: yuvalkirstain/pickapic_v2 (645 files)").gb == 335
    assert {name: download.gb for name, download in found.items()} == {
        "base: stabilityai/stable-diffusion-xl-base-1.0": pytest.approx((UNET + VAE + TEXT) * 4 / 1e9),
        "prompts: partiprompts": 0.001,
        "scorer: yuvalkirstain/PickScore_v1": 3.94,
    }
    half = plan(sdxl(variant="fp16", vae="madebyollin/sdxl-vae-fp16-fix"), gpu="h100").downloads
    assert half["base: stabilityai/stable-diffusion-xl-base-1.0"].gb == pytest.approx((UNET + TEXT) * 2 / 1e9)
    assert half["vae: madebyollin/sdxl-vae-fp16-fix"].gb == 0.335
    unknown = plan(sdxl(scorers={"pickscore": {"model": "somebody/else"}}), gpu="h100")
    assert unknown.downloads["scorer: somebody/else"] == Download(None) and " + ?" in to_text(unknown)
    held_out = plan(sdxl(experiments={"preference_accuracy": {"votes": "owner/votes:validation"}}), gpu="h100")
    assert held_out.downloads["pairs: owner/votes:validation"] == Download(None)


def test_what_the_hubs_cache_holds_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole weights, and of the base and the pairs what is there; the hub is not asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    study = sdxl(
        scorers={
            "pickscore": {"model": "yuvalkirstain/PickScore_v1"},
            "clip": {"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"},
        }
    )

    def hold(repo: str, name: str, size: int = 10) -> None:
        path = tmp_path / repo / "snapshots" / "0123abcd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)

    def missing() -> float:
        return plan(study, gpu="h100").disks[1].needed

    base, whole = "models--stabilityai--stable-diffusion-xl-base-1.0", missing()
    assert whole == pytest.approx(sum(download.bound for download in plan(study, gpu="h100").downloads.values()))
    hold(base, "unet/diffusion_pytorch_model.fp16.safetensors")
    hold(base, "unet/config.json")
    hold("models--yuvalkirstain--PickScore_v1", "config.json")
    assert missing() == whole, "neither weights nor of this variant"
    hold(base, "unet/diffusion_pytorch_model.safetensors")
    assert missing() == pytest.approx(whole - 4 * UNET / 1e9)
    hold("models--yuvalkirstain--PickScore_v1", "model.safetensors")
    assert missing() == pytest.approx(whole - 4 * UNET / 1e9 - 3.94)
    hold("models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin")
    assert missing() == pytest.approx(whole - 4 * UNET / 1e9 - 2 * 3.94)
    pairs = "datasets--yuvalkirstain--pickapic_v2"
    hold(pairs, "data/train-00001-of-00645-aa.parquet", 2_000_000_000)
    hold(pairs, "data/test-00001-of-00007-aa.parquet", 1_000_000_000)
    assert missing() == pytest.approx(whole - 4 * UNET / 1e9 - 2 * 3.94 - 2)
    found = plan(study, gpu="h100")
    assert found.downloads["scorer: yuvalkirstain/PickScore_v1"] == Download(3.94, here=3.94)
    assert any(text.startswith("downloads: 20.1 GB of them lie in the hub's cache") for text in found.assumptions)


def test_own_samples_of_a_published_set_are_planned_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan fetches nothing")

    monkeypatch.setattr(prompts, "fetch_matching", fetched)
    own = {"prompts": "partiprompts", "images": 4, "seed": 1, "by": ["pickscore"]}
    study = sdxl(own_samples=own, preferences="results/paper/own_samples/pairs.parquet", prompts="hpdv2_photo")
    found = plan(study, gpu="h100")
    assert found.stages["own_samples"].evaluations == 4 * 1632 * 50 * 2
    assert any("all 9,792 pairs of the samples" in text for text in found.assumptions)  # six of each prompt
    assert "prompts: partiprompts" in found.downloads


def test_published_weights_are_fetched_and_sampled_as_their_own_base_is() -> None:
    """Nothing trains: no pairs, no preparation. An arm of SD1.5 costs what SD1.5 does, at its resolution."""
    study = load_study("config/sdxl_released.yaml")
    found, known = plan(study, gpu="h100"), sizes()
    weights = {name: entry.weights for name, entry in study.arms.items() if entry.weights}
    for name, place in weights.items():
        download = found.downloads[f"weights: {place}"]
        large = 4 * known["pipelines"]["sd15" if study.arms[name].base else "sdxl"]["unet_parameters"] / 1e9
        assert download.gb == known["files"].get(place) and 0.49 * large < download.bound < 1.01 * large, place
    assert sum(download.gb is None for download in found.downloads.values()) > 0, "not all sizes are known"
    assert "at most" in to_text(found)
    bases = {name for name in found.downloads if name.startswith("base: ")}
    assert bases == {f"base: {base}" for base in (study.base, study.bases["sd15"].model)}
    assert "latents and embeddings" not in found.disk and "preferences" not in found.stages
    assert not any(name.startswith("preferences") for name in found.downloads)
    large, small = found.arms["base"], found.arms["base_sd15"]
    ratio = known["pipelines"]["sd15"]["unet_flops"] / known["pipelines"]["sdxl"]["unet_flops"]
    assert large.evaluate_evaluations == small.evaluate_evaluations == 500 * 20 * 2
    assert small.evaluate_hours / large.evaluate_hours == pytest.approx(ratio, rel=0.25)  # and decoding, in fp32
    less = known["pipelines"]["sdxl"]["unet_parameters"] - known["pipelines"]["sd15"]["unet_parameters"]
    # SDXL's codec runs in half precision here and SD1.5's does not, whose four images have half of the pixels of two.
    assert large.evaluate_memory - small.evaluate_memory == pytest.approx((4 * less - 2 * VAE) / 1e9)


def test_only_files_that_hold_the_pairs_of_the_runs_are_fetched() -> None:
    """2 x 5,000 pairs of files with 1,320 decided rows each."""
    found = plan(sdxl({"steps": 500, "batch": 10}, seeds=[0, 1]), gpu="h100")
    assert found.downloads["preferences: yuvalkirstain/pickapic_v2 (8 files)"].gb == pytest.approx(335 * 8 / 645)
    pairs = next(text for text in found.assumptions if text.startswith("preferences:"))
    # Each seed draws 5,000 of the 8 x 1,320 pairs, so both draw some.
    assert "7,632 pairs" in pairs or "7,633 pairs" in pairs, pairs


def test_disk_counts_every_checkpoint_once() -> None:
    found = plan(sdxl(seeds=[0, 1, 2]), gpu="h100").disk
    assert found["checkpoints (6)"] == pytest.approx(6 * UNET * 4 / 1e9)
    assert found["latents and embeddings"] == pytest.approx(851_293 * 4 * (4 * 65536 + 158976) / 1e9)


def test_prompt_sets_are_as_large_as_they_are_published() -> None:
    for name, count in {"hpdv2_photo": 800, "hpdv2": 3200, "pickapic_v2_test_unique": 500}.items():
        found = plan(sdxl(prompts=name), gpu="h100")
        assert found.arms["base"].evaluate_evaluations == count * 50 * 2, name


def test_a_base_that_a_rule_makes_is_planned_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tree without results, as on the first day: sizes are those that the made base has."""
    from invdpo.world.sdxl_layout import convert

    original = ROOT / "assets" / "shapes" / "base"
    convert(original, tmp_path / "made")
    assert networks(*converted(original), 64) == networks(*configurations(tmp_path / "made"), 64)
    for name in ("assets", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    study = load_study("config/shapes_xl.yaml")
    assert not Path(study.base).exists()
    found = plan(study)
    assert found.jobs["base"] == 1 and found.downloads == {} and found.problems == []
    Path(study.base).parent.mkdir(parents=True)
    (tmp_path / "made").rename(study.base)
    again = plan(study)
    assert "base" not in again.jobs and again.arms == found.arms


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


def test_a_rate_is_a_number_or_a_finished_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run.json"
    run.write_text('{"unet_evals": 300, "seconds": 2.0}')
    assert read_throughput("12.5", "a/b") == 12.5 and read_throughput(str(run), "a/b") == 150
    # Evaluations are those of all processes, seconds those of the clock.
    run.write_text('{"unet_evals": 300, "seconds": 2.0, "processes": 3, "base": "a/b"}')
    assert read_throughput(str(run), "a/b") == 50 and not caplog.records
    assert read_throughput(str(run), "c/d") == 50
    assert "that run's base is a/b, the study's is c/d" in caplog.text
    for content in ('{"unet_evals": 300}', '{"unet_evals": 300, "seconds": "long"}', "[1]"):
        run.write_text(content)
        with pytest.raises(InvdpoError, match="expected `unet_evals` and `seconds`"):
            read_throughput(str(run), "a/b")


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan"])
def test_a_rate_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="must be positive and finite"):
        read_throughput(text, "a/b")
    run = tmp_path / "run.json"
    for evals, seconds in ((text, "1"), ("-1", "-1")):
        number = {"inf": "Infinity", "nan": "NaN"}.get(evals, evals)
        run.write_text(f'{{"unet_evals": {number}, "seconds": {seconds}}}')
        with pytest.raises(InvdpoError, match="must be positive and finite"):
            read_throughput(str(run), "a/b")


def test_the_command_prints_tables_or_json() -> None:
    text = CliRunner().invoke(app, ["plan", "--study", "config/smoke.yaml", "--throughput", "1000"]).output
    for words in ("downloads: none", "UNet evaluations", "inversion_dpo_code", "Assumptions", "as given with"):
        assert words in text
    printed = CliRunner().invoke(app, ["plan", "--study", "config/smoke.yaml", "--throughput", "1000", "--json"]).output
    found = json.loads(printed)
    assert found["study"] == "smoke" and found["jobs"]["train"] == len(load_study("config/smoke.yaml").arms)
    assert found["arms"]["sft"]["hash"] == load_study("config/smoke.yaml").arm("sft").hash
    assert found["hours"] > 0 and found["arms"]["sft"]["train_memory"] > 0 and found["disks"][0]["free"] > 0


def test_a_folders_networks_are_counted(tiny_base: Path, tiny_sdxl: Path) -> None:
    """The tiny pipeline: parameters as in its files, and with four times the pixels, four times the convolutions."""
    from safetensors.torch import load_file

    for base in (tiny_base, tiny_sdxl):
        found = networks(*configurations(base), 32)
        for part in ("unet", "vae", "text"):
            files = [file for folder in base.glob(f"{part}*") for file in folder.glob("*.safetensors")]
            stored = sum(value.numel() for file in files for value in load_file(file).values())
            assert found[f"{part}_parameters"] == stored, (base, part)
        assert held_bytes(base / "unet") > 4 * found["unet_parameters"]
    small, large = (networks(*configurations(tiny_base), side) for side in (32, 64))
    assert small["latent_elements"] == 64 and large["latent_elements"] == 256
    assert small["caption_elements"] == 16 * 16
    assert networks(*configurations(tiny_sdxl), 32)["caption_elements"] == 16 * (16 + 24) + 12
    for name in ("unet_flops", "encode_flops", "decode_flops"):
        assert 3 < large[name] / small[name] < 5
    assert small["unet_operations"] == large["unet_operations"] > 100
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


TEXT_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
TEXT_G = TEXT_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


@pytest.mark.parametrize(("name", "unet", "texts"), [("sd15", SD15, [TEXT_L]), ("sdxl", SDXL, [TEXT_L, TEXT_G])])
def test_known_sizes_are_those_of_the_architectures(
    name: str, unet: dict[str, Any], texts: list[dict[str, Any]]
) -> None:
    entry = sizes()["pipelines"][name]
    found = networks(unet, CODEC, texts, entry["resolution"])
    assert found == {key: value for key, value in entry.items() if key not in ("ids", "resolution")}
