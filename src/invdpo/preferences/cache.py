"""Pairs encoded once: what the VAE and the text encoder give never changes during training."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done, write_json
from invdpo.preferences.reader import Counts, Pair, check_columns, find_files, read_pairs
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from PIL import Image

    from invdpo.config import StudyConfig
    from invdpo.scorers.pickscore import PickScore

ENCODED_AT_ONCE = 64  # images a VAE call: enough to keep two cores busy, 0.4 GiB of activations at 64 pixels


@dataclass(frozen=True)
class PreferenceCache:
    """Encoded pairs. n pairs, m captions, latents in the UNet's scale.

    win_mean, win_std, lose_mean, lose_std: (n,C,h,w), the posterior of each image, so that training can draw
    from it. embeds: (m,L,D), one row a caption. uncond: (1,L,D), the empty prompt. caption_index: (n,) int64
    into embeds. key: sha256 of what was encoded and by what. scores: (n,2) PickScores of winner and loser by the votes,
    raw cosines, where they were asked for; the key then covers the scorer too. SDXL family only: pooled (m,P),
    uncond_pooled (1,P), and win_time_ids, lose_time_ids (n,6), the images' own sizes as `Conditioning.time_ids`.
    """

    win_mean: Tensor
    win_std: Tensor
    lose_mean: Tensor
    lose_std: Tensor
    embeds: Tensor
    uncond: Tensor
    caption_index: Tensor
    key: str
    scores: Tensor | None = None
    pooled: Tensor | None = None
    uncond_pooled: Tensor | None = None
    win_time_ids: Tensor | None = None
    lose_time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.caption_index)

    @property
    def captions(self) -> Conditioning:
        """The prompts, m rows, without sizes."""
        return Conditioning(self.embeds, self.pooled)

    @property
    def empty(self) -> Conditioning:
        """The empty prompt, 1 row, without sizes."""
        return Conditioning(self.uncond, self.uncond_pooled)


TENSORS = ("win_mean", "win_std", "lose_mean", "lose_std", "embeds", "uncond", "caption_index")
SDXL_TENSORS = ("pooled", "uncond_pooled", "win_time_ids", "lose_time_ids")


def placement(width: int, height: int, resolution: int) -> tuple[int, int, int, int]:
    """How an image becomes a square: width and height after resizing, left and top of the crop."""
    scale = resolution / min(width, height)
    width, height = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    return width, height, (width - resolution) // 2, (height - resolution) // 2


def time_ids(images: Sequence[Image.Image], resolution: int) -> Tensor:
    """(n,6) what SDXL is told of images that `square` takes: (h, w) as they come, (top, left) of the crop, (h, w)."""
    rows = []
    for image in images:
        _, _, left, top = placement(*image.size, resolution)
        rows.append([image.height, image.width, top, left, resolution, resolution])
    return torch.tensor(rows, dtype=torch.float32)


def square(image: Image.Image, resolution: int) -> Tensor:
    """An RGB image resized (shorter side, bilinear) and centre-cropped to (3, resolution, resolution) in [-1,
    1].

    As Diffusion-DPO's train.py does it, its random flip left out: a flipped image can contradict its caption.
    """
    from PIL import Image

    width, height = image.size
    if (width, height) != (resolution, resolution):
        width, height, left, top = placement(width, height, resolution)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    return pixels.permute(2, 0, 1) / 127.5 - 1


def prepare(study: StudyConfig, device: torch.device) -> dict[str, Any]:
    """Encode a study's pairs into root/preferences/{pairs.parquet, cache.safetensors, report.json}; returns
    the report.

    Where a recipe of the study weights pairs by their strength, both images of every pair are also scored, as they come
    and not as they are trained on, by the study's PickScore. Does nothing when the cache there already holds exactly
    this content. Raises InvdpoError when columns are missing, too many images cannot be decoded, no pair is left, or
    scores are needed and `scorers.pickscore` is missing or tells no image from another.
    """
    import pandas as pd
    from safetensors.torch import save_file
    from tqdm import tqdm

    from invdpo.backbones.files import fingerprint
    from invdpo.backbones.pipeline import encode_images, load_vae
    from invdpo.backbones.text import empty_prompt, encode_prompts, load_text
    from invdpo.provenance import sha256_file, stamp

    started = time.time()
    folder = study.root / "preferences"
    files = find_files(study.preferences)
    rows = check_columns(files)
    resolution = study.training.resolution
    content = {
        "files": [sha256_file(file) for file in files],
        "encoders": fingerprint(study.base, study.vae, study.variant),
        "resolution": resolution,
        "max_undecodable": study.training.max_undecodable,
    }
    # Two keys, so that runs without scores outlive another scorer, and an arm that is the first to need one.
    keys = {"key": _digest(content)}
    scorer = _scorer(study, device)
    if scorer is not None:
        content["pickscore"] = scorer.version
        keys["scored_key"] = _digest(content)
    key = keys["key" if scorer is None else "scored_key"]
    if (done := _existing(folder, key, scorer is not None)) is not None:
        return done

    vae = load_vae(study.base, device, study.vae, variant=study.variant)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if resolution % factor:
        raise InvdpoError(f"`training.resolution: {resolution}` is not a multiple of {factor}, the VAE's scale.")
    counts = Counts()
    latents: list[tuple[Tensor, Tensor]] = []
    sizes: list[Tensor] = []
    records: list[dict[str, Any]] = []
    scores: list[Tensor] = []
    waiting: list[Pair] = []

    def encode() -> None:
        images = [image for pair in waiting for image in (pair.winner_image, pair.loser_image)]
        squares = torch.stack([square(image, resolution) for image in images])
        mean, std = encode_images(vae, squares.to(device))
        latents.append((mean.cpu(), std.cpu()))
        sizes.append(time_ids(images, resolution))
        if scorer is not None:
            scores.append(pick_scores(scorer, waiting))
        waiting.clear()

    with tqdm(total=rows, desc="prepare: pairs", unit="pair", mininterval=0.5) as bar:
        for pair in read_pairs(files, counts):
            waiting.append(pair)
            records.append(_record(pair))
            if 2 * len(waiting) >= ENCODED_AT_ONCE:
                encode()
            bar.update(counts.rows - bar.n)
        if waiting:
            encode()
        bar.update(counts.rows - bar.n)
    _judge(counts, study)

    mean, std = (torch.cat([part[i] for part in latents]) for i in (0, 1))
    captions = list(dict.fromkeys(record["caption"] for record in records))
    index = {caption: i for i, caption in enumerate(captions)}
    text = load_text(study.base, device, study.variant)
    prompts, empty = encode_prompts(text, captions), empty_prompt(text)
    prompts, empty = (found.map(lambda value: value.cpu().contiguous()) for found in (prompts, empty))
    tensors = {
        "win_mean": mean[0::2].contiguous(),
        "win_std": std[0::2].contiguous(),
        "lose_mean": mean[1::2].contiguous(),
        "lose_std": std[1::2].contiguous(),
        "embeds": prompts.embeds,
        "uncond": empty.embeds,
        "caption_index": torch.tensor([index[record["caption"]] for record in records]),
    }
    if prompts.pooled is not None and empty.pooled is not None:
        tensors |= {"pooled": prompts.pooled, "uncond_pooled": empty.pooled}
        told = torch.cat(sizes)
        tensors |= {"win_time_ids": told[0::2].contiguous(), "lose_time_ids": told[1::2].contiguous()}
    if scorer is not None:
        tensors["scores"] = torch.cat(scores)
        _check_span(tensors["scores"], study)
    with replace_when_done(folder / "cache.safetensors") as temporary:
        save_file(tensors, temporary, metadata=keys)
    with replace_when_done(folder / "pairs.parquet") as temporary:
        pd.DataFrame(records).to_parquet(temporary, index=False)
    report = {
        **stamp(study, config_hash=key[:16], device=device, dtype="fp32", started=started),
        "key": key,
        "content": content,
        "sources": [str(file) for file in files],
        "rows": counts.rows,
        "ties": counts.ties,
        "undecodable": counts.undecodable,
        "undecodable_rows": counts.undecodable_rows,
        "pairs": counts.kept,
        "captions": len(captions),
    }
    if scorer is not None:  # for Pick-a-Pic, SmPO's code has 0.1154 and 0.2820
        report["pickscore_range"] = [float(tensors["scores"].min()), float(tensors["scores"].max())]
    write_json(folder / "report.json", report)
    return report


def pick_scores(scorer: PickScore, pairs: Sequence[Pair]) -> Tensor:
    """PickScores of both images of n pairs as they come, winner first: (n,2) float32."""
    images = [image for pair in pairs for image in (pair.winner_image, pair.loser_image)]
    captions = [pair.caption for pair in pairs for _ in range(2)]
    return torch.from_numpy(scorer.score(images, captions)["pickscore"]).view(-1, 2)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()


def _scorer(study: StudyConfig, device: torch.device) -> PickScore | None:
    """The study's PickScore where an arm needs the pairs' strengths, else None; InvdpoError where it has none."""
    arms = [arm for arm in map(study.arm, study.arms) if arm.trains and arm.recipe.loss.weight_by_strength]
    if not arms:
        return None
    config = study.scorers.pickscore
    if config is None:
        raise InvdpoError(
            f"The arm `{arms[0].name}` of study `{study.study}` weights every pair by how much better PickScore finds "
            f"its winner (recipe {arms[0].recipe.name}, `loss.weight_by_strength`), but the study has no "
            "`scorers.pickscore`. Add it, or leave the arm out."
        )
    from invdpo.scorers.pickscore import PickScore

    return PickScore(config.model, device, processor=config.processor)


def _check_span(scores: Tensor, study: StudyConfig) -> None:
    """Strengths are differences in units of the scores' range."""
    if scores.min() == scores.max():
        raise InvdpoError(
            f"`scorers.pickscore` gives every image of `preferences: {study.preferences}` the score "
            f"{float(scores.min()):g}, so no pair can be weighted by it. Check the scorer's weights and the pairs."
        )


