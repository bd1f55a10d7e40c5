"""In which order runs go through the pairs: a function of the seed, the step and the number of pairs alone.

So a run that is stopped and resumed, or split into other micro-batches, sees exactly the same data, and what it will
see is known before any of it is fetched.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded from the hash of its key."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pair_order(seed: int, step: int, batch: int, pairs: int) -> list[int]:
    """The `batch` pairs of optimizer step `step` (from 1): consecutive entries of one permutation an
    epoch.
    """
    first = (step - 1) * batch
    places = (divmod(position, pairs) for position in range(first, first + batch))
    return [int(_permutation(seed, epoch, pairs)[place]) for epoch, place in places]


def drawn(seed: int, count: int, pairs: int) -> Tensor:
    """Which of `pairs` pairs the first `count` entries of a seed's order name, ascending: (min(count, pairs),) int64.

    A step's pairs are consecutive entries of one order, so these are the pairs of all steps that make up `count`.
    """
    return torch.arange(pairs) if count >= pairs else _permutation(seed, 0, pairs)[:count].sort().values


@lru_cache(maxsize=2)  # a step meets one epoch, or the end of one and the start of the next
def _permutation(seed: int, epoch: int, pairs: int) -> Tensor:
    return torch.randperm(pairs, generator=generator(seed, epoch, "order"))
