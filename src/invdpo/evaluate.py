"""Images and scores of one arm: every checkpoint of every seed, on the study's prompts, in one process."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from invdpo.backbones.pipeline import UNetEps, load_schedule, load_unet, load_vae
from invdpo.backbones.released import find_weights, put_into
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.device import memory_for, resolve_dtype
from invdpo.errors import InvdpoError
from invdpo.inversion.guidance import two_model_guidance
from invdpo.prompts import read_prompts
from invdpo.provenance import stamp
from invdpo.sampling import decode, prompt_generator, sample, unet_evaluations
from invdpo.scorers import build_scorers
from invdpo.scorers.pictures import Pictures
from invdpo.scorers.rows import HEAD, SCORES, picture_hash, score_rows, write_parquet
from invdpo.types import EpsModel

if TYPE_CHECKING:
    from invdpo.config import ArmConfig, StudyConfig

IMAGES = pa.schema([*HEAD, ("sha256", pa.string()), ("png", pa.binary())])


@dataclass(frozen=True)
class Checkpoint:
    """Weights to evaluate. folder: a folder with `unet/`, or the base pipeline's folder or hub id. variant: which of
    its files. weights: published ones that take the place of the base's, or are added to them (LoRA)."""

    seed: int
    step: int
    folder: str
    variant: str | None = None
    weights: str | None = None


def evaluate(study: StudyConfig, arm: str, seeds: Sequence[int], device: torch.device) -> list[Path]:
    """Sample, decode and score an arm; returns the score files.

    For each seed writes `images/<arm>/seed<k>.parquet` (the last checkpoint's pictures as PNG) and
    `scores/<arm>/seed<k>.parquet` (a row an image and score, of every checkpoint; a score that does not exist
    for a prompt has no row), sorted by step, prompt and score. Each file's schema metadata holds the
    provenance as JSON under `provenance`. An arm that does not train is evaluated once, as seed 0, step 0,
    whatever `seeds` says.

    The noise of a prompt is the same for all arms, seeds and steps, so that they can be compared pair by
    pair. Raises InvdpoError: missing base, scorer, prompts or run, a run of another configuration, non-finite
    images, a GPU that is out of memory.
    """
    config, study = study.arm(arm), study.with_base_of(arm)
    prompts = read_prompts(study.prompts, study.sampling.prompts)
    runs = {seed: checkpoints_of(study, config, seed) for seed in (seeds if config.trains else [0])}
    batch = study.sampling.batch
    lower = [
        *([f"`sampling.batch: {batch // 2}` (now {batch})"] if batch > 1 else []),
        f"`training.resolution` for the whole study (now {study.training.resolution})",
        "fewer `scorers` at a time, whose networks stay on the GPU",
    ]
    bar = tqdm(total=sum(map(len, runs.values())) * len(prompts), unit="image", desc=arm)
    with memory_for(f"sampling and scoring arm {arm}", lower), bar:
        studio = Studio(study, prompts, device)
        return [_evaluate_seed(studio, config, checkpoints, bar) for checkpoints in runs.values()]


def checkpoints_of(study: StudyConfig, arm: ArmConfig, seed: int) -> list[Checkpoint]:
    """The checkpoints of a run, ascending by step; InvdpoError where the run is missing or another
    configuration's.
    """
    if not arm.trains:
        return [Checkpoint(0, 0, study.base, study.variant, arm.weights)]
    run = study.root / "runs" / arm.name / f"seed{seed}"
    again = f"run `invdpo train --study … --arm {arm.name} --seed {seed}`"
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))["config_hash"]
    except (OSError, ValueError, KeyError) as error:
        raise InvdpoError(f"{run} holds no finished run ({type(error).__name__}: {error}); {again}") from error
    if found != arm.hash:
        raise InvdpoError(f"{run} was trained with another configuration ({found}, now {arm.hash}); {again} again")
    checkpoints = [Checkpoint(seed, step, str(run / "checkpoints" / f"step{step:06d}")) for step in arm.training.grid]
    for checkpoint in checkpoints:
        if not (Path(checkpoint.folder) / "unet").is_dir():
            raise InvdpoError(f"{checkpoint.folder}/unet is missing; {again} again")
    return checkpoints


