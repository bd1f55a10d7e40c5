"""The scorers on small random models saved in the hub's layouts: values, layouts, versions, errors."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_code import plant
from hub_stub import Hub
from PIL import Image
from torch.nn.functional import normalize

from invdpo.config import ScorersConfig
from invdpo.errors import InvdpoError
from invdpo.scorers import build_scorers, looks
from invdpo.scorers.aesthetic import LAYERS, AestheticHead, AestheticScore
from invdpo.scorers.clip import ClipScore
from invdpo.scorers.hps import HumanPreferenceScore
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.oracle import OracleScore
from invdpo.scorers.pickscore import PickScore
from invdpo.scorers.pictures import Pictures, prepare
from invdpo.scorers.weights import loading

CPU = torch.device("cpu")
WORDS = ["a", "red", "blue", "circle", "square", "left", "of"]
PROMPTS = ["a red circle", "a blue square left of a red circle", "a zebra"]
SIDE, LENGTH, WIDTH = 32, 12, 16


def word_tokenizer() -> Any:
    """A tokenizer of a few words; <end> has the largest id because open_clip pools there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<start>", *WORDS, "<end>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<start> $A <end>",
        special_tokens=[(token, vocabulary[token]) for token in ("<start>", "<end>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=LENGTH,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    )


def save_open_clip(folder: Path, seed: int) -> Path:
    import open_clip
    from open_clip.factory import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    config: dict[str, Any] = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": len(tokenizer),
            "width": 16,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "self",
        },
    }
    model = open_clip.CLIP(**config)
    set_model_preprocess_cfg(
        model,
        {
            "size": SIDE,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    )
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("open_clip"), seed=0)


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pickscore")
    tokenizer = word_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def head_weights(width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    widths = [width, 8, 7, 6, 5, 1]
    weights = {}
    for layer, (before, after) in zip(LAYERS, pairwise(widths), strict=True):
        weights[f"layers.{layer}.weight"] = torch.randn(after, before, generator=generator)
        weights[f"layers.{layer}.bias"] = torch.randn(after, generator=generator)
    return weights


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    torch.save(head_weights(), tmp_path / "head.pth")
    return tmp_path / "head.pth"


def pictures(count: int = 3, side: int = SIDE) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def as_pixels(image: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
    """What any of the preprocessings must give for a picture that needs no resizing: (3, H, W)."""
    values = (np.asarray(image) / 255 - np.array(mean)) / np.array(std)
    return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)


def test_clip_is_the_cosine_of_the_two_towers(open_clip_folder: Path) -> None:
    import open_clip

    name = f"local-dir:{open_clip_folder}"
    found = ClipScore(OpenClip(name, CPU)).score(pictures(), PROMPTS)["clip"]
    model = open_clip.create_model(name)
    model.eval()
    start, end, unknown = 2, 3 + len(WORDS), 1
    rows = [[start, *(WORDS.index(w) + 3 if w in WORDS else unknown for w in p.split()), end] for p in PROMPTS]
    tokens = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    pixels = torch.stack([as_pixels(image, [0.5] * 3, [0.5] * 3) for image in pictures()])
    with torch.no_grad():
        expected = torch.cosine_similarity(model.encode_image(pixels), model.encode_text(tokens))  # pyright: ignore
    assert found.shape == (3,) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_hps_checkpoint_takes_the_place_of_the_weights(open_clip_folder: Path, tmp_path: Path) -> None:
    import open_clip

    other = save_open_clip(tmp_path / "other", seed=5)
    state = open_clip.create_model(f"local-dir:{other}").state_dict()
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "hps.pt")
    name = f"local-dir:{open_clip_folder}"
    found = HumanPreferenceScore(OpenClip(name, CPU, checkpoint=tmp_path / "hps.pt"))
    expected = HumanPreferenceScore(OpenClip(f"local-dir:{other}", CPU))
    plain = HumanPreferenceScore(OpenClip(name, CPU))
    np.testing.assert_array_equal(found.score(pictures(), PROMPTS)["hps"], expected.score(pictures(), PROMPTS)["hps"])
    assert np.abs(plain.score(pictures(), PROMPTS)["hps"] - found.score(pictures(), PROMPTS)["hps"]).max() > 1e-3
    assert len({found.version, expected.version, plain.version}) == 3


