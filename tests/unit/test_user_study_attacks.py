"""Attacks on the user study's blinding and on its server; each is refused, and the refusal gives nothing away."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import sys
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import select
from user_study_fixture import (
    ARMS,
    CODE,
    HEADERS,
    PASSWORD,
    PROMPT,
    browser,
    entered,
    vote,
    write_bundle,
)

from user_study_app import storage
from user_study_app.server import create_app
from user_study_app.stimuli import Stimuli

pytestmark = pytest.mark.anyio

NAMES = sorted({name for arms in ARMS.values() for name in arms})
# Every path that Gradio, FastAPI or an earlier design might answer, and none of which a rater needs.
NOT_THERE = """
    /config /info /docs /redoc /openapi.json /api /api/ /gradio_api/info /gradio_api/openapi.json /gradio_api/api_info
    /gradio_api/queue/join /gradio_api/queue/data?session_hash=x /gradio_api/upload /gradio_api/heartbeat/x
    /gradio_api/startup-events /gradio_api/app_id /gradio_api/token /gradio_api/user /gradio_api/file=key.json
    /gradio_api/file=/etc/passwd /gradio_api/file/key.json /file=key.json /gradio_api/proxy=https://example.org/
    /gradio_api/stream/x/y/z/playlist.m3u8 /gradio_api/deep_link /gradio_api/call/x/y /gradio_api/mcp/ /gradio_api/runs
    /gradio_api/vibe-code /gradio_api/dev/reload /monitoring /monitoring/summary /login /logout /manifest.json /pwa_icon
    /robots.txt /svelte/x.js /custom_component/x/client/component/index.js /pages/ /pages/trial.html /pages/finish.html
    /pages/export.html /pages/rater.py /bundle/manifest.json /manifest /schedule.json /key.json /images/ /votes.db
    /export /stim /stim/ /api/export /api/raters /.env /favicon.ico/x
""".split()
TRAVERSALS = r"""
    ../key.json ..%2fkey.json ..%2Fkey.json %2e%2e/key.json %2e%2e%2fkey.json ..%252fkey.json ....//key.json ..\key.json
    ..%5ckey.json %c0%ae%c0%ae/key.json /etc/passwd %00 x%00.png ../../../../etc/passwd ..;/key.json key.json
    manifest.json ../bundle/manifest.json %uff0e%uff0e/key.json
""".split()
WRITES = ("/api/enter", "/api/consent", "/api/vote")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("study"))


@pytest.fixture
def app(bundle: Path, tmp_path: Path) -> FastAPI:
    return create_app(bundle, f"sqlite:///{tmp_path / 'votes.db'}", admin_password=PASSWORD)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A rater at the first trial."""
    async with browser(app, raise_app_exceptions=False) as opened:
        yield await entered(opened, link_of(app))


