"""The two types that every numerical part of the study shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is conditioned on, one row a latent.

    embeds: (B, L, D) token embeddings. pooled: (B, P) and time_ids: (B, 6) exist for the SDXL family only; time_ids
    are pixels: (h, w) of the original image, (top, left) of the crop, (h, w) of the target.
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

    def with_time_ids(self, time_ids: Tensor) -> Conditioning:
        """The same prompts for images of these sizes (B, 6); the empty prompt gets the same sizes."""
        uncond = None if self.uncond is None else self.uncond.with_time_ids(time_ids)
        return replace(self, time_ids=time_ids, uncond=uncond)

    def without_uncond(self) -> Conditioning:
        """The conditional half alone."""
        return Conditioning(self.embeds, self.pooled, self.time_ids)


# eps_model(x (B,C,H,W), t (B,) int64, cond) -> the predicted noise (B,C,H,W). Any callable will do; tests plug in
# closed-form ones.
EpsModel = Callable[[Tensor, Tensor, Conditioning | None], Tensor]


@overload
def select(cond: Conditioning, index: Tensor) -> Conditioning: ...
@overload
def select(cond: None, index: Tensor) -> None: ...
@overload
def select(cond: Conditioning | None, index: Tensor) -> Conditioning | None: ...
def select(cond: Conditioning | None, index: Tensor) -> Conditioning | None:
    """The rows `index` (int64) of a conditioning; rows may repeat. None stays None."""
    return None if cond is None else cond.map(lambda value: value[index.to(value.device)])


def where(chosen: Tensor, first: Conditioning, second: Conditioning) -> Conditioning:
    """The rows of `first` where chosen (B,) is true, those of `second` elsewhere: prompts only, sizes are left out."""
    embeds = torch.where(chosen[:, None, None], first.embeds, second.embeds)
    if first.pooled is None or second.pooled is None:
        return Conditioning(embeds)
    return Conditioning(embeds, torch.where(chosen[:, None], first.pooled, second.pooled))


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
