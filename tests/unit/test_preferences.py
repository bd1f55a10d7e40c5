"""Reading pairs, encoding them, and the label controls."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pairs_frame
from PIL import Image
from safetensors.torch import load_file, save_file

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.preferences.cache import cache_key, load_cache, prepare
from invdpo.preferences.labels import flips, strengths
from invdpo.preferences.preprocess import cut
from invdpo.preferences.reader import Counts, read_pairs
from invdpo.preferences.shards import check_columns, find_files

CPU = torch.device("cpu")
FOLDER = Path("results/tiny/preferences")
PICKSCORE = Path(__file__).parents[2] / "assets" / "shapes" / "scorers" / "pickscore"
SMPO = {"smpo": {"method": "smpo"}}
MakeStudy = Callable[..., StudyConfig]


def saved(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path)
    return path


def test_ties_are_left_out_and_the_winner_comes_first(tiny_pairs: Path) -> None:
    counts = Counts()
    pairs = list(read_pairs([tiny_pairs], counts))
    frame = pd.read_parquet(tiny_pairs)
    assert (counts.rows, counts.ties, counts.kept, counts.undecodable) == (12, 2, 10, 0)
    for pair in pairs:
        row = frame.iloc[pair.row]
        winner = "jpg_0" if row.label_0 == 1 else "jpg_1"
        assert pair.winner == row[winner] and pair.loser != pair.winner
        assert pair.caption == row.caption
    assert {frame.iloc[pair.row].label_0 for pair in pairs} == {0.0, 1.0}


def test_images_may_come_as_the_datasets_library_writes_them(tmp_path: Path, tiny_pairs: Path) -> None:
    frame = tiny_pairs_frame()
    plain = [pair.winner for pair in read_pairs([tiny_pairs], Counts())]
    for column in ("jpg_0", "jpg_1"):
        frame[column] = [{"bytes": content, "path": None} for content in frame[column]]
    assert [pair.winner for pair in read_pairs([saved(frame, tmp_path / "a.parquet")], Counts())] == plain


@pytest.mark.parametrize("missing", [["label_0"], ["jpg_1", "caption"]])
def test_missing_columns_are_named(tmp_path: Path, missing: list[str]) -> None:
    path = saved(tiny_pairs_frame().drop(columns=missing), tmp_path / "pairs.parquet")
    with pytest.raises(InvdpoError) as caught:
        check_columns([path])
    assert str(path) in str(caught.value)
    assert f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}." in str(caught.value)


def test_missing_source_and_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="folder without a parquet file"):
        find_files(str(tmp_path))
    with pytest.raises(InvdpoError, match="no file or folder here, nor a hub data set's id"):
        find_files(str(tmp_path / "absent.parquet"))


def broken(rows: int, bad: list[int]) -> pd.DataFrame:
    frame = tiny_pairs_frame(rows=rows, ties=0)
    jpegs = list(frame["jpg_1"])
    for row in bad:
        jpegs[row] = jpegs[row][: len(jpegs[row]) // 3] if row % 2 else b"no image"
    frame["jpg_1"] = jpegs
    return frame


def test_one_undecodable_image_in_a_hundred_is_skipped_and_counted(tmp_path: Path, tiny_study: MakeStudy) -> None:
    path = saved(broken(100, [7]), tmp_path / "pairs.parquet")
    report = prepare(tiny_study(preferences=str(path)), CPU)
    assert (report["rows"], report["undecodable"], report["undecodable_rows"], report["pairs"]) == (
        100,
        1,
        [7],
        99,
    )
    assert len(load_cache(Path("results/tiny/preferences"), CPU)) == 99


def test_more_undecodable_images_stop_the_run(tmp_path: Path, tiny_study: MakeStudy) -> None:
    path = saved(broken(100, [7, 30]), tmp_path / "pairs.parquet")
    with pytest.raises(InvdpoError) as caught:
        prepare(tiny_study(preferences=str(path)), CPU)
    assert "2 of the 100 decided pairs" in str(caught.value) and "[7, 30]" in str(caught.value)
    assert not Path("results/tiny/preferences/cache.safetensors").exists()


def test_no_usable_pair_is_an_error(tmp_path: Path, tiny_study: MakeStudy) -> None:
    path = saved(tiny_pairs_frame(rows=5, ties=5), tmp_path / "pairs.parquet")
    with pytest.raises(InvdpoError, match="No usable pair is left.*5 rows, 5 of them ties"):
        prepare(tiny_study(preferences=str(path)), CPU)


def test_cache_holds_what_the_pipeline_computes(tiny_cache: Path, tiny_base: Path, tiny_pairs: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    cache = load_cache(tiny_cache, CPU)
    row = pd.read_parquet(tiny_pairs).iloc[2]  # image 1 won
    image = cut(Image.open(io.BytesIO(row.jpg_1)).convert("RGB"), 32).tensor()
    with torch.no_grad():
        posterior = pipeline.vae.encode(image[None]).latent_dist
        embeds, uncond = pipeline.encode_prompt(row.caption, CPU, 1, True)
    scale = pipeline.vae.config["scaling_factor"]
    third = cache.rows([2])
    torch.testing.assert_close(cache.win_mean[third], posterior.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.win_std[third], posterior.std * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.prompts(third).embeds, embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.uncond[0], uncond[0], rtol=1e-4, atol=1e-5)
    assert len(cache) == 10 and len(cache.embeds) == 4
    assert not torch.allclose(*cache.embeds[torch.tensor([0, 1])])


def test_preparing_again_changes_nothing_and_new_content_is_noticed(tmp_path: Path, tiny_study: MakeStudy) -> None:
    path = saved(tiny_pairs_frame(seed=1), tmp_path / "pairs.parquet")
    folder = Path("results/tiny/preferences")
    first = prepare(tiny_study(preferences=str(path)), CPU)
    written = (folder / "cache.safetensors").stat().st_mtime_ns
    assert prepare(tiny_study(preferences=str(path)), CPU) == first
    assert (folder / "cache.safetensors").stat().st_mtime_ns == written
    saved(tiny_pairs_frame(seed=2), path)
    second = prepare(tiny_study(preferences=str(path)), CPU)
    assert second["key"] != first["key"]
    assert json.loads((folder / "report.json").read_text())["key"] == second["key"]


def test_two_preparations_are_byte_identical(tmp_path: Path, tiny_study: MakeStudy, tiny_cache: Path) -> None:
    prepare(tiny_study(), CPU)
    names = ("cache.safetensors", "latents/00000.safetensors", "captions/00000.safetensors", "pairs.parquet")
    for name in names:
        assert (FOLDER / name).read_bytes() == (tiny_cache / name).read_bytes()
    written = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.*") if path.is_file())
    assert written == sorted([*names, ".lock", "report.json"])


def test_resolution_must_suit_the_vae(tiny_study: MakeStudy) -> None:
    with pytest.raises(InvdpoError, match="`training.resolution: 30` is not a multiple of 8"):
        prepare(tiny_study(training={"resolution": 30}), CPU)


def test_missing_cache_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="Run `invdpo prepare"):
        load_cache(tmp_path, CPU)


def test_base_that_is_not_there_is_named(
    tmp_path: Path, tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvdpoError, match="`base: nowhere/base`: there is no nowhere/base here, and the hub cannot be"):
        prepare(tiny_study(base="nowhere/base"), CPU)
    (tmp_path / "half").mkdir()
    with pytest.raises(InvdpoError, match="it has no `model_index.json`"):
        prepare(tiny_study(base=str(tmp_path / "half")), CPU)


def test_label_controls() -> None:
    assert not flips("true", 5, 0).any()
    assert flips("swapped", 5, 0).all()
    shuffled: Any = flips("shuffled", 10_000, 3)
    assert torch.equal(shuffled, flips("shuffled", 10_000, 3))
    assert not torch.equal(shuffled, flips("shuffled", 10_000, 4))
    assert abs(shuffled.float().mean() - 0.5) < 0.02  # four standard errors


def test_pairs_are_scored_only_for_an_arm_that_needs_it(tiny_study: MakeStudy, tiny_pairs: Path) -> None:
    from invdpo.scorers.pickscore import PickScore

    scorers = {"pickscore": {"model": str(PICKSCORE)}}
    report = prepare(tiny_study(scorers=scorers), CPU)
    assert "pickscore_range" not in report and "scores" not in load_file(FOLDER / "cache.safetensors")
    report = prepare(tiny_study(scorers=scorers, arms=SMPO), CPU)
    cache, pairs = load_cache(FOLDER, CPU, scored=True), pd.read_parquet(tiny_pairs).to_dict(orient="records")
    assert cache.scores is not None and cache.scores.shape == (10, 2)
    assert report["pickscore_range"] == [float(cache.scores.min()), float(cache.scores.max())]
    scorer = PickScore(str(PICKSCORE), CPU)
    for row in (0, 2):  # image 0 won the first pair, image 1 the third
        order = ("jpg_0", "jpg_1") if row == 0 else ("jpg_1", "jpg_0")
        images = [Image.open(io.BytesIO(pairs[row][name])).convert("RGB") for name in order]
        expected = torch.from_numpy(scorer.score(images, [pairs[row]["caption"]] * 2)["pickscore"])
        torch.testing.assert_close(cache.scores[row], expected, rtol=1e-5, atol=1e-6)
    assert (cache.scores[:, 0] - cache.scores[:, 1]).abs().min() > 1e-4  # so that the order above is seen


def test_the_scorers_weights_are_part_of_what_a_scored_cache_is(tmp_path: Path, tiny_study: MakeStudy) -> None:
    plain = prepare(tiny_study(), CPU)
    shutil.copytree(PICKSCORE, tmp_path / "pickscore")
    study = tiny_study(scorers={"pickscore": {"model": "pickscore"}}, arms=SMPO)
    first = prepare(study, CPU)
    written = (FOLDER / "cache.safetensors").stat().st_mtime_ns
    assert prepare(study, CPU) == first
    assert (FOLDER / "cache.safetensors").stat().st_mtime_ns == written
    keys, scores = (cache_key(FOLDER), cache_key(FOLDER, scored=True)), load_cache(FOLDER, CPU, scored=True).scores
    weights = tmp_path / "pickscore" / "model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    second = prepare(study, CPU)
    assert keys == (plain["key"], first["key"]) == (cache_key(FOLDER), first["key"])
    assert cache_key(FOLDER, scored=True) == second["key"] and len({plain["key"], first["key"], second["key"]}) == 3
    cache = load_cache(FOLDER, CPU, scored=True)
    assert cache.key == second["key"] and scores is not None and cache.scores is not None
    assert not torch.equal(cache.scores, scores)
    assert load_cache(FOLDER, CPU).scores is None and load_cache(FOLDER, CPU).key == plain["key"]


def test_strengths_without_a_scorer_name_it_and_the_arm(tiny_study: MakeStudy, tiny_cache: Path) -> None:
    with pytest.raises(InvdpoError, match=r"The arm `smpo` of study `tiny`.*no `scorers\.pickscore`"):
        prepare(tiny_study(arms=SMPO), CPU)
    assert not FOLDER.exists()
    with pytest.raises(InvdpoError, match="holds no PickScores"):
        load_cache(tiny_cache, CPU, scored=True)


def test_a_scorer_that_tells_no_image_from_another_is_refused(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Indifferent:
        version = "pickscore:0:none"

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, Any]:
            return {"pickscore": np.full(len(images), 0.25, dtype=np.float32)}

    monkeypatch.setattr("invdpo.scorers.pickscore.PickScore", Indifferent)
    with pytest.raises(InvdpoError, match=r"`scorers\.pickscore` gives every image of .* the score 0\.25"):
        prepare(tiny_study(scorers={"pickscore": {"model": "any"}}, arms=SMPO), CPU)
    assert not (FOLDER / "cache.safetensors").exists()


def test_strength_is_the_scorers_preference_beyond_a_coin() -> None:
    scores = torch.tensor([[0.2820, 0.1154], [0.20, 0.22], [0.21, 0.21]], dtype=torch.float64)
    scaled = (scores - 0.1154) / (0.2820 - 0.1154)  # as SmPO's code, whose constants these scores span
    expected = 2 * torch.softmax(scaled, dim=1)[:, 0] - 1
    torch.testing.assert_close(strengths(scores), expected)
    assert expected[0] > 0 > expected[1] and expected[2] == 0
    torch.testing.assert_close(strengths(scores.flip(1)), -strengths(scores))
    torch.testing.assert_close(strengths(7 * scores - 3), strengths(scores))  # whatever a scorer's units
