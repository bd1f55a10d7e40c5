"""GPU leases, with names in the place of GPUs: locks are taken, and nothing asks CUDA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from invdpo import lease as module
from invdpo.errors import InvdpoError
from invdpo.lease import devices, lease

# Leases, notes when it had what, and holds it: arguments are folder, log, device, count, seconds.
HOLDER = """
import json, logging, os, sys, time
from pathlib import Path
from invdpo.lease import lease
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, log, device, count, seconds = sys.argv[1:6]
names = lease(device, int(count), Path(folder))
began = time.monotonic()
print(json.dumps({"names": names, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}), flush=True)
time.sleep(float(seconds))
with open(log, "a") as file:
    file.write(json.dumps({"names": names, "began": began, "ended": time.monotonic()}) + "\\n")
"""


class Machine:
    """A machine of named GPUs that holders are started on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "leases", folder / "log.jsonl"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, gpus: str, seconds: float = 60, count: int = 1, device: str = "auto") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self.folder), str(self.log), device, str(count), str(seconds)],
            env=os.environ | {module.VISIBLE: gpus},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.running.append(process)
        return process

    def took(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What a holder says once it has its lease."""
        assert process.stdout is not None
        return json.loads(process.stdout.readline())

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    for process in found.running:
        process.kill()
        process.communicate()


def test_more_jobs_than_gpus_never_share_one(machine: Machine) -> None:
    jobs = [machine.start("a,b", seconds=0.3) for _ in range(6)]
    assert [job.wait(60) for job in jobs] == [0] * 6
    spans = sorted((tuple(row["names"]), row["began"], row["ended"]) for row in machine.history())
    assert len(spans) == 6 and {names for names, *_ in spans} == {("a",), ("b",)}
    for (names, _, ended), (next_names, began, _) in zip(spans, spans[1:], strict=False):
        assert names != next_names or ended <= began


def test_a_killed_holder_frees_its_gpu_at_once_and_waiting_says_for_whom(machine: Machine) -> None:
    first = machine.start("only")
    assert machine.took(first) == {"names": ["only"], "visible": "only"}
    second = machine.start("only", seconds=0)
    assert second.stderr is not None
    said = second.stderr.readline()
    assert said.strip() == f"waiting for 1 of 1 GPUs, leased to other jobs: only by process {first.pid}"
    began = time.monotonic()
    os.kill(first.pid, signal.SIGKILL)
    assert machine.took(second)["names"] == ["only"]
    assert time.monotonic() - began < 4 * module.POLL_SECONDS


def test_a_schedulers_choice_is_leased_within(machine: Machine) -> None:
    jobs = [machine.start("3,5"), machine.start("3,5")]
    assert {machine.took(job)["visible"] for job in jobs} == {"3", "5"}
    both = machine.start("3,5,7,8", count=2)
    assert machine.took(both)["visible"] == "7,8"


def test_several_gpus_are_taken_together_or_not_at_all(machine: Machine) -> None:
    pairs = machine.start("a,b,c", count=2)
    assert machine.took(pairs)["names"] == ["a", "b"]
    waiting = machine.start("a,b,c", seconds=0, count=2)
    assert waiting.stderr is not None and "waiting for 2 of 3 GPUs" in waiting.stderr.readline()
    alone = machine.start("a,b,c", seconds=0)
    assert machine.took(alone)["names"] == ["c"], "a job that waits for two keeps none"
    pairs.kill()
    assert len(machine.took(waiting)["names"]) == 2


def test_processes_of_a_holder_share_its_lease_and_keep_it(machine: Machine, tmp_path: Path) -> None:
    """What a holder starts does not wait for its parent, and its GPU stays taken while it runs."""
    parent = f"""
import subprocess, sys
from pathlib import Path
from invdpo.lease import lease
lease("cuda", 1, Path({str(machine.folder)!r}))
child = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, {str(machine.folder)!r}, "{tmp_path}/x", "cuda", "1", "60"])
print(child.pid, flush=True)
child.wait()
"""
    environment = os.environ | {module.VISIBLE: "only"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment, text=True, stdout=subprocess.PIPE)
    machine.running.append(process)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert machine.took(process)["names"] == ["only"]
        process.kill()
        process.wait()
        waiting = machine.start("only", seconds=0)
        assert waiting.stderr is not None
        assert f"only by process {child}" in waiting.stderr.readline()
    finally:
        os.kill(child, signal.SIGKILL)
    assert machine.took(waiting)["names"] == ["only"]


def test_no_gpu_no_lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    monkeypatch.setenv(module.VISIBLE, "a")
    assert lease("cpu", 1, folder) == [] and lease("auto", 0, folder) == []
    monkeypatch.setenv(module.VISIBLE, "")
    assert lease("auto", 1, folder) == []
    monkeypatch.delenv(module.VISIBLE)
    monkeypatch.setattr(module, "installed", dict)
    assert lease("auto", 1, folder) == []
    assert not folder.exists() and module.VISIBLE not in os.environ


def test_a_named_gpu_is_that_one(machine: Machine) -> None:
    assert machine.took(machine.start("a,b", device="cuda:1")) == {"names": ["b"], "visible": "a,b"}
    assert machine.took(machine.start("a,b"))["names"] == ["a"]


def test_too_few_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(module.VISIBLE, "a,b")
    with pytest.raises(InvdpoError, match=r"3 GPUs are needed, and 2 are visible \(a, b\)"):
        lease("cuda", 3, tmp_path)
    with pytest.raises(InvdpoError, match="`device: cuda:2`: there is no such GPU"):
        lease("cuda:2", 1, tmp_path)


LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-cccc-3)
  MIG 3g.40gb     Device  1: (UUID: MIG-dddd-4)
"""


def test_gpus_are_known_by_uuid_and_parts_replace_a_cut_up_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(module.VISIBLE, raising=False)
    assert devices() == ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4"]
    names = {module._file(name, tmp_path) for name in ("0", "GPU-aaaa-1", "GPU-aa")}
    assert len(names) == 1, "one file however the GPU is called"


def test_visible_gpus_end_where_cuda_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, names in {"3, 5": ["3", "5"], "0,-1,2": ["0"], "": [], "-1": []}.items():
        monkeypatch.setenv(module.VISIBLE, given)
        assert devices() == names
