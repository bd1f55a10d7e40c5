"""Both families of pipelines against diffusers' own, and what is refused before anything is spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_base, build_tiny_sdxl
from foreign_code import plant
from hub_stub import Hub
from safetensors.torch import load_file, save_file

from invdpo.backbones.files import check_codec, check_fits, fingerprint, text_parts
from invdpo.backbones.pipeline import UNetEps, encode_images, load_schedule, load_unet, load_vae
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evaluate import evaluate
from invdpo.preferences.cache import load_cache, prepare
from invdpo.preferences.preprocess import cut
from invdpo.sampling import decode, prompt_generator, sample
from invdpo.training.data import FIXED_SIZES, draw
from invdpo.training.loop import train
from invdpo.types import Conditioning

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square left of a red circle", "a green triangle"]
SHAPE = (4, 4, 4)
MakeStudy = Callable[..., StudyConfig]


def stock(base: Path, **parts: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    found = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False, **parts)
    found.set_progress_bar_config(disable=True)
    return found


def sampling_conditioning(base: Path) -> Conditioning:
    text = load_text(base, CPU)
    return for_sampling(encode_prompts(text, PROMPTS), empty_prompt(text), 32)


@pytest.fixture(scope="module", params=[True, False], ids=["zeroed", "encoded"])
def either_sdxl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """SDXL pipelines whose empty prompt is zeros, and is encoded."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("either") / "pipeline", tiny_base, request.param)


def test_sdxl_prompts_are_those_of_the_stock_pipeline(either_sdxl: Path) -> None:
    pipeline, cond = stock(either_sdxl), sampling_conditioning(either_sdxl)
    expected = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    assert cond.uncond is not None
    found = (cond.embeds, cond.uncond.embeds, cond.pooled, cond.uncond.pooled)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert bool(cond.uncond.embeds.any()) != pipeline.config.force_zeros_for_empty_prompt
    told = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 12)
    assert cond.time_ids is not None and torch.equal(cond.time_ids, told.expand(3, -1))
    assert cond.uncond.time_ids is cond.time_ids


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sdxl_images_are_those_of_the_stock_pipeline(either_sdxl: Path, guidance_scale: float) -> None:
    noise = torch.stack([torch.randn(SHAPE, generator=prompt_generator(7, i)) for i in range(3)])
    options: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": guidance_scale, "eta": 0.0}
    options |= {"prompt": PROMPTS, "latents": noise, "height": 32, "width": 32}
    pipeline = stock(either_sdxl)
    expected = pipeline(**options, output_type="latent").images
    pictures = pipeline(**options, output_type="np").images
    eps_model = UNetEps(load_unet(either_sdxl, CPU))
    generators = [prompt_generator(7, i) for i in range(3)]
    cond = sampling_conditioning(either_sdxl)
    found = sample(eps_model, cond, load_schedule(either_sdxl), 7, guidance_scale, generators, SHAPE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - noise).abs().max() > 0.1
    decoded = decode(load_vae(either_sdxl, CPU), found)
    assert np.abs(decoded.astype(int) - np.round(pictures * 255).astype(int)).max() <= 1


def test_each_part_of_sdxl_conditioning_counts(tiny_sdxl: Path) -> None:
    eps_model, cond = UNetEps(load_unet(tiny_sdxl, CPU)), sampling_conditioning(tiny_sdxl).without_uncond()
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500)
    assert cond.pooled is not None and cond.time_ids is not None
    with torch.no_grad():
        plain = eps_model(x, t, cond)
        for other in (
            replace(cond, embeds=cond.embeds.flip(0)),
            replace(cond, pooled=cond.pooled.flip(0)),
            replace(cond, time_ids=cond.time_ids + 8),
        ):
            assert (eps_model(x, t, other) - plain).abs().max() > 1e-5
    with pytest.raises(InvdpoError, match="needs the pooled embedding and the sizes"):
        eps_model(x, t, Conditioning(cond.embeds))


