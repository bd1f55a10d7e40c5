"""Where the results of a study are, and how to open each."""

from __future__ import annotations

import json
from pathlib import Path

from invdpo.config import StudyConfig


def places(study: StudyConfig) -> str:
    """A line for every part of the results that there is by now."""
    root, name = study.root, study.study
    parts = {
        "report.html": "open it in a browser: verdicts, curves, tables, pictures",
        "tables": "csv, md, tex",
        "figures": "pdf, png",
        "claims.md": "the verdicts; claims.json is the same for programs",
        "mlflow.db": f'make mlflow STUDY={name}, then http://127.0.0.1:5000 and "Model training"',
        "snakemake_report.html": "the graph, run times and code of every job, for a browser",
    }
    lines = [f"  {root / part}: {words}" for part, words in parts.items() if (root / part).exists()]
    if not lines:
        return f"\n{name} has no results yet: make reproduce STUDY={name}"
    snakemake = root / "snakemake_report.html"
    if not snakemake.exists():
        lines.append(f"  {snakemake}: make report STUDY={name} writes it; Snakemake's own report")
    if saved := _saved(root):
        lines.append(saved)
    return "\n".join([f"\nResults of {name}:", *lines])


def _saved(root: Path) -> str | None:
    """What sharing inversions saved the runs that are there; None where none was found in the cache."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in root.glob("runs/*/seed*/run.json")]
    savings = [run["trajectory_cache"] for run in runs if "trajectory_cache" in run]
    found, asked, evals, seconds = (
        sum(saving[key] for saving in savings) for key in ("found", "asked", "unet_evals", "seconds")
    )
    if not found:
        return None
    spent = sum(run["unet_evals"] for run in runs)
    return (
        f"  {root / 'trajectories'}: {found:,} of {asked:,} inversions were found here, which saved {evals:,} UNet "
        f"evaluations ({evals / spent:.0%} of all training) and {seconds:,.0f} s; may be deleted"
    )
