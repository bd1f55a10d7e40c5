"""Options for large models: adapters, an offloaded reference, memory format, compilation, optimizers, and the advice of
a GPU that is too small.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file

from invdpo import cost, evaluate, objectives
from invdpo.backbones import pipeline
from invdpo.config import LoraConfig, StudyConfig, TrainingConfig
from invdpo.device import compiling, memory_for
from invdpo.errors import InvdpoError
from invdpo.preferences.cache import load_cache
from invdpo.training import loop, lora, offload, optim, state
from invdpo.training.ranks import Ranks
from invdpo.types import Conditioning

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
ADAPTERS = {"rank": 2, "alpha": 6}
IMPLIED = {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 3}}}
FILE = "diffusion_pytorch_model.safetensors"


def train(study: StudyConfig, arm: str, seeds: list[int] | None = None) -> None:
    loop.train(study, arm, seeds or [0], CPU)


def out(arm: str, seed: int = 0) -> Path:
    return Path("results/tiny/runs") / arm / f"seed{seed}"


def weights(arm: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out(arm, seed) / "unet" / FILE)


def rows(arm: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out(arm) / "train.jsonl").read_text().splitlines()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def some_input(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x, embeds = (torch.randn((batch, *shape), generator=generator) for shape in ((4, 4, 4), (16, 16)))
    return x, torch.tensor([10, 700][:batch]), Conditioning(embeds)


def test_adapters_start_at_the_base_and_train_nothing_else(
    prepared: MakeStudy, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    study = prepared(arms={"arm": {"method": "diffusion_dpo"}}, training={"lora": ADAPTERS})
    networks = []
    real = loop.Stepper.__init__

    def init(self: loop.Stepper, run: Any, policy: Any, reference: Any, base: Any, *rest: Any) -> None:
        networks.append((policy, reference, base))
        real(self, run, policy, reference, base, *rest)

    monkeypatch.setattr(loop.Stepper, "__init__", init)
    train(study, "arm")
    (three,) = networks
    assert three[0] is three[1] is three[2]  # one copy in memory
    found = rows("arm")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and found[0]["implicit_accuracy"] == 0.5
    assert found[0]["grad_norm"] > 0 and found[-1]["loss"] != found[0]["loss"]
    base = pipeline.load_unet(tiny_base, CPU).state_dict()
    changed = {name for name, value in weights("arm").items() if not torch.equal(value, base[name])}
    targets = tuple(f"{layer}.weight" for layer in LoraConfig.model_validate({}).targets)
    assert changed == {name for name in base if name.endswith(targets)} != set()
    distance = math.sqrt(sum(float((weights("arm")[name] - base[name]).square().sum()) for name in base))
    assert found[-1]["reference_distance"] == pytest.approx(distance, rel=1e-3)
    norm = math.sqrt(sum(float(value.square().sum()) for value in base.values()))
    run = json.loads((out("arm") / "run.json").read_text())
    assert run["relative_reference_distance"] == pytest.approx(distance / norm, rel=1e-3)


def test_a_stock_pipeline_loads_the_adapters_of_a_checkpoint(prepared: MakeStudy, tiny_base: Path) -> None:
    """And they make of the base what the merged UNet beside them is."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    train(prepared(training={"lora": ADAPTERS, "learning_rate": 1e-2}), "dpo")
    folder = out("dpo") / "checkpoints" / "step000004"
    merged = pipeline.UNetEps(pipeline.load_unet(folder, CPU, base=tiny_base))
    stock = StableDiffusionPipeline.from_pretrained(tiny_base)
    plain = pipeline.UNetEps(stock.unet)
    with torch.no_grad():
        before = plain(*some_input())
        stock.load_lora_weights(folder)
        adapted = plain(*some_input())
        wanted = merged(*some_input())
    assert float((wanted - before).norm() / before.norm()) > 1e-3
    torch.testing.assert_close(adapted, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_network_without_its_adapters(prepared: MakeStudy, checkpointing: bool) -> None:
    """The same gradient, streamed in four calls, as against a copy of the base."""
    pytest.importorskip("peft")
    study = prepared(arms={"arm": IMPLIED}, training={"lora": ADAPTERS, "chunk": 6})
    arm = study.arm("arm")
    base = pipeline.load_unet(study.base, CPU, checkpointing).requires_grad_(False)
    other = pipeline.load_unet(study.base, CPU).requires_grad_(False)
    assert arm.training.lora is not None
    policy = lora.attach(base, arm.training.lora, seed=3)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(0))
    cache, schedule = load_cache(study.root / "preferences", CPU), pipeline.load_schedule(study.base)
    gradients = []
    for reference in (base, other):
        policy.zero_grad()
        optimizer = torch.optim.SGD(state.trained(policy).values(), lr=0.0)
        progress = state.Progress()
        run = loop.Run(study, arm, 0, CPU)
        stepper = loop.Stepper(run, policy, reference, base, optimizer, schedule, cache, torch.float32, progress)
        stepper._accumulate(1)
        gradients.append(torch.cat([p.grad.flatten() for p in stepper.parameters if p.grad is not None]))
        assert len(gradients[-1]) == sum(value.numel() for value in state.trained(policy).values())
    assert gradients[0].norm() > 0 and torch.equal(gradients[0], gradients[1])