@pytest.mark.parametrize("micro_conditioning", ["image", "fixed"])
def test_sdxl_trains_and_its_weights_load_everywhere(
    tiny_study: MakeStudy, tiny_sdxl: Path, micro_conditioning: str
) -> None:
    study = tiny_study(base=str(tiny_sdxl), seeds=[0], training={"micro_conditioning": micro_conditioning, "steps": 2})
    prepare(study, CPU)
    train(study, "dpo", [0], CPU)
    out = study.root / "runs" / "dpo" / "seed0"
    from diffusers import UNet2DConditionModel

    loaded = UNet2DConditionModel.from_pretrained(out / "unet")
    ours, base = load_unet(out, CPU, base=tiny_sdxl).state_dict(), load_unet(tiny_sdxl, CPU).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in loaded.state_dict().items())
    assert all((ours[name] - base[name]).any() for name in ours if name.startswith("add_embedding"))
    pipeline = stock(tiny_sdxl, unet=loaded)
    assert pipeline(PROMPTS[0], num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    (scores,) = evaluate(study, "dpo", [0], CPU)
    assert scores.is_file()


def test_sdxl_is_told_the_size_and_crop_of_every_image(tiny_study: MakeStudy, tiny_sdxl: Path) -> None:
    from PIL import Image

    images = [Image.new("RGB", (50, 40)), Image.new("RGB", (40, 80)), Image.new("RGB", (32, 32))]
    # 40x50 shrinks to 32x40 and loses 4 columns on the left; 80x40 to 64x32, and 16 rows on the top.
    expected = [[40, 50, 0, 4, 32, 32], [80, 40, 16, 0, 32, 32], [32, 32, 0, 0, 32, 32]]
    assert [cut(image, 32).time_ids() for image in images] == expected

    study = tiny_study(base=str(tiny_sdxl))
    prepare(study, CPU)
    cache = load_cache(study.root / "preferences", CPU)
    assert cache.win_time_ids is not None and cache.lose_time_ids is not None
    assert cache.win_time_ids[0].tolist() == [40, 40, 0, 0, 32, 32]
    cache = replace(cache, lose_time_ids=cache.lose_time_ids + 3)
    straight, swapped = torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    batch, other = (draw(cache, flipped, [3, 1], 0, 1, 0, 0.0) for flipped in (straight, swapped))
    for cond, sizes in [
        (batch.cond, cache.win_time_ids),
        (batch.cond_lose, cache.lose_time_ids),
        (other.cond, cache.lose_time_ids),
        (other.cond_lose, cache.win_time_ids),
    ]:
        assert cond.time_ids is not None and cond.uncond is not None and cond.uncond.time_ids is not None
        assert torch.equal(cond.time_ids, sizes[[3, 1]]) and torch.equal(cond.uncond.time_ids, sizes[[3, 1]])
    assert batch.cond.embeds is batch.cond_lose.embeds
    fixed = draw(cache, straight, [3, 1], 0, 1, 0, 0.0, "fixed")
    for cond in (fixed.cond, fixed.cond_lose):
        assert cond.time_ids is not None and cond.time_ids.tolist() == [list(FIXED_SIZES)] * 2


def test_dropped_captions_are_the_empty_prompt_in_every_part(tiny_study: MakeStudy, tiny_sdxl: Path) -> None:
    study = tiny_study(base=str(tiny_sdxl))
    prepare(study, CPU)
    cache = load_cache(study.root / "preferences", CPU)
    batch = draw(cache, torch.zeros(10, dtype=torch.bool), list(range(8)), 0, 1, 0, 0.5)
    assert batch.cond.pooled is not None and cache.pooled is not None
    empty = encode_prompts(load_text(tiny_sdxl, CPU), [""])
    assert empty.pooled is not None and empty.embeds.any() and empty.pooled.any()
    dropped = (batch.cond.embeds - empty.embeds).abs().flatten(1).amax(dim=1) < 1e-5
    assert torch.equal(dropped, (batch.cond.pooled - empty.pooled).abs().amax(dim=1) < 1e-5)
    assert 0 < int(dropped.sum()) < 8
    kept = torch.arange(8)[~dropped]
    assert torch.equal(batch.cond.pooled[kept], cache.pooled[cache.caption_index[kept]])
    guided = batch.cond.uncond
    assert guided is not None and guided.pooled is not None
    assert not guided.embeds.any() and not guided.pooled.any(), "guidance still starts from zeros"


def test_pairs_are_encoded_again_where_a_pipeline_says_other_of_the_empty_prompt(
    tiny_study: MakeStudy, tiny_sdxl: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    study = tiny_study(base=str(base))
    before = prepare(study, CPU)["key"]
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert prepare(study, CPU)["key"] != before
    cache = load_cache(study.root / "preferences", CPU)
    assert cache.uncond.any() and cache.dropped.embeds is cache.uncond


def test_a_codec_of_its_own_replaces_the_base_s(tmp_path: Path, tiny_study: MakeStudy, tiny_base: Path) -> None:
    other = build_tiny_base(tmp_path / "other", seed=5) / "vae"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = encode_images(load_vae(tmp_path / "other", CPU), images)[0]
    found = encode_images(load_vae(tiny_base, CPU, str(other)), images)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, encode_images(load_vae(tiny_base, CPU), images)[0])
    study = tiny_study(vae=str(other))
    assert study.arm("dpo").hash != tiny_study().arm("dpo").hash
    assert prepare(study, CPU)["content"]["encoders"] == fingerprint(tiny_base, str(other))
    assert fingerprint(tiny_base, str(other)) != fingerprint(tiny_base)


def test_a_codec_runs_in_half_precision_only_where_that_is_safe(tmp_path: Path, tiny_base: Path) -> None:
    assert load_vae(tiny_base, CPU, dtype=torch.float16).dtype == torch.float32
    safe = shutil.copytree(tiny_base / "vae", tmp_path / "safe")
    change(safe / "config.json", force_upcast=False)
    assert load_vae(tiny_base, CPU, str(safe)).dtype == torch.float32
    half = load_vae(tiny_base, CPU, str(safe), torch.bfloat16)
    assert half.dtype == torch.float16
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_images(half, images)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, encode_images(load_vae(tiny_base, CPU), images)[0], rtol=0.01, atol=0.002)
    pictures = [decode(vae, mean).astype(int) for vae in (half, load_vae(tiny_base, CPU))]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_fp16_files_are_read_where_the_variant_says_so(tmp_path: Path, tiny_sdxl: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "base")
    for path in folder.rglob("*.safetensors"):
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    unet = load_unet(folder, CPU, variant="fp16")
    full = load_unet(tiny_sdxl, CPU).state_dict()
    for name, value in unet.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, full[name].half().float())
    assert load_vae(folder, CPU, variant="fp16").dtype == torch.float32
    embeds = [encode_prompts(load_text(base, CPU, v), PROMPTS) for base, v in ((folder, "fp16"), (tiny_sdxl, None))]
    torch.testing.assert_close(embeds[0].embeds, embeds[1].embeds, rtol=0.01, atol=0.01)
    assert fingerprint(folder, variant="fp16") != fingerprint(tiny_sdxl)
    with pytest.raises(InvdpoError, match="`unet` holds no plain weights, but `variant: fp16`. Set `variant` so"):
        load_unet(folder, CPU)


