"""Encoding at size: in parts, by several processes, after a kill, and only what the plan names."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import random_jpeg, tiny_pairs_frame
from hub_stub import Hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from invdpo.backbones import pipeline
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.preferences import cache as caching
from invdpo.preferences.cache import Rows, images_at_once, load_cache, prepare
from invdpo.preferences.decode import decoded, in_order
from invdpo.preferences.order import pair_order
from invdpo.preferences.preprocess import Cutting
from invdpo.preferences.reader import read_encoded
from invdpo.preferences.shards import decided, list_shards
from invdpo.training.data import draw

CPU = torch.device("cpu")
FOLDER = Path("results/tiny/preferences")
PAIR_BYTES = 4 * 4 * 4 * 4 * 4  # four tensors of 4 x 4 x 4 float32
MakeStudy = Callable[..., StudyConfig]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 pairs, one VAE call each."""
    monkeypatch.setattr(caching, "PART_BYTES", 32 * PAIR_BYTES)


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    """100 pairs in two files; the images of three rows cannot be decoded, the last row's among them."""
    frame = tiny_pairs_frame(rows=105, ties=5)
    jpegs = list(frame["jpg_1"])
    for row in (3, 40, 99):
        jpegs[row] = b"no image"
    frame["jpg_1"] = jpegs
    (tmp_path / "hundred").mkdir()
    frame.iloc[:60].to_parquet(tmp_path / "hundred" / "a.parquet")
    frame.iloc[60:].to_parquet(tmp_path / "hundred" / "b.parquet")
    return str(tmp_path / "hundred")


