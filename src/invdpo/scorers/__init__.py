"""What an image is worth: PickScore, CLIP, aesthetics, HPSv2, and the shapes world's oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from invdpo.config import ScorersConfig


class Scorer(Protocol):
    """What evaluation asks of a scorer. version: name, hash of the weights and preprocessing, joined by
    colons.
    """

    version: str

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> score name -> (B,) float32; NaN where a score does not exist."""
        ...


def build_scorers(scorers: ScorersConfig, device: torch.device) -> list[Scorer]:
    """The scorers that a study's config names, loaded. Raises InvdpoError naming the config field of missing
    weights.
    """
    built: list[Scorer] = []
    if (pick := scorers.pickscore) is not None:
        from invdpo.scorers.pickscore import PickScore

        built.append(PickScore(pick.model, device, processor=pick.processor))
    if (clip := scorers.clip) is not None:
        from invdpo.scorers.clip import ClipScore

        built.append(ClipScore(clip.model, device, pretrained=clip.pretrained))
    if (aesthetic := scorers.aesthetic) is not None:
        from invdpo.scorers.aesthetic import AestheticScore

        built.append(AestheticScore(aesthetic.model, device, tower=aesthetic.tower, pretrained=aesthetic.pretrained))
    if (hps := scorers.hps) is not None:
        from invdpo.scorers.hps import HumanPreferenceScore

        built.append(HumanPreferenceScore(hps.model, device, checkpoint=hps.checkpoint, pretrained=hps.pretrained))
    if (oracle := scorers.oracle) is not None:
        from invdpo.scorers.oracle import OracleScore

        built.append(OracleScore(oracle.world))
    return built
