"""Raters of known behaviour, who vote through the same HTTP interface as people do.

They look at what they are served: the driver maps the bytes of an image to its file by the manifest's hashes, and with
the key to its method. So a wrong image, side or trial anywhere between bundle and database changes the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from invdpo.errors import InvdpoError
from user_study_app.offline import export
from user_study_app.security import WRITE_HEADER

Choice = Literal["left", "right", "tie"]
Arms = tuple[str, str]


@dataclass(frozen=True)
class Behaviour:
    """How a rater votes.

    A share `left_bias` of the trials is answered "left" without looking, a share `careless` of the rest by the toss of
    a coin. What remains is considered: a tie with probability `tie_rate`, otherwise the second arm with the probability
    that `win_rates` gives for the two arms. A rater keeps an opinion: a repeated pair is considered once.
    `pair_correlation` is the intraclass correlation of considered preferences on one pair: each pair has a preference
    of its own, drawn from a beta distribution around the win rate.
    """

    win_rates: dict[Arms, float]
    tie_rate: float = 0.15
    left_bias: float = 0.0
    careless: float = 0.0
    pair_correlation: float = 0.0
    median_ms: float = 2500.0

    def shares(self, arms: Arms) -> tuple[float, float, float]:
        """Expected shares (second arm, tie, first arm) of the votes on these arms, sides being balanced."""
        blind = self.left_bias + (1 - self.left_bias) * self.careless
        decided = (1 - blind) * (1 - self.tie_rate)
        win = blind / 2 + decided * self.win_rates[arms]
        return win, (1 - blind) * self.tie_rate, blind / 2 + decided * (1 - self.win_rates[arms])

    def win_rate(self, arms: Arms) -> float:
        """Expected win rate of the second arm, ties as half."""
        win, tie, _ = self.shares(arms)
        return win + tie / 2

    def tie_free(self, arms: Arms) -> float:
        """Expected win rate of the second arm among decisive votes."""
        win, _, loss = self.shares(arms)
        return win / (win + loss)

    def left_share(self) -> float:
        """Expected share of "left" among decisive votes."""
        tie = self.shares(next(iter(self.win_rates)))[1]
        return (self.left_bias + (1 - self.left_bias - tie) / 2) / (1 - tie)


@dataclass
class World:
    """What only the driver knows: which pair and which of its images a served file is, and whose."""

    bundle: Path
    key: Path
    seed: int
    pairs: dict[str, dict[str, Any]] = field(init=False)
    files: dict[str, tuple[str, int]] = field(init=False)
    targets: dict[str, int] = field(init=False)
    arms: dict[str, Arms] = field(init=False)

    def __post_init__(self) -> None:
        manifest = json.loads((self.bundle / "manifest.json").read_text())
        key = json.loads(self.key.read_text())
        if manifest["bundle"] != key["bundle"]:
            raise InvdpoError(f"{self.key} is not the key of {self.bundle}. Give the two that were made together.")
        self.arms = {name: tuple(group["arms"]) for name, group in key["groups"].items()}
        self.pairs = {pair["pair"]: pair for pair in manifest["pairs"]}
        hashes = manifest["files"]
        self.files = {hashes[token]: (p["pair"], i) for p in manifest["pairs"] for i, token in enumerate(p["images"])}
        self.targets = {}
        for pair in manifest["pairs"]:
            if pair["kind"] != "attention":
                arms = [key["images"][token]["arm"] for token in pair["images"]]
                self.targets[pair["pair"]] = arms.index(self.arms[pair["group"]][1])

    def see(self, left: bytes, right: bytes) -> tuple[str, int]:
        """Two served images -> their pair, and which of its images is on the left."""
        (pair, first), (other, second) = (self.files[hashlib.sha256(image).hexdigest()] for image in (left, right))
        if pair != other or first == second:
            raise InvdpoError(f"The server showed images of pair {pair} and {other} side by side.")
        return pair, first

    def choose(self, behaviour: Behaviour, rater: int, trial: int, pair: str, left: int) -> tuple[Choice, int]:
        """The rater's choice, and its time in ms."""
        here = np.random.default_rng([self.seed, 0, rater, trial])
        milliseconds = int(behaviour.median_ms * np.exp(0.5 * here.normal()))
        if here.random() < behaviour.left_bias:
            return "left", milliseconds
        if here.random() < behaviour.careless:
            return "left" if here.integers(2) else "right", milliseconds // 4
        target = self._opinion(behaviour, rater, pair)
        if target is None:
            return "tie", milliseconds
        return "left" if target == left else "right", milliseconds

    def _opinion(self, behaviour: Behaviour, rater: int, pair: str) -> int | None:
        """The image (0 or 1) that the rater prefers on consideration; None for a tie."""
        row, number = self.pairs[pair], int(pair, 16)
        if row["kind"] == "attention":
            return row["expected"]
        own = np.random.default_rng([self.seed, 1, rater, number])
        if own.random() < behaviour.tie_rate:
            return None
        preference = behaviour.win_rates[self.arms[row["group"]]]
        if behaviour.pair_correlation:
            strength = 1 / behaviour.pair_correlation - 1
            common = np.random.default_rng([self.seed, 2, number])
            preference = common.beta(preference * strength, (1 - preference) * strength)
        target = self.targets[pair]
        return target if own.random() < preference else 1 - target


