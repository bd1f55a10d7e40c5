"""What an image is worth: PickScore, CLIP, aesthetics, HPSv2, ImageReward, and the shapes world's oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from invdpo.config import ScorersConfig
    from invdpo.hub import Remote
    from invdpo.scorers.openclip import Kind, OpenClip
    from invdpo.scorers.pictures import Preprocessing


class Scorer(Protocol):
    """What evaluation asks of a scorer. version: name, hash of the weights and preprocessing, joined by
    colons.
    """

    version: str

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> score name -> (B,) float32; NaN where a score does not exist.

        Scorers that are given the same `Pictures` share what they have in common (`invdpo.scorers.pictures`).
        """
        ...


@runtime_checkable
class Preprocesses(Protocol):
    """A scorer that sees a picture only through this preprocessing, which can be done beforehand."""

    preprocessing: Preprocessing


@runtime_checkable
class ReadsPrompts(Protocol):
    """A scorer whose text tower reads a limited number of tokens."""

    version: str

    def cut(self, prompts: list[str]) -> int:
        """How many of the prompts are longer than that."""
        ...


def build_scorers(scorers: ScorersConfig, device: torch.device) -> list[Scorer]:
    """The scorers that a study's config names, loaded; those with the same tower and preprocessing share it. Raises
    InvdpoError naming the config field of missing weights.
    """
    built: list[Scorer] = []
    towers: dict[tuple[str | None, ...], OpenClip] = {}

    def tower(
        field: str, model: str, pretrained: str | None, checkpoint: str | None = None, kind: Kind = "open_clip"
    ) -> OpenClip:
        from invdpo.scorers.openclip import OpenClip

        key = (model, pretrained, checkpoint, kind)
        if key not in towers:
            towers[key] = OpenClip(
                model, device, pretrained=pretrained, checkpoint=checkpoint, preprocessing=kind, field=field
            )
        return towers[key]

    if (pick := scorers.pickscore) is not None:
        from invdpo.scorers.pickscore import PickScore

        built.append(PickScore(pick.model, device, processor=pick.processor))
    if (clip := scorers.clip) is not None:
        from invdpo.scorers.clip import ClipScore

        built.append(ClipScore(tower("scorers.clip.model", clip.model, clip.pretrained, kind=clip.preprocessing)))
    if (aesthetic := scorers.aesthetic) is not None:
        from invdpo.scorers.aesthetic import AestheticScore

        own = tower("scorers.aesthetic.tower", aesthetic.tower, aesthetic.pretrained)
        built.append(AestheticScore(aesthetic.model, own))
    if (hps := scorers.hps) is not None:
        from invdpo.scorers.hps import HumanPreferenceScore

        own = tower("scorers.hps.model", hps.model, hps.pretrained, hps.checkpoint, hps.preprocessing)
        built.append(HumanPreferenceScore(own, hps.version))
    if (reward := scorers.imagereward) is not None:
        from invdpo.scorers.imagereward import ImageReward

        built.append(ImageReward(device, checkpoint=reward.checkpoint, med_config=reward.med_config))
    if (oracle := scorers.oracle) is not None:
        from invdpo.scorers.oracle import OracleScore

        built.append(OracleScore(oracle.world))
    return built


def looks(scorers: ScorersConfig) -> list[Callable[[], list[Remote]]]:
    """For each of the scorers' models and files a function that finds it without fetching or loading it.

    It returns those of its files that are the hub's, and raises InvdpoError naming the config field where one is
    missing or not given to this account.
    """
    from invdpo.scorers import aesthetic as head
    from invdpo.scorers import imagereward, openclip, pickscore
    from invdpo.scorers.weights import look_for_file, look_here

    found: list[Callable[[], list[Remote]]] = []
    if (pick := scorers.pickscore) is not None:
        found.append(partial(pickscore.look_for, pick.model, pick.processor))
    if (clip := scorers.clip) is not None:
        found.append(partial(openclip.look_for, clip.model, clip.pretrained, None, "scorers.clip.model"))
    if (aesthetic := scorers.aesthetic) is not None:
        found.append(partial(look_for_file, aesthetic.model, head.FIELD))
        tower = (aesthetic.tower, aesthetic.pretrained, None, "scorers.aesthetic.tower")
        found.append(partial(openclip.look_for, *tower))
    if (hps := scorers.hps) is not None:
        found.append(partial(openclip.look_for, hps.model, hps.pretrained, hps.checkpoint, "scorers.hps.model"))
    if (reward := scorers.imagereward) is not None:
        paths = {"checkpoint": reward.checkpoint, "med_config": reward.med_config}
        found += [partial(look_here, path, f"{imagereward.FIELD}.{name}") for name, path in paths.items() if path]
    return found
