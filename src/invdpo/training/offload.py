"""A frozen network whose weights are on the GPU only while it works."""

from __future__ import annotations

import torch
from torch import Tensor

from invdpo.types import Conditioning, EpsModel


class Offloaded:
    """An eps-model whose network `module` lies in the CPU's memory until it is called, and again after `release`.

    The weights are copied to the GPU and never back: nothing changes them.
    """

    def __init__(self, model: EpsModel, module: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            # Page-locked memory: several times faster to copy from.
            parameter.data = parameter.data.pin_memory() if device.type == "cuda" else parameter.data
        self.stored = [parameter.data for parameter in self.parameters]
        self.present = False

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        if not self.present:
            self.fetch()
        return self.model(x, t, cond)

    def fetch(self) -> None:
        """Copy the weights to the device."""
        for parameter, stored in zip(self.parameters, self.stored, strict=True):
            parameter.data = stored.to(self.device, non_blocking=True)
        self.present = True

    def release(self) -> None:
        """Give the device's memory back."""
        for parameter, stored in zip(self.parameters, self.stored, strict=True):
            parameter.data = stored
        self.present = False

    def released_before(self, model: EpsModel) -> EpsModel:
        """Another eps-model, in whose calls the weights are not on the device."""

        def alone(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
            if self.present:
                self.release()
            return model(x, t, cond)

        return alone
