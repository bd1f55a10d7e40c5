"""How large a study's parts are: networks, files to download, memory, disk. `invdpo.plan` says what they add up to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo import hub
from invdpo.config import read_yaml
from invdpo.errors import InvdpoError
from invdpo.machine import GB
from invdpo.memory import CUDA_CONTEXT, LORA_SHARE, OPTIMIZER_BYTES, Denoiser, is_sharded
from invdpo.prompts import PROMPT_SETS, read_prompts

if TYPE_CHECKING:
    from invdpo.config import ArmConfig, ScorersConfig, StudyConfig

SIZES = Path("config/sizes.yaml")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
VARIANT = re.compile(r"\.(fp16|bf16)\.")
DECODING = 8.0e9  # bytes of a VAE that decodes `sampling.DECODED_PIXELS` at once in fp32; half of that in fp16
PROGRAM = 3.0e9  # bytes of a job's memory for Python, the libraries and CUDA's, a CPU's job a third of that


@dataclass(frozen=True)
class Networks(Denoiser):
    """Sizes of a pipeline at a resolution; see `invdpo.network_size.networks`."""

    vae_parameters: float
    text_parameters: float
    unet_flops: float
    unet_operations: float
    encode_flops: float
    decode_flops: float
    latent_elements: float
    caption_elements: float


@dataclass(frozen=True)
class Download:
    """gb: None where it is not known; at_most is then what it cannot be more than, or None. here: GB of it that the
    hub's cache holds."""

    gb: float | None
    at_most: float | None = None
    here: float = 0.0

    @property
    def bound(self) -> float:
        """The most that is known of it."""
        return self.gb or self.at_most or 0.0

    @property
    def missing(self) -> float:
        """GB of it that are still to be fetched, at most."""
        return max(0.0, self.bound - self.here)


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a study. count: how many are encoded. gb: of the files that hold them, where they are
    downloaded. megapixels: of one image as it comes."""

    count: int = 0
    gb: float = 0.0
    megapixels: float = 0.0


def sizes() -> dict[str, Any]:
    """config/sizes.yaml, of the package's repository or here."""
    repository = Path(__file__).resolve().parents[2] / SIZES
    return read_yaml(repository if repository.is_file() else SIZES)


def made_here(base: str, known: dict[str, Any]) -> bool:
    """Whether a rule makes that base, and has not made it yet."""
    return base in known["converted"] and not Path(base).is_dir()


def networks_of(study: StudyConfig, known: dict[str, Any], assumptions: list[str]) -> Networks:
    """Sizes of the study's base at its resolution: of a folder counted from its configuration, of one that a rule makes
    from that of its original, else as known.

    Raises InvdpoError for a base that is none of these.
    """
    from invdpo import network_size

    resolution, folder = study.training.resolution, Path(study.base)
    if made_here(study.base, known):
        found = network_size.converted(Path(known["converted"][study.base]))
        return Networks(**network_size.networks(*found, resolution))
    if folder.is_dir():
        return Networks(**network_size.networks(*network_size.configurations(folder), resolution))
    for entry in known["pipelines"].values():
        if study.base in entry["ids"]:
            return scaled(entry, resolution, assumptions)
    names = ", ".join(name for entry in known["pipelines"].values() for name in entry["ids"])
    raise InvdpoError(
        f"`base: {study.base}` is no folder here, and its size is not known. Known are {names}; add it to {SIZES} "
        "(same architecture: to the `ids` of one), or make or download it first."
    )


def scaled(entry: dict[str, Any], resolution: int, assumptions: list[str]) -> Networks:
    """A known pipeline's sizes at another resolution: what grows with the pixels is taken to grow as they do."""
    values = {key: float(value) for key, value in entry.items() if key not in ("ids", "resolution")}
    if resolution != entry["resolution"]:
        factor = (resolution / entry["resolution"]) ** 2
        for key in values:
            if not key.endswith("parameters") and key not in ("caption_elements", "unet_operations"):
                values[key] *= factor
        assumptions.append(
            f"resolution {resolution}: operations and activations are those of {entry['resolution']} times "
            f"{factor:.3g}, the ratio of pixels (attention grows faster)"
        )
    return Networks(**values)


