"""Seconds from published scores to tables, figures and verdicts, to a report on the screen, and to runs in MLflow.

`python benchmarks/evidence.py` runs the commands of a reader: `invdpo rebuild` into an empty folder (as `make tables`
does), `invdpo mlflow` on what it made into a new database, and Chromium on the report that it wrote. Seconds of the
commands are of the whole process, imports included. A page is interactive once its curves are drawn and a click on a
kind of verdict has hidden the others; each load has a browser profile of its own. Not a test: no number can fail.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from playwright.sync_api import Browser, expect, sync_playwright

from invdpo.errors import InvdpoError
from invdpo.evidence.printing import write_text
from invdpo.provenance import REPOSITORY, stamp, write_json

RESULTS = Path("results/reference/benchmarks")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PATIENCE = 120_000  # ms
# What this study set itself as limits.
REBUILD_SECONDS, PAGE_MB, PAGE_SECONDS, MLFLOW_SECONDS = 120, 15, 2, 60


def invdpo(*arguments: str, cwd: Path, allowed: tuple[int, ...] = (0,)) -> tuple[float, int]:
    """Seconds and exit code of one command, which runs with as many threads as it chooses.

    InvdpoError with its messages where the code is not one of those allowed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "invdpo.cli", *arguments], cwd=cwd, check=False, capture_output=True, text=True
    )
    taken = time.perf_counter() - began
    if done.returncode not in allowed:
        raise InvdpoError(f"`invdpo {' '.join(arguments)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return taken, done.returncode


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; InvdpoError where it is not installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise InvdpoError("needs Chromium (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def interactive(browser: Browser, page: Path, size: dict[str, int]) -> float:
    """Seconds from the navigation to the first click that was answered."""
    context = browser.new_context(viewport={"width": size["width"], "height": size["height"]})
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    began = time.perf_counter()
    tab.goto(page.resolve().as_uri(), wait_until="commit")
    tab.locator("#plot svg").wait_for()
    filters = tab.locator("[data-filter]")
    if filters.count():  # a study without claims has none
        filters.last.click()
        expect(filters.last).to_have_attribute("aria-pressed", "true", timeout=PATIENCE)
    taken = time.perf_counter() - began
    context.close()
    return taken


def measure(study: str, loads: int) -> dict[str, Any]:
    """Everything, in a temporary folder that looks like the repository's after a run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = folder / "results" / study
        for name in ("assets", "config"):
            (folder / name).symlink_to(REPOSITORY / name)
        # Code 1 says that what is published differs from what was made; that is not this benchmark's question.
        rebuild, code = invdpo("rebuild", study, "--out", str(root), cwd=REPOSITORY, allowed=(0, 1))
        mlflow, _ = invdpo("mlflow", "--study", str(root / "study.json"), cwd=folder)
        again, _ = invdpo("mlflow", "--study", str(root / "study.json"), cwd=folder)
        page = root / "report.html"
        with chromium() as browser:
            interactive(browser, page, SIZES["desktop"])  # the program itself is read from disk once
            shown = {name: [interactive(browser, page, size) for _ in range(loads)] for name, size in SIZES.items()}
        return {
            "rebuild_seconds": rebuild,
            "as_published": code == 0,
            "page_bytes": page.stat().st_size,
            "interactive_seconds": shown,
            "mlflow_seconds": mlflow,
            "mlflow_again_seconds": again,
            "mlflow_bytes": (root / "mlflow.db").stat().st_size,
        }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    found, options = report["measured"], report["options"]
    rows = [
        (
            "`invdpo rebuild`: tables, figures, verdicts, report",
            f"{found['rebuild_seconds']:.0f} s",
            REBUILD_SECONDS,
            "s",
        ),
        ("report page", f"{found['page_bytes'] / 1e6:.2f} MB", PAGE_MB, "MB"),
    ]
    for name, seconds in found["interactive_seconds"].items():
        text = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        width = SIZES[name]["width"]
        rows.append((f"report interactive, {name} ({width} pixels wide)", text, PAGE_SECONDS, "s"))
    rows += [
        ("`invdpo mlflow`: into a new database", f"{found['mlflow_seconds']:.0f} s", MLFLOW_SECONDS, "s"),
        ("`invdpo mlflow`: again, nothing changed", f"{found['mlflow_again_seconds']:.0f} s", MLFLOW_SECONDS, "s"),
    ]
    same = "as published, byte for byte" if found["as_published"] else "not as published: see `invdpo rebuild`"
    lines = [
        f"# Evidence of {options['study']}: {report['device']}, {options['cores']} cores",
        "",
        "Made by `python benchmarks/evidence.py`, whose head says what is measured; load before "
        f"{options['load']:.1f}. Page loads: median and range of {options['loads']}, with Chromium. What was rebuilt "
        f"is {same}.",
        "",
        "| what | measured | at most |",
        "|---|--:|--:|",
        *(f"| {what} | {text} | {limit} {unit} |" for what, text, limit, unit in rows),
    ]
    return "\n".join(lines) + "\n"


def main(
    study: Annotated[str, typer.Option(help="A published study, a folder of results/reference/.")] = "shapes",
    loads: Annotated[int, typer.Option(min=1, help="Page loads of each size.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="JSON. Default: results/reference/benchmarks/evidence-<n>-cores.json")
    ] = None,
) -> None:
    """Measure, and write a JSON file and a markdown table."""
    started = time.time()
    cores = len(os.sched_getaffinity(0))
    options = {"study": study, "loads": loads, "cores": cores, "load": os.getloadavg()[0]}
    found = measure(study, loads)
    device = torch.device("cpu")
    report = {**stamp(None, device=device, started=started), "options": options, "measured": found}
    path = out or RESULTS / f"evidence-{cores}-cores.json"
    write_json(path, report)
    write_text(path.with_suffix(".md"), markdown(report))
    print(f"{markdown(report)}\nwritten to {path}, and as a table to {path.with_suffix('.md')}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InvdpoError as error:
        sys.exit(f"error: {error}")
