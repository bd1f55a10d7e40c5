"""The scorers on small random models saved in the hub's layouts: values, layouts, versions, errors."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from invdpo.errors import InvdpoError
from invdpo.scorers import build_scorers
from invdpo.scorers.aesthetic import LAYERS, AestheticHead, AestheticScore
from invdpo.scorers.clip import ClipScore
from invdpo.scorers.hps import HumanPreferenceScore
from invdpo.scorers.oracle import OracleScore
from invdpo.scorers.pickscore import PickScore

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
    found = ClipScore(name, CPU).score(pictures(), PROMPTS)["clip"]
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
    found = HumanPreferenceScore(name, CPU, checkpoint=tmp_path / "hps.pt")
    expected = HumanPreferenceScore(f"local-dir:{other}", CPU)
    plain = HumanPreferenceScore(name, CPU)
    np.testing.assert_array_equal(found.score(pictures(), PROMPTS)["hps"], expected.score(pictures(), PROMPTS)["hps"])
    assert np.abs(plain.score(pictures(), PROMPTS)["hps"] - found.score(pictures(), PROMPTS)["hps"]).max() > 1e-3
    assert len({found.version, expected.version, plain.version}) == 3


def test_pickscore_is_the_unscaled_cosine(pick_folder: Path) -> None:
    from transformers import CLIPModel

    found = PickScore(str(pick_folder), CPU).score(pictures(), PROMPTS)["pickscore"]
    model = CLIPModel.from_pretrained(pick_folder).eval()
    start, end, unknown = 2, 3 + len(WORDS), 1
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for image, prompt, value in zip(pictures(), PROMPTS, found, strict=True):
        ids = [start, *(WORDS.index(w) + 3 if w in WORDS else unknown for w in prompt.split()), end]
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([ids]),
                pixel_values=as_pixels(image, mean, std)[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            )
            expected = float(output.logits_per_image / model.logit_scale.exp())
        assert value == pytest.approx(expected, abs=1e-6)


def test_long_prompts_are_cut(pick_folder: Path, open_clip_folder: Path) -> None:
    long = " ".join(["red"] * 50)
    longer = " ".join(["red"] * 60)
    for scorer in (PickScore(str(pick_folder), CPU), ClipScore(f"local-dir:{open_clip_folder}", CPU)):
        (scores,) = scorer.score(pictures(1) * 2, [long, longer]).values()
        assert scores[0] == scores[1]


def test_scores_do_not_depend_on_the_batch(pick_folder: Path, open_clip_folder: Path, head_file: Path) -> None:
    name = f"local-dir:{open_clip_folder}"
    for scorer in (
        PickScore(str(pick_folder), CPU),
        ClipScore(name, CPU),
        AestheticScore(head_file, CPU, tower=name),
    ):
        (together,) = scorer.score(pictures(), PROMPTS).values()
        alone = [next(iter(scorer.score([i], [p]).values()))[0] for i, p in zip(pictures(), PROMPTS, strict=True)]
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_aesthetic_is_affine_in_the_unit_embedding(open_clip_folder: Path, head_file: Path) -> None:
    scorer = AestheticScore(head_file, CPU, tower=f"local-dir:{open_clip_folder}")
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
    first = ClipScore(f"local-dir:{open_clip_folder}", CPU).version
    assert ClipScore(f"local-dir:{copy}", CPU).version == first
    assert first.startswith("clip:") and first.endswith(":shortest-bicubic-32")
    assert ClipScore(f"local-dir:{save_open_clip(tmp_path / 'other', seed=9)}", CPU).version != first


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PickScore("assets/no/such/model", CPU), "scorers.pickscore.model: .*assets/no/such/model"),
        (lambda: ClipScore("local-dir:no/folder", CPU), "scorers.clip.model: .*no/folder"),
        (lambda: ClipScore("ViT-B-32", CPU), "scorers.clip.model: .*without weights"),
        (lambda: ClipScore("ViT-B-32", CPU, pretrained="no.pt"), "scorers.clip.model: .*no.pt"),
        (
            lambda: HumanPreferenceScore("ViT-B-32", CPU, checkpoint="no.pt"),
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
        ClipScore(f"local-dir:{tmp_path / 'clip'}", CPU)
    with pytest.raises(InvdpoError, match="scorers.pickscore.model"):
        PickScore(str(tmp_path / "pick"), CPU)


def test_broken_weights_are_said_to_be_broken(open_clip_folder: Path, pick_folder: Path, tmp_path: Path) -> None:
    for source, name in ((open_clip_folder, "clip"), (pick_folder, "pick")):
        shutil.copytree(source, tmp_path / name)
        for weights in (tmp_path / name).glob("*.safetensors"):
            weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InvdpoError, match="scorers.clip.model: cannot load"):
        ClipScore(f"local-dir:{tmp_path / 'clip'}", CPU)
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
        AestheticScore(path, CPU, tower=f"local-dir:{open_clip_folder}")


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


def test_build_scorers_builds_what_is_named(open_clip_folder: Path, pick_folder: Path, head_file: Path) -> None:
    name = f"local-dir:{open_clip_folder}"
    scorers = SimpleNamespace(
        pickscore=SimpleNamespace(model=str(pick_folder), processor=None),
        clip=None,
        aesthetic=SimpleNamespace(model=str(head_file), tower=name, pretrained=None),
        hps=SimpleNamespace(model=name, pretrained=None, checkpoint=None),
        oracle=SimpleNamespace(world="shapes"),
    )
    built = build_scorers(scorers, CPU)  # pyright: ignore[reportArgumentType]
    assert [scorer.version.split(":")[0] for scorer in built] == ["pickscore", "aesthetic", "hps", "oracle"]
