"""`invdpo check`: all that a study needs is looked for, nothing large is fetched, and all that is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Hub
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from invdpo import check as module
from invdpo import cli
from invdpo.check import check
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.prompts import HPD_STYLES

MakeStudy = Callable[..., StudyConfig]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def there(
    hub: Hub, tiny_study: MakeStudy, tiny_base: Path, tiny_sdxl: Path, tiny_pairs: Path, tmp_path: Path
) -> Callable[..., StudyConfig]:
    """A study none of whose files is here: a base, codec, release, pairs, prompts and a scorer's files on the hub."""
    hub.add_folder("owner/base", tiny_sdxl)
    hub.add_folder("owner/codec", tiny_base / "vae")
    hub.add_folder("owner/release", tiny_sdxl / "unet")
    hub.repos["owner/pairs"] = {"data/train-00000-of-00001.parquet": tiny_pairs.read_bytes()}
    prompts = [f"a red circle {number}" for number in range(800)]
    hub.repos["zhwang/HPDv2"] = {f"benchmark/{style}.json": json.dumps(prompts).encode() for style in HPD_STYLES}
    hub.repos["owner/clip"] = {"open_clip_config.json": b"{}", "open_clip_pytorch_model.bin": b"\x80" * 5000}
    hub.repos["owner/files"] = {"head.pth": b"\x80" * 3000}

    def make(**changes: Any) -> StudyConfig:
        settings: dict[str, Any] = {
            "base": "owner/base",
            "vae": "owner/codec",
            "preferences": "owner/pairs",
            "prompts": "hpdv2_photo",
            "scorers": {
                "clip": {"model": "hf-hub:owner/clip"},
                "aesthetic": {"model": "owner/files/head.pth", "tower": "hf-hub:owner/clip"},
            },
            "arms": {"released": {"method": "no_training", "weights": "owner/release"}},
            "training": {"resolution": 32},
        }
        return tiny_study(**settings | changes)

    return make


def test_a_study_on_the_hub_is_checked_by_headers(there: Callable[..., StudyConfig], hub: Hub) -> None:
    found = check(there())
    assert found.problems == []
    assert found.lines[0].startswith(
        "tiny: base owner/base, 12 rows in 1 of 1 files of preferences, 800 prompts, device"
    )
    assert len(found.lines) == 4
    weights = {name: file for name, file in found.remote.items() if name[1].endswith(WEIGHTS)}
    assert {repo for repo, _ in weights} == {"owner/base", "owner/codec", "owner/release", "owner/clip", "owner/files"}
    assert not [name for name in hub.whole() if name.endswith(WEIGHTS)], "no weights and no pairs are fetched"
    for repo, name in weights:
        assert weights[repo, name].size == len(hub.repos[repo][name])
        if name.endswith(".safetensors"):
            assert set(hub.ranges(f"{repo}/resolve/main/{name}")) == {"bytes=0-100000"}


def test_what_lies_in_the_cache_is_not_to_be_fetched(there: Callable[..., StudyConfig], hub: Hub) -> None:
    from invdpo.hub import fetch_file

    study = there()
    before = check(study)
    fetch_file("owner/files", "head.pth", "a", "b")
    fetch_file("owner/base", f"unet/{UNET}", "a", "b")
    hub.asked.clear()
    after = check(study)
    missing = [{name for name, file in found.remote.items() if file.path is None} for found in (before, after)]
    assert missing[0] - missing[1] == {("owner/files", "head.pth"), ("owner/base", f"unet/{UNET}")}
    assert not hub.ranges(f"owner/base/resolve/main/unet/{UNET}"), "its header is read here"