@pytest.fixture
async def stranger(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(app, raise_app_exceptions=False) as opened:
        yield opened


def link_of(app: FastAPI) -> str:
    return app.state.storage.invite(1, "test")[0]


async def trial_of(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/api/trial")).json()


def raw(answer: httpx.Response) -> str:
    """Status, headers and body of an answer as one text."""
    return f"{answer.status_code} {answer.headers.raw!r} {answer.content!r}"


def tokens(app: FastAPI) -> list[Any]:
    with app.state.storage.engine.connect() as connection:
        return list(connection.execute(select(storage.trial).order_by(storage.trial.c.rater, storage.trial.c.position)))


# -- blinding


async def test_nothing_a_rater_receives_says_which_side_is_which(
    app: FastAPI, client: httpx.AsyncClient, stranger: httpx.AsyncClient, bundle: Path
) -> None:
    """The whole way of a rater, every refused path and every kind of error, searched for names, files and tokens."""
    answers = [
        await client.get(path) for path in ("/", "/theme.css", "/pages/study.js", "/pages/study.css", "/admin/login")
    ]
    answers += [await client.get(path) for path in NOT_THERE]
    for path in WRITES:
        answers += [await client.post(path, content=body) for body in (b"", b"{", b"[]", b'{"x": 1}', b"\xff")]
    body = await trial_of(client)
    while not body.get("finished"):
        answers += [await client.get(body["left"]), await client.get(body["right"])]
        answers.append(await vote(client, "0" * 32))
        answers.append(await vote(client, body["trial"], "best"))
        answers.append(await vote(client, body["trial"]))
        body = answers[-1].json()
    answers += [await client.get("/api/state"), await stranger.get("/api/trial"), await stranger.get("/admin/")]
    stimuli = Stimuli(bundle)
    images = {token: (bundle / "images" / f"{token}.png").read_bytes() for token in stimuli.manifest.files}
    pictures = [answer for answer in answers if answer.headers["content-type"] == "image/png"]
    assert len(pictures) == 18
    hidden = {*NAMES, *stimuli.pairs, *images, *stimuli.manifest.files.values(), stimuli.bundle, str(bundle)}
    hidden |= {"key.json", "attention", "repeat_of", bundle.parent.name, "results", "sqlite", "Traceback", ".py"}
    assert {"quokka_base", "wombat_inverted"} <= hidden
    for answer in answers:
        said = raw(answer)
        page = answer.headers["content-type"].startswith(("text/html", "text/css", "application/javascript"))
        # the page's own program may use such words, but knows no name
        for word in hidden - ({"results", ".py", "sqlite"} if page else set()):
            assert word not in said, f"{word} in the answer to {answer.request.url}"
    # apart from the bytes of the picture, two images' answers differ in nothing, their length included
    assert len({str(sorted(answer.headers.items())) for answer in pictures}) == 1


async def test_images_carry_nothing_but_pixels(app: FastAPI, client: httpx.AsyncClient) -> None:
    body, seen = await trial_of(client), []
    while not body.get("finished"):
        for side in ("left", "right"):
            content = (await client.get(body[side])).content
            picture = Image.open(io.BytesIO(content))
            picture.load()
            assert picture.info == {} and not picture.getexif()
            seen.append((body[side], content))
        body = (await vote(client, body["trial"])).json()
    assert len({len(content) for _, content in seen}) == 1
    # a repeated pair shows the same pixels at other addresses; no address contains a hash of its content
    assert len({address for address, _ in seen}) == 18
    for address, content in seen:
        for name in ("md5", "sha1", "sha256", "sha512"):
            assert address.rpartition("/")[2] not in hashlib.new(name, content).hexdigest()


async def test_tokens_of_one_image_are_unrelated_between_raters(app: FastAPI, bundle: Path) -> None:
    """Who sees the addresses of several raters cannot tell which show the same image."""
    for _ in range(6):
        async with browser(app) as client:
            await entered(client, link_of(app))
    stimuli = Stimuli(bundle)
    rows = tokens(app)
    every = [token for row in rows for token in (row.token, row.left_token, row.right_token)]
    assert len(set(every)) == len(every) == 6 * 9 * 3
    # alphabetical order of the two tokens says nothing of the side or of the image
    first = [row.left_token < row.right_token for row in rows]
    assert 0.25 < sum(first) / len(first) < 0.75
    assert not set(every) & (set(stimuli.manifest.files) | set(stimuli.pairs))


async def test_the_kinds_of_trials_look_alike(app: FastAPI, client: httpx.AsyncClient) -> None:
    body, shapes = await trial_of(client), []
    while not body.get("finished"):
        shapes.append({name: type(value).__name__ for name, value in body.items() if name != "next"})
        body = (await vote(client, body["trial"])).json()
    assert len(shapes) == 9 and all(shape == shapes[0] for shape in shapes)


async def test_the_server_never_opens_the_key(bundle: Path, tmp_path: Path) -> None:
    """Every file the process opens is watched while a study is served, exported and administered."""
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # cannot be removed again
    app = create_app(bundle, f"sqlite:///{tmp_path / 'votes.db'}", admin_password=PASSWORD)
    async with browser(app) as client:
        await entered(client, link_of(app))
        body = await trial_of(client)
        while not body.get("finished"):
            await client.get(body["left"])
            body = (await vote(client, body["trial"])).json()
        await client.post("/admin/login", data={"password": PASSWORD})
        assert (await client.get("/admin/")).status_code == 200
        assert (await client.post("/admin/export", data={"format": "csv"})).status_code == 200
    watching = False
    assert any(path.endswith("manifest.json") for path in opened)  # the watch works
    assert not any("key.json" in path for path in opened)


# -- what is not there


async def test_only_what_the_page_needs_is_there(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    for path in NOT_THERE:
        for who in (client, stranger):
            answers = [await who.get(path), await who.head(path), await who.post(path), await who.options(path)]
            answers += [await who.request(method, path) for method in ("PUT", "DELETE", "PATCH", "TRACE")]
            assert {answer.status_code for answer in answers} <= {401, 404}, path
    for path in ("/", "/api/trial", "/stim/" + "0" * 32):
        assert (await client.put(path)).status_code == 404
        assert (await client.post(path)).status_code == 404


async def test_traversals_find_nothing(app: FastAPI, client: httpx.AsyncClient, bundle: Path) -> None:
    secret = (bundle.parent / "key.json").read_text()[:40]
    for prefix in ("/stim/", "/pages/", "/assets/", "/static/", "/", "/api/", "/admin/assets/", "/theme.css/"):
        for path in TRAVERSALS:
            # the path as it is, which a client's URL type would tidy first
            answer = await raw_get(app, prefix + path, client.cookies)
            assert answer[0] in (303, 400, 401, 404), (prefix + path, answer[0])
            assert secret not in answer[1] and "root:" not in answer[1]


async def raw_get(app: FastAPI, path: str, cookies: httpx.Cookies) -> tuple[int, str]:
    """GET a path exactly as written, as a server that decodes percent signs once hands it over."""
    from urllib.parse import unquote_to_bytes

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    cookie = "; ".join(f"{name}={value}" for name, value in cookies.items())
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote_to_bytes(path).decode("utf-8", "replace"), "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"host", b"study"), (b"cookie", cookie.encode())], "client": ("1.2.3.4", 5),
        "server": ("study", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode("utf-8", "replace")


async def test_gradio_files_are_only_its_own(client: httpx.AsyncClient) -> None:
    page = (await client.get("/")).text
    script = re.search(r'src="\./(assets/[^"]+\.js)"', page)
    assert script and (await client.get(f"/{script[1]}")).status_code == 200
    assert (await client.get(f"/{script[1]}.map")).status_code == 404


# -- forged, replayed, out of order


async def test_guessed_and_foreign_tokens(app: FastAPI, client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    assert (await client.get(body["left"])).status_code == 200
    for path in (f"/stim/{0:032x}", "/stim/" + "A" * 32, body["left"][:-1], body["left"] + "0", body["left"].upper()):
        assert (await client.get(path)).status_code == 404
    async with browser(app) as other:
        await entered(other, link_of(app))
        theirs = await trial_of(other)
        # an image and a trial of one rater are nothing to another, and nothing to who has not entered
        assert (await other.get(body["left"])).status_code == 404
        assert (await vote(other, body["trial"])).json()["error"] == "trial"
        assert (await client.get(theirs["right"])).status_code == 404
    assert (await stranger.get(body["left"])).status_code == 401
    assert (await vote(stranger, body["trial"])).status_code == 401
    for cookie in ("0" * 32, "", "' OR 1=1 --", "\x80", "a" * 4000):
        forged = await stranger.get("/api/trial", headers={"Cookie": f"study_session={cookie}".encode("latin-1")})
        assert forged.status_code == 401
    # the rater's own words for other things are no trial tokens
    for token in (body["left"].rpartition("/")[2], body["next"]["left"].rpartition("/")[2]):
        assert (await vote(client, token)).json()["error"] == "trial"
    assert app.state.storage.votes() == []


async def test_trials_cannot_be_skipped_repeated_or_changed(app: FastAPI, client: httpx.AsyncClient) -> None:
    order = [row.token for row in tokens(app)]
    first = await trial_of(client)
    assert first["trial"] == order[0]
    for later in order[1:]:
        assert (await vote(client, later)).json()["error"] == "order"
    second = (await vote(client, order[0], "left")).json()
    replay = await vote(client, order[0], "left")
    assert replay.status_code == 200 and replay.json() == second  # answered like the first
    for other in ("right", "tie", "problem"):
        assert (await vote(client, order[0], other)).json()["error"] == "answered"
    assert [(v["position"], v["choice"]) for v in app.state.storage.votes()] == [(0, "left")]


async def test_a_race_of_one_vote_is_one_vote(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    answers = await asyncio.gather(*(vote(client, body["trial"], "right") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200} and len({answer.text for answer in answers}) == 1
    assert len(app.state.storage.votes()) == 1


MALFORMED: tuple[Any, ...] = (
    {"choice": "both"}, {"choice": None}, {"choice": ["left"]}, {"response_ms": -1}, {"response_ms": 1e12},
    {"response_ms": "1500"}, {"response_ms": 1.5}, {"response_ms": True}, {"response_ms": None}, {"trial": None},
    {"trial": "x"}, {"trial": {"$ne": ""}}, {"trial": "0" * 32 + "\n"}, {"text": "no problem"}, {"rater": "somebody"},
    {"choice": "problem", "text": "x" * 501}, {"choice": "problem", "text": ["x"]}, {"position": 3}, {"kind": "trial"},
)  # fmt: skip


async def test_malformed_votes(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    for change in MALFORMED:
        content = {"trial": body["trial"], "choice": "left", "response_ms": 1500} | change
        answer = await client.post("/api/vote", json=content)
        assert answer.status_code == 422, change
        assert answer.json() == {"error": "malformed", "message": "This request cannot be read."}  # echoes nothing
    assert app.state.storage.votes() == []


async def test_malformed_bodies(client: httpx.AsyncClient) -> None:
    bodies = (b"", b"null", b"{", b"\xff\xfe", b"[" * 2000, b'{"trial": ' * 300, b'"text"', b'{"a":1}' * 3, b"NaN")
    kinds = ("application/json", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded")
    for path, content, kind in product(WRITES, bodies, kinds):
        answer = await client.post(path, content=content, headers={"Content-Type": kind})
        assert answer.status_code in (400, 422) and answer.json()["error"] == "malformed", (path, content, kind)


async def test_half_characters_are_no_server_error(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    text = json.dumps({"trial": body["trial"], "choice": "problem", "response_ms": 900, "text": "half \ud83d"})
    answer = await client.post("/api/vote", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 422)
    for entry in ('{"invite": "\\ud83d"}', '{"PROLIFIC_PID": "\\u0000"}', '{"PROLIFIC_PID": "a\\nb"}'):
        answer = await client.post("/api/enter", content=entry, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422


async def test_oversized_bodies(app: FastAPI, client: httpx.AsyncClient) -> None:
    for path in (*WRITES, "/admin/login"):
        assert (await client.post(path, content=b"x" * 5000)).status_code == 413

    pieces = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pieces
        while True:  # no length announced, no end
            pieces += 1
            yield b"x" * 1024

    assert (await client.post("/api/vote", content=endless())).status_code == 413
    assert pieces < 10
    # a length that was announced too small does not help
    announced = await client.post("/api/vote", content=b"x" * 5000, headers={"Content-Length": "10"})
    assert announced.status_code == 413
    assert app.state.storage.votes() == []


# -- scripts and other sites


async def test_a_prompt_is_text(app: FastAPI, client: httpx.AsyncClient) -> None:
    """A prompt goes out as JSON, which no browser runs; that the page shows it as text is a test in a browser."""
    body, prompts = await trial_of(client), []
    while not body.get("finished"):
        answer = await client.get("/api/trial")
        assert (
            answer.headers["content-type"] == "application/json"
            and answer.headers["x-content-type-options"] == "nosniff"
        )
        prompts.append(answer.json()["prompt"])
        body = (await vote(client, body["trial"])).json()
    assert PROMPT in prompts
    assert "window.hacked" not in (await client.get("/")).text


async def test_texts_of_the_study_cannot_run_in_the_page(tmp_path: Path) -> None:
    evil = "</script><script>window.hacked = 1</script><img src=x onerror=alert(1)>"
    folder = write_bundle(tmp_path, consent={"purpose": evil, "title": evil})
    app = create_app(folder, f"sqlite:///{tmp_path / 'votes.db'}", admin_password=PASSWORD)
    async with browser(app) as client:
        page = await client.get("/")
    # the configuration escapes it, and the policy runs no script without its nonce
    assert "<script>window.hacked" not in page.text and "nonce" in page.headers["content-security-policy"]
    assert not re.search(r"<script[^>]*nonce[^>]*>\s*window\.hacked", page.text)


async def test_other_sites_cannot_act_for_a_rater(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    content = {"trial": body["trial"], "choice": "left", "response_ms": 1500}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://study.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example", "X-Forwarded-Host": "evil.example"},
    ):
        assert (await client.post("/api/vote", json=content, headers=headers)).json()["error"] == "origin"
        assert (await client.post("/admin/login", data={"password": PASSWORD}, headers=headers)).status_code == 403
    # a form of another site cannot send the header, and gets no permission to
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://study") as plain:
        plain.cookies = client.cookies
        assert (await plain.post("/api/vote", json=content)).json()["error"] == "origin"
    asked = await client.options(
        "/api/vote", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 404 and not any("access-control" in name for name in asked.headers)
    page = await client.get("/", headers={"Origin": "https://evil.example"})
    assert not any("access-control" in name for name in page.headers)
    assert (
        page.headers["x-frame-options"] == "DENY"
        and "frame-ancestors 'none'" in page.headers["content-security-policy"]
    )
    good = {"Origin": "http://study", "Sec-Fetch-Site": "same-origin"}
    assert (await client.post("/api/vote", json=content, headers=good)).status_code == 200


async def test_forwarded_headers_are_ignored_without_a_proxy(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers={"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"})
    assert "evil.example" not in page.text


async def test_the_pages_query_reaches_nothing(client: httpx.AsyncClient) -> None:
    def without_nonce(page: httpx.Response) -> str:
        return re.sub(r'nonce="[^"]*"', "", page.text)

    plain = await client.get("/")
    for query in ("deep_link=../../key", "__theme=dark", "PROLIFIC_PID=5f3c0ffee", "page=admin", "view=api"):
        assert without_nonce(await client.get(f"/?{query}")) == without_nonce(plain)


# -- the experimenter's side


async def test_the_experimenters_pages_need_the_login(
    app: FastAPI, client: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    paths = [path.replace("/gradio_api", "/admin/gradio_api") for path in NOT_THERE if path.startswith("/gradio_api")]
    paths += [
        "/admin/config",
        "/admin/theme.css",
        "/admin/assets/x.js",
        "/admin/export",
        "/admin/logout",
        "/admin/none",
    ]
    for who in (client, stranger):
        for path in paths:
            for answer in (await who.get(path), await who.post(path), await who.post(path, json={"fn_index": 0})):
                assert answer.status_code == 401 and answer.json() == {"error": "login", "message": "Log in first."}
        for path in ("/admin", "/admin/"):
            assert (await who.get(path)).status_code == 303
            assert (await who.post(path)).status_code == 401
        for path in (
            "/admin/../admin/export",
            "//admin/",
            "/admin//",
            "/Admin/",
            "/admin%2f",
            "/admin%2fexport",
            "/./admin/",
        ):
            assert (await raw_get(app, path, who.cookies))[0] in (303, 401, 404), path
        for cookie in ("0" * 32, "", "admin", str(who.cookies.get("study_session"))):
            forged = await who.post(
                "/admin/export", data={"format": "csv"}, headers={"Cookie": f"study_admin={cookie}"}
            )
            assert forged.status_code == 401
    assert [row["action"] for row in app.state.storage.audit_log() if row["actor"] != "test"] == []


async def test_gradios_own_doors_stay_shut_after_the_login(app: FastAPI, stranger: httpx.AsyncClient) -> None:
    assert (await stranger.post("/admin/login", data={"password": PASSWORD})).status_code == 303
    assert (await stranger.get("/admin/")).status_code == 200
    for path in (
        "/admin/gradio_api/upload", "/admin/gradio_api/file=/etc/passwd", "/admin/gradio_api/proxy=http://127.0.0.1/",
        "/admin/gradio_api/openapi.json", "/admin/config", "/admin/monitoring", "/admin/gradio_api/run/predict",
        "/admin/gradio_api/call/refresh", "/admin/gradio_api/vibe-edit", "/admin/gradio_api/component_server",
    ):  # fmt: skip
        assert (await stranger.get(path)).status_code == 404
        assert (await stranger.post(path, json={"data": []})).status_code == 404


async def test_wrong_passwords_say_nothing(stranger: httpx.AsyncClient) -> None:
    texts = set()
    for password in ("", "correct hors", "correct horse ", "\0"):
        answer = await stranger.post("/admin/login", data={"password": password})
        assert answer.status_code in (401, 422) and "set-cookie" not in answer.headers
        if answer.status_code == 401:
            texts.add(answer.text)
    assert len(texts) == 1


async def test_the_code_comes_at_the_end_only(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = await trial_of(client)
    while not body.get("finished"):
        for path in ("/api/state", "/api/trial", "/", "/pages/study.js"):
            assert CODE not in (await client.get(path)).text
        body = (await vote(client, body["trial"])).json()
    assert body["code"] == CODE


async def test_websockets_are_closed(app: FastAPI) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/gradio_api/queue/join", "headers": [], "query_string": b"", "root_path": ""}
    await app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_errors_of_the_server_say_nothing(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("quokka_base failed in /secret/path")

    async with browser(app, raise_app_exceptions=False) as client:
        await entered(client, link_of(app))
        monkeypatch.setattr(app.state.storage, "current", broken)
        answer = await client.get("/api/trial")
    assert answer.status_code == 500
    assert answer.json() == {"error": "server", "message": "The server made a mistake. Please try again."}
    assert HEADERS and "secret" not in raw(answer)
