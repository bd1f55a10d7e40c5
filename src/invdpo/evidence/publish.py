"""Put a finished study where readers find it: results/reference/, paper_figures/ and the README's verdict table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.claims import summary
from invdpo.evidence.ledger import read_verdicts
from invdpo.evidence.load import load_run
from invdpo.evidence.printing import write_text
from invdpo.files import replace_when_done, write_json
from invdpo.provenance import sha256_file

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"
MAX_SCORES_BYTES = 5_000_000
# Tables and figures that every study writes -> what they show of it.
SHOWN_FOR = {
    **dict.fromkeys(("table1", "composition", "win_rates", "fig3", "fig_s7", "fig_s8", "fig_oracle"), "comparison"),
    "table2": "distribution",
    "over_optimisation": "over_optimisation",
    "to_target": "to_target",
    "table3": "inversion_steps",
    "inversion_steps": "inversion_steps",
    "table_s5": "q_vs_p",
    "controls": "controls",
    **dict.fromkeys(("fig1", "fig4", "fig5", "fig_s6", "fig_s10"), "grids"),
}


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


def figures_folder(repository: Path, study: str, judged: bool) -> Path:
    """Where a study's figures and tables are put for readers; judged: whether it is a study with claims."""
    return repository / "paper_figures" / ("" if judged else study)


def _shown(study: StudyConfig, folder: Path) -> list[Path]:
    """The tables or figures in a folder of results, without those that the study has nothing to put into."""
    experiments = study.experiments
    empty = {name for name, experiment in SHOWN_FOR.items() if not getattr(experiments, experiment)}
    return [path for path in sorted(folder.iterdir()) if path.stem not in empty]


def publish(study: StudyConfig, repository: Path = Path(".")) -> list[Path]:
    """Copy tables, figures, claims, costs, scores and the experiments' csv files to results/reference/<study>/, and
    figures and tables to paper_figures/. Returns the files written below the reference folder.

    The study that judges the claims is the one that readers meet first: its figures and tables lie in paper_figures/
    itself, and its verdicts go into README.md. Any other study has paper_figures/<study>/. Tables and figures of
    experiments that the study has not are left out. What an earlier publication of the study left is replaced.
    InvdpoError names what is not made yet.
    """
    root = study.root
    readme = repository / "README.md"
    verdicts = ("claims.json", "claims.md") if study.claims else ()
    missing = [str(root / name) for name in ("tables", "figures", *verdicts) if not (root / name).exists()]
    if missing:
        raise InvdpoError(f"Not made yet: {', '.join(missing)}. Run the study first (`make reproduce`).")
    text = None
    if study.claims:
        if not readme.exists():
            raise InvdpoError(f"{readme}: no such file. Publish from the folder that holds README.md.")
        block = summary(read_verdicts(root / "claims.json"))
        text = replace_block(readme.read_text(encoding="utf-8"), block, str(readme))

    reference = repository / "results" / "reference" / study.study
    with replace_when_done(reference) as folder:
        folder.mkdir(parents=True)
        for name in ("tables", "figures"):
            (folder / name).mkdir()
            for path in _shown(study, root / name):
                shutil.copy(path, folder / name / path.name)
        for name in (*verdicts, "costs.json", "distribution.csv"):
            if (root / name).exists():
                shutil.copy(root / name, folder / name)
        for path in sorted(root.glob("experiments/*/*.csv")):
            copy = folder / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
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

    figures = figures_folder(repository, study.study, judged=text is not None)
    with replace_when_done(figures) as folder:
        folder.mkdir(parents=True)
        for other in filter(Path.is_dir, figures.glob("*")):  # of other studies
            shutil.copytree(other, folder / other.name)
        for name in ("figures", "tables"):
            for path in _shown(study, root / name):
                shutil.copy(path, folder / path.name)
    if text is not None:
        write_text(readme, text)
    return sorted(path for path in reference.rglob("*") if path.is_file())
