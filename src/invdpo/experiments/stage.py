"""The experiments as stages of a study: from its files to root/experiments/<name>/, csv files and provenance.json.

All run in fp32, whatever the study's precision, for what they measure is smaller than the rounding of the others; the
audit alone also asks what other precisions would change.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from invdpo.backbones.pipeline import UNetEps, encode_images, load_schedule, load_unet, load_vae
from invdpo.backbones.released import Stored, find_weights, made_from, put_into
from invdpo.backbones.text import empty_prompt, encode_prompts, for_sampling, load_text
from invdpo.device import memory_for
from invdpo.errors import InvdpoError
from invdpo.evaluate import checkpoints_of
from invdpo.experiments.audit import Drawing, Noise, audit, cosine, decoder, pickscore, reward_gradient, summary
from invdpo.experiments.inversion_error import inversion_errors, side_by_side
from invdpo.experiments.precision import Pairs, agreement, log_ratios, true_log_prob
from invdpo.experiments.preference_accuracy import (
    accuracies,
    agreement_with_votes,
    halves_by_prompt,
    probability_difference,
    score_votes,
)
from invdpo.experiments.weight_distances import distances
from invdpo.experiments.weight_distances import summary as distance_summary
from invdpo.files import replace_when_done, write_json
from invdpo.objectives import Recipe, load_recipe
from invdpo.preferences.cache import PreferenceCache, images_at_once, load_cache, pick_scores
from invdpo.preferences.labels import drawn_pairs, strengths
from invdpo.preferences.order import pair_order
from invdpo.preferences.preprocess import Cutting
from invdpo.preferences.reader import Counts, Pair, read_pairs, read_votes
from invdpo.preferences.shards import check_columns, find_files
from invdpo.prompts import read_prompts
from invdpo.provenance import stamp
from invdpo.sampling import decode, prompt_generator
from invdpo.scorers import build_scorers
from invdpo.scorers.composition import TASKS
from invdpo.scorers.pictures import Pictures
from invdpo.training.data import draw
from invdpo.types import Conditioning, select

if TYPE_CHECKING:
    from invdpo.config import (
        AuditConfig,
        InversionErrorConfig,
        PrecisionConfig,
        PreferenceAccuracyConfig,
        StudyConfig,
        WeightDistancesConfig,
    )
    from invdpo.scorers import Scorer
    from invdpo.scorers.pickscore import PickScore

log = logging.getLogger("invdpo")

SHOWN_LEVELS = 6  # of a trajectory, x_0 and x_T included
LATENTS_A_CALL = 256  # of a network, where the study sets no chunk

# file name -> its rows: csv, or parquet for pictures
Files = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class HeldOut:
    """P pairs that no run was trained on. captions (P,): their prompts. ids (P,): their places among the source's.
    strength (P,): where they were scored, of their preferences, in the span of the training pairs' scores.
    """

    pairs: Pairs
    captions: list[str]
    ids: list[int]
    strength: Tensor | None


class Counter:
    """eps-models whose network evaluations are counted: a forward pass of one latent as 1, its backward pass as 2."""

    def __init__(self) -> None:
        self.evaluations = 0

    def eps_model(self, unet: Any, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
        """The UNet as an eps-model, its passes in `dtype`."""
        model = UNetEps(unet, dtype)

        def count(passes: int) -> None:
            self.evaluations += passes

        def counted(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
            eps = model(x, t, cond)
            count(len(x))
            if eps.requires_grad:
                eps.register_hook(lambda _: count(2 * len(x)))
            return eps

        return counted


def run(study: StudyConfig, name: str, device: torch.device) -> Path:
    """Run one experiment of the study; returns its folder, root/experiments/<name>.

    inversion_error: errors.csv (a row a setting and latent), levels.csv, pictures.parquet. precision: latents.csv,
    agreement.csv. audit: gradients.csv (a row a setting and batch), summary.csv,
    rewards.csv (a row a policy). preference_accuracy: votes.csv (a row a vote), accuracy.csv (a row a score).
    weight_distances: tensors.parquet (a row a tensor), summary.csv (a row a block or kind of layer), where there
    is such against.csv (the same of arms that are held against another model) and made_from.csv (what published weights
    say that they were loaded from). Raises InvdpoError for an experiment that the study has not, too few held-out
    pairs, missing runs, a GPU that is out of memory, and as the experiment itself does.
    """
    if name not in study.experiments.measured:
        has = ", ".join(study.experiments.measured) or "none"
        raise InvdpoError(f"Study `{study.study}` has no `experiments.{name}`; those it has: {has}.")
    started, counter = time.time(), Counter()
    settings = getattr(study.experiments, name)
    with memory_for(f"experiment {name}", remedies(study, name)):
        files, notes = EXPERIMENTS[name](study, settings, device, counter)
    folder = study.root / "experiments" / name
    for file, rows in files.items():
        with replace_when_done(folder / file) as temporary:
            if file.endswith(".csv"):
                rows.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
            else:
                rows.to_parquet(temporary, index=False)
    content = settings.model_dump(mode="json")
    config_hash = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:16]
    provenance = stamp(
        study,
        config_hash=config_hash,
        device=device,
        dtype="float32",
        started=started,
        unet_evals=counter.evaluations,
    )
    write_json(folder / "provenance.json", provenance | {"experiment": name, "settings": content} | notes)
    return folder


def remedies(study: StudyConfig, name: str) -> list[str]:
    """Which settings of an experiment to lower when the GPU's memory does not do, the one that frees most first."""
    settings, place = getattr(study.experiments, name), f"experiments.{name}"
    chunk = study.training.chunk or LATENTS_A_CALL
    chunks = [f"`training.chunk: {chunk // 2}` (now {chunk})"] if chunk > 1 else []
    counts = {"inversion_error": "latents", "precision": "pairs", "audit": "pairs"}
    fewer = [f"`{place}.{key}` (now {getattr(settings, key)})"] if (key := counts.get(name)) else []
    if name in ("precision", "audit"):
        fewer = chunks + fewer
    if name in ("inversion_error", "preference_accuracy"):
        fewer.append("fewer `scorers` at a time, whose networks stay on the GPU")
    return [*fewer, f"`training.resolution` for the whole study (now {study.training.resolution})"]


