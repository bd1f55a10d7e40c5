"""Files of the model hub: listed, fetched once, then found in its cache, and one voice for why they cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from invdpo.errors import InvdpoError, Unreachable
from invdpo.files import is_full_disk

Kind = Literal["model", "dataset"]
Header = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (type as safetensors names it, shape)

SAID = 200  # characters of another library's message that are passed on


@dataclass(frozen=True)
class Remote:
    """A file of a hub repository. name: its path there. size: bytes. path: in the hub's cache; None: not there yet."""

    repo: str
    name: str
    size: int
    path: Path | None


def split_id(source: str) -> tuple[str, str] | None:
    """`owner/name/path/in/it` as (`owner/name`, `path/in/it`), the path empty where there is none; None: no hub id."""
    owner, *names = source.split("/")
    if not names or not names[0] or owner in ("", ".", "..", "~"):
        return None
    return f"{owner}/{names[0]}", "/".join(names[1:]).rstrip("/")


def list_files(repo: str, wanted: str, instead: str) -> dict[str, int]:
    """Path -> bytes of all files of a hub model, of which none is fetched; without a connection, of those in its cache.

    wanted: the setting that asks for it, which begins every message. instead: what to do without the hub, which ends
    it. Raises InvdpoError: a repository that is missing, private or gated, a hub that cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except Exception as error:
        folder = snapshot(repo) if any(map(_is_silence, _chain(error))) else None
        if folder is None:
            raise explain(error, repo, wanted, instead) from error
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def snapshot(repo: str, kind: Kind = "model", revision: str | None = None) -> Path | None:
    """The folder of what the cache holds of a revision, None: of the main branch."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None


def look(repo: str, name: str, wanted: str, instead: str) -> Remote:
    """Asks for a file of a hub model as a download would, so that a gated one is refused, without fetching it.

    Arguments and errors as `list_files`, and InvdpoError where there is no such file.
    """
    from huggingface_hub import DryRunFileInfo, hf_hub_download

    with told(repo, wanted, instead, part=name):
        found = hf_hub_download(repo, name, dry_run=True)
        assert isinstance(found, DryRunFileInfo)
        return Remote(repo, name, found.file_size or 0, Path(found.local_path) if found.is_cached else None)


def cached(repo: str, name: str, kind: Kind, revision: str) -> Path | None:
    """Where a file of that commit lies in the hub's cache; None: it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def held(repo: str, kind: Kind = "model") -> dict[str, int]:
    """Path -> bytes of the files that the cache holds of a repository, of whatever revision; the hub is not asked."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}", "snapshots")
    files = (path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix().partition("/")[2]: path.stat().st_size for path in files}


def fetch_file(repo: str, name: str, wanted: str, instead: str) -> Path:
    """A file of a hub model, by its path there; arguments and errors as `look`."""
    from huggingface_hub import hf_hub_download

    with told(repo, wanted, instead, part=name):
        return Path(hf_hub_download(repo, name))


def fetch_matching(repo: str, patterns: Sequence[str], kind: Kind, wanted: str, instead: str) -> list[Path]:
    """The files of a hub repository whose paths match glob patterns, in the order of the patterns, each sorted.

    Without a connection the files of the cache are taken. Other arguments and errors as `list_files`, and InvdpoError
    for a pattern without a file.
    """
    from huggingface_hub import snapshot_download

    with told(repo, wanted, instead, kind):
        folder = Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))
    files = []
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not found:
            raise InvdpoError(f"{wanted}: the {kind} {repo} of the hub has no file {pattern}; {instead}.")
        files += found
    return files


def fetch_header(file: Remote, wanted: str, instead: str) -> Header:
    """The header of a safetensors file of the hub, of which nothing else is fetched; arguments and errors as `look`."""
    from huggingface_hub import HfApi

    with told(file.repo, wanted, instead, part=file.name):
        tensors = HfApi().parse_safetensors_file_metadata(file.repo, file.name).tensors
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@contextmanager
def told(
    source: str, wanted: str, instead: str, kind: Kind = "model", part: str = "", revision: str | None = None
) -> Iterator[None]:
    """Whatever goes wrong inside is raised as `explain` words it."""
    try:
        yield
    except InvdpoError:
        raise
    except Exception as error:  # the client raises its own errors, its transport's, the system's and those of xet
        raise explain(error, source, wanted, instead, kind, part, revision) from error


def explain(
    error: Exception,
    source: str,
    wanted: str,
    instead: str,
    kind: Kind = "model",
    part: str = "",
    revision: str | None = None,
) -> InvdpoError:
    """What a library raised while it read from the hub, from its cache or a local copy, in words that say what to do.

    source: a hub id, which a path may follow, or a local path. wanted: the setting that asks for it, which begins the
    message. instead: what to do without the hub, which ends it. part: the file or folder that was read, where not all
    of the source is. revision: of a data set.
    """
    from huggingface_hub import errors

    if "trust_remote_code" in str(error):
        return InvdpoError(
            f"{wanted}: {part or 'a part'} of {source} is made by Python code of its own, and no repository's code is "
            f"run. Name a model that the libraries have a class for, or {instead}."
        )
    if Path(source).exists() and not is_full_disk(error):  # whatever a library then asked the hub for
        return InvdpoError(f"{wanted}: {_unreadable(part, source, error)}. Check the files, or fetch them again.")
    causes, repo = list(_chain(error)), (split_id(source) or (source, ""))[0]
    the, login = f"the {kind} {repo} of the hub", "Log in (`hf auth login`, or HF_TOKEN)"
    here = f"there is no {source} here, and " if source in wanted else ""
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    silence = [cause for cause in causes if _is_silence(cause)]

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_full_disk(error):
        what, do = f"the disk is full, and {part or source} could not be written ({_said(error)})", "Make room"
    elif found(errors.GatedRepoError):
        what, do = f"{the} is gated", f"Accept its terms on its page there. {login}"
    elif found(errors.RevisionNotFoundError):
        what, do = f"{the} has no revision `{revision}`", "Correct `data.revision`"
    elif found(errors.RepositoryNotFoundError):
        what = f"{here}the hub has no {kind} {repo}, or hides it from this account (missing, renamed or private)"
        do = f"Check the id. {login}"
    elif found(errors.RemoteEntryNotFoundError):
        what, do = f"{the} has no file {part}", "Check the id and the name"
    elif found(errors.HFValidationError, errors.HfUriError):
        what, do = f"{source} is no file or folder here, nor a hub id (owner/name)", "Check the path"
    elif status is not None:
        what = f"{the} cannot be read: the hub answered {status}"
        do = login if status in (401, 403) else "Try again later"
    elif silence:
        lacks = "does not hold all of it" if kind == "dataset" and not part else f"has no {part or repo}"
        what = f"{here}the hub cannot be reached ({_said(silence[-1])}), and its cache {lacks}"
        do = "Try again later"
    else:
        what, do = _unreadable(part, source, error), "Fetch it again"
    return (Unreachable if silence else InvdpoError)(f"{wanted}: {what}. {do}, or {instead}.")


def _unreadable(part: str, source: str, error: Exception) -> str:
    return f"cannot load {f'{part} of ' if part else ''}{source} ({_said(error)})"


def _is_silence(error: BaseException) -> bool:
    """Whether an error says that the hub did not answer, or with a fault of its own."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    # The base of all that the client's HTTP library raises: httpx2 today, httpx and requests before.
    transport = errors.HfHubHTTPError.__bases__[0]
    silent = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError)
    return isinstance(error, (*silent, transport, ConnectionError, TimeoutError))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    reason = " ".join(str(error).split())[:SAID]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
