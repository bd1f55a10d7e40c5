"""The learned judges of the shapes world, each in the format of the scorer it stands for.

clip: an open_clip folder, trained contrastively on the corpus. pickscore: a transformers CLIPModel folder, trained
contrastively and then on votes (Bradley-Terry, as PickScore is). hps: the clip, trained further on other votes: the
held-out preference model. aesthetic: LAION's five linear layers on the clip's image embedding.
"""

# transformers and open_clip annotate their outputs as unions with tuples, and modules as tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from invdpo.world.corpus import Corpus, to_unit
from invdpo.world.fitting import fit, random_batches
from invdpo.world.oracle import aesthetics
from invdpo.world.parser import read_picture
from invdpo.world.tokenizer import CONTEXT, build_tokenizer

WIDTH, LAYERS, HEADS = 64, 3, 4
EMBEDDING = 64
BATCH = 128

Encoder = Callable[[Tensor], Tensor]


def _open_clip_config() -> dict[str, Any]:
    return {
        "embed_dim": EMBEDDING,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": WIDTH,
            "layers": LAYERS,
            "head_width": WIDTH // HEADS,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(build_tokenizer()),
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "hf_tokenizer_name": "self",
        },
    }


def new_open_clip(seed: int) -> nn.Module:
    """A small CLIP in open_clip's architecture."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**_open_clip_config())
    preprocessing = {
        "size": 64,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    open_clip.factory.set_model_preprocess_cfg(model, preprocessing)
    return model


def save_open_clip(model: nn.Module, folder: Path) -> None:
    """The hub's open_clip layout: config, safetensors weights, tokenizer."""
    save_for_hf(model, build_tokenizer(), _open_clip_config(), str(folder), safe_serialization=True)


def load_open_clip(folder: Path) -> nn.Module:
    """The CLIP of a folder that `save_open_clip` wrote."""
    model = open_clip.create_model(f"local-dir:{folder}")
    assert isinstance(model, nn.Module)
    return model


def load_transformers_clip(folder: Path) -> CLIPModel:
    """The CLIP of a folder that `save_transformers_clip` wrote."""
    return CLIPModel.from_pretrained(folder)


def new_transformers_clip(seed: int) -> CLIPModel:
    """A small CLIP in transformers' architecture."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    end = int(tokenizer.eos_token_id)
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPModel(
        CLIPConfig(
            projection_dim=EMBEDDING,
            text_config={**tower, **text},
            vision_config={**tower, "image_size": 64, "patch_size": 8},
        )
    )


def save_transformers_clip(model: CLIPModel, folder: Path) -> None:
    """The hub's transformers layout: model and processor."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(image_processor=images, tokenizer=build_tokenizer()).save_pretrained(folder)
    model.save_pretrained(folder)


def encoders(model: nn.Module) -> tuple[Encoder, Encoder, Callable[[], Tensor]]:
    """(pixels -> unit embedding, tokens -> unit embedding, () -> logit scale) of a CLIP of either library."""
    if isinstance(model, CLIPModel):
        return (
            lambda pixels: nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1),
            lambda tokens: nn.functional.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1),
            lambda: model.logit_scale.exp(),
        )
    return (
        lambda pixels: model.encode_image(pixels, normalize=True),
        lambda tokens: model.encode_text(tokens, normalize=True),
        lambda: model.logit_scale.exp(),
    )


def tokenize(captions: list[str]) -> Tensor:
    """Token ids (n, 24)."""
    return build_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_contrastive(model: nn.Module, corpus: Corpus, steps: int, seed: int, name: str) -> dict[str, Any]:
    """CLIP's symmetric cross-entropy over the pictures and captions of a batch."""
    image_of, text_of, scale = encoders(model)
    tokens = tokenize(corpus.captions)
    draw = random_batches(len(tokens), BATCH, seed)

    def loss(_: int) -> Tensor:
        picked = draw()
        logits = scale() * image_of(to_unit(corpus.pictures[picked])) @ text_of(tokens[picked]).T
        target = torch.arange(len(picked))
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    return fit(model, loss, steps, 1e-3, f"{name}: contrastive")


