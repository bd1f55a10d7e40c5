"""An RO-Crate of a published study: what lies in its folder, what made it, and from what, for programs.

The file ro-crate-metadata.json follows RO-Crate 1.1, and for the run the Process Run Crate profile 0.5. The workflow is
not in the crate, which is a folder of the repository that holds it: its commits name it.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.provenance import sha256_file

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

METADATA = "ro-crate-metadata.json"
CRATE = "https://w3id.org/ro/crate/1.1"
PROCESS = "https://w3id.org/ro/wfrun/process/0.5"
PAPER = "https://arxiv.org/abs/2507.11554"
# File types that Python's table lacks.
TYPES = {".parquet": "application/vnd.apache.parquet", ".jsonl": "application/x-ndjson", ".md": "text/markdown"}


def crate(folder: Path, study: StudyConfig, evidence: Mapping[str, Any], made: tuple[str, ...]) -> dict[str, Any]:
    """The content of folder/ro-crate-metadata.json: an entity a file with its hash, the software, and two actions.

    The workflow trained, sampled and scored at the runs' commits; evidence made the files that begin with one of `made`
    from that, at the commit of `evidence`.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METADATA)
    names = [path.relative_to(folder).as_posix() for path in paths]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("runs/*/*/run.json"))]
    results = [name for name in names if name.startswith(made)]
    inputs = [name for name in names if name not in (*results, "study.json")]
    started = min((record["started"] for record in records), default=0.0)
    ended = max((record["started"] + record["wall_seconds"] for record in records), default=0.0)
    commits, devices, locks = (
        sorted({str(record[key]) for record in records}) for key in ("git_commit", "device", "lock_hash")
    )
    graph = [
        {"@id": METADATA, "@type": "CreativeWork", "conformsTo": _ref(CRATE), "about": _ref("./")},
        {
            "@id": "./",
            "@type": "Dataset",
            "name": f"Reference results of the study {study.study}",
            "description": "Scores of single images, run records, training logs, tables, figures and verdicts of a "
            "reproducibility study of Inversion-DPO.",
            "datePublished": _time(ended).partition("T")[0],
            "license": _ref("#licence"),
            "conformsTo": _ref(PROCESS),
            "hasPart": [_ref(name) for name in names],
            "mentions": [_ref("#run"), _ref("#evidence")],
            "about": _ref(PAPER),
        },
        {
            "@id": "#licence",
            "@type": "CreativeWork",
            "name": "No licence stated",
            "description": "The repository that this folder is part of states no licence yet.",
        },
        {"@id": PROCESS, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"},
        {
            "@id": PAPER,
            "@type": "ScholarlyArticle",
            "name": "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models",
        },
        *(_file(folder, name) for name in names),
        *(_software(commit) for commit in sorted({*commits, str(evidence["git_commit"])})),
        {
            "@id": "#run",
            "@type": "CreateAction",
            "name": f"Training, sampling and scoring: snakemake --configfile config/{study.study}.yaml",
            "description": f"{len(records)} runs on {', '.join(devices)}; sha256 of uv.lock: {', '.join(locks)}",
            "instrument": [_ref(f"#invdpo-{commit}") for commit in commits],
            "object": _ref("study.json"),
            "result": [_ref(name) for name in inputs],
            "startTime": _time(started),
            "endTime": _time(ended),
        },
        {
            "@id": "#evidence",
            "@type": "CreateAction",
            "name": f"Tables, figures and verdicts, again by: invdpo rebuild {study.study}",
            "instrument": _ref(f"#invdpo-{evidence['git_commit']}"),
            "object": [_ref(name) for name in ["study.json", *inputs]],
            "result": [_ref(name) for name in results],
        },
    ]
    context = [f"{CRATE}/context", {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}]
    return {"@context": context, "@graph": graph}


def _ref(identity: str) -> dict[str, str]:
    return {"@id": identity}


def _file(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return {
        "@id": name,
        "@type": "File",
        "name": path.name,
        "encodingFormat": kind,
        "contentSize": str(path.stat().st_size),
        "sha256": sha256_file(path),
    }


def _software(commit: str) -> dict[str, Any]:
    return {"@id": f"#invdpo-{commit}", "@type": "SoftwareApplication", "name": "invdpo", "softwareVersion": commit}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
