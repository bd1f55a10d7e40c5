"""Put a finished study where readers find it: results/reference/, paper_figures/ and the README's verdict table."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from invdpo.config import dump_study
from invdpo.errors import InvdpoError
from invdpo.evidence.claims import summary
from invdpo.evidence.crate import METADATA, crate
from invdpo.evidence.grids import pictured
from invdpo.evidence.ledger import read_verdicts
from invdpo.evidence.load import load_evidence
from invdpo.evidence.printing import write_text
from invdpo.files import replace_when_done, write_json
from invdpo.provenance import git_commit, git_dirty, lock_hash, sha256_file, weights_hashes

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

# Around a study's verdicts in README.md.
BEGIN, END = "<!-- verdicts of {study}: begin -->", "<!-- verdicts of {study}: end -->"
PROVENANCE = "provenance.json"
# A study of many prompts does not publish its scores: a repository is no place for gigabytes.
MAX_SCORES_BYTES = 5_000_000
# The folders and files of a study that evidence makes, and `invdpo rebuild` makes again from the rest.
MADE = ("tables", "figures", "claims.json", "claims.md", "costs.json")
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


def leading_study(readme: str) -> str | None:
    """The study whose verdicts a README shows, by the mark before them; None where there is none."""
    found = re.search(BEGIN.format(study=r"(\w+)"), readme)
    return found[1] if found else None


def verdicts_block(readme: str, study: str) -> str:
    """What stands between the study's two marks; InvdpoError unless each is there once."""
    begin, end = BEGIN.format(study=study), END.format(study=study)
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise InvdpoError(f"README.md needs the lines `{begin}` and `{end}`, once each and in this order.")
    return readme.split(begin)[1].split(end)[0]


def replace_block(readme: str, block: str, study: str) -> str:
    """The README with other verdicts of the study."""
    old = verdicts_block(readme, study)
    begin = BEGIN.format(study=study)
    return readme.replace(f"{begin}{old}", f"{begin}\n{block.strip()}\n")


def _copy(root: Path, folder: Path, paths: Iterable[Path]) -> None:
    for path in filter(Path.is_file, paths):
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _copy_images(root: Path, folder: Path, wanted: Mapping[Path, Sequence[tuple[str, str]]]) -> None:
    """Of each image file the rows of those prompts (set, id), with the file's metadata."""
    for path, prompts in wanted.items():
        table = pq.read_table(path)
        keys = zip(*(table.column(name).to_pylist() for name in ("prompt_set", "prompt_id")), strict=True)
        rows = [place for place, (name, number) in enumerate(keys) if (name, str(number)) in prompts]
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.take(rows), copy, compression="zstd")


def _weights(study: StudyConfig) -> dict[str, dict[str, str]]:
    """Run, by its path below the root -> sha256 of its last weights: of a rebuilt study, those noted when it ran."""
    listed = study.root / PROVENANCE
    if listed.is_file():
        return json.loads(listed.read_text(encoding="utf-8"))["weights"]
    found = {run: weights_hashes(study.root / run) for run in _runs(study)}
    return {run: hashes for run, hashes in found.items() if hashes}


def _runs(study: StudyConfig) -> list[str]:
    return [f"runs/{arm}/seed{seed}" for arm in study.arms for seed in study.seeds]


def figures_folder(repository: Path, study: str) -> Path:
    """Where a study's figures and tables are put for readers: apart, but for the study that README.md leads with."""
    leads = leading_study((repository / "README.md").read_text(encoding="utf-8")) == study
    return repository / "paper_figures" / ("" if leads else study)


def shown(study: StudyConfig, folder: Path) -> list[Path]:
    """The tables or figures in a folder of results, without those that the study has nothing to put into."""
    experiments = study.experiments
    empty = {name for name, experiment in SHOWN_FOR.items() if not getattr(experiments, experiment)}
    # Only a head: nothing of it was scored.
    empty |= {path.stem for path in folder.glob("*.csv") if path.read_text(encoding="utf-8").count("\n") < 2}
    return [path for path in sorted(folder.iterdir()) if path.stem not in empty]


def publish(study: StudyConfig, repository: Path = Path(".")) -> list[Path]:
    """Copy what a study found to results/reference/<study>/, and figures and tables to paper_figures/.

    Beside tables, figures, verdicts and costs, the reference folder gets all that they are made from, in the layout of
    results/<study>/ (`invdpo rebuild` makes them again from it): the resolved study, scores up to MAX_SCORES_BYTES, run
    records and training logs, the experiments' files, distances of image sets, and the images that figures show.
    provenance.json has the hash of every file, and of the weights, which are not published; ro-crate-metadata.json says
    the same in RO-Crate's terms. Returns the files written below the reference folder.

    The study whose marks README.md has is the one that readers meet first: its verdicts go between them, and its
    figures and tables lie in paper_figures/ itself. Any other study has paper_figures/<study>/. Tables and figures of
    experiments that the study has not are left out. What an earlier publication of the study left is replaced.
    InvdpoError names what is not made yet.
    """
    root = study.root
    readme = repository / "README.md"
    verdicts = ("claims.json", "claims.md") if study.claims else ()
    missing = [str(root / name) for name in ("tables", "figures", *verdicts) if not (root / name).exists()]
    if missing:
        raise InvdpoError(f"Not made yet: {', '.join(missing)}. Run the study first (`make reproduce`).")
    if not readme.exists():
        raise InvdpoError(f"{readme}: no such file. Publish from the folder that holds README.md.")
    text = readme.read_text(encoding="utf-8")
    if study.claims and leading_study(text) == study.study:
        text = replace_block(text, summary(read_verdicts(root / "claims.json")), study.study)

    reference = repository / "results" / "reference" / study.study
    with replace_when_done(reference) as folder:
        folder.mkdir(parents=True)
        for name in ("tables", "figures"):
            (folder / name).mkdir()
            for path in shown(study, root / name):
                shutil.copy(path, folder / name / path.name)
        files = [root / name for name in (*verdicts, "costs.json", "distribution.csv", "distribution.json")]
        files += [root / run / name for run in _runs(study) for name in ("run.json", "train.jsonl")]
        _copy(root, folder, [*files, *root.glob("experiments/*/*")])
        scores = sorted(root.glob("scores/*/seed*.parquet"))
        whole = sum(path.stat().st_size for path in scores) <= MAX_SCORES_BYTES
        _copy(root, folder, scores if whole else [])
        _copy_images(root, folder, pictured(load_evidence(study)))
        write_text(folder / "study.json", dump_study(study))
        evidence = {"git_commit": git_commit(), "git_dirty": git_dirty(), "lock_hash": lock_hash()}
        content = {
            "study": study.study,
            "scores_published": whole,
            "files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in _files(folder)},
            "weights": _weights(study),
            "evidence": evidence,
        }
        write_json(folder / PROVENANCE, content)
        write_json(folder / METADATA, crate(folder, study, evidence, MADE))

    figures = figures_folder(repository, study.study)
    with replace_when_done(figures) as folder:
        folder.mkdir(parents=True)
        for other in filter(Path.is_dir, figures.glob("*")):  # of other studies
            shutil.copytree(other, folder / other.name)
        for name in ("figures", "tables"):
            for path in shown(study, root / name):
                shutil.copy(path, folder / path.name)
    write_text(readme, text)
    return _files(reference)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
