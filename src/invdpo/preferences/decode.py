"""Images are decoded, resized and cropped by worker processes while the VAE encodes those before."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from invdpo.errors import InvdpoError
from invdpo.preferences.preprocess import Cutting, Square
from invdpo.preferences.reader import EncodedPair, Pair, decode_both

AHEAD = 4  # pairs a worker that are decoded ahead: 6 MB each at 1024 pixels

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class DecodedPair:
    """A pair as it is encoded and remembered, winner first. squares: None where an image cannot be decoded. pair: with
    the images as they came, where it was asked for.
    """

    row: int
    caption: str
    sha256: tuple[str, str]
    squares: tuple[Square, Square] | None
    pair: Pair | None = None


def decode(pair: EncodedPair, cutting: Cutting, whole: bool) -> DecodedPair:
    """One pair; `whole`: with its images as they came."""
    sha256 = hashlib.sha256(pair.winner).hexdigest(), hashlib.sha256(pair.loser).hexdigest()
    images = decode_both(pair.winner, pair.loser)
    if images is None:
        return DecodedPair(pair.row, pair.caption, sha256, None)
    squares = cutting.pair(pair.row, *images)
    return DecodedPair(pair.row, pair.caption, sha256, squares, pair.with_images(images) if whole else None)


def decoded(pairs: Iterable[EncodedPair], cutting: Cutting, whole: bool, workers: int) -> Iterator[DecodedPair]:
    """The pairs decoded, in their order, whatever the number of worker processes; 0: by this one.

    Only a few pairs a worker are in memory at a time. Raises InvdpoError where a worker dies.
    """
    make = partial(decode, cutting=cutting, whole=whole)
    if workers == 0:
        yield from map(make, pairs)
        return
    # A fork would copy this process with its threads and its hold on the GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _leave_interrupts_to_the_parent) as pool:
        try:
            yield from in_order(pool, make, pairs, AHEAD * workers)
        except BrokenProcessPool as error:
            raise InvdpoError(
                f"One of {workers} decoding processes died, most often because memory ran out. Lower `data.workers`; "
                "the same command goes on from the last finished part."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(pool: Executor, make: Callable[[Item], Made], items: Iterable[Item], ahead: int) -> Iterator[Made]:
    """`map` by a pool, in order, that takes at most `ahead` items more than it has given."""
    waiting: deque[Future[Made]] = deque()
    for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