def _existing(folder: Path, key: str, scored: bool) -> dict[str, Any] | None:
    """The report of a finished preparation of the same content, or None."""
    report, parts = folder / "report.json", ("pairs.parquet", "cache.safetensors")
    if not report.is_file() or not all((folder / part).is_file() for part in parts):
        return None
    written = json.loads(report.read_text(encoding="utf-8"))
    # The report is written last, so whatever it names is whole.
    return written if written["key"] == key and load_cache(folder, torch.device("cpu"), scored).key == key else None


def _record(pair: Pair) -> dict[str, Any]:
    return {
        "row": pair.row,
        "caption": pair.caption,
        "winner_sha256": hashlib.sha256(pair.winner).hexdigest(),
        "loser_sha256": hashlib.sha256(pair.loser).hexdigest(),
    }


def _judge(counts: Counts, study: StudyConfig) -> None:
    """Stop when too much was unreadable or nothing is left."""
    decided = counts.rows - counts.ties
    allowed = study.training.max_undecodable
    if counts.undecodable > allowed * decided:
        raise InvdpoError(
            f"{counts.undecodable} of the {decided} decided pairs in `preferences: {study.preferences}` have "
            f"an image that cannot be decoded, more than `training.max_undecodable: {allowed}` allows. "
            f"First such rows: {counts.undecodable_rows[:10]}. Mend the file, or raise the "
            "limit if the loss is acceptable."
        )
    if counts.kept == 0:
        raise InvdpoError(
            f"No usable pair is left in `preferences: {study.preferences}`: {counts.rows} rows, "
            f"{counts.ties} of them ties (label_0 neither 0 nor 1)."
        )


