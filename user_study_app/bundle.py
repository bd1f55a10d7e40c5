"""Freezes what raters will see: results/<study>/user_study/bundle/ (served) and key.json beside it (never served).

The bundle names no method. Which image is whose, and in which order, comes from a generator seeded by the study's
`user_study.seed` *and* a random salt: everything else in here is public, and without the salt nobody can work it out
again. key.json holds the salt and, of every image, what it is and its scores, for the analysis. A rebuild reuses the
salt, so that the same images give the same bytes. A bundle that has votes in the study's database is never replaced;
any other that changes is moved, with its key, to user_study/earlier/, in case votes lie elsewhere.

Trial prompts are drawn at random and belong to one group each: an image seen in two groups would show which method the
groups share. A pair is one prompt and one training seed of both arms (an arm that is not trained has one image a
prompt, the same in all its pairs). A pair whose two images are equal stays: a tie is the right answer to it.
Practice and attention pairs use prompts of their own. An attention pair sets a picture that fits its prompt, by the
study's CLIP score, against a picture of a prompt that shares as few words as possible.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.files import remove, replace_when_done, write_json
from user_study_app.schedule import PairPlan, draw
from user_study_app.settings import GroupConfig, Places, UserStudyConfig, read_settings

FORMAT = 1
MTIME = 946_684_800  # of every image: 2000-01-01, so that a file's time says nothing
CANDIDATES = 6  # prompts set aside for each attention pair, to find two that fit well and share few words
CONSENT = ("break_every", "completion_code", "min_view_ms")  # what the page follows beside the texts


@dataclass(frozen=True)
class Source:
    """One image of the study. `sha256` is of its pixels, as in images/ and scores/."""

    arm: str
    seed: int
    step: int
    prompt_id: int
    prompt: str
    sha256: str


@dataclass(frozen=True)
class Pair:
    """Two images of a group; the first is the first arm's or, of an attention pair, the one that fits the prompt."""

    kind: Literal["trial", "attention", "practice"]
    group: str
    prompt: str
    sources: tuple[Source, Source]


Images = dict[tuple[int, int], Source]  # by training seed and prompt id


class Salt:
    """Names and draws that nobody without the salt can work out."""

    def __init__(self, salt: str):
        self.salt = salt

    def token(self, *parts: object) -> str:
        """32 hex digits, the same for the same parts."""
        return self._digest(*parts).hexdigest()[:32]

    def generator(self, *parts: object) -> np.random.Generator:
        """A generator seeded by the parts."""
        return np.random.default_rng(int.from_bytes(self._digest(*parts).digest()))

    def _digest(self, *parts: object) -> hmac.HMAC:
        return hmac.new(bytes.fromhex(self.salt), json.dumps(parts).encode(), hashlib.sha256)


