"""Prompt files of every kind, published sets by name, and what is said about bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from hub_stub import Hub, point_to

from invdpo.errors import InvdpoError
from invdpo.prompts import HPD_STYLES, PROMPT_SETS, read_prompts

PICKAPIC = "yuvalkirstain/pickapic_v2_no_images"
HPD = "zhwang/HPDv2"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "a cat\r\n\n  two dogs \n", ["a cat", "two dogs"]),
        ("b.txt", "\ufeffa cat\u2028on a mat\nlast", ["a cat\u2028on a mat", "last"]),
        ("a.csv", 'id,prompt\n1,"a cat, black"\n2,two dogs\n', ["a cat, black", "two dogs"]),
        (
            "a.tsv",
            'Prompt\tCategory\n"now" in neon\tArts\nit\'s a dog\tAnimals\n',
            ['"now" in neon', "it's a dog"],
        ),
        ("b.tsv", "caption\tprompt\nno\tyes\n", ["yes"]),
        ("a.jsonl", '{"caption": "a cat"}\n\n{"prompt": "dogs", "caption": "no"}\n', ["a cat", "dogs"]),
        ("a.json", '["a cat", " dogs ", ""]', ["a cat", "dogs"]),
        ("b.json", '[{"prompt": "a cat", "caption": "no"}, {"caption": "dogs"}]', ["a cat", "dogs"]),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    assert read_prompts(write(tmp_path, name, text)) == expected


def test_limit_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a\nb\nc\n")
    assert read_prompts(path, 2) == ["a", "b"]
    assert read_prompts(path, 10) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.md", "a cat", "must end in"),
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.csv", "text\na cat\n", "none of the columns prompt, Prompt, caption; it has .'text'."),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt":\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n', "line 1 has no text"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 has no text"),
        ("a.json", '["a cat"', "a.json is not JSON"),
        ("a.json", '{"prompt": "a cat"}', "holds no JSON list"),
        ("a.json", '["a cat", 3]', "entry 2 is no text"),
        ("a.parquet", "PAR1", "cannot be read as parquet"),
        ("prompts", "a cat", "neither a file of prompts .* nor a set"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvdpoError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="there is no file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvdpoError, match="not UTF-8"):
        read_prompts(tmp_path / "a.txt")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"caption": ["a cat", None, "dogs"], "label_0": [1.0, 0.0, 0.5]}).to_parquet(path)
    assert read_prompts(path) == ["a cat", "dogs"]
    pd.DataFrame({"text": ["a cat"]}).to_parquet(path)
    with pytest.raises(InvdpoError, match="none of the columns"):
        read_prompts(path)


@pytest.fixture
def sets(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with Pick-a-Pic's and HPDv2's prompts in their layouts; captions are made up."""
    folder = tmp_path / "pickapic" / "data"
    folder.mkdir(parents=True)
    for split in ("validation", "validation_unique", "test_unique"):
        captions = [f"{split} {number % 499}" for number in range(500)]
        pd.DataFrame({"caption": captions}).to_parquet(folder / f"{split}-00000-of-00001-0a1b2c.parquet")
    hub.add_folder(PICKAPIC, tmp_path / "pickapic")
    styles = {style: [f"{style} {number}" for number in range(800)] for style in HPD_STYLES}
    hub.repos[HPD] = {f"benchmark/{style}.json": json.dumps(prompts).encode() for style, prompts in styles.items()}
    return hub


def test_sets_by_name(sets: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "invdpo"):
        for split in ("validation_unique", "test_unique"):
            prompts = read_prompts(f"pickapic_v2_{split}")
            assert len(prompts) == 500 and prompts[:2] == [f"{split} 0", f"{split} 1"] and prompts[-1] == f"{split} 0"
    assert "500 prompts, of which 1 repeat an earlier one; all are kept" in caplog.text
    assert not any("data/validation-00000" in path for path in sets.sent()), "the splits that are not asked for"
    assert read_prompts("hpdv2_photo", 2) == ["photo 0", "photo 1"]
    assert read_prompts("hpdv2")[::800] == ["anime 0", "concept-art 0", "paintings 0", "photo 0"]


def test_a_fetched_set_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"photo {number}" for number in range(800)]
    hub.repos[HPD] = {f"benchmark/{style}.json": json.dumps(prompts).encode() for style in HPD_STYLES}
    assert len(read_prompts("hpdv2_photo")) == 800
    point_to("http://127.0.0.1:9", monkeypatch)
    assert read_prompts("hpdv2_photo") == prompts
    for name in ("hpdv2_anime", "partiprompts"):
        with pytest.raises(InvdpoError, match=f"`prompts: {name}`: the hub cannot be reached.* to a local copy of it"):
            read_prompts(name)


def test_a_set_that_the_hub_does_not_give(sets: Hub) -> None:
    with pytest.raises(InvdpoError, match="hub has no dataset nateraw/parti-prompts.*local copy of it"):
        read_prompts("partiprompts")
    sets.repos["nateraw/parti-prompts"] = {"README.md": b""}
    with pytest.raises(InvdpoError, match="nateraw/parti-prompts of the hub has no file PartiPrompts.tsv"):
        read_prompts("partiprompts")
    sets.refused[PICKAPIC] = (403, "GatedRepo")
    with pytest.raises(InvdpoError, match="gated. Accept its terms on its page there. Log in .*local copy of it"):
        read_prompts("pickapic_v2_test_unique")
    sets.repos[HPD]["benchmark/photo.json"] = b'["one", "two"]'
    for name, count in (("hpdv2_photo", 2), ("hpdv2", 2402)):
        expected = f"HPDv2 gives {count} prompts where the set is published with {PROMPT_SETS[name].count}"
        with pytest.raises(InvdpoError, match=expected):
            read_prompts(name)
    with pytest.raises(InvdpoError, match="Did you mean `hpdv2_photo`"):
        read_prompts("hpdv2_photos")


def test_parti_prompts_if_there(hub: Hub) -> None:
    path = Path(__file__).parents[3] / "shared/data/PartiPrompts.tsv"
    if not path.is_file():
        pytest.skip("PartiPrompts.tsv is not beside the checkout")
    hub.repos["nateraw/parti-prompts"] = {"PartiPrompts.tsv": path.read_bytes()}
    prompts = read_prompts("partiprompts")
    assert len(prompts) == 1632 and prompts == read_prompts(path)
    assert any(prompt.startswith('"') for prompt in prompts)