def unseen_pairs(
    study: StudyConfig, arms: Sequence[str], pairs: int, columns: Mapping[str, Tensor] | None = None
) -> list[int]:
    """Which of a cache's `pairs` no seed of those arms is trained on, ascending. columns: the cache's labels."""
    seen: set[int] = set()
    for arm in map(study.arm, arms):
        drawn = drawn_pairs(arm.labels, pairs, columns or {})
        for seed in study.seeds:
            # A step's pairs are consecutive entries of one order, so those of all steps are one long step's.
            order = pair_order(seed, 1, arm.training.steps * arm.training.batch, len(drawn))
            seen.update(drawn[order].tolist())
    return sorted(set(range(pairs)) - seen)


def held_out(
    study: StudyConfig, arms: Sequence[str], count: int, device: torch.device, scorer: PickScore | None = None
) -> HeldOut:
    """`count` pairs of `experiments.held_out`, or else of the study's own, that no seed of those arms is trained on.

    Which ones depends on the source alone, so a larger count keeps the pairs of a smaller one. Latents are drawn from
    the VAE's posterior as in training. `scorer`: the study's, where the pairs' strengths are needed; its scores of the
    training pairs are in the cache. Raises InvdpoError where fewer are left.
    """
    source, folder = study.experiments.held_out, study.root / "preferences"
    trained = None if scorer is None else load_cache(folder, torch.device("cpu"), scored=True).scores
    scores = None
    if source is None:
        named = [study.arm(arm).labels for arm in arms]
        cache = load_cache(folder, device, columns=[name for name in study.label_columns if name in named])
        ids = rows = nsmallest(count, unseen_pairs(study, arms, len(cache), cache.labels), key=_rank)
        texts = pd.read_parquet(folder / "pairs.parquet", columns=["caption"])["caption"]
        captions = [str(texts[row]) for row in rows]
        _check_count(study, arms, len(ids), count)
        scores = None if trained is None else trained[rows]
    else:
        known = pd.read_parquet(folder / "pairs.parquet", columns=["winner_sha256", "loser_sha256"])
        files = find_files(source)
        check_columns(files)
        unknown = _without(read_pairs(files, Counts()), set(known.to_numpy().ravel()))
        pairs = nsmallest(count, unknown, key=lambda pair: _rank(pair.row))
        _check_count(study, arms, len(pairs), count)
        ids, captions, rows = [pair.row for pair in pairs], [pair.caption for pair in pairs], list(range(count))
        cache = _encoded(study, pairs, device)
        scores = None if scorer is None else pick_scores(scorer, pairs)
    # No step of training has the number 0.
    told = study.training.micro_conditioning
    batch = draw(cache, torch.zeros(len(cache), dtype=torch.bool), rows, 0, 0, 0, 0.0, told)
    strength = None if scores is None else strengths(scores, trained).to(device)
    return HeldOut(Pairs(batch.x0_win, batch.x0_lose, batch.cond, batch.cond_lose), captions, ids, strength)


