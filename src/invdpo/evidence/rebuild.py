"""Every table, figure and verdict of a published study again, from the files that were published with it.

Nothing is trained, sampled or scored: the stages of evidence read scores, logs and csv files, which lie in
results/reference/<study>/ as they do in results/<study>/ after a run, and are run here on a copy of them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdpo.config import StudyConfig, load_study
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, experiments, figures, grids, tables, votes
from invdpo.evidence.publish import MADE, PROVENANCE, shown
from invdpo.files import replace_when_done, write_json
from invdpo.provenance import lock_hash, sha256_file

REFERENCE = Path("results/reference")
MARK = "rebuilt.json"  # in a folder that this module made, and may replace
# Measured by `make bench`, and counted from people's votes: neither comes from scores.
ELSEWHERE = ("tables/speed.", "tables/user_study.")


@dataclass(frozen=True)
class Rebuilt:
    """What came of the published files: equal byte for byte, different, not made any more, or made and not published.

    study: the study with `folder`, where all of it was made, as its root.
    """

    folder: Path
    study: StudyConfig
    equal: list[str]
    different: list[str]
    not_made: list[str]
    unpublished: list[str]

    @property
    def same(self) -> bool:
        """Whether what is published is what the published scores give."""
        return not (self.different or self.not_made or self.unpublished)

    def text(self) -> str:
        """For people."""
        lines = [f"{self.folder}: {len(self.equal)} files are those of the reference run, byte for byte"]
        lines += [f"  {name}: differs from the published one" for name in self.different]
        lines += [f"  {name}: published, and not made any more" for name in self.not_made]
        lines += [f"  {name}: not published yet" for name in self.unpublished]
        return "\n".join(lines)


def read_reference(name: str, reference: Path = REFERENCE) -> dict[str, Any]:
    """provenance.json of a published study; InvdpoError names those that there are."""
    path = reference / name / PROVENANCE
    if not path.is_file():
        known = sorted(folder.parent.name for folder in reference.glob(f"*/{PROVENANCE}"))
        raise InvdpoError(
            f"{path}: no such file. Published studies: {', '.join(known) or 'none'}. "
            f"A study that has run is published by `invdpo publish --study config/{name}.yaml`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def rebuild(name: str, target: Path | None = None, reference: Path = REFERENCE) -> Rebuilt:
    """Make the evidence of a published study again in `target` (default: results/<name>_from_reference) and compare.

    Raises InvdpoError for a study that is not published or not published whole, published files that were changed
    or are missing, and a target that something else than this function made.
    """
    source, target = reference / name, target or Path("results") / f"{name}_from_reference"
    listed = read_reference(name, reference)
    files: dict[str, str] = listed["files"]
    if not listed["scores_published"]:
        raise InvdpoError(f"{source}: the scores were too large to publish. Run the study: make reproduce STUDY={name}")
    if target.exists() and not (target / MARK).is_file():
        raise InvdpoError(f"{target} exists and was not made by `invdpo rebuild`. Name another folder with `--out`.")
    outputs = [file for file in files if file.startswith(MADE) and not file.startswith(ELSEWHERE)]
    inputs = [file for file in files if file not in outputs]
    touched = [file for file in inputs if not (source / file).is_file() or sha256_file(source / file) != files[file]]
    if touched:
        raise InvdpoError(
            f"{source}: changed or missing since it was published: {', '.join(touched)}. Restore with `git checkout`."
        )
    with replace_when_done(target) as folder:
        for file in [*inputs, PROVENANCE]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)
        write_json(folder / MARK, {"study": name, "lock_hash": lock_hash()})
        study = load_study(folder / "study.json").placed(folder)
        tables.write(study)
        if study.user_study:
            votes.write(study)
        figures.write(study)
        grids.write(study)
        experiments.write(study)
        if study.claims:
            claims.write(study)
        parts = [path for part in ("tables", "figures") for path in shown(study, folder / part)]
        now = {path.relative_to(folder).as_posix() for path in parts} - set(inputs)
        now |= {file for file in MADE if (folder / file).is_file()}
        made = {file: sha256_file(folder / file) for file in sorted(now)}
    there = {file: sha256_file(source / file) for file in outputs if (source / file).is_file()}
    return Rebuilt(
        target,
        study.placed(target),
        [file for file in outputs if file in made and made[file] == there.get(file)],
        [file for file in outputs if file in made and made[file] != there.get(file)],
        [file for file in outputs if file not in made],
        [file for file in made if file not in outputs],
    )
