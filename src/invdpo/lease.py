"""GPUs for a process of its own: jobs on one machine never share a device.

A lease is a lock (flock) on a file a GPU. The kernel drops it when the last process that has that file open is gone,
however it went, so a killed job leaves nothing behind to clean up. A scheduler's CUDA_VISIBLE_DEVICES is respected:
leases are taken within it. Nothing here asks CUDA, which reads its variables once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from invdpo.errors import InvdpoError

log = logging.getLogger("invdpo")

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
HOLDER = "INVDPO_GPU_HOLDER"  # process id, told to the processes that a holder starts
# All jobs of a machine must meet here; schedulers give each job a TMPDIR of its own.
FOLDER = Path("/tmp/invdpo-gpus")
POLL_SECONDS = 0.5

_descriptors: list[int] = []  # of this process's leases, open until it ends


def installed() -> dict[str, str]:
    """Index -> name of every GPU of this machine: its UUID where nvidia-smi is there to say it, else its index.

    A GPU that is cut up (MIG) counts as its parts, which are what CUDA sees.
    """
    if shutil.which("nvidia-smi") is None:
        numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
        return {str(index): str(index) for index in range(len(numbers))}
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    names: list[str] = []
    for kind, name in re.findall(r"^(GPU|\s+MIG) .*UUID: ([^)\s]+)\)", listing, re.MULTILINE):
        if kind != "GPU" and names and names[-1].startswith("GPU-"):
            names.pop()
        names.append(name)
    return {str(index): name for index, name in enumerate(names)}


def devices() -> list[str]:
    """The GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES; all of the machine's where it is unset."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return list(installed().values())
    names: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-"):  # CUDA itself ends the list at the first name that is none
            break
        names.append(name)
    return names


def lease(device: str, count: int = 1, folder: Path = FOLDER) -> list[str]:
    """Keep `count` GPUs for this process until it ends, waiting for them where others hold them; returns their names.

    device: as a study has it. `cpu` takes none, and neither does `auto` where there is none; `cuda:N` keeps that one
    of the visible GPUs. Otherwise CUDA_VISIBLE_DEVICES becomes the leased ones, so call this before CUDA is used. A
    process that was started by a holder shares the holder's lease, and keeps it if the holder dies first.

    Raises InvdpoError where fewer GPUs are visible than `count`.
    """
    names = _usable(device)
    if not names or count == 0:
        return []
    if _descriptors or _holder_lives():
        return names if _descriptors else _join(names, folder)
    chosen = names
    if ":" in device:
        index = int(device.partition(":")[2])
        if index >= len(names):
            raise InvdpoError(
                f"`device: {device}`: there is no such GPU, the visible ones are {', '.join(names)} (numbered from 0). "
                f"Set `device: cuda`, or change {VISIBLE}."
            )
        chosen, count = [names[index]], 1
    if count > len(names):
        raise InvdpoError(
            f"{count} GPUs are needed, and {len(names)} are visible ({', '.join(names)}). Use fewer processes, or ask "
            f"the scheduler for more; {VISIBLE} may hide some."
        )
    taken = _wait(chosen, count, folder)
    if ":" not in device:
        os.environ[VISIBLE] = ",".join(taken)
    os.environ[HOLDER] = str(os.getpid())
    log.debug(f"leased GPU {', '.join(taken)} of {', '.join(names)}")
    return taken