def _check_count(study: StudyConfig, arms: Sequence[str], found: int, count: int) -> None:
    if found < count:
        source = study.experiments.held_out
        where = f"`experiments.held_out: {source}`" if source else f"`preferences: {study.preferences}`"
        runs = ", ".join(f"`{arm}`" for arm in arms) or "the study"
        raise InvdpoError(
            f"{found} pairs of {where} were never trained on by {runs}, and {count} are needed. Ask for fewer, or name "
            "a file of other pairs in `experiments.held_out`."
        )


def _rank(place: int) -> str:
    """A fixed random order of all places."""
    return hashlib.sha256(f"{place}:held out".encode()).hexdigest()


def _without(pairs: Iterable[Pair], known: set[str]) -> Iterator[Pair]:
    """The pairs with neither image among the known sha256 digests."""
    for pair in pairs:
        if not known & {hashlib.sha256(image).hexdigest() for image in (pair.winner, pair.loser)}:
            yield pair


def _encoded(study: StudyConfig, pairs: list[Pair], device: torch.device) -> PreferenceCache:
    """Pairs encoded as `prepare` encodes them."""
    vae = load_vae(study.base, device, study.vae, variant=study.variant)
    text = load_text(study.base, device, study.variant)
    cutting = Cutting.of(study)
    squares = [cutting.pair(pair.row, pair.winner_image, pair.loser_image) for pair in pairs]
    squares = [square for both in squares for square in both]
    pixels = torch.stack([square.tensor() for square in squares])
    parts = [encode_images(vae, part.to(device)) for part in pixels.split(images_at_once(cutting.resolution))]
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    prompts, empty = encode_prompts(text, [pair.caption for pair in pairs]), empty_prompt(text)
    told = torch.tensor([square.time_ids() for square in squares], dtype=torch.float32, device=device)
    sizes = (None, None) if prompts.pooled is None else (told[0::2], told[1::2])
    return PreferenceCache(
        win_mean=mean[0::2],
        win_std=std[0::2],
        lose_mean=mean[1::2],
        lose_std=std[1::2],
        embeds=prompts.embeds,
        uncond=empty.embeds,
        caption_index=torch.arange(len(pairs), device=device),
        key="held out",
        pooled=prompts.pooled,
        uncond_pooled=empty.pooled,
        win_time_ids=sizes[0],
        lose_time_ids=sizes[1],
    )


