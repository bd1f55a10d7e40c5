"""What every result file says about where it came from, and whether its inputs are the ones that were
meant.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.errors import InvdpoError
from invdpo.files import write_json

if TYPE_CHECKING:
    import torch

    from invdpo.config import StudyConfig

__all__ = ["code_hash", "lock_hash", "sha256_file", "stamp", "verify_checksums", "weights_hashes", "write_json"]

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


def stamp(
    study: StudyConfig | None,
    *,
    config_hash: str | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    dtype: str | None = None,
    started: float,
    unet_evals: int = 0,
) -> dict[str, Any]:
    """The provenance fields of a result file.

    study: None for what belongs to none. started: `time.time()` at the start of the work. unet_evals: forward
    passes of one latent, a backward counted as two.
    """
    return {
        "study": study.study if study else None,
        "config_hash": config_hash,
        "seed": seed,
        "git_commit": git_commit(),
        "git_dirty": git_dirty(),
        "lock_hash": lock_hash(),
        "device": device_name(device),
        "dtype": dtype,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "started": started,
        "wall_seconds": time.time() - started,
        "unet_evals": unet_evals,
        "peak_memory_bytes": peak_memory(device),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def git_commit() -> str | None:
    """The commit that the package runs from: by git, or by the file that envs/Dockerfile writes; None without both."""
    built = REPOSITORY / "COMMIT"
    return _git("rev-parse", "HEAD") or (built.read_text(encoding="utf-8").strip() if built.is_file() else None)


@cache
def git_dirty() -> bool | None:
    """Whether tracked files differ from that commit; None outside a git checkout."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


@cache
def lock_hash() -> str | None:
    """sha256 of `uv.lock`; None where the package is installed without its repository."""
    lock = REPOSITORY / "uv.lock"
    return sha256_file(lock) if lock.is_file() else None


@cache
def code_hash(modules: tuple[str, ...]) -> str:
    """sha256 of the syntax of the package's modules and folders of modules: comments and layout do not count."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for module in modules:
        folder = package / module
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [package / f"{module}.py"]:
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()


def device_name(device: torch.device | None) -> str | None:
    """The GPU's or the processor's model name."""
    if device is None:
        return None
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device | None) -> int:
    """Peak bytes of the device, or of the process where the device is the CPU or none."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    kibibytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hashes(run: Path) -> dict[str, str]:
    """sha256 of the weights of a run's last checkpoint, by path below the run's folder; none where there are none."""
    return {str(path.relative_to(run)): sha256_file(path) for path in sorted((run / "unet").glob("*.safetensors"))}


def read_checksums(path: Path) -> dict[str, str]:
    """A `sha256sum` listing -> {path relative to the listing's folder: digest}."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvdpoError(f"`checksums: {path}` cannot be read ({error.strerror}). Restore the file.") from error
    entries = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name.strip():
            raise InvdpoError(f"{path}, line {number} is not `<sha256>  <path>`: {line!r}. Write it with `sha256sum`.")
        entries[name.strip().removeprefix("*")] = digest
    return entries


def verify_checksums(path: str | Path) -> int:
    """Compare every file of a `sha256sum` listing (paths relative to its folder); returns how many there are.

    Raises InvdpoError naming every file that is missing or different.
    """
    listing = Path(path)
    wrong = []
    entries = read_checksums(listing)
    for name, digest in entries.items():
        file = listing.parent / name
        if not file.is_file():
            wrong.append(f"{file}: missing")
        elif sha256_file(file) != digest:
            wrong.append(f"{file}: its content has another hash")
    if wrong:
        raise InvdpoError(
            f"Assets differ from {listing}:\n  " + "\n  ".join(wrong) + "\nRestore them (`git checkout` or "
            "`git lfs pull`), rebuild them, or update the listing if the change is meant."
        )
    return len(entries)
