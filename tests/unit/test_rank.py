"""`invdpo rank`: four images whose scores are known, and every kind of bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from invdpo.errors import InvdpoError
from invdpo.preferences.reader import Counts, read_pairs
from invdpo.rank import Ranked, order, rank
from invdpo.scorers.rows import SCORES, picture_hash

# image -> scores. Means of a and b: 0.5, 0.5, 0.75, 0.25 for the first prompt.
FOUR = {"0_0.png": (0.25, 0.75), "0_1.png": (0.5, 0.5), "0_2.png": (1.0, 0.5), "0_3.png": (0.25, 0.25)}
TWO = {"1_0.png": (0.0, 1.0), "1_1.png": (0.5, 1.0)}
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
LABELS = {
    "label_0": [0.5, 0, 1, 0, 1, 1],
    "label_0_a": [0, 0, 0.5, 0, 1, 1],
    "label_0_b": [1, 1, 1, 0.5, 1, 1],
    "label_0_fixed": [0.5] * 6,
}


def row(name: str, prompt: str, scorer: str, score: float, picture: Image.Image) -> dict[str, Any]:
    head = {"method": "base", "seed": int(name[2]), "step": 0, "prompt_set": "p", "prompt_id": int(name[0])}
    scored = {"scorer": scorer, "scorer_version": f"{scorer}:1:none", "score": score, "image": name}
    return head | {"prompt": prompt, "image_sha256": picture_hash(picture)} | scored


@pytest.fixture
def scored(tmp_path: Path) -> tuple[list[dict[str, Any]], Path]:
    """The rows that `invdpo score` writes of six images of two prompts, and the images' folder."""
    folder, rows = tmp_path / "images", []
    folder.mkdir()
    for number, (name, values) in enumerate((FOUR | TWO).items()):
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture.save(folder / name)
        prompt = "a red circle" if name in FOUR else "12"
        rows += [row(name, prompt, scorer, score, picture) for scorer, score in zip("ab", values, strict=True)]
    return rows, folder


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    frame = pd.DataFrame(rows, columns=pd.Index([*SCORES.names, "image"]))
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def ranked(
    rows: list[dict[str, Any]], folder: Path, by: str = "a,b", kind: str = "parquet"
) -> tuple[Ranked, pd.DataFrame]:
    out = folder.parent / "pairs.parquet"
    return rank([write(rows, folder.parent / f"scores.{kind}")], folder, by.split(","), out), pd.read_parquet(out)


def refusal(rows: list[dict[str, Any]], folder: Path, by: str = "a,b") -> str:
    with pytest.raises(InvdpoError) as caught:
        ranked(rows, folder, by)
    assert not (folder.parent / "pairs.parquet").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_all_pairs_of_a_prompt_are_ordered_by_the_mean(scored: tuple[list[dict[str, Any]], Path], kind: str) -> None:
    rows, folder = scored
    found, table = ranked(rows, folder, kind=kind)
    first = table[table["caption"] == "a red circle"]
    assert len(table) == 7 and len(first) == 6
    names = list(zip(first["image_0_uid"], first["image_1_uid"], strict=True))
    assert names == [(f"0_{i}.png", f"0_{j}.png") for i, j in PAIRS]
    for column, expected in LABELS.items():
        assert first[column].tolist() == expected, column
    assert (table["label_0"] + table["label_1"] == 1).all()
    assert first["reward_0"].tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 0.75]
    for place, content in enumerate(first["jpg_1"]):
        assert content == (folder / f"0_{PAIRS[place][1]}.png").read_bytes()
    last = table.iloc[6]
    assert last["caption"] == "12", "a prompt of digits stays text"
    assert [last[name] for name in LABELS] == [0, 0, 0.5, 0], "images 0 and 1 are the fixed pair"
    assert table["ranking_id"].tolist() == list(range(7)) and table["num_example_per_prompt"].tolist() == [6] * 6 + [1]
    assert first["best_image_uid"].tolist()[:2] == ["tie", "0_2.png"]
    # label_0 decides 6. Alone, a decides 6, of which label_0 ties one; b decides 5, one of them the other way.
    assert (found.prompts, found.pairs, found.left_out) == (2, 7, 0)
    assert found.columns == {
        "label_0": (6, 1.0),
        "label_0_a": (6, 1.0),
        "label_0_b": (5, 0.75),
        "label_0_fixed": (1, 1.0),
    }


