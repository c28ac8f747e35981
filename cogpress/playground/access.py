"""Access control before the application: tokens, hosts, origins, body sizes and request rates."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogpress import source
from cogpress.errors import CogpressError

_OPEN = re.compile(
    r"/(?:$|p/|compare$|static/|favicon|playground/api/config$|v1/stream/|v1/files/[^/]+/download$|hooks/)"
)
"""Paths that need no token: the page itself, which holds no data, and URLs that carry a key."""

_CLIENTS = 10_000
"""Most client addresses that are tracked for rate limits; the least recent are dropped."""


class TooLarge(Exception):
    """A body exceeded its limit while it was read; `body` is the response."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["detail"])
        self.body = body


@dataclass(frozen=True)
class RequestLimits:
    """What a request must satisfy.

    Attributes:
        token: required in `Authorization`; None for none.
        loopback: whether the server listens on this machine alone, so that `Host` must be a loopback name.
        max_bytes: largest body.
        per_minute: requests from one client address.
    """

    token: str | None = None
    loopback: bool = True
    max_bytes: int = 64 << 20
    per_minute: int = 6000


def client(address: str) -> str:
    """The client behind an address, for rate limits: in IPv6 its /64 network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4 or found.ipv4_mapped is not None:
        return address
    return str(ipaddress.ip_network((int(found), 64), strict=False))


def check_address(host: str, token: str | None) -> bool:
    """Whether an address to listen on is a loopback address.

    Raises:
        CogpressError: it is not and there is no token, or the token is too short.
    """
    loopback = source.is_loopback(host)
    if not loopback and not token:
        raise CogpressError(
            f"Other machines can reach {host}, so a token is required. Set COGPRESS_TOKEN to a long random string "
            "(`openssl rand -hex 24`), or leave out --host."
        )
    if token is not None and len(token) < 16:
        raise CogpressError("COGPRESS_TOKEN is shorter than 16 characters and can be guessed. Use a longer one.")
    return loopback


def error(status: int, title: str, detail: str, **more: Any) -> dict[str, Any]:
    """The body of an error in Replicate's form."""
    return {"title": title, "detail": detail, "status": status, **more}


class Access:
    """ASGI middleware that rejects requests the limits do not allow."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        """Wrap an application."""
        self._app, self._limits = app, limits
        self._expected = hashlib.sha256((limits.token or "").encode()).digest()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def authorized(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request has the token, or none is required."""
        if self._limits.token is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
        if scheme.lower() not in (b"bearer", b"token"):
            return False
        return hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._expected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refused(scope, headers)
        if refused is not None:
            await problem(*refused)(scope, receive, send)
            return
        scope["authorized"] = self.authorized(headers)
        await self._bounded(scope, receive, send)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[dict[str, Any], dict[str, str]] | None:
        # Several are no host: others may read another one of them than this.
        host = b",".join(value for name, value in scope["headers"] if name == b"host").decode("latin-1").lower()
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        # Against DNS rebinding: a site whose name was made to point here still sends its own name.
        if self._limits.loopback and not source.is_loopback(name):
            detail = f"This server only answers to localhost and 127.0.0.1, not to {host[:80]!r}."
            return error(421, "Misdirected request", detail), {}
        origin = headers.get(b"origin")
        if origin is not None and _site(origin) != host:
            return error(403, "Forbidden", "Requests from pages of other sites are refused."), {}
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and not _is_visit(scope, headers):
            return error(403, "Forbidden", "Requests from pages of other sites are refused."), {}
        wait = self._wait(scope)  # before the token is checked, so that guesses count too
        if wait:
            detail = f"Request was throttled: more than {self._limits.per_minute} requests a minute. Retry in {wait} s."
            return error(429, "Too many requests", detail, retry_after=wait), {"Retry-After": str(wait)}
        if not self.authorized(headers) and not _OPEN.match(scope["path"]):
            detail = "You did not pass a valid token. Send it as `Authorization: Bearer TOKEN`."
            return error(401, "Unauthenticated", detail), {"WWW-Authenticate": "Bearer"}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._limits.max_bytes:
            return self._too_large(), {}
        return None

    def _too_large(self) -> dict[str, Any]:
        detail = (
            f"A request may have at most {self._limits.max_bytes >> 20} MB (playground.max_input_mb in model.yaml)."
        )
        return error(413, "Request too large", detail)

    def _wait(self, scope: Scope) -> int:
        """Whole seconds to wait; 0 if the request is within the rate."""
        path = scope["path"]
        if path.startswith(("/static/", "/v1/stream/", "/hooks/")):
            return 0
        address = client((scope.get("client") or ("", 0))[0])
        now, most = time.monotonic(), float(self._limits.per_minute)
        left, seen = self._buckets.pop(address, (most, now))
        left = min(most, left + (now - seen) * most / 60)
        allowed = left >= 1
        self._buckets[address] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / most))

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting the bytes of a body that does not declare its length."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limits.max_bytes:
                raise TooLarge(self._too_large())
            return message

        await self._app(scope, receive if scope["method"] == "GET" else counted, send)


def _site(origin: bytes) -> str | None:
    """The host and port of an `Origin` header; None where it names none."""
    try:
        return urlsplit(origin.decode("latin-1").lower()).netloc
    except ValueError:  # such as `http://[`
        return None


def _is_visit(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether someone follows a link to the page, which is what permalinks are for."""
    return scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"


def problem(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """The response with the body of an `error`; a lone surrogate becomes a question mark."""
    content = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    return Response(content, body["status"], headers, "application/problem+json")