def build(study: StudyConfig) -> Path:
    """Freeze the study's pairs; the bundle's folder. A bundle with votes in the study's database stays as it is.

    Raises InvdpoError: no or wrong settings, images or scores missing, too few prompts, images of different sizes.
    """
    settings, places = read_settings(study), Places(study)
    if votes := votes_given(places):
        print(f"{places.bundle} stays as it is: votes were given on it ({votes}).")
        for path in (places.key, *places.bundle.glob("*.json")):
            os.utime(path)  # made anew, for who compares times
        return places.bundle
    old_key = json.loads(places.key.read_text()) if places.key.exists() else {}
    salt = Salt(old_key.get("salt") or secrets.token_hex(32))
    rng = salt.generator("seed", settings.seed)

    names = [chr(ord("A") + number) for number in range(len(settings.groups))]
    groups = {name: settings.groups[at] for name, at in zip(names, rng.permutation(len(names)), strict=True)}
    images = {arm: read_sources(study, arm) for arm in sorted({arm for group in groups.values() for arm in group.arms})}
    trials, spare = draw_trials(images, groups, settings, rng)
    pairs = trials + draw_practice(images, groups, settings, spare, rng)
    pairs += draw_attention(study, images, groups, settings, spare, rng)

    rows: list[dict[str, Any]] = []
    plans: list[PairPlan] = []
    files: dict[str, Source] = {}
    for pair in pairs:
        token = salt.token("pair", pair.kind, pair.group, [vars(source) for source in pair.sources])
        reference = int(rng.integers(2))
        tokens = [salt.token("image", token, number) for number in range(2)]
        files |= {tokens[reference]: pair.sources[0], tokens[1 - reference]: pair.sources[1]}
        plans.append(PairPlan(token, pair.kind, pair.group, pair.prompt, reference))
        row = {"pair": token, "group": pair.group, "kind": pair.kind, "prompt": pair.prompt, "images": tokens}
        rows.append(row | {"expected": reference if pair.kind == "attention" else None})
    schedule = draw(plans, settings, rng)
    consent = settings.consent.model_dump() | {name: getattr(settings, name) for name in CONSENT}

    with replace_when_done(places.bundle) as folder:
        (folder / "images").mkdir(parents=True)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "study": study.study,
            "groups": names,
            "pairs": sorted(rows, key=lambda row: row["pair"]),
            "files": write_images(folder / "images", files, study, salt),
            "exclusions": settings.exclusions.model_dump(),
        }
        manifest |= _dated(places.bundle, manifest, schedule, consent)
        for name, content in (("manifest", manifest), ("schedule", schedule), ("consent", consent)):
            write_json(folder / f"{name}.json", content)
        _keep_earlier(places, old_key.get("bundle"), manifest["bundle"])
        scores = read_scores(study, files.values())
        key = {
            "bundle": manifest["bundle"],
            "salt": salt.salt,
            "groups": {name: {"arms": group.arms} for name, group in groups.items()},
            "images": {token: vars(source) | {"scores": scores[source]} for token, source in files.items()},
        }
        with replace_when_done(places.key) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(key, sort_keys=True, indent=2) + "\n", encoding="utf-8")
    return places.bundle


def votes_given(places: Places) -> int:
    """How many votes the study's database holds: INVDPO_USER_STUDY_DB, or else the file beside the bundle."""
    from user_study_app.storage import Storage, database_url  # which read bundles, and so import this module

    url = database_url(places.bundle)
    own = places.root / "votes.db"
    if not places.bundle.is_dir() or (url == f"sqlite:///{own}" and not own.is_file()):
        return 0
    storage = Storage(url)
    votes = len(storage.votes())
    storage.close()
    return votes


def content_hash(manifest: dict[str, Any], schedule: dict[str, Any], consent: dict[str, Any]) -> str:
    """sha256 of everything in a bundle but the field `bundle` itself; images count through their hashes."""
    content = [{key: value for key, value in manifest.items() if key != "bundle"}, schedule, consent]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_sources(study: StudyConfig, arm: str) -> Images:
    """(training seed, prompt id) -> image of the arm's last checkpoint. An arm that is not trained has the same image,
    of seed 0, at every seed.
    """
    found: Images = {}
    for seed in study.seeds:
        own = seed if study.arm(arm).trains else 0
        path = study.root / "images" / arm / f"seed{own}.parquet"
        rows = _read(path, study, columns=["step", "prompt_id", "prompt", "sha256"])
        for step, prompt_id, prompt, sha256 in rows.itertuples(index=False):
            found[seed, prompt_id] = Source(arm, own, step, prompt_id, prompt, sha256)
    return found


def _read(path: Path, study: StudyConfig, **options: Any) -> pd.DataFrame:
    if not path.is_file():
        raise InvdpoError(f"{path} is missing. Run `make reproduce STUDY={study.study}` first.")
    return pd.read_parquet(path, **options)


def _matched(images: dict[str, Images], arms: Sequence[str]) -> dict[int, list[tuple[Source, Source]]]:
    """Prompt id -> its pairs, one a training seed."""
    first, second = (images[arm] for arm in arms)
    pairs: dict[int, list[tuple[Source, Source]]] = {}
    for seed, prompt_id in sorted(set(first) & set(second)):
        pairs.setdefault(prompt_id, []).append((first[seed, prompt_id], second[seed, prompt_id]))
    return pairs


def _pictures(images: dict[str, Images], prompts: Sequence[int]) -> list[Source]:
    """Every image of those prompts, once."""
    found = {source for of_arm in images.values() for source in of_arm.values() if source.prompt_id in set(prompts)}
    return sorted(found, key=lambda source: (source.arm, source.seed, source.prompt_id))


