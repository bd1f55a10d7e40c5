"""Prompt sets: a file (txt with one a line, csv, tsv, json, jsonl, parquet), or a published set by its name."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdpo.config import nearest
from invdpo.errors import InvdpoError
from invdpo.hub import fetch_matching

log = logging.getLogger("invdpo")

# PartiPrompts.tsv says Prompt; Pick-a-Pic says caption; most others say prompt.
COLUMNS = ("prompt", "Prompt", "caption")
# What a prompt belongs to, in files that name it: an image's file, or its file without the ending.
KEYS = ("file", "id")


@dataclass(frozen=True)
class PromptSet:
    """A published prompt set. repo: a hub data set. files: glob patterns there, in the order of the prompts. count: how
    many prompts it is published with.
    """

    repo: str
    files: tuple[str, ...]
    count: int


PICKAPIC = "yuvalkirstain/pickapic_v2_no_images"  # Pick-a-Pic v2 without its 335 GB of pictures
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")  # HPSv2's own order, in its benchmark
PROMPT_SETS = {
    # "validation_unique" and "test_unique": 500 rows each, of different captions (Pick-a-Pic, section 3).
    "pickapic_v2_validation_unique": PromptSet(PICKAPIC, ("data/validation_unique-*.parquet",), 500),
    "pickapic_v2_test_unique": PromptSet(PICKAPIC, ("data/test_unique-*.parquet",), 500),
    # Parti (Yu et al. 2022), section 4.2: P2, "over 1600 English prompts"; its table has 1,632 rows.
    "partiprompts": PromptSet("nateraw/parti-prompts", ("PartiPrompts.tsv",), 1632),
    # HPSv2 (Wu et al. 2023), section 5: four styles of 800 prompts each.
    **{f"hpdv2_{style}": PromptSet("zhwang/HPDv2", (f"benchmark/{style}.json",), 800) for style in HPD_STYLES},
    "hpdv2": PromptSet("zhwang/HPDv2", tuple(f"benchmark/{style}.json" for style in HPD_STYLES), 3200),
}


def read_prompts(source: Path | str, limit: int | None = None) -> list[str]:
    """The prompts of a file or of a set of `PROMPT_SETS`, in its order, at most `limit` from the top; a prompt's id is
    its position in this list. A prompt that is there twice is kept twice.

    txt: one a line, blank lines skipped. csv, tsv and parquet: the first of the columns `prompt`, `Prompt`, `caption`;
    a tsv has no quoting (a prompt of PartiPrompts begins with a quotation mark), a csv has. jsonl: the same keys. json:
    a list of texts, or of objects with such a key.

    Raises InvdpoError: missing, unreadable or empty file, unknown ending, no such column or key, a set that cannot be
    fetched or has another number of prompts than it is published with.
    """
    if str(source) in PROMPT_SETS:
        return _read_set(str(source), PROMPT_SETS[str(source)])[:limit]
    path = Path(source)
    if not path.suffix:
        raise InvdpoError(
            f"prompts: {source} is neither a file of prompts ({', '.join(READERS)}) nor a set that is known by name."
            f"{nearest(str(source), PROMPT_SETS)}"
        )
    prompts = _read_file(path)
    if not prompts:
        raise InvdpoError(f"prompts: {path} holds no prompt")
    return prompts[:limit]


def _read_file(path: Path) -> list[str]:
    """The prompts of a file without the white space around them, empty ones left out."""
    with _reading(path, READERS):
        prompts = [prompt.strip() for prompt in READERS[path.suffix.lower()](path)]
    return [prompt for prompt in prompts if prompt]


def _read_set(name: str, known: PromptSet) -> list[str]:
    instead = f"set `prompts` to a local copy of it (a file that ends in {', '.join(READERS)})"
    files = fetch_matching(known.repo, known.files, "dataset", f"`prompts: {name}`", instead)
    prompts = [prompt for path in files for prompt in _read_file(path)]
    if len(prompts) != known.count:
        raise InvdpoError(
            f"`prompts: {name}`: {known.repo} gives {len(prompts)} prompts where the set is published with "
            f"{known.count}: it is another version, or not all of it. Delete it from the hub's cache and run again, or "
            f"{instead}."
        )
    if again := len(prompts) - len(set(prompts)):
        log.info(f"{name}: {len(prompts)} prompts, of which {again} repeat an earlier one; all are kept, as published")
    return prompts


def read_prompt_lines(path: Path) -> list[str]:
    """Every line of a txt file, blank ones too, but not the end of the file; as they are, but for line ends.

    Raises InvdpoError: missing or unreadable file.
    """
    with _reading(path, {".txt": _read_text}):
        lines = _read_text(path)
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_named_prompts(path: Path) -> tuple[str, dict[str, str]]:
    """(`file` or `id`, {name: prompt}) of a csv, tsv or jsonl with that column and one of `read_prompts`, in its order.

    Raises InvdpoError: missing, unreadable or empty file, unknown ending, no such column, a name twice or none.
    """
    readers = {".csv": _table_pairs, ".tsv": _table_pairs, ".jsonl": _jsonl_pairs}
    with _reading(path, readers):
        key, pairs = readers[path.suffix.lower()](path)
    if not pairs:
        raise InvdpoError(f"prompts: {path} holds no prompt")
    named = dict(pairs)
    if nameless := sum(not name for name, _ in pairs):
        raise InvdpoError(f"prompts: {nameless} rows of {path} have an empty `{key}`; fill it in")
    if len(named) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = some([name for name, count in counts.items() if count > 1])
        raise InvdpoError(f"prompts: {path} has more than one row with the `{key}` {twice}; keep one of each")
    return key, named


def some(names: Sequence[str]) -> str:
    """Names for an error message: the first ten, and how many there are where there are more."""
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")


@contextmanager
def _reading(path: Path, endings: Iterable[str]) -> Iterator[None]:
    """Checks that the file can be one of prompts, and says in one voice why it cannot be read."""
    if path.suffix.lower() not in endings:
        raise InvdpoError(f"prompts: {path} must end in {', '.join(endings)}")
    if not path.is_file():
        raise InvdpoError(f"prompts: there is no file {path}; set `prompts:` to a file of prompts")
    try:
        yield
    except UnicodeDecodeError as error:
        raise InvdpoError(f"prompts: {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise InvdpoError(f"prompts: {path} is not a readable table: {error}") from error


def _read_text(path: Path) -> list[str]:
    # Not splitlines(), which also splits at U+2028 and its like inside a prompt.
    return path.read_text(encoding="utf-8-sig").split("\n")


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(header, rows)."""
    tab = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        if tab:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        header, found = list(rows.fieldnames or []), list(rows)
    for number, row in enumerate(found, start=1):
        if None in row:  # where csv puts what lies beyond the header: the rest of a prompt, most likely
            raise InvdpoError(
                f"prompts: row {number} of {path} has more than {len(header)} cells; quote prompts with commas"
            )
    return header, found


