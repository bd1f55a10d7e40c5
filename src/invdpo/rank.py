"""Preference pairs from scored images: all pairs of the images of one prompt, ordered by the mean of several scores.

Inversion-DPO's section 4.2 draws four images for each of 2,785 scenes and lets r = (1/N) sum_i r_i (Eq. 17) decide,
while it trains, which of a scene's images wins: any two of them are a pair. Here all of them are written, so that a run
meets them in the random order of its pairs. Scores are averaged as they are, as Eq. 17 does: of two on different
scales, the one that varies more decides more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from invdpo.config import LABEL_COLUMN, nearest
from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from invdpo.image_files import open_picture, why
from invdpo.prompts import some
from invdpo.scorers.rows import picture_hash

log = logging.getLogger("invdpo")

# Scores are stored with float32's precision, a relative error of 6e-8: means that differ by less than this share of
# their size are equal but for rounding, and no preference.
TIE = 1e-6
FIXED = "fixed"  # label_0_fixed: label_0 for one pair a prompt
PROMPTS_AT_ONCE = 64  # of a row group, in which an image is stored once a column and not once a pair
COLUMNS = ["image", "image_sha256", "method", "prompt", "scorer", "scorer_version", "score"]
TEXTS: Any = dict.fromkeys(COLUMNS[:-1], str)  # a prompt may look like a number
EMPTY: Any = {"score": ["", "nan"], "image": [""]}
READERS: dict[str, Any] = {
    ".parquet": pd.read_parquet,
    ".csv": partial(pd.read_csv, dtype=TEXTS, keep_default_na=False, na_values=EMPTY),
    ".jsonl": partial(pd.read_json, lines=True, dtype=False, precise_float=True),  # pyright: ignore[reportCallIssue]
}


@dataclass(frozen=True)
class Ranked:
    """What became of the images. columns: column -> (pairs that it decides, share of those that label_0 decides too on
    which both agree). left_out: prompts without a score, by how many lack it, or with one image.
    """

    prompts: int
    pairs: int
    columns: dict[str, tuple[int, float]]
    left_out: int

    def text(self) -> str:
        """For people."""
        lines = [f"{self.pairs} pairs of {self.prompts} prompts; {self.left_out} prompts left out"]
        for name, (decided, agreeing) in self.columns.items():
            ties = f"{self.pairs - decided} ties"
            lines.append(f"  {name}: {decided} decided, {ties}; agrees with label_0 on {agreeing:.1%}")
        return "\n".join(lines)


def rank(scores: Sequence[Path], images: Path, by: Sequence[str], out: Path) -> Ranked:
    """Write the pairs of all scored images of each prompt to `out`, in Pick-a-Pic v2's columns.

    scores: files of `invdpo score` (parquet, csv or jsonl), which together hold each image's scores. images: the folder
    that was scored, whose files are stored as they are. by: the scores that decide; a prompt none of whose images has
    one of them is left out and counted, as a score may not exist for it.

    label_0 is 1 where image 0 has the larger mean of `by` (Eq. 17), 0 where image 1 has it, 0.5 for a tie (TIE).
    label_0_<score> is the same by one score alone. label_0_fixed is label_0 for one pair a prompt, its images 0 and 1,
    and 0.5 for the others: pairs bound beforehand and not by their scores, as in data of one pair a prompt. reward_0
    and reward_1 are the means. Pairs of a prompt are in the order (0, 1), (0, 2), ….

    Raises InvdpoError: unreadable or foreign files, an unknown score, an image that is missing, was changed since it
    was scored, or lacks a score that others of its prompt have, and no pair at all.
    """
    if out.suffix != ".parquet":
        raise InvdpoError(f"--out {out} must end in .parquet")
    if FIXED in by or len(set(by)) < len(by):
        raise InvdpoError(f"--by {','.join(by)}: name different scores, none of them `{FIXED}`.")
    table, versions = _read(scores, by)
    table, left_out = _complete(table, by)
    table["reward"] = table[list(by)].mean(axis=1)
    prompts = [group for _, group in table.groupby("prompt_id", sort=True)]
    names = ["label_0", *(f"{LABEL_COLUMN}{name}" for name in (*by, FIXED))]
    labels: list[pd.DataFrame] = []
    facts = {"by": list(by), "versions": versions, "left_out": left_out}
    with replace_when_done(out) as temporary, _Writer(temporary, facts) as writer:
        first = 0
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            rows = [row for group in prompts[start : start + PROMPTS_AT_ONCE] for row in _pairs(group, by, images)]
            for number, row in enumerate(rows, start=first):
                row["ranking_id"] = number
            first += len(rows)
            writer.write(rows)
            labels.append(pd.DataFrame(rows, columns=pd.Index(names)))
    return _counted(pd.concat(labels, ignore_index=True), len(prompts), left_out)


def order(first: float, second: float) -> float:
    """1 where the first of two scores is larger, 0 where the second is, 0.5 where they differ by rounding alone."""
    if abs(first - second) <= TIE * max(abs(first), abs(second)):
        return 0.5
    return float(first > second)


def _read(paths: Sequence[Path], by: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """A row an image with a column for each of the scores, nan where it has none; and the scores' versions."""
    frames: list[pd.DataFrame] = []
    for path in paths:
        if path.suffix not in READERS:
            raise InvdpoError(f"{path} must end in {', '.join(READERS)}, as `invdpo score` writes it.")
        try:
            frame: Any = READERS[path.suffix](path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InvdpoError(f"{path} cannot be read: {error}. Score the images again.") from error
        if missing := [name for name in COLUMNS if name not in frame]:
            raise InvdpoError(f"{path} lacks the columns {', '.join(missing)}; files of `invdpo score` have them.")
        if frame["image"].isna().any():
            raise InvdpoError(f"{path} names no files: rank needs the scores of a folder of images, not of a parquet.")
        frames.append(frame)
    rows: Any = pd.concat(frames, ignore_index=True)
    for name in by:
        if name not in set(rows["scorer"]):
            raise InvdpoError(
                f"--by {name}: no image has this score in {some(list(map(str, paths)))}."
                f"{nearest(name, set(rows['scorer']))}"
            )
    rows = rows[rows["scorer"].isin(list(by))]
    twice = rows[rows.duplicated(["image", "scorer"])]
    if len(twice):
        raise InvdpoError(f"{twice['image'].iloc[0]} has the score {twice['scorer'].iloc[0]} twice. Keep one of them.")
    kinds = rows.groupby("scorer")["scorer_version"].unique()
    if mixed := [name for name in by if len(kinds[name]) > 1]:
        raise InvdpoError(f"{mixed[0]} is of several versions: {', '.join(kinds[mixed[0]])}. Score all images by one.")
    told = ["image", "image_sha256", "method", "prompt"]
    wide: Any = rows.pivot(index=told, columns="scorer", values="score").reset_index()
    if len(changed := wide[wide.duplicated("image")]):
        raise InvdpoError(f"{changed['image'].iloc[0]} was scored as two different images, or with two prompts.")
    # In the order of the files' rows: prompts as they come, and the images of each.
    numbers = {image: number for number, image in enumerate(dict.fromkeys(rows["image"]))}
    wide = wide.sort_values("image", key=lambda images: images.map(numbers), ignore_index=True)
    return wide.assign(prompt_id=pd.factorize(wide["prompt"])[0]), {name: str(kinds[name][0]) for name in by}


def _complete(table: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, int]:
    """The images of prompts that have all scores and two images or more; how many prompts are left out."""
    prompts = table["prompt_id"].to_numpy()
    has = np.isfinite(table[list(by)].to_numpy(np.float64))
    counts = np.bincount(prompts)
    scored = np.stack([np.bincount(prompts, weights=column) for column in has.T], axis=1)  # (prompts, scores)
    partly = (scored > 0) & (scored < counts[:, None])
    if len(places := np.argwhere(partly[prompts] & ~has)):
        names = [f"{table['image'].iloc[row]} ({by[column]})" for row, column in places]
        raise InvdpoError(
            f"{len(names)} scores are missing of images whose prompt has them for others: {some(names)}. Score them."
        )
    usable = (scored > 0).all(axis=1) & (counts > 1)
    left_out = int((~usable).sum())
    if not usable.any():
        raise InvdpoError(
            f"None of the {left_out} prompts has two images and all of {', '.join(by)}, so there is no pair to rank."
        )
    if left_out:
        log.warning(
            f"{left_out} of {len(usable)} prompts are left out: they lack one of {', '.join(by)}, or a second image"
        )
    return table.loc[usable[prompts]].reset_index(drop=True), left_out


def _pairs(group: pd.DataFrame, by: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """All pairs of the images of one prompt, a row each."""
    rows = group.to_dict(orient="records")
    files = [_content(folder / str(row["image"]), str(row["image_sha256"])) for row in rows]
    count = len(rows) * (len(rows) - 1) // 2
    for i, j in combinations(range(len(rows)), 2):
        first, second = rows[i], rows[j]
        label = order(first["reward"], second["reward"])
        yield {
            "are_different": first["image_sha256"] != second["image_sha256"],
            "best_image_uid": "tie" if label == 0.5 else str((first if label else second)["image"]),
            "caption": first["prompt"],
            "has_label": True,
            "image_0_uid": first["image"],
            "image_1_uid": second["image"],
            "jpg_0": files[i],
            "jpg_1": files[j],
            "label_0": label,
            "label_1": 1 - label,
            "model_0": first["method"],
            "model_1": second["method"],
            "num_example_per_prompt": count,
            "reward_0": first["reward"],
            "reward_1": second["reward"],
            **{f"{LABEL_COLUMN}{name}": order(first[name], second[name]) for name in by},
            f"{LABEL_COLUMN}{FIXED}": label if (i, j) == (0, 1) else 0.5,
        }


def _content(path: Path, digest: str) -> bytes:
    """An image file's bytes; InvdpoError where its pixels are not those that were scored."""
    try:
        content = path.read_bytes()
        found = picture_hash(open_picture(content)[0])
    except Exception as error:  # Pillow raises many kinds; all mean the same to the reader
        raise InvdpoError(f"{path} cannot be read ({why(error)}). Restore the image that was scored.") from error
    if found != digest:
        raise InvdpoError(f"{path} is not the image that was scored: its pixels differ. Score the folder again.")
    return content


class _Writer:
    """A parquet file that grows by row groups, with facts about all of it in its metadata."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        # No time and no commit: the file's hash decides whether runs are trained again.
        self.path, self.metadata = path, {"ranked": json.dumps(facts, sort_keys=True)}
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        """A row group."""
        table = pa.Table.from_pylist(rows)
        if self.writer is None:
            schema = table.schema.with_metadata(self.metadata)
            # By default a dictionary of more than 1 MiB is given up, and each image then stored in each of its pairs.
            self.writer = pq.ParquetWriter(self.path, schema, compression="zstd", dictionary_pagesize_limit=2**30)
        self.writer.write_table(table.cast(self.writer.schema), row_group_size=len(rows))

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()


def _counted(labels: pd.DataFrame, prompts: int, left_out: int) -> Ranked:
    mean = labels["label_0"].to_numpy()
    found = {}
    for name in labels:
        own = labels[name].to_numpy()
        both = (own != 0.5) & (mean != 0.5)
        agreeing = float((own[both] == mean[both]).mean()) if both.any() else float("nan")
        found[str(name)] = (int((own != 0.5).sum()), agreeing)
    return Ranked(prompts, len(labels), found, left_out)
