"""Everything under assets/shapes, made from nothing, one step at a time; each step leaves its facts for the card."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from invdpo.scorers.composition import TASKS
from invdpo.world.corpus import Corpus, make_corpus
from invdpo.world.oracle import score
from invdpo.world.render import render
from invdpo.world.scenes import caption, sample_captions, sample_scene

# One seed a purpose, so that no learner sees what another is tested on.
SEEDS = {
    "corpus": 0,
    "vae": 0,
    "base": 2,
    "train": 101,
    "validation": 102,
    "clip": 7,
    "aesthetic": 7,
    "pickscore": 103,
    "hps": 104,
    "prompts": 201,
    "tuning_prompts": 202,
    "complex_train": 203,
    "complex_test": 204,
    "quality": 301,
}
CORPUS_CHUNKS = 24
VAE_STEPS = 2_200
BASE_STEPS = 10_000
LAYOUT_STEPS = 12_000
PAIRS = {"train": 3_000, "validation": 600}
JUDGE_PAIRS = 8_000
CONTRASTIVE_STEPS = 1_400
# The HPS-shaped judge starts from the finished CLIP and overfits sooner.
VOTE_STEPS = {"pickscore": 1_400, "hps": 500}
AESTHETIC_STEPS = 3_000
RATED = 12_000
PROMPTS = 256
# Prompts of the most complex scenes there are, for which alone every benchmark's score of such scenes exists.
COMPLEX_THINGS = 3
COMPLEX = {"complex_train": 300, "complex_test": 96}
QUALITY_RENDERS, QUALITY_SAMPLES = 1_000, 512


def corpus() -> Corpus:
    """The pictures that the base model and the judges learn from."""
    return make_corpus(CORPUS_CHUNKS, SEEDS["corpus"], workers=max(1, torch.get_num_threads()))


def record(out: Path, step: str, started: float, **facts: Any) -> None:
    """Write a step's facts to build/<step>.json."""
    folder = out / "build"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {
        "command": f"invdpo world {step}",
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    (folder / f"{step}.json").write_text(json.dumps({**facts, **stamp}, indent=2, sort_keys=True) + "\n")


def build_vae(out: Path) -> None:
    """vae/ of the base pipeline."""
    from invdpo.world.base import train_vae

    started = time.monotonic()
    vae, facts = train_vae(corpus(), VAE_STEPS, SEEDS["vae"])
    vae.save_pretrained(out / "base" / "vae")
    record(out, "vae", started, seed=SEEDS["vae"], **facts)


def build_base(out: Path) -> None:
    """The rest of the base pipeline, around the VAE that is there; and how faithful its samples are."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from invdpo.world.base import save_pipeline, train_base

    started = time.monotonic()
    vae = AutoencoderKL.from_pretrained(out / "base" / "vae")
    vae.register_to_config(_name_or_path="shapes")  # diffusers would save the path it was loaded from
    pipeline, facts = train_base(corpus(), vae, BASE_STEPS, LAYOUT_STEPS, SEEDS["base"])
    save_pipeline(pipeline, out / "base")
    record(out, "base", started, seed=SEEDS["base"], **facts)


def build_votes(out: Path) -> None:
    """preferences/ of the study and the prompt lists."""
    from invdpo.world.votes import make_votes

    started = time.monotonic()
    (out / "preferences").mkdir(parents=True, exist_ok=True)
    facts = {}
    for split, pairs in PAIRS.items():
        table, facts[split] = make_votes(out / "base", pairs, SEEDS[split])
        table.to_parquet(out / "preferences" / f"{split}.parquet", index=False)
    voted = frozenset(table_caption for split in PAIRS for table_caption in _captions(out, split))
    (out / "prompts").mkdir(exist_ok=True)
    test = sample_captions(PROMPTS, SEEDS["prompts"], exclude=voted)
    tuning = sample_captions(PROMPTS, SEEDS["tuning_prompts"], exclude=voted | frozenset(test))
    for name, captions in {"test": test, "tuning": tuning}.items():
        (out / "prompts" / f"{name}.txt").write_text("\n".join(captions) + "\n")
    record(out, "votes", started, **facts)


def build_scenes(out: Path) -> None:
    """Prompt lists of complex scenes, to draw training samples of and to test on; in no other list and no vote."""
    started = time.monotonic()
    voted = {caption for split in PAIRS for caption in _captions(out, split)}
    listed = {
        line for name in ("test", "tuning") for line in (out / "prompts" / f"{name}.txt").read_text().splitlines()
    }
    seen = voted | listed
    for name, count in COMPLEX.items():
        captions = sample_captions(count, SEEDS[name], exclude=frozenset(seen), things=COMPLEX_THINGS)
        (out / "prompts" / f"{name}.txt").write_text("\n".join(captions) + "\n")
        seen |= set(captions)
    record(out, "scenes", started, things=COMPLEX_THINGS, seeds={name: SEEDS[name] for name in COMPLEX})


def _captions(out: Path, split: str) -> list[str]:
    return pd.read_parquet(out / "preferences" / f"{split}.parquet", columns=["caption"])["caption"].tolist()


def build_clip(out: Path) -> None:
    """scorers/clip: the CLIP of captioned pictures."""
    from invdpo.world import judges

    started, seed = time.monotonic(), SEEDS["clip"]
    clip = judges.new_open_clip(seed)
    facts = judges.train_contrastive(clip, corpus(), CONTRASTIVE_STEPS, seed, "clip")
    judges.save_open_clip(clip, out / "scorers" / "clip")
    held_out = pd.read_parquet(out / "preferences" / "validation.parquet")
    record(out, "clip", started, seed=seed, **facts, held_out_vote_accuracy=judges.vote_accuracy(clip, held_out))


def build_pickscore(out: Path) -> None:
    """scorers/pickscore: a CLIP of its own, trained on captioned pictures and then on its own votes."""
    from invdpo.world import judges
    from invdpo.world.votes import make_votes

    started, seed = time.monotonic(), SEEDS["pickscore"]
    pickscore = judges.new_transformers_clip(seed)
    contrastive = judges.train_contrastive(pickscore, corpus(), CONTRASTIVE_STEPS, seed, "pickscore")
    votes, voted = make_votes(out / "base", JUDGE_PAIRS, seed)
    facts = judges.train_on_votes(pickscore, votes, VOTE_STEPS["pickscore"], seed, "pickscore")
    judges.save_transformers_clip(pickscore, out / "scorers" / "pickscore")
    held_out = pd.read_parquet(out / "preferences" / "validation.parquet")
    facts |= {"contrastive": contrastive, "votes": voted}
    accuracy = judges.vote_accuracy(pickscore, held_out)
    record(out, "pickscore", started, seed=seed, **facts, held_out_vote_accuracy=accuracy)


def build_hps(out: Path) -> None:
    """scorers/hps: the CLIP that is there, trained further on votes that nothing else sees."""
    from invdpo.world import judges
    from invdpo.world.votes import make_votes

    started, seed = time.monotonic(), SEEDS["hps"]
    hps = judges.load_open_clip(out / "scorers" / "clip")
    votes, voted = make_votes(out / "base", JUDGE_PAIRS, seed)
    facts = judges.train_on_votes(hps, votes, VOTE_STEPS["hps"], seed, "hps")
    judges.save_open_clip(hps, out / "scorers" / "hps")
    held_out = pd.read_parquet(out / "preferences" / "validation.parquet")
    accuracy = judges.vote_accuracy(hps, held_out)
    record(out, "hps", started, seed=seed, **facts, votes=voted, held_out_vote_accuracy=accuracy)


def build_aesthetic(out: Path) -> None:
    """scorers/aesthetic: the head on the CLIP that is there, from rated pictures of the corpus and the base model."""
    from invdpo.world import judges

    started, seed = time.monotonic(), SEEDS["aesthetic"]
    samples = judges.pictures_of(pd.read_parquet(out / "preferences" / "train.parquet")).flatten(0, 1)
    rated = torch.cat([corpus().pictures[:RATED], samples])
    rated = rated[torch.randperm(len(rated), generator=torch.Generator().manual_seed(seed))]
    clip = judges.load_open_clip(out / "scorers" / "clip")
    head, facts = judges.train_aesthetic(clip, rated, AESTHETIC_STEPS, seed)
    judges.save_aesthetic(head, out / "scorers" / "aesthetic" / "head.pth")
    record(out, "aesthetic", started, seed=seed, rated_pictures=len(rated), **facts)


def measure_quality(out: Path) -> None:
    """How well the parser reads real renders, and how faithful the base model is at the study's guidance."""
    from invdpo.world.votes import sample_pictures

    started = time.monotonic()
    rng = np.random.default_rng(SEEDS["quality"])
    scenes = [sample_scene(rng) for _ in range(QUALITY_RENDERS)]
    renders = [score(render(scene, rng), caption(scene)) for scene in scenes]
    captions = sample_captions(QUALITY_SAMPLES, SEEDS["quality"])
    facts: dict[str, Any] = {"parser_on_flawless_renders": _means(renders), "seed": SEEDS["quality"]}
    for guidance_scale in (1.0, 3.0):
        pictures = sample_pictures(out / "base", captions, guidance_scale, SEEDS["quality"])
        marks = [score(picture, text) for picture, text in zip(pictures, captions, strict=True)]
        facts[f"base_samples_at_guidance_{guidance_scale:g}"] = _means(marks)
    record(out, "quality", started, **facts)


def _means(marks: list[dict[str, float]]) -> dict[str, float]:
    """The benchmarks' tasks are left out: not every caption asks for them."""
    names = [name for name in marks[0] if name not in TASKS]
    return {f"mean_{name}": round(float(np.nanmean([mark[name] for mark in marks])), 4) for name in names}


def write_checksums(out: Path) -> None:
    """SHA256SUMS over every asset, in sha256sum's format."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("SHA256SUMS", "README.md")]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out)}" for path in files]
    (out / "SHA256SUMS").write_text("\n".join(lines) + "\n")
