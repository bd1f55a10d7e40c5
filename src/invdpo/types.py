"""The two types that every numerical part of the study shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is conditioned on, one row a latent.

    embeds: (B, L, D) token embeddings. pooled: (B, P) and time_ids: (B, 6) exist for the SDXL family only.
    uncond: the same fields for the empty prompt, needed wherever guidance differs from 1.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    uncond: Conditioning | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with `function` applied to every tensor (indexing, repeating, moving)."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Conditioning):
                changed[field.name] = value.map(function)
        return Conditioning(**changed)

    def without_uncond(self) -> Conditioning:
        """The conditional half alone."""
        return Conditioning(self.embeds, self.pooled, self.time_ids)


# eps_model(x (B,C,H,W), t (B,) int64, cond) -> the predicted noise (B,C,H,W). Any callable will do; tests plug in
# closed-form ones.
EpsModel = Callable[[Tensor, Tensor, Conditioning | None], Tensor]


def select(cond: Conditioning | None, index: Tensor) -> Conditioning | None:
    """The rows `index` (int64) of a conditioning; rows may repeat. None stays None."""
    return None if cond is None else cond.map(lambda value: value[index.to(value.device)])


def concatenate(first: Conditioning | None, second: Conditioning | None) -> Conditioning | None:
    """Two conditionings of the same kind, one after the other."""
    if first is None or second is None:
        return None
    return Conditioning(
        torch.cat([first.embeds, second.embeds]),
        None if first.pooled is None or second.pooled is None else torch.cat([first.pooled, second.pooled]),
        None if first.time_ids is None or second.time_ids is None else torch.cat([first.time_ids, second.time_ids]),
        concatenate(first.uncond, second.uncond),
    )