def test_the_base_is_what_it_was_after_adapters(prepared: MakeStudy) -> None:
    """A second seed in the same process, and inversions shared with an arm that trains all weights."""
    pytest.importorskip("peft")
    arms = {"whole": IMPLIED, "adapted": {**IMPLIED, "training": {"lora": ADAPTERS}}}
    study = prepared(arms=arms, trajectory_cache_gb=0.1)
    train(study, "whole", [0, 1])
    train(study, "adapted", [0, 1])
    for seed in (0, 1):
        cached = json.loads((out("adapted", seed) / "run.json").read_text())["trajectory_cache"]
        assert cached["asked"] == cached["found"] == study.training.steps
    both = [weights("adapted", seed) for seed in (0, 1)]
    shutil.rmtree("results/tiny/runs")
    shutil.rmtree("results/tiny/state")
    train(study, "adapted", [1])
    assert same(both[1], weights("adapted", 1)) and not same(*both)


def test_a_run_with_adapters_goes_on_where_it_stopped(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    arm = {"method": "diffusion_dpo", "training": {"lora": ADAPTERS}}
    study = prepared(arms={"whole": arm, "stopped": arm})
    train(study, "whole")
    step = loop.Stepper.step

    def stopping(self: loop.Stepper) -> dict[str, Any]:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(study, "stopped")
    (kept,) = study.root.glob("state/stopped/seed0/*/state.pt")
    assert all(".lora_" in name for name in torch.load(kept, weights_only=True)["policy"])
    train(study, "stopped")
    assert same(weights("stopped"), weights("whole"))


def test_adapters_that_cannot_be_are_refused(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = {"method": "diffusion_dpo", "initial_rounding": "float16"}
    study = prepared(arms={"rounded": rounded}, training={"lora": ADAPTERS})
    with pytest.raises(InvdpoError, match="`initial_rounding` and `training.lora` exclude each other"):
        train(study, "rounded")
    with pytest.raises(InvdpoError, match="nothing to offload"):
        prepared(training={"lora": ADAPTERS, "reference_offload": True})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(InvdpoError, match="needs peft, which is not installed.*uv sync --extra lora"):
            train(study, "dpo")
    pytest.importorskip("peft")
    with pytest.raises(InvdpoError, match=r"`training.lora.targets: \['to_x'\]` fit no layer"):
        train(prepared(training={"lora": {"targets": ["to_x"]}}), "dpo")


@pytest.mark.parametrize(
    "arm",
    [
        {"method": "diffusion_dpo"},
        IMPLIED,
        {"method": "inversion_dpo_code", "recipe": {"trajectory": {"steps": 3}}},
        {"method": "ddim_inpo", "recipe": {"trajectory": {"steps": 3}}},
        {"method": "dspo"},
    ],
    ids=lambda arm: arm["method"],
)
def test_an_offloaded_reference_comes_once_a_pass_and_changes_nothing(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch, arm: dict[str, Any]
) -> None:
    settings = {"steps": 2, "micro_batch": 2, "chunk": 3}
    away = {**arm, "training": {"reference_offload": True}}
    study = prepared(arms={"here": arm, "away": away}, training=settings)
    train(study, "here")
    events: list[str] = []

    def telling(name: str) -> Any:
        real = getattr(offload.Offloaded, name)

        def method(self: offload.Offloaded, *arguments: Any) -> Any:
            events.append(name)
            return real(self, *arguments)

        return method

    for name in ("fetch", "release"):
        monkeypatch.setattr(offload.Offloaded, name, telling(name))
    real = offload.Offloaded.released_before

    def released_before(self: offload.Offloaded, model: Any) -> Any:
        def alone(*arguments: Any) -> torch.Tensor:
            assert not self.present
            return model(*arguments)

        return real(self, alone)

    monkeypatch.setattr(offload.Offloaded, "released_before", released_before)
    train(study, "away")
    assert same(weights("away"), weights("here"))
    assert [row["unet_evals"] for row in rows("away")] == [row["unet_evals"] for row in rows("here")]
    assert events.count("fetch") == 4  # two steps of two passes


def test_channels_last_weights_give_the_same_policy(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"method": "diffusion_dpo"}
    study = prepared(arms={"plain": arm, "last": {**arm, "training": {"channels_last": True}}})
    formats: list[bool] = []
    real = loop.Stepper.step

    def step(self: loop.Stepper) -> dict[str, Any]:
        kernels = [value for value in self.parameters if value.ndim == 4 and value.shape[2] > 1 < value.shape[1]]
        formats.append(all(value.is_contiguous(memory_format=torch.channels_last) for value in kernels))
        return real(self)

    monkeypatch.setattr(loop.Stepper, "step", step)
    for name in ("plain", "last"):
        train(study, name)
    assert formats == [False] * 4 + [True] * 4
    difference = sum(
        float((a - b).square().sum()) for a, b in zip(weights("plain").values(), weights("last").values(), strict=True)
    )
    assert math.sqrt(difference) < 1e-2 * rows("plain")[-1]["reference_distance"]


def test_both_networks_are_compiled(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that compiles nothing, which takes a minute less than the real one."""
    compiled: list[Any] = []

    def compiler(function: Any, **_: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            compiled.append(function)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    arm = {"method": "diffusion_dpo", "training": {"steps": 1, "checkpoints": []}}
    study = prepared(arms={"plain": arm, "compiled": {**arm, "training": {**arm["training"], "compile": True}}})
    train(study, "plain")
    assert not compiled
    train(study, "compiled")
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
    assert same(weights("plain"), weights("compiled"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_unet_predicts_the_same(tiny_base: Path) -> None:
    """By torch's own compiler, as `training.compile` has it."""
    plain, compiled = (pipeline.load_unet(tiny_base, CPU).requires_grad_(False) for _ in range(2))
    loop._arrange(compiled, TrainingConfig.model_validate({"compile": True}))
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(
        pipeline.UNetEps(compiled)(*some_input()), pipeline.UNetEps(plain)(*some_input()), rtol=1e-4, atol=1e-5
    )
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1 and stats["calls_captured"] > 100
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_network_that_cannot_be_compiled_says_what_is_needed(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiler(*_: object) -> Any:
        raise RuntimeError("No working C++ compiler found")

    def backward(*_: object, **__: object) -> Any:
        return torch.compile(torch.neg, backend=without_compiler)(torch.ones(1))

    monkeypatch.setattr(objectives, "backward", backward)
    study = prepared()
    words = r"dpo/seed0: step 1: torch.compile could .*No working C\+\+ .* install .*g\+\+.*`training.compile: false`"
    with pytest.raises(InvdpoError, match=words):
        train(study, "dpo")


def test_other_errors_are_not_blamed_on_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="^sizes differ$"), compiling("step 1"):
        raise RuntimeError("sizes differ")
    with pytest.raises(InvdpoError, match="step 1: torch.compile could not build the network .Failed to find C comp"):
        with compiling("step 1"):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    with pytest.raises(InvdpoError, match="step 1: out of GPU memory"):
        with memory_for("step 1", ["less"]), compiling("step 1"):
            torch.compile(torch.neg, backend=full)(torch.ones(1))


def test_gradients_of_gradients_are_not_compiled(prepared: MakeStudy) -> None:
    arm = {"method": "likelihood_dpo", "training": {"compile": True}}
    study = prepared(arms={"likelihood": arm, "dpo": {**arm, "method": "diffusion_dpo"}})
    loop._check_passes(study.arm("dpo"), Ranks())
    with pytest.raises(InvdpoError, match="`arms.likelihood`: `training.compile` and recipe likelihood_dpo exclude"):
        train(study, "likelihood")


def test_attention_is_torchs_scaled_dot_product_attention(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a fused kernel where there is one, with no setting for it."""
    unet = pipeline.load_unet(tiny_base, CPU)
    processors = unet.attn_processors
    assert processors and {type(each) for each in processors.values()} == {AttnProcessor2_0}
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def attention(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        pipeline.UNetEps(unet)(*some_input())
    assert len(calls) == len(processors)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"optimizer": "adafactor"}, "optimizer: adafactor"),
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit"),
        ({"lora": ADAPTERS}, "lora"),
        ({"reference_offload": True}, "reference_offload"),
        ({"channels_last": True}, "channels_last"),
        ({"compile": True}, "compile"),
    ],
)
def test_what_cannot_be_sharded_is_refused(prepared: MakeStudy, other: dict[str, Any], named: str) -> None:
    prepared(training=other)
    with pytest.raises(InvdpoError, match=f"training.*shard and {named} exclude each other: "):
        prepared(training=other | {"shard": True})


def test_where_and_how_safely_a_run_is_trained_is_no_part_of_its_hash(prepared: MakeStudy) -> None:
    plain = prepared().arm("dpo").hash
    for change in ({"save_minutes": None}, {"save_minutes": 5}, {"shard": True}, {"processes": 2}):
        assert prepared(training=change).arm("dpo").hash == plain


def optimizer_of(**training: Any) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    return optim.build_optimizer([parameter], TrainingConfig.model_validate(training), 0.1)


def test_adafactor_is_that_of_the_released_script() -> None:
    """train_ddim.py:803-810: no momentum, the fixed rate as it is; the gradient is clipped to 1.0 before."""
    (group,) = optimizer_of(optimizer="adafactor").param_groups
    wanted = {"beta1": None, "scale_parameter": False, "relative_step": False, "warmup_init": False, "lr": 0.1}
    assert {key: group[key] for key in wanted} == wanted and group["weight_decay"] == 0.01
    assert TrainingConfig.model_validate({}).max_grad_norm == 1.0


def test_8_bit_adamw_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
            super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(InvdpoError, match="`training.optimizer: adamw_8bit` needs bitsandbytes"):
        optimizer_of(optimizer="adamw_8bit")
    stub = types.ModuleType("bitsandbytes.optim")
    stub.__dict__["AdamW8bit"] = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stub)
    assert importlib.import_module("bitsandbytes.optim") is stub
    optimizer = optimizer_of(optimizer="adamw_8bit", weight_decay=0.5)
    assert isinstance(optimizer, AdamW8bit)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.1, 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_fused_on_cuda() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = optim.build_optimizer([parameter], TrainingConfig.model_validate({}), 0.1)
    assert optimizer.defaults["fused"] and not optimizer_of().defaults["fused"]


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")


@pytest.mark.parametrize("where", ["step", "optimizer", "base"])
def test_a_full_gpu_names_what_to_lower(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    study = prepared()
    assert cost.backward is objectives.backward, "advice is counted by the code itself, which is not what is replaced"
    place, message = {
        "step": ((objectives, "backward"), "dpo/seed0: step 1: .*Tried.*`training.micro_batch: 2` (now 4): about"),
        "optimizer": ((loop, "build_optimizer"), "dpo/seed0: weights and optimizer: .*(1) `training.optimizer: adaf"),
        "base": ((loop, "load_unet"), "dpo: the base: out of GPU memory"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(InvdpoError, match=message.replace("(", r"\(").replace(")", r"\)")) as raised:
            train(study, "dpo")
    # What graphs have to do with it is no help where the weights and the optimizer do not fit.
    assert ("training.micro_batch" in str(raised.value)) is (where == "step")
    train(study, "dpo")
    assert len(rows("dpo")) == 4


def test_a_full_gpu_in_evaluation_names_the_batch(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = prepared()
    monkeypatch.setattr(evaluate, "sample", full)
    monkeypatch.setattr(evaluate, "build_scorers", lambda *_: [])
    with pytest.raises(InvdpoError, match=r"arm base: out of GPU memory.*\(1\) `sampling.batch: 1` \(now 2\); \(2\)"):
        evaluate.evaluate(study, "base", [0], CPU)
