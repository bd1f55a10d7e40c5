"""The frozen bundle as the server reads it: pairs, schedule, texts and images. It names no method, and the key file
that does is never opened here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from invdpo.errors import InvdpoError

FORMAT = 1

Kind = Literal["practice", "trial", "repeat", "attention"]
FileToken = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Side = Literal[0, 1]
Model = TypeVar("Model", bound=BaseModel)


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Pair(_Read):
    """Two images of one prompt. `expected` is the index of the image an attentive rater must choose."""

    pair: str
    group: str
    prompt: str
    kind: Literal["trial", "attention", "practice"]
    images: tuple[FileToken, FileToken]
    expected: Side | None = None


class Manifest(_Read):
    """`manifest.json`."""

    format: int
    bundle: str
    study: str
    groups: list[str]
    pairs: list[Pair]
    files: dict[FileToken, str]


class Trial(_Read):
    """One line of a rater's schedule: `left` is the index of the pair's image shown on the left."""

    pair: str
    left: Side
    kind: Kind
    repeat_of: int | None = None


class Slot(_Read):
    """What one rater is shown, in order."""

    slot: int
    trials: list[Trial] = Field(min_length=1)


class Schedule(_Read):
    """`schedule.json`."""

    slots: list[Slot] = Field(min_length=1)


class Texts(_Read):
    """`consent.json`: what the rater reads, and the three values that the page follows.

    `min_view_ms` is how long both images are shown before a choice is taken, `break_every` the number of pairs
    between two offered breaks (0: none).
    """

    version: str
    title: str
    purpose: str
    data: str
    withdrawal: str
    ethics: str
    content_warning: str
    contact: str
    completion_code: str
    min_view_ms: int = Field(ge=0)
    break_every: int = Field(ge=0)


def content_hash(manifest: dict[str, Any], schedule: dict[str, Any], consent: dict[str, Any]) -> str:
    """sha256 of everything in a bundle but the field `bundle` itself; images count through their hashes."""
    content = [{key: value for key, value in manifest.items() if key != "bundle"}, schedule, consent]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Stimuli:
    """A bundle that was read and checked: every image is there, and is the one the manifest names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _load(Manifest, folder / "manifest.json")
        if self.manifest.format != FORMAT:
            raise InvdpoError(
                f"{folder / 'manifest.json'} has format {self.manifest.format}; this server reads format {FORMAT}. "
                "Build the bundle again with this version of the code."
            )
        self.schedule = _load(Schedule, folder / "schedule.json")
        self.texts = _load(Texts, folder / "consent.json")
        contents = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("manifest", "schedule", "consent"))
        if content_hash(*contents) != self.manifest.bundle:
            raise InvdpoError(f"{folder} is not as it was frozen: its hash differs. Build the bundle again.")
        self.pairs = {pair.pair: pair for pair in self.manifest.pairs}
        self.slots = {slot.slot: slot.trials for slot in self.schedule.slots}
        self._check()

    @property
    def bundle(self) -> str:
        """The hash that names this bundle in the database and in every exported vote."""
        return self.manifest.bundle

    def pair_of(self, slot: int, position: int) -> Pair:
        """The pair a rater of `slot` sees at `position`."""
        return self.pairs[self.slots[slot][position].pair]

    def file_of(self, slot: int, position: int, side: Side) -> Path:
        """The image on the left (0) or right (1) of a trial."""
        trial = self.slots[slot][position]
        left = trial.left
        return self._path(self.pairs[trial.pair].images[left if side == 0 else 1 - left])

    def practice(self, slot: int) -> int:
        """How many trials at the start of a slot are practice."""
        return sum(trial.kind == "practice" for trial in self.slots[slot])

    def _path(self, token: str) -> Path:
        return self.folder / "images" / f"{token}.png"

    def _check(self) -> None:
        unknown = sorted({trial.pair for trials in self.slots.values() for trial in trials} - set(self.pairs))
        if unknown:
            raise InvdpoError(
                f"{self.folder / 'schedule.json'} shows pair {unknown[0]}, which {self.folder / 'manifest.json'} does "
                "not have. The two belong to different bundles; build the bundle again."
            )
        for pair in self.manifest.pairs:
            for token in pair.images:
                if token not in self.manifest.files:
                    raise InvdpoError(f"{self.folder / 'manifest.json'} has no hash of image {token}. Build it again.")
        sizes: set[int] = set()
        for token, expected in self.manifest.files.items():
            path = self._path(token)
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                raise InvdpoError(f"{path} is missing from the bundle. Build the bundle again.") from None
            if hashlib.sha256(content).hexdigest() != expected:
                raise InvdpoError(f"{path} is not the image that was frozen: its hash differs. Build it again.")
            sizes.add(len(content))
        if len(sizes) > 1:
            raise InvdpoError(
                f"The images of {self.folder} have {len(sizes)} different lengths in bytes, which can tell methods "
                "apart. Build the bundle again: it pads them to one length."
            )


def _load(model: type[Model], path: Path) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InvdpoError(
            f"There is no {path}. Make the bundle first: the target `user_study_bundle` of the study, or "
            "`invdpo study bundle --study config/<study>.yaml`."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InvdpoError(f"{path}: {where}: {first['msg']}. Build the bundle again.") from None