def draw_trials(
    images: dict[str, Images],
    groups: dict[str, GroupConfig],
    settings: UserStudyConfig,
    rng: np.random.Generator,
) -> tuple[list[Pair], list[int]]:
    """The pairs that count, and the ids of the prompts that no group uses, in random order.

    Prompts are divided among the groups as their numbers of pairs are; a group takes as many of its prompts as it has
    use for, and as equal numbers of pairs of each as possible.
    """
    known = sorted(set.intersection(*({prompt for _, prompt in source} for source in images.values())))
    order = [known[i] for i in rng.permutation(len(known))]
    kept = settings.practice + CANDIDATES * settings.attention
    wanted = np.array([group.pairs for group in groups.values()])
    ends = np.rint(np.cumsum(wanted) / wanted.sum() * max(0, len(order) - kept)).astype(int)
    spare, trials = order[ends[-1] :], []
    for (name, group), start, end in zip(groups.items(), [0, *ends[:-1]], ends, strict=True):
        matched = _matched(images, group.arms)
        mine = order[start:end]
        there = sum(len(matched[prompt]) for prompt in mine)
        if there < group.pairs:
            raise InvdpoError(
                f"user_study: the group {' against '.join(group.arms)} is to have {group.pairs} pairs. Its share of "
                f"{len(mine)} of the {len(known)} prompts ({kept} are set aside for practice and attention) gives "
                f"{there}. Lower `pairs`, or raise `sampling.prompts` or the number of `seeds`."
            )
        queues = [[matched[prompt][i] for i in rng.permutation(len(matched[prompt]))] for prompt in mine]
        rounds = [queue[depth] for depth in range(max(map(len, queues))) for queue in queues if depth < len(queue)]
        trials += [Pair("trial", name, chosen[0].prompt, chosen) for chosen in rounds[: group.pairs]]
        spare += mine[group.pairs :]
    return trials, spare


def draw_practice(
    images: dict[str, Images],
    groups: dict[str, GroupConfig],
    settings: UserStudyConfig,
    spare: list[int],
    rng: np.random.Generator,
) -> list[Pair]:
    """Pairs to learn the page with, of the groups in turn; takes their prompts from `spare`."""
    pairs = []
    for number in range(settings.practice):
        name, group = list(groups.items())[number % len(groups)]
        choices = _matched(images, group.arms)[spare.pop()]
        chosen = choices[int(rng.integers(len(choices)))]
        pairs.append(Pair("practice", name, chosen[0].prompt, chosen))
    return pairs


