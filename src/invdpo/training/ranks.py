"""The processes that train one run together, one a GPU: who starts them, what part of a step is whose, what they sum.

A process is told its place by torchrun's variables (RANK, WORLD_SIZE, …), which `launch` sets as `torchrun` and
`accelerate launch` do; Hugging Face accelerate joins the processes and picks each one's GPU.

Not DistributedDataParallel: it sums in hooks of every backward pass, and a step here makes many (one a network call),
some of whose gradients are scaled afterwards (`objectives.streaming`). Each process accumulates its own, and one sum a
step makes them the whole batch's. The released script goes around its own DDP wrapper, so that its processes never
exchange a gradient and their weights part (train_ddim.py:1225-1230). Where weights are sharded, FSDP does sum in hooks:
`training.shards`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from invdpo.device import is_out_of_memory
from invdpo.errors import InvdpoError

log = logging.getLogger("invdpo")

Value = TypeVar("Value")
BUCKET = 2**25  # gradient elements summed at once: 128 MiB in fp32, what the sum takes beside the gradients
# The others wait in a sum while the first writes a checkpoint. One that dies is noticed by its launcher, not by this.
TIMEOUT = timedelta(hours=1)
LOST = 75  # exit status of a process that stops only because another one did (EX_TEMPFAIL of sysexits.h)
STOPPED = 130  # exit status of `invdpo` after a clean stop
GRACE = 5.0  # seconds that the others get to end by themselves when one has died
# What `accelerate launch` tells programs that leave the distribution of a model to accelerate.
NOT_LEFT_TO_ACCELERATE = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
SAID_BY_THE_STUDY = {"ACCELERATE_MIXED_PRECISION": "precision", "ACCELERATE_DYNAMO_BACKEND": "training.compile"}
LAUNCHED = "INVDPO_LAUNCHED"  # set where the standard input is a pipe that closes when the launcher dies


@dataclass(frozen=True)
class Ranks:
    """A process's number among `size` that train together, and what they do together; alone, all of it costs nothing.

    A sum or exchange that cannot complete, because another process is gone, ends this process with status LOST: what
    there is to say, the one that died has said, and files are whole or absent at any moment.
    """

    number: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files, as the first one does."""
        return self.number == 0

    def share(self, batch: int) -> range:
        """The positions in a step's batch that are this process's: disjoint, contiguous, equally many for each."""
        each = batch // self.size
        return range(self.number * each, (self.number + 1) * each)

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in all of them. All must be of one dtype."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with others_alive():
                torch.distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by number."""
        if self.size == 1:
            return [value]
        found: list[Value | None] = [None] * self.size
        with others_alive():
            torch.distributed.all_gather_object(found, value)
        return found  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """This process's place among those that were started together, and the device that is its own.

    Raises InvdpoError where accelerate is asked for what would be ignored, where there are too few GPUs, or where the
    others cannot be reached.
    """
    for name in NOT_LEFT_TO_ACCELERATE:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise InvdpoError(
                f"{name}={os.environ[name]}: `invdpo train` leaves to accelerate only to join the processes, so this "
                "would be ignored. Start it without (`accelerate launch` sets it by an option, or from the file of "
                "`accelerate config`), and set `training.shard: true` for FSDP."
            )
    for name, setting in SAID_BY_THE_STUDY.items():
        if (value := os.environ.get(name, "no")).lower() != "no":
            raise InvdpoError(
                f"{name}={value}: this would be ignored, for the study says it (`{setting}`). Set it there, and start "
                "`invdpo train` without (an option of `accelerate launch`, or the file of `accelerate config`)."
            )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    from accelerate import PartialState

    if LAUNCHED in os.environ:
        threading.Thread(target=_follow_launcher, daemon=True).start()
    check_devices(device, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
    try:
        state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InvdpoError(
            f"Rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} could not join the others ({error}). Check "
            "MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE and let `training.processes` start the ranks."
        ) from error
    return Ranks(state.process_index, state.num_processes), state.device or device


def check_devices(device: torch.device, processes: int) -> None:
    """Raises InvdpoError unless each of `processes` processes of this machine can have a GPU of its own."""
    if device.type != "cuda":
        return
    if device.index is not None:
        raise InvdpoError(
            f"`device: {device}` names one GPU, but {processes} processes train together, each on its own. Set "
            "`device: cuda`, and CUDA_VISIBLE_DEVICES to choose among the GPUs."
        )
    if processes > (visible := torch.cuda.device_count()):
        raise InvdpoError(
            f"{processes} processes are to train together, each on a GPU of its own, but {visible} can be seen here. "
            f"Set `training.processes` to at most {visible}, or let the job see more (CUDA_VISIBLE_DEVICES, and "
            "`--resources gpu=N` of Snakemake)."
        )


def launch(processes: int, command: Sequence[str]) -> None:
    """Run a command once a rank on this machine, until all have succeeded. For the main thread.

    SIGINT and SIGTERM are passed on to the ranks, which are in sessions of their own so that a Ctrl-C of the terminal
    does not reach them twice. (torch's elastic agent has one limit for a stop and for a failure: too short for the
    step that a clean stop completes, or too long where the others hang.)

    Raises InvdpoError naming the rank that failed, once the others have ended, and KeyboardInterrupt after a stop.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHED: "1",
    }
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(processes):
            place = {"RANK": str(number), "LOCAL_RANK": str(number)}
            environment = os.environ | together | place
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        failed = _first_failure(ranks)
    finally:
        _end(ranks)
        for number, previous in before.items():
            signal.signal(number, previous)
    if failed is None:
        return
    number, code = failed
    if code == STOPPED or -code in asked:  # the latter where it had not yet come to its first step
        raise KeyboardInterrupt
    if code < 0:
        killed = signal.Signals(-code).name
        hint = " (the system does that when memory runs out)" if killed == "SIGKILL" else ""
        how = f"was killed by {killed}{hint}"
    else:
        how = f"failed with status {code}; its own message is above"
    raise InvdpoError(
        f"Rank {number} of {processes} {how}. The others were stopped; the same command goes on from the last state."
    )


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Number and status of the rank that failed, as soon as one has; None when all have succeeded.

    NCCL's watchdog aborts the ranks that lost one: of several, one that ended otherwise is the cause.
    """
    while True:
        codes = [rank.poll() for rank in ranks]
        ended = {number: code for number, code in enumerate(codes) if code}
        own = {number: code for number, code in ended.items() if code not in (LOST, STOPPED)}
        causes = {number: code for number, code in own.items() if code != -signal.SIGABRT}
        if own or None not in codes:
            return next(iter((causes or own or ended).items()), None)
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Give the ranks that still run a moment, then kill them: one whose GPU waits for a dead one hears no signal."""
    limit = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
        assert rank.stdin is not None
        rank.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _follow_launcher() -> None:
    """End this process when its launcher is gone, which a signal to the launcher alone cannot tell it."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(LOST)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of at most BUCKET elements together, or one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(other.numel() for other in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def others_alive() -> Iterator[None]:
    """End this process with status LOST where an exchange with the others fails."""
    try:
        yield
    except RuntimeError as error:
        # Where networks are sharded, their calls are exchanges: every other error is their own.
        if is_out_of_memory(error) or (not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error)):
            raise
        log.warning(f"another process of this run is gone ({' '.join(str(error).split())[:200]})")
        sys.stderr.flush()
        os._exit(LOST)
