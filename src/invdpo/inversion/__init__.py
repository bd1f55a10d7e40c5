"""Inversion: from an image's latent back along the deterministic sampler to the noise that it came from."""

from invdpo.inversion.guidance import guided
from invdpo.inversion.round_trip import round_trip, round_trip_error, sample_back, step_residual
from invdpo.inversion.solver import Label, Solver
from invdpo.inversion.trajectory import Arrival, Trajectory, invert, invert_to

__all__ = [
    "Arrival",
    "Label",
    "Solver",
    "Trajectory",
    "guided",
    "invert",
    "invert_to",
    "round_trip",
    "round_trip_error",
    "sample_back",
    "step_residual",
]