def count_prompts(source: str, limit: int | None, assumptions: list[str]) -> int:
    """How many prompts a file or a published set has, at most `limit`."""
    if source in PROMPT_SETS:
        found = PROMPT_SETS[source].count
        return min(found, limit or found)
    if Path(source).is_file():
        return len(read_prompts(source, limit))
    found = limit or 500
    assumptions.append(f"prompts: `{source}` is no file here; {found} are assumed")
    return found


def preference_pairs(
    study: StudyConfig, own_prompts: int, known: dict[str, Any], assumptions: list[str]
) -> tuple[Pairs, dict[str, Download]]:
    """The pairs to encode, and what is downloaded for them; none where no arm trains, whose job alone asks for them.

    own_prompts: of `own_samples`.
    """
    if not any(study.arm(name).trains for name in study.arms):
        return Pairs(), {}
    if (own := study.own_samples) is not None:  # which an earlier run may have made, of the same number
        side = study.training.resolution
        count = own_prompts * own.images * (own.images - 1) // 2
        assumptions.append(f"preferences: all {count:,} pairs of the samples, as if no prompt were left out and no tie")
        return Pairs(count, 0.0, side * side / 1e6), {}
    if Path(study.preferences).exists():
        from invdpo.preferences.plan import make_plan

        side = study.training.resolution
        return Pairs(make_plan(study).pairs, 0.0, side * side / 1e6), {}
    name, _, split = study.preferences.partition(":")
    entry = known["datasets"].get(name)
    if entry is None:
        entry = next(iter(known["datasets"].values()))
        assumptions.append(f"preferences: the size of `{name}` is not known; it is taken for Pick-a-Pic v2's")
    each = entry["decided"] / entry["files"]
    draws = study.draws
    if study.samples_pairs:
        wanted = study.data.shards if isinstance(study.data.shards, int) else math.ceil(sum(draws.values()) / each)
    else:
        wanted = entry["files"]
    files = max(1, min(entry["files"], wanted))
    rows = files * each
    missed = math.prod(1 - min(1.0, count / rows) for count in draws.values())
    count = round(rows * (1 - missed)) if study.samples_pairs else round(rows)
    gb = entry["gb"] * files / entry["files"]
    assumptions.append(f"preferences: {files} of {entry['files']} files, {count:,} pairs, by the data set's mean file")
    held = hub.held(name, "dataset").items()
    here = sum(size for file, size in held if file.endswith(".parquet") and (split or "train") in file) / GB
    download = Download(gb, here=min(gb, here))
    return Pairs(count, gb, entry["megapixels"]), {f"preferences: {name} ({files} files)": download}


def downloads(study: StudyConfig, networks: dict[str, Networks], known: dict[str, Any]) -> dict[str, Download]:
    """What is fetched, but for the preferences. networks: of each arm. What lies here already is not in it; what the
    hub's cache holds is, and says so."""
    found: dict[str, Download] = {}
    tags = known["open_clip"]
    for name in study.arms:
        seen, sizes_of, weights = study.with_base_of(name), networks[name], study.arms[name].weights
        if not Path(seen.base).is_dir() and not made_here(seen.base, known):
            parts = {"unet": sizes_of.unet_parameters, "text_encoder": sizes_of.text_parameters}
            if seen.vae is None:
                parts["vae"] = sizes_of.vae_parameters
            width = 2 if seen.variant in ("fp16", "bf16") else 4
            here = sum(size for part, size in parts.items() if _is_cached(f"{seen.base}/{part}", seen.variant))
            found[f"base: {seen.base}"] = Download(sum(parts.values()) * width / GB, here=here * width / GB)
        if seen.vae is not None and not Path(seen.vae).exists():
            found[f"vae: {seen.vae}"] = _whole(seen.vae, known["files"].get(seen.vae))
        if weights is not None and not Path(weights).exists():
            size = known["files"].get(weights)
            # Whatever is not stored in fp32 is smaller, and so are adapters.
            bound = None if size else 4 * sizes_of.unet_parameters / GB
            found[f"weights: {weights}"] = _whole(weights, size, bound)
    for prompts in (study.prompts, study.own_samples.prompts if study.own_samples else None):
        if prompts in PROMPT_SETS:
            here = known["prompts"] if hub.held(PROMPT_SETS[prompts].repo, "dataset") else 0.0
            found[f"prompts: {prompts}"] = Download(known["prompts"], here=here)
    for place in scorer_places(study.scorers):
        if not _local(place).exists():
            found[f"scorer: {place}"] = _whole(tags.get(place, place), _file_size(place, known))
    for place, kind in _experiment_places(study):
        if not _local(place).exists():
            found[f"{kind}: {place}"] = _whole(tags.get(place, place), _file_size(place, known))
    return found