async def enter(client: httpx.AsyncClient, link: str) -> int:
    """From the link (its part after #) to the consent; the milliseconds that images must be shown."""
    state = await _ask(client, "POST", "/api/enter", {"invite": link})
    await _ask(client, "POST", "/api/consent", {"version": state["consent_version"]})
    return state["min_view_ms"]


async def vote(client: httpx.AsyncClient, world: World, behaviour: Behaviour, rater: int, min_view_ms: int) -> int:
    """One participant from the first trial to the completion code; how many votes were given."""
    trial, votes = await _ask(client, "GET", "/api/trial"), 0
    while not trial.get("finished"):
        left, right = [(await client.get(trial[side])).raise_for_status().content for side in ("left", "right")]
        pair, first = world.see(left, right)
        choice, milliseconds = world.choose(behaviour, rater, trial["index"], pair, first)
        body = {"trial": trial["trial"], "choice": choice, "response_ms": max(milliseconds, min_view_ms)}
        trial, votes = await _ask(client, "POST", "/api/vote", body), votes + 1
    return votes


async def _ask(client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = await client.request(method, path, json=body, headers={WRITE_HEADER: "1"})
    if answer.is_error:
        raise InvdpoError(f"{method} {path} was answered {answer.status_code}: {answer.text[:200]}")
    return answer.json()


async def take_part(
    links: Sequence[str],
    world: World,
    behaviours: Sequence[Behaviour],
    url: str,
    transport: httpx.AsyncBaseTransport | None = None,
) -> int:
    """All participants; how many votes they gave. They enter one after the other, which decides their slots, and vote
    at the same time. Behaviours are taken in turn.
    """
    async with AsyncExitStack() as stack:
        clients = [httpx.AsyncClient(base_url=url, transport=transport, timeout=60) for _ in links]
        for client in clients:
            await stack.enter_async_context(client)
        waits = [await enter(client, link) for client, link in zip(clients, links, strict=True)]
        raters = enumerate(zip(clients, waits, strict=True))
        turns = [vote(client, world, behaviours[n % len(behaviours)], n, wait) for n, (client, wait) in raters]
        return sum(await asyncio.gather(*turns))


def simulate(bundle: Path, key: Path, behaviours: Sequence[Behaviour], raters: int, seed: int, out: Path) -> int:
    """Let simulated raters take part in this study, on a server and database of their own, and write their votes to
    `out` (csv, jsonl or parquet); how many there are. The same bundle, behaviours and seed give the same choices.
    """
    from user_study_app.server import create_app  # imports gradio: seconds

    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:///{folder}/votes.db"
        app = create_app(bundle, database, admin_password=folder, limits=None)
        links = app.state.storage.invite(raters, "simulation")
        transport = httpx.ASGITransport(app)
        votes = asyncio.run(take_part(links, World(bundle, key, seed), behaviours, "http://study", transport))
        app.state.storage.close()
        export(database, bundle, out)
    return votes
