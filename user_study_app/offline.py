"""What works on the database without a running server: personal links, exports, the deletion of a participant."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ValidationError

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Storage

MEDIA_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
INTEGERS = {"slot", "index", "repeat_of", "left", "response_ms", "prompt_id", "seed"}
COLUMNS: tuple[str, ...] = (
    "rater", "slot", "index", "pair", "group", "kind", "repeat_of", "left", "choice", "response_ms", "shown_at",
    "submitted_at", "consent_version", "bundle", "problem",
)  # fmt: skip
KEY_COLUMNS: tuple[str, ...] = ("arm_left", "arm_right", "prompt_id", "seed", "prompt")


class Named(BaseModel):
    """What the key says of an image."""

    arm: str
    seed: int
    prompt_id: int


class Key(BaseModel):
    """`key.json`, as far as an export needs it."""

    bundle: str
    images: dict[str, Named]


def parse_key(content: bytes, stimuli: Stimuli) -> dict[str, Named]:
    """The images of a key file by their file tokens.

    Raises InvdpoError where it is not a key file, or not the one of this bundle.
    """
    try:
        key = Key.model_validate_json(content)
    except ValidationError:
        raise InvdpoError("This is not a key of the study. Give the key.json that lies next to the bundle.") from None
    if key.bundle != stimuli.bundle or not stimuli.manifest.files.keys() <= key.images.keys():
        raise InvdpoError("This key belongs to another bundle. Give the key.json that was made with this one.")
    return key.images


def export_rows(storage: Storage, stimuli: Stimuli, key: dict[str, Named] | None) -> list[dict[str, Any]]:
    """One row a vote, in COLUMNS and, with the key, KEY_COLUMNS; by participant and position.

    `left` is the index of the pair's image on the left. Of a pair whose images have different prompts or seeds (an
    attention check) prompt_id and seed are those of the expected image.
    """
    rows = []
    for vote in storage.votes():
        shown = stimuli.slots[vote["slot"]][vote["position"]]
        pair = stimuli.pairs[shown.pair]
        row = {
            "rater": vote["rater"],
            "slot": vote["slot"],
            "index": vote["position"],
            "pair": shown.pair,
            "group": pair.group,
            "kind": shown.kind,
            "repeat_of": shown.repeat_of,
            "left": shown.left,
            "choice": vote["choice"],
            "response_ms": vote["response_ms"],
            "shown_at": _iso(vote["shown_at"]),
            "submitted_at": _iso(vote["submitted_at"]),
            "consent_version": vote["consent_version"],
            "bundle": stimuli.bundle,
            "problem": vote["problem_text"],
        }
        if key is not None:
            left, right = (key[pair.images[side]] for side in (shown.left, 1 - shown.left))
            described = key[pair.images[pair.expected]] if pair.expected is not None else left
            row |= {"arm_left": left.arm, "arm_right": right.arm}
            row |= {"prompt_id": described.prompt_id, "seed": described.seed, "prompt": pair.prompt}
        rows.append(row)
    return rows


def encode(rows: list[dict[str, Any]], form: str, with_key: bool) -> bytes:
    """The rows as a file of the form csv, jsonl or parquet. Raises InvdpoError for another form."""
    columns = COLUMNS + (KEY_COLUMNS if with_key else ())
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if form == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        # A spreadsheet would run a participant's text that looks like a formula.
        writer.writerows({**row, "problem": _harmless(row["problem"])} for row in rows)
        return stream.getvalue().encode()
    if form == "parquet":
        schema = pyarrow.schema([(name, pyarrow.int64() if name in INTEGERS else pyarrow.string()) for name in columns])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink)
        return sink.getvalue().to_pybytes()
    raise InvdpoError(f"Votes cannot be exported as {form!r}. Choose csv, jsonl or parquet.")


def _harmless(text: str | None) -> str | None:
    return f"'{text}" if text and text[0] in "=+-@\t\r" else text


def _iso(ms: int | None) -> str | None:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds") if ms is not None else None


def _open(database: str, bundle: Path) -> tuple[Storage, Stimuli]:
    stimuli = Stimuli(bundle)
    storage = Storage(database)
    storage.bind(stimuli)
    return storage, stimuli


def invite(database: str, bundle: Path, count: int, base: str = "http://127.0.0.1:7860") -> list[str]:
    """Make `count` personal links; `base` is the address under which participants reach the study."""
    if count < 1:
        raise InvdpoError(f"{count} links cannot be made. Ask for one or more.")
    storage, _ = _open(database, bundle)
    links = [f"{base.rstrip('/')}/#{token}" for token in storage.invite(count, "command line")]
    storage.close()
    return links


def export(database: str, bundle: Path, out: Path, key: Path | None = None) -> Path:
    """Write the votes to `out`, as csv, jsonl or parquet by its ending; with `key`, the names of the methods too.

    Raises InvdpoError for another ending, a wrong key, or a database of another bundle.
    """
    storage, stimuli = _open(database, bundle)
    try:
        names = None if key is None else parse_key(key.read_bytes(), stimuli)
    except OSError as error:
        raise InvdpoError(f"The key {key} cannot be read: {error.strerror}.") from error
    form = out.suffix.removeprefix(".")
    content = encode(export_rows(storage, stimuli, names), form, with_key=names is not None)
    with replace_when_done(out) as temporary:
        temporary.write_bytes(content)
    storage.note("command line", "export", f"{form}, {'with' if names else 'without'} key")
    storage.close()
    return out


def delete(database: str, who: str) -> dict[str, int]:
    """Delete a participant's data, by participant number or platform id: how many votes, trials, sessions, raters.

    Raises InvdpoError where nobody is known by it.
    """
    storage = Storage(database)
    found = storage.find(who)
    if found is None:
        raise InvdpoError(f"Nobody is known as {who!r} in {storage.name}. Nothing was deleted.")
    counts = storage.delete(found, "command line")
    storage.close()
    return counts