def _whole(place: str, gb: float | None, at_most: float | None = None) -> Download:
    """One file of weights, which the hub's cache has or has not."""
    download = Download(gb, at_most)
    return replace(download, here=download.bound) if _is_cached(place.removeprefix("hf-hub:")) else download


def _is_cached(place: str, variant: str | None = None) -> bool:
    """Whether the hub's cache holds weights at a hub id, which a path may follow; those of a variant have its name in
    theirs."""
    repo, path = hub.split_id(place) or (place, "")
    inside = f"{path}/" if path else ""
    files = [file for file in hub.held(repo) if file.endswith(WEIGHTS) and f"{file}/".startswith(inside)]
    return any((f".{variant}." in file) if variant else not VARIANT.search(file) for file in files)


def _local(place: str) -> Path:
    return Path(place.removeprefix("local-dir:"))


def _file_size(place: str, known: dict[str, Any]) -> float | None:
    """GB of a file or model that is known by its id or name."""
    return known["files"].get(place, known["files"].get(Path(place).name))


def scorer_places(scorers: ScorersConfig) -> list[str]:
    """Every file, folder or id that the scorers read weights from, each once."""
    places: list[str] = []
    for name in type(scorers).model_fields:
        settings = getattr(scorers, name)
        if settings is None or name == "oracle":
            continue
        values = settings.model_dump()
        if name == "imagereward":
            places.append(values["checkpoint"] or "ImageReward.pt")
            continue
        model, pretrained = values["model"], values.get("pretrained")
        if checkpoint := values.get("checkpoint"):
            places.append(checkpoint)  # `model` is then an architecture
        else:
            places.append(f"{model}:{pretrained}" if pretrained else model)
        if tower := values.get("tower"):
            places.append(tower)
    return list(dict.fromkeys(places))


def _experiment_places(study: StudyConfig) -> Iterator[tuple[str, str]]:
    """What the experiments read beside that, and what it is."""
    experiments = study.experiments
    votes, distribution = experiments.preference_accuracy, experiments.distribution
    pairs = [experiments.held_out] if experiments.measured else []
    pairs += [votes.votes, votes.validation] if votes else []
    for place in dict.fromkeys(pairs):
        if place is not None and place != study.preferences:
            yield place, "pairs"
    if distribution is not None:
        model, pretrained = distribution.model, distribution.pretrained
        if model is None:
            yield distribution.inception_weights or "inception", "features"
        else:
            yield f"{model}:{pretrained}" if pretrained else model, "features"


