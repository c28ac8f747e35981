"""Who may ask, from where, how much and how often; what is refused is told in Replicate's form.

Knows tokens, hosts, origins, sizes and rates; leaves everything behind them to the application.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogpress import source
from cogpress.errors import CogpressError

_OPEN = re.compile(
    r"/(?:$|p/|compare$|static/|favicon|playground/api/config$|v1/stream/|v1/files/[^/]+/download$|hooks/)"
)
"""What is answered without a token: the page itself, which holds nothing, and addresses that carry a key."""

_CLIENTS = 10_000
"""How many addresses' rates are known at once."""


class TooLarge(Exception):
    """A body became longer than it may be while it was read; `body` is the answer."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["detail"])
        self.body = body


@dataclass(frozen=True)
class Limits:
    """What is asked of a request.

    Attributes:
        token: that must be sent; None for none.
        loopback: whether the server listens on this machine alone, so that only its own names are right in `Host`.
        max_bytes: of a request's body.
        per_minute: requests of one address.
    """

    token: str | None = None
    loopback: bool = True
    max_bytes: int = 64 << 20
    per_minute: int = 6000


def check_address(host: str, token: str | None) -> bool:
    """Whether an address to listen on is this machine's alone.

    Raises:
        CogpressError: it is not, and there is no token; or the token is too short to be one.
    """
    loopback = source.is_loopback(host)
    if not loopback and not token:
        raise CogpressError(
            f"Others can reach {host}, so a token is required: set COGPRESS_TOKEN to a long random text (such as "
            "`openssl rand -hex 24` gives), and give it to those who may ask. Or leave --host out."
        )
    if token is not None and len(token) < 16:
        raise CogpressError("COGPRESS_TOKEN is shorter than 16 characters, which can be guessed. Take a longer one.")
    return loopback


def error(status: int, title: str, detail: str, **more: Any) -> dict[str, Any]:
    """An error's body as Replicate gives it."""
    return {"title": title, "detail": detail, "status": status, **more}


class Access:
    """Stands before the application."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        """Wrap an application."""
        self._app, self._limits = app, limits
        self._expected = hashlib.sha256((limits.token or "").encode()).digest()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def authorized(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request carries the token, or none is required."""
        if self._limits.token is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
        if scheme.lower() not in (b"bearer", b"token"):
            return False
        return hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._expected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refused(scope, headers)
        if refused is not None:
            await answer(send, *refused)
            return
        scope["authorized"] = self.authorized(headers)
        await self._bounded(scope, receive, send)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[dict[str, Any], dict[str, str]] | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        # A page of another site whose name was made to point here still sends its own name.
        if self._limits.loopback and not source.is_loopback(name):
            detail = f"This server answers to localhost and 127.0.0.1 alone, not to {host[:80]!r}."
            return error(421, "Misdirected request", detail), {}
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            return error(403, "Forbidden", "Requests from other sites' pages are refused."), {}
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and not _is_visit(scope, headers):
            return error(403, "Forbidden", "Requests from other sites' pages are refused."), {}
        wait = self._wait(scope)  # before the token is looked at, so that guesses are counted too
        if wait:
            detail = f"Request was throttled. More than {self._limits.per_minute} requests a minute. Wait {wait} s."
            return error(429, "Too many requests", detail), {"Retry-After": str(wait)}
        if not self.authorized(headers) and not _OPEN.match(scope["path"]):
            detail = "You did not pass a valid token. Send it as `Authorization: Bearer TOKEN`."
            return error(401, "Unauthenticated", detail), {"WWW-Authenticate": "Bearer"}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.max_bytes:
            return self._too_large(), {}
        return None

    def _too_large(self) -> dict[str, Any]:
        detail = f"A request may have {self._limits.max_bytes >> 20} MB (playground.max_input_mb in model.yaml)."
        return error(413, "Request too large", detail)

    def _wait(self, scope: Scope) -> int:
        """Whole seconds to wait for, 0 where the request is within the rate."""
        path = scope["path"]
        if path.startswith(("/static/", "/v1/stream/", "/hooks/")):
            return 0
        address = (scope.get("client") or ("", 0))[0]
        now, most = time.monotonic(), float(self._limits.per_minute)
        left, seen = self._buckets.pop(address, (most, now))
        left = min(most, left + (now - seen) * most / 60)
        allowed = left >= 1
        self._buckets[address] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / most))

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, counting the bytes of a body that does not say its length."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limits.max_bytes:
                raise TooLarge(self._too_large())
            return message

        await self._app(scope, receive if scope["method"] == "GET" else counted, send)


def _is_visit(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether somebody follows a link to the page, which is what permalinks are for."""
    return scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"


async def answer(send: Send, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send an error's body."""
    content = json.dumps(body).encode()
    sent = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(content)).encode())]
    sent += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": body["status"], "headers": sent})
    await send({"type": "http.response.body", "body": content})
