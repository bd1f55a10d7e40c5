"""Where the numbers are computed, and in which precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from invdpo.errors import InvdpoError

NO_MEMORY = ("out of memory", "alloc_failed", "allocation_failed", "memoryallocation")  # in small letters
SAID = 300  # characters of another library's message that are passed on
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU did not do, or the host's that is pinned for it.

    torch's allocator has a type for it; the CUDA runtime, its libraries and NCCL say it in words.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    cuda = any(word in text for word in ("cuda", "cublas", "cudnn", "nccl", "pinned"))
    return isinstance(error, RuntimeError) and cuda and any(words in text for words in NO_MEMORY)


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Turn a network that torch.compile cannot build into an InvdpoError that says what it needs."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed

        # Triton looks for its compiler outside of torch, when a kernel is first called.
        if is_out_of_memory(error) or not (isinstance(error, BackendCompilerFailed) or "C compiler" in str(error)):
            raise
        reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0][:SAID]
        raise InvdpoError(
            f"{what}: torch.compile could not build the network ({reason}). Where there is no C++ compiler, install "
            "one (`apt-get install g++`, or a module of the cluster), or set `training.compile: false`."
        ) from error


@contextmanager
def memory_for(what: str, remedies: Iterable[str]) -> Iterator[None]:
    """Turn a GPU that is out of memory into an InvdpoError with what to change, the most helpful first.

    remedies: asked for then only, so that a generator may take its time to work them out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        reason = ". ".join(text.split(". ")[:2])[:SAID]  # that it is full, and how much was asked for
        steps = "; ".join(f"({number}) {remedy}" for number, remedy in enumerate(remedies, start=1))
        raise InvdpoError(f"{what}: out of GPU memory ({reason}). In the order that helps most: {steps}.") from error
