"""The whole of `invdpo world build`, one step of training and a handful of pictures each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from invdpo.provenance import verify_checksums
from invdpo.world import build, cli, corpus
from invdpo.world.card import STEPS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK", 160)
        patch.setattr(build, "CORPUS_CHUNKS", 1)
        patch.setattr(build, "PAIRS", {"train": 12, "validation": 12})
        for name in ("VAE_STEPS", "BASE_STEPS", "LAYOUT_STEPS", "CONTRASTIVE_STEPS", "AESTHETIC_STEPS"):
            patch.setattr(build, name, 1)
        patch.setattr(build, "VOTE_STEPS", {"pickscore": 1, "hps": 1})
        patch.setattr(build, "JUDGE_PAIRS", 12)
        patch.setattr(build, "PROMPTS", 4)
        patch.setattr(build, "QUALITY_RENDERS", 4)
        patch.setattr(build, "QUALITY_SAMPLES", 4)
        threads = torch.get_num_threads()
        cli.build(folder, threads)
    return folder


def test_every_step_leaves_its_files_and_facts(world: Path) -> None:
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert list((world / "base" / name).iterdir())
    facts = {path.stem: json.loads(path.read_text()) for path in (world / "build").iterdir()}
    assert set(facts) == set(STEPS)
    assert all(facts[step]["command"] == f"invdpo world {step}" for step in STEPS)
    assert {path.name for path in (world / "scorers").iterdir()} == {"aesthetic", "clip", "hps", "pickscore"}
    assert all(
        json.loads(path.read_text())["command"].startswith("invdpo world") for path in (world / "build").iterdir()
    )
    assert verify_checksums(world / "SHA256SUMS") == len(
        [path for path in world.rglob("*") if path.is_file() and path.name not in ("SHA256SUMS", "README.md")]
    )


def test_its_files_are_those_that_are_committed(world: Path) -> None:
    """The committed world was made by this code: the same files, with weights of the same names and shapes."""
    from safetensors.torch import load_file

    committed = Path("assets/shapes")
    listed = {path.relative_to(world) for path in world.rglob("*") if path.is_file()}
    assert listed == {path.relative_to(committed) for path in committed.rglob("*") if path.is_file()}
    for path in listed:
        if path.suffix == ".safetensors":
            made, kept = load_file(world / path), load_file(committed / path)
            assert {name: value.shape for name, value in made.items()} == {n: v.shape for n, v in kept.items()}


def test_a_step_run_again_gives_the_same_weights(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step starts from what it wrote itself."""
    before = {path: path.read_bytes() for path in (world / "scorers").glob("*/*.safetensors")}
    small = {"CORPUS_CHUNKS": 1, "CONTRASTIVE_STEPS": 1, "VOTE_STEPS": {"pickscore": 1, "hps": 1}, "JUDGE_PAIRS": 12}
    for name, value in small.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(corpus, "CHUNK", 160)
    build.build_hps(world)
    build.build_pickscore(world)
    assert len(before) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
