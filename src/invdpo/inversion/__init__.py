"""Inversion: from an image's latent back along the deterministic sampler to the noise that it came from."""

from invdpo.inversion.guidance import guided
from invdpo.inversion.trajectory import Arrival, Label, Trajectory, invert, invert_to

__all__ = ["Arrival", "Label", "Trajectory", "guided", "invert", "invert_to"]