def test_pickscore_is_the_cosine_unscaled_and_scaled(pick_folder: Path) -> None:
    from transformers import CLIPModel

    found = PickScore(str(pick_folder), CPU).score(pictures(), PROMPTS)
    model = CLIPModel.from_pretrained(pick_folder).eval()
    start, end, unknown = 2, 3 + len(WORDS), 1
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    values = zip(found["pickscore"], found["pickscore_scaled"], strict=True)
    for image, prompt, (value, scaled) in zip(pictures(), PROMPTS, values, strict=True):
        ids = [start, *(WORDS.index(w) + 3 if w in WORDS else unknown for w in prompt.split()), end]
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([ids]),
                pixel_values=as_pixels(image, mean, std)[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            )
            expected = float(output.logits_per_image)
        assert scaled == pytest.approx(expected, abs=1e-5)
        assert value == pytest.approx(expected / float(model.logit_scale.detach().exp()), abs=1e-6)
        assert abs(scaled) > 5 * abs(value)


def test_long_prompts_are_cut(pick_folder: Path, open_clip_folder: Path) -> None:
    long = " ".join(["red"] * 50)
    longer = " ".join(["red"] * 60)
    for scorer in (PickScore(str(pick_folder), CPU), ClipScore(OpenClip(f"local-dir:{open_clip_folder}", CPU))):
        for scores in scorer.score(pictures(1) * 2, [long, longer]).values():
            assert scores[0] == scores[1]


def test_cut_prompts_are_counted(pick_folder: Path, open_clip_folder: Path) -> None:
    fits = " ".join(["red"] * (LENGTH - 2))  # beside start and end
    for scorer in (PickScore(str(pick_folder), CPU), ClipScore(OpenClip(f"local-dir:{open_clip_folder}", CPU))):
        assert scorer.cut([fits, f"{fits} red", "", f"{fits} red blue", "a zebra"]) == 2


def test_scores_do_not_depend_on_the_batch(pick_folder: Path, open_clip_folder: Path, head_file: Path) -> None:
    name = f"local-dir:{open_clip_folder}"
    for scorer in (
        PickScore(str(pick_folder), CPU),
        ClipScore(OpenClip(name, CPU)),
        AestheticScore(head_file, OpenClip(name, CPU)),
    ):
        together = scorer.score(pictures(), PROMPTS)
        alone = [scorer.score([i], [p]) for i, p in zip(pictures(), PROMPTS, strict=True)]
        backwards = scorer.score(pictures()[::-1], PROMPTS[::-1])
        for name, values in together.items():
            np.testing.assert_allclose(values, [row[name][0] for row in alone], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(values, backwards[name][::-1], rtol=1e-5, atol=1e-5)


def test_aesthetic_is_affine_in_the_unit_embedding(open_clip_folder: Path, head_file: Path) -> None:
    scorer = AestheticScore(head_file, OpenClip(f"local-dir:{open_clip_folder}", CPU))
    embeddings = normalize(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)
    weights = head_weights()
    matrix, bias = torch.eye(WIDTH), torch.zeros(WIDTH)
    for layer in LAYERS:
        matrix = weights[f"layers.{layer}.weight"] @ matrix
        bias = weights[f"layers.{layer}.weight"] @ bias + weights[f"layers.{layer}.bias"]
    torch.testing.assert_close(scorer.head(embeddings), (embeddings @ matrix.T + bias)[:, 0], rtol=1e-4, atol=1e-3)
    unit = scorer.tower.embed_images(pictures())
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3))
    np.testing.assert_allclose(scorer.score(pictures(), PROMPTS)["aesthetic"], scorer.head(unit).numpy(), atol=1e-5)


