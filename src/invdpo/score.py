"""Scores of any folder of images with prompts, or of a study's images, in the rows of a study's score files."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from invdpo.device import memory_for
from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from invdpo.image_files import ENDINGS, open_image, open_picture, why
from invdpo.prompts import read_named_prompts, read_prompt_lines, some
from invdpo.provenance import stamp
from invdpo.scorers import Preprocesses, ReadsPrompts, Scorer, build_scorers
from invdpo.scorers.pictures import Pictures, Preprocessing, prepare
from invdpo.scorers.rows import HEAD, SCORES, picture_hash, score_rows, write_parquet

if TYPE_CHECKING:
    from invdpo.config import ScorersConfig

log = logging.getLogger("invdpo")

# `image` says which one a row is about, where it was a file.
ROWS = SCORES.append(pa.field("image", pa.string()))
HEAD_NAMES = tuple(field.name for field in HEAD)


@dataclass(frozen=True)
class Item:
    """One image to score. name: for messages. source: its file, or a file's content. head: the row's first columns."""

    name: str
    source: Path | bytes
    head: dict[str, Any]


def score(
    images: Path,
    prompts: Path | None,
    scorers: ScorersConfig,
    out: Path,
    device: torch.device,
    *,
    method: str | None = None,
    batch: int = 32,
    workers: int = 0,
) -> pd.DataFrame:
    """Score every image and write the rows to `out` (parquet, csv or jsonl); returns them.

    images: a folder of png, jpg and webp files (its subfolders too), or an images parquet of `invdpo evaluate`.
    prompts: for a folder. A csv, tsv or jsonl with a column `file` (path in the folder) or `id` (that path without its
    ending) and a column `prompt`; or a txt with a line an image, in the order of their names, in which numbers count as
    numbers; None: a .txt of the same name beside each image. method: the column of that name; None: the folder's name.
    workers: processes that decode; 0: none but this one.

    A folder's rows have step 0; `prompt_id` numbers the different prompts as they come, `seed` the images of a prompt.
    A score that does not exist for a prompt has no row. Raises InvdpoError that lists every image that cannot be read
    or has no prompt, and every prompt without its image: no mean may be taken over what happens to be there. And where
    a GPU is out of memory.
    """
    if out.suffix.lower() not in WRITERS:
        raise InvdpoError(f"--out {out} must end in {', '.join(WRITERS)}")
    started = time.time()
    items = _folder(images, prompts, method) if images.is_dir() else _stored(images, prompts)
    _check_headers(items)
    lower = [f"`--batch {batch // 2}` (now {batch})"] if batch > 1 else []
    with memory_for("scoring images", [*lower, "fewer scorers at a time, whose networks stay on the GPU"]):
        built = build_scorers(scorers, device)
        _tell_cuts(built, [item.head["prompt"] for item in items])
        rows = score_items(items, built, batch, workers)
    provenance = stamp(None, device=device, started=started)
    provenance["scorer_versions"] = [scorer.version for scorer in built]
    WRITERS[out.suffix.lower()](out, rows, ROWS, provenance)
    return pd.DataFrame(rows, columns=pd.Index(ROWS.names))


def score_items(items: Sequence[Item], scorers: Sequence[Scorer], batch: int, workers: int) -> list[dict[str, Any]]:
    """The rows of some images, decoded by `workers` processes while the scorers work on a batch.

    Says once what was done to how many images. Raises InvdpoError that lists every image that cannot be read.
    """
    preprocessings = list(dict.fromkeys(each.preprocessing for each in scorers if isinstance(each, Preprocesses)))
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    notes: Counter[str] = Counter()
    waiting: list[tuple[Item, Decoded]] = []
    with tqdm(total=len(items), unit="image") as bar:
        for item, decoded in zip(items, _decoded(items, preprocessings, workers), strict=True):
            bar.update()
            if isinstance(decoded, str):
                broken.append(f"{item.name} ({decoded})")
            elif not broken:  # what is left is only read, to list all that are broken
                notes.update(decoded.notes)
                waiting.append((item, decoded))
                if len(waiting) == batch:
                    rows += _score(scorers, waiting, preprocessings)
                    waiting = []
    if broken:
        raise InvdpoError(f"{len(broken)} of {len(items)} images cannot be read: {some(broken)}. Make them again.")
    if waiting:
        rows += _score(scorers, waiting, preprocessings)
    for note, count in sorted(notes.items()):
        log.warning(f"{count} of {len(items)} images are {note}.")
    return rows


@dataclass(frozen=True)
class Decoded:
    """What a worker makes of an image. pixels: (3,H,W) float32 by preprocessing, as arrays: torch would send tensors
    through shared memory, of which a container may have little.
    """

    image: Image.Image
    sha256: str
    pixels: list[np.ndarray]
    notes: list[str]


class _Decoder(Dataset):
    """Decodes, hashes and preprocesses an image at a time; gives the reason, as text, where that fails."""

    def __init__(self, items: Sequence[Item], preprocessings: Sequence[Preprocessing]):
        self.items, self.preprocessings = items, preprocessings

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Decoded | str:
        try:
            image, notes = open_picture(self.items[index].source)
        except Exception as error:  # Pillow raises many kinds; all mean the same to the reader
            return why(error)
        made = prepare(image, self.preprocessings)
        return Decoded(image, picture_hash(image), [made[each].numpy() for each in self.preprocessings], notes)


def _decoded(items: Sequence[Item], preprocessings: Sequence[Preprocessing], workers: int) -> Iterator[Decoded | str]:
    """In the order of the items, whatever the number of workers."""
    # Eight a message: singly, small pictures cost more time to send than to decode; many large ones fill the memory.
    loader = DataLoader(_Decoder(items, preprocessings), batch_size=8, num_workers=workers, collate_fn=_as_they_are)
    for message in loader:
        yield from message


def _as_they_are(decoded: list[Decoded | str]) -> list[Decoded | str]:
    return decoded


def _score(
    scorers: Sequence[Scorer], batch: Sequence[tuple[Item, Decoded]], preprocessings: Sequence[Preprocessing]
) -> list[dict[str, Any]]:
    pixels = {
        each: torch.from_numpy(np.stack([decoded.pixels[number] for _, decoded in batch]))
        for number, each in enumerate(preprocessings)
    }
    pictures = Pictures((decoded.image for _, decoded in batch), pixels)
    return score_rows(scorers, [item.head for item, _ in batch], [decoded.sha256 for _, decoded in batch], pictures)


def _tell_cuts(scorers: Sequence[Scorer], prompts: list[str]) -> None:
    """Say once, for each text tower, how many prompts it cannot read to their end."""
    distinct = list(dict.fromkeys(prompts))
    for scorer in scorers:
        if isinstance(scorer, ReadsPrompts) and (count := scorer.cut(distinct)):
            name = scorer.version.split(":")[0]
            log.warning(
                f"{name} reads only the beginning of {count} of {len(distinct)} prompts: they are too long for it."
            )


def _check_headers(items: Sequence[Item]) -> None:
    """Find what is no picture at all before hours are spent; raises InvdpoError that lists them."""
    broken = []
    for item in items:
        try:
            open_image(item.source).close()
        except Exception as error:
            broken.append(f"{item.name} ({why(error)})")
    if broken:
        raise InvdpoError(f"{len(broken)} of {len(items)} images cannot be read: {some(broken)}. Make them again.")


def _folder(folder: Path, prompts: Path | None, method: str | None) -> list[Item]:
    """The images of a folder in the order of their names, with their prompts."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()]
    if not files:
        raise InvdpoError(f"{folder} holds no image ({', '.join(sorted(ENDINGS))})")
    names = sorted((path.relative_to(folder).as_posix() for path in files), key=_natural)
    texts = _prompts_of(folder, names, prompts)
    if empty := [name for name in names if not texts[name].strip()]:
        raise InvdpoError(f"prompts: {len(empty)} of {len(names)} images have an empty prompt: {some(empty)}")
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts.values()))}
    seen: Counter[str] = Counter()
    items = []
    for name in names:
        text = texts[name]
        values = (
            method or folder.resolve().name,
            seen[text],
            0,
            prompts.stem if prompts else folder.resolve().name,
            numbers[text],
            text,
        )
        items.append(Item(name, folder / name, dict(zip(HEAD_NAMES, values, strict=True)) | {"image": name}))
        seen[text] += 1
    return items


