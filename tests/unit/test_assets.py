"""The committed shapes world is what its card says, in the formats that other libraries read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from invdpo.provenance import read_checksums, verify_checksums
from invdpo.world.card import write_card
from invdpo.world.scenes import read_caption

ASSETS = Path("assets/shapes")
PICKAPIC_COLUMNS = {
    *("are_different", "best_image_uid", "caption", "created_at", "has_label", "ranking_id", "user_id"),
    *("image_0_uid", "image_0_url", "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1"),
    *("model_0", "model_1", "num_example_per_prompt", "__index_level_0__"),
}


def facts(step: str) -> dict:
    return json.loads((ASSETS / "build" / f"{step}.json").read_text())


def validation() -> pd.DataFrame:
    return pd.read_parquet(ASSETS / "preferences" / "validation.parquet")


def test_every_file_has_its_checksum_and_weights_are_small() -> None:
    counted = verify_checksums(ASSETS / "SHA256SUMS")
    files = [path for path in ASSETS.rglob("*") if path.is_file() and path.name not in ("SHA256SUMS", "README.md")]
    assert counted == len(files)
    weights = [path for path in files if path.suffix in (".safetensors", ".pth")]
    assert sum(path.stat().st_size for path in weights) < 25e6


def test_the_card_is_made_from_the_builds(tmp_path: Path) -> None:
    for part in ("build", "base", "scorers"):
        shutil.copytree(ASSETS / part, tmp_path / part)
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == (ASSETS / "README.md").read_text()
    (tmp_path / "scorers/other").mkdir()
    (tmp_path / "scorers/other/model.safetensors").touch()
    with pytest.raises(KeyError, match="scorers/other"):
        write_card(tmp_path)


def test_the_card_has_the_command_seed_and_hash_of_all_weights() -> None:
    card, listed = (ASSETS / "README.md").read_text(), read_checksums(ASSETS / "SHA256SUMS")
    weights, rows = [name for name in listed if name.endswith((".safetensors", ".pth"))], card.split("## Weights")[1]
    assert len(weights) == 7
    for name in weights:
        row = next(line for line in rows.splitlines() if line.startswith(f"| `{name}` |"))
        step, seed, digest = row.strip("| ").split(" | ")[1:]
        assert digest == f"`{listed[name]}`" and seed == str(facts(step)["seed"])
        assert f"| {step} | `{facts(step)['command']}` |" in card


def test_a_stock_pipeline_draws_from_the_base() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    answer = pipeline(
        "a large red circle left of a blue square", num_inference_steps=20, guidance_scale=3.0, generator=generator
    )
    assert answer.images[0].size == (64, 64)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_have_pick_a_pics_columns_and_ties(split: str) -> None:
    table = pd.read_parquet(ASSETS / "preferences" / f"{split}.parquet")
    assert set(table.columns) == PICKAPIC_COLUMNS
    assert np.mean(table["label_0"] == 0.5) == pytest.approx(0.112, abs=0.005)
    assert np.all(table["label_0"] + table["label_1"] == 1)
    assert all(read_caption(text) for text in table["caption"])
    sample = Image.open(io.BytesIO(table["jpg_0"].iloc[0]))
    assert sample.size == (64, 64)


def test_no_prompt_was_voted_on_and_the_lists_are_apart() -> None:
    lists = [set((ASSETS / "prompts" / f"{name}.txt").read_text().splitlines()) for name in ("test", "tuning")]
    voted = set(validation()["caption"]) | set(pd.read_parquet(ASSETS / "preferences" / "train.parquet")["caption"])
    assert not lists[0] & lists[1]
    assert not (lists[0] | lists[1]) & voted


def accuracy(scores: tuple[np.ndarray, np.ndarray], table: pd.DataFrame) -> float:
    return float(np.mean((scores[0] > scores[1]) == (table["label_0"] == 1).to_numpy()))


def pictures(table: pd.DataFrame, column: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in table[column]]


def test_the_judges_are_as_good_as_the_card_says_through_the_studys_scorers() -> None:
    from invdpo.scorers.hps import HumanPreferenceScore
    from invdpo.scorers.openclip import OpenClip
    from invdpo.scorers.pickscore import PickScore

    decided = validation().query("label_0 != 0.5")
    captions = decided["caption"].tolist()
    device = torch.device("cpu")
    judges = {
        "pickscore": PickScore(str(ASSETS / "scorers" / "pickscore"), device),
        "hps": HumanPreferenceScore(OpenClip(f"local-dir:{ASSETS / 'scorers' / 'hps'}", device)),
    }
    for name, judge in judges.items():
        both = tuple(judge.score(pictures(decided, column), captions)[name] for column in ("jpg_0", "jpg_1"))
        measured = accuracy(both, decided)
        # A pair whose two cosines differ by rounding alone may fall either way.
        assert measured == pytest.approx(facts(name)["held_out_vote_accuracy"], abs=0.005)
        assert 0.6 < measured <= facts("votes")["validation"]["oracle_accuracy"] + 0.05
