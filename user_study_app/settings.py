"""The `user_study:` section of a study's YAML, and where the user study's files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from invdpo.config import Name, Strict, StudyConfig, explain, nearest
from invdpo.errors import InvdpoError


class GroupConfig(Strict):
    """Two arms that raters choose between."""

    arms: list[Name] = Field(
        min_length=2, max_length=2, description="baseline, then the arm whose win rate is reported"
    )
    pairs: PositiveInt = Field(description="pairs of images, of one prompt and training seed each")


class ConsentConfig(Strict):
    """What a participant reads and agrees to. A new `version` for every change of the text."""

    version: str = Field(min_length=1, description="stored with every consent")
    title: str
    purpose: str
    data: str = Field(description="what is stored, how long, and who sees it")
    withdrawal: str
    ethics: str = Field(description="number of the ethics approval, or the statement of an exemption")
    content_warning: str
    contact: str


class ExclusionConfig(Strict):
    """Whose votes the second analysis leaves out. Written before the first vote: the bundle freezes these rules."""

    max_attention_failures: NonNegativeInt = Field(description="a rater with more wrong answers is left out")
    min_repeat_consistency: float = Field(ge=0, le=1, description="share of repeats answered as the first time")
    min_median_ms: NonNegativeInt = Field(description="milliseconds a trial, the rater's median")


class UserStudyConfig(Strict):
    """A blind pairwise study: which images, how many raters, which checks."""

    groups: list[GroupConfig] = Field(min_length=1)
    raters: PositiveInt = Field(description="slots of the schedule: places for one participant each")
    per_pair: PositiveInt = Field(description="raters who see a pair")
    repeats: NonNegativeInt = Field(description="trials a rater sees again, sides swapped")
    attention: NonNegativeInt = Field(description="trials a rater with an obvious answer; never in a win rate")
    practice: NonNegativeInt = Field(description="trials a rater before those that count")
    break_every: PositiveInt = Field(description="trials between two offers of a break")
    seed: NonNegativeInt
    consent: ConsentConfig
    completion_code: str = Field(min_length=1, description="shown at the end; crowd platforms ask for it")
    min_view_ms: NonNegativeInt = Field(description="milliseconds that both images are shown before a vote counts")
    exclusions: ExclusionConfig

    @model_validator(mode="after")
    def _enough_raters(self) -> Self:
        if self.per_pair > self.raters:
            raise ValueError(f"per_pair {self.per_pair} is more than the {self.raters} raters")
        return self


def read_settings(study: StudyConfig) -> UserStudyConfig:
    """The study's `user_study:` section.

    Raises InvdpoError where there is none, where a key or value is wrong, or where an arm is not the study's.
    """
    if study.user_study is None:
        raise InvdpoError(f"Study `{study.study}` has no `user_study:` section. Copy the one of config/shapes.yaml.")
    try:
        settings = UserStudyConfig.model_validate(study.user_study)
    except ValidationError as error:
        raise InvdpoError(explain(error, UserStudyConfig, f"study `{study.study}`", "user_study.")) from error
    for number, group in enumerate(settings.groups):
        place = f"study `{study.study}`: `user_study.groups[{number}].arms`"
        for arm in group.arms:
            if arm not in study.arms:
                raise InvdpoError(f"{place} names `{arm}`, which is not in `arms`.{nearest(arm, study.arms)}")
        if group.arms[0] == group.arms[1]:
            raise InvdpoError(f"{place} names `{group.arms[0]}` twice. Name two arms.")
    compared = [frozenset(group.arms) for group in settings.groups]
    if len(set(compared)) < len(compared):
        raise InvdpoError(f"study `{study.study}`: two of `user_study.groups` compare the same arms. Merge them.")
    return settings


class Places:
    """The user study's files under results/<study>/user_study/. The key lies outside what is served."""

    def __init__(self, study: StudyConfig):
        self.root: Path = study.root / "user_study"
        self.bundle = self.root / "bundle"
        self.key = self.root / "key.json"
        self.earlier = self.root / "earlier"
        self.votes = self.root / "votes.csv"

    @property
    def voted(self) -> bool:
        """Whether the export holds a vote: without one it is a line of column names."""
        return self.votes.is_file() and self.votes.read_bytes().count(b"\n") > 1