def lease_as_rank(device: str, folder: Path = FOLDER) -> list[str]:
    """The same for one of the processes that torchrun or `accelerate launch` started together, of which each takes the
    visible GPU of its number on this machine; returns the names of what it keeps.

    The first leases the GPUs of all, at once or none, and the others wait for it and hold nothing meanwhile. If each
    leased its own, two jobs could hold one each and wait for the other's for ever. That is so within a machine: of jobs
    over several, a scheduler has to see to it.

    Raises InvdpoError where fewer GPUs are visible than there are processes, or MASTER_PORT is another job's.
    """
    names = _usable(device)
    if not names:
        return []
    if _descriptors or _holder_lives():
        return names if _descriptors else _join(names, folder)
    number = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if processes > len(names):
        raise InvdpoError(
            f"{processes} processes need a GPU each, and {len(names)} are visible ({', '.join(names)}). Start fewer "
            f"processes, or ask the scheduler for more GPUs; {VISIBLE} may hide some."
        )
    # A socket without a file: the kernel forgets its name with the process. What the processes of a job have in common,
    # and no other job of the machine can have, is where they meet to train.
    port = os.environ.get("MASTER_PORT")
    meeting = f"\0invdpo-gpus-{port}-{os.environ.get('MASTER_ADDR')}"[:100]
    if number > 0:
        while not _answers(meeting):
            time.sleep(POLL_SECONDS)
        return _join([names[number]], folder)
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(meeting)
        except OSError as error:
            raise InvdpoError(
                f"Another job of this machine meets at MASTER_PORT {port}. Give this one a port of its own (`torchrun "
                "--standalone`, or --master_port), or wait until that one has ended."
            ) from error
        taken = _wait(names[:processes], processes, folder)
        listener.listen(processes)  # only now does it answer; nobody needs to accept
        _descriptors.append(listener.detach())
    os.environ[HOLDER] = str(os.getpid())
    log.debug(f"leased GPU {', '.join(taken)} of {', '.join(names)} for {processes} processes")
    return taken


def _usable(device: str) -> list[str]:
    """The visible GPUs where a study's `device` may use any. CUDA is made to count them as nvidia-smi does, by their
    place on the bus and not the fastest first, or a lease of number 0 would be another card's; but for a set order."""
    names = devices() if device == "auto" or device.startswith("cuda") else []
    if names:
        os.environ.setdefault(ORDER, "PCI_BUS_ID")
    return names


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as caller:
        return caller.connect_ex(address) == 0


def _wait(names: list[str], count: int, folder: Path) -> list[str]:
    """Lease `count` of the GPUs, all at once or none, so that two jobs never wait for each other's half."""
    began, told = time.monotonic(), ""
    while True:
        files = {name: _file(name, folder) for name in names}
        found = {}
        for name, path in files.items():
            descriptor = _take(path) if len(found) < count else None
            if descriptor is not None:
                found[name] = descriptor
        if len(found) == count:
            _descriptors.extend(found.values())
            if told:
                log.info(f"GPU {', '.join(found)} is free after {time.monotonic() - began:.0f} s")
            return list(found)
        for descriptor in found.values():
            os.close(descriptor)
        # The kernel tells a container nothing of processes outside it.
        held = {name: ", ".join(map(str, _holders(path))) for name, path in files.items() if name not in found}
        by = {name: f"process {pids}" if pids else "one unseen here" for name, pids in held.items()}
        words = "; ".join(f"{name} by {who}" for name, who in by.items())
        if words != told:
            log.info(f"waiting for {count} of {len(names)} GPUs, leased to other jobs: {words}")
            told = words
        time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))


def _take(path: Path) -> int | None:
    """A descriptor that alone holds the lease of a GPU's file; None where somebody has it.

    Taken alone and then made shared, so that only the holder's own processes can join.
    """
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Not atomic: another may be faster, who then has it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.set_inheritable(descriptor, True)
    return descriptor


def _join(names: list[str], folder: Path) -> list[str]:
    """Share the lease of the process that started this one."""
    for name in names:
        descriptor = _open(_file(name, folder))
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _descriptors.append(descriptor)
    return names


def _holder_lives() -> bool:
    holder = os.environ.get(HOLDER)
    return holder is not None and Path("/proc", holder).is_dir()


def _file(name: str, folder: Path) -> Path:
    """The lock file of a GPU: one, whether it is called by index, UUID or the beginning of its UUID."""
    known = installed()
    uuid = known.get(name) or next((found for found in known.values() if found.startswith(name)), name)
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', uuid)}.lock"


def _open(path: Path) -> int:
    """The file, made where it is missing, for every user of the machine."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # then its owner has done it
            path.parent.chmod(0o1777)
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)


def _holders(path: Path) -> list[int]:
    """The processes that hold a GPU's file, as far as the kernel shows them here."""
    inode = path.stat().st_ino
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            found.add(int(fields[4]))
    return sorted(found)
