"""Where the files of a data set are found, and how they come here whole."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import tiny_pairs_frame
from hub_stub import COMMIT, Hub
from huggingface_hub import constants

from invdpo.errors import InvdpoError, Unreachable
from invdpo.preferences.reader import Counts, read_encoded, read_pairs, read_votes
from invdpo.preferences.shards import all_decided, check_columns, decided, fetch, find_files, list_shards, opened

REPO = "someone/pairs"
TRAIN = [f"data/train-{shard:05d}-of-00003.parquet" for shard in range(3)]


def parquet(frame: pd.DataFrame, rows: int = 10) -> bytes:
    stream = io.BytesIO()
    frame.to_parquet(stream, row_group_size=rows)
    return stream.getvalue()


@pytest.fixture
def pairs(hub: Hub) -> Hub:
    """A data set of three training files and one of another split."""
    frames = {name: tiny_pairs_frame(rows=30, ties=5, seed=seed) for seed, name in enumerate(TRAIN)}
    frames["data/validation-00000-of-00001.parquet"] = tiny_pairs_frame(rows=4, seed=9)
    hub.repos[REPO] = {name: parquet(frame) for name, frame in frames.items()} | {"README.md": b"pairs"}
    return hub


def test_a_hub_data_set_gives_its_train_split_or_the_one_named(pairs: Hub) -> None:
    shards = list_shards(REPO)
    assert [shard.name for shard in shards] == [f"{REPO}/{name}" for name in TRAIN]
    assert {shard.commit for shard in shards} == {COMMIT}
    assert [shard.size for shard in shards] == [len(pairs.repos[REPO][name]) for name in TRAIN]
    (validation,) = list_shards(f"{REPO}:validation")
    assert validation.name.endswith("validation-00000-of-00001.parquet")
    with pytest.raises(
        InvdpoError, match=r"no parquet file of the split `test`; its splits: \['train', 'validation'\]"
    ):
        list_shards(f"{REPO}:test")
    assert not pairs.sent()


def test_a_folder_is_read_in_sorted_order_and_other_splits_are_left_out(tmp_path: Path) -> None:
    for name in ("b", "a"):
        tiny_pairs_frame().to_parquet(tmp_path / f"{name}.parquet")
    assert [path.name for path in find_files(str(tmp_path))] == ["a.parquet", "b.parquet"]
    for name in ("train-0", "validation-0"):
        tiny_pairs_frame().to_parquet(tmp_path / f"{name}.parquet")
    assert [path.name for path in find_files(str(tmp_path))] == ["train-0.parquet"]


def test_labels_of_a_hub_shard_come_without_its_images(hub: Hub) -> None:
    generator = np.random.default_rng(0)
    frame = tiny_pairs_frame(rows=30, ties=5).assign(jpg_0=[generator.bytes(20_000) for _ in range(30)])
    hub.repos[REPO] = {TRAIN[0]: parquet(frame)}
    shards = list_shards(REPO)
    (flags,) = all_decided(shards)
    assert flags.tolist() == [True] * 25 + [False] * 5
    asked = [wanted.removeprefix("bytes=").split("-") for wanted in hub.ranges(TRAIN[0]) if wanted]
    read = set().union(*(range(int(start), int(end) + 1) for start, end in asked))
    assert None not in hub.ranges(TRAIN[0]) and 0 < len(read) < shards[0].size / 2
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.parquet"))


def test_a_broken_connection_goes_on_where_it_stopped(pairs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("time.sleep", lambda _: None)
    (shard, *_), content = list_shards(REPO), pairs.repos[REPO][TRAIN[0]]
    pairs.cut[TRAIN[0]] = len(content) // 2
    assert fetch(shard).read_bytes() == content
    first, second = pairs.ranges(TRAIN[0])
    assert first is None and second is not None
    assert len(content) // 2 - 4096 < int(second.removeprefix("bytes=").rstrip("-")) <= len(content) // 2


def test_a_fetched_shard_is_not_fetched_again(pairs: Hub) -> None:
    for _ in range(2):
        assert fetch(list_shards(REPO)[1]).is_file()
    assert len(pairs.ranges(TRAIN[1])) == 1 and pairs.sent() == {f"{COMMIT}/{TRAIN[1]}"}


def test_a_download_that_is_not_whole_is_fetched_once_more(pairs: Hub, caplog: pytest.LogCaptureFixture) -> None:
    shard = list_shards(REPO)[0]
    pairs.truncated[TRAIN[0]] = 1
    assert fetch(shard).read_bytes() == pairs.repos[REPO][TRAIN[0]]
    assert f"{shard.name}: the download ended before the file did; it is fetched once more" in caplog.text
    pairs.truncated[TRAIN[1]] = 2
    with pytest.raises(InvdpoError, match=f"{TRAIN[1]} was fetched twice and is broken: the download ended"):
        fetch(list_shards(REPO)[1])
    assert len(pairs.ranges(TRAIN[1])) == 2


@pytest.mark.parametrize("harm", ["shorter", "changed"])
def test_a_shard_that_was_harmed_in_the_cache_is_fetched_again(
    pairs: Hub, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard, content = list_shards(REPO)[0], pairs.repos[REPO][TRAIN[0]]
    path = fetch(shard)
    path.write_bytes(content[:-1000] if harm == "shorter" else content[:500] + b"x" + content[501:])
    assert fetch(shard).read_bytes() == content
    wrong = f"bytes instead of {len(content):,}" if harm == "shorter" else "its sha256 is not the one the hub names"
    assert wrong in caplog.text and len(pairs.ranges(TRAIN[0])) == 2


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", f"there is no {REPO} here, and the hub has no dataset {REPO}, or hides it"),
        (401, "RepoNotFound", f"there is no {REPO} here, and the hub has no dataset {REPO}, or hides it"),
        (403, "GatedRepo", f"the dataset {REPO} of the hub is gated. Accept its terms on its page there. Log in"),
        (403, "", f"the dataset {REPO} of the hub cannot be read: the hub answered 403. Log in"),
        (500, "", f"the dataset {REPO} of the hub cannot be read: the hub answered 500. Try again later"),
    ],
)
def test_a_hub_that_refuses_says_why_and_what_else_to_do(pairs: Hub, status: int, code: str, words: str) -> None:
    pairs.refused[REPO] = (status, code)
    with pytest.raises(InvdpoError) as caught:
        list_shards(REPO)
    text = str(caught.value)
    assert text.startswith(f"`preferences: {REPO}`: {words}")
    assert text.endswith(
        ", or point the setting to a local folder of its parquet files, or to an id with the same columns."
    )


def test_access_that_is_lost_between_planning_and_fetching_is_told(pairs: Hub) -> None:
    shard = list_shards(REPO)[0]
    pairs.refused[REPO] = (403, "GatedRepo")
    for read in (fetch, decided):
        with pytest.raises(InvdpoError, match=f"{TRAIN[0]}: the dataset {REPO} of the hub is gated"):
            read(shard)


def test_a_hub_that_is_not_there_is_told_from_a_wrong_path(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(
        InvdpoError, match=f"there is no {REPO} here, and the hub cannot be reached .*Try again later, or "
    ):
        list_shards(REPO)
    for wrong in ("pairs/train/part.parquet", "/absent/pairs", "pairs"):
        with pytest.raises(InvdpoError, match="is no file or folder here, nor a hub data set's id"):
            list_shards(wrong)


def test_without_a_connection_a_split_that_the_cache_holds_whole_is_read(
    pairs: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hf download` leaves it there; the files are the same to a plan as the hub's."""
    from huggingface_hub import snapshot_download

    online, labels = list_shards(REPO), all_decided(list_shards(REPO))
    snapshot_download(REPO, repo_type="dataset", allow_patterns="data/train*")
    assert list_shards(REPO) == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list_shards(REPO) == online
    assert [flags.tolist() for flags in all_decided(online)] == [flags.tolist() for flags in labels]
    assert [fetch(shard).read_bytes() for shard in online] == [pairs.repos[REPO][name] for name in TRAIN]
    with pytest.raises(Unreachable, match="the hub cannot be reached .*its cache does not hold all of it. Try again"):
        list_shards(f"{REPO}:validation")


