"""The study on a base of SDXL's layout, two steps of it, from the conversion of the base to the tables."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from workflow_fixture import ROOT, SNAKEMAKE, copy_tree, environment

from invdpo.config import StudyConfig, parse_study
from invdpo.evaluate import evaluate
from invdpo.sampling import prompt_generator

RESULTS = Path("results", "shapes_xl")
LEARNED = ["aesthetic", "clip", "hps", "pickscore"]
TRAINED = ("diffusion_dpo", "inversion_dpo_code")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which config/shapes_xl.yaml, with fewer of everything, has run to its tables."""
    folder = copy_tree(tmp_path_factory.mktemp("xl") / "tree")
    config = folder / "config" / "shapes_xl.yaml"
    study: dict[str, Any] = yaml.safe_load(config.read_text())
    study["preferences"] = study["preferences"].replace("train", "validation")
    study["seeds"] = [0]
    study["training"] |= {"steps": 2, "batch": 4, "checkpoints": [1], "warmup_steps": 0}
    study["sampling"] |= {"steps": 5, "prompts": 4}
    study["arms"] = {
        "base": study["arms"]["base"],
        "diffusion_dpo": {"method": "diffusion_dpo"},
        "inversion_dpo_code": {
            **study["arms"]["inversion_dpo_code"],
            "recipe": {"trajectory": {"steps": 4}},
            "training": {"batch": 1},
        },
    }
    study["experiments"] = {"comparison": {"arms": ["base", *TRAINED]}, "to_target": {"arm": "diffusion_dpo"}}
    study["claims"] = None
    config.write_text(yaml.safe_dump(study))
    done = subprocess.run(
        [*SNAKEMAKE, "tables", "--configfile", "config/shapes_xl.yaml", "--cores", "1"],
        cwd=folder,
        env=environment(folder) | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


@pytest.fixture
def inside(tree: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """The study as it ran, seen from the copy."""
    monkeypatch.chdir(tree)
    return parse_study(yaml.safe_load(Path("config", "shapes_xl.yaml").read_text()), "config/shapes_xl.yaml")


def scores(root: Path, arm: str) -> pd.Series:
    """Score of the last step by prompt and scorer."""
    frame = pd.read_parquet(root / "scores" / arm / "seed0.parquet")
    return frame[frame["step"] == frame["step"].max()].set_index(["prompt_id", "scorer"])["score"].sort_index()


@pytest.mark.parametrize("arm", TRAINED)
def test_checkpoints_are_unets_of_sdxl_s_layout(inside: StudyConfig, arm: str) -> None:
    """With the base's own configuration, and every part that SDXL has more trained away from it."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    run = inside.root / "runs" / arm / "seed0"
    told = json.loads(Path(inside.base, "unet", "config.json").read_text())
    assert told["addition_embed_type"] == "text_time" and told["cross_attention_dim"] == 256
    weights = UNet2DConditionModel.from_pretrained(Path(inside.base, "unet")).state_dict()
    for folder in (
        run / "unet",
        run / "checkpoints" / "step000001" / "unet",
        run / "checkpoints" / "step000002" / "unet",
    ):
        found = json.loads((folder / "config.json").read_text())
        assert {key: found[key] for key in told if not key.startswith("_")} == {
            key: value for key, value in told.items() if not key.startswith("_")
        }
    moved = UNet2DConditionModel.from_pretrained(run / "unet").state_dict()
    assert moved.keys() == weights.keys()
    added = [name for name in weights if name.startswith("add_embedding") or "attn2.to_k" in name]
    assert len(added) > 4 and not [name for name in added if torch.equal(moved[name], weights[name])]


@pytest.mark.parametrize("arm", TRAINED)
def test_the_stock_pipeline_draws_the_stored_image(inside: StudyConfig, arm: str) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    stored = pd.read_parquet(inside.root / "images" / arm / "seed0.parquet").set_index("prompt_id")
    unet = UNet2DConditionModel.from_pretrained(inside.root / "runs" / arm / "seed0" / "unet")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(inside.base, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    for number in (0, 3):
        (image,) = pipeline(
            stored["prompt"][number],
            height=64,
            width=64,
            num_inference_steps=inside.sampling.steps,
            guidance_scale=inside.sampling.guidance_scale,
            generator=prompt_generator(inside.sampling.seed, number),
        ).images
        wanted = np.asarray(Image.open(io.BytesIO(stored["png"][number])), dtype=int)
        assert wanted.std() > 20
        assert np.abs(np.asarray(image, dtype=int) - wanted).max() <= 1


def test_the_base_scores_as_the_one_it_was_converted_from(inside: StudyConfig, tmp_path: Path) -> None:
    settings = yaml.safe_load(Path("config", "shapes_xl.yaml").read_text())
    original = parse_study(
        settings | {"study": "original", "base": str(ROOT / "assets" / "shapes" / "base")}, "original"
    )
    evaluate(original, "base", [0], torch.device("cpu"))
    wanted, found = scores(original.root, "base"), scores(inside.root, "base")
    assert list(found.index) == list(wanted.index) and len(found) >= 4 * 6
    assert wanted.groupby("scorer").std()[LEARNED].min() > 0.01, "pictures are told apart"
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    for arm in TRAINED:
        print(arm, (scores(inside.root, arm) - found).abs().groupby("scorer").max())


def test_the_tables_compare_the_arms(inside: StudyConfig) -> None:
    table = pd.read_csv(inside.root / "tables" / "table1.csv")
    assert {"base", *TRAINED} <= set(table["arm"])
    assert (inside.root / "tables" / "costs.csv").stat().st_size > 0
