"""The graph on a real Slurm of one node with two pretended GPUs, all of it in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from workflow_fixture import SNAKEMAKE, copy_tree, environment

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
PartitionName=gpus Nodes=localhost Default=YES MaxTime=INFINITE State=UP
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


ARMS = {
    "sft": {"method": "sft"},
    "dpo": {"method": "diffusion_dpo"},
    # Its weights are no numbers after one step.
    "broken": {"method": "sft", "training": {"learning_rate": 1.0e30}},
}


@pytest.fixture(scope="module")
def finished(
    slurm: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    tiny_pairs: Path,
    tiny_prompts: Path,
) -> tuple[Path, subprocess.CompletedProcess[str], str]:
    """The tree in which a tiny study has run to its end, what Snakemake said, and what Slurm knows of its jobs."""
    folder = copy_tree(tmp_path_factory.mktemp("tree") / "tree")
    study = {
        "study": "tiny",
        "base": str(tiny_base),
        "preferences": str(tiny_pairs),
        "prompts": str(tiny_prompts),
        "scorers": {},
        "device": "auto",
        "seeds": [0],
        "training": {"steps": 4, "batch": 4, "learning_rate": 1.0e-3, "resolution": 32},
        "sampling": {"steps": 2, "batch": 2},
        "arms": {"base": {"method": "no_training"}} | ARMS,
    }
    (folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(study))
    wanted = [f"results/tiny/runs/{arm}/seed0/run.json" for arm in ARMS]
    status = ["--slurm-no-account", "--slurm-status-command", "squeue"]
    quickly = ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
    done = subprocess.run(
        [*SNAKEMAKE, *wanted, "--workflow-profile", "profiles/slurm", *status, *quickly, "--latency-wait", "5"]
        + ["--configfile", "config/tiny.yaml"],
        cwd=folder,
        env=slurm | {"PYTHONPATH": environment(folder)["PYTHONPATH"]},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    jobs = subprocess.run(["scontrol", "show", "job", "--oneliner"], env=slurm, text=True, capture_output=True)
    return folder, done, jobs.stdout


def jobs_of(listing: str) -> dict[str, dict[str, str]]:
    """Rule and wildcards -> what Slurm says of that job."""
    jobs = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in listing.splitlines()]
    return {job["Comment"].removeprefix("rule_").replace("_wildcards_", ":"): job for job in jobs}


def test_the_study_runs_to_its_end(finished: tuple[Path, subprocess.CompletedProcess[str], str]) -> None:
    folder, done, listing = finished
    for arm in ("sft", "dpo"):
        assert (folder / "results" / "tiny" / "runs" / arm / "seed0" / "run.json").is_file(), done.stdout[-6000:]
    jobs = jobs_of(listing)
    assert jobs.keys() == {"preferences", *(f"train:{arm}" for arm in ARMS)}
    profile = yaml.safe_load((folder / "profiles" / "slurm" / "config.yaml").read_text())
    for name, job in jobs.items():
        wanted = profile["set-resources"].get(name.partition(":")[0], profile["default-resources"])
        memory = re.search(r"mem=([\d.]+)([MG])", job["TRES"])
        assert memory and float(memory[1]) * {"M": 1, "G": 1024}[memory[2]] == wanted["mem_mb"], name
        hours, minutes = divmod(wanted["runtime"], 60)
        days, hours = divmod(hours, 24)
        assert job["TimeLimit"] == (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:00"


def test_a_failing_job_is_noticed(finished: tuple[Path, subprocess.CompletedProcess[str], str]) -> None:
    folder, done, listing = finished
    assert done.returncode == 1
    assert jobs_of(listing)["train:broken"]["JobState"] == "FAILED"
    assert not (folder / "results" / "tiny" / "runs" / "broken" / "seed0" / "run.json").exists()
    assert "broken/seed0: the " in done.stdout, "the job's own words reach the user"


def test_jobs_never_share_a_gpu(finished: tuple[Path, subprocess.CompletedProcess[str], str]) -> None:
    """Three trainings and two GPUs: each is told one device, no two at a time the same, and both are used."""
    folder, _, listing = finished
    jobs, spans = jobs_of(listing), []
    for arm in ARMS:
        job = jobs[f"train:{arm}"]
        assert job["TresPerJob"] == "gres:gpu:1"
        text = (folder / "logs" / "tiny" / "train" / f"{arm}.log").read_text()
        found = re.search(r"^leased GPU (\d) of (\d)$", text, re.MULTILINE)
        assert found and found[1] == found[2], text
        spans.append((found[1], *(datetime.fromisoformat(job[key]) for key in ("StartTime", "EndTime"))))
    spans.sort()
    assert {device for device, *_ in spans} == {"0", "1"}
    for (device, _, ended), (following, began, _) in zip(spans, spans[1:], strict=False):
        assert device != following or ended <= began
