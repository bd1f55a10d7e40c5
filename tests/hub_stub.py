"""A small hub: data sets and models served from memory over HTTP, with what goes wrong on real networks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40


@dataclass
class Hub:
    """repos: id -> path -> content. asked: (method, path, range header) of every request. refused: id -> (status, code
    of the hub's error header). gated: ids that are listed for everybody and whose files are not given, as the hub does
    it. cut: path -> bytes after which the next download's connection breaks. truncated: paths of which the next
    download, or with 2 the next two, deliver one half as if it were all.
    """

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    def add_folder(self, repo: str, folder: Path) -> None:
        """Serve a folder's files as that repository."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repos[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def ranges(self, path: str) -> list[str | None]:
        """The range headers of the downloads of a file, in order."""
        return [wanted for method, asked, wanted in self.asked if method == "GET" and asked.endswith(path)]

    def whole(self) -> set[str]:
        """Files that were sent from their beginning to their end."""
        whole = [path for method, path, wanted in self.asked if method == "GET" and "/resolve/" in path and not wanted]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in whole}

    def sent(self) -> set[str]:
        """Files of which any content was asked for."""
        return {path.split("/resolve/")[1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub take this address for the hub's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port of this machine."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.served.asked.append((self.command, path, self.headers.get("Range")))
        found = re.match(
            r"/(?:api/models/|(?:api/)?datasets/|(?!api/))([^/]+/[^/]+)(?:/(revision|resolve|tree|paths-info)/([^/]+)/?(.*))?$",
            path,
        )
        if not found:
            return self._refuse(404, "")
        repo, kind, revision, rest = found.groups()
        if repo in self.served.refused:
            return self._refuse(*self.served.refused[repo])
        if repo in self.served.gated and kind == "resolve":
            return self._refuse(403, "GatedRepo")
        if repo not in self.served.repos:
            return self._refuse(404, "RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = self.served.repos[repo]
        if kind == "resolve":
            return self._file(rest, files[rest]) if rest in files else self._refuse(404, "EntryNotFound")
        if kind == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._json([{"type": "file", "path": name, **_entry(files[name])} for name in wanted])
        if kind == "tree":
            inside = [name for name in files if not rest or name.startswith(f"{rest}/")]
            return self._json([{"type": "file", "path": name, **_entry(files[name])} for name in inside])
        siblings = [{"rfilename": name, "blobId": "b" * 40, **_entry(content)} for name, content in files.items()]
        self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def _file(self, name: str, content: bytes) -> None:
        start, end, status = 0, len(content), 200
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(wanted[1]), 206
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
        part = content[start:end]
        if self.command == "GET" and self.served.truncated.get(name, 0) > 0:
            self.served.truncated[name] -= 1
            part = part[: len(part) // 2]
        cut = self.served.cut.pop(name, None) if self.command == "GET" else None
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if self.command == "HEAD":
            self.send_header("X-Linked-Size", str(len(content)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[:cut])
            if cut is not None:
                self.close_connection = True

    def _json(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":  # the client remembers of which commit
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {
        "size": len(content),
        "oid": "b" * 40,
        "lfs": {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130},
    }