@pytest.fixture
def scorer_hub(hub: Hub, open_clip_folder: Path, pick_folder: Path, tmp_path: Path) -> Hub:
    """A hub with a model of each kind, and a head and a checkpoint as files of one repository."""
    import open_clip

    hub.add_folder("owner/clip", open_clip_folder)
    config = hub.repos["owner/clip"]["open_clip_config.json"]
    hub.repos["owner/clip"]["open_clip_config.json"] = config.replace(
        b'"self"', b'"owner/clip"'
    )  # its tokenizer's place
    hub.add_folder("owner/pick", pick_folder)
    state = open_clip.create_model(f"local-dir:{open_clip_folder}").state_dict()
    torch.save({"state_dict": {name: value + 1 for name, value in state.items()}}, tmp_path / "hps.pt")
    torch.save(head_weights(), tmp_path / "head.pth")
    files = {"folder/head.pth": tmp_path / "head.pth", "hps.pt": tmp_path / "hps.pt"}
    hub.repos["owner/files"] = {name: path.read_bytes() for name, path in files.items()}
    return hub


def hub_scorers(open_clip_folder: Path) -> ScorersConfig:
    return ScorersConfig.model_validate(
        {
            "pickscore": {"model": "owner/pick"},
            "clip": {"model": "hf-hub:owner/clip"},
            "aesthetic": {"model": "owner/files/folder/head.pth", "tower": f"local-dir:{open_clip_folder}"},
            "hps": {"model": f"local-dir:{open_clip_folder}", "checkpoint": "owner/files/hps.pt"},
        }
    )


def test_scorers_of_the_hub_are_those_of_local_copies(
    scorer_hub: Hub, open_clip_folder: Path, pick_folder: Path, tmp_path: Path
) -> None:
    there = build_scorers(hub_scorers(open_clip_folder), CPU)
    name = f"local-dir:{open_clip_folder}"
    here = [
        PickScore(str(pick_folder), CPU),
        ClipScore(OpenClip(name, CPU)),
        AestheticScore(tmp_path / "head.pth", OpenClip(name, CPU)),
        HumanPreferenceScore(OpenClip(name, CPU, checkpoint=tmp_path / "hps.pt")),
    ]
    assert [scorer.version for scorer in there] == [scorer.version for scorer in here]
    for one, other in zip(there, here, strict=True):
        for name, values in one.score(pictures(), PROMPTS).items():
            np.testing.assert_array_equal(values, other.score(pictures(), PROMPTS)[name])


def test_looking_for_scorers_fetches_nothing_and_names_what_is_not_there(
    scorer_hub: Hub, open_clip_folder: Path
) -> None:
    config = hub_scorers(open_clip_folder)
    found = {(file.repo, file.name): file for look in looks(config) for file in look()}
    assert {name for _, name in found} >= {
        "folder/head.pth",
        "hps.pt",
        "model.safetensors",
        "open_clip_model.safetensors",
    }
    assert found["owner/files", "hps.pt"].size == len(scorer_hub.repos["owner/files"]["hps.pt"])
    assert all(file.path is None for file in found.values()) and not scorer_hub.sent()

    scorer_hub.repos["owner/files"].clear()
    scorer_hub.repos["owner/pick"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    scorer_hub.gated.add("owner/clip")
    words = []
    for look in looks(config):
        try:
            look()
        except InvdpoError as error:
            words.append(str(error))
    expected = (
        "`scorers.pickscore.model: owner/pick`: the hub's repository has no weights in safetensors",
        "scorers.clip.model: the model owner/clip of the hub is gated",
        "`scorers.aesthetic.model: owner/files/folder/head.pth`: the model owner/files of the hub has no file",
        "`scorers.hps.checkpoint: owner/files/hps.pt`: the model owner/files of the hub has no file hps.pt",
    )
    assert len(words) == len(expected) and all(map(str.startswith, words, expected)), words


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip": {"model": "ViT-H-41", "pretrained": "x"}}, "open_clip has no architecture ViT-H-41. Did you mean"),
        ({"clip": {"model": "ViT-H-14"}}, "an architecture without weights"),
        ({"clip": {"model": "ViT-H-14", "pretrained": "no.pt"}}, "scorers.clip.model: there is no file no.pt"),
        ({"clip": {"model": "local-dir:no/folder"}}, "scorers.clip.model: there is no folder no/folder"),
        ({"aesthetic": {"model": "no.pth", "tower": "ViT-L-14"}}, "there is no file no.pth.*as owner/name/path/in/it"),
        ({"imagereward": {"checkpoint": "no.pt"}}, "scorers.imagereward.checkpoint: there is no file no.pt"),
        ({"pickscore": {"model": "no/such/folder"}}, "scorers.pickscore.model: there is no folder no/such/folder"),
    ],
)
def test_scorers_that_cannot_be_are_found_without_loading_them(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvdpoError, match=message):
        for look in looks(ScorersConfig.model_validate(config)):
            look()


