"""A GPU that is out of memory: every stage says which setting to lower, the one that helps most first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from invdpo import distribution, evaluate, score
from invdpo.backbones import pipeline
from invdpo.config import ScorersConfig, StudyConfig
from invdpo.device import memory_for
from invdpo.errors import InvdpoError
from invdpo.experiments import stage
from invdpo.preferences.cache import prepare
from invdpo.training.ranks import others_alive

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]


def full(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")


def said(work: Callable[[], object]) -> str:
    with pytest.raises(InvdpoError) as caught:
        work()
    text = str(caught.value)
    assert "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in text
    return text.split("In the order that helps most: ")[1]


FULL = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB"),
    "runtime": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
        "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    ),
    "runtime by its code": RuntimeError("CUDA driver error: cudaErrorMemoryAllocation"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "nccl": torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    "pinned": RuntimeError("Failed to allocate pinned memory: out of memory"),
}


@pytest.mark.parametrize("whose", FULL)
def test_memory_that_any_library_lacks_is_told(whose: str) -> None:
    with pytest.raises(InvdpoError, match=r"^work: out of GPU memory \([^\n]{10,300}\)\. .*\(1\) this; \(2\) that\.$"):
        with memory_for("work", ["this", "that"]):
            raise FULL[whose]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        OSError("out of memory on the CUDA disk"),
        InvdpoError("CUDA: out of memory"),
    ],
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_for("work", ["this"]):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("whose", ["nccl", "runtime"])
def test_an_exchange_without_memory_does_not_blame_the_others(whose: str) -> None:
    with pytest.raises(RuntimeError) as caught, others_alive():
        raise FULL[whose]
    assert caught.value is FULL[whose]


def test_a_unet_is_let_go_before_the_next_one_is_loaded(
    tiny_study: MakeStudy, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def unet(*_: object) -> torch.nn.Module:
        assert all(each() is None for each in loaded)
        one = pipeline.load_unet(tiny_base, CPU)
        loaded.append(weakref.ref(one))
        return one

    monkeypatch.setattr(evaluate.Studio, "unet", unet)
    monkeypatch.setattr(evaluate, "build_scorers", lambda *_: [])
    checkpoints = [evaluate.Checkpoint(0, step, str(tiny_base)) for step in (1, 2, 3)]
    monkeypatch.setattr(evaluate, "checkpoints_of", lambda *_: checkpoints)
    evaluate.evaluate(tiny_study(), "dpo", [0, 1], CPU)
    assert len(loaded) == 6


def test_preparing_pairs(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "encode_images", full)
    assert said(lambda: prepare(tiny_study(), CPU)).startswith("(1) `training.resolution` for the whole study (now 32)")


EXPERIMENTS = {
    "inversion_error": (
        {"solvers": ["ddim"], "steps": [2], "latents": 4},
        "`experiments.inversion_error.latents` (now 4)",
    ),
    "precision": (
        {"arms": ["dpo"], "recipes": {"q_single": {}}, "pairs": 6, "steps": [2], "truth_steps": 2},
        "`training.chunk: 128` (now 256); (2) `experiments.precision.pairs` (now 6)",
    ),
    "audit": (
        {"arms": ["dpo"], "pairs": 2, "batches": 1, "images": 2},
        "`training.chunk: 128` (now 256); (2) `experiments.audit.pairs` (now 2)",
    ),
    "preference_accuracy": ({"votes": "votes.parquet"}, "fewer `scorers` at a time, whose networks stay on the GPU"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name: str, tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, first = EXPERIMENTS[name]
    study = tiny_study(experiments={name: settings}, scorers={"pickscore": {"model": "none"}})
    monkeypatch.setitem(stage.EXPERIMENTS, name, full)
    assert said(lambda: stage.run(study, name, CPU)).startswith(f"(1) {first}")


def test_distribution(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"arms": ["base"], "reference": {"path": "photos"}, "batch": 24}
    monkeypatch.setattr(distribution, "generated_sets", lambda *_: {})
    monkeypatch.setattr(distribution, "extractor", full)
    study = tiny_study(experiments={"distribution": settings})
    assert said(lambda: distribution.measure(study, CPU)) == "(1) `experiments.distribution.batch: 12` (now 24)."


def test_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a circle")
    monkeypatch.setattr(score, "build_scorers", full)
    out, scorers = tmp_path / "rows.csv", ScorersConfig.model_validate({"oracle": {"world": "shapes"}})
    text = said(lambda: score.score(tmp_path, None, scorers, out, CPU, batch=32))
    assert text == "(1) `--batch 16` (now 32); (2) fewer scorers at a time, whose networks stay on the GPU."
