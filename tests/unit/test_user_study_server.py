"""The user study's server through its HTTP interface: the rater's way, the experimenter's, and the command's."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest
from fastapi import FastAPI
from user_study_fixture import ARMS, CODE, HEADERS, PASSWORD, Server, browser, entered, vote, write_bundle

from invdpo.errors import InvdpoError
from user_study_app import overview
from user_study_app.security import Addresses, Limits, Rate, RateLimiter
from user_study_app.server import create_app, serve
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Storage

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("study"), min_view_ms=400)


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'votes.db'}"


@pytest.fixture
def app(bundle: Path, database: str) -> FastAPI:
    return create_app(bundle, database, admin_password=PASSWORD)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(app) as opened:
        yield opened


@pytest.fixture
async def admin(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(app) as opened:
        assert (await opened.post("/admin/login", data={"password": PASSWORD})).status_code == 303
        yield opened


def link_of(app: FastAPI) -> str:
    return app.state.storage.invite(1, "test")[0]


async def walk(client: httpx.AsyncClient, choice: str = "left", votes: int = 100) -> list[dict[str, Any]]:
    """Vote until the end or `votes` times; what the server said before each vote, and last."""
    bodies = [(await client.get("/api/trial")).json()]
    while not bodies[-1].get("finished") and len(bodies) <= votes:
        answer = await vote(client, bodies[-1]["trial"], choice)
        assert answer.status_code == 200, answer.text
        bodies.append(answer.json())
    return bodies


# -- the rater's way


async def test_the_way_from_link_to_code(app: FastAPI, client: httpx.AsyncClient, bundle: Path) -> None:
    stimuli = Stimuli(bundle)
    state = (await client.post("/api/enter", json={"invite": link_of(app)})).json()
    assert state | {"rater": ""} == {
        "rater": "", "consented": False, "consent_version": "1", "answered": 0, "finished": False, "paused": False,
        "min_view_ms": 400,
    }  # fmt: skip
    assert (await client.get("/api/trial")).json()["error"] == "consent"
    state = (await client.post("/api/consent", json={"version": "1"})).json()
    assert (state["of"], state["practice"], state["consented"]) == (9, 1, True)
    bodies = await walk(client)
    assert bodies.pop() == {"finished": True, "code": CODE}
    for at, body in enumerate(bodies):
        trial = stimuli.slots[0][at]
        assert (body["index"], body["of"], body["prompt"]) == (at, 9, stimuli.pairs[trial.pair].prompt)
        # after every fourth pair that counts, practice not counted
        assert body["break"] is (at == 5)
        following = bodies[at + 1] if at < 8 else None
        assert body["next"] == (following and {side: following[side] for side in ("left", "right")})
        for side, number in (("left", trial.left), ("right", 1 - trial.left)):
            image = await client.get(body[side])
            token = stimuli.pairs[trial.pair].images[number]
            assert image.content == (bundle / "images" / f"{token}.png").read_bytes()
            assert image.headers["content-type"] == "image/png" and image.headers["cache-control"] == "no-store"
    state = (await client.get("/api/state")).json()
    assert state["finished"] and state["code"] == CODE and state["answered"] == 9


async def test_the_same_link_resumes_on_a_restarted_server(
    app: FastAPI, client: httpx.AsyncClient, bundle: Path, database: str
) -> None:
    link = link_of(app)
    await entered(client, link)
    at = (await walk(client, votes=3))[-1]
    again = create_app(bundle, database, admin_password=PASSWORD)
    async with browser(again) as other:  # another browser, with no cookie
        assert (await other.get("/api/trial")).status_code == 401
        state = (await other.post("/api/enter", json={"invite": link})).json()
        assert state["answered"] == 3 and state["consented"]
        assert (await other.get("/api/trial")).json() == at
    async with browser(again) as same:  # the same browser, whose cookie outlives the server
        same.cookies = client.cookies
        assert (await same.get("/api/trial")).json() == at


async def test_two_tabs_cannot_answer_one_pair_twice(app: FastAPI, client: httpx.AsyncClient) -> None:
    await entered(client, link_of(app))
    trial = (await client.get("/api/trial")).json()["trial"]
    answers = await asyncio.gather(*(vote(client, trial, choice) for choice in ["left", "left", "right", "tie"] * 3))
    kinds = [answer.json().get("error", "taken") for answer in answers]
    # all who said what the first said are told the same, the others are refused
    assert sorted(set(kinds)) == ["answered", "taken"]
    assert len({answer.text for answer in answers if answer.status_code == 200}) == 1
    assert len(app.state.storage.votes()) == 1


async def test_the_clock_of_the_page_is_kept_and_too_fast_is_refused(app: FastAPI, client: httpx.AsyncClient) -> None:
    await entered(client, link_of(app))
    trial = (await client.get("/api/trial")).json()["trial"]
    assert (await vote(client, trial, response_ms=399)).json()["error"] == "too_fast"
    # images that never came can be reported at once
    assert (await vote(client, trial, "problem", response_ms=20, text="nothing \0 to see")).status_code == 200
    stored = app.state.storage.votes()[0]
    assert (stored["response_ms"], stored["problem_text"]) == (20, "nothing  to see")


async def test_pause_holds_raters_until_it_ends(app: FastAPI, client: httpx.AsyncClient) -> None:
    await entered(client, link_of(app))
    trial = (await client.get("/api/trial")).json()["trial"]
    app.state.storage.set_flag("paused", True, "test")
    for answer in (await client.get("/api/trial"), await vote(client, trial)):
        assert answer.status_code == 423 and "saved" in answer.json()["message"]
    assert (await client.get("/api/state")).json()["paused"] is True
    app.state.storage.set_flag("paused", False, "test")
    assert (await vote(client, trial)).status_code == 200


async def test_crowd_platforms_are_let_in_and_resumed(app: FastAPI, client: httpx.AsyncClient, database: str) -> None:
    person = {"PROLIFIC_PID": "5f3c0ffee0123456789abcde", "STUDY_ID": "6001", "SESSION_ID": "7001"}
    assert (await client.post("/api/enter", json=person)).json()["error"] == "closed"
    app.state.storage.set_flag("crowd", True, "test")
    state = (await client.post("/api/enter", json=person)).json()
    async with browser(app) as later:
        again = (await later.post("/api/enter", json=person | {"SESSION_ID": "7002"})).json()
        other = (await later.post("/api/enter", json=person | {"PROLIFIC_PID": "x" * 24})).json()
    assert again["rater"] == state["rater"] != other["rater"]
    for only in ({"STUDY_ID": "6001"}, {}):
        assert (await client.post("/api/enter", json=only)).json()["error"] == "link"
    for field in ("workerId", "participantId"):
        assert (await client.post("/api/enter", json={field: "A1B2"})).status_code == 200
    content = b"".join(path.read_bytes() for path in Path(database.removeprefix("sqlite:///")).parent.glob("votes.db*"))
    for value in person.values():
        assert value.encode() not in content


async def test_consent_is_to_the_version_that_was_shown(app: FastAPI, client: httpx.AsyncClient) -> None:
    await client.post("/api/enter", json={"invite": link_of(app)})
    assert (await client.post("/api/consent", json={"version": "2"})).json()["error"] == "consent_version"
    assert app.state.storage.raters()[0]["consent_at"] is None


async def test_the_page_holds_the_consent_text_and_asks_nobody_else(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    for text in ("A study of pictures", "Approved as 2026-17.", "There may be odd shapes.", "the study's team"):
        assert text in page.text.replace("\\u0027", "'")
    assert CODE not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    # what loads by itself comes from this server: addresses elsewhere are in <meta> only
    loads = [part for part in page.text.split("<") if part.startswith(("script", "link", "img", "iframe"))]
    assert loads and not any("//" in part.partition(">")[0] for part in loads)
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert all(f'nonce="{nonce}"' in part for part in loads if part.startswith("script"))
    assert nonce not in (await client.get("/")).text  # a new one for every page
    for name in ("study.js", "study.css"):
        content = (await client.get(f"/pages/{name}")).text
        assert len(content) > 1000 and "http://" not in content and "https://" not in content


# -- limits and proxies


async def test_a_rater_who_asks_too_much_waits(bundle: Path, database: str) -> None:
    app = create_app(bundle, database, admin_password=PASSWORD, limits=Limits(rater=Rate(1, 10)))
    async with browser(app) as fast, browser(app) as calm:
        await entered(fast, link_of(app))
        await entered(calm, link_of(app))
        answers = [await fast.get("/api/trial") for _ in range(20)]
        assert [answer.status_code for answer in answers].count(429) >= 8
        refused = answers[-1]
        assert refused.json()["error"] == "rate" and int(refused.headers["retry-after"]) >= 1
        assert (await calm.get("/api/trial")).status_code == 200  # each their own


async def test_entries_are_limited_by_address(bundle: Path, database: str) -> None:
    app = create_app(bundle, database, admin_password=PASSWORD, limits=Limits(entry=Rate(0.01, 5)))
    async with browser(app, client=("10.0.0.1", 1)) as one, browser(app, client=("10.0.0.2", 1)) as two:
        codes = [(await one.post("/api/enter", json={"invite": f"{n:032x}"})).status_code for n in range(8)]
        assert codes == [404] * 5 + [429] * 3
        # a header cannot pretend another address where no proxy is trusted
        posed = await one.post("/api/enter", json={"invite": "0" * 32}, headers={"X-Forwarded-For": "10.0.0.9"})
        assert posed.status_code == 429
        assert (await two.post("/api/enter", json={"invite": "0" * 32})).status_code == 404


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("user_study_app.security.time.monotonic", lambda: now)
    limiter = RateLimiter(Rate(2, 3), keys=2)
    assert [limiter.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now += 0.5
    assert limiter.wait("a") == 0 and limiter.wait("a") == 0.5
    limiter.wait("b"), limiter.wait("c")  # the third key pushes the oldest out
    assert len(limiter._buckets) == 2


def test_behind_a_proxy_the_last_forwarded_address_counts() -> None:
    def scope(address: str, forwarded: str) -> dict[str, Any]:
        return {"type": "http", "client": (address, 1), "headers": [(b"x-forwarded-for", forwarded.encode())]}

    trusting, plain = Addresses(True), Addresses(False)
    assert trusting.key(scope("9.9.9.9", "6.6.6.6, 1.1.1.1")) == trusting.key(scope("9.9.9.9", "7.7.7.7,1.1.1.1"))
    assert trusting.key(scope("9.9.9.9", "1.1.1.1")) != trusting.key(scope("9.9.9.9", "2.2.2.2"))
    assert plain.key(scope("9.9.9.9", "1.1.1.1")) == plain.key(scope("9.9.9.9", "2.2.2.2"))
    assert Addresses(False).key(scope("9.9.9.9", "")) != plain.key(scope("9.9.9.9", ""))  # of this process only


async def test_cookies_are_secure_behind_a_proxy(bundle: Path, database: str) -> None:
    app = create_app(bundle, database, admin_password=PASSWORD, trust_proxy=True)
    transport = httpx.ASGITransport(app, root_path="/study")
    headers = HEADERS | {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "lab.example", "Host": "10.1.1.1:7860"}
    async with httpx.AsyncClient(transport=transport, base_url="https://lab.example", headers=headers) as client:
        entry = await client.post(
            "/study/api/enter", json={"invite": link_of(app)}, headers={"Origin": "https://lab.example"}
        )
        login = await client.post("/study/admin/login", data={"password": PASSWORD})
        for answer, path in ((entry, "/study"), (login, "/study/admin")):
            cookie = answer.headers["set-cookie"]
            parts = {part.strip().lower() for part in cookie.split(";")[1:]}
            assert {"secure", "httponly", "samesite=strict", f"path={path}"} <= parts
        assert "max-age=31536000" in entry.headers["strict-transport-security"]
        # the page finds its files under the proxy's path
        assert '"root":"https://lab.example/study"' in (await client.get("/study/")).text.replace(" ", "")


async def test_without_a_proxy_cookies_work_on_plain_http(app: FastAPI, client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/enter", json={"invite": link_of(app)})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie


# -- the experimenter's way


async def test_login_and_logout(app: FastAPI, client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin")).headers["location"] == "admin/login"
    assert (await client.get("/admin/")).headers["location"] == "../admin/login"
    wrong = await client.post("/admin/login", data={"password": "wrong"})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
    right = await client.post("/admin/login", data={"password": PASSWORD})
    assert right.status_code == 303 and "samesite=strict" in right.headers["set-cookie"].lower()
    page = await client.get("/admin/")
    assert page.status_code == 200 and "Which methods a group compares is in the key file only" in page.text
    await client.post("/admin/logout")
    assert (await client.get("/admin/")).status_code == 303
    actions = [row["action"] for row in app.state.storage.audit_log()]
    assert actions == ["login", "login refused"]


async def test_logins_are_limited(app: FastAPI, client: httpx.AsyncClient) -> None:
    codes = [(await client.post("/admin/login", data={"password": "wrong"})).status_code for _ in range(7)]
    assert codes == [401] * 5 + [429] * 2
    assert (await client.post("/admin/login", data={"password": PASSWORD})).status_code == 429


async def test_exports_with_and_without_the_key(
    app: FastAPI, client: httpx.AsyncClient, admin: httpx.AsyncClient, bundle: Path
) -> None:
    await entered(client, link_of(app))
    await walk(client, "right", votes=4)
    plain = await admin.post("/admin/export", data={"format": "csv"})
    assert plain.headers["content-disposition"] == 'attachment; filename="votes.csv"'
    assert len(plain.text.splitlines()) == 5
    assert not any(name in plain.text for arms in ARMS.values() for name in arms)
    key = (bundle.parent / "key.json").read_bytes()
    named = await admin.post("/admin/export", data={"format": "jsonl"}, files={"key": ("key.json", key)})
    assert {json.loads(line)["arm_left"] for line in named.text.splitlines()} <= {
        a for arms in ARMS.values() for a in arms
    }
    parquet = await admin.post("/admin/export", data={"format": "parquet"}, files={"key": ("key.json", key)})
    assert pyarrow.parquet.read_table(io.BytesIO(parquet.content)).num_rows == 4
    for data, files, words in (
        ({"format": "exe"}, None, "csv, jsonl or parquet"),
        ({"format": "csv"}, {"key": ("key.json", b"{}")}, "not a key"),
        ({"format": "csv"}, {"key": ("key.json", key.replace(b'"bundle": "', b'"bundle": "0'))}, "another bundle"),
    ):
        answer = await admin.post("/admin/export", data=data, files=files)
        assert answer.status_code == 400 and words in answer.text
    details = [row["detail"] for row in app.state.storage.audit_log() if row["action"] == "export"]
    assert details == ["parquet, with key", "jsonl, with key", "csv, without key"]


async def test_overview_counts_and_agreement(bundle: Path, database: str, app: FastAPI) -> None:
    stimuli, storage = Stimuli(bundle), app.state.storage
    trials = [trial for trial in stimuli.slots[0] if trial.kind == "trial"]
    by_group = {name: [t.pair for t in trials if stimuli.pairs[t.pair].group == name] for name in "AB"}

    async def rate(prefer: dict[str, int | str]) -> None:
        """A rater who chooses the image (0, 1) or the word given for each pair; image 0 of all others."""
        async with browser(app) as client:
            await entered(client, link_of(app))
            slot = storage.raters()[-1]["slot"]
            body = (await client.get("/api/trial")).json()
            while not body.get("finished"):
                shown = stimuli.slots[slot][body["index"]]
                wanted = prefer.get(shown.pair, 0)
                choice = wanted if isinstance(wanted, str) else "left" if shown.left == wanted else "right"
                body = (await vote(client, body["trial"], choice)).json()

    await rate({})
    await rate({by_group["A"][0]: 1})
    await rate({by_group["A"][0]: "tie", by_group["B"][1]: "problem"})
    rows = {row["group"]: row for row in overview.groups(stimuli, storage.votes())}
    # A: three pairs, and on one all three answers differ: 6 of 9 pairs of raters agree. B: the problem is left out.
    assert (rows["A"]["agreement"], rows["A"]["ties"], rows["A"]["problems"]) == (round(6 / 9, 3), 1, 0)
    assert (rows["B"]["agreement"], rows["B"]["problems"], rows["B"]["votes"]) == (1.0, 1, 9)
    assert rows["A"]["pairs"] == rows["A"]["pairs with votes"] == 3
    totals = overview.totals(stimuli, storage.raters(), storage.votes())
    assert totals == {
        "entered or invited": 3, "consented": 3, "finished": 3, "votes": 24, "votes planned": 24, "votes a minute": 2.4,
    }  # fmt: skip
    last = overview.people(stimuli, storage.raters(), storage.votes())[-1]
    repeated = stimuli.slots[last["slot"]][-1]
    assert last["answered"] == "9 of 9" and last["attention failed"] == "1 of 1"  # image 1 is expected, all chose 0
    assert last["repeats as before"] == "1 of 1" and repeated.kind == "repeat"
    assert last["median s"] == 1.5


# -- the command


def test_serve_prints_a_link_that_works_and_logs_no_address(bundle: Path, database: str) -> None:
    server = Server(bundle, database)
    server.start()
    lines = server.said().splitlines()
    link = lines[0].split()[-1]
    assert link.startswith(f"{server.url}/#") and lines[1].endswith("/admin/")
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        entry = client.post("/api/enter", json={"invite": link.partition("#")[2]})
        assert entry.status_code == 200 and "server" not in entry.headers
        assert client.post("/admin/login", data={"password": PASSWORD}).status_code == 303
        assert client.get("/none").status_code == 404
    assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert len(server.said().splitlines()) == 3, server.said()  # no access log, no trace, and no password


def test_serve_explains_a_port_in_use_and_a_bad_password_file(bundle: Path, database: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InvdpoError, match="Give another --port"):
            serve(bundle, database, port=taken.getsockname()[1])
    with pytest.raises(InvdpoError, match="password file .* cannot be read"):
        serve(bundle, database, admin_password_file=tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InvdpoError, match="is empty"):
        serve(bundle, database, admin_password_file=tmp_path / "empty")
    assert not Path(database.removeprefix("sqlite:///")).exists() or Storage(database).raters() == []