def evaluation_memory(
    study: StudyConfig, arm: ArmConfig, networks: Networks, known: dict[str, Any], kind: str
) -> float:
    """Bytes on one device while the arm's checkpoints are sampled and scored: the UNet in fp32, a second one that
    guides, the codec, all scorers, and what either the UNet or the codec has at a time while it works on a batch."""
    from invdpo.inversion.guidance import evaluations
    from invdpo.sampling import DECODED_PIXELS

    sampling, pixels = study.sampling, study.training.resolution**2
    unets = 1
    latents = sampling.batch * evaluations(sampling.guidance_scale)
    if arm.trains and arm.recipe.sampling_branch == "unconditional":
        unets, latents = 2, sampling.batch  # of the two halves each by a network of its own
    scorers = 0.0
    for place in scorer_places(study.scorers):
        scorers += held_bytes(_local(place)) if _local(place).exists() else (_file_size(place, known) or 0) * GB
    half = in_half(study, known, kind)
    drawing = latents * networks.forward_bytes * (1 if kind == "gpu" and study.precision != "fp32" else 2)
    decoded = min(sampling.batch, max(1, DECODED_PIXELS // pixels)) * pixels / DECODED_PIXELS
    working = max(drawing, (0.5 if half else 1) * decoded * DECODING)
    weights = 4 * unets * networks.unet_parameters + (2 if half else 4) * networks.vae_parameters
    return weights + scorers + working + (CUDA_CONTEXT if kind == "gpu" else 0)


def held_bytes(place: Path) -> float:
    """Of a file, or of all files of a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return float(sum(path.stat().st_size for path in files if path.is_file()))


def in_half(study: StudyConfig, known: dict[str, Any], kind: str) -> bool:
    """Whether images are decoded in half precision: by a codec that is safe there."""
    return kind == "gpu" and study.precision != "fp32" and study.vae in known["safe_in_half"]


def host_memory(arm: ArmConfig, networks: Networks, kind: str) -> float:
    """Bytes of the machine's own memory for a job of the arm on GPUs: every network is read there first."""
    if kind == "cpu":
        return PROGRAM / 3
    training, weights = arm.training, 4 * networks.unet_parameters
    if not arm.trains:
        return PROGRAM + weights
    elsewhere = training.reference_offload or is_sharded(arm)  # the base stays there, and the policy is copied there
    copies = (2 if elsewhere or training.lora is not None else 1) * weights
    if elsewhere and arm.recipe.reference_dtype != "float32":
        copies += weights / 2
    held = training.processes * copies
    if is_sharded(arm):
        # The first process saves weights and moments whole, beside the bases.
        held = max(held, training.processes * weights + weights + OPTIMIZER_BYTES["adamw"] * networks.unet_parameters)
    return training.processes * PROGRAM + held


def disk(
    study: StudyConfig, networks: dict[str, Networks], pairs: Pairs, prompts: int, at_once: int
) -> dict[str, float]:
    """What -> GB in the study's results. networks: of each arm. at_once: trainings that run together."""
    width = 4 if study.data.storage == "float32" else 2
    arms = {name: study.arm(name) for name in study.arms}
    trained = {name: arm for name, arm in arms.items() if arm.trains}
    checkpoints = sum(len(study.seeds) * len(arm.training.grid) for arm in trained.values())
    kept = sum(
        len(study.seeds) * len(arm.training.grid) * networks[name].unet_parameters for name, arm in trained.items()
    )
    states = sorted(
        (
            (LORA_SHARE if arm.training.lora else 1)
            * (4 + OPTIMIZER_BYTES[arm.training.optimizer])
            * networks[name].unet_parameters
            for name, arm in trained.items()
        ),
        reverse=True,
    )
    images = sum(
        (len(study.seeds) if arm.trains else 1) * prompts * study.with_base_of(name).training.resolution ** 2
        for name, arm in arms.items()
    )
    stored = 0.0
    if pairs.count:
        own = networks[next(iter(trained))]
        stored = pairs.count * width * (4 * own.latent_elements + own.caption_elements)
    found = {
        "latents and embeddings": stored / GB,
        f"checkpoints ({checkpoints})": 4 * kept / GB,
        f"states of running trainings ({min(at_once, len(states))})": sum(states[:at_once]) / GB,
        "images": images * 3 / 2 / GB,  # PNG: half of the pixels' bytes
        "kept inversions, at most": (study.trajectory_cache_gb or 0.0) if trained else 0.0,
    }
    return {name: gb for name, gb in found.items() if gb > 0}
