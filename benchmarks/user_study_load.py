"""The user study's server under load: many simulated raters at once, and a server that is killed meanwhile.

`python -m benchmarks.user_study_load` serves the shapes study's bundle (`make reproduce` makes it) with the command
that serves people, and lets raters vote through the real interface. A rater does what the page does: shows a pair,
fetches the next pair's images meanwhile, looks for a while, votes, and sends the vote again where no answer came. Times
run from the click (the vote is sent) until the next pair and both its images are there.

Three runs: as it is; with the server killed by SIGKILL five times; and, for comparison, a plain Gradio application
whose button calls an event handler. After each run the database is compared with every acknowledged vote. Server and
raters share the machine's cores, so the raters' own work is in the times. Not a test: no number can fail here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from sqlalchemy import select

from invdpo.provenance import git_commit, git_dirty, lock_hash, write_json
from user_study_app.offline import invite
from user_study_app.storage import Storage
from user_study_app.storage import trial as trials
from user_study_app.storage import vote as votes

RESULTS = Path("results/reference/benchmarks")
CHOICES = ("left", "right", "tie")
HEADERS = {"X-Study": "1"}


@dataclass
class Plan:
    """Raters at once, votes of each, median seconds of looking at a pair, how often the server is killed."""

    raters: int
    votes: int
    think: float
    kills: int


@dataclass
class Seen:
    """What the raters saw. `clicks`: milliseconds of every vote that was answered at the first attempt."""

    clicks: list[float] = field(default_factory=list)
    repeated: int = 0
    acknowledged: dict[str, str] = field(default_factory=dict)


class Server:
    """The study's server as `invdpo study serve` runs it, or another program, on a port of its own."""

    def __init__(self, command: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [*command, "--port", str(self.port)]
        self.restarts: list[float] = []
        self.peak = 0
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start, and wait until a request is answered."""
        started = time.monotonic()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    await client.get(f"{self.url}/api/state")
                    break
                except httpx.TransportError:
                    if self.process.poll() is not None:
                        raise typer.Exit(1) from None
                    await asyncio.sleep(0.05)
        self.restarts.append(time.monotonic() - started)

    def kill(self) -> None:
        """SIGKILL; its peak memory (bytes, resident) is read before."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.peak = max(self.peak, 1024 * int(status.partition("VmHWM:")[2].split()[0]))
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


async def rate(client: httpx.AsyncClient, link: str, plan: Plan, seen: Seen, rng: random.Random) -> None:
    """One rater, from the link to the last vote."""
    await asyncio.sleep(rng.random() * plan.think)  # people do not start in one instant
    state, _ = await ask(client, "POST", "/api/enter", {"invite": link})
    await ask(client, "POST", "/api/consent", {"version": state["consent_version"]})
    trial, _ = await ask(client, "GET", "/api/trial")
    held = await pictures(client, trial)
    for _ in range(plan.votes):
        ahead = asyncio.create_task(pictures(client, trial["next"] or {}))
        looked = rng.lognormvariate(np.log(plan.think), 0.5) if plan.think else 0.0
        await asyncio.sleep(looked)
        held |= await ahead
        choice = rng.choice(CHOICES)
        vote = {"trial": trial["trial"], "choice": choice, "response_ms": max(1000, int(1000 * looked))}
        clicked = time.perf_counter()
        following, attempts = await ask(client, "POST", "/api/vote", vote)
        seen.acknowledged[trial["trial"]] = choice
        if not following.get("finished"):
            held |= await pictures(client, following, held)
        if attempts == 1:
            seen.clicks.append(1000 * (time.perf_counter() - clicked))
        else:
            seen.repeated += 1
        if following.get("finished"):
            return
        trial = following


async def pictures(client: httpx.AsyncClient, trial: dict[str, Any], held: Set[str] = frozenset()) -> set[str]:
    """Fetch both images of a trial unless held already; their addresses."""
    wanted = [trial[side] for side in ("left", "right") if side in trial and trial[side] not in held]
    await asyncio.gather(*(send(client, "GET", address) for address in wanted))
    return set(wanted)


async def ask(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[dict[str, Any], int]:
    """A request's answer as JSON, and the attempts it took."""
    answer, attempts = await send(client, method, path, body)
    return answer.json(), attempts


async def send(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[httpx.Response, int]:
    """Send until it is answered, waiting longer and longer as the page does."""
    wait, attempts = 0.3, 0
    while True:
        attempts += 1
        try:
            answer = await client.request(method, path, json=body, headers=HEADERS)
            if answer.status_code < 500 and answer.status_code != 429:
                answer.raise_for_status()
                return answer, attempts
        except httpx.TransportError:
            pass
        await asyncio.sleep(wait)
        wait = min(2 * wait, 5.0)


async def run_study(server: Server, links: list[str], plan: Plan, seen: Seen) -> float:
    """All raters at once; the server is killed at even shares of the votes. Seconds from the first to the last vote."""
    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=None))
    await server.start()
    began = time.monotonic()

    async def one(number: int) -> None:
        # One pool of connections for all (making a client's own takes longer than a vote); cookies of their own.
        client = httpx.AsyncClient(base_url=server.url, transport=transport, timeout=60)
        await rate(client, links[number].rpartition("#")[2], plan, seen, random.Random(number))

    async def killer() -> None:
        for kill in range(plan.kills):
            while len(seen.acknowledged) < (kill + 1) * plan.raters * plan.votes / (plan.kills + 1):
                await asyncio.sleep(0.05)
            server.kill()
            await server.start()

    await asyncio.gather(killer(), *(one(number) for number in range(plan.raters)))
    seconds = time.monotonic() - began
    server.kill()
    await transport.aclose()
    return seconds


def study(bundle: Path, config: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """One run of the study's own server; the numbers, and what the database says of them."""
    database = f"sqlite:///{folder / 'votes.db'}"
    links = invite(database, bundle, plan.raters)
    serve = [sys.executable, "-m", "invdpo.cli", "study", "serve"]
    server = Server([*serve, "--study", str(config), "--database", database])
    seen = Seen()
    seconds = asyncio.run(run_study(server, links, plan, seen))
    storage = Storage(database)
    with storage.engine.connect() as connection:
        stored = connection.execute(
            select(trials.c.token, votes.c.choice).join_from(
                votes, trials, (trials.c.rater == votes.c.rater) & (trials.c.position == votes.c.position)
            )
        ).all()
    storage.close()
    times = Counter(token for token, _ in stored)
    return numbers(plan, seen, seconds, server) | {
        "stored": len(stored),
        "lost": sum(token not in times for token in seen.acknowledged),
        "duplicate": sum(count > 1 for count in times.values()),
        "changed": sum(seen.acknowledged.get(token) != choice for token, choice in stored),
    }


def numbers(plan: Plan, seen: Seen, seconds: float, server: Server) -> dict[str, Any]:
    """The figures of a run."""
    percentiles = np.percentile(seen.clicks, [50, 95, 99]).tolist()
    return asdict(plan) | {
        "acknowledged": len(seen.acknowledged),
        "seconds": round(seconds, 1),
        "votes_per_second": round(len(seen.acknowledged) / seconds, 1),
        "click_ms": {name: round(value, 1) for name, value in zip(("median", "p95", "p99"), percentiles, strict=True)},
        "sent_again": seen.repeated,
        "start_seconds": [round(each, 1) for each in server.restarts],
        "server_peak_mib": round(server.peak / 2**20),
    }


# -- the plain Gradio version


async def rate_plainly(client: httpx.AsyncClient, link: str, plan: Plan, seen: Seen, rng: random.Random) -> None:
    """One rater of `user_study_plain.py`, whose every click goes through Gradio's queue and comes back as a stream."""
    await asyncio.sleep(rng.random() * plan.think)
    await event(client, 0, [link])
    for number in range(plan.votes):
        await asyncio.sleep(rng.lognormvariate(np.log(plan.think), 0.5) if plan.think else 0.0)
        choice = rng.choice(CHOICES)
        clicked = time.perf_counter()
        outputs = await event(client, 1, [link, choice])
        await asyncio.gather(*(client.get(image["url"]) for image in outputs[1:] if image))
        seen.acknowledged[f"{link}-{number}"] = choice
        seen.clicks.append(1000 * (time.perf_counter() - clicked))


async def event(client: httpx.AsyncClient, number: int, data: list[str]) -> list[Any]:
    """Call an event handler of a Gradio page as its own browser code does; the outputs."""
    session = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=11))
    body = {"data": data, "fn_index": number, "session_hash": session}
    (await client.post("/gradio_api/queue/join", json=body)).raise_for_status()
    async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        async for line in stream.aiter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                if not message["success"]:
                    raise RuntimeError(f"the plain Gradio version failed: {message['output']}")
                return message["output"]["data"]
    raise RuntimeError("Gradio's stream ended without an answer")