def test_the_pairs_are_read_winner_first(scored: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = scored
    ranked(rows, folder)
    pairs = list(read_pairs([folder.parent / "pairs.parquet"], counts := Counts()))
    assert (counts.rows, counts.ties, counts.kept) == (7, 1, 6)
    winners = [Path(folder / name).read_bytes() for name in ("0_2.png", "0_0.png", "0_2.png", "0_1.png", "0_2.png")]
    assert [pair.winner for pair in pairs[:5]] == winners
    assert np.array_equal(np.asarray(pairs[0].winner_image), np.asarray(Image.open(io.BytesIO(winners[0]))))


def test_the_same_scores_give_the_same_bytes_with_each_image_once_a_column(
    scored: tuple[list[dict[str, Any]], Path],
) -> None:
    """The file's hash decides whether runs are trained again."""
    rows, folder = scored
    path, rng = folder.parent / "pairs.parquet", np.random.default_rng(0)
    for image in range(4):  # incompressible, and too large for a dictionary of the usual size
        picture = Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8))
        picture.save(folder / f"2_{image}.png")
        rows += [row(f"2_{image}.png", "noise", scorer, 0.1 * image, picture) for scorer in "ab"]
    ranked(rows, folder)
    before, size = path.read_bytes(), sum(file.stat().st_size for file in folder.glob("2_*"))
    assert len(before) < 1.6 * size, "six images to a column would be three times as many"
    ranked(rows, folder)
    assert path.read_bytes() == before
    facts = json.loads((pq.read_schema(path).metadata or {})[b"ranked"])
    assert facts == {"by": ["a", "b"], "left_out": 0, "versions": {"a": "a:1:none", "b": "b:1:none"}}


def test_scores_may_come_in_several_files(scored: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = scored
    _, whole = ranked(rows, folder)
    files = [write([each for each in rows if each["scorer"] == name], folder.parent / f"{name}.csv") for name in "ab"]
    rank(files, folder, ["a", "b"], folder.parent / "again.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(folder.parent / "again.parquet"), whole)


def test_means_that_differ_by_rounding_are_ties() -> None:
    first, second = np.float32([0.3, 0.1]).astype(float).mean(), np.float32([0.2, 0.2]).astype(float).mean()
    assert first != second and order(first, second) == 0.5
    assert order(0.2 + 1e-5, 0.2) == 1 and order(-1.0, 0.0) == 0 and order(0.0, 0.0) == 0.5


def test_a_prompt_without_a_score_is_left_out_and_counted(scored: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = scored
    rows = [each for each in rows if not (each["prompt"] == "12" and each["scorer"] == "b")]
    found, table = ranked(rows, folder)
    assert (found.prompts, found.left_out, len(table)) == (1, 1, 6)
    assert "6 pairs of 1 prompts; 1 prompts left out" in found.text()
    found, table = ranked(rows, folder, by="a")
    assert (found.prompts, found.left_out) == (2, 0) and (table["label_0"] == table["label_0_a"]).all()
    rows = [each for each in rows if each["image"] != "1_1.png"]
    assert ranked(rows, folder, by="a")[0].left_out == 1, "one image is no pair"


def test_bad_input_is_named(scored: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = scored
    missing = [each for each in rows if (each["image"], each["scorer"]) != ("0_2.png", "b")]
    assert "1 scores are missing of images whose prompt has them for others: 0_2.png (b)" in refusal(missing, folder)
    nan = [each | ({"score": np.nan} if (each["image"], each["scorer"]) == ("0_2.png", "b") else {}) for each in rows]
    assert "0_2.png (b)" in refusal(nan, folder)
    assert "--by oracle_a: no image has this score" in refusal(rows, folder, by="oracle_a")
    assert "name different scores, none of them `fixed`" in refusal(rows, folder, by="a,a")
    assert "0_0.png has the score a twice" in refusal([*rows, rows[0]], folder)
    assert "a is of several versions" in refusal([rows[0] | {"scorer_version": "other"}, *rows[1:]], folder)
    assert "or with two prompts" in refusal([rows[0] | {"prompt": "other"}, *rows[1:]], folder)
    assert "names no files" in refusal([each | {"image": None} for each in rows], folder)
    apart = [each for each in rows if (each["scorer"] == "a") == (each["image"] in FOUR)]
    assert "None of the 2 prompts has two images and all of a, b" in refusal(apart, folder)
    Image.new("RGB", (16, 16)).save(folder / "0_3.png")
    assert "0_3.png is not the image that was scored" in refusal(rows, folder)
    (folder / "0_3.png").unlink()
    assert "0_3.png cannot be read" in refusal(rows, folder)
    with pytest.raises(InvdpoError, match=r"must end in \.parquet"):
        rank([folder.parent / "scores.parquet"], folder, ["a"], folder.parent / "pairs.csv")
    with pytest.raises(InvdpoError, match=r"scores\.txt must end in"):
        rank([folder.parent / "scores.txt"], folder, ["a"], folder.parent / "pairs.parquet")
    (folder.parent / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvdpoError, match=r"other\.csv lacks the columns image, image_sha256"):
        rank([folder.parent / "other.csv"], folder, ["a"], folder.parent / "pairs.parquet")
