"""Copies of the tree in which the graph can run, and how to call Snakemake there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = [str(Path(sys.executable).parent / "snakemake")]


def environment(folder: Path) -> dict[str, str]:
    """The package is the one of that copy of the tree, not the installed one."""
    return os.environ | {"PYTHONPATH": str(folder / "src")}


def copy_tree(folder: Path) -> Path:
    """A working copy of the repository without a study's results: code and configuration copied, assets linked."""
    folder.mkdir()
    for name in ("Snakefile", "rules", "profiles", "config", "src", "user_study_app", "benchmarks", "uv.lock"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy2(source, folder / name)
    (folder / "assets").symlink_to(ROOT / "assets")
    shutil.copytree(ROOT / "results" / "reference" / "benchmarks", folder / "results" / "reference" / "benchmarks")
    return folder