def plain(bundle: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """One run of the plain Gradio version."""
    database = f"sqlite:///{folder / 'plain.db'}"
    links = [link.rpartition("#")[2] for link in invite(database, bundle, plan.raters)]
    server = Server([sys.executable, "-m", "benchmarks.user_study_plain", str(bundle), database])
    seen = Seen()

    async def run() -> float:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=600) as client:
            await server.start()
            began = time.monotonic()
            raters = (rate_plainly(client, link, plan, seen, random.Random(n)) for n, link in enumerate(links))
            await asyncio.gather(*raters)
            seconds = time.monotonic() - began
        server.kill()
        return seconds

    return numbers(plan, seen, asyncio.run(run()), server)


# -- the report

ROWS = {
    "raters at once": lambda run: f"{run['raters']}",
    "votes acknowledged": lambda run: f"{run['acknowledged']:,}",
    "votes lost": lambda run: f"{run.get('lost', '')}",
    "votes stored twice": lambda run: f"{run.get('duplicate', '')}",
    "votes stored otherwise": lambda run: f"{run.get('changed', '')}",
    "seconds of looking (median)": lambda run: f"{run['think']:g}",
    "votes a second": lambda run: f"{run['votes_per_second']:g}",
    "click to next pair, ms: median": lambda run: f"{run['click_ms']['median']:.0f}",
    "95th percentile": lambda run: f"{run['click_ms']['p95']:.0f}",
    "99th percentile": lambda run: f"{run['click_ms']['p99']:.0f}",
    "SIGKILLs": lambda run: f"{run['kills']}",
    "votes that had to be sent again": lambda run: f"{run['sent_again']:,}",
    "seconds until it answers after a start (longest)": lambda run: f"{max(run['start_seconds']):g}",
    "server's peak memory, MiB": lambda run: f"{run['server_peak_mib']:,}",
}


