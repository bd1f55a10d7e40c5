"""Put a finished study where readers find it: results/reference/, paper_figures/ and the README's verdict table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.claims import read_verdicts, summary
from invdpo.evidence.load import load_run
from invdpo.evidence.tables import write_text
from invdpo.files import replace_when_done, write_json
from invdpo.provenance import sha256_file

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"
MAX_SCORES_BYTES = 5_000_000


def replace_block(text: str, block: str, where: str) -> str:
    """`text` with what stands between the two verdict marks replaced; InvdpoError unless each mark is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InvdpoError(f"{where}: needs the lines `{BEGIN}` and `{END}`, once each and in this order.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"


def _pack_scores(source: Path, target: Path) -> list[Path]:
    """Score files as zstd parquet if all of them fit MAX_SCORES_BYTES, otherwise none; the files written."""
    written = []
    for path in sorted(source.glob("*/seed*.parquet")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.read_parquet(path)
        for column in frame.columns.difference(["score", "step", "seed"]):
            frame[column] = frame[column].astype("category")
        frame.to_parquet(copy, compression="zstd", compression_level=9, index=False)
        written.append(copy)
        if sum(file.stat().st_size for file in written) > MAX_SCORES_BYTES:
            shutil.rmtree(target)
            return []
    return written


def publish(study: StudyConfig, repository: Path = Path(".")) -> list[Path]:
    """Copy tables, figures, claims, costs and scores to results/reference/<study>/, figures and tables to
    paper_figures/, and the verdicts into README.md. Returns the files written below the reference folder.

    What an earlier publication left in those two places is replaced. InvdpoError names what is not made yet.
    """
    root = study.root
    readme = repository / "README.md"
    missing = [
        str(root / name) for name in ("tables", "figures", "claims.json", "claims.md") if not (root / name).exists()
    ]
    if missing:
        raise InvdpoError(f"Not made yet: {', '.join(missing)}. Run the study first (`make reproduce`).")
    if not readme.exists():
        raise InvdpoError(f"{readme}: no such file. Publish from the folder that holds README.md.")
    verdicts = summary(read_verdicts(root / "claims.json"))
    text = replace_block(readme.read_text(encoding="utf-8"), verdicts, str(readme))

    reference = repository / "results" / "reference" / study.study
    with replace_when_done(reference) as folder:
        folder.mkdir(parents=True)
        for name in ("tables", "figures"):
            shutil.copytree(root / name, folder / name)
        for name in ("claims.json", "claims.md", "costs.json"):
            if (root / name).exists():
                shutil.copy(root / name, folder / name)
        scores = _pack_scores(root / "scores", folder / "scores")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        runs: dict[str, dict[str, object]] = {}
        for arm in study.arms:
            for seed in study.seeds:
                record = load_run(root / "runs" / arm / f"seed{seed}")
                if record is not None:
                    runs.setdefault(arm, {})[f"seed{seed}"] = record
        content = {
            "study": study.study,
            "scores_published": bool(scores),
            "files": {str(path.relative_to(folder)): sha256_file(path) for path in files},
            "runs": runs,
        }
        write_json(folder / "provenance.json", content)

    with replace_when_done(repository / "paper_figures") as folder:
        folder.mkdir(parents=True)
        for name in ("figures", "tables"):
            for path in sorted((root / name).iterdir()):
                shutil.copy(path, folder / path.name)
    write_text(readme, text)
    return sorted(path for path in reference.rglob("*") if path.is_file())
