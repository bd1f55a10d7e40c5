"""The published LaTeX tables compile."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TABLES = sorted(Path("paper_figures").rglob("*.tex"))
PROGRAM = shutil.which("pdflatex")


@pytest.mark.skipif(PROGRAM is None, reason="needs pdflatex and booktabs (Debian: texlive-latex-recommended)")
def test_every_table_compiles_with_what_it_says_it_needs(tmp_path: Path) -> None:
    """One document of all of them, each on pages of its own size: a table may be wider than paper."""
    assert len(TABLES) > 10
    texts = [path.read_text(encoding="utf-8") for path in TABLES]
    packages = {name for text in texts for name in re.findall(r"\\usepackage\{(\w+)\}", text)}
    head = [r"\documentclass{article}", r"\usepackage[utf8]{inputenc}", r"\pdfpagewidth=60in", r"\textwidth=58in"]
    head += [f"\\usepackage{{{name}}}" for name in sorted(packages)]
    body = [r"\begin{document}", *(f"{text}\n\\clearpage" for text in texts), r"\end{document}"]
    (tmp_path / "tables.tex").write_text("\n".join([*head, *body]), encoding="utf-8")
    done = subprocess.run(
        [str(PROGRAM), "-halt-on-error", "-interaction=nonstopmode", "tables.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    pages = re.search(r"Output written on tables.pdf \((\d+) pages", done.stdout)
    assert pages and int(pages[1]) >= len(TABLES)
    assert "Missing character" not in done.stdout + (tmp_path / "tables.log").read_text(errors="replace")
