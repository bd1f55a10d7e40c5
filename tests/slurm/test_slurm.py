"""The graph on a real Slurm of one node with two pretended GPUs, all of it in a temporary folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from workflow_fixture import SNAKEMAKE, copy_tree, environment

from invdpo.config import parse_study

pytestmark = pytest.mark.slurm

PATIENCE = 60  # s until a daemon answers; a busy machine is slow, not wrong
CONFIGURATION = """
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs=64 RealMemory=1000000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes=localhost MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=localhost MaxTime=INFINITE State=UP
"""
# The node promises more cores and memory than there are, so that profiles/slurm runs as it is. Slurm wants some device
# file for a GPU, and hands out its number.
GPUS = "NodeName=localhost Name=gpu File=/dev/null\nNodeName=localhost Name=gpu File=/dev/zero\n"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach the cluster."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs {', '.join(missing) or 'root'} (Debian, as root: apt install slurmctld slurmd slurm-client munge)"
        )
    if find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("needs Snakemake's executor for Slurm: uv sync --group slurm")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    text = CONFIGURATION.format(folder=folder, ports=free_ports(2), host=socket.gethostname())
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(GPUS)
    # Snakemake's job step hides SLURM_CONF from the srun that it calls.
    step = folder / "bin" / "srun"
    step.parent.mkdir()
    step.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    step.chmod(0o755)
    path = f"{step.parent}:{os.environ['PATH']}"
    reached = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
    munge = [f"--{name}={folder}/munge.{name[:4]}" for name in ("pid-file", "log-file", "seed-file")]
    daemons = [
        ["munged", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *munge],
        ["slurmctld", "-f", f"{folder}/slurm.conf"],
        ["slurmd", "-f", f"{folder}/slurm.conf", "-N", "localhost"],
    ]
    try:
        for daemon in daemons:
            subprocess.run(daemon, env=reached, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + PATIENCE
        while (
            "idle"
            not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=reached, capture_output=True, text=True).stdout
        ):
            assert time.monotonic() < give_up, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
        yield reached
    finally:
        subprocess.run(["scancel", "--user=root"], env=reached, check=False, timeout=PATIENCE)
        pids = [int(path.read_text()) for path in folder.glob("*.pid*") if path.read_text().strip()]
        for pid in sorted(pids, reverse=True):
            os.kill(pid, signal.SIGTERM)
        give_up = time.monotonic() + PATIENCE
        while any(Path("/proc", str(pid)).exists() for pid in pids):
            assert time.monotonic() < give_up, "Slurm's daemons do not end"
            time.sleep(0.1)


# Two GPUs, of which the second arm takes both; the third is stopped on its way.
ARMS = {
    "dpo": {"method": "diffusion_dpo"},
    "pair": {"method": "sft", "training": {"processes": 2}},
    "stopped": {"method": "sft", "training": {"steps": 200, "checkpoints": [1]}},
}
# Its weights are no numbers after one step.
BROKEN = {"broken": {"method": "sft", "training": {"learning_rate": 1.0e30}}}
RUNTIME = 150  # minutes: an hour, and twice three quarters of one


@dataclass(frozen=True)
class Finished:
    """A tree in which Snakemake was called, what it said, and what Slurm knows of its jobs: those of each rule and
    wildcards in the order in which they were submitted."""

    folder: Path
    status: int
    output: str
    jobs: dict[str, list[dict[str, str]]]


class Runs:
    """Calls of Snakemake on one Slurm, one after the other or side by side."""

    def __init__(self, slurm: dict[str, str], folder: Path, study: dict[str, Any]) -> None:
        self.slurm, self.folder, self.study = slurm, folder, study

    def start(self, arms: dict[str, Any], *wanted: str) -> tuple[Path, subprocess.Popen[str]]:
        """The tree and the process of a run of the study with those arms."""
        folder = copy_tree(self.folder / next(iter(arms)))
        (folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(self.study | {"arms": arms}))
        config = parse_study(self.study | {"arms": arms}, "tiny")
        planned = {
            arm: {"train_hours": 0.75, "devices": 1, "hash": config.arm(arm).hash, "runs": len(config.seeds)}
            for arm in arms
        }
        if "pair" in planned:
            planned["pair"]["hash"] = "of another pair"
        (folder / "results" / "tiny").mkdir()
        (folder / "results" / "tiny" / "plan.json").write_text(json.dumps({"arms": planned}))
        quickly = ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
        process = subprocess.Popen(
            [*SNAKEMAKE, *wanted, "--workflow-profile", "profiles/slurm", "--retries", "1", "--latency-wait", "5"]
            + ["--slurm-no-account", "--slurm-status-command", "squeue", *quickly, "--configfile", "config/tiny.yaml"],
            cwd=folder,
            env=self.slurm | {"PYTHONPATH": environment(folder)["PYTHONPATH"]},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return folder, process

    def end(self, folder: Path, process: subprocess.Popen[str]) -> Finished:
        output, _ = process.communicate()
        return Finished(folder, process.returncode, output, self.jobs(folder))

    def jobs(self, folder: Path) -> dict[str, list[dict[str, str]]]:
        """What Slurm knows of the jobs of a tree."""
        listing = subprocess.run(
            ["scontrol", "show", "job", "--oneliner"], env=self.slurm, text=True, capture_output=True, check=True
        ).stdout
        found: dict[str, list[dict[str, str]]] = {}
        for line in listing.splitlines():
            job = dict(part.split("=", 1) for part in line.split() if "=" in part)
            if job["WorkDir"] == str(folder):
                name = job["Comment"].removeprefix("rule_").replace("_wildcards_", ":")
                found.setdefault(name, []).append(job)
        return {name: sorted(jobs, key=lambda job: int(job["JobId"])) for name, jobs in found.items()}

    def cancel(self, folder: Path, name: str) -> None:
        """Let Slurm end a running job, as at its time limit: SIGTERM, and SIGKILL for what does not end."""
        (job,) = self.jobs(folder)[name]
        subprocess.run(["scancel", job["JobId"]], env=self.slurm, check=True)


@pytest.fixture(scope="module")
def finished(
    slurm: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    tiny_pairs: Path,
    tiny_prompts: Path,
) -> tuple[Finished, Finished]:
    """A study from its pairs to its tables, one of its trainings stopped on its way; and beside it one that fails."""
    study = {
        "study": "tiny",
        "base": str(tiny_base),
        "preferences": str(tiny_pairs),
        "prompts": str(tiny_prompts),
        "scorers": {"clip": {"model": "local-dir:assets/shapes/scorers/clip"}},
        "device": "auto",
        "seeds": [0],
        "training": {"steps": 4, "batch": 4, "learning_rate": 1.0e-3, "resolution": 32},
        "sampling": {"steps": 2, "batch": 2},
        "experiments": {"comparison": {"arms": ["dpo"]}},
    }
    runs = Runs(slurm, tmp_path_factory.mktemp("trees"), study)
    failing = {**study, "experiments": {}}
    whole = runs.start(ARMS, "tables")
    runs.study = failing
    other = runs.start(BROKEN, "results/tiny/runs/broken/seed0/run.json")
    state = whole[0] / "results" / "tiny" / "state" / "stopped" / "seed0"
    while whole[1].poll() is None and not list(state.glob("*/state.pt")):
        time.sleep(0.1)
    if whole[1].poll() is None:
        runs.cancel(whole[0], "train:stopped")
    return runs.end(*whole), runs.end(*other)


def test_the_study_runs_to_its_end(finished: tuple[Finished, Finished]) -> None:
    run, _ = finished
    assert run.status == 0, run.output[-6000:]
    assert (run.folder / "results" / "tiny" / "tables" / "table1.csv").read_text().count("\n") > 1
    arms = [f"{stage}:{arm}" for arm in ARMS for stage in ("train", "evaluate")]
    assert run.jobs.keys() == {"preferences", "tables", *arms}
    profile = yaml.safe_load((run.folder / "profiles" / "slurm" / "config.yaml").read_text())
    limits = {"train:dpo": RUNTIME, "train:stopped": RUNTIME, "train:pair": 2880}
    for name, (job, *_) in run.jobs.items():
        wanted = profile["default-resources"] | profile["set-resources"].get(name.partition(":")[0], {})
        wanted |= {"runtime": limits[name]} if name in limits else {}
        memory = re.search(r"mem=([\d.]+)([MG])", job["TRES"])
        assert memory and float(memory[1]) * {"M": 1, "G": 1024}[memory[2]] == wanted["mem_mb"], name
        hours, minutes = divmod(wanted["runtime"], 60)
        days, hours = divmod(hours, 24)
        assert job["TimeLimit"] == (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:00", name
        assert job["Partition"] == wanted["slurm_partition"], name
        assert job["Requeue"] == "1", name


def test_a_job_of_two_processes_sees_its_two_gpus(finished: tuple[Finished, Finished]) -> None:
    run, _ = finished
    (job,) = run.jobs["train:pair"]
    assert job["TresPerJob"] == "gres:gpu:2" and job["NumTasks"] == "1"
    assert leased(run.folder, "train", "pair") == ["0", "1"]
    made = json.loads((run.folder / "results" / "tiny" / "runs" / "pair" / "seed0" / "run.json").read_text())
    assert made["processes"] == 2


def test_a_job_that_slurm_ends_goes_on_where_it_was(finished: tuple[Finished, Finished]) -> None:
    run, _ = finished
    states = [job["JobState"] for job in run.jobs["train:stopped"]]
    assert states == ["CANCELLED", "COMPLETED"]
    resumed = re.search(r"resuming after step (\d+) of 200", log_of(run.folder, "train", "stopped"))
    assert resumed and 0 < int(resumed[1]) < 200


def test_a_failing_job_is_noticed(finished: tuple[Finished, Finished]) -> None:
    _, run = finished
    assert run.status == 1
    assert [job["JobState"] for job in run.jobs["train:broken"]] == ["FAILED"] * 2, "once more, and no more"
    assert not (run.folder / "results" / "tiny" / "runs" / "broken" / "seed0" / "run.json").exists()
    assert "broken/seed0: the " in run.output, "the job's own words reach the user"


def log_of(folder: Path, stage: str, arm: str) -> str:
    return (folder / "logs" / "tiny" / stage / f"{arm}.log").read_text()


def leased(folder: Path, stage: str, arm: str) -> list[str]:
    """The GPUs that the arm's job leased last, which are all that it was shown."""
    text = log_of(folder, stage, arm)
    found = re.search(r"^leased GPU ([\d, ]+) of ([\d, ]+)$", text, re.MULTILINE)
    assert found and found[1] == found[2], text
    return found[1].split(", ")


def test_jobs_never_share_a_gpu(finished: tuple[Finished, Finished]) -> None:
    """More jobs than GPUs, of two Snakemakes: none at a time on the same, and both are used."""
    spans = []
    for run in finished:
        for name, jobs in run.jobs.items():
            stage, _, arm = name.partition(":")
            if stage in ("train", "evaluate"):
                job = jobs[-1]
                times = [datetime.fromisoformat(job[key]) for key in ("StartTime", "EndTime")]
                devices = leased(run.folder, stage, arm)
                assert job["TresPerJob"] == f"gres:gpu:{len(devices)}"
                spans += [(device, *times) for device in devices]
    spans.sort()
    assert len(spans) > 7 and {device for device, *_ in spans} == {"0", "1"}
    for (device, _, ended), (following, began, _) in zip(spans, spans[1:], strict=False):
        assert device != following or ended <= began
