"""Published weights in every layout they come in: found, checked, put into their base, scored and held against it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Brightness
from hub_stub import Hub, point_to
from safetensors.torch import load_file, save_file
from torch import Tensor

from invdpo import evaluate as evaluation
from invdpo.backbones.pipeline import load_unet
from invdpo.backbones.released import Stored, check_same_network, find_weights, made_from, put_into
from invdpo.config import StudyConfig, parse_study
from invdpo.errors import InvdpoError
from invdpo.evaluate import evaluate
from invdpo.evidence import experiments as experiments_evidence
from invdpo.evidence import tables
from invdpo.experiments.stage import run
from invdpo.experiments.weight_distances import block_of, distances, kind_of, section_of, summary
from invdpo.training.loop import train

CPU = torch.device("cpu")
STEP = 2.0**-9  # what every release here has moved each of its weights by
FILE = "diffusion_pytorch_model.safetensors"


def own_weights(pipeline: Path) -> dict[str, Tensor]:
    return load_file(pipeline / "unet" / FILE)


def save_unet(folder: Path, pipeline: Path, weights: dict[str, Tensor], name: str = FILE) -> Path:
    """A UNet's folder as diffusers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(pipeline / "unet" / "config.json", folder)
    save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


def save_parts(folder: Path, pipeline: Path, weights: dict[str, Tensor]) -> Path:
    """The same in two files and their index."""
    names, places = sorted(weights), {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_unet(folder, pipeline, {name: weights[name] for name in half}, file)
        places |= dict.fromkeys(half, file)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def save_lora(folder: Path, pipeline: Path, names: tuple[str, ...] = ("to_q", "to_v")) -> dict[str, Tensor]:
    """A LoRA of rank 2 of some attention layers, in diffusers' own format; returns the weights with it added."""
    generator, weights, lora = torch.Generator().manual_seed(3), own_weights(pipeline), {}
    for name in [name for name in weights if name.split(".")[-2] in names and name.endswith(".weight")]:
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((2, weights[name].shape[1]), (len(weights[name]), 2))
        )
        layer = name.removesuffix(".weight")
        lora |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        weights[name] = weights[name] + up @ down
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "pytorch_lora_weights.safetensors")
    return weights


def moved(pipeline: Path) -> dict[str, Tensor]:
    return {name: value + STEP for name, value in own_weights(pipeline).items()}


