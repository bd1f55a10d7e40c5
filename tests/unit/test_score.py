"""`invdpo score`: golden values, rows of any folder, decoding in workers, and every kind of bad input."""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Brightness
from PIL import Image

from invdpo import score as stage
from invdpo.config import ScorersConfig, load_scorers, load_study
from invdpo.errors import InvdpoError
from invdpo.scorers.rows import SCORES

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = ["a red circle", "a blue square", "a large green triangle above a red circle"]


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> ScorersConfig:
    monkeypatch.setattr(stage, "build_scorers", lambda scorers, device: [Brightness()])
    return ScorersConfig.model_validate({})


def shapes_scorers(*names: str) -> ScorersConfig:
    """Those scorers of the default study, for any working directory."""
    chosen = load_study(ROOT / "config" / "shapes.yaml").scorers.model_dump(include=set(names), exclude_none=True)
    text = json.dumps(chosen).replace("assets/shapes", str(ROOT / "assets" / "shapes"))
    return ScorersConfig.model_validate_json(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three grey pictures of different brightness, with prompts beside them."""
    images = tmp_path / "mine"
    images.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption + "\n")
    return images


def run(images: Path, scorers: ScorersConfig, prompts: Path | None = None, out: str = "rows.csv", **options: Any):
    """The rows, and the frame of the file that was written."""
    path = images.parent / out
    rows = stage.score(images, prompts, scorers, path, CPU, **options)
    read: dict[str, Callable[..., Any]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".jsonl": lambda file: pd.read_json(file, lines=True),
    }
    return rows, read[path.suffix](path)


def test_golden_scores_of_the_shapes_scorers(tmp_path: Path) -> None:
    names = ("pickscore", "clip", "aesthetic", "hps", "oracle")
    rows = stage.score(GOLDEN / "images.parquet", None, shapes_scorers(*names), tmp_path / "rows.parquet", CPU)
    expected = pd.read_csv(GOLDEN / "scores.csv")
    both = expected.merge(rows, on=["prompt_id", "scorer"], suffixes=("_expected", ""), validate="one_to_one")
    assert len(both) == len(expected) == len(rows)
    np.testing.assert_allclose(both["score"], both["score_expected"], rtol=1e-5, atol=2e-6)
    learned = both[~both["scorer"].str.startswith("oracle")]
    assert (learned["scorer_version"] == learned["scorer_version_expected"]).all()
    assert set(rows["method"]) == {"base"} and set(rows["prompt_set"]) == {"test"}


def test_batch_workers_order_and_format_change_nothing(tmp_path: Path) -> None:
    """Batches change the last bits of a matrix product; workers, order, PNG or memory change nothing."""
    scorers = shapes_scorers("pickscore", "clip", "aesthetic", "hps")
    table = pq.read_table(GOLDEN / "images.parquet").to_pylist()
    stored, _ = run(GOLDEN / "images.parquet", scorers, batch=6, out=str(tmp_path / "stored.csv"))
    apart = {"batch": 1}, {"batch": 4, "workers": 2}
    for options in apart:
        other, _ = run(GOLDEN / "images.parquet", scorers, out=str(tmp_path / "other.csv"), **options)
        same = stored.merge(other, on=["prompt_id", "scorer"], suffixes=("", "_other"), validate="one_to_one")
        np.testing.assert_allclose(same["score"], same["score_other"], rtol=1e-5, atol=2e-6)
    parallel, _ = run(GOLDEN / "images.parquet", scorers, batch=6, workers=2, out=str(tmp_path / "parallel.csv"))
    pd.testing.assert_frame_equal(parallel, stored)

    files = tmp_path / "files"
    files.mkdir()
    for number, row in enumerate(reversed(table)):  # the other way round, and through files of two kinds
        picture = Image.open(io.BytesIO(row["png"]))
        picture.save(files / f"{number}.{'webp' if number % 2 else 'png'}", lossless=True)
        (files / f"{number}.txt").write_text(row["prompt"])
    turned, _ = run(files, scorers, batch=6)
    same = stored.merge(turned, on=["image_sha256", "scorer"], suffixes=("", "_other"), validate="one_to_one")
    assert len(same) == len(stored) == 6 * 5
    np.testing.assert_allclose(same["score"], same["score_other"], rtol=1e-5, atol=2e-6)
    assert (same["prompt"] == same["prompt_other"]).all()


@pytest.mark.parametrize("out", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_rows_have_the_columns_of_a_study(folder: Path, bright: ScorersConfig, out: str) -> None:
    rows, written = run(folder, bright, out=out, batch=2)
    assert list(rows.columns) == list(written.columns) == [*SCORES.names, "image"]
    pd.testing.assert_frame_equal(written, rows, check_dtype=False)
    light = rows[rows["scorer"] == "light"]
    assert light["score"].tolist() == [0, 10, 20]
    assert light["image"].tolist() == ["0.png", "1.png", "2.png"] and light["prompt"].tolist() == CAPTIONS
    assert rows[rows["scorer"] == "long_only"]["image"].tolist() == ["2.png"]
    assert set(rows["method"]) == {"mine"} and set(rows["step"]) == {0}
    if out.endswith("parquet"):
        metadata = json.loads(pq.read_schema(folder.parent / out).metadata[b"provenance"])
        assert metadata["scorer_versions"] == ["brightness:0:none"]


def test_several_images_of_a_prompt_are_its_seeds(folder: Path, bright: ScorersConfig) -> None:
    (folder / "1.txt").write_text(CAPTIONS[2])
    rows, _ = run(folder, bright, method="theirs")
    light = rows[rows["scorer"] == "light"]
    assert list(zip(light["prompt_id"], light["seed"], strict=True)) == [(0, 0), (1, 0), (1, 1)]
    assert set(rows["method"]) == {"theirs"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a\nb\nc\n\n"),
        ("p.csv", 'file,prompt\n2.png,c\n0.png,a\n1.png,"b"\n'),
        ("p.tsv", "id\tPrompt\n1\tb\n2\tc\n0\ta\n"),
        (
            "p.jsonl",
            '{"file": "1.png", "caption": "b"}\n{"file": "0.png", "prompt": "a"}\n\n{"file": "2.png", "prompt": "c"}',
        ),
        ("p.jsonl", '{"id": 1, "prompt": "b"}\n{"id": 2, "prompt": "c"}\n{"id": "0", "prompt": "a"}'),
    ],
)
def test_prompt_files(folder: Path, bright: ScorersConfig, name: str, text: str) -> None:
    path = folder.parent / name
    path.write_text(text)
    rows, _ = run(folder, bright, path)
    assert dict(zip(rows["image"], rows["prompt"], strict=True)) == {"0.png": "a", "1.png": "b", "2.png": "c"}
    assert set(rows["prompt_set"]) == {"p"}


def test_lines_go_to_images_in_the_order_of_their_numbers(tmp_path: Path, bright: ScorersConfig) -> None:
    images = tmp_path / "images"
    (images / "b").mkdir(parents=True)
    for name in ("10.png", "9.PNG", "b/2.jpeg", "b/11.webp"):
        Image.new("RGB", (4, 4)).save(images / name, "PNG")
    (tmp_path / "p.txt").write_text("nine\nten\ntwo\neleven\n")
    rows, _ = run(images, bright, tmp_path / "p.txt")
    assert dict(zip(rows["image"], rows["prompt"], strict=True)) == {
        "9.PNG": "nine",
        "10.png": "ten",
        "b/2.jpeg": "two",
        "b/11.webp": "eleven",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"file,prompt\n0.png,a\n0.png,b\n1.png,c\n2.png,d\n", "more than one row with the `file` 0.png"),
        ("p.csv", b"name,prompt\n0.png,a\n", "none of the columns file, id; it has"),
        ("p.csv", b"file,words\n0.png,a\n", "none of the columns prompt, Prompt, caption"),
        ("p.csv", b"file,prompt\n0.png,a\n,b\n", "1 rows of .* have an empty `file`"),
        ("p.csv", b"file,prompt\n", "holds no prompt"),
        ("p.csv", b"file,prompt\n0.png,a cat, sitting\n", "row 1 of .* has more than 2 cells; quote"),
        ("p.csv", b"file,prompt\n0.png,a\n1.png,\n2.png,c\n", "1 of 3 images have an empty prompt: 1.png"),
        ("p.csv", "file,prompt\n0.png,é".encode("latin-1"), "not UTF-8"),
        (
            "p.csv",
            b"file,prompt\n0.png,a\n1.png,b\n2.png,c\n7.png,d\n",
            "1 of 4 images are missing from .*mine: 7.png$",
        ),
        ("p.csv", b"file,prompt\n0.png,a\n", r"2 of 3 images have no prompt in .*: 1.png, 2.png$"),
        ("p.txt", b"a\nb\n", "has 2 lines for 3 images"),
        ("p.txt", b"a\n\nc\n", "1 of 3 images have an empty prompt: 1.png"),
        ("p.jsonl", b'{"prompt": "a"}\n', "line 1 has no key `file` or `id`"),
        ("p.jsonl", b'{"id": 0, "prompt": "a"}\n{"file": 1, "prompt": "b"}\n', "line 2 has no key"),
        ("p.jsonl", b'{"id": 0, "prompt": "\\ud83d"}\n', "line 1 holds half a character"),
        ("p.jsonl", b"{'id'}", "line 1 is not JSON"),
        ("p.parquet", b"", "must end in .csv, .tsv, .jsonl"),
    ],
)
def test_bad_prompt_files(folder: Path, bright: ScorersConfig, name: str, content: bytes, message: str) -> None:
    path = folder.parent / name
    path.write_bytes(content)
    with pytest.raises(InvdpoError, match=message):
        run(folder, bright, path)
    assert not (folder.parent / "rows.csv").exists()


def test_missing_images_are_counted_and_ten_are_named(folder: Path, bright: ScorersConfig) -> None:
    path = folder.parent / "p.csv"
    path.write_text("id,prompt\n" + "".join(f"{number},word\n" for number in range(40)))
    with pytest.raises(InvdpoError, match="37 of 40 images are missing") as caught:
        run(folder, bright, path)
    assert str(caught.value).endswith(", ".join(map(str, range(3, 13))) + ", … (37 in all)")


def test_other_things_that_are_missing(folder: Path, bright: ScorersConfig, tmp_path: Path) -> None:
    (folder / "1.txt").unlink()
    with pytest.raises(InvdpoError, match="1 of 3 images have no .txt with their prompt beside them: 1.png"):
        run(folder, bright)
    with pytest.raises(InvdpoError, match="must end in .parquet, .csv, .jsonl"):
        run(folder, bright, out="rows.xlsx")
    with pytest.raises(InvdpoError, match="there is no file"):
        run(folder, bright, tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvdpoError, match="holds no image"):
        run(tmp_path / "empty", bright)
    with pytest.raises(InvdpoError, match="neither a folder of images nor a readable parquet"):
        run(tmp_path / "nowhere", bright)
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(InvdpoError, match="lacks the columns method, seed, step, prompt_set, prompt_id, png"):
        run(tmp_path / "bare.parquet", bright)
    with pytest.raises(InvdpoError, match="carries its own prompts"):
        run(GOLDEN / "images.parquet", bright, folder / "0.txt", out=str(tmp_path / "rows.csv"))
    Image.new("RGB", (4, 4)).save(folder / "0.webp")
    (tmp_path / "p.csv").write_text("id,prompt\n0,a\n1,b\n2,c\n")
    with pytest.raises(InvdpoError, match="other images of the same `id` as 0.png"):
        run(folder, bright, tmp_path / "p.csv")


def noise(mode: str = "RGB", side: int = 64) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(1).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode=None if channels != 4 else "RGBA")


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_cannot_be_read_are_listed(folder: Path, bright: ScorersConfig, workers: int) -> None:
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(InvdpoError, match=r"2 of 3 images cannot be read: 1.png \(.*\), 2.png \(.*\)\. Make"):
        run(folder, bright, workers=workers)
    for number in (0, 2):  # a good beginning: found only by decoding
        noise().save(folder / f"{number}.png")
        (folder / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:5000])
    noise().save(folder / "1.png")
    with pytest.raises(InvdpoError, match=r"2 of 3 images cannot be read: 0.png \(.*trunc.*\), 2.png"):
        run(folder, bright, workers=workers, batch=1)
    assert not (folder.parent / "rows.csv").exists()


def test_a_picture_that_would_fill_the_memory_is_refused(folder: Path, bright: ScorersConfig) -> None:
    noise().save(folder / "1.png")
    content = bytearray((folder / "1.png").read_bytes())
    for side in (10_000, 100_000):
        content[16:24] = struct.pack(">II", side, side)  # the header says so, and its checksum agrees
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (folder / "1.png").write_bytes(content)
        with pytest.raises(InvdpoError, match=r"1 of 3 images cannot be read: 1.png \(more than 89478485 pixels\)"):
            run(folder, bright)


def test_modes_become_rgb_as_the_authors_scripts_make_them(
    tmp_path: Path, bright: ScorersConfig, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "modes"
    images.mkdir()
    rgba = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
    upright = Image.fromarray(np.repeat(np.array([[0, 0], [90, 90], [90, 90]], np.uint8)[..., None], 3, axis=2))
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 0, 0, 155)), {}),
        "deep.png": (Image.fromarray(np.full((8, 8), 25700, np.uint16)), {}),
        "grey.png": (Image.new("L", (8, 8), 100), {}),
        "half.png": (Image.new("LA", (8, 8), (100, 128)), {}),
        "opaque.png": (Image.new("RGBA", (8, 8), (100, 100, 100, 255)), {}),
        "palette.png": (Image.new("RGB", (8, 8), (100, 100, 100)).convert("P"), {}),
        "see_through.png": (rgba, {}),
        "turned.png": (upright, {"exif": turned}),
    }
    for name, (picture, options) in made.items():
        picture.save(images / name, **options)
    (tmp_path / "p.txt").write_text("one two\n" * len(made))
    with caplog.at_level(logging.WARNING, "invdpo"):
        rows, _ = run(images, bright, tmp_path / "p.txt")
    light = dict(zip(rows["image"], rows["score"], strict=True))
    assert light.pop("see_through.png") == 200 and light.pop("turned.png") == 60
    assert light == pytest.approx(dict.fromkeys(light, 100), abs=2)
    assert rows.set_index("image")["image_sha256"]["turned.png"] == stage.picture_hash(upright.rotate(-90, expand=True))
    messages = [record.message for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == [
        "1 of 8 images are of 16 bits a pixel",
        "2 of 8 images are transparent",
        "1 of 8 images are turned as their EXIF orientation says.",
    ]


def test_odd_prompts_are_scored_as_they_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = ["一只红色的圆 🔴", "a\x00b\tc\x1b[0m\u2028d", "red " * 200]
    lines = [json.dumps({"id": number, "prompt": prompt}) for number, prompt in enumerate(odd)]
    (folder.parent / "p.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING, "invdpo"):
        rows, _ = run(folder, shapes_scorers("pickscore", "clip"), folder.parent / "p.jsonl", out="rows.parquet")
    assert rows.groupby("scorer")["prompt"].apply(list).tolist() == [odd] * 3
    assert np.isfinite(rows["score"]).all()
    assert [record.message for record in caplog.records] == [
        "pickscore reads only the beginning of 1 of 3 prompts: they are too long for it.",
        "clip reads only the beginning of 1 of 3 prompts: they are too long for it.",
    ]


def test_the_scorers_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scorers.yaml"
    path.write_text("clip: {model: ViT-B-32, pretrained: openai}\n")
    found = load_scorers(path)
    assert found.clip is not None and found.clip.preprocessing == "open_clip" and found.hps is None
    path.write_text("scorers: {hps: {model: ViT-H-14, version: v2.1}}\nstudy: x\n")
    assert load_scorers(path).hps is not None
    path.write_text("clop: {model: ViT-B-32}\n")
    with pytest.raises(InvdpoError, match="not a valid list of scorers(.|\n)*`scorers.clop`. Did you mean `clip`"):
        load_scorers(path)
    path.write_text("{}")
    with pytest.raises(InvdpoError, match="names no scorer"):
        load_scorers(path)
    paper = load_scorers(ROOT / "config" / "scorers" / "paper.yaml")
    assert paper.clip is not None and paper.clip.preprocessing == "authors"
