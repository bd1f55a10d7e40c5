"""`invdpo sample`: the images of an evaluation, several a prompt, and what a killed run leaves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CAPTIONS, Brightness
from PIL import Image

from invdpo import evaluate as evaluating
from invdpo import samples as stage
from invdpo import score as scoring
from invdpo.config import ScorersConfig, StudyConfig
from invdpo.errors import InvdpoError
from invdpo.rank import rank
from invdpo.samples import draw_samples

CPU = torch.device("cpu")
OUT = Path("samples")
MakeStudy = Callable[..., StudyConfig]


def written() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in OUT.iterdir() if path.name != stage.SETTINGS}


def test_image_k_is_the_evaluations_with_the_next_seed_but_k(
    tiny_study: MakeStudy, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "build_scorers", lambda scorers, device: [])
    draw_samples(tiny_study(), tiny_prompts, 2, OUT, CPU, guidance_scale=2.0, seed=7)
    for image in range(2):
        sampling = {"steps": 2, "guidance_scale": 2.0, "batch": 2, "seed": 7 + image}
        study = tiny_study(sampling=sampling)
        evaluating.evaluate(study, "base", [0], CPU)
        drawn = pd.read_parquet(study.root / "images" / "base" / "seed0.parquet")["png"]
        for prompt, content in enumerate(drawn):
            found = np.asarray(Image.open(OUT / f"{prompt:06d}_{image}.png"))
            assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(content)))), (prompt, image)


def test_what_is_written_can_be_scored_and_ranked(
    tiny_study: MakeStudy, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draw_samples(tiny_study(), tiny_prompts, 3, OUT, CPU)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows[:4]] == ["000000_0.png", "000000_1.png", "000000_2.png", "000001_0.png"]
    assert [row["prompt"] for row in rows] == [caption for caption in CAPTIONS for _ in range(3)]
    noted = json.loads((OUT / stage.SETTINGS).read_text())
    assert noted["images"] == 3 and noted["settings"]["seed"] == 2025 and noted["settings"]["guidance_scale"] == 3.0
    assert noted["provenance"]["unet_evals"] == 4 * 3 * 2 * 2  # prompts, images, steps, halves of guidance
    monkeypatch.setattr(scoring, "build_scorers", lambda scorers, device: [Brightness()])
    scored = scoring.score(OUT, path, ScorersConfig(), Path("scores.parquet"), CPU)
    light = scored[scored["scorer"] == "light"]
    assert (
        light["prompt_id"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and light["seed"].tolist() == [0, 1, 2] * 4
    )
    found = rank([Path("scores.parquet")], OUT, ["light", "long_only"], Path("pairs.parquet"))
    assert (found.prompts, found.pairs, found.left_out) == (1, 3, 3), "long_only has three prompts of few words out"


def drawn_batches(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[tuple[int, int]]:
    """First prompt and seed of every batch from now on; the call number `stop_at` is interrupted."""
    calls, real = [], evaluating.Studio.draw

    def listening(self: Any, model: Any, scale: float, ids: range, seed: int) -> Any:
        if len(calls) + 1 == stop_at:
            raise KeyboardInterrupt
        calls.append((ids.start, seed))
        return real(self, model, scale, ids, seed)

    monkeypatch.setattr(evaluating.Studio, "draw", listening)
    return calls


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    tiny_study: MakeStudy, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study()
    draw_samples(study, tiny_prompts, 2, OUT, CPU)
    whole = written()
    OUT.rename("whole")
    with monkeypatch.context() as patch:
        drawn_batches(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            draw_samples(study, tiny_prompts, 2, OUT, CPU)
    assert not (OUT / stage.PROMPTS).exists(), "a folder that is not whole says so"
    (OUT / "000003_0.png").unlink()  # as if killed between the files of a batch
    (OUT / ".000003_0.png.99.part").write_bytes(b"half")
    with monkeypatch.context() as patch:
        calls = drawn_batches(patch)
        draw_samples(study, tiny_prompts, 2, OUT, CPU)
    assert calls == [(2, 2025), (0, 2026), (2, 2026)] and written() == whole
    with monkeypatch.context() as patch:
        calls = drawn_batches(patch)
        draw_samples(study, tiny_prompts, 2, OUT, CPU)
        assert calls == [] and written() == whole
        draw_samples(study, tiny_prompts, 3, OUT, CPU)
    assert calls == [(0, 2027), (2, 2027)]
    assert {name: content for name, content in written().items() if name in whole and name != stage.PROMPTS} == {
        name: content for name, content in whole.items() if name != stage.PROMPTS
    }


def test_images_of_other_settings_are_kept_until_told(tiny_study: MakeStudy, tiny_prompts: Path) -> None:
    draw_samples(tiny_study(), tiny_prompts, 2, OUT, CPU, seed=1)
    before = written()
    with pytest.raises(InvdpoError, match=r"images of other settings: guidance_scale, seed\. Name"):
        draw_samples(tiny_study(), tiny_prompts, 2, OUT, CPU, seed=9, guidance_scale=1.0)
    with pytest.raises(InvdpoError, match=r"other settings: images \(more than are asked for\)"):
        draw_samples(tiny_study(), tiny_prompts, 1, OUT, CPU, seed=1)
    assert written() == before
    draw_samples(tiny_study(), tiny_prompts, 1, OUT, CPU, seed=9, replace=True)
    after = written()
    assert sorted(after) == [*(f"{prompt:06d}_0.png" for prompt in range(4)), "prompts.csv"]
    assert not set(after.values()) & set(before.values())


def test_a_folder_of_something_else_is_left_alone(tiny_study: MakeStudy, tiny_prompts: Path) -> None:
    OUT.mkdir()
    (OUT / "photo.png").write_bytes(b"mine")
    with pytest.raises(InvdpoError, match="holds files that `invdpo sample` did not write"):
        draw_samples(tiny_study(), tiny_prompts, 1, OUT, CPU, replace=True)
    assert (OUT / "photo.png").read_bytes() == b"mine"