def _inversion_error(
    study: StudyConfig, settings: InversionErrorConfig, device: torch.device, counter: Counter
) -> tuple[Files, dict[str, Any]]:
    """The base model's inversions of winners, with the study's scores of what comes back."""
    held = held_out(study, [], settings.latents, device)
    schedule, vae = load_schedule(study.base), load_vae(study.base, device, study.vae, variant=study.variant)
    base = counter.eps_model(load_unet(study.base, device, variant=study.variant).requires_grad_(False))
    scorers = build_scorers(study.scorers, device)

    def scored(latents: Tensor) -> dict[str, np.ndarray]:
        pictures = Pictures(Image.fromarray(pixels) for pixels in decode(vae, latents))
        found = {name: v for scorer in scorers for name, v in scorer.score(pictures, held.captions).items()}
        return {name: v for name, v in found.items() if name.removeprefix("oracle_") not in TASKS}

    x0, cond = held.pairs.win, held.pairs.cond
    scales = settings.guidance_scales
    found = inversion_errors(base, x0, cond, schedule, settings.solvers, settings.steps, scales, scored)
    shown = torch.arange(min(settings.pictures, len(x0)))
    pictures = []
    for steps in sorted({min(settings.steps), max(settings.steps)}):
        columns = min(SHOWN_LEVELS, steps + 1)
        ways = side_by_side(
            base, x0[: len(shown)], select(cond, shown), schedule, settings.solvers[0], steps, columns, scales[0]
        )
        for way, latents in (("inversion", ways.inversion), ("sampling", ways.sampling)):
            for level, timestep in enumerate(ways.timesteps.tolist()):
                for picture, pixels in enumerate(decode(vae, latents[level])):
                    place = {"steps": steps, "picture": picture, "caption": held.captions[picture], "way": way}
                    pictures.append(place | {"level": level, "timestep": timestep, "png": _png(pixels)})
    files = {"errors.csv": found.errors, "levels.csv": found.levels, "pictures.parquet": pd.DataFrame(pictures)}
    return files, {"held_out": held.ids, "scorer_versions": [scorer.version for scorer in scorers]}


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def precision_settings(settings: PrecisionConfig) -> list[tuple[Recipe, int]]:
    """Every recipe, named as its entry, at every N (unless its entry has one) and, where it draws, number of draws."""
    found = []
    for label, entry in settings.recipes.items():
        recipe = load_recipe(entry.method or label).with_overrides(entry.recipe | {"name": label})
        fixed = recipe.trajectory.steps is None or "steps" in entry.recipe.get("trajectory", {})
        grids = [None] if fixed else settings.steps
        draws = [1] if recipe.trajectory.kind == "inversion" and recipe.timesteps == "all" else settings.draws
        for steps in grids:
            at = recipe if steps is None else recipe.with_overrides({"trajectory": {"steps": steps}})
            found += [(at, count) for count in draws]
    return found


def _precision(
    study: StudyConfig, settings: PrecisionConfig, device: torch.device, counter: Counter
) -> tuple[Files, dict[str, Any]]:
    """Surrogate and true log-ratios of held-out latents under the last checkpoint of every arm and seed."""
    held = held_out(study, settings.arms, settings.pairs, device)
    schedule, recipes = load_schedule(study.base), precision_settings(settings)
    chunk = study.training.chunk or LATENTS_A_CALL
    folders = {
        (arm, seed): checkpoints_of(study, study.arm(arm), seed)[-1].folder
        for arm in settings.arms
        for seed in study.seeds
    }

    def load(folder: str, variant: str | None = None) -> Callable[..., Tensor]:
        return counter.eps_model(load_unet(folder, device, base=study.base, variant=variant).requires_grad_(False))

    def log_prob(eps_model: Callable[..., Tensor]) -> Tensor:
        steps, probes = settings.truth_steps, settings.probes
        return true_log_prob(eps_model, held.pairs, schedule, steps, settings.truth, probes=probes, chunk=chunk)

    reference = load(study.base, study.variant)
    before, frames = log_prob(reference), []
    for (arm, seed), folder in tqdm(folders.items(), unit="policy", desc="precision"):
        policy = load(folder)
        truth = log_prob(policy) - before
        rows = log_ratios(f"{arm}/seed{seed}", policy, reference, held.pairs, schedule, truth, recipes, chunk=chunk)
        frames.append(rows.assign(arm=arm, seed=seed))
    latents = pd.concat(frames, ignore_index=True)
    names = latents[["policy", "arm", "seed"]].drop_duplicates()
    files = {"latents.csv": latents, "agreement.csv": agreement(latents).merge(names, on="policy", how="left")}
    return files, {"held_out": held.ids, "policies": [study.arm(arm).hash for arm in settings.arms]}