def test_a_part_of_a_split_in_the_cache_is_not_taken_for_all(pairs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download

    for name in TRAIN[:2]:
        hf_hub_download(REPO, name, repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="its cache does not hold all of it"):
        list_shards(REPO)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("jpg_0", ["a.jpg"] * 12, r"the column jpg_0 holds (large_)?string; needed is the bytes of an image file"),
        ("jpg_1", [{"path": "a.jpg"}] * 12, r"the column jpg_1 holds struct<path: (large_)?string>; needed is the by"),
        ("caption", list(range(12)), "the column caption holds int64; needed is text"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: str, values: list[Any], words: str) -> None:
    path = tmp_path / "pairs.parquet"
    tiny_pairs_frame().assign(**{column: values}).to_parquet(path)
    with pytest.raises(InvdpoError, match=words):
        all_decided(list_shards(str(path)))


def test_a_revision_that_is_not_there_is_named(pairs: Hub) -> None:
    assert list_shards(REPO, COMMIT) == list_shards(REPO)
    with pytest.raises(InvdpoError, match=r"of the hub has no revision `v9`. Correct `data.revision`"):
        list_shards(REPO, "v9")


def test_local_files_that_are_cut_off_or_something_else_are_named(tmp_path: Path) -> None:
    path, content = tmp_path / "train.parquet", parquet(tiny_pairs_frame())
    for written, words in {
        content[:-100]: f"it is cut off after {len(content) - 100:,} bytes",
        b"no parquet": "it does not begin as a parquet file does",
        content[:4] + b"x" * 100 + content[-4:]: "its footer cannot be read",
    }.items():
        path.write_bytes(written)
        with pytest.raises(InvdpoError) as caught:
            check_columns([path])
        assert str(caught.value).startswith(f"{path} cannot be read as parquet: {words}")
    middle = bytearray(content)
    middle[200:20_000] = b"\0" * 19_800
    path.write_bytes(middle)
    with pytest.raises(InvdpoError, match=f"{path} breaks off while it is read"):
        list(read_encoded(path, np.arange(5)))


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(parquet(tiny_pairs_frame(rows=95, ties=3), rows=10))
    every = {pair.row: pair for pair in read_pairs([path], Counts())}
    wanted = np.array([0, 9, 10, 57, 58, 91])
    found = list(read_encoded(path, wanted, first=100))
    assert [pair.row - 100 for pair in found] == wanted.tolist()
    for pair in found:
        plain = every[pair.row - 100]
        assert (pair.caption, pair.winner, pair.loser) == (plain.caption, plain.winner, plain.loser)


def test_row_groups_without_such_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(parquet(tiny_pairs_frame(rows=60, ties=0), rows=20))
    groups, real = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, row_groups, **more: (
            groups.extend(row_groups) or real(self, *args, row_groups=row_groups, **more)
        ),
    )
    assert len(list(read_encoded(path, np.array([3, 45])))) == 2
    assert groups == [0, 2]


def test_rows_are_counted_over_all_files(tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.parquet")
        files[-1].write_bytes(parquet(tiny_pairs_frame(rows=12, ties=2, seed=seed)))
    counts = Counts()
    assert [pair.row for pair in read_pairs(files, counts)] == [*range(10), *range(12, 22)]
    assert (counts.rows, counts.ties, counts.kept) == (24, 4, 20)
    votes = list(read_votes(files, counts := Counts()))
    assert [vote.row for vote in votes] == list(range(24)) and counts.ties == 4
    assert [vote.label_0 for vote in votes[-3:]] == [1.0, 0.5, 0.5]


def test_a_missing_label_is_a_tie(tmp_path: Path) -> None:
    path, frame = tmp_path / "train.parquet", tiny_pairs_frame(rows=4, ties=1)
    frame["label_0"] = [1.0, None, float("nan"), 0.5]
    path.write_bytes(parquet(frame))
    with opened(list_shards(str(path))[0]) as stored:
        assert stored.metadata.num_rows == 4
    assert decided(list_shards(str(path))[0]).tolist() == [True, False, False, False]
