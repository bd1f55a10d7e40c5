"""Prompt files of every kind, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdpo.errors import InvdpoError
from invdpo.prompts import read_prompts


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


def test_parti_prompts_if_there() -> None:
    path = Path(__file__).parents[3] / "shared/data/PartiPrompts.tsv"
    if not path.is_file():
        pytest.skip("PartiPrompts.tsv is not beside the checkout")
    prompts = read_prompts(path)
    assert len(prompts) == 1632
    assert any(prompt.startswith('"') for prompt in prompts)