def pictures_of(votes: pd.DataFrame) -> Tensor:
    """Both pictures of every voted pair, uint8 (n, 2, 3, 64, 64)."""
    both = [
        np.stack([np.asarray(Image.open(io.BytesIO(row[column]))) for column in ("jpg_0", "jpg_1")])
        for _, row in votes.iterrows()
    ]
    return torch.from_numpy(np.stack(both)).permute(0, 1, 4, 2, 3).contiguous()


def train_on_votes(model: nn.Module, votes: pd.DataFrame, steps: int, seed: int, name: str) -> dict[str, Any]:
    """PickScore's loss: cross-entropy of softmax(scale * cosine) over the two pictures, ties as halves."""
    image_of, text_of, scale = encoders(model)
    pictures, tokens = pictures_of(votes), tokenize(votes["caption"].tolist())
    labels = torch.tensor(votes[["label_0", "label_1"]].to_numpy(np.float32))
    draw = random_batches(len(tokens), BATCH // 2, seed)

    def loss(_: int) -> Tensor:
        picked = draw()
        images = image_of(to_unit(pictures[picked].flatten(0, 1))).unflatten(0, (-1, 2))
        logits = scale() * (images * text_of(tokens[picked])[:, None]).sum(-1)
        return nn.functional.cross_entropy(logits, labels[picked])

    return fit(model, loss, steps, 3e-4, f"{name}: votes", averaging=0.99, weight_decay=0.1)


@torch.no_grad()
def vote_accuracy(model: nn.Module, votes: pd.DataFrame) -> float:
    """Share of decided votes whose winner has the higher cosine."""
    image_of, text_of, _ = encoders(model.eval())
    decided = votes[votes["label_0"] != 0.5]
    images = image_of(to_unit(pictures_of(decided).flatten(0, 1))).unflatten(0, (-1, 2))
    cosines = (images * text_of(tokenize(decided["caption"].tolist()))[:, None]).sum(-1)
    right = (cosines[:, 0] > cosines[:, 1]).numpy() == (decided["label_0"] == 1).to_numpy()
    return round(float(right.mean()), 4)


def new_aesthetic_head(width: int, seed: int) -> nn.Sequential:
    """LAION's linear-MSE head: five linear layers with dropout, no activations (improved-aesthetic-predictor)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def ratings(pictures: Tensor, seed: int) -> Tensor:
    """Simulated raters' marks on LAION's scale of 1 to 10 for uint8 pictures (n, 3, 64, 64)."""
    rng = np.random.default_rng(seed)
    marks = [1 + 9 * aesthetics(read_picture(picture)) for picture in pictures.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.clip(np.array(marks) + rng.normal(0, 0.5, len(marks)), 1, 10).astype(np.float32))


def train_aesthetic(clip: nn.Module, pictures: Tensor, steps: int, seed: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """The head on frozen, normalised image embeddings; a tenth of the pictures is held out for the correlation."""
    image_of, _, _ = encoders(clip.eval())
    with torch.no_grad():
        embeddings = torch.cat([image_of(to_unit(part)) for part in pictures.split(256)])
    marks = ratings(pictures, seed)
    held_out = len(marks) // 10
    head = new_aesthetic_head(embeddings.shape[-1], seed).train()
    draw = random_batches(len(marks) - held_out, 256, seed)

    def loss(_: int) -> Tensor:
        picked = draw() + held_out
        return (head(embeddings[picked]).squeeze(-1) - marks[picked]).square().mean()

    facts = fit(head, loss, steps, 1e-3, "aesthetic")
    with torch.no_grad():
        predicted = head.eval()(embeddings[:held_out]).squeeze(-1)
    correlation = float(torch.corrcoef(torch.stack([predicted, marks[:held_out]]))[0, 1])
    return head, {**facts, "held_out_correlation": round(correlation, 4)}


def save_aesthetic(head: nn.Sequential, path: Path) -> None:
    """The real head's file format: a state dict with keys layers.0 ... layers.7."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, path)