class Studio:
    """All that does not depend on the checkpoint: prompts and their embeddings, schedule, VAE, scorers. Raises
    InvdpoError where a part of the base or a scorer is missing."""

    def __init__(self, study: StudyConfig, prompts: list[str], device: torch.device):
        self.study, self.prompts, self.device = study, prompts, device
        self.prompt_set = Path(study.prompts).stem
        self.dtype = resolve_dtype(device, study.precision)
        self.schedule = load_schedule(study.base)
        self.vae = load_vae(study.base, device, study.vae, self.dtype, study.variant)
        self.scorers = build_scorers(study.scorers, device)
        text = load_text(study.base, device, study.variant)
        # Kept on the CPU: the embeddings of a large prompt set would take a gigabyte of the GPU's memory.
        self.cond = encode_prompts(text, prompts).map(Tensor.cpu)
        self.empty = empty_prompt(text).map(Tensor.cpu)
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        side = study.training.resolution // factor
        self.shape = (int(self.vae.config["latent_channels"]), side, side)

    def batches(self) -> list[range]:
        """The prompts' ids, cut into batches."""
        ids, size = range(len(self.prompts)), self.study.sampling.batch
        return [ids[start : start + size] for start in ids[::size]]

    @cached_property
    def base(self) -> Any:
        """The base's UNet, for arms that are sampled beside it."""
        return load_unet(self.study.base, self.device, variant=self.study.variant).requires_grad_(False)

    def unet(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint's UNet, which must be one of the base's family. Its weights ask for no gradient: of those that
        do, autocast would keep copies in half precision, half of their size."""
        weights = None if checkpoint.weights is None else find_weights(checkpoint.weights)
        place = self.device if weights is None else torch.device("cpu")
        unet = load_unet(checkpoint.folder, place, base=self.study.base, variant=checkpoint.variant)
        released: Any = unet if weights is None else put_into(unet, weights)
        return released.requires_grad_(False).to(self.device)

    def model(self, arm: ArmConfig, unet: Any) -> tuple[EpsModel, float]:
        """What an arm's UNet is sampled as, and with which guidance scale: 1 where the model is guided already."""
        scale = self.study.sampling.guidance_scale
        trained = UNetEps(unet, self.dtype)
        if arm.trains and arm.recipe.sampling_branch == "unconditional":
            return two_model_guidance(UNetEps(self.base, self.dtype), trained, scale), 1.0
        return trained, scale

    def draw(self, eps_model: EpsModel, guidance_scale: float, ids: range, seed: int | None = None) -> Pictures:
        """The pictures that an eps-model makes for some prompts. seed: of the noise; None: the study's."""
        sampling = self.study.sampling
        seed = sampling.seed if seed is None else seed
        prompts = self.cond.map(lambda value: value[ids.start : ids.stop])
        cond = for_sampling(prompts, self.empty, self.study.training.resolution)
        latents = sample(
            eps_model,
            cond.map(lambda value: value.to(self.device)),
            self.schedule,
            sampling.steps,
            guidance_scale,
            [prompt_generator(seed, prompt_id) for prompt_id in ids],
            self.shape,
        )
        return Pictures(Image.fromarray(pixels) for pixels in decode(self.vae, latents))


def _evaluate_seed(studio: Studio, arm: ArmConfig, checkpoints: list[Checkpoint], bar: tqdm) -> Path:
    """Draw and score the checkpoints of one run, and write its two files."""
    study, started = studio.study, time.time()
    images, scores = [], []
    for checkpoint in checkpoints:
        bar.set_description(f"{arm.name} seed {checkpoint.seed} step {checkpoint.step}")
        eps_model, scale = studio.model(arm, studio.unet(checkpoint))
        for ids in studio.batches():
            try:
                pictures = studio.draw(eps_model, scale, ids)
            except InvdpoError as error:
                raise InvdpoError(f"arm {arm.name}, seed {checkpoint.seed}, step {checkpoint.step}: {error}") from error
            heads = [_head(studio, arm, checkpoint, prompt_id) for prompt_id in ids]
            hashes = [picture_hash(picture) for picture in pictures]
            scores += score_rows(studio.scorers, heads, hashes, pictures)
            if checkpoint is checkpoints[-1]:
                for head, digest, picture in zip(heads, hashes, pictures, strict=True):
                    images.append({**head, "sha256": digest, "png": png(picture)})
            bar.update(len(ids))
        del eps_model  # the GPU need not hold two networks while the next one is loaded
    spent = unet_evaluations(
        len(checkpoints) * len(studio.prompts), study.sampling.steps, study.sampling.guidance_scale
    )
    provenance = stamp(
        study,
        config_hash=arm.hash,
        seed=checkpoints[0].seed,
        device=studio.device,
        dtype=str(studio.dtype).removeprefix("torch."),
        started=started,
        unet_evals=spent,
    )
    provenance["sampling"] = study.sampling.model_dump()
    provenance["scorer_versions"] = [scorer.version for scorer in studio.scorers]
    scores.sort(key=lambda row: (row["step"], row["prompt_id"], row["scorer"]))
    name = f"seed{checkpoints[0].seed}.parquet"
    write_parquet(study.root / "images" / arm.name / name, images, IMAGES, provenance)
    write_parquet(study.root / "scores" / arm.name / name, scores, SCORES, provenance)
    return study.root / "scores" / arm.name / name


def _head(studio: Studio, arm: ArmConfig, checkpoint: Checkpoint, prompt_id: int) -> dict[str, Any]:
    """The columns that images and scores share."""
    return {
        "method": arm.name,
        "seed": checkpoint.seed,
        "step": checkpoint.step,
        "prompt_set": studio.prompt_set,
        "prompt_id": prompt_id,
        "prompt": studio.prompts[prompt_id],
    }


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
