"""Prompt sets: txt (one a line), csv, tsv, jsonl."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from invdpo.errors import InvdpoError

# PartiPrompts.tsv says Prompt; Pick-a-Pic says caption; most others say prompt.
COLUMNS = ("prompt", "Prompt", "caption")


def read_prompts(path: Path | str, limit: int | None = None) -> list[str]:
    """The prompts of a file in its order, at most `limit` from the top; a prompt's id is its position in this
    list.

    txt: one a line, blank lines skipped. csv and tsv: the first of the columns `prompt`, `Prompt`, `caption`;
    a tsv has no quoting (a prompt of PartiPrompts begins with a quotation mark), a csv has. jsonl: key
    `prompt` or `caption`.

    Raises InvdpoError: missing, unreadable or empty file, unknown ending, no such column or key.
    """
    path = Path(path)
    readers = {".txt": _read_text, ".csv": _read_table, ".tsv": _read_table, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InvdpoError(f"prompts: {path} must end in {', '.join(readers)}")
    if not path.is_file():
        raise InvdpoError(f"prompts: there is no file {path}; set `prompts:` to a file of prompts")
    try:
        prompts = [prompt.strip() for prompt in readers[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise InvdpoError(f"prompts: {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise InvdpoError(f"prompts: {path} is not a readable table: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InvdpoError(f"prompts: {path} holds no prompt")
    return prompts[:limit]


def _read_text(path: Path) -> list[str]:
    # Not splitlines(), which also splits at U+2028 and its like inside a prompt.
    return path.read_text(encoding="utf-8-sig").split("\n")


def _read_table(path: Path) -> list[str]:
    tab = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        if tab:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        header = rows.fieldnames or []
        column = next((name for name in COLUMNS if name in header), None)
        if column is None:
            raise InvdpoError(f"prompts: {path} has none of the columns {', '.join(COLUMNS)}; it has {list(header)}")
        return [row[column] or "" for row in rows]


def _read_jsonl(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(_read_text(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvdpoError(f"prompts: {path}, line {number} is not JSON: {error}") from error
        prompt = next((row[key] for key in COLUMNS if key in row), None) if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise InvdpoError(f"prompts: {path}, line {number} has no text under any of the keys {', '.join(COLUMNS)}")
        prompts.append(prompt)
    return prompts
