"""Pairs encoded once: what the VAE and the text encoders give never changes during training.

root/preferences/ holds cache.safetensors (what is small: which caption a pair has, the empty prompt, sizes, scores),
latents/ and captions/ (numbered safetensors files of at most PART_BYTES, mapped and not read at training time),
pairs.parquet (a row a pair: its row, caption and images' digests, and what the label columns say that arms name) and
report.json. Latents of n pairs take 4 n C h w numbers: 1 MB a pair at 1024 pixels in float32, half of that in
`data.storage: float16`; captions of SDXL 0.63 MB each in float32, those of SD1.5 0.24 MB.

What is encoded but not finished lies in unfinished/, under a hash of everything that decides it: a killed `prepare`
goes on behind its last whole part, with the same batches, so that the result has the same bits. Latents are not taken
over from an earlier plan, which would have other batches, and so other bits by its history.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from invdpo.device import memory_for
from invdpo.errors import InvdpoError, Unreachable
from invdpo.files import mirror, remove, replace_when_done, write_json
from invdpo.preferences.decode import DecodedPair, decoded, in_order
from invdpo.preferences.labels import agreements
from invdpo.preferences.plan import Plan, make_plan
from invdpo.preferences.preprocess import Cutting
from invdpo.preferences.reader import Counts, EncodedPair, Pair, read_encoded
from invdpo.preferences.shards import Shard, fetch
from invdpo.types import Conditioning

if TYPE_CHECKING:
    from invdpo.backbones.text import Text
    from invdpo.config import StudyConfig
    from invdpo.scorers.pickscore import PickScore

log = logging.getLogger("invdpo")

PART_BYTES = 512 * 2**20  # of a file of latents or captions, which is in memory whole while it is made
CAPTIONS_AT_ONCE = 256
# The modules that decide what is stored; what others made, finished or not, is not gone on with.
MODULES = ("preferences", "backbones", "device", "scorers/pickscore", "scorers/pictures", "scorers/weights")


def images_at_once(resolution: int) -> int:
    """Images a VAE call, winners and losers: 64 of 64 pixels, enough to keep two cores busy with 0.4 GiB of
    activations; at 512 pixels and above the two of one pair.
    """
    return min(64, max(2, 2**18 // resolution**2 // 2 * 2))


class Rows:
    """A tensor (n,…) whose rows lie one after the other in several mapped files; only rows asked for are read."""

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | Sequence[int]) -> Tensor:
        """Rows `index` (B,) int64 as (B,…) float32 on the device."""
        index = torch.as_tensor(index).cpu()
        found = torch.empty(len(index), *self.shape[1:])
        parts = torch.searchsorted(self._ends, index, right=True)
        for number in parts.unique().tolist():
            here = parts == number
            start = int(self._ends[number]) - len(self._parts[number])
            found[here] = self._parts[number][index[here] - start].float()
        return found.to(self._device)


@dataclass(frozen=True)
class PreferenceCache:
    """Encoded pairs. n pairs, m captions, latents in the UNet's scale; rows of all but the small ones may be stored.

    win_mean, win_std, lose_mean, lose_std: (n,C,h,w), the posterior of each image, so that training can draw
    from it. embeds: (m,L,D), one row a caption. uncond: (1,L,D), what guidance starts from. caption_index: (n,) int64
    into embeds. key: sha256 of what was encoded and by what. scores: PickScores of winner and loser by the votes,
    raw cosines, (n,2) or, of a sample, (order,2), where they were asked for; the key then covers the scorer too. SDXL
    family only: pooled (m,P), uncond_pooled (1,P), and win_time_ids, lose_time_ids (n,6), the images' own sizes as
    `Conditioning.time_ids`. Where guidance starts from zeros: unsaid (1,L,D) and unsaid_pooled (1,P), the encoded empty
    prompt.

    labels: column -> (n,), as `labels.flips` has them, for the columns that were asked for.

    positions, order: of a sample (`plan.Plan`), which of the `order` pairs that the runs' orders go over are stored.
    """

    win_mean: Tensor | Rows
    win_std: Tensor | Rows
    lose_mean: Tensor | Rows
    lose_std: Tensor | Rows
    embeds: Tensor | Rows
    uncond: Tensor
    caption_index: Tensor
    key: str
    scores: Tensor | None = None
    pooled: Tensor | Rows | None = None
    uncond_pooled: Tensor | None = None
    win_time_ids: Tensor | None = None
    lose_time_ids: Tensor | None = None
    unsaid: Tensor | None = None
    unsaid_pooled: Tensor | None = None
    positions: Tensor | None = None
    order: int | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many pairs the runs' orders go over."""
        return len(self.caption_index) if self.order is None else self.order

    @property
    def device(self) -> torch.device:
        """Where rows come to."""
        return self.uncond.device

    def rows(self, pairs: Sequence[int]) -> Tensor:
        """Where those of the `len(self)` pairs are stored: (B,) int64 on the CPU.

        In a sample, a pair that is not there gives its place to the next one that is: it was planned, and then an image
        of it could not be decoded.
        """
        wanted = torch.tensor(pairs, dtype=torch.int64)
        if self.positions is None:
            return wanted
        return torch.searchsorted(self.positions, wanted) % len(self.positions)

    def prompts(self, rows: Tensor) -> Conditioning:
        """The captions of stored pairs, B rows, without sizes."""
        index = self.caption_index[rows]
        return Conditioning(self.embeds[index], None if self.pooled is None else self.pooled[index])

    @property
    def empty(self) -> Conditioning:
        """What guidance starts from, 1 row, without sizes."""
        return Conditioning(self.uncond, self.uncond_pooled)

    @property
    def dropped(self) -> Conditioning:
        """What takes a dropped caption's place, 1 row, without sizes: the encoded empty prompt, also where guidance
        starts from zeros, as in Diffusion-DPO's train.py (encode_prompt_sdxl).
        """
        return self.empty if self.unsaid is None else Conditioning(self.unsaid, self.unsaid_pooled)


