"""Where the numbers are computed, and in which precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from invdpo.errors import InvdpoError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` (also `cuda:1`) -> a device that is there; TF32 matrix products are switched on
    for CUDA.

    Raises InvdpoError when CUDA is asked for but absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InvdpoError(
                f"The study asks for `device: {name}`, but torch {torch.__version__} finds no CUDA device. "
                "Set `device: auto` or `device: cpu`, or check the driver with `nvidia-smi`."
            )
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return torch.device(name)


def resolve_dtype(device: torch.device, precision: str) -> torch.dtype:
    """`auto` -> bf16 on CUDA and fp32 on CPU; else the named one."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The autocast context of a forward pass; none at all in fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


@contextmanager
def memory_for(what: str, remedies: Iterable[str]) -> Iterator[None]:
    """Turn a GPU that is out of memory into an InvdpoError with what to change, the most helpful first.

    remedies: asked for then only, so that a generator may take its time to work them out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])  # that it is full, and how much was asked for
        steps = "; ".join(f"({number}) {remedy}" for number, remedy in enumerate(remedies, start=1))
        raise InvdpoError(f"{what}: out of GPU memory ({reason}). In the order that helps most: {steps}.") from error