def _audit(
    study: StudyConfig, settings: AuditConfig, device: torch.device, counter: Counter
) -> tuple[Files, dict[str, Any]]:
    """The recipes' gradients at the base and at checkpoints, beside the gradient of PickScore through the sampler."""
    from invdpo.scorers.pickscore import PickScore

    schedule, seed, config = load_schedule(study.base), study.seeds[0], study.scorers.pickscore
    assert config is not None  # the study is valid
    scorer = PickScore(config.model, device, processor=config.processor)
    reward = pickscore(scorer)
    recipes = [study.arm(arm).recipe.with_overrides({"name": arm}) for arm in settings.arms]
    weighted = any(recipe.loss.weight_by_strength for recipe in recipes)
    count = settings.pairs * settings.batches
    held = held_out(study, settings.policies, count, device, scorer if weighted else None)
    policies = {"initial": load_unet(study.base, device, variant=study.variant)}
    for arm in settings.policies:
        for checkpoint in checkpoints_of(study, study.arm(arm), seed):
            policies[f"{arm}/step{checkpoint.step}"] = load_unet(checkpoint.folder, device, base=study.base)
    halves = _drawing(study, settings.images, device).parts(settings.images // 2)
    rewards, reliability = {}, []
    for name, policy in tqdm(policies.items(), unit="policy", desc="audit: reward"):
        first, second = (reward_gradient(policy, half, reward, wrap=counter.eps_model)[0] for half in halves)
        rewards[name] = (first + second) / 2
        norm, agreement = float(rewards[name].norm()), cosine(first, second)
        reliability.append({"policy": name, "images": settings.images, "norm": norm, "cosine_of_halves": agreement})

    def at(name: str, precisions: Sequence[str], noises: Sequence[Noise]) -> pd.DataFrame:
        return audit(
            recipes,
            {name: policies[name]},
            policies["initial"],
            held.pairs,
            settings.pairs,
            schedule,
            rewards,
            precisions,
            noises,
            held.strength,
            chunk=study.training.chunk,
            wrap=counter.eps_model,
        )

    # A rounding is nothing beside the distance that training has gone. Other precisions and noise of the weights are
    # two questions, not one with all their combinations.
    frames = [at(name, settings.precisions, ["none"]) for name in policies]
    noises: list[Noise] = [noise for noise in settings.roundings if noise != "none"]
    if noises:
        frames.insert(1, at("initial", ["fp32"], noises))
    rows = pd.concat(frames, ignore_index=True)
    files = {"gradients.csv": rows, "summary.csv": summary(rows), "rewards.csv": pd.DataFrame(reliability)}
    return files, {"held_out": held.ids, "policies": [study.arm(arm).hash for arm in settings.policies]}


def _drawing(study: StudyConfig, count: int, device: torch.device) -> Drawing:
    """How the study's evaluation draws its first `count` prompts."""
    prompts = read_prompts(study.prompts, count)
    text = load_text(study.base, device, study.variant)
    vae = load_vae(study.base, device, study.vae, variant=study.variant).requires_grad_(False)
    side = study.training.resolution // 2 ** (len(vae.config["block_out_channels"]) - 1)
    shape = (int(vae.config["latent_channels"]), side, side)
    seeds = [prompt_generator(study.sampling.seed, prompt_id) for prompt_id in range(len(prompts))]
    return Drawing(
        prompts=prompts,
        cond=for_sampling(encode_prompts(text, prompts), empty_prompt(text), study.training.resolution),
        noise=torch.stack([torch.randn(shape, generator=seed) for seed in seeds]).to(device),
        schedule=load_schedule(study.base),
        steps=study.sampling.steps,
        guidance_scale=study.sampling.guidance_scale,
        decode=decoder(vae),
    )


def measure_votes(
    study: StudyConfig, settings: PreferenceAccuracyConfig, device: torch.device
) -> tuple[Files, dict[str, Any]]:
    """The study's scores of held-out votes and how often each agrees with them.

    votes.csv: row, prompt (a number for each distinct caption: a caption is a user's text, and these files are
    published), split, label_0 and, of every score, NAME_0, NAME_1 and, for votes of the test split, NAME_agrees.
    accuracy.csv: a row a score. InvdpoError where votes are missing or too many of them cannot be decoded.
    """
    source = settings.votes or study.experiments.held_out
    if source is None:
        raise InvdpoError("No votes to measure on: set `experiments.preference_accuracy.votes`, or give --votes.")
    scorers = build_scorers(study.scorers, device)
    votes = _scored_votes(study, source, scorers)
    if settings.validation is None:
        half = halves_by_prompt(votes["caption"].astype(str).tolist())
        votes["split"] = np.where(half, "validation", "test")
    else:
        chosen_on = _scored_votes(study, settings.validation, scorers)
        votes = pd.concat([chosen_on.assign(split="validation"), votes.assign(split="test")], ignore_index=True)
    found, rows = accuracies(votes, settings.scales), []
    for name, result in found.items():
        scores = votes[[f"{name}_0", f"{name}_1"]].to_numpy(np.float64)
        agreed = agreement_with_votes(
            probability_difference(scores, result.scale), votes["label_0"].to_numpy(np.float64), result.threshold
        )
        test = (votes["split"] == "test").to_numpy() & np.isfinite(scores).all(axis=1)
        votes[f"{name}_agrees"] = np.where(test, agreed, np.nan)
        row = {"scorer": name, "accuracy": result.interval.estimate, "low": result.interval.low}
        row |= {"high": result.interval.high, "prompts": result.interval.prompts, "votes": result.votes}
        row |= {"ties": result.ties, "predicted_ties": result.predicted_ties, "threshold": result.threshold}
        row |= {"scale": result.scale, "validation_votes": result.validation}
        if result.decided is not None:
            decided = result.decided
            row |= {"decided": decided.estimate, "decided_low": decided.low, "decided_high": decided.high}
        rows.append(row)
    votes.insert(1, "prompt", pd.factorize(votes["caption"])[0])
    files = {"votes.csv": votes.drop(columns="caption"), "accuracy.csv": pd.DataFrame(rows)}
    return files, {"votes": source, "scorer_versions": [scorer.version for scorer in scorers]}


def _scored_votes(study: StudyConfig, source: str, scorers: list[Scorer]) -> pd.DataFrame:
    """Every vote of a file, folder or data set with the scores of both images."""
    files, counts = find_files(source), Counts()
    check_columns(files)
    votes = score_votes(tqdm(read_votes(files, counts), unit="vote", desc="preference accuracy"), scorers)
    if counts.undecodable > study.training.max_undecodable * counts.rows:
        raise InvdpoError(
            f"{source}: {counts.undecodable} of {counts.rows} votes have an image that cannot be decoded, the first in "
            f"row {counts.undecodable_rows[0]}. Repair the file, or raise `training.max_undecodable`."
        )
    return votes


def _preference_accuracy(
    study: StudyConfig, settings: PreferenceAccuracyConfig, device: torch.device, _: Counter
) -> tuple[Files, dict[str, Any]]:
    return measure_votes(study, settings, device)


def _weight_distances(
    study: StudyConfig, settings: WeightDistancesConfig, _: torch.device, __: Counter
) -> tuple[Files, dict[str, Any]]:
    """Published weights, and the last checkpoint of every seed of a trained arm, each against the base of its arm, and
    against another model where one is named.
    """
    tensors, totals, others, origins = [], [], [], []
    for name in tqdm(settings.arms, unit="arm", desc="weight distances"):
        arm, own = study.arm(name), study.with_base_of(name)
        base = find_weights(own.base, "base", own.variant)
        for seed in study.seeds if arm.trains else [0]:
            folder = checkpoints_of(own, arm, seed)[-1].folder if arm.trains else None
            weights = find_weights(folder or str(arm.weights))
            rows = _from_base(own, base, weights)
            run = {"arm": name, "seed": seed}
            tensors.append(rows.assign(**run))
            totals.append(distance_summary(rows).assign(**run))
            if (other := settings.against.get(name)) is not None:
                held = _from_base(own, find_weights(other, "experiments.weight_distances.against"), weights)
                others.append(distance_summary(held).assign(**run, against=other))
        if arm.weights is not None and (origin := made_from(arm.weights)) is not None:
            origins.append(pd.DataFrame([{"arm": name, "weights": arm.weights, "made_from": origin}]))
            log.info(f"{name}: the configuration of {arm.weights} says that it was loaded from {origin}")
    files = {"tensors.parquet": tensors, "summary.csv": totals, "against.csv": others, "made_from.csv": origins}
    notes = {"weights": {name: study.arm(name).hash for name in settings.arms}}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in files.items() if parts}, notes


def _from_base(study: StudyConfig, base: Stored, weights: Stored) -> pd.DataFrame:
    """Distances of weights, or of the base with a LoRA added to it."""
    if not weights.lora:
        return distances(base, weights)
    unet = put_into(load_unet(study.base, torch.device("cpu"), variant=study.variant), weights)
    fused = unet.state_dict()
    held = Stored(weights.source, {}, {name: tuple(value.shape) for name, value in fused.items()})
    return distances(base, held, fused.__getitem__)


EXPERIMENTS = {
    "inversion_error": _inversion_error,
    "precision": _precision,
    "audit": _audit,
    "preference_accuracy": _preference_accuracy,
    "weight_distances": _weight_distances,
}