def _column(path: Path, header: list[str], names: Sequence[str]) -> str:
    column = next((name for name in names if name in header), None)
    if column is None:
        raise InvdpoError(f"prompts: {path} has none of the columns {', '.join(names)}; it has {header}")
    return column


def _table_prompts(path: Path) -> list[str]:
    header, rows = _read_table(path)
    column = _column(path, header, COLUMNS)
    return [row[column] or "" for row in rows]


def _table_pairs(path: Path) -> tuple[str, list[tuple[str, str]]]:
    header, rows = _read_table(path)
    key, column = _column(path, header, KEYS), _column(path, header, COLUMNS)
    return key, [(row[key] or "", row[column] or "") for row in rows]


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(number of the line, its object, the prompt in it)."""
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
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvdpoError(f"prompts: {path}, line {number} holds half a character ({error}); repair it") from error
        yield number, row, prompt


def _jsonl_prompts(path: Path) -> list[str]:
    return [prompt for _, _, prompt in _read_jsonl(path)]


def _json_prompts(path: Path) -> list[str]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InvdpoError(f"prompts: {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise InvdpoError(f"prompts: {path} holds no JSON list of prompts")
    prompts = []
    for number, row in enumerate(rows, start=1):
        text = next((row[key] for key in COLUMNS if key in row), None) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InvdpoError(f"prompts: {path}, entry {number} is no text, nor has it any of {', '.join(COLUMNS)}")
        prompts.append(text)
    return prompts


def _parquet_prompts(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        column = _column(path, file.schema_arrow.names, COLUMNS)
        return [text or "" for text in file.read(columns=[column]).column(column).to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise InvdpoError(f"prompts: {path} cannot be read as parquet: {error}") from error


def _jsonl_pairs(path: Path) -> tuple[str, list[tuple[str, str]]]:
    key, pairs = "", []
    for number, row, prompt in _read_jsonl(path):
        key = key or next((name for name in KEYS if name in row), "")
        if not isinstance(row.get(key), (str, int)):
            raise InvdpoError(
                f"prompts: {path}, line {number} has no key `file` or `id`, or another than the lines before"
            )
        pairs.append((str(row[key]), prompt))
    return key, pairs


READERS = {
    ".txt": _read_text,
    ".csv": _table_prompts,
    ".tsv": _table_prompts,
    ".json": _json_prompts,
    ".jsonl": _jsonl_prompts,
    ".parquet": _parquet_prompts,
}
