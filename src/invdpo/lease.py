"""GPUs for a process of its own: jobs on one machine never share a device.

A lease is a lock (flock) on a file a GPU. The kernel drops it when the last process that has that file open is gone,
however it went, so a killed job leaves nothing behind to clean up. A scheduler's CUDA_VISIBLE_DEVICES is respected:
leases are taken within it. Nothing here asks CUDA, which reads that variable once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

from invdpo.errors import InvdpoError

log = logging.getLogger("invdpo")

VISIBLE = "CUDA_VISIBLE_DEVICES"
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
    names = devices() if device == "auto" or device.startswith("cuda") else []
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
        held = {name: pids for name, path in files.items() if (pids := _holders(path))}
        words = "; ".join(f"{name} by process {', '.join(map(str, pids))}" for name, pids in held.items())
        if words and words != told:
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
        try:
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o1777)
        except FileExistsError:
            pass
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
