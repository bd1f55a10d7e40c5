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
from invdpo.lease import devices

GB = 1e9
# Share of a GPU's rated products that training reaches: the goal of this project's own benchmark is 0.5 of the measured
# rate; published SDXL-sized training on A100s lies near 0.4.
EFFICIENCY = 0.4
# One core of a CPU, fp32: the shapes study on the AMD EPYC of the reference run, 1,500 UNet evaluations a second.
CORE_TFLOPS = 0.03
CPU_HOURS = 100  # of all cores, beyond which a CPU's hours are no plan
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
        problems.append(
            f"This machine has no GPU, and its {cores} CPU cores would take {hours / 24:,.0f} days: the study does not "
            f"fit it. What follows is for {STAND_IN} GPUs; --gpu NAME, --gpu-memory GB and --gpus N plan for others."
        )
    name = name or STAND_IN
    entry = next((entry for key, entry in known.items() if _plain(key) in _plain(name)), None)
    if entry is None:
        if gpu is not None:
            raise InvdpoError(f"--gpu {gpu}: not known. Known are {', '.join(known)}; add it to config/sizes.yaml.")
        entry = known[STAND_IN]
        problems.append(
            f"The speed of {name} is not known: an {STAND_IN}'s is used. Add it to config/sizes.yaml, or give "
            "--throughput."
        )
    own = here if gpu is None else None
    found = Machine(
        name=name,
        kind="gpu",
        devices=gpus or (len(devices()) if own else 1),
        tflops=entry["tflops"],
        fp32_tflops=entry["fp32"],
        memory=gpu_memory or (own[1] if own else entry["memory"]),
        ram=installed_memory() if own else None,
        efficiency=EFFICIENCY,
    )
    return found, problems


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def this_gpu() -> tuple[str, float] | None:
    """Name and GB of this machine's first GPU, by nvidia-smi; None where there is none."""
    if not devices() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not lines:
        return None
    name, _, mebibytes = lines[0].rpartition(",")
    return name.strip(), float(mebibytes) * 2**20 / GB


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
