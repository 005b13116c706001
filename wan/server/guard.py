"""Who may ask, and for how much: in front of everything else that a request meets."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING

from wan.server.errors import ApiError
from wan.server.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
COOKIE, TOKEN = "wan_session", "x-wan-token"
_SAFE = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/health", "/login", "/static/app.css", "/static/app.js", "/static/icon.svg")  # without a key
_UPLOAD_SECONDS, _SILENT_SECONDS = 3600.0, 60.0  # for all of a request, and between two parts of it
_UPLOADS = 100  # at once
_SMALL = 1 << 20  # bytes of a request without files
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# the report of a run is a page of its own with its own styles; it may do nothing
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Keys:
    """The API key, if there is one, and what is signed for browsers. The key itself is not kept."""

    def __init__(self, key: str | None, secret: bytes) -> None:
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()
        self._secret = secret

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return self._digest is not None

    def fits(self, key: str) -> bool:
        """Whether this is the key, in a time that does not tell how much of it is right."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return self._digest is not None and hmac.compare_digest(given, self._digest)

    @property
    def session(self) -> str:
        """The cookie of a browser that has sent the key."""
        return self._sign("session")

    @property
    def token(self) -> str:
        """What our own pages send with what changes something, and others cannot know."""
        return self._sign("token")

    def is_session(self, value: str) -> bool:
        """Whether this is the cookie of a browser that has sent the key."""
        return hmac.compare_digest(value.encode(), self.session.encode())

    def is_token(self, value: str) -> bool:
        """Whether this is what our own pages send."""
        return hmac.compare_digest(value.encode(), self.token.encode())

    def _sign(self, what: str) -> str:
        return hmac.new(self._secret, what.encode() + (self._digest or b""), hashlib.sha256).hexdigest()


class Guard:
    """Lets through what may pass: host, origin, key, token, size and time of a request, in this order."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, hosts: Iterable[str] | None, most_bytes: int, metrics: Metrics
    ) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.most_bytes = most_bytes
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began, status, streams = time.perf_counter(), 500, False
        path = scope["path"]

        async def sending(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"]]
                names = {name.lower() for name, _ in headers}
                kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
                streams = kind.startswith(b"text/event-stream")
                policy = REPORT_POLICY if path.endswith("/report") and status == 200 else POLICY
                for name, value in {**_HEADERS, "content-security-policy": policy}.items():
                    if name.encode() not in names:
                        headers.append((name.encode(), value.encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                self.check(scope["method"], path, headers)
                await self._pass(scope, headers, receive, sending)
            except ApiError as error:
                if error.status == 401 and (path == "/" or path.startswith("/chains/")):
                    await _answer(sending, 303, b"", {"location": "/login"})
                    return
                await _answer(sending, error.status, json.dumps(error.body).encode(), error.headers)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PATCH", "DELETE") else "other"
            self.metrics.requests.labels(method, f"{status // 100}xx").inc()
            if not streams and method != "other":
                self.metrics.latency.labels(method).observe(time.perf_counter() - began)

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise ApiError for a request that may not pass."""
        host = headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name not in self.hosts:
            # a name that an attacker's DNS gives this address
            raise ApiError("this server does not answer to that host name", status=403, code="wrong_host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        navigates = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if (site in ("cross-site", "same-site") and not navigates) or (
            origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}")
        ):
            raise ApiError("requests of other sites are not answered", status=403, code="wrong_origin")
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        session = cookie is not None and self.keys.is_session(cookie.value)
        if self.keys.needed and path not in _OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if not session and not (kind.lower() == "bearer" and self.keys.fits(key.strip())):
                raise ApiError(
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        # a browser says where a request comes from, or has our cookie; programs do neither
        browser = origin is not None or site is not None or cookie is not None
        if method not in _SAFE and browser and path != "/login" and not self.keys.is_token(headers.get(TOKEN, "")):
            raise ApiError("this page is out of date; load it again", status=403, code="wrong_token")

    async def _pass(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Hand the request on, and count what it sends."""
        if scope["method"] in _SAFE:
            await self.app(scope, receive, send)
            return
        files = headers.get("content-type", "").lower().startswith("multipart/")
        most = self.most_bytes if files else _SMALL
        too_much = ApiError(f"the request is larger than {most / 2**20:.4g} MiB", status=413, code="too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_much
        if files and self._uploads >= _UPLOADS:
            raise ApiError(
                "too many uploads at once; try again",
                status=429,
                code="rate_limit_exceeded",
                headers={"retry-after": "2"},
            )
        got, whole, deadline = 0, False, asyncio.get_running_loop().time() + _UPLOAD_SECONDS

        async def receiving() -> Message:
            nonlocal got, whole
            if whole:  # what may still come is that the client leaves, whenever that is
                return await receive()
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), min(left, _SILENT_SECONDS))
            except asyncio.TimeoutError as error:  # no TimeoutError before Python 3.11
                raise ApiError("the request takes too long", status=408, code="timeout") from error
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > most:
                raise too_much
            return message

        self._uploads += files
        try:
            await self.app(scope, receiving, send)
        finally:
            self._uploads -= files


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    sent = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    if status == 413:
        sent["connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
