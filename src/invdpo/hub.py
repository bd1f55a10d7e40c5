"""Files of the model hub: fetched once, found in its cache afterwards, and one voice for why they cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from invdpo.errors import InvdpoError

Found = TypeVar("Found")


def fetch_matching(
    repo: str, patterns: Sequence[str], kind: Literal["model", "dataset"], wanted: str, instead: str
) -> list[Path]:
    """The files of a hub repository whose paths match glob patterns, in the order of the patterns, each sorted.

    wanted: the setting that asks for them, which begins every message. instead: what to do without the hub, which ends
    it. Without a connection the files of the cache are taken. Raises InvdpoError: a repository that is missing, private
    or gated, a hub that cannot be reached, a pattern without a file.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns))

    folder = Path(_explained(fetch, repo, kind, wanted, instead))
    files = []
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not found:
            raise InvdpoError(f"{wanted}: the {kind} {repo} of the hub has no file {pattern}; {instead}")
        files += found
    return files


def fetch_file(repo: str, name: str, wanted: str, instead: str) -> Path | None:
    """One file of a hub model, by its path there; None where the model has none of that name.

    Arguments and errors otherwise as `fetch_matching`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            # The cache also remembers which files there are not.
            if try_to_load_from_cache(repo, name) is not None:
                return None
            raise

    return _explained(fetch, repo, "model", wanted, instead)


def _explained(fetch: Callable[[], Found], repo: str, kind: str, wanted: str, instead: str) -> Found:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return fetch()
    except GatedRepoError as error:
        what = f"the {kind} {repo} of the hub is gated: accept its terms there and log in with `hf auth login`"
        raise InvdpoError(f"{wanted}: {what}, or {instead}") from error
    except RepositoryNotFoundError as error:
        what = f"the hub has no {kind} {repo}, or hides it from this account (missing, renamed or private)"
        raise InvdpoError(f"{wanted}: {what}; {instead}") from error
    except HFValidationError as error:
        raise InvdpoError(f"{wanted}: there is no file or folder {repo}, and it is no hub id; {instead}") from error
    except Exception as error:  # the client raises its own errors, its transport's and the system's
        reason = " ".join(str(error).split())[:200]
        what = f"the hub cannot be reached, and what is needed of {repo} is not in its cache ({reason})"
        raise InvdpoError(f"{wanted}: {what}; {instead}") from error
