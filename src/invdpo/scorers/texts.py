"""Embeddings of prompts, kept: a study shows each of its prompts to every method, seed and checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 20_000  # prompts; 80 MB of 1,024 floats each


class Texts:
    """A text tower that sees every prompt once.

    embed: n prompts -> (n, D). Repeated prompts, in a call or in a later one, get the same row.
    """

    def __init__(self, embed: Callable[[list[str]], Tensor]):
        self._embed = embed
        self._kept: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> Tensor:
        """(len(prompts), D), in their order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if len(self._kept) + len(new) > KEPT:
            self.forget()
            new = list(dict.fromkeys(prompts))
        if new:
            self._kept.update(zip(new, self._embed(new), strict=True))
        return torch.stack([self._kept[prompt] for prompt in prompts])

    def forget(self) -> None:
        """Keep none."""
        self._kept = {}
