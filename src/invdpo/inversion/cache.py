"""Inversions by a frozen model, computed once and kept on disk for every method that needs them.

An inversion by the reference is a function of the latents, their prompts, N, the solver, guidance and label, and of
nothing that a method trains: Eq. 16, its rounded start and its published values ask for the very same ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from invdpo.errors import InvdpoError
from invdpo.files import is_full_disk, remove, replace_when_done
from invdpo.inversion.solver import Label
from invdpo.inversion.trajectory import Trajectory, invert
from invdpo.provenance import code_hash
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel

CODE = ("inversion", "schedule", "backbones")  # modules that decide a trajectory's bits
LOOKS = 32  # at all files, while a folder's whole limit is written: what several jobs may exceed it by, in parts


class Inverter(Protocol):
    """What `invert` is, or a `TrajectoryCache.invert`."""

    def __call__(
        self,
        eps_model: EpsModel,
        x0: Tensor,
        cond: Conditioning | None,
        schedule: NoiseSchedule,
        steps: int,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        label: Label = "next",
    ) -> Trajectory: ...


@dataclass
class Savings:
    """Inversions asked for and found, and what the found ones once cost: UNet evaluations and seconds."""

    asked: int = 0
    found: int = 0
    unet_evals: int = 0
    seconds: float = 0.0


class TrajectoryCache:
    """Trajectories of one frozen model in a folder that any number of processes may share.

    An entry is a whole call's batch, keyed by all that its bits depend on. Rows are not kept one by one: kernels round
    differently in another batch, and a policy that is compared with the reference at the very latents of a trajectory
    must see a difference of exactly zero where the two are equal.

    Files are whole or absent; one that is damaged, or that another process has just deleted, counts as not found. When
    the files exceed `limit_bytes`, the ones unused for longest go, down to the limit; each process may exceed it by one
    thirty-second and an entry meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        model: str,
        savings: Savings | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """model: what identifies the frozen model's predictions, from `identity`. savings: counted on from there.
        agree: whether a trajectory is taken that was found or not, for processes that can only invert together."""
        self.folder, self.limit_bytes, self.model, self.agree = folder, limit_bytes, model, agree
        self.savings = Savings() if savings is None else savings
        self._unseen = limit_bytes  # bytes written since the files were last looked at

    def invert(
        self,
        eps_model: EpsModel,
        x0: Tensor,
        cond: Conditioning | None,
        schedule: NoiseSchedule,
        steps: int,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        label: Label = "next",
    ) -> Trajectory:
        """`invdpo.inversion.invert` of the frozen model, to the bit; `unet_evals` is what it costs without a cache.

        Raises as `invert` does. A full disk is no error: the trajectory is then not kept.
        """
        key = self._key(x0, cond, schedule, steps, solver, guidance_scale, label)
        path = self.folder / key[:2] / f"{key}.safetensors"
        self.savings.asked += 1
        found = _read(path, x0.device)
        if self.agree(found is not None) and found is not None:
            trajectory, seconds = found
            self.savings.found += 1
            self.savings.unet_evals += trajectory.unet_evals
            self.savings.seconds += seconds
            return trajectory
        began = time.perf_counter()
        trajectory = invert(eps_model, x0, cond, schedule, steps, solver, guidance_scale, label)
        if x0.is_cuda:
            torch.cuda.synchronize(x0.device)
        self._keep(path, trajectory, time.perf_counter() - began)
        return trajectory

    def _key(self, x0: Tensor, cond: Conditioning | None, schedule: NoiseSchedule, *settings: object) -> str:
        threads = torch.get_num_threads() if x0.device.type == "cpu" else 0
        grid = (schedule.final_alpha_cumprod, schedule.steps_offset)
        digest = hashlib.sha256(repr((self.model, threads, grid, settings)).encode())
        for name, tensor in [("x0", x0), ("abar", schedule.alphas_cumprod), *_tensors(cond)]:
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def _keep(self, path: Path, trajectory: Trajectory, seconds: float) -> None:
        tensors = {"latents": trajectory.latents, "timesteps": trajectory.timesteps, "eps": trajectory.eps}
        if trajectory.partner is not None:
            tensors["partner"] = trajectory.partner
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit_bytes:
            return
        facts = {"unet_evals": str(trajectory.unet_evals), "seconds": repr(seconds)}
        try:
            with replace_when_done(path) as temporary:
                save_file(tensors, temporary, metadata=facts)
        except InvdpoError as error:
            if error.__cause__ is not None and is_full_disk(error.__cause__):
                return
            raise
        self._unseen += size
        if self._unseen >= self.limit_bytes / LOOKS:
            self._unseen = 0
            _shrink(self.folder, self.limit_bytes)


def identity(model: Module, dtype: torch.dtype) -> str:
    """What a frozen network's inversions depend on beside their input: its weights, precision, device and the code."""
    digest = hashlib.sha256(f"{dtype} {torch.__version__} {code_hash(CODE)}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}{value.device.type}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensors(cond: Conditioning | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a conditioning with its place in it."""
    if cond is None:
        return
    for field in fields(cond):
        value = getattr(cond, field.name)
        if isinstance(value, Conditioning):
            yield from ((f"{field.name}.{name}", tensor) for name, tensor in _tensors(value))
        elif value is not None:
            yield field.name, value


def _read(path: Path, device: torch.device) -> tuple[Trajectory, float] | None:
    """A kept trajectory and the seconds it took, which counts as its use; None where there is none that is whole."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        tensors = load_file(path)
        path.touch()
    except (OSError, SafetensorError):
        return None
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Trajectory(**tensors, unet_evals=int(facts["unet_evals"])), float(facts["seconds"])


def _shrink(folder: Path, limit_bytes: int) -> None:
    """Delete the files unused for longest until the rest fit."""
    files = []
    for path in folder.glob("*/*.safetensors"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process was first
            continue
        files.append((facts.st_mtime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit_bytes:
            return
        remove(path)
        total -= size