def test_a_head_of_the_hub_runs_no_code(hub: Hub, tmp_path: Path) -> None:
    class Unsafe:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"layers.0.weight": Unsafe()}, tmp_path / "head.pth")
    hub.repos["owner/files"] = {"head.pth": (tmp_path / "head.pth").read_bytes()}
    with pytest.raises(InvdpoError, match="scorers.aesthetic.model: cannot load owner/files/head.pth"):
        AestheticHead("owner/files/head.pth", CPU)
    assert not (tmp_path / "ran").exists()


def test_processors_of_pickscore_run_no_code(
    pick_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside a config.json of CLIP its own classes would be taken anyway.
    shutil.copytree(pick_folder, tmp_path / "processor", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    plant(tmp_path / "processor", tmp_path / "ran")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InvdpoError, match="scorers.pickscore.processor: a part of .*/processor is made by Python code"):
        PickScore(str(pick_folder), CPU, processor=str(tmp_path / "processor"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("settings", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}])
def test_tokenizers_of_open_clip_run_no_code(
    settings: dict[str, Any], open_clip_folder: Path, scorer_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(open_clip_folder, folder)
    plant(folder, tmp_path / "ran")
    set_text(folder, settings | {"hf_tokenizer_name": "owner/clip"})
    scorer_hub.repos["owner/clip"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for model in (f"local-dir:{folder}", "hf-hub:owner/clip"):
        with pytest.raises(InvdpoError, match=r"scorers.clip.model: .*clip is made by Python code of its own"):
            OpenClip(model, CPU)
    assert not (tmp_path / "ran").exists()
    if settings:
        with pytest.raises(InvdpoError, match="scorers.clip.model: .*clip is made by Python code of its own"):
            looks(ScorersConfig.model_validate({"clip": {"model": f"local-dir:{folder}"}}))[0]()


def test_text_towers_of_open_clip_run_no_code(
    open_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tower = tmp_path / "clip", tmp_path / "tower"
    shutil.copytree(open_clip_folder, folder)
    set_text(folder, {"hf_model_name": str(tower)})
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "foreign.Foreign"}}))
    (tower / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InvdpoError, match="scorers.clip.model: .*clip is made by Python code of its own"):
        OpenClip(f"local-dir:{folder}", CPU)
    assert not (tmp_path / "ran").exists()


