"""The world's own judgement of its pictures, which no learned scorer has."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from invdpo.errors import InvdpoError
from invdpo.scorers.weights import sha12


class OracleScore:
    """`score` gives oracle_utility, oracle_sg_iou, oracle_entity_iou, oracle_relation_iou and, for every task of
    `invdpo.scorers.composition` that one of the captions asks for, oracle_<benchmark>_<task>, (B,) each.

    NaN where the world says that a score does not exist (relation_iou of a caption without a relation, a task that
    this caption does not ask for). The version carries a hash of the sources that its judgement depends on: the
    world's, and the rules of scene graphs and benchmarks. Raises InvdpoError for a prompt or a picture that is none of
    this world's.
    """

    def __init__(self, world: str):
        if world != "shapes":
            raise InvdpoError(f"scorers.oracle.world: there is no world {world!r}; the only one is 'shapes'")
        self.oracle = import_module("invdpo.world.oracle")
        source = Path(str(self.oracle.__file__)).parent
        rules = [Path(__file__).with_name(name) for name in ("composition.py", "scene_graph.py")]
        self.version = f"oracle:{sha12([*sorted(source.glob('*.py')), *rules])}:{world}"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> arrays (B,) float32, higher is better."""
        try:
            rows = [self.oracle.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        except ValueError as error:
            raise InvdpoError(f"scorers.oracle: {error}; drop `oracle` from `scorers` for other prompts") from error
        names = dict.fromkeys(name for row in rows for name in row)
        return {f"oracle_{name}": np.array([row.get(name, np.nan) for row in rows], dtype=np.float32) for name in names}
