"""What every request passes before any page sees it: an allow-list of paths, same-origin writes, small bodies, headers.

`Shield` is the outermost layer of the server. It exists because Gradio answers far more paths than this study needs
(uploads, file access, a proxy, event streams, its API description): whatever is not listed here does not exist.
Nothing in this module writes an address anywhere; addresses are kept only as keyed hashes in memory, to limit rates.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RATER_COOKIE = "study_session"
ADMIN_COOKIE = "study_admin"
WRITE_HEADER = "x-study"

# What a rater's browser needs: our own endpoints, the page, and the files Gradio's page is made of.
RATER_READS = re.compile(
    r"/(?:|theme\.css|favicon\.ico|api/(?:state|trial)|stim/[0-9a-f]{32}|pages/(?:study|login)\.(?:js|css)"
    r"|(?:assets|static)/[\w@+./-]+)"
)
RATER_WRITES = re.compile(r"/api/(?:enter|consent|vote)")
# What the experimenter's browser needs on top, after the login. Gradio's upload and file routes are not among it.
ADMIN_OPEN = re.compile(r"/admin/login")
ADMIN_READS = re.compile(
    r"/admin/(?:|theme\.css|favicon\.ico|(?:assets|static)/[\w@+./-]+"
    r"|gradio_api/(?:queue/data|heartbeat/\w+|startup-events|info|theme\.css))"
)
ADMIN_WRITES = re.compile(r"/admin/(?:login|logout|export|gradio_api/(?:queue/join|cancel|reset))")

# Bytes of a request's body. A vote is under 1 KiB; a key file of a thousand pairs is half a MiB.
BODY_LIMITS = {"/admin/export": 16 * 2**20, "/admin/gradio_api/queue/join": 64 * 2**10}
BODY_LIMIT = 4 * 2**10

# Gradio's page makes functions from strings for its own templates, hence 'unsafe-eval'. Inline scripts run only with
# the nonce of the page, so text that reaches the page cannot become one. Nothing may be fetched from elsewhere.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
REST_POLICY = "default-src 'none'; frame-ancestors 'none'"


def digest(token: str) -> str:
    """The hash under which a secret token is stored. Tokens are random 128-bit values, so a plain hash is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    """32 hex digits nobody can guess."""
    return secrets.token_hex(16)


def read_cookie(headers: Headers, name: str) -> str | None:
    """A cookie of the request, None where it is missing or the header cannot be read."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return morsel.value if morsel else None


@dataclass(frozen=True)
class Rate:
    """`burst` requests at once, then `per_second`."""

    per_second: float
    burst: float


@dataclass(frozen=True)
class Limits:
    """Requests allowed to one rater, and entries and logins allowed to one address.

    A fast rater makes three requests a trial (vote and two images) and two trials a second. A whole class behind one
    address may enter at once.
    """

    rater: Rate = Rate(10, 40)
    entry: Rate = Rate(5, 300)
    login: Rate = Rate(0.1, 5)


class RateLimiter:
    """Token buckets by key, in memory; the least recently used key is forgotten beyond `keys` of them."""

    def __init__(self, rate: Rate, keys: int = 20_000) -> None:
        self.rate, self.keys = rate, keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, key: str) -> float:
        """Take one request of `key`: 0 where it is allowed, otherwise the seconds until it would be."""
        now = time.monotonic()
        with self._lock:
            left, before = self._buckets.pop(key, (self.rate.burst, now))
            left = min(self.rate.burst, left + (now - before) * self.rate.per_second)
            allowed = left >= 1
            self._buckets[key] = (left - 1 if allowed else left, now)
            while len(self._buckets) > self.keys:
                self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self.rate.per_second


class Addresses:
    """Turns a request's address into a key for a rate limit that cannot be turned back: its key dies with the process.

    Behind a proxy the address is the last entry of X-Forwarded-For, the only one the proxy wrote itself.
    """

    def __init__(self, trust_proxy: bool) -> None:
        self.trust_proxy = trust_proxy
        self._key = secrets.token_bytes(32)

    def key(self, scope: Scope) -> str:
        """The rate limit's key of the request."""
        address = (scope.get("client") or ("",))[0]
        if self.trust_proxy:
            address = Headers(scope=scope).get("x-forwarded-for", address).rsplit(",", 1)[-1].strip()
        return hmac.new(self._key, address.encode(), hashlib.sha256).hexdigest()


class AdminAccess:
    """The experimenter's password and the sessions opened with it. Both live in memory: a restart asks again."""

    def __init__(self, password: str, hours: float = 8) -> None:
        self._password = hashlib.sha256(password.encode()).digest()
        self._seconds = hours * 3600
        self._sessions: dict[str, float] = {}

    def login(self, password: str) -> str | None:
        """A new session token where the password is right, compared in constant time; None otherwise."""
        given = hashlib.sha256(password.encode("utf-8", "surrogatepass")).digest()
        if not hmac.compare_digest(given, self._password):
            return None
        now = time.monotonic()
        self._sessions = {key: until for key, until in self._sessions.items() if until > now}
        token = new_token()
        self._sessions[digest(token)] = now + self._seconds
        return token

    def logout(self, token: str | None) -> None:
        """End a session; an unknown one is none."""
        self._sessions.pop(digest(token or ""), None)

    def allows(self, token: str | None) -> bool:
        """Whether the cookie's token opens the experimenter's pages."""
        return self._sessions.get(digest(token or ""), 0.0) > time.monotonic()


