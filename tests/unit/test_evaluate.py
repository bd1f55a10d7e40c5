"""Evaluation of an arm end to end on a random pipeline: files, order, hashes, seeds, and bad runs."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Brightness
from PIL import Image

from invdpo import evaluate as stage
from invdpo.backbones.pipeline import UNetEps, load_unet
from invdpo.backbones.text import for_sampling
from invdpo.config import StudyConfig, parse_study
from invdpo.errors import InvdpoError
from invdpo.evaluate import evaluate

CPU = torch.device("cpu")


@pytest.fixture
def study(tiny_base: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "build_scorers", lambda scorers, device: [Brightness()])
    return make_study(tiny_base, tiny_prompts)


def make_study(base: Path, prompts_file: Path, **sampling: Any) -> StudyConfig:
    return parse_study(
        {
            "study": "tiny",
            "base": str(base),
            "preferences": "unused.parquet",
            "prompts": str(prompts_file),
            "scorers": {},
            "device": "cpu",
            "seeds": [3, 4],
            "training": {"steps": 4, "checkpoints": [2], "batch": 2, "resolution": 32},
            "sampling": {"steps": 3, "guidance_scale": 3.0, "batch": 3, "seed": 1, **sampling},
            "arms": {
                "base": {"method": "no_training"},
                "tuned": {"method": "diffusion_dpo"},
                "away": {"method": "diffusion_npo"},
            },
        },
        "test",
    )


def make_runs(study: StudyConfig, arm: str = "tuned", shift: float = 0.01) -> None:
    """Finished runs of an arm: the base's weights, moved further with every step and differently for each
    seed.
    """
    for seed in study.seeds:
        run = study.root / "runs" / arm / f"seed{seed}"
        unet = load_unet(study.base, CPU)
        for step in (2, 4):
            with torch.no_grad():
                unet.conv_out.weight.add_(shift * seed)
            unet.save_pretrained(run / "checkpoints" / f"step{step:06d}" / "unet")
        (run / "run.json").write_text(json.dumps({"config_hash": study.arm(arm).hash}))


def read(study: StudyConfig, kind: str, arm: str, seed: int) -> pd.DataFrame:
    return pd.read_parquet(study.root / kind / arm / f"seed{seed}.parquet")


def test_a_trained_arm(study: StudyConfig) -> None:
    make_runs(study)
    paths = evaluate(study, "tuned", study.seeds, CPU)
    assert paths == [study.root / "scores" / "tuned" / f"seed{seed}.parquet" for seed in (3, 4)]
    scores, images = read(study, "scores", "tuned", 3), read(study, "images", "tuned", 3)
    assert list(scores.columns) == stage.SCORES.names and list(images.columns) == stage.IMAGES.names

    # Four prompts, two checkpoints; `long_only` exists for the one prompt of more than three words.
    assert len(scores) == 2 * (4 + 1)
    assert set(scores[scores.scorer == "long_only"].prompt_id) == {1}
    keys = list(zip(scores.step, scores.prompt_id, scores.scorer, strict=True))
    assert keys == sorted(keys)
    assert set(scores.method) == {"tuned"} and set(scores.seed) == {3} and set(scores.prompt_set) == {"test"}
    assert set(scores.scorer_version) == {"brightness:0:none"}

    # The stored pictures are the last checkpoint's, and the scores and hashes are theirs.
    assert list(images.prompt_id) == [0, 1, 2, 3] and set(images.step) == {4}
    final: Any = scores[(scores.step == 4) & (scores.scorer == "light")]
    for image, row in zip(images.to_dict(orient="records"), final.to_dict(orient="records"), strict=True):
        picture = Image.open(io.BytesIO(image["png"]))
        assert picture.size == (32, 32) and picture.mode == "RGB"
        assert hashlib.sha256(picture.tobytes()).hexdigest() == image["sha256"] == row["image_sha256"]
        assert row["prompt"] == image["prompt"]
        assert row["score"] == pytest.approx(np.asarray(picture).mean(), rel=1e-6)

    # Checkpoints and seeds differ in their pictures.
    other = read(study, "scores", "tuned", 4)
    light = pd.concat([scores, other]).query("scorer == 'light'")
    assert light.groupby("prompt_id").image_sha256.nunique().tolist() == [4, 4, 4, 4]


def test_provenance_counts_the_evaluations(study: StudyConfig) -> None:
    make_runs(study)
    (path,) = evaluate(study, "tuned", [3], CPU)
    metadata = json.loads(pq.read_schema(path).metadata[b"provenance"])
    assert metadata["unet_evals"] == 2 * 4 * 3 * 2  # checkpoints, prompts, steps, halves of guidance
    assert metadata["config_hash"] == study.arm("tuned").hash
    assert metadata["scorer_versions"] == ["brightness:0:none"]
    assert metadata["seed"] == 3 and metadata["dtype"] == "float32"


def pixels(study: StudyConfig, arm: str, seed: int) -> np.ndarray:
    """The stored pictures of a run, (prompts,H,W,3) int."""
    pngs = read(study, "images", arm, seed).png
    return np.stack([np.asarray(Image.open(io.BytesIO(png)), dtype=int) for png in pngs])


def test_an_unconditional_policy_equal_to_the_base_is_the_bases_own_guidance(study: StudyConfig) -> None:
    make_runs(study, "away", shift=0)
    evaluate(study, "base", [3], CPU)
    (path,) = evaluate(study, "away", [3], CPU)
    # Rounding alone: two calls of a batch in place of one call of twice as many.
    assert np.abs(pixels(study, "away", 3) - pixels(study, "base", 0)).max() <= 1
    metadata = json.loads(pq.read_schema(path).metadata[b"provenance"])
    assert metadata["unet_evals"] == 2 * 4 * 3 * 2  # checkpoints, prompts, steps, networks


def test_an_unconditional_policy_is_what_guidance_leads_away_from(study: StudyConfig) -> None:
    make_runs(study)
    make_runs(study, "away")
    for arm in ("base", "tuned", "away"):
        evaluate(study, arm, [3], CPU)
    away = pixels(study, "away", 3)
    assert np.abs(away - pixels(study, "base", 0)).mean() > 1  # the policy counts,
    assert np.abs(away - pixels(study, "tuned", 3)).mean() > 1  # and not as an ordinary one

    studio = stage.Studio(study, ["a red circle"], CPU)
    trained = load_unet(study.root / "runs" / "away" / "seed3" / "checkpoints" / "step000004", CPU)
    model, scale = studio.model(study.arm("away"), trained)
    x, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        prompt = UNetEps(load_unet(study.base, CPU))(x, t, studio.cond)
        empty = UNetEps(trained)(x, t, studio.empty)
        found = model(x, t, for_sampling(studio.cond, studio.empty, 32))
    torch.testing.assert_close(found, empty + 3.0 * (prompt - empty))
    assert scale == 1.0


def test_autocast_keeps_no_copy_of_weights_that_are_only_sampled(study: StudyConfig, tiny_base: Path) -> None:
    """Of weights that ask for gradients it keeps one in half precision, even where none is computed."""
    make_runs(study)
    studio = stage.Studio(study, ["a red circle"], CPU)
    (first, *_) = stage.checkpoints_of(study, study.arm("tuned"), 3)
    published = stage.Checkpoint(0, 0, study.base, weights=str(Path(first.folder) / "unet"))
    for unet in (studio.base, studio.unet(first), studio.unet(published)):
        assert not any(weight.requires_grad for weight in unet.parameters())
    model, x = UNetEps(studio.base, torch.bfloat16), torch.randn(1, 4, 4, 4)

    def casts() -> int:
        """Of two passes under one autocast."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as seen:
            for _ in range(2):
                model(x, torch.tensor([500]), studio.cond)
        return sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")

    without = casts()
    studio.base.requires_grad_(True)
    assert casts() < without