def encoded(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Images of every VAE call from now on; the call number `stop_at` is interrupted."""
    calls, real = [], pipeline.encode_images

    def listening(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(calls) + 1 == stop_at:
            raise KeyboardInterrupt
        calls.append(len(images))
        return real(vae, images)

    monkeypatch.setattr(pipeline, "encode_images", listening)
    return calls


def written() -> dict[str, bytes]:
    """Every file of the cache but the report, whose time differs."""
    files = (path for path in FOLDER.rglob("*") if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(FOLDER)): path.read_bytes() for path in files}


@pytest.mark.usefixtures("small_parts")
def test_parts_hold_together_what_one_file_would(
    tiny_study: MakeStudy, hundred: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(preferences=hundred, training={"max_undecodable": 0.03})
    report = prepare(study, CPU)
    cache = load_cache(FOLDER, CPU)
    assert report["pairs"] == len(cache) == 97 and report["undecodable_rows"] == [3, 40, 99]
    assert [len(load_file(part)["win_mean"]) for part in sorted((FOLDER / "latents").iterdir())] == [32, 32, 32, 1]
    assert not (FOLDER / "unfinished").exists()
    shutil.move(FOLDER, "parts")
    monkeypatch.setattr(caching, "PART_BYTES", 2**20)
    prepare(study, CPU)
    (part,) = (FOLDER / "latents").iterdir()
    whole, index = load_file(part), torch.tensor([96, 0, 31, 32, 95, 33, 0])
    for name in caching.LATENTS:
        assert torch.equal(getattr(cache, name)[index], whole[name][index])
        assert torch.equal(getattr(cache, name)[range(97)], whole[name])
    assert (FOLDER / "pairs.parquet").read_bytes() == Path("parts/pairs.parquet").read_bytes()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stopped_at", [1, 2, 4])
def test_a_stopped_preparation_goes_on_behind_its_last_part(
    tiny_study: MakeStudy, hundred: str, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    study = tiny_study(preferences=hundred, training={"max_undecodable": 0.03})
    report, whole = prepare(study, CPU), written()
    shutil.rmtree(FOLDER)
    with monkeypatch.context() as patch:
        encoded(patch, stopped_at)
        with pytest.raises(KeyboardInterrupt):
            prepare(study, CPU)
    assert not (FOLDER / "cache.safetensors").exists()
    with monkeypatch.context() as patch:
        calls = encoded(patch)
        again = prepare(study, CPU)
    assert calls == [64, 64, 64, 2][stopped_at - 1 :]
    assert written() == whole and again["undecodable_rows"] == report["undecodable_rows"]


@pytest.mark.usefixtures("small_parts")
def test_a_preparation_stopped_before_it_was_published_encodes_nothing_again(
    tiny_study: MakeStudy, hundred: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(preferences=hundred, training={"max_undecodable": 0.03})
    report, whole = prepare(study, CPU), written()
    shutil.rmtree(FOLDER)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caching, "mirror", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(study, CPU)
    calls = encoded(monkeypatch)
    again = prepare(study, CPU)
    assert not calls and written() == whole
    assert again["undecodable_rows"] == report["undecodable_rows"] and again["undecodable"] == 3


@pytest.mark.usefixtures("small_parts")
def test_what_other_code_or_settings_began_is_not_gone_on_with(
    tiny_study: MakeStudy, hundred: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_undecodable": 0.03}
    for changes in ({"data": {"storage": "float16"}}, {}):
        with monkeypatch.context() as patch:
            encoded(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                prepare(tiny_study(preferences=hundred, training=training, **changes), CPU)
        assert len(list((FOLDER / "unfinished").iterdir())) == 1
    monkeypatch.setattr("invdpo.provenance.code_hash", lambda _: "edited")
    calls = encoded(monkeypatch)
    prepare(tiny_study(preferences=hundred, training=training), CPU)
    assert calls == [64, 64, 64, 2]


def test_what_other_code_finished_is_made_again(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study()
    first = prepare(study, CPU)
    with monkeypatch.context() as patch:
        assert prepare(study, CPU) == first and not encoded(patch)
    monkeypatch.setattr("invdpo.provenance.code_hash", lambda _: "edited")
    calls = encoded(monkeypatch)
    again = prepare(study, CPU)
    assert calls == [2 * again["pairs"]] and again["key"] == first["key"]


def test_the_seed_changes_the_key_only_where_something_is_drawn(tiny_study: MakeStudy) -> None:
    def key(**data: Any) -> str:
        return prepare(tiny_study(data=data), CPU)["key"]

    assert key(seed=1) == key(seed=2) == key()
    assert len({key(seed=1, crop="random"), key(seed=2, crop="random"), key(seed=1)}) == 3


def test_without_a_connection_what_was_prepared_is_taken_by_the_same_settings_only(
    hub: Hub, tiny_study: MakeStudy, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["some/pairs"] = {"data/train.parquet": tiny_pairs.read_bytes()}
    study = tiny_study(preferences="some/pairs")
    first = prepare(study, CPU)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert prepare(study, CPU) == first
    assert "the hub cannot be reached" in caplog.text and "The pairs that were prepared before" in caplog.text
    for changes in ({"data": {"storage": "float16"}}, {"data": {"revision": "v2"}}, {"training": {"resolution": 64}}):
        with pytest.raises(InvdpoError, match="the hub cannot be reached"):
            prepare(tiny_study(preferences="some/pairs", **changes), CPU)


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(
    tiny_study: MakeStudy, many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(preferences=str(many_shards), training={"steps": 100, "batch": 3}, data={"shards": "auto"})
    monkeypatch.setattr(caching, "PART_BYTES", 64 * PAIR_BYTES)
    Path("study.json").write_text(dump_study(study))
    lines = [
        "import time, torch",
        "from invdpo.backbones import pipeline",
        "from invdpo.config import load_study",
        "from invdpo.preferences import cache",
        f"cache.PART_BYTES = {64 * PAIR_BYTES}",
        "real = pipeline.encode_images",
        "pipeline.encode_images = lambda *arguments: (time.sleep(0.2), real(*arguments))[1]",
        "cache.prepare(load_study('study.json'), torch.device('cpu'))",
    ]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(FOLDER.glob("unfinished/*/latents/*.safetensors"))) < 2:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = len(list(FOLDER.glob("unfinished/*/latents/*.safetensors")))
    with monkeypatch.context() as patch:
        calls = encoded(patch)
        report = prepare(study, CPU)
    assert 2 <= before < report["pairs"] / 64
    assert sum(calls) == 2 * (report["pairs"] - 64 * before)
    found = written()
    shutil.rmtree(FOLDER)
    assert prepare(study, CPU)["pairs"] == report["pairs"] and written() == found


def test_two_at_once_do_the_work_once(
    tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study, real, begun, waiting = tiny_study(), pipeline.encode_images, threading.Event(), threading.Event()
    calls = []

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        begun.set()
        assert waiting.wait(30)
        return real(*arguments)

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for it" in record.getMessage():
                waiting.set()

    monkeypatch.setattr(pipeline, "encode_images", slow)
    monkeypatch.setattr(logging.getLogger("invdpo"), "handlers", [Told()])
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO, "invdpo"):
        first = pool.submit(prepare, study, CPU)
        assert begun.wait(30)
        second = pool.submit(prepare, study, CPU)
        assert first.result() == second.result()
    assert len(calls) == 1


def test_the_number_of_workers_changes_nothing(tiny_study: MakeStudy, hundred: str) -> None:
    settings = {"training": {"max_undecodable": 0.03}, "preferences": hundred}
    data = {"crop": "random", "flip": "independent"}
    first = prepare(tiny_study(**settings, data=data), CPU)
    one = written()
    shutil.rmtree(FOLDER)
    second = prepare(tiny_study(**settings, data=data | {"workers": 2}), CPU)
    assert written() == one and second["key"] == first["key"]
    plain = prepare(tiny_study(**settings), CPU)
    assert plain["key"] != first["key"] and written().keys() == one.keys()
    assert written()["latents/00000.safetensors"] != one["latents/00000.safetensors"]


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    class Deadly:
        def __reduce__(self) -> Any:
            return os._exit, (1,)

    with pytest.raises(InvdpoError, match="One of 2 decoding processes died.*Lower `data.workers`"):
        list(decoded([Deadly()] * 20, Cutting(8), False, 2))  # pyright: ignore[reportArgumentType]


def test_few_items_are_taken_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        for given, made in enumerate(in_order(pool, lambda number: number, items(), ahead=5)):
            assert made == given and len(taken) <= given + 6


def test_of_a_large_file_little_is_in_memory(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = [generator.bytes(100_000) for _ in range(400)]
    frame = tiny_pairs_frame(rows=400, ties=0).assign(jpg_0=images, jpg_1=images[::-1])
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=20)
    assert (tmp_path / "a.parquet").stat().st_size > 75e6
    del frame, images
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for pair in read_encoded(tmp_path / "a.parquet", np.arange(400)):
        peak = max(peak, pool.bytes_allocated() - before)
        assert len(pair.winner) == 100_000
    assert 0 < peak < 20e6  # a row group has 4 MB


def test_stored_rows_stay_in_their_files(tiny_study: MakeStudy, tmp_path: Path) -> None:
    parts = [torch.arange(3.0), torch.arange(3.0, 4), torch.arange(4.0, 9)]
    rows = Rows([part[:, None].to(torch.bfloat16) for part in parts], CPU)
    assert len(rows) == 9 and rows.shape == (9, 1)
    assert rows[torch.tensor([8, 0, 3, 2, 4, 8])].flatten().tolist() == [8, 0, 3, 2, 4, 8]
    assert rows[[1]].dtype == torch.float32
    caching._save({"win_mean": torch.ones(100, 2**18)}, tmp_path / "latents" / "00000.safetensors", {})  # 105 MB
    before = resident()
    found = caching._all_rows(tmp_path / "latents", ["win_mean"], CPU)["win_mean"]
    assert found[[99, 0]].sum() == 2 * 2**18 and resident() - before < 50e6


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_half_precision_takes_half_the_room(tiny_study: MakeStudy, tiny_cache: Path) -> None:
    report = prepare(tiny_study(data={"storage": "float16"}), CPU)
    plain = json.loads((tiny_cache / "report.json").read_text())
    assert report["key"] != plain["key"] and report["stored_bytes"] < 0.7 * plain["stored_bytes"]
    (part,) = (FOLDER / "latents").iterdir()
    assert load_file(part)["win_mean"].dtype == torch.float16
    half, full = load_cache(FOLDER, CPU), load_cache(tiny_cache, CPU)
    for name in ("win_mean", "lose_std", "embeds"):
        found, expected = getattr(half, name)[[1, 3]], getattr(full, name)[[1, 3]]
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


def test_a_sample_holds_the_pairs_that_runs_draw(tiny_study: MakeStudy, many_shards: Path) -> None:
    study = tiny_study(preferences=str(many_shards), training={"steps": 60, "batch": 3}, data={"shards": "auto"})
    report, cache = prepare(study, CPU), load_cache(FOLDER, CPU)
    shards = [shard for shard in list_shards(str(many_shards)) if shard.name in report["sources"]]
    assert len(shards) == 3 and len(cache) == report["order"] == 3 * 177 and 180 < report["pairs"] < 360
    pairs = pd.read_parquet(FOLDER / "pairs.parquet")
    rows = np.flatnonzero(np.concatenate([decided(shard) for shard in shards]))
    frame = pd.concat([pd.read_parquet(shard.path) for shard in shards], ignore_index=True)
    for seed in study.seeds:
        for step in (1, 37, 60):
            chosen = pair_order(seed, step, 3, len(cache))
            stored = cache.rows(chosen)
            assert pairs["row"].iloc[stored].tolist() == rows[chosen].tolist()
            assert pairs["caption"].iloc[stored].tolist() == frame["caption"].iloc[rows[chosen]].tolist()
            batch = draw(cache, torch.zeros(len(cache), dtype=torch.bool), chosen, seed, step, 0, 0.0)
            assert torch.equal(batch.cond.embeds, cache.embeds[cache.caption_index[stored]])


def test_a_planned_pair_that_cannot_be_decoded_gives_its_place_to_the_next(
    tiny_study: MakeStudy, tmp_path: Path
) -> None:
    frame = tiny_pairs_frame(rows=40, ties=0)
    jpegs = list(frame["jpg_0"])
    jpegs[7] = jpegs[39] = b"no image"
    frame.assign(jpg_0=jpegs).to_parquet(tmp_path / "pairs.parquet")
    changes = {"preferences": str(tmp_path / "pairs.parquet"), "data": {"shards": 1}}
    prepare(tiny_study(**changes, training={"steps": 40, "batch": 1, "max_undecodable": 0.05}), CPU)
    cache, pairs = load_cache(FOLDER, CPU), pd.read_parquet(FOLDER / "pairs.parquet")
    assert len(cache) == 40 and len(pairs) == 38
    found = pairs["row"].iloc[cache.rows(range(40))].tolist()
    assert found == [*range(7), 8, *range(8, 39), 0]


def test_only_the_planned_shards_of_the_hub_are_fetched_and_only_once(
    tiny_study: MakeStudy, hub: Hub, many_shards: Path
) -> None:
    files = sorted((many_shards / "data").iterdir())
    hub.repos["someone/pairs"] = {f"data/{file.name}": file.read_bytes() for file in files}
    changes: dict[str, Any] = {"training": {"steps": 60, "batch": 3}}
    report = prepare(tiny_study(preferences="someone/pairs", **changes), CPU)
    assert report["source_files"] == 60 and len(report["sources"]) == 3
    whole = [path for method, path, wanted in hub.asked if method == "GET" and "/resolve/" in path and wanted is None]
    assert sorted(path.split("/data/")[1] for path in whole) == [name.split("/data/")[1] for name in report["sources"]]
    hub.asked.clear()
    assert prepare(tiny_study(preferences="someone/pairs", **changes), CPU) == report
    assert all(wanted for method, path, wanted in hub.asked if method == "GET" and "/resolve/" in path)
    found = written()
    local = prepare(tiny_study(preferences=str(many_shards), data={"shards": "auto"}, **changes), CPU)
    assert local["key"] == report["key"] and written() == found


def test_a_cache_that_lost_a_part_is_noticed_and_made_again(tiny_study: MakeStudy) -> None:
    report, whole = prepare(tiny_study(), CPU), written()
    (part,) = (FOLDER / "latents").iterdir()
    part.unlink()
    with pytest.raises(InvdpoError, match=r"lacks a part: 0 of 10 rows of `win_mean` are there. Run `invdpo prepare"):
        load_cache(FOLDER, CPU)
    assert prepare(tiny_study(), CPU)["key"] == report["key"] and written() == whole


def test_a_disk_that_is_too_small_is_told_first(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    calls = encoded(monkeypatch)
    with pytest.raises(InvdpoError, match=r"The latents need 1.02e-05 GB more in .* 1e-06 GB are free"):
        prepare(tiny_study(), CPU)
    assert not calls


def test_numbers_that_are_not_finite_are_not_stored(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.encode_images
    monkeypatch.setattr(pipeline, "encode_images", lambda *arguments: [1e6 * part for part in real(*arguments)])
    assert prepare(tiny_study(), CPU)["pairs"] == 10
    with pytest.raises(InvdpoError, match="What the VAE of .* gives is not finite in float16"):
        prepare(tiny_study(data={"storage": "float16"}), CPU)


def test_random_crops_and_sizes_reach_the_cache(tiny_study: MakeStudy, tmp_path: Path) -> None:
    frame = tiny_pairs_frame(rows=6, ties=0)
    wide = Image.open(io.BytesIO(random_jpeg(np.random.default_rng(1)))).resize((120, 40))
    stream = io.BytesIO()
    wide.save(stream, "PNG")
    frame.assign(jpg_0=[stream.getvalue()] * 6).to_parquet(tmp_path / "pairs.parquet")
    prepare(tiny_study(preferences=str(tmp_path / "pairs.parquet"), data={"crop": "random"}), CPU)
    (part,) = (FOLDER / "latents").iterdir()
    tensors = load_file(part)
    told = torch.stack([tensors["win_time_ids"], tensors["lose_time_ids"]], dim=1).flatten(0, 1)
    wide_ones = told[told[:, 1] == 120]
    assert len(wide_ones) == 6 and (wide_ones[:, 0] == 40).all() and (wide_ones[:, 4:] == 32).all()
    assert len(set(wide_ones[:, 3].tolist())) > 3 and wide_ones[:, 3].max() <= 64  # 96 pixels wide after resizing


def test_larger_images_are_encoded_fewer_at_once() -> None:
    assert [images_at_once(side) for side in (32, 64, 128, 256, 512, 1024)] == [64, 64, 16, 4, 2, 2]
