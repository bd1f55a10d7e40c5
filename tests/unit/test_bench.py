"""The benchmark: what is raced does the same work, and what is written says what was measured and what was not."""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from invdpo.config import load_study
from invdpo.errors import InvdpoError
from invdpo.objectives import backward, load_recipe
from invdpo.training.ranks import Ranks

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU, META = torch.device("cpu"), torch.device("meta")
MODULES = (
    "measure",
    "models",
    "loops",
    "cases",
    "scaling",
    "goals",
    "bench",
)  # as bench.py names them, each after what it uses


@pytest.fixture(scope="module")
def code() -> Iterator[Any]:
    """The benchmark's modules by name, which are no part of the package."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def little(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images and pairs where the benchmark takes more."""
    monkeypatch.setattr(code.cases, "SMALL", replace(code.cases.SMALL, images=2, batch=2))


@pytest.fixture
def models(code: Any, tiny_base: Path) -> Any:
    return code.models.load(str(tiny_base), CPU)


@pytest.fixture
def xl(code: Any, tiny_sdxl: Path) -> Any:
    return code.models.load(str(tiny_sdxl), CPU)


def gradient(unet: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
@pytest.mark.parametrize("method", ["inversion_dpo_code", "inversion_dpo_implied"])
def test_streamed_gradient_is_the_reference_loops(
    code: Any, method: str, base: str, request: pytest.FixtureRequest
) -> None:
    models = code.models.load(str(request.getfixturevalue(base)), CPU)
    models.policy.double()
    models.reference.double()
    recipe = load_recipe(method).with_overrides({"beta": 20.0, "trajectory": {"steps": 5}})
    win, lose = models.latents(2, 1).double(), models.latents(2, 2).double()
    cond = models.prompts(2, 3).map(torch.Tensor.double)

    losses = []
    models.policy.enable_gradient_checkpointing()
    for i in range(2):
        pair = cond.map(lambda value, i=i: value[i : i + 1])
        losses.append(code.loops.reference_loop(recipe, models, win[i : i + 1], lose[i : i + 1], pair))
    wanted = gradient(models.policy) / 2
    models.policy.disable_gradient_checkpointing()
    models.policy.zero_grad()
    eps_models = models.eps(models.policy), models.eps(models.reference)
    out = backward(recipe, *eps_models, win, lose, cond, models.schedule, torch.Generator(), chunk=3)
    assert wanted.norm() > 1e-6
    assert torch.dist(gradient(models.policy), wanted) <= 1e-8 * wanted.norm()
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_the_reference_loop_takes_a_reference_in_half_precision(
    code: Any, base: str, request: pytest.FixtureRequest
) -> None:
    """As the script's is, and a training's on a GPU."""
    models = code.models.load(str(request.getfixturevalue(base)), CPU)
    whole, models = models.reference, replace(models, reference=copy.deepcopy(models.reference).half())
    recipe = load_recipe("inversion_dpo_code").with_overrides({"beta": 20.0, "trajectory": {"steps": 3}})
    win, lose, cond = models.latents(1, 1), models.latents(1, 2), models.prompts(1, 3)
    wanted = code.loops.reference_loop(recipe, models, win, lose, cond)
    loop = gradient(models.policy)
    models.policy.zero_grad()
    eps_models = models.eps(models.policy), models.eps(models.reference)
    out = backward(recipe, *eps_models, win, lose, cond, models.schedule, torch.Generator(), chunk=3)
    assert abs(out.loss - wanted) <= 1e-3 * wanted
    assert torch.dist(gradient(models.policy), loop) <= 0.02 * loop.norm()
    rounded = models.eps(models.reference)(win, torch.tensor([500]), cond.without_uncond())
    assert not torch.equal(rounded, models.eps(whole)(win, torch.tensor([500]), cond.without_uncond()))


@pytest.mark.parametrize("method", ["inversion_dpo_code", "inversion_dpo_implied"])
def test_at_sdxl_s_size_memory_is_that_of_the_paper_s_study(
    code: Any, models: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer, and its frozen reference beside the base; tried at the size of the tests."""
    real, made = code.cases.Stepper, []
    monkeypatch.setattr(code.cases, "Stepper", lambda *parts: made.append(parts) or real(*parts))
    for side, paper in ((32, False), (64, False), (128, True)):
        scale = code.cases.scale_of(SimpleNamespace(shape=(4, side, side)))
        assert scale.paper == paper, side
    monkeypatch.setattr(code.cases, "SMALL", replace(scale, pairs=2))
    raced = code.cases.all_timesteps(models, method, 4)
    arm = load_study("config/sdxl.yaml").arm(method)
    assert set(raced) == {code.cases.REFERENCE_LOOP, code.cases.ONE, code.cases.SEVERAL}
    for run, policy, reference, base, optimizer, *_ in made:
        assert type(optimizer).__name__.lower() == arm.training.optimizer
        mine, studied = run.arm.training, arm.training
        for name in ("optimizer", "gradient_checkpointing", "chunk"):
            assert getattr(mine, name) == getattr(studied, name), name
        assert policy is models.policy and base is models.reference
        # On a CPU it is rounded to half precision and kept in fp32.
        halved = arm.recipe.reference_dtype == "float16"
        assert (reference is base) == (not halved)
        weight = reference.conv_in.weight
        assert torch.equal(weight, weight.half().float()) == halved
    looped: list[Any] = []
    monkeypatch.setattr(code.cases, "reference_loop", lambda recipe, models, *pair: looped.append(models.reference))
    raced[code.cases.REFERENCE_LOOP].work()
    assert {id(reference) for reference in (looped[0], *(parts[2] for parts in made))} == {id(made[0][2])}, "one copy"


def test_the_reference_loop_is_guided(code: Any, models: Any) -> None:
    """Guidance 1 instead of the script's 2 would show in the parity above."""
    guided = load_recipe("inversion_dpo_code").with_overrides({"beta": 1.0, "trajectory": {"steps": 3}})
    plain = guided.with_overrides({"trajectory": {"guidance_scale": 1.0}})
    win, lose, cond = models.latents(1, 1), models.latents(1, 2), models.prompts(1, 3)
    gradients = []
    for recipe in (guided, plain):
        models.policy.zero_grad()
        code.loops.reference_loop(recipe, models, win, lose, cond)
        gradients.append(gradient(models.policy))
    assert torch.dist(*gradients) > 0.1 * gradients[0].norm()


def test_the_random_networks_have_sdxl_s_sizes(code: Any) -> None:
    """As the files of stable-diffusion-xl-base-1.0 have them."""
    unet = code.models.sdxl_unet(META)
    text = code.models.sdxl_text(META)
    networks = (unet, code.models.sdxl_codec(META), *(encoder.network for encoder in text.encoders))
    sizes = [sum(value.numel() for value in network.parameters()) for network in networks]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert unet.add_embedding.linear_1.weight.shape == (1280, 2816)
    assert {value.device for network in networks for value in network.parameters()} == {META}


@pytest.mark.usefixtures("little")
def test_sampling_is_held_against_a_pipeline_that_draws_the_same(code: Any, models: Any, xl: Any) -> None:
    for drawn in (models, xl):
        raced = code.cases.sampling(drawn, decoded=True)
        stock, ours = (np.stack([np.asarray(image, dtype=int) for image in each.work()]) for each in raced.values())
        assert stock.shape == (2, 32, 32, 3) and stock.std() > 1
        assert np.abs(stock - ours).max() <= 1
        raced = code.cases.sampling(drawn, decoded=False)
        stock, ours = (each.work() for each in raced.values())
        torch.testing.assert_close(stock, ours, rtol=1e-3, atol=1e-3)
        assert {each.needed for each in raced.values()} == {2 * 20 * 2}


@pytest.mark.usefixtures("little")
def test_a_cached_step_is_the_one_that_encodes(code: Any, models: Any, xl: Any) -> None:
    """Both steps draw the same noise only where they are the same step of their run."""
    for trained in (models, xl):
        raced = code.cases.caching(trained)
        state = {name: value.clone() for name, value in trained.policy.state_dict().items()}
        rows = []
        for each in (code.cases.caching(trained)[name] for name in raced):
            trained.policy.load_state_dict(state)
            rows.append(each.work())
        names = ("step", "loss", "logratio_win", "logratio_lose", "grad_norm")
        assert rows[0]["step"] == 1 and rows[0]["grad_norm"] > 0
        np.testing.assert_allclose(*([row[name] for name in names] for row in rows), rtol=1e-4)
        held = [each.held for each in raced.values()]
        networks = (trained.codec(), *(encoder.network for encoder in trained.text().encoders))
        assert held == [4 * sum(value.numel() for network in networks for value in network.parameters()), 0]


def test_evaluations_are_those_that_are_computed(code: Any, models: Any) -> None:
    """By a count of every product and convolution: a backward pass as two forward passes, a layer or two apart."""
    machine, *_ = code.bench.inspected(models)
    assert 0 < machine.again < machine.forward
    found = {}
    for case in (code.cases.training(models), code.cases.all_timesteps(models, "inversion_dpo_code", 4)):
        for name, each in case.items():
            counted = code.measure.flops(each.work, CPU)
            expected = each.executed * machine.forward + each.repeated * machine.again
            assert counted == pytest.approx(expected, rel=0.05), name
            found[name] = tuple(count / each.amount for count in (each.needed, each.executed, each.repeated))
    # Of a pair a step: 2 latents by the reference, 2 by the policy with their backward passes. Of N = 4: 2 images * 4
    # steps * 2 halves * (1 + 3); the loop makes the policy's 16 again for its checkpoints, several pairs for theirs.
    assert found == {
        code.cases.PLAIN: (8, 8, 0),
        code.cases.LOOP: (8, 8, 0),
        code.cases.REFERENCE_LOOP: (64, 64, 16),
        code.cases.ONE: (64, 64, 0),
        code.cases.SEVERAL: (64, 80, 0),
    }


def test_shares_tell_hardware_from_model(code: Any) -> None:
    machine = code.bench.Machine(peak=1000.0, forward=2.0, again=1.5)
    each = code.cases.Competitor(work=list, amount=3, needed=192, executed=240, repeated=30)
    found = code.bench.shares(each, 4.0, machine)
    assert found == {
        "model_share_of_peak": pytest.approx(4 / 3 * 192 * 2 / 1000),
        "hardware_share_of_peak": pytest.approx(4 / 3 * (240 * 2 + 30 * 1.5) / 1000),
    }
    assert code.bench.shares(code.cases.Competitor(list, 3), 4.0, machine) == {}


def test_the_cases(code: Any) -> None:
    known = list(code.cases.all_cases([20, 80]))
    assert known == [
        *("forward", "training", "caching", "sampling", "sampling_decoded"),
        *("inversion_dpo_code_n20", "inversion_dpo_implied_n20", "inversion_dpo_code_n80", "inversion_dpo_implied_n80"),
        *("layouts", "compiled"),
    ]
    assert code.bench.chosen(None, known) == known
    assert code.bench.chosen("layouts,forward", known) == ["forward", "layouts"]
    with pytest.raises(InvdpoError, match="there is no case trainings; there are forward, training"):
        code.bench.chosen("forward,trainings", known)


def test_layouts_and_compilation_leave_the_gradient_as_it_is(
    code: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling, which takes minutes, replaced by a call that notes what was asked for."""
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda network: asked.append(network) or network)
    raced = code.cases.layouts(models) | code.cases.compiled(models)
    assert tuple(raced) == (*code.cases.LAYOUTS, *code.cases.COMPILED)
    assert asked == [models.policy, models.reference]
    ratios = [raced[name].work().logratio_win for name in raced]
    assert ratios[0].abs().min() > 1e-6
    for ratio in ratios[1:]:
        torch.testing.assert_close(ratio, ratios[0], rtol=1e-3, atol=1e-6)


def test_a_machine_that_cannot_compile_says_so(code: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, network: Any) -> None:
            self.dtype, self.config = network.dtype, network.config

        def __call__(self, *arguments: Any, **options: Any) -> None:
            raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", Failing)
    with pytest.raises(InvdpoError, match="torch.compile: .*no C\\+\\+ compiler"):
        code.cases.compiled(models)


def test_rounds_end_with_their_time_and_what_did_not_fit_is_not_tried_again(
    code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    turns: list[str] = []

    def fits() -> None:
        turns.append("fits")

    def fails() -> None:
        turns.append("fails")
        raise torch.OutOfMemoryError

    found = code.measure.interleaved({"fits": fits, "fails": fails}, 3, CPU)
    assert turns == ["fits", "fails", "fits", "fits", "fits"]
    assert len(found["fits"]) == 3 and found["fails"] == [float("inf")] * 3
    table = code.measure.compared(found, {"fits": 1, "fails": 1}, "fails")
    assert table["fails"]["per_second"] == 0 and table["fits"]["ratio"] is None
    turns.clear()
    found = code.measure.interleaved({"fits": fits}, 3, CPU, limit=0)
    assert turns == ["fits"] and len(found["fits"]) == 1, "the round that warms up counts where it is the only one"


def run(code: Any, base: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The report of a run on one thread."""
    code.bench.main(str(base), device="cpu", threads=1, out=out, rounds=1, steps="4", **options)
    return json.loads(out.read_text())


@pytest.mark.usefixtures("little")
def test_a_report_is_whole_after_every_case_and_says_what_is_missing(
    code: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "folder" / "found.json", [*code.cases.all_cases([4]), "scaling"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(code.bench, "matmul_peak", lambda device, dtype: 1e12)

    report = run(code, tiny_base, out, cases=None, max_seconds=0)
    assert report["cases"] == {} and report["missing"] == dict.fromkeys(names, code.bench.NO_TIME)
    assert "- `forward`: the run ended before it" in out.with_suffix(".md").read_text()
    assert list(pd.read_csv(out.with_suffix(".csv"))) == code.bench.COLUMNS

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(code.bench, "two_processes", killed)
        run(code, tiny_base, out, cases="scaling,forward", max_seconds=1e9)
    stopped = json.loads(out.read_text())
    assert list(stopped["cases"]) == ["forward"] and stopped["missing"]["scaling"] == code.bench.NO_TIME
    assert stopped["missing"]["training"] == code.bench.NOT_ASKED

    def alone(*arguments: Any) -> None:
        raise InvdpoError("it takes 2 cores, and there is 1")

    monkeypatch.setattr(code.bench, "two_processes", alone)
    report = run(code, tiny_base, out, cases="scaling,inversion_dpo_code_n4", max_seconds=1e9)
    assert report["cases"]["forward"] == stopped["cases"]["forward"], "what was measured before is kept"
    kept = list(report["cases"]["forward"]["competitors"])
    assert kept == ["plain, one latent a call", "plain, batched", "eps-model"], "the first is what ratios are to"
    assert report["missing"]["scaling"] == "it takes 2 cores, and there is 1"
    found = report["cases"]["inversion_dpo_code_n4"]
    assert found["steps"] == 4 and list(found["competitors"]) == [
        code.cases.REFERENCE_LOOP,
        code.cases.ONE,
        code.cases.SEVERAL,
    ]
    for values in found["competitors"].values():
        assert values["peak_bytes"] > 2**18 and values["per_second"] > 0
        assert 0 < values["model_share_of_peak"] <= values["hardware_share_of_peak"] < 1
    assert "written to" in capsys.readouterr().out
    table = pd.read_csv(out.with_suffix(".csv"))
    assert list(table["competitor"])[-3:] == list(found["competitors"]) and set(table["N"].dropna()) == {4}

    assert code.bench.earlier(out, "another") == {} and code.bench.earlier(tmp_path / "none.json", "") == {}
    torch.set_num_threads(threads)


def test_the_table_says_what_did_not_fit(code: Any) -> None:
    values = {"per_second": 0.5, "ratio": None, "ratio_range": None, "at_a_time": 1, "rounds": 1}
    loop = values | {"per_second": 0.0, "peak_bytes": None, "total_bytes": None}
    ours = values | {"peak_bytes": 3 * 2**20, "total_bytes": 70 * 2**30, "model_share_of_peak": 0.5}
    report = {
        "device": "GPU",
        "device_type": "cuda",
        "matmul_peak_flops": 7e14,
        "options": {"threads": 16, "rounds": 3, "model": "random", "dtype": "bfloat16", "scale": {}},
        "cases": {"n80": {"title": "step, pairs", "steps": 80, "competitors": {"loop": loop, "ours": ours}}},
        "missing": {"scaling": "it takes 2 GPUs, and there is 1"},
        "goals": [],
    }
    lines = code.bench.markdown(report).splitlines()
    assert "| step, pairs | 80 | loop | 1 | 0 | - |  |  | out of memory | out of memory |" in lines
    assert "| step, pairs | 80 | ours | 1 | 0.5 | - | 50% |  | 3.0 | 71,680.0 |" in lines
    assert lines[-1] == "- `scaling`: it takes 2 GPUs, and there is 1"
    first, second = code.bench.rows(report)
    assert (first["peak_mib"], second["peak_mib"], second["total_mib"]) == (None, 3, 71680)
    assert (second["what"], second["N"], second["ratio_low"]) == ("step, pairs", 80, None)


def report_of_a_gpu(code: Any, *sizes: int | None, share: float = 0.5, **more: Any) -> dict[str, Any]:
    """A report at SDXL's size, of as many methods as there are sizes, with what the goals are about."""
    cases = {
        f"{method}_n80": {"competitors": {code.cases.ONE: {"total_bytes": size, "hardware_share_of_peak": share}}}
        for method, size in zip(code.cases.METHODS, sizes, strict=False)
    }
    return {
        "device_type": "cuda",
        "device_memory_bytes": 85e9,
        "dtype": "bfloat16",
        "options": {"scale": {"paper": True}},
        "cases": cases,
        **more,
    }


def test_goals_are_held_against_the_report_s_own_rows(code: Any) -> None:
    def verdicts(*sizes: int | None, **more: Any) -> list[str]:
        return [goal["verdict"] for goal in code.goals.goals(report_of_a_gpu(code, *sizes, **more))]

    met, missed, unknown = code.goals.MET, code.goals.MISSED, code.goals.OPEN
    assert verdicts(70 * 10**9, 80 * 10**9) == [met, met, unknown]
    assert verdicts(70 * 10**9, 80 * 10**9 + 1, share=0.499) == [missed, missed, unknown]
    assert verdicts(70 * 10**9) == [unknown] * 3, "the other method was not measured"
    assert verdicts(1, 1, dtype="float16") == [met, unknown, unknown]
    assert verdicts(1, 1, options={"scale": {}}) == verdicts(1, 1, device_type="cpu") == [unknown] * 3
    # What did not fit has no rate, and on a smaller GPU says nothing.
    assert verdicts(1, None, share=0.0) == [missed, unknown, unknown]
    assert verdicts(1, None, share=0.0, device_memory_bytes=25e9) == [unknown] * 3

    def scaled(ratio: float | None, spread: list[float] | None) -> dict[str, Any]:
        rows = {code.scaling.TOGETHER: {"ratio": ratio, "ratio_range": spread}}
        return code.goals.goals(report_of_a_gpu(code, cases={"scaling": {"competitors": rows}}))[2]

    found = scaled(1.8, [1.5, 1.9])
    assert (found["verdict"], found["measured"], found["range"]) == (met, 0.9, [0.75, 0.95])
    assert scaled(1.79, [1.5, 1.9])["verdict"] == missed
    assert scaled(None, None)["verdict"] == unknown
    lines = code.goals.table(code.goals.goals(report_of_a_gpu(code, 70 * 10**9, 61 * 10**9, share=0.421)))
    assert [line.split(" | ")[1:] for line in lines[4:]] == [
        ["at most 80.0 GB", "70.0 GB", "met |"],
        ["at least 50.0%", "42.1%", "missed |"],
        ["at least 90.0%", "", "not measured here |"],
    ]


def test_the_published_report_is_what_is_written_of_its_numbers(code: Any) -> None:
    path = Path("results/reference/benchmarks/cpu-2-threads.json")
    report = json.loads(path.read_text())
    assert report["goals"] == code.goals.goals(report)
    assert path.with_suffix(".md").read_text() == code.bench.markdown(report)
    together = report["cases"]["scaling"]["competitors"][code.scaling.TOGETHER]
    assert [goal["measured"] for goal in report["goals"]] == [None, None, together["ratio"] / 2]


def test_what_cannot_even_be_built_is_a_row(
    code: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(models: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    method = code.cases.METHODS[0]
    cases = {f"{method}_n80": code.cases.Case("step, pairs", full, memory=True, steps=80)}
    monkeypatch.setattr(code.bench, "all_cases", lambda numbers: cases)
    monkeypatch.setattr(code.bench, "matmul_peak", lambda device, dtype: 1e12)
    report = run(code, tiny_base, tmp_path / "found.json", cases=f"{method}_n80", max_seconds=1e9)
    assert report["missing"] == {"scaling": code.bench.NOT_ASKED}
    text = (tmp_path / "found.md").read_text()
    assert f"| step, pairs | 80 | {code.bench.UNBUILT} |  | 0 | - |  |  | out of memory | out of memory |" in text
    gpu = report_of_a_gpu(
        code, cases=report["cases"] | {f"{code.cases.METHODS[1]}_n80": report["cases"][f"{method}_n80"]}
    )
    assert code.goals.memory(gpu)["verdict"] == code.goals.MISSED
    monkeypatch.setattr(code.bench, "inspected", full)
    with pytest.raises(InvdpoError, match="a forward and a backward pass: out of GPU memory"):
        run(code, tiny_base, tmp_path / "none.json", cases=None, max_seconds=0)


@pytest.mark.parametrize(("cases", "count"), [(None, 2), ("scaling", 2), ("forward,training", 1)])
def test_its_gpus_are_leased(code: Any, cases: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def taken(device: str, gpus: int) -> None:
        asked.append((device, gpus))
        raise KeyboardInterrupt

    monkeypatch.setattr(code.bench, "lease", taken)
    for visible in (["a", "b", "c"], ["a"]):
        monkeypatch.setattr(code.bench, "devices", lambda visible=visible: visible)
        with pytest.raises(KeyboardInterrupt):
            code.bench.main("none", device="cuda", threads=torch.get_num_threads(), steps="4", cases=cases)
    assert asked == [("cuda", count), ("cuda", 1)]


def test_a_process_that_dies_is_named(code: Any) -> None:
    with pytest.raises(InvdpoError, match=r"_exit\(9\) was killed"):
        code.measure.FreshProcess().run(sys.modules["os"]._exit, 9)


def test_a_gauge_tells_the_largest_turn(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's counters replaced, on a machine that has none."""
    held, peaks = 100, iter([130, 170, 150])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))

    def full() -> None:
        raise torch.OutOfMemoryError

    fits, fails = code.measure.Gauge(list, CPU), code.measure.Gauge(full, CPU)
    assert [fits(), fits(), fits()] == [[], [], []]
    with pytest.raises(torch.OutOfMemoryError):
        fails()
    assert (fits.growth, fits.total, fails.growth, fails.total) == (70, 170, None, None)


def test_both_steppers_of_scaling_have_one_optimizer(code: Any, models: Any) -> None:
    own, shared = code.scaling.steppers(models, Ranks(0, 2))
    assert own.optimizer is shared.optimizer
    assert (own.arm.training.batch, shared.arm.training.batch, shared.ranks.size) == (32, 64, 2)
    states = [value for state in own.optimizer.state.values() for value in state.values() if value.dim()]
    assert len(states) == 2 * len(own.parameters), "in place before the first turn"


def test_a_rank_without_memory_ends_with_its_reason(
    code: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a result of its own, while the other waits in a sum."""

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    monkeypatch.setattr(code.scaling.Stepper, "step", full)
    threads = torch.get_num_threads()
    with pytest.raises(InvdpoError, match="a step: out of GPU memory .*larger GPUs"):
        code.scaling.main(Path("found.json"), str(tiny_base), "cpu", 1)
    torch.set_num_threads(threads)