def test_the_base_is_evaluated_once(study: StudyConfig) -> None:
    assert evaluate(study, "base", study.seeds, CPU) == [study.root / "scores" / "base" / "seed0.parquet"]
    scores = read(study, "scores", "base", 0)
    assert set(scores.seed) == {0} and set(scores.step) == {0} and len(scores) == 5


def test_rows_are_the_same_again_and_independent_of_the_batch(
    study: StudyConfig, tiny_base: Path, tiny_prompts: Path
) -> None:
    evaluate(study, "base", [3], CPU)
    first = read(study, "scores", "base", 0)
    evaluate(study, "base", [3], CPU)
    pd.testing.assert_frame_equal(read(study, "scores", "base", 0), first)
    evaluate(make_study(tiny_base, tiny_prompts, batch=1), "base", [3], CPU)
    single = read(study, "scores", "base", 0)
    np.testing.assert_allclose(single.score, first.score, atol=0.05)  # of 255: rounding of a pixel here and there
    evaluate(make_study(tiny_base, tiny_prompts, prompts=2), "base", [3], CPU)
    fewer = read(study, "scores", "base", 0)
    assert set(fewer.prompt_id) == {0, 1}
    np.testing.assert_allclose(fewer.score, first.score[first.prompt_id < 2], atol=0.05)
    evaluate(make_study(tiny_base, tiny_prompts, seed=2), "base", [3], CPU)
    assert not set(read(study, "scores", "base", 0).image_sha256) & set(first.image_sha256)


