"""Whether a study has what it needs, said before anything is spent: `invdpo check`.

Everything is looked for and nothing large is fetched or built: of weights their headers alone, of data sets footers and
label columns. What is wrong is collected, so that one look names all of it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from invdpo.backbones.files import (
    check_codec,
    check_fits,
    file_names,
    look,
    part_weights,
    read_settings,
    said,
    text_parts,
)
from invdpo.backbones.pipeline import load_schedule
from invdpo.backbones.released import Stored, check_same_network, look_at_weights, network_of, require_peft
from invdpo.device import resolve_device
from invdpo.errors import InvdpoError
from invdpo.hub import Remote
from invdpo.preferences.plan import Plan, make_plan
from invdpo.preferences.shards import check_columns, in_cache, list_shards, opened
from invdpo.prompts import read_prompts
from invdpo.provenance import verify_checksums
from invdpo.scorers import looks

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

Asked = ParamSpec("Asked")
Found = TypeVar("Found")
BaseKey = tuple[str, str | None, str | None]  # pipeline, codec, variant

GB = 1e9
CAPTION_TOKENS = 77  # of CLIP's text encoders
STORED = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes a number


@dataclass
class Findings:
    """problems: what is wrong, a text each. remote: the hub's files that the study reads, by repository and path.
    lines: what the study holds.
    """

    problems: list[str] = field(default_factory=list)
    remote: dict[tuple[str, str], Remote] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def of(self, look: Callable[Asked, Found], *args: Asked.args, **options: Asked.kwargs) -> Found | None:
        """What a look finds; None where it raises an InvdpoError, which becomes a problem."""
        try:
            return look(*args, **options)
        except InvdpoError as error:
            if (text := str(error)) not in self.problems:
                self.problems.append(text)
            return None

    def note(self, files: list[Remote] | None) -> None:
        """Files of the hub that the study reads."""
        self.remote |= {(file.repo, file.name): file for file in files or []}


def check(study: StudyConfig) -> Findings:
    """What a study holds, and all that is wrong with it.

    Looked at: assets against their checksums; the device; every base (family, schedule, tokenizers, its parts' weights
    by their headers, the UNet's against its configuration) and codec; published weights against their base; pairs,
    votes and prompts; the scorers' files; whether the hub gives this account each file; recipes; and the room for what
    is known to be fetched and made.
    """
    found = Findings()
    if study.checksums is not None:
        found.of(verify_checksums, study.checksums)
    device = found.of(resolve_device, study.device)
    unets = _bases(study, found)
    _releases(study, found, unets)
    plan = found.of(_pairs, study)
    if study.own_samples is not None:
        found.of(read_prompts, study.own_samples.prompts)
    for source in _votes(study):
        found.of(_first_file, source)
    prompts = found.of(read_prompts, study.prompts)
    if study.tuning is not None:
        found.of(read_prompts, study.tuning.prompts)
    for one in [*looks(study.scorers), *_distribution(study)]:
        found.note(found.of(one))
    room = found.of(_room, study, found.remote, plan, unets.get(_key(study)))
    found.lines.append(
        f"{study.study}: base {study.base}, {_described(study, plan)}, "
        f"{'?' if prompts is None else len(prompts)} prompts, device {device or study.device}{room or ''}"
    )
    arms = {name: found.of(_arm, study, name) for name in study.arms}
    found.lines += [f"  {name}: {line}" for name, line in arms.items() if line is not None]
    return found


def _key(study: StudyConfig) -> BaseKey:
    return study.base, study.vae, study.variant


def _bases(study: StudyConfig, found: Findings) -> dict[BaseKey, Stored]:
    """The UNet's tensors of every base that an arm starts from, where they can be told."""
    bases = {_key(own): found.of(_base, own, found) for own in map(study.with_base_of, study.arms)}
    return {key: unet for key, unet in bases.items() if unet is not None}


def _base(study: StudyConfig, found: Findings) -> Stored | None:
    """A study's base, part by part; the tensors of its UNet."""
    base, vae, variant = _key(study)
    if vae is not None:
        found.of(_part, vae, "", None, found, "vae")
    file_names(base, "")  # a listing, which an unreachable hub refuses sooner than a file
    text = text_parts(base)  # where this cannot be read, there is nothing else to say of the base
    found.of(check_fits, base, base)
    found.of(check_codec, base, vae)
    found.of(load_schedule, base)
    for tokenizer, encoder in text:
        found.of(_tokenizer, base, tokenizer)
        found.of(_part, base, encoder, variant, found)
    if vae is None:
        found.of(_part, base, "vae", variant, found)
    unet = _part(base, "unet", variant, found)
    found.of(check_same_network, unet, network_of(base), "base")
    return unet


def _part(source: str, part: str, variant: str | None, found: Findings, label: str = "base") -> Stored:
    """The tensors of a part of a pipeline by their headers; its files are noted."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in part_weights(source, part, variant, label):
        header, remote = look(source, name, label)
        shapes |= {tensor: shape for tensor, (_, shape) in header.items()}
        found.note([remote] if remote is not None else [])
    return Stored(source, {}, shapes)


def _tokenizer(base: str, folder: str) -> None:
    if not {Path(name).name for name in file_names(base, folder)} & {"tokenizer.json", "vocab.json"}:
        raise InvdpoError(
            f"{said('base', base)}: `{folder}` holds no tokenizer (vocab.json or tokenizer.json). Fetch it again."
        )


def _releases(study: StudyConfig, found: Findings, unets: dict[BaseKey, Stored]) -> None:
    """Published weights of the arms against their bases, and what weights are held against."""
    distances = study.experiments.weight_distances
    named = [("weights", name, entry.weights) for name, entry in study.arms.items()]
    named += [
        ("experiments.weight_distances.against", *each) for each in (distances.against if distances else {}).items()
    ]
    for wanted, arm, source in named:
        if source is not None:
            found.of(_release, source, unets.get(_key(study.with_base_of(arm))), wanted, found)


def _release(source: str, base: Stored | None, wanted: str, found: Findings) -> None:
    weights, files = look_at_weights(source, wanted)
    found.note(files)
    if weights.lora:
        require_peft(weights, wanted)
    elif base is not None:
        check_same_network(weights, base, wanted)


def _pairs(study: StudyConfig) -> Plan | int | None:
    """The plan of a study's pairs; where no run draws any, how many rows there are; None without preferences, and
    where they are still to be made."""
    if not study.preferences or (study.own_samples is not None and not Path(study.preferences).exists()):
        return None
    return make_plan(study) if any(study.draws.values()) else _first_file(study.preferences)


def _first_file(source: str) -> int:
    """Rows of local files of pairs, their columns checked; of a hub data set those of its first file."""
    shards = list_shards(source)
    if local := [shard.path for shard in shards if shard.path is not None]:
        return check_columns(local)
    with opened(shards[0]) as parquet:
        return parquet.metadata.num_rows


def _described(study: StudyConfig, plan: Plan | int | None) -> str:
    if plan is None and (own := study.own_samples) is not None:
        return f"preferences still to be made of {own.images} samples for each prompt of {own.prompts}"
    if not isinstance(plan, Plan):
        return f"{plan or ('?' if study.preferences else 'no')} rows of preferences"
    rows = f"{sum(plan.sizes)} rows"
    some = "" if Path(study.preferences).exists() else f" in {len(plan.shards)} of {plan.of} files"
    return f"{rows}{some} of preferences"


def _votes(study: StudyConfig) -> list[str]:
    """Pairs and votes of the experiments."""
    votes = study.experiments.preference_accuracy
    named = [study.experiments.held_out, *((votes.votes, votes.validation) if votes else ())]
    return list(dict.fromkeys(source for source in named if source is not None))


def _distribution(study: StudyConfig) -> list[Callable[[], list[Remote]]]:
    """What `experiments.distribution` reads, as `scorers.looks`."""
    from invdpo.scorers.openclip import look_for
    from invdpo.scorers.weights import look_here

    settings, place = study.experiments.distribution, "experiments.distribution"
    if settings is None:
        return []
    found: list[Callable[[], list[Remote]]] = []
    if settings.model is not None:
        found.append(partial(look_for, settings.model, settings.pretrained, None, f"{place}.model"))
    elif settings.inception_weights is not None:
        found.append(partial(look_here, settings.inception_weights, f"{place}.inception_weights"))
    if (path := settings.reference.path) is not None and not Path(path).is_dir():
        found.append(partial(look_here, path, f"{place}.reference.path"))
    return found


def _arm(study: StudyConfig, name: str) -> str:
    """What an arm does, in a line."""
    arm = study.arm(name)
    if not arm.trains:
        return f"{arm.weights or 'the base model as it is'}, base {study.with_base_of(name).base}, not trained"
    training = arm.training
    return (
        f"{arm.recipe.name}, labels {arm.labels}, {training.steps} steps of {training.batch} pairs, "
        f"learning rate {arm.learning_rate:g}, beta {arm.recipe.beta:g}"
        f"{' (not tuned yet)' if study.awaits_tuning(name) else ''}, {len(study.seeds)} seeds, hash {arm.hash}"
    )


def _room(
    study: StudyConfig, remote: dict[tuple[str, str], Remote], plan: Plan | int | None, unet: Stored | None
) -> str:
    """What is known to be fetched and made, in words; InvdpoError where a disk has no room for it.

    Fetched: the hub's files that are not in its cache. Made: latents and embeddings of the planned pairs, and
    checkpoints, less what the study's folder holds already; not pictures, and not what a run resumes from.
    """
    from huggingface_hub import constants

    shards = plan.shards if isinstance(plan, Plan) else []
    fetched = sum(file.size for file in remote.values() if file.path is None)
    fetched += sum(shard.size for shard in shards if shard.path is None and in_cache(shard) is None)
    made = plan.pairs * _pair_bytes(study) if isinstance(plan, Plan) else 0
    made += 4 * sum(map(math.prod, unet.shapes.values())) * _checkpoints(study) if unet is not None else 0
    here = sum(path.stat().st_size for path in study.root.rglob("*") if path.is_file())
    made = max(0, made - here)
    volumes: dict[int, list[tuple[Path, int]]] = {}
    for place, size in ((Path(constants.HF_HUB_CACHE), fetched), (study.root, made)):
        volumes.setdefault(os.stat(_existing(place)).st_dev, []).append((place, size))
    for places in volumes.values():
        free = shutil.disk_usage(_existing(places[0][0])).free
        if sum(size for _, size in places) > free:
            parts = " and ".join(f"{size / GB:.3g} GB in {place}" for place, size in places if size)
            raise InvdpoError(
                f"The disk has {free / GB:.3g} GB free, and {parts} are needed at least. Make room, put the hub's "
                "files on another disk (HF_HOME), keep fewer `training.checkpoints`, take fewer `data.shards`, or set "
                "`data.storage: float16`."
            )
    return f", to fetch {fetched / GB:.3g} GB, to make at least {made / GB:.3g} GB"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _checkpoints(study: StudyConfig) -> int:
    """How many UNets the runs keep."""
    arms = map(study.arm, study.arms)
    return sum(len(study.seeds) * len(arm.training.grid) for arm in arms if arm.trains)


def _pair_bytes(study: StudyConfig) -> int:
    """Of a pair's latents and of its caption, which other pairs may have too."""
    place = (study.base, "vae/config.json") if study.vae is None else (study.vae, "config.json")
    shape = ("block_out_channels", "latent_channels")
    vae = read_settings(*place, shape, "base" if study.vae is None else "vae")
    side = study.training.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    width = read_settings(study.base, "unet/config.json", ["cross_attention_dim"])["cross_attention_dim"]
    return (4 * vae["latent_channels"] * side**2 + CAPTION_TOKENS * width) * STORED[study.data.storage]
