"""The machine that work is planned for: one that is named, or this one, with what it has free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdpo.errors import InvdpoError
from invdpo.lease import devices, installed

GB = 1e9
# Share of a GPU's rated products that training reaches: the goal of this project's own benchmark is 0.5 of the measured
# rate; published SDXL-sized training on A100s lies near 0.4.
EFFICIENCY = 0.4
# One core of a CPU, fp32: the shapes study on the AMD EPYC of the reference run, 1,500 UNet evaluations a second.
CORE_TFLOPS = 0.03
CPU_HOURS = 100  # of all cores, beyond which a CPU's hours are no plan
SLICES = 7  # of a GPU that can be cut up (MIG), in whose profile's name the first number is how many a part has
STAND_IN = "A100 80GB"  # for a machine without GPUs that would take longer


@dataclass(frozen=True)
class Machine:
    """kind: gpu or cpu. tflops, fp32_tflops: of one device at full rate, in half precision and in fp32 (on a GPU by its
    TF32 units). memory: GB of one device. ram: GB of this machine's memory; None where another machine is planned
    for."""

    name: str
    kind: str
    devices: int
    tflops: float
    fp32_tflops: float
    memory: float
    ram: float | None
    efficiency: float

    @property
    def unit(self) -> str:
        """What one device is called."""
        return "GPU" if self.kind == "gpu" else "core"


def machine_for(
    known: dict[str, Any],
    cpu_only: bool,
    gpu: str | None,
    gpu_memory: float | None,
    gpus: int | None,
    flops: float,
) -> tuple[Machine, list[str]]:
    """The machine that is named, or this one; an A100 stands in for a machine without GPUs that would take for ever.
    And what is wrong with it, a sentence each.

    known: the GPUs of config/sizes.yaml. flops: of the whole work. Raises InvdpoError for a GPU that is not known.
    """
    here = None if cpu_only else this_gpu()
    name = gpu or (here[0] if here else None)
    problems = []
    if name is None and gpu_memory is None:
        cores = len(os.sched_getaffinity(0))
        hours = flops / (cores * CORE_TFLOPS * 1e12) / 3600
        if hours < CPU_HOURS:
            memory = installed_memory()
            return Machine("this machine's CPU", "cpu", cores, CORE_TFLOPS, CORE_TFLOPS, memory, memory, 1.0), []
        why = "The study says `device: cpu`, and this machine's" if cpu_only else "This machine has no GPU, and its"
        problems.append(
            f"{why} {cores} CPU cores would take {hours / 24:,.0f} days: the study does not "
            f"fit it. What follows is for {STAND_IN} GPUs; --gpu NAME, --gpu-memory GB and --gpus N plan for others."
        )
    name = name or STAND_IN
    entry = next((entry for key, entry in known.items() if _is_called(key, name)), None)
    if entry is None:
        if gpu is not None:
            raise InvdpoError(f"--gpu {gpu}: not known. Known are {', '.join(known)}; add it to config/sizes.yaml.")
        entry = known[STAND_IN]
        problems.append(
            f"The speed of {name} is not known: an {STAND_IN}'s is used. Add it to config/sizes.yaml, or give "
            "--throughput."
        )
    own = here if gpu is None else None
    part = re.search(r"MIG (\d)", name)
    share = int(part[1]) / SLICES if part else 1.0
    found = Machine(
        name=name,
        kind="gpu",
        devices=gpus or (len(devices()) if own else 1),
        tflops=share * entry["tflops"],
        fp32_tflops=share * entry["fp32"],
        memory=gpu_memory or (own[1] if own else entry["memory"]),
        ram=installed_memory() if own else None,
        efficiency=EFFICIENCY,
    )
    return found, problems


def _is_called(key: str, name: str) -> bool:
    """Whether a GPU of that name is the one that config/sizes.yaml knows as `key`: A100 is no RTX A1000."""
    known, words = (re.findall(r"[a-z0-9]+", text.lower()) for text in (key, name))
    return set(known) <= set(words) or "".join(known) == "".join(words)


def this_gpu() -> tuple[str, float] | None:
    """Name and GB of the smallest of this machine's visible GPUs, for a study may get any; None where there is none."""
    known, memory = installed(), _memory()
    uuids = [known.get(name) or next((uuid for uuid in memory if uuid.startswith(name)), name) for name in devices()]
    return min((memory[uuid] for uuid in uuids if uuid in memory), key=lambda found: found[1], default=None)


def _memory() -> dict[str, tuple[str, float]]:
    """UUID -> name and GB of every GPU and every part of one (MIG), by nvidia-smi; of a part by its profile's name."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    listing, totals = (
        subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True, check=False).stdout
        for asked in (["-L"], query)
    )
    mebibytes = (float(line.rpartition(",")[2]) for line in totals.splitlines())
    found: dict[str, tuple[str, float]] = {}
    whole = ""
    for name, part, uuid in re.findall(
        r"^(?:GPU \d+: (.+?)|\s+(MIG \S+)\s.*?) *\(UUID: ([^)\s]+)\)", listing, re.MULTILINE
    ):
        if name:
            whole = name
            found[uuid] = name, next(mebibytes) * 2**20 / GB
        else:
            gigabytes = re.search(r"(\d+)gb", part)
            found[uuid] = f"{whole} {part}", float(gigabytes[1]) if gigabytes else 0.0
    return found


def installed_memory() -> float:
    """GB of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB


@dataclass(frozen=True)
class Disk:
    """Where GB are `needed`, and how many are `free`. device: equal for folders that share a disk."""

    name: str
    needed: float
    free: float
    device: int


def disk_at(name: str, folder: Path, needed: float) -> Disk:
    """The disk under a folder, which need not be there yet."""
    here = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return Disk(name, needed, shutil.disk_usage(here).free / GB, here.stat().st_dev)


def held(folder: Path) -> float:
    """GB of the files in a folder, one with several names counted once; 0 where there is none."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values()) / GB