def test_real_scorers_join_in(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"utility": 2.0, "sg_iou": 0.5, "entity_iou": 1.0, "relation_iou": float("nan")}
    from invdpo.scorers.oracle import OracleScore

    oracle = OracleScore("shapes")
    monkeypatch.setattr(oracle.oracle, "score", lambda image, prompt: answers)
    monkeypatch.setattr(stage, "build_scorers", lambda scorers, device: [Brightness(), oracle])
    evaluate(study, "base", [3], CPU)
    names = set(read(study, "scores", "base", 0).scorer)
    assert names == {"light", "long_only", "oracle_utility", "oracle_sg_iou", "oracle_entity_iou"}


def test_bad_runs(study: StudyConfig) -> None:
    with pytest.raises(InvdpoError, match="seed3 holds no finished run"):
        evaluate(study, "tuned", [3], CPU)
    make_runs(study)
    run = study.root / "runs" / "tuned" / "seed3"
    shutil.rmtree(run / "checkpoints" / "step000002")
    with pytest.raises(InvdpoError, match="step000002/unet is missing"):
        evaluate(study, "tuned", [3], CPU)
    (run / "run.json").write_text(json.dumps({"config_hash": "0123"}))
    with pytest.raises(InvdpoError, match="another configuration .0123"):
        evaluate(study, "tuned", [3], CPU)
    assert not (study.root / "scores").exists()


def test_broken_weights_name_the_checkpoint(study: StudyConfig) -> None:
    make_runs(study)
    folder = study.root / "runs" / "tuned" / "seed4" / "checkpoints" / "step000004" / "unet"
    unet = load_unet(folder.parent, CPU)
    with torch.no_grad():
        unet.conv_out.weight.fill_(float("nan"))
    unet.save_pretrained(folder)
    with pytest.raises(InvdpoError, match="arm tuned, seed 4, step 4: .*non-finite"):
        evaluate(study, "tuned", study.seeds, CPU)
    assert (study.root / "scores" / "tuned" / "seed3.parquet").is_file()
    assert not (study.root / "scores" / "tuned" / "seed4.parquet").exists()


def test_a_full_disk_leaves_no_half_file(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(InvdpoError, match="disk is full: .*seed0.parquet"):
        evaluate(study, "base", [3], CPU)
    assert [path for path in study.root.rglob("*") if path.is_file()] == []