def test_a_unet_of_the_other_family_is_refused(tiny_base: Path, tiny_sdxl: Path, tiny_study: MakeStudy) -> None:
    with pytest.raises(InvdpoError, match=r"SD1.5 family and reads token embeddings of 16 numbers and no pool.*of 40"):
        load_unet(tiny_base, CPU, base=tiny_sdxl)
    with pytest.raises(InvdpoError, match=r"SDXL family and reads .* a pooled embedding of 12, but .* give .* of 16"):
        load_unet(tiny_sdxl, CPU, base=tiny_base)
    check_fits(tiny_sdxl, tiny_sdxl)
    check_fits(tiny_base, tiny_base)


def test_a_base_put_together_from_both_families_never_trains(
    tmp_path: Path, tiny_base: Path, tiny_sdxl: Path, tiny_study: MakeStudy
) -> None:
    mixed = shutil.copytree(tiny_sdxl, tmp_path / "mixed")
    shutil.rmtree(mixed / "unet")
    shutil.copytree(tiny_base / "unet", mixed / "unet")
    study = tiny_study(base=str(mixed))
    prepare(study, CPU)
    with pytest.raises(InvdpoError, match="The UNet of .*mixed.* is of the SD1.5 family"):
        train(study, "dpo", [0], CPU)


