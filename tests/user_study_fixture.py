"""A small bundle in the frozen format, made without a study: what the server's tests run on.

The key's arms are words that occur nowhere else, so that a test can look for them in everything the server says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from fastapi import FastAPI
from PIL import Image

from user_study_app.stimuli import content_hash

ROOT = Path(__file__).parents[1]
ARMS = {"A": ["quokka_base", "wombat_inverted"], "B": ["numbat_plain", "wombat_inverted"]}
PASSWORD = "correct horse"
CODE = "CMPL-7731"
PROMPT = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"> a red "circle" & 日本'
HEADERS = {"X-Study": "1"}

Bundle = dict[str, Any]


def picture(seed: int, size: int) -> bytes:
    """A smooth random picture as PNG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def write_bundle(
    root: Path,
    slots: int = 3,
    pairs: int = 6,
    size: int = 32,
    break_every: int = 4,
    min_view_ms: int = 0,
    consent: dict[str, Any] | None = None,
) -> Path:
    """root/bundle and root/key.json: `pairs` trials in two groups, one practice pair, one attention pair.

    A slot has practice, half of the trials, attention, the other half, and a repeat of the first trial.
    """
    folder = root / "bundle"
    (folder / "images").mkdir(parents=True)
    rows, files, key_images = [], {}, {}
    for number in range(pairs + 2):
        kind = "practice" if number == pairs else "attention" if number == pairs + 1 else "trial"
        group = "AB"[number % 2]
        tokens = [secrets.token_hex(16), secrets.token_hex(16)]
        for side, token in enumerate(tokens):
            files[token] = picture(10 * number + side, size)
            key_images[token] = {"arm": ARMS[group][side], "seed": side, "step": 9, "prompt_id": 100 + number}
        rows.append(
            {
                "pair": secrets.token_hex(16),
                "group": group,
                "prompt": PROMPT if number == 0 else f"a red circle number {number}",
                "kind": kind,
                "images": tokens,
                "expected": 1 if kind == "attention" else None,
            }
        )
    length = max(map(len, files.values()))
    for token, content in files.items():
        files[token] = content + secrets.token_bytes(length + 32 - len(content))
        path = folder / "images" / f"{token}.png"
        path.write_bytes(files[token])
        os.utime(path, (946_684_800, 946_684_800))
    trials, practice, attention = rows[:pairs], rows[pairs], rows[pairs + 1]
    schedule = {"slots": [{"slot": slot, "trials": _slot(slot, trials, practice, attention)} for slot in range(slots)]}
    texts = {
        "version": "1",
        "title": "A study of pictures",
        "purpose": "We study which pictures fit a description.",
        "data": "Your choices and their times are stored under a random number.",
        "withdrawal": "You may stop at any time.",
        "ethics": "Approved as 2026-17.",
        "content_warning": "There may be odd shapes.",
        "contact": "the study's team",
        "completion_code": CODE,
        "min_view_ms": min_view_ms,
        "break_every": break_every,
    } | (consent or {})
    manifest = {
        "format": 1,
        "study": "tiny",
        "created": "2026-01-01T00:00:00+00:00",
        "groups": ["A", "B"],
        "pairs": rows,
        "files": {token: hashlib.sha256(content).hexdigest() for token, content in files.items()},
    }
    manifest["bundle"] = content_hash(manifest, schedule, texts)
    for name, content in (("manifest", manifest), ("schedule", schedule), ("consent", texts)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    key = {"bundle": manifest["bundle"], "salt": "00", "groups": {g: {"arms": a} for g, a in ARMS.items()}}
    (root / "key.json").write_text(json.dumps(key | {"images": key_images}), encoding="utf-8")
    return folder


def _slot(slot: int, trials: list[Bundle], practice: Bundle, attention: Bundle) -> list[Bundle]:
    order = np.random.default_rng(slot).permutation(len(trials))
    shown = [
        {"pair": trials[at]["pair"], "left": int((at + slot) % 2), "kind": "trial", "repeat_of": None} for at in order
    ]
    half = len(shown) // 2
    check = {"pair": attention["pair"], "left": slot % 2, "kind": "attention", "repeat_of": None}
    again = shown[0] | {"left": 1 - shown[0]["left"], "kind": "repeat", "repeat_of": 1}
    first = {"pair": practice["pair"], "left": 0, "kind": "practice", "repeat_of": None}
    return [first, *shown[:half], check, *shown[half:], again]


@asynccontextmanager
async def browser(app: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client with its own cookies that speaks to the application without a network."""
    transport = httpx.ASGITransport(app, **options)
    async with httpx.AsyncClient(transport=transport, base_url="http://study", headers=HEADERS) as client:
        yield client


async def entered(client: httpx.AsyncClient, link: str) -> httpx.AsyncClient:
    """The client as a rater who came by the link and consented."""
    assert (await client.post("/api/enter", json={"invite": link})).status_code == 200
    assert (await client.post("/api/consent", json={"version": "1"})).status_code == 200
    return client


async def vote(client: httpx.AsyncClient, trial: str, choice: str = "left", **more: Any) -> httpx.Response:
    """Send a vote that took a second and a half."""
    return await client.post("/api/vote", json={"trial": trial, "choice": choice, "response_ms": 1500} | more)


@contextmanager
def postgres() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of Debian's packages in a folder of its own, reached by a socket only; yields a function
    that makes an empty database and returns its URL. Skips the test where the server is not installed.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="invdpo-pg-"))
    # The server refuses to run as root.
    owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
    if owner:
        shutil.chown(folder, owner["user"], owner["group"])
    data, quiet = folder / "data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder}
    initdb = [programs[-1].with_name("initdb"), "-D", data, "-U", "study", "-A", "trust", "-N", "-E", "UTF8"]
    subprocess.run(initdb, check=True, **quiet, **owner)
    command = [programs[-1], "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    server = subprocess.Popen(command, **quiet, **owner)
    try:
        root = f"postgresql://study@/postgres?host={folder}"
        for _ in range(600):
            try:
                connection = psycopg.connect(root, autocommit=True)
                break
            except psycopg.OperationalError:
                assert server.poll() is None, "PostgreSQL ended while it started"
                time.sleep(0.1)
        else:
            raise AssertionError("PostgreSQL did not start within a minute")

        def new() -> str:
            name = f"study_{secrets.token_hex(4)}"
            connection.execute(f"CREATE DATABASE {name}".encode())
            return f"postgresql://study@/{name}?host={folder}"

        yield new
        connection.close()
    finally:
        server.send_signal(signal.SIGINT)  # ends at once, whoever is connected
        server.wait(30)
        shutil.rmtree(folder)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class Server:
    """The study's server in a process of its own, on one port and database through any number of restarts."""

    def __init__(self, bundle: Path, database: str) -> None:
        self.bundle, self.database = bundle, database
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = tempfile.TemporaryFile("w+")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        program = (
            "import sys; from pathlib import Path; from user_study_app.server import serve; "
            "serve(Path(sys.argv[1]), sys.argv[2], port=int(sys.argv[3]))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, str(self.bundle), self.database, str(self.port)],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"INVDPO_ADMIN_PASSWORD": PASSWORD},
        )
        for _ in range(1200):
            try:
                assert httpx.get(f"{self.url}/api/state", timeout=60).status_code == 401
                return
            except httpx.TransportError:
                assert self._process.poll() is None, self.said()
                time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.said()}")

    def stop(self, how: signal.Signals) -> int:
        """Send a signal and wait for the end; the exit status."""
        assert self._process is not None
        self._process.send_signal(how)
        return self._process.wait(60)

    def kill(self) -> None:
        """SIGKILL: no time to save anything."""
        self.stop(signal.SIGKILL)

    def said(self) -> str:
        """All that the server printed, over all its starts."""
        self.output.seek(0)
        return self.output.read()