Layout = Callable[[Path, Path], Path]
LAYOUTS: dict[str, Layout] = {
    "root": lambda folder, base: save_unet(folder, base, moved(base)),
    "unet": lambda folder, base: save_unet(folder / "unet", base, moved(base)).parent,
    "parts": lambda folder, base: save_parts(folder / "unet", base, moved(base)).parent,
    "file": lambda folder, base: save_unet(folder, base, moved(base), "ours.safetensors") / "ours.safetensors",
    "pipeline": lambda folder, base: (
        save_unet(shutil.copytree(base, folder, dirs_exist_ok=True) / "unet", base, moved(base)).parent
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "release", tiny_sdxl)
    found = put_into(load_unet(tiny_sdxl, CPU), find_weights(source)).state_dict()
    expected = moved(tiny_sdxl)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_is_read_as_it_is_stored(tiny_base: Path, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in moved(tiny_base).items()}
    folder = save_unet(tmp_path / "half", tiny_base, half, "diffusion_pytorch_model.fp16.safetensors")
    unet = put_into(load_unet(tiny_base, CPU), find_weights(folder))
    assert unet.dtype == torch.float32
    assert all(torch.equal(value, half[name].float()) for name, value in unet.state_dict().items())
    # The plain files say more, unless the variant is asked for.
    save_unet(folder, tiny_base, moved(tiny_base))
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        (row,) = set(distances(find_weights(tiny_base), find_weights(folder, variant=variant))["dtype"])
        assert row == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("family", ["tiny_base", "tiny_sdxl"])
def test_a_lora_is_added_to_the_base(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("peft")
    base = request.getfixturevalue(family)
    expected = save_lora(tmp_path / "lora", base)
    weights = find_weights(tmp_path / "lora")
    assert weights.lora and not find_weights(base).lora
    unet = put_into(load_unet(base, CPU), weights)
    found = unet.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    (tmp_path / "other").mkdir()
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    save_file(
        {name.replace("unet.", "text_encoder."): value for name, value in lora.items()}, tmp_path / "t.safetensors"
    )
    with pytest.raises(InvdpoError, match="also changes a text encoder"):
        put_into(load_unet(base, CPU), find_weights(tmp_path / "t.safetensors"))
    wide = {name: torch.zeros(len(value) + 1, value.shape[1] + 1) for name, value in lora.items()}
    save_file(wide, tmp_path / "w.safetensors")
    with pytest.raises(InvdpoError, match="no LoRA of this base's UNet"):
        put_into(load_unet(base, CPU), find_weights(tmp_path / "w.safetensors"))


def test_a_lora_without_its_library(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", False)
    save_lora(tmp_path / "lora", tiny_base)
    with pytest.raises(InvdpoError, match="`weights: .*lora` is a LoRA, which needs peft"):
        put_into(load_unet(tiny_base, CPU), find_weights(tmp_path / "lora"))


def test_weights_from_the_hub(hub: Hub, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_folder("owner/pipeline", LAYOUTS["pipeline"](tmp_path / "a", tiny_base))
    hub.add_folder("owner/bare", LAYOUTS["parts"](tmp_path / "b", tiny_base) / "unet")
    sources = ["owner/pipeline", "owner/pipeline/unet", f"owner/pipeline/unet/{FILE}", "owner/bare"]
    for source in sources:
        assert find_weights(source).shapes == find_weights(tiny_base).shapes
    assert not any("vae" in path or "text_encoder" in path for path in hub.sent()), "the UNet alone is fetched"
    for source, message in (
        ("owner/none", "`weights: owner/none`: there is no owner/none here, and the hub has no model owner/none"),
        ("owner/bare/unet", "holds no unet/diffusion_pytorch_model.safetensors and no unet/pytorch_lora"),
        ("owner/bare/x.safetensors", "the model owner/bare of the hub has no file x.safetensors"),
    ):
        with pytest.raises(InvdpoError, match=message):
            find_weights(source)
    hub.refused["owner/bare"] = (403, "GatedRepo")
    with pytest.raises(InvdpoError, match="of the hub is gated. Accept its terms"):
        find_weights("owner/bare/again.safetensors")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert find_weights("owner/bare").shapes == find_weights(tiny_base).shapes, "from the cache, what is not there too"
    with pytest.raises(InvdpoError, match="cannot be reached.*put the folder of a local copy"):
        find_weights("owner/another")


def test_a_release_in_a_pickle_is_refused_by_its_listing_alone(hub: Hub) -> None:
    content = {"unet/diffusion_pytorch_model.bin": b"\x80" * 1000, "unet/config.json": b"{}"}
    hub.repos["owner/pickle"] = content
    hub.repos["owner/lora"] = {"pytorch_lora_weights.bin": b"\x80", "README.md": b""}
    for source, name in (
        ("owner/pickle", "unet/diffusion_pytorch_model.bin"),
        ("owner/lora", "pytorch_lora_weights.bin"),
    ):
        with pytest.raises(InvdpoError, match=rf"`weights: {source}` holds its weights as a pickle only \({name}\)"):
            find_weights(source)
    assert [path for _, path, _ in hub.asked] == [f"/api/models/{source}" for source in ("owner/pickle", "owner/lora")]


def test_the_variant_that_there_is(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    """Plain files before fp16's, these before another's, and no guess among several others."""
    found = {}
    for variant, step in (("ema", 3), ("bf16", 2), ("fp16", 1), (None, 0)):
        name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else FILE
        weights = {key: value + step for key, value in own_weights(tiny_base).items()}
        hub.add_folder("owner/release", save_unet(tmp_path / "release" / "unet", tiny_base, weights, name).parent)
        if variant == "bf16":
            with pytest.raises(InvdpoError, match="holds weights in the variants bf16, ema. Name one of the files"):
                find_weights("owner/release")
            found["named"] = next(iter(find_weights(f"owner/release/unet/{name}").places.values())).name
        else:
            (found[variant],) = {path.name for path in find_weights("owner/release").places.values()}
    names = {variant: f"diffusion_pytorch_model.{variant}.safetensors" for variant in ("ema", "fp16")}
    assert found == names | {"named": "diffusion_pytorch_model.bf16.safetensors", None: FILE}
    asked = find_weights("owner/release", variant="fp16")
    assert {path.name for path in asked.places.values()} == {names["fp16"]}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_weights_of_a_quantised_network_are_refused(dtype: torch.dtype, tiny_base: Path, tmp_path: Path) -> None:
    weights = own_weights(tiny_base)
    name = "mid_block.attentions.0.proj_in.weight"
    folder = save_unet(tmp_path / "release", tiny_base, weights | {name: weights[name].to(dtype)})
    with pytest.raises(InvdpoError, match=rf"`weights: .*release`: {FILE} stores {name} as \w+. Weights must be F16, "):
        find_weights(folder)
    save_unet(folder, tiny_base, {key: value.double() for key, value in weights.items()})
    found = put_into(load_unet(tiny_base, CPU), find_weights(folder)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_what_is_no_release(tiny_base: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    base, names = find_weights(tiny_base), own_weights(tiny_base)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    pickled = tmp_path / "pickled" / "unet"
    pickled.mkdir(parents=True)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    cut = save_unet(tmp_path / "cut", tiny_base, names)
    (cut / FILE).write_bytes((cut / FILE).read_bytes()[:-100])
    lost = save_parts(tmp_path / "lost", tiny_base, names)
    (lost / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    for source, message in (
        (tmp_path / "empty", "holds no unet/diffusion_pytorch_model.safetensors or diffusion"),
        (tmp_path / "model.ckpt", "is no safetensors file"),
        (tmp_path / "pickled", "holds its weights as a pickle"),
        (tmp_path / "absent", "there is no such folder or file"),
        (cut, "truncated, or no safetensors file"),
        (lost, "holds 1 of 2 parts of its weights"),
    ):
        with pytest.raises(InvdpoError, match=message):
            find_weights(source)

    first, *others = sorted(names)
    single = {f"model.diffusion_model.{name}": value for name, value in names.items()}
    for weights, message in (
        (own_weights(tiny_sdxl), r"tensors are not in it \(add_embedding.*is|have another shape"),
        ({name: names[name] for name in others}, rf"1 tensors of .* are missing \({first}\)"),
        (names | {"more.weight": torch.ones(1)}, r"1 tensors are not in it \(more.weight\)"),
        (names | {first: torch.ones(3, 7)}, rf"1 have another shape \({first} \(3, 7\), not"),
        (single, "holds no tensor of a diffusers UNet .*from_single_file"),
    ):
        release = find_weights(save_unet(tmp_path / "wrong", tiny_base, weights))
        with pytest.raises(InvdpoError, match=message):
            check_same_network(release, base)
        with pytest.raises(InvdpoError, match="Use weights that were trained|from_single_file"):
            put_into(load_unet(tiny_base, CPU), release)


def test_parts_of_a_unet() -> None:
    for name, block, section, kind in (
        ("conv_in.weight", "input", "other", "conv"),
        ("time_embedding.linear_1.bias", "time", "other", "time"),
        ("add_embedding.linear_1.bias", "time", "other", "time"),
        ("down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.weight", "down 2", "down", "attention"),
        ("down_blocks.0.downsamplers.0.conv.weight", "down 0", "down", "conv"),
        ("mid_block.resnets.1.time_emb_proj.weight", "mid", "mid", "time"),
        ("up_blocks.1.resnets.2.norm1.weight", "up 1", "up", "conv"),
        ("conv_norm_out.weight", "output", "other", "conv"),
    ):
        assert (block_of(name), section_of(name), kind_of(name)) == (block, section, kind)


def test_a_planted_change_is_measured_where_it_is(tiny_base: Path, tmp_path: Path) -> None:
    weights = own_weights(tiny_base)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert name in weights
    changed = weights[name].clone()
    changed[0, :2] += torch.tensor([3.0, -4.0])
    folder = save_unet(tmp_path / "planted", tiny_base, weights | {name: changed})
    rows = distances(find_weights(tiny_base), find_weights(folder)).set_index("tensor")
    assert rows.loc[rows["square"] > 0].index.tolist() == [name]
    assert rows.loc[name, "square"] == pytest.approx(25, rel=1e-6) and rows.loc[name, "max"] == pytest.approx(
        4, rel=1e-6
    )
    assert rows.loc[name, "changed"] == 2 and rows.loc[name, "elements"] == changed.numel()
    found = summary(rows.reset_index()).set_index(["grouping", "group"])
    count = sum(value.numel() for value in weights.values())
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in weights.values()))
    total = found.loc[("total", "all")]
    assert total["elements"] == count and total["rms"] == pytest.approx(5 / math.sqrt(count), rel=1e-6)
    assert total["relative_l2"] == pytest.approx(5 / norm, rel=1e-6) and total["changed"] == 2 / count
    assert total["least_rms"] == total["rounded_rms"] == total["rms"], "fp32 against fp32: nothing was rounded"
    moved_groups = found.loc[found["max"] > 0].index.tolist()
    assert moved_groups == [("total", "all"), ("section", "mid"), ("block", "mid"), ("kind", "attention")]
    blocks = [group for grouping, group in found.index if grouping == "block"]
    assert blocks == ["time", "input", "down 0", "down 1", "mid", "up 0", "up 1", "output"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_told_from_training(dtype: torch.dtype, tiny_base: Path, tmp_path: Path) -> None:
    """The base itself, stored in half precision, has moved by rounding alone; one that was trained has moved more."""
    weights, base = own_weights(tiny_base), find_weights(tiny_base)
    stored = {
        "rounded": {name: value.to(dtype) for name, value in weights.items()},
        "trained": {name: (value + 0.05).to(dtype) for name, value in weights.items()},
    }
    found = {}
    for name, tensors in stored.items():
        rows = distances(base, find_weights(save_unet(tmp_path / name, tiny_base, tensors)))
        found[name] = summary(rows).iloc[0]
    rounded, trained = found["rounded"], found["trained"]
    assert rounded["rounded_to"] == str(dtype).removeprefix("torch.") and rounded["base_dtype"] == "float32"
    assert rounded["rms"] > 1e-6 and rounded["changed"] > 0.5, "as the files are, rounding looks like training"
    assert rounded["rounded_rms"] == rounded["rounded_changed"] == rounded["least_rms"] == 0
    assert trained["rounded_rms"] == pytest.approx(0.05, rel=0.01)
    assert 0.045 < trained["least_rms"] < 0.05
    assert trained["in_fp16"] > 0.99


@pytest.fixture
def study(
    tiny_base: Path, tiny_sdxl: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StudyConfig:
    """Nothing is trained: an SDXL base with three releases, and an SD1.5 base with one in half precision."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "build_scorers", lambda scorers, device: [Brightness()])
    half = {name: value.half() for name, value in moved(tiny_base).items()}
    save_unet(tmp_path / "half" / "unet", tiny_base, half, "diffusion_pytorch_model.fp16.safetensors")
    sources = {name: LAYOUTS[name](tmp_path / name, tiny_sdxl) for name in ("root", "pipeline")}
    arms: dict[str, Any] = {
        "base": {"method": "no_training"},
        "diffusion_dpo": {"method": "no_training", "weights": str(sources["root"]), "published": "Diffusion-DPO"},
        "itercomp": {"method": "no_training", "weights": str(sources["pipeline"])},
        "base_sd15": {"method": "no_training", "base": "sd15"},
        "diffusion_dpo_sd15": {"method": "no_training", "base": "sd15", "weights": "half"},
    }
    measured = ["diffusion_dpo", "diffusion_dpo_sd15"]
    try:
        import peft  # pyright: ignore[reportMissingImports]

        assert peft
        save_lora(tmp_path / "lora", tiny_sdxl)
        arms["spo"] = {"method": "no_training", "weights": "lora"}
        measured.append("spo")
    except ImportError:
        pass
    bounds = {"diffusion_dpo": {"rms": 1e-3, "source": "a test"}, "diffusion_dpo_sd15": {"rms": 0.1, "source": "too"}}
    return parse_study(
        {
            "study": "released",
            "base": str(tiny_sdxl),
            "bases": {"sd15": {"model": str(tiny_base), "resolution": 16, "guidance_scale": 1.5}},
            "prompts": str(tiny_prompts),
            "scorers": {},
            "device": "cpu",
            "seeds": [0],
            "training": {"resolution": 32},
            "sampling": {"steps": 2, "guidance_scale": 3.0, "batch": 4},
            "arms": arms,
            "experiments": {
                "comparison": {"arms": list(arms)},
                "weight_distances": {"arms": measured, "bounds": bounds},
            },
        },
        "test",
    )


def test_a_study_of_released_weights(study: StudyConfig) -> None:
    for arm in study.arms:
        train(study, arm, study.seeds, CPU)
        evaluate(study, arm, study.seeds, CPU)
    images = {arm: pd.read_parquet(study.root / "images" / arm / "seed0.parquet") for arm in study.arms}
    shas = {arm: frame["sha256"].tolist() for arm, frame in images.items()}
    assert shas["diffusion_dpo"] == shas["itercomp"], "the same weights from a folder and from a pipeline"
    assert all(len(set(column)) > 1 for column in (shas["base"], shas["base_sd15"]))
    assert not set(shas["base"]) & set(shas["diffusion_dpo"]) and not set(shas["base_sd15"]) & set(shas["base"])
    sizes = {arm: len(frame["png"][0]) for arm, frame in images.items()}
    assert sizes["base_sd15"] < sizes["base"], "the second base is sampled at its own resolution"
    seen = study.with_base_of("diffusion_dpo_sd15")
    assert (seen.training.resolution, seen.sampling.guidance_scale, seen.sampling.steps) == (16, 1.5, 2)

    tables.write(study)
    rows = {row["arm"]: row for row in csv.DictReader((study.root / "tables" / "table1.csv").open())}
    assert rows["diffusion_dpo"]["base"] == study.base and rows["diffusion_dpo_sd15"]["base"] == seen.base

    def light(arm: str) -> float:
        frame = pd.read_parquet(study.root / "scores" / arm / "seed0.parquet")
        return float(frame.loc[frame["scorer"] == "light", "score"].mean())

    for arm, base in (("diffusion_dpo", "base"), ("diffusion_dpo_sd15", "base_sd15")):
        gain = float(rows[arm]["light_minus_base"])
        assert gain == pytest.approx(light(arm) - light(base), rel=1e-4), "against its own base"
        assert float(rows[arm]["light_minus_base_low"]) <= gain <= float(rows[arm]["light_minus_base_high"])
        assert rows[base]["light_minus_base"] == ""
    assert rows["diffusion_dpo"]["paper_pickscore_sdxl"] == "0.227" and rows["itercomp"]["paper_pickscore_sdxl"] == ""
    assert rows["base"]["paper_pickscore_sdxl"] == "0.223"
    text = (study.root / "tables" / "table1.md").read_text()
    assert text.index(f"**Mean score ({study.base})**") < text.index(f"**Mean score (sd15: {seen.base})**")
    won = csv.DictReader((study.root / "tables" / "win_rates.csv").open())
    pairs = {(row["arm"], row["against"]) for row in won}
    assert ("base_sd15", "diffusion_dpo_sd15") in pairs and not any(("base", arm) in pairs for arm in ("base_sd15",))


def test_distances_of_released_weights(study: StudyConfig) -> None:
    folder = run(study, "weight_distances", CPU)
    summaries = pd.read_csv(folder / "summary.csv")
    total = summaries.loc[summaries["grouping"] == "total"].set_index("arm")
    assert total.loc["diffusion_dpo", "rms"] == pytest.approx(STEP, rel=1e-5)
    half = total.loc["diffusion_dpo_sd15"]
    assert (half["dtype"], half["base_dtype"]) == ("float16", "float32")
    assert half["rounded_rms"] == pytest.approx(STEP, rel=0.05) and half["least_rms"] < STEP
    if "spo" in study.arms:
        kinds = summaries.loc[(summaries["arm"] == "spo") & (summaries["grouping"] == "kind")].set_index("group")
        assert kinds.loc["attention", "rms"] > 0.1 and kinds.loc["conv", "rms"] == kinds.loc["time", "rms"] == 0
    tensors = pd.read_parquet(folder / "tensors.parquet")
    assert len(tensors.loc[tensors["arm"] == "diffusion_dpo"]) == len(own_weights(Path(study.base)))

    experiments_evidence.write(study)
    rows = list(csv.DictReader((study.root / "tables" / "weight_distances.csv").open()))
    above = {row["arm"]: row["above_bound"] for row in rows if row["grouping"] == "total"}
    assert above["diffusion_dpo"] == "True" and above["diffusion_dpo_sd15"] == "False" and above.get("spo", "") == ""
    text = (study.root / "tables" / "weight_distances.md").read_text()
    assert "0.001 *" in text and "Bound of Diffusion-DPO: 0.001, a test." in text and "Both rounded:" in text
    assert (study.root / "figures" / "weight_distances.png").stat().st_size > 0


def test_weights_are_held_against_another_model_and_say_where_they_come_from(
    study: StudyConfig, tmp_path: Path, tiny_sdxl: Path
) -> None:
    """A release that is its stated origin, moved a little, and lies farther from the base that it is compared with."""
    origin = {name: value + 1.0 for name, value in own_weights(tiny_sdxl).items()}
    save_unet(tmp_path / "origin" / "unet", tiny_sdxl, origin)
    folder = save_unet(tmp_path / "later" / "unet", tiny_sdxl, {name: value + STEP for name, value in origin.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "somebody/origin"}))
    assert made_from("later") == "somebody/origin" and made_from("origin") == config.get("_name_or_path")
    content = study.model_dump()
    content["arms"]["itercomp"]["weights"] = "later"
    arms = {"arms": ["diffusion_dpo", "itercomp"], "against": {"itercomp": "origin"}, "bounds": {}}
    content["experiments"]["weight_distances"] = arms
    found = parse_study(content, "test")
    results = run(found, "weight_distances", CPU)
    total = pd.read_csv(results / "summary.csv").query("grouping == 'total'").set_index("arm")
    assert total.loc["itercomp", "rms"] == pytest.approx(1 + STEP, rel=1e-4), "from its base as before"
    (row,) = pd.read_csv(results / "against.csv").query("grouping == 'total'").to_dict("records")
    assert (row["arm"], row["against"]) == ("itercomp", "origin") and row["rms"] == pytest.approx(STEP, rel=1e-2)
    (row,) = pd.read_csv(results / "made_from.csv").query("arm == 'itercomp'").to_dict("records")
    assert (row["weights"], row["made_from"]) == ("later", "somebody/origin")

    experiments_evidence.write(found)
    text = (found.root / "tables" / "weight_distances.md").read_text()
    assert "IterComp was published as loaded from somebody/origin, by its config.json." in text
    (line,) = [line for line in text.splitlines() if "| origin |" in line]
    assert line.startswith("| IterComp | origin | float32 (base float32) | 0.002 |")
    arms["against"] = {"spoo": "origin"}
    with pytest.raises(InvdpoError, match="`against` names `spoo`, which is not in `arms`"):
        parse_study(content, "test")


def test_weights_of_another_network_name_the_arm_s_setting(study: StudyConfig) -> None:
    content = study.model_dump()
    content["arms"]["itercomp"]["weights"] = "half"
    content["experiments"]["weight_distances"]["arms"] = ["itercomp"]
    content["experiments"]["weight_distances"]["bounds"] = {}
    wrong = parse_study(content, "test")
    for work in (lambda: evaluate(wrong, "itercomp", [0], CPU), lambda: run(wrong, "weight_distances", CPU)):
        with pytest.raises(InvdpoError, match="`weights: half` is not of the same network"):
            work()
    assert not (study.root / "scores" / "itercomp").exists()


def test_what_a_study_may_say(study: StudyConfig) -> None:
    content = study.model_dump()
    trained = {"method": "diffusion_dpo"}
    for path, value, message in (
        (("arms", "itercomp", "base"), "sd51", "`arms.itercomp.base` names `sd51`.*Did you mean `sd15`"),
        (
            ("arms", "itercomp"),
            trained | {"weights": "root"},
            "`arms.itercomp.weights` is for arms with `method: no_tr",
        ),
        (("arms", "itercomp"), trained | {"base": "sd15"}, "`arms.itercomp.base` is for arms with"),
        (("arms", "itercomp"), trained, "`preferences` is missing, and `itercomp` needs pairs"),
        (("arms", "base", "published"), "SDXL", "`arms.base.published` is for arms with `weights`"),
        (("experiments", "weight_distances", "arms"), ["base", *study.arms], "names `base`, a base itself"),
        (("experiments", "weight_distances", "bounds", "spoo"), {"rms": 1.0, "source": "-"}, "`bounds` names `spoo`"),
    ):
        changed: Any = json.loads(json.dumps(content))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(InvdpoError, match=message):
            parse_study(changed, "test")


def test_an_arm_is_known_by_its_weights_and_base(study: StudyConfig) -> None:
    hashes = [study.arm(arm).hash for arm in study.arms]
    assert len(set(hashes)) == len(hashes)
    assert study.with_base_of("base") is study
    assert isinstance(find_weights(study.base), Stored)
