"""What `make reproduce` takes on a clean clone: time, memory, disk, and the same command once more.

`python benchmarks/reproduce.py shapes smoke` clones the commit that is checked out and runs the command there with
nothing of this shell's environment but PATH and HOME, so that the first run also makes the environment. Packages come
from the machine's own cache or registry, whichever it has. Memory is the largest sum of resident pages over all
processes of the command, sampled every second, in which pages that processes share are counted once for each.
Not a test: no number can fail here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from measure import write_report

from invdpo.provenance import git_commit, git_dirty, lock_hash

OUT = Path("results/benchmarks/reproduce.json")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(session: int) -> int:
    """Bytes that the processes of a session hold, shared pages counted once for each."""
    held = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            held += int(stat.with_name("statm").read_text().split()[1]) * PAGE if int(fields[3]) == session else 0
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return held


def watched(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command in a session of its own; its seconds, those of its CPUs, and its peak memory in GiB.

    Raises SystemExit with the end of its output where it fails.
    """
    environment = {name: os.environ[name] for name in ("PATH", "HOME")}
    before, began, peak = os.times(), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(1):
                peak = max(peak, resident(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        code = process.wait()
        taken, after = time.perf_counter() - began, os.times()
        done.set()
        sampler.join()
        if code:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{output.read()[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": taken, "cpu_seconds": cpu, "peak_gib": peak / 2**30}


def size(folder: Path) -> float:
    """GB of a folder's files, a file with several names counted once."""
    return 1024 * int(subprocess.run(["du", "-sk", folder], check=True, capture_output=True).stdout.split()[0]) / 1e9


def measured(clone: Path, study: str) -> dict[str, Any]:
    command = ["make", "reproduce", f"STUDY={study}"]
    first = watched(command, clone)
    again = watched(command, clone)
    return first | {"seconds_again": again["seconds"], "results_gb": size(clone / "results" / study)}


def main(
    studies: Annotated[list[str], typer.Argument(help="config/<study>.yaml; the first run makes the environment too")],
    out: Annotated[Path, typer.Option(help="where the report goes, with md and csv beside it")] = OUT,
    folder: Annotated[
        Path | None,
        typer.Option(help="a new folder for the clone, which stays. Default: a temporary one", show_default=False),
    ] = None,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        clone = folder or Path(temporary, "clone")
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        load = os.getloadavg()[0]
        found = {study: measured(clone, study) for study in studies}
        environment = size(clone / ".venv")
    cores = len(os.sched_getaffinity(0))
    report = {
        "cores": cores,
        "load_before": load,
        "environment_gb": environment,
        "studies": found,
        "git_commit": git_commit(),
        "git_dirty": git_dirty(),
        "lock_hash": lock_hash(),
    }
    table = pd.DataFrame([{"study": study, **row} for study, row in found.items()])
    text = f"""# make reproduce on a clean clone

{cores} cores; load before {load:.1f}; the environment takes {environment:.1f} GB. Made by
`python benchmarks/reproduce.py`, whose docstring says what is measured; the first study's time includes making the
environment.

| Study | Minutes | CPU minutes | Again, seconds | Peak memory, GiB | Results, GB |
| --- | --- | --- | --- | --- | --- |
"""
    for study, row in found.items():
        text += f"| {study} | {row['seconds'] / 60:.1f} | {row['cpu_seconds'] / 60:.1f} | {row['seconds_again']:.1f} | "
        text += f"{row['peak_gib']:.1f} | {row['results_gb']:.2f} |\n"
    write_report(report, text, table, f"{cores} cores", out)


if __name__ == "__main__":
    typer.run(main)
