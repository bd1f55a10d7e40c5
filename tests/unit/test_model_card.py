"""The card beside a trained checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from invdpo.config import StudyConfig
from invdpo.evidence import model_card
from invdpo.provenance import sha256_file
from invdpo.training.loop import train

MakeStudy = Callable[..., StudyConfig]


def test_the_card_says_what_the_checkpoint_is_and_how_to_load_it(tiny_study: MakeStudy, tiny_cache: Path) -> None:
    arm = {"method": "diffusion_dpo", "labels": "swapped", "training": {"checkpoints": [2]}}
    study = tiny_study(arms={"dpo": arm})
    shutil.copytree(tiny_cache, study.root / "preferences")
    train(study, "dpo", [0], torch.device("cpu"))
    run = study.root / "runs/dpo/seed0"
    assert model_card.write(study) == [run / "README.md"], "seed 1 and the base model have not trained"
    text, record = (run / "README.md").read_text(), json.loads((run / "run.json").read_text())
    digest = sha256_file(run / "unet/diffusion_pytorch_model.safetensors")
    for words in (digest, record["config_hash"], "swapped (a control", "4 steps of 4 pairs", "0.001, ", "## Not for"):
        assert words in text
    for step in (2, 4):
        place = f"checkpoints/step{step:06d}/unet"
        digest = sha256_file(run / place / "diffusion_pytorch_model.safetensors")
        assert f"`{place}`" in text and f"| `{place}/diffusion_pytorch_model.safetensors` | `{digest}` |" in text
    assert text.count("| `checkpoints/") == 2
    assert "it is a control, trained on labels that were changed" in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == study.base
    loaded: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], loaded)
    assert torch.equal(loaded["pipeline"].unet.conv_in.weight, loaded["unet"].conv_in.weight)


def test_every_run_of_the_reference_can_be_described() -> None:
    records = [json.loads(path.read_text()) for path in Path("results/reference").glob("*/runs/*/seed0/run.json")]
    trained = [record for record in records if record["recipe"] is not None]
    assert len(trained) > 60
    for record in trained:
        text = model_card.model_card(record, {}, Path("run"))
        assert record["recipe"]["source"].replace("|", "\\|") in text
        assert ("unconditional branch" in text) == (record["method"] == "diffusion_npo")
