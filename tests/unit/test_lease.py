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
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invdpo import cli
from invdpo import lease as module
from invdpo.errors import InvdpoError
from invdpo.lease import devices, lease, lease_as_rank

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


# A rank of a job: leases, and trains, which takes all its job's ranks. Arguments are folder, job, seconds.
RANK = """
import json, os, sys, time
from pathlib import Path
from invdpo.lease import lease_as_rank
folder, job, seconds = sys.argv[1:4]
names = lease_as_rank("auto", Path(folder))
print(json.dumps({"names": names, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}), flush=True)
Path(f"{job}.{os.environ['RANK']}").touch()
while not all(Path(f"{job}.{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.02)
time.sleep(float(seconds))
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

    def rank(self, gpus: str, job: Path, number: int, port: int, seconds: float = 0) -> subprocess.Popen[str]:
        """One of a job's two ranks, as torchrun starts it; jobs of other test runs have other ports."""
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{os.getpid()}.{port}"}
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(self.folder), str(job), str(seconds)],
            env=os.environ | {module.VISIBLE: gpus} | place,
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


def test_two_jobs_of_two_ranks_never_wait_for_each_other(machine: Machine, tmp_path: Path) -> None:
    """Started so that each has a rank here before the other's is: each would hold a GPU that the other needs."""
    first, second = tmp_path / "first", tmp_path / "second"
    early = [machine.rank("a,b", first, 0, port=1), machine.rank("a,b", second, 1, port=2)]
    found = machine.took(early[0])
    late = [machine.rank("a,b", first, 1, port=1), machine.rank("a,b", second, 0, port=2)]
    assert [rank.wait(20) for rank in (*early, *late)] == [0] * 4
    assert found == machine.took(late[1]) == {"names": ["a", "b"], "visible": "a,b"}
    assert machine.took(late[0]) == machine.took(early[1]) == {"names": ["b"], "visible": "a,b"}


def test_a_rank_that_waits_holds_nothing_and_a_killed_job_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    waiting = machine.rank("a,b", tmp_path / "job", 1, port=1, seconds=60)
    alone = machine.start("b,a")
    assert machine.took(alone)["names"] == ["b"], "nobody has it, though a rank waits for it"
    alone.kill()
    first = machine.rank("a,b", tmp_path / "job", 0, port=1, seconds=60)
    assert machine.took(first)["names"] == ["a", "b"] and machine.took(waiting)["names"] == ["b"]
    refused = machine.rank("c,d", tmp_path / "other", 0, port=1)
    assert f"Another job of this machine meets at MASTER_PORT {os.getpid()}.1." in refused.communicate()[1]
    first.kill()
    assert machine.took(machine.start("a"))["names"] == ["a"]
    again = machine.rank("a,b", tmp_path / "again", 1, port=1)
    held = machine.start("b", seconds=0)
    assert held.stderr is not None and f"b by process {waiting.pid}" in held.stderr.readline(), "it still trains"
    waiting.kill()
    assert machine.took(held)["names"] == ["b"]
    assert again.poll() is None, "the killed one's place is not taken for the job's own"


def test_ranks_without_gpus_enough_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", module.VISIBLE: "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvdpoError, match=r"2 processes need a GPU each, and 1 are visible \(a\)"):
        lease_as_rank("cuda", tmp_path / "leases")
    assert lease_as_rank("cpu", tmp_path / "leases") == []
    assert not (tmp_path / "leases").exists()


def test_a_command_leases_for_itself_or_as_one_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(module, "lease", lambda device, count: asked.append((device, count)))
    monkeypatch.setattr(module, "lease_as_rank", asked.append)
    for name, value in {"RANK": "1", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        monkeypatch.setenv(name, value)
    study: Any = SimpleNamespace(checksums=None, device="cpu")
    cli._device(study, gpus=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli._device(study, gpus=2)
    cli._device(study, gpus=0)
    assert asked == [("cpu", 2), "cpu"]


def test_a_job_that_cannot_see_who_holds_its_gpu_says_so(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container, which is shown its own processes alone."""
    machine.took(machine.start("only"))
    monkeypatch.setattr(module, "_holders", lambda path: [])

    def no_more(seconds: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(module.time, "sleep", no_more)
    with caplog.at_level("INFO", logger="invdpo"), pytest.raises(TimeoutError):
        module._wait(["only"], 1, machine.folder)
    assert caplog.messages == ["waiting for 1 of 1 GPUs, leased to other jobs: only by one unseen here"]


def test_a_folder_that_its_owner_alone_can_write_is_opened_to_all(tmp_path: Path) -> None:
    """As Docker makes one that is missing."""
    folder = tmp_path / "leases"
    folder.mkdir(mode=0o755)
    os.close(module._open(folder / "a.lock"))
    assert folder.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize("given", [None, "FASTEST_FIRST"])
def test_cuda_counts_gpus_as_the_leases_do(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it counts the fastest first, and number 0 of a mixed machine may be the lease of number 1."""
    monkeypatch.setenv(module.ORDER, given or "")  # which the lease may change
    if given is None:
        del os.environ[module.ORDER]
    monkeypatch.setattr(module, "_descriptors", held := [])
    monkeypatch.setenv(module.HOLDER, "none")  # which the lease changes
    assert lease("cuda:1", 1, tmp_path) == ["MIG-cccc-3"]
    assert os.environ[module.ORDER] == (given or "PCI_BUS_ID"), "what was set is respected"
    assert [path.name for path in tmp_path.glob("*.lock")] == ["MIG-cccc-3.lock"]
    for descriptor in held:
        os.close(descriptor)


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


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An nvidia-smi that lists those, all of them visible."""
    program = tmp_path_factory.mktemp("bin") / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(module.VISIBLE, raising=False)


@pytest.mark.usefixtures("smi")
def test_gpus_are_known_by_uuid_and_parts_replace_a_cut_up_one(tmp_path: Path) -> None:
    assert devices() == ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4"]
    names = {module._file(name, tmp_path) for name in ("0", "GPU-aaaa-1", "GPU-aa")}
    assert len(names) == 1, "one file however the GPU is called"


def test_visible_gpus_end_where_cuda_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, names in {"3, 5": ["3", "5"], "0,-1,2": ["0"], "": [], "-1": []}.items():
        monkeypatch.setenv(module.VISIBLE, given)
        assert devices() == names