LATENTS = ("win_mean", "win_std", "lose_mean", "lose_std")
CAPTIONS = ("embeds", "pooled")
EMPTY = ("uncond", "uncond_pooled", "unsaid", "unsaid_pooled")
SMALL = (*EMPTY, "caption_index", "win_time_ids", "lose_time_ids", "positions")


def prepare(study: StudyConfig, device: torch.device) -> dict[str, Any]:
    """Encode a study's pairs (`plan.make_plan`) into root/preferences/; returns its report.

    Where a recipe of the study weights pairs by their strength, both images of every pair are also scored, as they come
    and not as they are trained on, by the study's PickScore. Does nothing when the cache there already holds exactly
    this content, or, where the hub does not answer, what the same settings asked for before. Goes on behind the last
    whole part of a run that was stopped; waits for another that is at it. Raises InvdpoError when columns are missing,
    too many images cannot be decoded, no pair is left, the disk is too small, a GPU is out of memory, or scores are
    needed and `scorers.pickscore` is missing or tells no image from another.
    """
    with memory_for("prepare", _lower(study)):
        return _prepare(study, device)


def _prepare(study: StudyConfig, device: torch.device) -> dict[str, Any]:
    from invdpo.backbones.files import fingerprint
    from invdpo.backbones.text import starts_from_zeros
    from invdpo.provenance import code_hash, lock_hash

    started = time.time()
    folder = study.root / "preferences"
    encoding: dict[str, Any] = {
        "encoders": fingerprint(study.base, study.vae, study.variant),
        "resolution": study.training.resolution,
        "max_undecodable": study.training.max_undecodable,
    }
    unused = set() if Cutting.of(study).draws else {"seed"}  # beside the rows, which have an entry of their own
    # Only what is not as it always was: a key must not change because a setting was added.
    settings = study.data.model_dump(exclude_defaults=True, exclude={"shards", "revision", "workers", *unused})
    more = {"data": settings, "guided_from_zeros": starts_from_zeros(study.base)}
    encoding |= {key: value for key, value in more.items() if value}
    scorer = _scorer(study, device)
    scoring = {} if scorer is None else {"pickscore": scorer.version}
    asked, code = _asked(study), code_hash(MODULES)
    try:
        plan = make_plan(study)
    except Unreachable as silent:
        with _alone(folder):
            done = _existing(folder, code, scorer is not None)
        made = None if done is None else {k: v for k, v in done["content"].items() if k not in ("files", "rows")}
        if done is None or done.get("asked") != asked or made != encoding | scoring:
            raise
        log.warning(f"{silent} The pairs that were prepared before with the same settings are taken.")
        return done
    rows = {"rows": plan.digest} if plan.digest else {}
    content = {"files": [shard.identity() for shard in plan.shards], **encoding, **rows}
    # Two keys, so that runs without scores outlive another scorer, and an arm that is the first to need one.
    keys = {"key": _digest(content)}
    if scorer is not None:
        content |= scoring
        keys["scored_key"] = _digest(content)
    key = keys["key" if scorer is None else "scored_key"]
    with _alone(folder):
        if (done := _existing(folder, code, scorer is not None)) is not None and done["key"] == key:
            _add_labels(folder, plan, study.label_columns)
            return done
        work = folder / "unfinished" / _digest({"key": key, "code": code, "lock": lock_hash()})[:16]
        for other in work.parent.glob("*"):
            if other != work:
                remove(other)
        counts = _encode_pairs(study, plan, work, device, scorer)
        index = _encode_captions(study, work, device)
        made = {"key": key, "content": content, "code_hash": code, "asked": asked}
        return _publish(study, plan, work, counts, index, keys, made, device, started)


