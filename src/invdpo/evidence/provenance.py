"""Where a study's tables, figures and verdicts come from: the runs and scores that they are made of, by their stamps.

Every run record, score file and experiment has a stamp of its own (`invdpo.provenance.stamp`). What is made of many of
them says here what all of theirs say. It has nothing of the moment at which it was made, neither time nor commit, so
that the same results give the same bytes again; the commit that the published ones were made at is in the published
study's provenance.json. How long the runs took, which no two runs share, is in costs.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.evidence.load import load_run, read_provenance
from invdpo.files import write_json

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

FILE = "provenance.json"  # beside a study's tables, and beside its figures
# field of a stamp -> its name where the values of many stand together
MANY = {
    "git_commit": "git_commits",
    "lock_hash": "lock_hashes",
    "device": "devices",
    "dtype": "dtypes",
    "python": "python",
}


def study_hash(study: StudyConfig) -> str:
    """16 hex digits of a study's settings, whatever the order of its keys.

    Settings left at their defaults do not count, so that one which comes later changes no hash.
    """
    content = study.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def study_provenance(study: StudyConfig) -> dict[str, Any]:
    """What the evidence of a study rests on, as JSON has it.

    config_hash, seeds: the study's. arms: arm -> hash of the configuration that its runs had. training, scoring: of the
    run records and of the score files that there are, how many, the commits, locks, machines, precisions and libraries
    that occur, and the UNet evaluations of all. stamps: files below the study's folder that say the same of what it
    measured beside scores.
    """
    places = [(arm, seed) for arm in study.arms for seed in study.seeds]
    found = {place: load_run(study.root / "runs" / place[0] / f"seed{place[1]}") for place in places}
    records = {place: record for place, record in found.items() if record is not None}
    scores = [study.root / "scores" / arm / f"seed{seed}.parquet" for arm, seed in places]
    distribution = ["distribution.json"] if study.experiments.distribution else []
    return {
        "study": study.study,
        "config_hash": study_hash(study),
        "seeds": study.seeds,
        "arms": {arm: record["config_hash"] for (arm, _), record in records.items()},
        "training": _together(list(records.values())),
        "scoring": _together([read_provenance(path) for path in scores if path.is_file()]),
        "stamps": [*distribution, *(f"experiments/{name}/provenance.json" for name in study.experiments.measured)],
    }


def write_provenance(study: StudyConfig, part: str) -> Path:
    """Write root/part/provenance.json, what the files in that folder rest on; its path."""
    path = study.root / part / FILE
    write_json(path, study_provenance(study))
    return path


def figure_metadata(study: StudyConfig, name: str) -> dict[str, dict[str, str | None]]:
    """What a figure's pdf and png say of themselves: which figure of which study and configuration, and no dates."""
    title, subject = f"{name} of the study {study.study}", f"configuration {study_hash(study)}"
    return {
        "pdf": {"Title": title, "Subject": subject, "CreationDate": None, "ModDate": None},
        "png": {"Title": title, "Description": subject, "Software": None},
    }


def _together(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What many stamps say: how many they are, every value that occurs, and the sum of their UNet evaluations."""
    libraries = sorted({name for stamp in stamps for name in stamp["versions"]})
    return {
        "files": len(stamps),
        **{many: sorted({stamp[field] for stamp in stamps} - {None}) for field, many in MANY.items()},
        "git_dirty": any(stamp["git_dirty"] for stamp in stamps),
        "versions": {name: sorted({stamp["versions"][name] for stamp in stamps}) for name in libraries},
        "unet_evals": sum(stamp["unet_evals"] for stamp in stamps),
    }
