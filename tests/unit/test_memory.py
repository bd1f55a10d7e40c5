"""A GPU that is out of memory: every stage says which setting to lower, the one that helps most first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from invdpo import distribution, score
from invdpo.backbones import pipeline
from invdpo.config import ScorersConfig, StudyConfig
from invdpo.errors import InvdpoError
from invdpo.experiments import stage
from invdpo.preferences.cache import prepare

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