def set_text(folder: Path, settings: dict[str, Any]) -> None:
    """Settings of the text tower in the configuration of an open_clip folder."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= settings
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_gpu_that_is_out_of_memory_is_no_broken_file(full: RuntimeError) -> None:
    def load() -> None:
        raise full

    with pytest.raises(type(full)) as caught:
        loading("scorers.clip.model", "owner/clip", load)
    assert caught.value is full


def test_laion_head_if_there() -> None:
    path = Path(__file__).parents[3] / "shared/data/sac+logos+ava1-l14-linearMSE.pth"
    if not path.is_file():
        pytest.skip("LAION's aesthetic head is not beside the checkout")
    head = AestheticHead(path, CPU)
    bias = head(torch.zeros(1, head.width))
    slope = head(torch.eye(head.width)) - bias
    assert head.width == 768
    assert float(bias) == pytest.approx(5.23665, abs=1e-4)
    assert float(slope.norm()) == pytest.approx(17.9956, abs=1e-3)


def test_versions_name_the_weights(open_clip_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(open_clip_folder, copy)
    first = ClipScore(OpenClip(f"local-dir:{open_clip_folder}", CPU)).version
    assert ClipScore(OpenClip(f"local-dir:{copy}", CPU)).version == first
    assert first.startswith("clip:") and first.endswith(":shortest-bicubic-32")
    assert ClipScore(OpenClip(f"local-dir:{save_open_clip(tmp_path / 'other', seed=9)}", CPU)).version != first


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PickScore("assets/no/such/model", CPU), "scorers.pickscore.model: .*assets/no/such/model"),
        (lambda: ClipScore(OpenClip("local-dir:no/folder", CPU)), "scorers.clip.model: .*no/folder"),
        (lambda: ClipScore(OpenClip("ViT-B-32", CPU)), "scorers.clip.model: .*without weights"),
        (lambda: ClipScore(OpenClip("ViT-B-32", CPU, pretrained="no.pt")), "scorers.clip.model: .*no.pt"),
        (
            lambda: OpenClip("ViT-B-32", CPU, checkpoint="no.pt", field="scorers.hps.model"),
            "scorers.hps.checkpoint: .*no.pt",
        ),
        (lambda: AestheticHead("no.pth", CPU), "scorers.aesthetic.model: .*no.pth"),
        (lambda: OracleScore("atlantis"), "scorers.oracle.world: .*atlantis"),
    ],
)
def test_missing_weights_name_field_and_path(build: Any, message: str) -> None:
    with pytest.raises(InvdpoError, match=message):
        build()


def test_folders_without_weights_are_not_random_models(
    open_clip_folder: Path, pick_folder: Path, tmp_path: Path
) -> None:
    for source, name in ((open_clip_folder, "clip"), (pick_folder, "pick")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InvdpoError, match="holds no weights"):
        ClipScore(OpenClip(f"local-dir:{tmp_path / 'clip'}", CPU))
    with pytest.raises(InvdpoError, match="scorers.pickscore.model"):
        PickScore(str(tmp_path / "pick"), CPU)


def test_broken_weights_are_said_to_be_broken(open_clip_folder: Path, pick_folder: Path, tmp_path: Path) -> None:
    for source, name in ((open_clip_folder, "clip"), (pick_folder, "pick")):
        shutil.copytree(source, tmp_path / name)
        for weights in (tmp_path / name).glob("*.safetensors"):
            weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InvdpoError, match="scorers.clip.model: cannot load"):
        ClipScore(OpenClip(f"local-dir:{tmp_path / 'clip'}", CPU))
    with pytest.raises(InvdpoError, match="scorers.pickscore.model: cannot load"):
        PickScore(str(tmp_path / "pick"), CPU)


def test_bad_aesthetic_heads(open_clip_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(InvdpoError, match="is not an aesthetic head"):
        AestheticHead(path, CPU)
    torch.save({**head_weights(), "layers.4.weight": torch.zeros(6, 9)}, path)
    with pytest.raises(InvdpoError, match="do not follow one another"):
        AestheticHead(path, CPU)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InvdpoError, match="scorers.aesthetic.model: cannot load"):
        AestheticHead(path, CPU)
    torch.save(head_weights(width=24), path)
    with pytest.raises(InvdpoError, match="embeds images in 16 dimensions"):
        AestheticScore(path, OpenClip(f"local-dir:{open_clip_folder}", CPU))


def test_oracle_passes_on_what_the_world_says(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = OracleScore("shapes")
    answers = {"utility": 2.0, "sg_iou": 0.5, "entity_iou": 1.0, "relation_iou": float("nan")}
    monkeypatch.setattr(oracle.oracle, "score", lambda image, prompt: answers)
    scores = oracle.score(pictures(2), ["x", "y"])
    assert {name: value.tolist() for name, value in scores.items() if name != "oracle_relation_iou"} == {
        "oracle_utility": [2.0, 2.0],
        "oracle_sg_iou": [0.5, 0.5],
        "oracle_entity_iou": [1.0, 1.0],
    }
    assert np.isnan(scores["oracle_relation_iou"]).all()


def test_oracle_refuses_prompts_of_no_world() -> None:
    with pytest.raises(InvdpoError, match="scorers.oracle: .*a photo of my dog"):
        OracleScore("shapes").score(pictures(1, side=64), ["a photo of my dog"])


def all_scorers(open_clip_folder: Path, pick_folder: Path, head_file: Path) -> ScorersConfig:
    name = f"local-dir:{open_clip_folder}"
    return ScorersConfig.model_validate(
        {
            "pickscore": {"model": str(pick_folder)},
            "clip": {"model": name},
            "aesthetic": {"model": str(head_file), "tower": name},
            "hps": {"model": name, "preprocessing": "authors", "version": "v2.1"},
            "oracle": {"world": "shapes"},
        }
    )


def test_build_scorers_builds_what_is_named(open_clip_folder: Path, pick_folder: Path, head_file: Path) -> None:
    built = build_scorers(all_scorers(open_clip_folder, pick_folder, head_file), CPU)
    assert [scorer.version.split(":")[0] for scorer in built] == ["pickscore", "clip", "aesthetic", "hpsv2.1", "oracle"]
    assert [scorer.version.split(":")[2] for scorer in built] == [
        *["shortest-bicubic-32"] * 3,
        "authors-longest-bicubic-antialiased-32",
        "shapes",
    ]
    assert build_scorers(ScorersConfig.model_validate({}), CPU) == []


def test_scorers_of_one_tower_share_its_pass(open_clip_folder: Path, pick_folder: Path, head_file: Path) -> None:
    config = all_scorers(open_clip_folder, pick_folder, head_file)
    _, clip, aesthetic, hps, _ = build_scorers(config, CPU)
    assert isinstance(clip, ClipScore) and isinstance(aesthetic, AestheticScore)
    assert isinstance(hps, HumanPreferenceScore)
    passes: list[int] = []
    for tower in {clip.tower, aesthetic.tower, hps.tower}:
        tower.model.visual.register_forward_hook(lambda *arguments: passes.append(len(arguments[1][0])))

    def scores(images: list[Image.Image]) -> list[np.ndarray]:
        return [value for scorer in (clip, aesthetic, hps) for value in scorer.score(images, PROMPTS).values()]

    apart = scores(pictures(side=48))
    assert passes == [3, 3, 3]
    shared = scores(Pictures(pictures(side=48)))
    assert passes == [3] * 5  # clip and aesthetic have one preprocessing, hps another
    np.testing.assert_array_equal(shared, apart)
    assert np.abs(np.array(scores(Pictures(pictures(side=48)[::-1]))) - apart).max() > 1e-3  # nothing of old pictures


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (37, 61), (90, 41), (20, 33), (32, 70)])
def test_a_resize_that_is_shared_changes_no_pixel(
    open_clip_folder: Path, pick_folder: Path, size: tuple[int, int]
) -> None:
    import open_clip
    from transformers import CLIPProcessor

    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
    pick, clip = PickScore(str(pick_folder), CPU), OpenClip(f"local-dir:{open_clip_folder}", CPU)
    made = prepare(image, [pick.preprocessing, clip.preprocessing])
    *_, transform = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    assert torch.equal(made[clip.preprocessing], transform(image))  # pyright: ignore
    processor = CLIPProcessor.from_pretrained(pick_folder, backend="pil")
    assert torch.equal(made[pick.preprocessing], processor(images=image, return_tensors="pt")["pixel_values"][0])


def test_the_authors_preprocessing_sees_the_whole_picture(open_clip_folder: Path) -> None:
    def pixels(kind: Any, image: Image.Image) -> torch.Tensor:
        tower = OpenClip(f"local-dir:{open_clip_folder}", CPU, preprocessing=kind)
        return prepare(image, [tower.preprocessing])[tower.preprocessing]

    (plain,) = pictures(1)
    for kind in ("authors", "authors_aliased"):  # nothing to resize: nothing to differ in
        torch.testing.assert_close(pixels(kind, plain), pixels("open_clip", plain), rtol=0, atol=1e-6)
    wide = Image.new("RGB", (128, 64), "white")  # the statistics are 0.5: white is 1, black is -1
    found = pixels("authors", wide)
    assert found.shape == (3, SIDE, SIDE)
    assert (found[:, : SIDE // 4] == -1).all() and (found[:, -SIDE // 4 :] == -1).all()
    torch.testing.assert_close(found[:, SIDE // 4 : -SIDE // 4], torch.ones(3, SIDE // 2, SIDE))
    assert (pixels("open_clip", wide) == 1).all()
    (large,) = pictures(1, side=4 * SIDE)
    smooth, rough = pixels("authors", large).std(), pixels("authors_aliased", large).std()
    assert rough > 1.5 * smooth
    torch.testing.assert_close(pixels("authors", large), pixels("open_clip", large), rtol=0, atol=0.02)
    assert pixels("authors", Image.new("RGB", (500, 1))).shape == (3, SIDE, SIDE)
