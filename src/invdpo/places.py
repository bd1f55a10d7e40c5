"""Where the results of a study are, and how to open each."""

from __future__ import annotations

from invdpo.config import StudyConfig


def places(study: StudyConfig) -> str:
    """A line for every part of the results that there is by now."""
    root, name = study.root, study.study
    parts = {
        "tables": "csv, md, tex",
        "figures": "pdf, png",
        "claims.md": "the verdicts; claims.json is the same for programs",
        "mlflow.db": f'make mlflow STUDY={name}, then http://127.0.0.1:5000 and "Model training"',
        "report.html": f"open it in a browser; make report STUDY={name} writes it",
    }
    lines = [f"  {root / part}: {words}" for part, words in parts.items() if (root / part).exists()]
    if not lines:
        return f"\n{name} has no results yet: make reproduce STUDY={name}"
    if not (root / "report.html").exists():
        lines.append(f"  {root / 'report.html'}: make report STUDY={name} writes it; open it in a browser")
    return "\n".join([f"\nResults of {name}:", *lines])
