"""How far a network's weights lie from its base's, tensor by tensor, read from files without building either network.

A file in half precision differs from a base in fp32 by rounding alone. So each distance is given three times: as the
files are; with both rounded to the narrower of their two types, where rounding is the same on both sides; and as the
least that the weights can have moved before they were rounded for storing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from invdpo.backbones.released import Stored, check_same_network

# Sums over a tensor's elements, from which those over a block follow.
SUMS = ("elements", "base_square", "square", "changed", "rounded_square", "rounded_changed", "least_square", "in_fp16")
GROUPINGS = ("total", "section", "block", "kind")


def block_of(tensor: str) -> str:
    """The part of a UNet that a tensor belongs to: input, time, down 0, …, mid, up 0, …, output."""
    first, *rest = tensor.split(".")
    if first in ("down_blocks", "up_blocks"):
        return f"{first.removesuffix('_blocks')} {rest[0]}"
    return {"conv_in": "input", "time_embedding": "time", "add_embedding": "time", "mid_block": "mid"}.get(
        first, "output"
    )


def section_of(tensor: str) -> str:
    """down, mid or up; everything outside of these is `other`."""
    section = block_of(tensor).split(" ")[0]
    return section if section in ("down", "mid", "up") else "other"


def kind_of(tensor: str) -> str:
    """time (embeddings of the timestep and of sizes, also inside a block), attention (whole transformers) or conv."""
    if tensor.startswith(("time_embedding.", "add_embedding.")) or ".time_emb_proj." in tensor:
        return "time"
    return "attention" if ".attentions." in tensor else "conv"


def distances(base: Stored, weights: Stored, read: Callable[[str], Tensor] | None = None) -> pd.DataFrame:
    """A row a tensor of two networks of the same layout, in the base's order of names.

    read: gives a tensor of `weights` by its name where these are not in files. Columns: tensor, section, block, kind,
    dtype and base_dtype (as stored), rounded_to (the narrower of the two), and over the tensor's elements: their
    number, base_square (sum of the base's squares), square and max (of the differences), changed (how many differ),
    the same three after rounding both to `rounded_to`, least_square (of the differences less half a spacing of the
    stored number), in_fp16 (how many are numbers of fp16).

    Raises InvdpoError where the two differ in a name or shape.
    """
    check_same_network(weights, base)
    rows = []
    with ExitStack() as stack:
        of_base, of_weights = base.reader(stack), read or weights.reader(stack)
        for name in sorted(base.shapes):
            named = {"tensor": name, "section": section_of(name), "block": block_of(name), "kind": kind_of(name)}
            rows.append(named | _distance(of_base(name), of_weights(name)))
    return pd.DataFrame(rows)


def _distance(base: Tensor, found: Tensor) -> dict[str, Any]:
    narrow = min(base.dtype, found.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    start, end = base.float(), found.float()
    moved = end - start
    rounded = moved if base.dtype == found.dtype else found.to(narrow).float() - base.to(narrow).float()
    least = (moved.abs() - _half_spacing(end, found.dtype)).clamp(min=0)
    return {
        "dtype": str(found.dtype).removeprefix("torch."),
        "base_dtype": str(base.dtype).removeprefix("torch."),
        "rounded_to": str(narrow).removeprefix("torch."),
        "elements": base.numel(),
        "base_square": _square(start),
        "square": _square(moved),
        "max": float(moved.abs().max()),
        "changed": int(moved.count_nonzero()),
        "rounded_square": _square(rounded),
        "rounded_max": float(rounded.abs().max()),
        "rounded_changed": int(rounded.count_nonzero()),
        "least_square": _square(least),
        "in_fp16": int((end.half().float() == end).count_nonzero()),
    }


def _square(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _half_spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to a type can have moved a number that is now one of it; 0 for fp32, which is not rounded
    to.
    """
    if dtype == torch.float32:
        return torch.zeros(())
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent  # values = m 2^e with m in [1/2, 1), so their spacing is eps 2^(e - 1)
    return torch.ldexp(torch.full_like(values, info.eps / 4), exponent).clamp(min=info.tiny * info.eps / 2)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Those rows over the whole network, its sections, blocks and kinds of layer; columns grouping, group, elements,
    dtype, base_dtype, rounded_to (all that occur), rms and relative_l2 (root mean square of the differences, and their
    norm over the base's), changed (share), max, all three after rounding, least_rms and in_fp16 (share).
    """
    keyed, found = rows.assign(total="all"), []
    for grouping in GROUPINGS:
        for group in sorted(set(keyed[grouping]), key=_order):
            part = keyed.loc[keyed[grouping] == group]
            sums = {name: float(part[name].sum()) for name in SUMS}
            count, base = sums["elements"], sums["base_square"]
            row: dict[str, Any] = {"grouping": grouping, "group": group, "elements": int(count)}
            row |= {name: "+".join(sorted(set(part[name]))) for name in ("dtype", "base_dtype", "rounded_to")}
            for prefix in ("", "rounded_"):
                square = sums[f"{prefix}square"]
                row[f"{prefix}rms"] = math.sqrt(square / count)
                row[f"{prefix}relative_l2"] = math.sqrt(square / base) if base else math.nan
                row[f"{prefix}changed"] = sums[f"{prefix}changed"] / count
                row[f"{prefix}max"] = float(part[f"{prefix}max"].max())
            row |= {"least_rms": math.sqrt(sums["least_square"] / count), "in_fp16": sums["in_fp16"] / count}
            found.append(row)
    return pd.DataFrame(found)


def _order(group: str) -> tuple[int, str]:
    """Blocks in the order of a forward pass."""
    along = ("time", "input", "down", "mid", "up", "output")
    name = group.split(" ")[0]
    return (along.index(name) if name in along else len(along), group)