def _natural(name: str) -> list[tuple[int, str]]:
    """So that 2.png comes before 10.png, as whoever numbers lines means it."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)] + [(-1, name)]


def _prompts_of(folder: Path, names: Sequence[str], prompts: Path | None) -> dict[str, str]:
    """{image: prompt} in the prompts' order; raises InvdpoError where the two do not fit."""
    if prompts is None:
        beside = {name: (folder / name).with_suffix(".txt") for name in names}
        if missing := [name for name, path in beside.items() if not path.is_file()]:
            raise InvdpoError(
                f"{len(missing)} of {len(names)} images have no .txt with their prompt beside them: {some(missing)}. "
                "Write them, or name a file with --prompts."
            )
        return {name: "\n".join(read_prompt_lines(path)) for name, path in beside.items()}
    if prompts.suffix.lower() == ".txt":
        lines = read_prompt_lines(prompts)
        if len(lines) != len(names):
            raise InvdpoError(
                f"prompts: {prompts} has {len(lines)} lines for {len(names)} images of {folder} ({names[0]} to "
                f"{names[-1]}). It needs a line an image; a csv with columns `file` and `prompt` says which is which."
            )
        return dict(zip(names, lines, strict=True))
    key, named = read_named_prompts(prompts)
    keys = {name: name if key == "file" else PurePosixPath(name).with_suffix("").as_posix() for name in names}
    images = {own: name for name, own in keys.items()}
    if len(images) < len(names):
        shared = [name for name, own in keys.items() if images[own] != name]
        raise InvdpoError(f"{folder} holds other images of the same `id` as {some(shared)}; name the images by `file`")
    problems = []
    if missing := [name for name in named if name not in images]:
        problems.append(f"{len(missing)} of {len(named)} images are missing from {folder}: {some(missing)}")
    if without := [name for name in names if keys[name] not in named]:
        problems.append(f"{len(without)} of {len(names)} images have no prompt in {prompts}: {some(without)}")
    if problems:
        raise InvdpoError("; ".join(problems))
    return {images[name]: text for name, text in named.items()}