def test_a_unet_that_does_not_denoise_the_codec_s_latents_is_refused(
    tmp_path: Path, tiny_base: Path, tiny_study: MakeStudy
) -> None:
    check_codec(tiny_base)
    base = shutil.copytree(tiny_base, tmp_path / "inpainting")
    change(base / "unet" / "config.json", in_channels=9)
    with pytest.raises(InvdpoError, match="reads 9 channels and gives 4, .*`base: .*inpainting` makes latents of 4"):
        prepare(tiny_study(base=str(base)), CPU)
    codec = shutil.copytree(tiny_base / "vae", tmp_path / "codec")
    change(codec / "config.json", latent_channels=16)
    with pytest.raises(InvdpoError, match="reads 4 channels and gives 4, but the codec of `vae: .*codec` makes .* 16"):
        prepare(tiny_study(vae=str(codec)), CPU)


def test_a_codec_of_another_scale_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    codec = shutil.copytree(tiny_base / "vae", tmp_path / "codec")
    change(codec / "config.json", scaling_factor=0.13025)
    with pytest.raises(InvdpoError, match="`vae: .*codec` multiplies its latents by 0.13025 .*, the .* by 0.18215"):
        load_vae(tiny_base, CPU, str(codec))
    base = shutil.copytree(tiny_base, tmp_path / "base")
    change(base / "vae" / "config.json", scaling_factor=0.13025)
    assert load_vae(base, CPU, str(codec)).config["scaling_factor"] == 0.13025
    drop(codec / "config.json", "scaling_factor")
    assert load_vae(tiny_base, CPU, str(codec)).config["scaling_factor"] == 0.18215, "as SD1.5's codec, which says none"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet", "cross_attention_dim"),
        ("unet", "projection_class_embeddings_input_dim"),
        ("unet", "in_channels"),
        ("vae", "latent_channels"),
        ("text_encoder", "hidden_size"),
        ("text_encoder_2", "projection_dim"),
    ],
)
def test_a_setting_that_a_configuration_lacks_is_named(name: str, key: str, tmp_path: Path, tiny_sdxl: Path) -> None:
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    drop(base / name / "config.json", key)
    with pytest.raises(InvdpoError, match=f"^`base: .*base`: `{name}/config.json` lacks `{key}`, .* Fetch it again"):
        check_fits(base, base)
        check_codec(base)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "^`base: .*`: `model_index.json` holds a list and no settings. Fetch it again"),
        ({"unet": [], "vae": [None]}, "is a None with . Needed is a pipeline of the Stable Diffusion"),
    ],
)
def test_an_index_without_parts_is_refused(index: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvdpoError, match=message):
        text_parts(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_and_unexpected_weights_are_named(tmp_path: Path, tiny_base: Path, part: str) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = next(iter(tensors))
    save_file({"extra.weight": tensors.pop(lost)} | tensors, path, metadata={"format": "pt"})
    load: dict[str, Callable[[], object]] = {
        "unet": lambda: load_unet(folder, CPU),
        "vae": lambda: load_vae(folder, CPU),
        "text_encoder": lambda: load_text(folder, CPU),
    }
    with pytest.raises(InvdpoError, match="1 missing keys .* and 1 unexpected keys .*extra.weight") as raised:
        load[part]()
    assert lost.split(".")[-2] in str(raised.value)


def test_files_of_older_libraries_are_complete(tmp_path: Path, tiny_sdxl: Path) -> None:
    """Names as in the files on the hub: transformers before 5 and diffusers before 0.15 wrote SD1.5's and SDXL's."""
    folder, noise = shutil.copytree(tiny_sdxl, tmp_path / "base"), torch.randn(1, 3, 32, 32)
    for part in ("text_encoder", "text_encoder_2"):
        path = folder / part / "model.safetensors"
        old = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
        if "text_model.text_projection.weight" in old:
            old["text_projection.weight"] = old.pop("text_model.text_projection.weight")
        old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(old, path, metadata={"format": "pt"})
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(path)
    for new, old_name in names.items():
        tensors = {key.replace(new, old_name): value for key, value in tensors.items()}
    assert any("query" in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    found, expected = (encode_prompts(load_text(base, CPU), PROMPTS) for base in (folder, tiny_sdxl))
    assert torch.equal(found.embeds, expected.embeds)
    assert found.pooled is not None and expected.pooled is not None and torch.equal(found.pooled, expected.pooled)
    means = [encode_images(load_vae(base, CPU), noise)[0] for base in (folder, tiny_sdxl)]
    assert torch.equal(*means)


def test_a_tokenizer_runs_no_code_whatever_is_answered(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    plant(tmp_path / "base" / "tokenizer", tmp_path / "ran")
    shutil.copy(tmp_path / "base" / "tokenizer" / "foreign.py", tmp_path / "base")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InvdpoError, match="^`base: .*`: tokenizer of .*/base is made by Python code of its own"):
        load_text(tmp_path / "base", CPU)
    assert not (tmp_path / "ran").exists()


def test_weights_as_pickles_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    load_unet(folder, CPU)
    weights.unlink()
    with pytest.raises(InvdpoError, match="pickle only .*can run any code"):
        load_unet(folder, CPU)


def test_pickles_of_the_hub_are_refused_by_their_listing(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.bin")
    hub.add_folder("some/base", folder)
    load: dict[str, Callable[[], object]] = {
        "unet": lambda: load_unet("some/base", CPU),
        "text_encoder": lambda: load_text("some/base", CPU),
    }
    for part, loader in load.items():
        with pytest.raises(InvdpoError, match=f"`base: some/base`: `{part}` holds its weights as a pickle only"):
            loader()
    assert all(name.endswith(".json") for name in hub.whole()), "nothing but configurations was fetched"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_parts_of_quantised_networks_are_refused(tmp_path: Path, tiny_base: Path, part: str) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path, metadata={"format": "pt"})
    load: dict[str, Callable[[], object]] = {
        "unet": lambda: load_unet(folder, CPU),
        "vae": lambda: load_vae(folder, CPU),
        "text_encoder": lambda: load_text(folder, CPU),
    }
    with pytest.raises(InvdpoError, match=rf"{part}/{path.name} stores {name} as I8. Weights must be F16, BF16, F32"):
        load[part]()


def test_a_model_that_predicts_velocity_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(InvdpoError, match="prediction_type is 'v_prediction'"):
        load_schedule(folder)


def test_pipelines_of_other_kinds_are_refused(tmp_path: Path, tiny_sdxl: Path) -> None:
    refiner = shutil.copytree(tiny_sdxl, tmp_path / "refiner")
    change(refiner / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(InvdpoError, match="StableDiffusionXLPipeline with .*Needed is a pipeline of the Stable"):
        load_text(refiner, CPU)


@pytest.mark.parametrize(
    ("repository", "said"),
    [
        ("some/gated", "the model some/gated of the hub is gated. Accept its terms.*hf auth login.*a local copy"),
        ("some/missing", "there is no some/missing here, and the hub has no model some/missing.*a local copy"),
        ("some/empty", "the model some/empty of the hub has no file model_index.json.*a local copy"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(hub: Hub, repository: str, said: str) -> None:
    hub.repos["some/empty"] = {}
    hub.refused["some/gated"] = (403, "GatedRepo")
    with pytest.raises(InvdpoError, match=f"`base: {repository}`: .*{said}"):
        load_text(repository, CPU)


def test_an_unreachable_hub_is_told_from_a_missing_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InvdpoError, match="the hub cannot be reached .*, and its cache has no vae/config.json"):
        load_vae("some/base", CPU)
    with pytest.raises(
        InvdpoError, match="`vae: some/codec`: there is no some/codec here, and the hub cannot be reached"
    ):
        load_vae("some/base", CPU, "some/codec")


def drop(path: Path, key: str) -> None:
    """Remove a value of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    del content[key]
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    """Replace values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