def draw_attention(
    study: StudyConfig,
    images: dict[str, Images],
    groups: dict[str, GroupConfig],
    settings: UserStudyConfig,
    spare: list[int],
    rng: np.random.Generator,
) -> list[Pair]:
    """Pairs with an obvious answer: of the half of `spare` that is drawn best, the prompts least alike in words."""
    if not settings.attention:
        return []
    if study.scorers.clip is None:
        raise InvdpoError(
            "user_study: `attention` needs `scorers.clip`, which says what picture fits its prompt. Add it, or set "
            "`attention: 0`."
        )
    fit = {source: scores["clip"] for source, scores in read_scores(study, _pictures(images, spare)).items()}
    best = {}
    for source, score in fit.items():
        if score > best.get(source.prompt_id, (source, -np.inf))[1]:
            best[source.prompt_id] = (source, score)
    fitting = sorted(best, key=lambda prompt: -best[prompt][1])[: max(2 * settings.attention, len(best) // 2)]
    words = {prompt: set(re.findall(r"\w+", best[prompt][0].prompt.lower())) for prompt in fitting}

    def unlike(right: int, wrong: int) -> tuple[float, float]:
        shared = len(words[right] & words[wrong]) / len(words[right] | words[wrong])
        return shared, -best[right][1]

    pairs: list[Pair] = []
    used: set[int] = set()
    for right, wrong in sorted(permutations(fitting, 2), key=lambda two: unlike(*two)):
        if len(pairs) < settings.attention and not used & {right, wrong}:
            used |= {right, wrong}
            name = list(groups)[int(rng.integers(len(groups)))]
            pairs.append(Pair("attention", name, best[right][0].prompt, (best[right][0], best[wrong][0])))
    return pairs


def read_scores(study: StudyConfig, sources: Iterable[Source]) -> dict[Source, dict[str, float]]:
    """Image -> score name -> score. A score that does not exist for a prompt is absent."""
    wanted = {(source.arm, source.seed, source.step, source.prompt_id): source for source in sources}
    scores: dict[Source, dict[str, float]] = {source: {} for source in wanted.values()}
    for arm, seed in sorted({(arm, seed) for arm, seed, _, _ in wanted}):
        path = study.root / "scores" / arm / f"seed{seed}.parquet"
        rows = _read(path, study, columns=["step", "prompt_id", "image_sha256", "scorer", "score"])
        for step, prompt_id, sha256, scorer, score in rows.itertuples(index=False):
            source = wanted.get((arm, seed, step, prompt_id))
            if source and source.sha256 != sha256:
                raise InvdpoError(f"{path} scores other images than images/{arm} holds. Evaluate `{arm}` again.")
            if source:
                scores[source][scorer] = score
    return scores


def write_images(folder: Path, files: dict[str, Source], study: StudyConfig, salt: Salt) -> dict[str, str]:
    """Write folder/<token>.png from pixels alone, all of one length and time; token -> sha256 of the file.

    The padding, after the end of the PNG, is random and of each file's own: no two files are equal, not even two of the
    same picture. Raises InvdpoError for a picture that is not the one its row names, and for two sizes in pixels.
    """
    encoded: dict[str, bytes] = {}
    sizes: dict[tuple[int, int], Source] = {}
    wanted = pd.DataFrame([{"token": token, **vars(source)} for token, source in files.items()])
    for (arm, seed), rows in wanted.groupby(["arm", "seed"]):  # pyright: ignore[reportGeneralTypeIssues]
        path = study.root / "images" / str(arm) / f"seed{seed}.parquet"
        filters = [("prompt_id", "in", sorted(set(rows["prompt_id"])))]
        pictures = dict(_read(path, study, columns=["prompt_id", "png"], filters=filters).itertuples(index=False))
        for token, prompt_id in zip(rows["token"], rows["prompt_id"], strict=True):
            picture = Image.open(io.BytesIO(pictures[prompt_id]))
            if hashlib.sha256(picture.tobytes()).hexdigest() != files[token].sha256:
                raise InvdpoError(f"{path}: the picture of prompt {prompt_id} is damaged. Evaluate `{arm}` again.")
            sizes[picture.size] = files[token]
            plain = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
            stream = io.BytesIO()
            plain.save(stream, "PNG", optimize=True)
            encoded[token] = stream.getvalue()
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height} ({source.arm})" for (width, height), source in sizes.items())
        raise InvdpoError(f"user_study: images of different sizes would show whose they are: {shown}.")
    length = max(map(len, encoded.values()))
    hashes = {}
    for token, content in sorted(encoded.items()):
        content += salt.generator("padding", token).bytes(length - len(content) + 32)
        path = folder / f"{token}.png"
        path.write_bytes(content)
        os.utime(path, (MTIME, MTIME))
        hashes[token] = hashlib.sha256(content).hexdigest()
    return hashes


def _dated(before: Path, manifest: dict[str, Any], schedule: dict[str, Any], consent: dict[str, Any]) -> dict[str, str]:
    """The fields `created` and `bundle`: those of the bundle that is there already, where nothing else differs."""
    try:
        old = json.loads((before / "manifest.json").read_text())
    except FileNotFoundError:
        old = {}
    created = {"created": old.get("created", "")}
    if content_hash(manifest | created, schedule, consent) != old.get("bundle"):
        created = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    return created | {"bundle": content_hash(manifest | created, schedule, consent)}


def _keep_earlier(places: Places, old: str | None, new: str) -> None:
    """Move a bundle that is about to be replaced by another one out of the way, with a copy of its key."""
    if old is None or old == new:
        return
    kept = places.earlier / old[:12]
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy2(places.key, kept / "key.json")
    if places.bundle.is_dir():
        remove(kept / "bundle")
        os.replace(places.bundle, kept / "bundle")