def _stored(path: Path, prompts: Path | None) -> list[Item]:
    """The images of a parquet that `invdpo evaluate` wrote."""
    if prompts is not None:
        raise InvdpoError(f"{path} carries its own prompts; leave --prompts out")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InvdpoError(f"{path} is neither a folder of images nor a readable parquet of images: {error}") from error
    if missing := [name for name in (*HEAD_NAMES, "png") if name not in table.column_names]:
        raise InvdpoError(
            f"{path} lacks the columns {', '.join(missing)}; an images parquet of `invdpo evaluate` has them"
        )
    if not table.num_rows:
        raise InvdpoError(f"{path} holds no image")
    rows = table.select([*HEAD_NAMES, "png"]).to_pylist()
    return [Item(f"row {n}", row.pop("png") or b"", row | {"image": None}) for n, row in enumerate(rows)]


def _write_csv(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, provenance: dict[str, Any]) -> None:
    with replace_when_done(path) as temporary:
        frame = pd.DataFrame(rows, columns=pd.Index(schema.names))
        frame.to_csv(temporary, index=False, lineterminator="\n")


def _write_jsonl(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, provenance: dict[str, Any]) -> None:
    with replace_when_done(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in schema.names}, ensure_ascii=False) + "\n")


WRITERS = {".parquet": write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}
