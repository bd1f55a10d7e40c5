"""Score rows: one an image and score, the same for a study's own pictures and for any folder of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from invdpo.files import replace_when_done

if TYPE_CHECKING:
    from invdpo.scorers import Scorer
    from invdpo.scorers.pictures import Pictures

# What an image row and a score row begin with.
HEAD = (
    pa.field("method", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("step", pa.int64()),
    pa.field("prompt_set", pa.string()),
    pa.field("prompt_id", pa.int64()),
    pa.field("prompt", pa.string()),
)
SCORES = pa.schema(
    [
        *HEAD,
        ("image_sha256", pa.string()),
        ("scorer", pa.string()),
        ("scorer_version", pa.string()),
        ("score", pa.float64()),
    ]
)


def picture_hash(picture: Image.Image) -> str:
    """sha256 of the decoded pixels: a picture has the same one in memory and as any lossless file."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def score_rows(
    scorers: Sequence[Scorer], heads: Sequence[dict[str, Any]], hashes: Sequence[str], pictures: Pictures
) -> list[dict[str, Any]]:
    """A row an image and score; none where the score does not exist for that prompt.

    heads: the columns before `image_sha256`, an image each. hashes: `picture_hash` of each.
    """
    rows = []
    for scorer in scorers:
        for name, values in scorer.score(pictures, [head["prompt"] for head in heads]).items():
            for head, digest, value in zip(heads, hashes, values.tolist(), strict=True):
                if not np.isnan(value):
                    row = {
                        "image_sha256": digest,
                        "scorer": name,
                        "scorer_version": scorer.version,
                        "score": value,
                    }
                    rows.append({**head, **row})
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, provenance: dict[str, Any]) -> None:
    """A parquet file, whole or not at all, with its provenance as JSON in the schema's metadata."""
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.replace_schema_metadata({"provenance": json.dumps(provenance, sort_keys=True)})
    with replace_when_done(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