def _asked(study: StudyConfig) -> dict[str, Any]:
    """The settings that a plan is made from, as a report keeps them."""
    draws = {str(seed): count for seed, count in study.draws.items()} if study.samples_pairs else {}
    data = study.data.model_dump(include={"shards", "revision", "seed"})
    return {"preferences": study.preferences, "labels": list(study.label_columns), "draws": draws, **data}


def _lower(study: StudyConfig) -> list[str]:
    """What needs less of a GPU: at 512 pixels and above the VAE has the two images of one pair at a time already."""
    scored = any(arm.recipe.loss.weight_by_strength for arm in map(study.arm, study.arms) if arm.trains)
    return [
        f"`training.resolution` for the whole study (now {study.training.resolution})",
        *(["leave out the arms that weight pairs by PickScore, which stays on the GPU"] if scored else []),
    ]


def _encode_pairs(study: StudyConfig, plan: Plan, work: Path, device: torch.device, scorer: PickScore | None) -> Counts:
    """The plan's latents as work/latents/*.safetensors, and which pairs they are as work/pairs/*.parquet."""
    import pandas as pd
    from tqdm import tqdm

    from invdpo.backbones.pipeline import encode_images, load_vae

    vae = load_vae(study.base, device, study.vae, variant=study.variant)
    resolution, storage = study.training.resolution, getattr(torch, study.data.storage)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if resolution % factor:
        raise InvdpoError(f"`training.resolution: {resolution}` is not a multiple of {factor}, the VAE's scale.")
    at_once = images_at_once(resolution) // 2
    each = len(LATENTS) * int(vae.config["latent_channels"]) * (resolution // factor) ** 2 * storage.itemsize
    part = max(1, PART_BYTES // each // at_once) * at_once  # whole batches, so that any part can be the first of a run
    counts, number, start = _finished(work, Counts(rows=sum(plan.sizes), ties=plan.ties))
    _check_disk(work, (plan.pairs - counts.kept) * each)
    log.info(
        f"prepare: {plan.pairs:,} pairs of {len(plan.shards)} of {plan.of} files ({plan.bytes / 1e9:.3g} GB); latents: "
        f"{plan.pairs * each / 1e9:.3g} GB in {study.data.storage}"
        + (f"; going on behind {counts.kept:,} pairs that were encoded before" if number else "")
    )
    seen = start
    waiting: list[DecodedPair] = []
    made: list[dict[str, Tensor]] = []
    records: list[dict[str, Any]] = []

    def encode() -> None:
        squares = [square for pair in waiting for square in pair.squares or ()]
        mean, std = (
            _stored(found, storage, f"the VAE of `{study.base}`")
            for found in encode_images(vae, torch.stack([square.tensor() for square in squares]).to(device))
        )
        told = torch.tensor([square.time_ids() for square in squares], dtype=torch.float32)
        both = {"mean": mean, "std": std, "time_ids": told}
        tensors = {
            f"{who}_{name}": value[i::2] for name, value in both.items() for i, who in enumerate(("win", "lose"))
        }
        if scorer is not None:
            tensors["scores"] = pick_scores(scorer, [pair.pair for pair in waiting if pair.pair is not None])
        made.append(tensors)
        waiting.clear()

    def save() -> None:
        nonlocal number
        _judge(counts, plan, study)  # early, where there are many parts
        with replace_when_done(work / "pairs" / f"{number:05d}.parquet") as temporary:
            pd.DataFrame(records).to_parquet(temporary, index=False)
        state = {"next": seen, "undecodable": counts.undecodable_rows}
        tensors = {name: torch.cat([each[name] for each in made]) for name in made[0]}
        # Written last: a part is finished where its latents are.
        _save(tensors, work / "latents" / f"{number:05d}.safetensors", {"state": json.dumps(state)})
        number += 1
        made.clear()
        records.clear()

    pairs = decoded(_stored_pairs(plan, start), Cutting.of(study), scorer is not None, study.data.workers)
    with tqdm(total=plan.pairs, initial=counts.kept, desc="prepare: pairs", unit="pair", mininterval=0.5) as bar:
        for pair in pairs:
            bar.update()
            seen = pair.row + 1
            if pair.squares is None:
                counts.spoilt(pair.row)
                continue
            counts.kept += 1
            waiting.append(pair)
            records.append(_record(pair))
            if len(waiting) == at_once:
                encode()
            if len(records) == part:
                save()
        if waiting:
            encode()
        _judge(counts, plan, study)
        if records:
            save()
    return counts


def _stored_pairs(plan: Plan, start: int) -> Iterator[EncodedPair]:
    """The plan's pairs from row `start` on, while the next of its files is fetched."""
    wanted: list[tuple[Shard, np.ndarray, int]] = []
    first = 0
    for shard, rows, size in zip(plan.shards, plan.rows, plan.sizes, strict=True):
        left = rows[rows >= start - first]
        if len(left):
            wanted.append((shard, left, first))
        first += size
    with ThreadPoolExecutor(1) as pool:
        files = in_order(pool, fetch, [shard for shard, _, _ in wanted], ahead=1)
        for file, (_, rows, number) in zip(files, wanted, strict=True):
            yield from read_encoded(file, rows, number)


def _finished(work: Path, counts: Counts) -> tuple[Counts, int, int]:
    """What whole parts hold: their counts, how many they are, and the row behind them."""
    parts, start = _parts(work / "latents"), 0
    for part in parts:
        with _mapped(part) as stored:
            state = json.loads(stored.metadata()["state"])
            counts.kept += stored.get_slice("win_mean").get_shape()[0]
        start = state["next"]
        counts.undecodable_rows = state["undecodable"]
    counts.undecodable = len(counts.undecodable_rows)
    return counts, len(parts), start


def _encode_captions(study: StudyConfig, work: Path, device: torch.device) -> dict[str, Tensor]:
    """The pairs' captions, each once, as work/captions/*.safetensors; returns what is small (SMALL, and scores)."""
    import pandas as pd

    from invdpo.backbones.text import empty_prompt, encode_prompts, load_text

    storage = getattr(torch, study.data.storage)
    named = pd.concat([pd.read_parquet(part, columns=["caption"]) for part in sorted((work / "pairs").iterdir())])
    codes, captions = pd.factorize(named["caption"], sort=False)
    text = load_text(study.base, device, study.variant)

    def stored(cond: Conditioning) -> Conditioning:
        return cond.map(lambda value: _stored(value, storage, f"the text encoders of `{study.base}`").float())

    empty = stored(empty_prompt(text))
    _write_captions(text, [str(caption) for caption in captions], work / "captions", storage)
    small = {"uncond": empty.embeds, "caption_index": torch.from_numpy(codes.astype(np.int64))}
    names = ["scores"]
    if empty.pooled is not None:
        small["uncond_pooled"] = empty.pooled
        names += ["win_time_ids", "lose_time_ids"]
    if text.zero_empty:
        unsaid = stored(encode_prompts(text, [""]))
        assert unsaid.pooled is not None  # only SDXL's pipeline knows such zeros
        small |= {"unsaid": unsaid.embeds, "unsaid_pooled": unsaid.pooled}
    found: dict[str, list[Tensor]] = {}
    for part in _parts(work / "latents"):
        with _mapped(part) as stored:
            for name in set(names) & set(stored.keys()):
                found.setdefault(name, []).append(stored.get_tensor(name))
    small |= {name: torch.cat(parts) for name, parts in found.items()}
    if "scores" in small:
        _check_span(small["scores"], study)
    return small


def _write_captions(text: Text, captions: list[str], folder: Path, storage: torch.dtype) -> None:
    """Those captions that no part holds yet."""
    from tqdm import tqdm

    from invdpo.backbones.text import encode_prompts

    parts = _parts(folder)
    done, number = sum(map(_length, parts)), len(parts)
    made: list[Conditioning] = []
    with tqdm(total=len(captions), initial=done, desc="prepare: captions", unit="caption", mininterval=0.5) as bar:
        while done < len(captions):
            batch = captions[done : done + CAPTIONS_AT_ONCE]
            made.append(
                encode_prompts(text, batch).map(lambda value: _stored(value, storage, "a text encoder of the base"))
            )
            done += len(batch)
            bar.update(len(batch))
            if done == len(captions) or (len(made) + 1) * _bytes(made[0]) > PART_BYTES:
                tensors = {"embeds": torch.cat([part.embeds for part in made])}
                if made[0].pooled is not None:
                    tensors["pooled"] = torch.cat([part.pooled for part in made if part.pooled is not None])
                _save(tensors, folder / f"{number:05d}.safetensors", {})
                number += 1
                made.clear()


def _bytes(cond: Conditioning) -> int:
    return cond.embeds.nbytes + (0 if cond.pooled is None else cond.pooled.nbytes)


def _publish(
    study: StudyConfig,
    plan: Plan,
    work: Path,
    counts: Counts,
    small: dict[str, Tensor],
    keys: dict[str, str],
    made: dict[str, Any],
    device: torch.device,
    started: float,
) -> dict[str, Any]:
    """Bring what is finished to its place; the report comes last, so whatever it names is whole."""
    import pandas as pd

    from invdpo.provenance import stamp

    folder = study.root / "preferences"
    pairs = pd.concat([pd.read_parquet(part) for part in sorted((work / "pairs").iterdir())], ignore_index=True)
    if plan.positions is not None:
        firsts = np.cumsum([0, *plan.sizes[:-1]])
        planned = np.concatenate([first + rows for first, rows in zip(firsts, plan.rows, strict=True)])
        small["positions"] = torch.from_numpy(plan.positions[np.isin(planned, pairs["row"])])
        small["order"] = torch.tensor(plan.order)  # no metadata, which safetensors writes in any order
    if study.label_columns:
        pairs = pairs.assign(**_labels(plan, pairs["row"].to_numpy(), study.label_columns))
    remove(folder / "report.json")
    for name in ("latents", "captions"):
        mirror(work / name, folder / name)
    _save(small, folder / "cache.safetensors", keys)
    with replace_when_done(folder / "pairs.parquet") as temporary:
        pairs.to_parquet(temporary, index=False)
    report = {
        **stamp(study, config_hash=made["key"][:16], device=device, dtype="fp32", started=started),
        **made,
        "sources": [shard.name for shard in plan.shards],
        "source_files": plan.of,
        "source_bytes": plan.bytes,
        "rows": counts.rows,
        "ties": counts.ties,
        "undecodable": counts.undecodable,
        "undecodable_rows": counts.undecodable_rows,
        "pairs": counts.kept,
        "order": counts.kept if plan.order is None else plan.order,
        "captions": int(small["caption_index"].max()) + 1,
        "stored_bytes": sum(part.stat().st_size for name in ("latents", "captions") for part in _parts(folder / name)),
    }
    if "scores" in small:  # for Pick-a-Pic, SmPO's code has 0.1154 and 0.2820
        report["pickscore_range"] = [float(small["scores"].min()), float(small["scores"].max())]
    write_json(folder / "report.json", report)
    remove(work.parent)
    return report


def _labels(plan: Plan, stored: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """What those columns of the plan's files say of the stored pairs, by their rows (ascending): see `agreements`."""
    firsts = np.cumsum([0, *plan.sizes[:-1]])
    rows = [
        numbers[np.isin(first + numbers, stored)]  # without the undecodable
        for first, numbers in zip(firsts, plan.rows, strict=True)
    ]
    return agreements(plan.shards, rows, columns)


def _add_labels(folder: Path, plan: Plan, columns: Sequence[str]) -> None:
    """Bring a finished cache's pairs.parquet up to arms that came when it was made. Its key stays: the files that it is
    of decide these labels too.
    """
    import pandas as pd

    pairs = pd.read_parquet(folder / "pairs.parquet")
    if lacking := [name for name in columns if name not in pairs]:
        with replace_when_done(folder / "pairs.parquet") as temporary:
            pairs.assign(**_labels(plan, pairs["row"].to_numpy(), lacking)).to_parquet(temporary, index=False)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"another process is preparing {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_disk(folder: Path, needed: int) -> None:
    existing = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InvdpoError(
            f"The latents need {needed / 1e9:.3g} GB more in {folder.parent}, and {free / 1e9:.3g} GB are free. Make "
            "room, set `data.storage: float16`, which takes half of float32, or take fewer pairs (`data.shards`)."
        )


def _stored(value: Tensor, storage: torch.dtype, source: str) -> Tensor:
    """On the CPU in the type of storage; InvdpoError where a number is none there."""
    found = value.cpu().contiguous().to(storage)
    if not torch.isfinite(found).all():
        raise InvdpoError(
            f"What {source} gives is not finite in {str(storage).removeprefix('torch.')}. Set `vae:` to a codec that "
            "is safe in half precision, or `data.storage: float32`."
        )
    return found


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with replace_when_done(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _length(part: Path) -> int:
    """Rows of a part, by its header."""
    with _mapped(part) as stored:
        return stored.get_slice("embeds").get_shape()[0]


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


def _existing(folder: Path, code: str, scored: bool) -> dict[str, Any] | None:
    """The report of a finished preparation by the same code, or None."""
    report = folder / "report.json"
    if not report.is_file() or not (folder / "pairs.parquet").is_file():
        return None
    written = json.loads(report.read_text(encoding="utf-8"))
    # The report is written last, so whatever it names is whole, unless someone took a part of it away.
    try:
        same = written["key"] == load_cache(folder, torch.device("cpu"), scored).key
        return written if same and written.get("code_hash") == code else None
    except InvdpoError:
        return None


def _record(pair: DecodedPair) -> dict[str, Any]:
    return {
        "row": pair.row,
        "caption": pair.caption,
        "winner_sha256": pair.sha256[0],
        "loser_sha256": pair.sha256[1],
    }


def _judge(counts: Counts, plan: Plan, study: StudyConfig) -> None:
    """Stop when too much was unreadable or nothing is left."""
    allowed = study.training.max_undecodable
    if counts.undecodable > allowed * plan.pairs:
        raise InvdpoError(
            f"{counts.undecodable} of the {plan.pairs} decided pairs in `preferences: {study.preferences}` have "
            f"an image that cannot be decoded, more than `training.max_undecodable: {allowed}` allows. "
            f"First such rows: {counts.undecodable_rows[:10]}. Mend the file, or raise the "
            "limit if the loss is acceptable."
        )
    if counts.kept == 0:
        raise InvdpoError(f"No image of the {plan.pairs} pairs in `preferences: {study.preferences}` can be decoded.")


def cache_key(folder: Path, scored: bool = False) -> str:
    """The key of the cache that `prepare` wrote, without reading the rest; `scored`: of pairs and scores together.

    Raises InvdpoError where there is no cache, or no scores in it.
    """
    with _mapped(folder / "cache.safetensors") as stored:
        return _key(stored, folder, scored)


def load_cache(
    folder: Path, device: torch.device, scored: bool = False, columns: Sequence[str] = ()
) -> PreferenceCache:
    """The cache that `prepare` wrote, its rows coming to the device; `scored`: with its PickScores; with those label
    columns.

    Latents and captions stay in their files, mapped. Raises InvdpoError where there is no cache, a part of it is
    missing, or it has no scores or no such labels.
    """
    with _mapped(folder / "cache.safetensors") as stored:
        key = _key(stored, folder, scored)
        names = {*SMALL, *(["scores"] if scored else [])} & set(stored.keys())
        small = {name: stored.get_tensor(name) for name in names}
        order = int(stored.get_tensor("order")) if "order" in stored.keys() else None
    rows = _all_rows(folder / "latents", LATENTS, device) | _all_rows(folder / "captions", CAPTIONS, device)
    needed = {"win_mean": len(small["caption_index"]), "embeds": int(small["caption_index"].max()) + 1}
    for name, count in needed.items():
        if name not in rows or len(rows[name]) != count:
            raise InvdpoError(
                f"{folder} lacks a part: {len(rows.get(name, ())):,} of {count:,} rows of `{name}` are there. Run "
                "`invdpo prepare --study …` again."
            )
    for name in small.keys() - {"caption_index", "positions"}:
        small[name] = small[name].to(device)
    fields: dict[str, Any] = rows | small
    cache = PreferenceCache(**fields, key=key, order=order, labels=_read_labels(folder / "pairs.parquet", columns))
    if cache.scores is None or cache.order is None:
        return cache
    return replace(cache, scores=cache.scores[cache.rows(range(cache.order))])


def _read_labels(path: Path, columns: Sequence[str]) -> dict[str, Tensor]:
    if not columns:
        return {}
    if lacking := [name for name in columns if name not in pq.read_schema(path).names]:
        raise InvdpoError(
            f"{path} holds no labels of `{lacking[0]}`: it was made before the study had an arm that takes them. Run "
            "`invdpo prepare --study …` again."
        )
    found = pq.read_table(path, columns=list(columns))
    return {name: torch.tensor(found.column(name).to_numpy()) for name in columns}


def _all_rows(folder: Path, names: Sequence[str], device: torch.device) -> dict[str, Rows]:
    """Those of the named tensors that lie in the parts of a folder."""
    found: dict[str, list[Tensor]] = {}
    for part in _parts(folder):
        with _mapped(part) as stored:
            for name in set(names) & set(stored.keys()):
                found.setdefault(name, []).append(stored.get_tensor(name))
    return {name: Rows(parts, device) for name, parts in found.items()}


def _key(stored: Any, folder: Path, scored: bool) -> str:
    keys = stored.metadata()
    if scored and "scored_key" not in keys:
        raise InvdpoError(
            f"{folder / 'cache.safetensors'} holds no PickScores, by which this arm weights its pairs: it was made "
            "before the study had such an arm. Run `invdpo prepare --study …` again."
        )
    return keys["scored_key" if scored else "key"]


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors, on the CPU, are views of the mapped file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:  # pyright: ignore[reportArgumentType]
            yield stored
    except (OSError, SafetensorError, KeyError) as error:
        raise InvdpoError(f"{path} cannot be read ({error}). Run `invdpo prepare --study …` first.") from error
