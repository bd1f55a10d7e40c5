"""The published studies' RO-Crates and the citation file, held against their own rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from evidence_fixture import make_config

from invdpo.evidence.crate import crate
from invdpo.evidence.publish import MADE
from invdpo.provenance import sha256_file

REFERENCE = Path("results/reference")
STUDIES = sorted(path.parent.name for path in REFERENCE.glob("*/provenance.json"))
VERSION = "https://w3id.org/ro/crate/1.1"
# Keys that the Citation File Format 1.2.0 knows, of those that one might write here.
TOP = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
WORK = {
    *("abstract", "authors", "conference", "date-published", "doi", "identifiers", "notes", "pages", "publisher"),
    *("repository-code", "title", "type", "url", "volume-title", "year"),
}


def references(value: Any) -> Iterator[str]:
    """Every @id that some property points at."""
    if isinstance(value, dict):
        if set(value) == {"@id"}:
            yield value["@id"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def broken(folder: Path) -> list[str]:
    """Which rules of RO-Crate 1.1, and of this study's own, a crate does not keep."""
    content = json.loads((folder / "ro-crate-metadata.json").read_text())
    entities = {entity["@id"]: entity for entity in content["@graph"]}
    wrong = [] if len(entities) == len(content["@graph"]) else ["an @id is there twice"]
    wrong += [f"{name} has no @type" for name, entity in entities.items() if "@type" not in entity]
    if content["@context"][0] != f"{VERSION}/context":
        wrong.append("the context")
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    if (descriptor["about"], descriptor["conformsTo"]) != ({"@id": "./"}, {"@id": VERSION}):
        wrong.append("the metadata descriptor")
    wrong += [f"the root lacks {key}" for key in ("name", "description", "datePublished", "license") if not root[key]]
    unknown = set(references(list(entities.values()))) - set(entities) - {VERSION}
    wrong += [f"{name} is referred to and nowhere described" for name in sorted(unknown)]
    files = {name: entity for name, entity in entities.items() if entity["@type"] == "File"}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    there.remove("ro-crate-metadata.json")
    wrong += [f"{name}: in the crate or in the folder, not in both" for name in sorted(there ^ set(files))]
    parts = {part["@id"] for part in root["hasPart"]}
    wrong += [f"{name}: no part of the root" for name in sorted(set(files) ^ parts)]
    for name in sorted(there & set(files)):
        path = folder / name
        if (files[name]["sha256"], files[name]["contentSize"]) != (sha256_file(path), str(path.stat().st_size)):
            wrong.append(f"{name}: another content")
    for action in (entity for entity in entities.values() if entity["@type"] == "CreateAction"):
        wrong += [f"{action['@id']} lacks {key}" for key in ("instrument", "result", "name") if not action[key]]
    return wrong


@pytest.mark.parametrize("study", STUDIES)
def test_a_published_study_is_a_valid_crate(study: str) -> None:
    assert broken(REFERENCE / study) == []
    content = json.loads((REFERENCE / study / "ro-crate-metadata.json").read_text())
    entities = {entity["@id"]: entity for entity in content["@graph"]}
    results = {part["@id"] for part in entities["#evidence"]["result"]}
    assert {"tables/table1.csv", "figures/fig1.png"} <= results and all(name.startswith(MADE) for name in results)
    raw = {part["@id"] for part in entities["#run"]["result"]}
    assert "scores/base/seed0.parquet" in raw and not raw & results
    runs = [json.loads(path.read_text()) for path in (REFERENCE / study / "runs").glob("*/*/run.json")]
    assert {part["@id"] for part in entities["#run"]["instrument"]} == {f"#invdpo-{run['git_commit']}" for run in runs}


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    table, metadata = tmp_path / "tables/table1.csv", tmp_path / "ro-crate-metadata.json"
    run = {"git_commit": "abc", "started": 1.7e9, "wall_seconds": 3.0, "device": "cpu", "lock_hash": "l"}
    files = {table: "a", tmp_path / "study.json": "{}", tmp_path / "runs/sft/seed0/run.json": json.dumps(run)}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    text = json.dumps(crate(tmp_path, make_config(), {"git_commit": "def"}, MADE))
    metadata.write_text(text)
    assert broken(tmp_path) == []
    entities = {entity["@id"]: entity for entity in json.loads(text)["@graph"]}
    assert entities[entities["./"]["license"]["@id"]]["name"] == "No licence stated"
    assert not list(Path().glob("LICEN[CS]E*")), "say in the crate which it is"
    metadata.write_text(text.replace('"@id": "#invdpo-def", "@type"', '"@id": "#invdpo-xyz", "@type"'))
    assert broken(tmp_path) == ["#invdpo-def is referred to and nowhere described"]
    metadata.write_text(text)
    table.write_text("b")
    assert broken(tmp_path) == ["tables/table1.csv: another content"]
    table.unlink()
    assert broken(tmp_path) == ["tables/table1.csv: in the crate or in the folder, not in both"]


def test_the_citation_names_the_software_and_the_paper() -> None:
    content = yaml.safe_load(Path("CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(content) and content["type"] == "software"
    version = next(line for line in Path("pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert f'"{content["version"]}"' in version
    # There is no release and no licence: neither is to be made up.
    assert not {"date-released", "license"} & set(content)
    paper = content["references"][0]
    assert set(content) <= TOP and set(paper) <= WORK and content["cff-version"] == "1.2.0"
    assert all(set(author) == {"name"} for author in content["authors"])
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
    assert set(paper["conference"]) == {"name"} and set(paper["identifiers"][0]) == {"type", "value"}
    assert paper["title"] == "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models"
    assert len(paper["authors"]) == 10 and "2507.11554" in paper["identifiers"][0]["value"]