def test_everything_that_is_wrong_is_named_at_once(
    there: Callable[..., StudyConfig], hub: Hub, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, codec = hub.repos["owner/base"], hub.repos["owner/codec"]
    tensors = load_file(tiny_sdxl / "unet" / UNET)
    first, second, *_ = sorted(tensors)
    save_file({name: value for name, value in tensors.items() if name != first}, tmp_path / UNET)
    base[f"unet/{UNET}"] = (tmp_path / UNET).read_bytes()
    base["text_encoder_2/model.bin"] = base.pop("text_encoder_2/model.safetensors")
    del base["tokenizer/tokenizer.json"]
    base.pop("tokenizer/vocab.json", None)
    save_file({"a": torch.ones(2).to(torch.int8)}, tmp_path / "codec")
    codec[UNET] = (tmp_path / "codec").read_bytes()
    save_file(tensors | {second: torch.ones(3, 3)}, tmp_path / "release")
    hub.repos["owner/release"] = {UNET: (tmp_path / "release").read_bytes()}
    hub.repos["owner/pickle"] = {"unet/diffusion_pytorch_model.bin": b"\x80"}
    hub.gated.add("owner/clip")
    hub.repos["owner/files"] = {}
    del hub.repos["owner/pairs"]
    study = there(
        prompts="none.txt",
        arms={
            "released": {"method": "no_training", "weights": "owner/release"},
            "pickled": {"method": "no_training", "weights": "owner/pickle"},
        },
        experiments={"held_out": "no/such:validation"},
        checksums="SHA256SUMS",
    )
    Path("SHA256SUMS").write_text(f"{'0' * 64}  absent.bin\n")
    expected = [
        "absent.bin: missing",
        rf"`base: owner/base` is not of the same network as the base unet/config.json: 1 tensors of .* \({first}\)",
        "`base: owner/base`: `text_encoder_2` holds its weights as a pickle only",
        "`base: owner/base`: `tokenizer` holds no tokenizer",
        f"`vae: owner/codec`: {UNET} stores a as I8",
        rf"`weights: owner/release` is not of the same network as the base owner/base: .*{second} \(3, 3\)",
        "`weights: owner/pickle` holds its weights as a pickle only",
        "scorers.clip.model: the model owner/clip of the hub is gated",
        "`scorers.aesthetic.model: owner/files/head.pth`: the model owner/files of the hub has no file head.pth",
        "`preferences: owner/pairs`: there is no owner/pairs here, and the hub has no dataset owner/pairs",
        "`preferences: no/such:validation`: .*the hub has no dataset no/such",
        "prompts: there is no file none.txt",
    ]
    found = check(study).problems
    for words in expected:
        assert any(re.search(words, text) for text in found), (words, found)
    Path("study.json").write_text(dump_study(study))
    done = CliRunner().invoke(cli.app, ["check", "--study", "study.json"])
    assert isinstance(done.exception, InvdpoError) and done.exit_code == 1
    text = str(done.exception)
    assert text.startswith(f"{len(found)} problems with study `tiny`:\n  - ") and all(one in text for one in found)
    assert "tiny: base owner/base, ? rows of preferences, ? prompts" in done.output, "and what there is, is said"
    assert not [name for name in hub.whole() if name.endswith(WEIGHTS)]


def test_a_base_of_another_kind_is_named_once(
    there: Callable[..., StudyConfig], hub: Hub, tiny_base: Path, tmp_path: Path
) -> None:
    mixed = shutil.copytree(tiny_base, tmp_path / "mixed")
    index = json.loads((mixed / "model_index.json").read_text())
    (mixed / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    hub.add_folder("owner/base", mixed)
    assert [text for text in check(there()).problems if "owner/base" in text] == [
        "`owner/base` is a StableDiffusionPipeline with scheduler, text_encoder, tokenizer, vae. Needed is a pipeline "
        "of the Stable Diffusion 1.x or SDXL layout: unet, vae, scheduler, and one or two text encoders with "
        "tokenizers."
    ]


def test_a_disk_that_is_too_small_is_said(
    there: Callable[..., StudyConfig], hub: Hub, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check(there())
    assert found.problems == []
    fetched = sum(file.size for file in found.remote.values()) + len(next(iter(hub.repos["owner/pairs"].values())))
    parameters = sum(value.numel() for value in load_file(tiny_sdxl / "unet" / UNET).values())
    kept = 2 * 2 * 4 * parameters  # two seeds, steps 2 and 4
    pairs = 10 * (4 * 4 * 4 * 4 + 77 * 40) * 4  # of four tensors of 4x4x4 and a caption's 77 tokens each
    usage = shutil.disk_usage("/")
    for free, problems in ((fetched + kept + pairs, 0), (fetched + kept + pairs - 1, 1)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        found = check(there())
        assert len(found.problems) == problems
    (problem,) = found.problems
    assert "results/tiny are needed at least. Make room, put the hub's files on another disk (HF_HOME)" in problem


def test_a_local_study_is_checked_without_a_hub(tiny_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = check(tiny_study())
    assert found.problems == [] and found.remote == {}
    assert "12 rows of preferences, 4 prompts, device cpu, to fetch 0 GB" in found.lines[0]


def test_weights_that_are_held_against_are_looked_at_too(there: Callable[..., StudyConfig], hub: Hub) -> None:
    distances = {"arms": ["released"], "against": {"released": "owner/other"}}
    study = there(experiments={"weight_distances": distances})
    (problem,) = check(study).problems
    assert problem.startswith(
        "`experiments.weight_distances.against: owner/other`: there is no owner/other here, and the"
    )
    hub.repos["owner/other"] = hub.repos["owner/release"]
    assert check(study).problems == []


def test_settings_that_a_base_lacks_and_a_codec_that_does_not_fit_are_named(
    tiny_study: MakeStudy, tiny_base: Path, tmp_path: Path
) -> None:
    base, codec = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copytree(tiny_base / "vae", tmp_path / "codec")
    unet, vae = (json.loads((folder / "config.json").read_text()) for folder in (base / "unet", codec))
    del unet["cross_attention_dim"]
    (base / "unet" / "config.json").write_text(json.dumps(unet))
    (codec / "config.json").write_text(json.dumps(vae | {"scaling_factor": 0.5}))
    study = tiny_study(base=str(base), vae=str(codec), arms={"base": {"method": "no_training"}})
    problems = check(study).problems
    assert sum("`unet/config.json` lacks `cross_attention_dim`" in text for text in problems) == 1
    assert sum(text.startswith(f"`vae: {codec}` multiplies its latents by 0.5") for text in problems) == 1