def same_origin(headers: Headers, trust_proxy: bool) -> bool:
    """Whether a write came from a page of this server. A request without browser headers (a script) counts as such:
    it carries no one else's cookies."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    hosts = {headers.get("host", "")}
    if trust_proxy:
        hosts.add(headers.get("x-forwarded-host", "").rsplit(",", 1)[-1].strip())
    return urlsplit(origin).netloc in hosts - {""}


class Shield:
    """The outermost layer: refuses what is not listed, not same-origin, too large or not logged in; adds headers.

    Forwarded headers are dropped unless `trust_proxy`, so that no client can pose as the proxy. The query of the
    rater's page is dropped too: Gradio gives meaning to some of it, and the page reads the address in the browser.
    """

    def __init__(self, app: ASGIApp, admin: AdminAccess, trust_proxy: bool) -> None:
        self.app, self.admin, self.trust_proxy = app, admin, trust_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        scope = self._cleaned(scope, path)
        sender = _Sender(send, path, https=self.trust_proxy)
        refusal = self._refusal(scope, path)
        if refusal:
            await sender.refuse(*refusal)
            return
        if scope["method"] == "POST":
            body = await _read(receive, BODY_LIMITS.get(path, BODY_LIMIT))
            if body is None:
                await sender.refuse(413, "too_large", "The request is too large.")
                return
            receive = _replay(body, receive)
        await self.app(scope, receive, sender)

    def _cleaned(self, scope: Scope, path: str) -> Scope:
        dropped = () if self.trust_proxy else (b"x-forwarded-", b"forwarded", b"x-real-ip")
        headers = [(name, value) for name, value in scope["headers"] if not dropped or not name.startswith(dropped)]
        if path in ("/", "/admin/"):
            return {**scope, "headers": headers, "query_string": b""}
        return {**scope, "headers": headers}

    def _refusal(self, scope: Scope, path: str) -> tuple[int, str, str] | None:
        method, headers = scope["method"], Headers(scope=scope)
        reads, writes = RATER_READS, RATER_WRITES
        if path == "/admin" or path.startswith("/admin/"):
            if not ADMIN_OPEN.fullmatch(path) and not self.admin.allows(read_cookie(headers, ADMIN_COOKIE)):
                # To the login, where a person opened the page; whether any other path exists is not said.
                if method == "GET" and path in ("/admin", "/admin/"):
                    return 303, "login", "admin/login"
                return 401, "login", "Log in first."
            if path == "/admin" and method == "GET":
                return 303, "moved", "admin/"
            reads, writes = ADMIN_READS, ADMIN_WRITES
            if method in ("GET", "HEAD") and ADMIN_OPEN.fullmatch(path):
                return None
        if "/../" in path or "/./" in path or "//" in path:
            return 404, "not_found", "There is nothing here."
        if method in ("GET", "HEAD") and reads.fullmatch(path):
            return None
        if method != "POST" or not writes.fullmatch(path):
            return 404, "not_found", "There is nothing here."
        if not same_origin(headers, self.trust_proxy):
            return 403, "origin", "This request did not come from the study's page."
        if path.startswith("/api/") and WRITE_HEADER not in headers:
            return 403, "origin", "This request did not come from the study's page."
        return None


class _Sender:
    """Sends a response with the study's headers; gives a page's scripts the nonce of its policy."""

    def __init__(self, send: Send, path: str, https: bool) -> None:
        self._send, self._path, self._https = send, path, https
        self._nonce = secrets.token_urlsafe(16)
        self._held: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            page = headers.get("content-type", "").startswith("text/html")
            headers["content-security-policy"] = PAGE_POLICY.format(nonce=self._nonce) if page else REST_POLICY
            headers["x-content-type-options"] = "nosniff"
            # The rater's page may have been opened with ids in its address. The experimenter's forms need more than
            # no-referrer: under it a browser does not say that they come from here.
            headers["referrer-policy"] = "same-origin" if self._path.startswith("/admin") else "no-referrer"
            headers["x-frame-options"] = "DENY"
            headers["cross-origin-resource-policy"] = "same-origin"
            headers["cross-origin-opener-policy"] = "same-origin"
            headers["permissions-policy"] = "camera=(), microphone=(), geolocation=()"
            headers["x-robots-tag"] = "noindex"
            if self._https:
                headers["strict-transport-security"] = "max-age=31536000"
            # Gradio adds its own for some front ends.
            for name in ("access-control-allow-origin", "access-control-allow-credentials", "server"):
                if name in headers:
                    del headers[name]
            if not re.match(r"(?:/admin)?/(?:assets|static)/", self._path):
                headers["cache-control"] = "no-store"
            if page:
                self._held = message
                return
        elif self._held is not None:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            start, self._held = self._held, None
            body = self._body.replace(b"<script", b'<script nonce="' + self._nonce.encode() + b'"')
            if self._body:  # a HEAD keeps the length it was given
                MutableHeaders(scope=start)["content-length"] = str(len(body))
            await self._send(start)
            message = {"type": "http.response.body", "body": body}
        await self._send(message)

    async def refuse(self, status: int, error: str, text: str) -> None:
        """Answer without asking the application. For a redirection `text` is where to, relative to the root."""
        body = json.dumps({"error": error, "message": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 303:
            headers.append((b"location", ("../" + text if self._path.endswith("/admin/") else text).encode()))
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The request's body, None as soon as it is longer than `limit` bytes, whatever length was announced."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