def report(report: dict[str, Any]) -> str:
    """The runs as a table in markdown."""
    runs = report["runs"]
    lines = [
        "# User study: load",
        "",
        f"{report['cores']} cores shared by server and raters; SQLite; load before {report['load_before']:.1f}. "
        "Made by `python -m benchmarks.user_study_load`, whose docstring says what is measured. Times are of votes "
        "answered at the first attempt.",
        "",
        "| | " + " | ".join(runs) + " |",
        "|---|" + "---|" * len(runs),
        *("| " + " | ".join([name, *(cell(run) for run in runs.values())]) + " |" for name, cell in ROWS.items()),
    ]
    return "\n".join(lines) + "\n"


def main(
    config: Annotated[Path, typer.Option("--study", help="Study whose bundle is served.")] = Path("config/shapes.yaml"),
    bundle: Annotated[Path, typer.Option()] = Path("results/shapes/user_study/bundle"),
    raters: Annotated[int, typer.Option(help="At once.")] = 200,
    votes_each: Annotated[int, typer.Option(help="Votes of a rater; at most the trials of a slot.")] = 50,
    think: Annotated[float, typer.Option(help="Median seconds a rater looks at a pair.")] = 3.0,
    kills: Annotated[int, typer.Option(help="SIGKILLs of the second run.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="JSON. Default: results/reference/benchmarks/user-study-<n>-cores.json")
    ] = None,
) -> None:
    """Run all three and write a JSON and a markdown table."""
    cores = len(os.sched_getaffinity(0))
    before = os.getloadavg()[0]
    runs = {}
    for name, plan in (
        ("as it is", Plan(raters, votes_each, think, 0)),
        ("killed", Plan(raters, votes_each, think, kills)),
        ("plain Gradio", Plan(raters, max(1, votes_each // 10), think, 0)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            runs[name] = plain(bundle, place, plan) if name == "plain Gradio" else study(bundle, config, place, plan)
        typer.echo(f"{name}: {json.dumps(runs[name])}")
    found = {"cores": cores, "load_before": before, "git_commit": git_commit(), "git_dirty": git_dirty()}
    found |= {"lock_hash": lock_hash(), "runs": runs}
    path = out or RESULTS / f"user-study-{cores}-cores.json"
    write_json(path, found)
    path.with_suffix(".md").write_text(report(found), encoding="utf-8")
    typer.echo(path.with_suffix(".md"))


if __name__ == "__main__":
    typer.run(main)