def cache_key(folder: Path, scored: bool = False) -> str:
    """The key of the cache that `prepare` wrote, without reading the rest; `scored`: of pairs and scores together.

    Raises InvdpoError where there is no cache, or no scores in it.
    """
    with _opened(folder) as stored:
        return _key(stored, folder, scored)


def load_cache(folder: Path, device: torch.device, scored: bool = False) -> PreferenceCache:
    """The cache that `prepare` wrote, on the device; `scored`: with its PickScores.

    Raises InvdpoError where there is no cache, or no scores in it.
    """
    with _opened(folder) as stored:
        key = _key(stored, folder, scored)
        names = [*TENSORS, *(["scores"] if scored else []), *(set(SDXL_TENSORS) & set(stored.keys()))]
        return PreferenceCache(**{name: stored.get_tensor(name).to(device) for name in names}, key=key)


def _key(stored: Any, folder: Path, scored: bool) -> str:
    keys = stored.metadata()
    if scored and "scored_key" not in keys:
        raise InvdpoError(
            f"{folder / 'cache.safetensors'} holds no PickScores, by which this arm weights its pairs: it was made "
            "before the study had such an arm. Run `invdpo prepare --study …` again."
        )
    return keys["scored_key" if scored else "key"]


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = folder / "cache.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:  # pyright: ignore[reportArgumentType]
            yield stored
    except (OSError, SafetensorError, KeyError) as error:
        raise InvdpoError(f"{path} cannot be read ({error}). Run `invdpo prepare --study …` first.") from error
