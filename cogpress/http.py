"""HTTP with retries: connections, JSON APIs and event streams."""

from __future__ import annotations

import codecs
import logging
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from httpx_retries import Retry, RetryTransport
from httpx_sse import EventSource, ServerSentEvent
from httpx_sse._decoders import SSEDecoder, SSELineDecoder

from cogpress import source
from cogpress.errors import CogpressError

TRIES = 6
"""Tries of a download that makes no progress before it fails."""

BACKOFF = 0.5
"""Seconds before the second try; doubled for each later one, and up to half less at random."""

LONGEST_BACKOFF = 30.0
"""Seconds."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that a later try may change."""

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------------------------------------------------


def connect(url: str, *, retry: Retry | None = None, **settings: Any) -> httpx.Client:
    """A client for one server.

    Args:
        url: of the server.
        retry: how requests are repeated; not at all by default.
        settings: for `httpx.Client`.
    """
    return with_retries(httpx.Client(**_for(url), **settings), retry)


def connect_async(url: str, *, retry: Retry | None = None, **settings: Any) -> httpx.AsyncClient:
    """As `connect`, for an event loop."""
    return with_retries(httpx.AsyncClient(**_for(url), **settings), retry)


def _for(url: str) -> dict[str, Any]:
    quiet()
    parts = urlsplit(url)
    # A proxy for the internet cannot reach this machine's own servers, and loading certificates takes longer than the
    # rest of a request over plain HTTP.
    return {"trust_env": not source.is_loopback(parts.hostname), "verify": parts.scheme == "https"}


def quiet() -> None:
    """Keep the libraries from logging URLs."""
    # Below this level they log each URL, with its signature, and headers that are not understood.
    for name in ("httpx", "httpcore", "httpx_retries"):
        logging.getLogger(name).setLevel(logging.ERROR)


_Client = TypeVar("_Client", httpx.Client, httpx.AsyncClient)


def with_retries(client: _Client, retry: Retry | None) -> _Client:
    """Wrap the client's transports. A `transport` given to the constructor would ignore the environment's proxies."""
    if retry is not None:
        client._transport = RetryTransport(client._transport, retry)
        for pattern, transport in client._mounts.items():
            client._mounts[pattern] = transport and RetryTransport(transport, retry)
    return client


def retries(
    tries: int, longest: float, *, idempotent: bool = True, read: Any = None, statuses: Collection[int] | None = None
) -> Retry:
    """How a request is repeated: with exponential backoff and jitter, or after what `Retry-After` says.

    Args:
        tries: in all.
        longest: seconds of the longest wait, whatever the server asks for.
        idempotent: whether the request may reach the server twice. Otherwise it is repeated only where the server has
            not begun with it: after a 429 or without a connection.
        read: reads the response's body, so that a body that breaks off is a failed try.
        statuses: after which it is repeated, if others than those.
    """
    return Retry(
        total=tries - 1,
        allowed_methods=_METHODS,
        status_forcelist=statuses if statuses is not None else BUSY if idempotent else {429},
        retry_on_exceptions=None if idempotent else (httpx.ConnectError, httpx.ConnectTimeout),
        backoff_factor=BACKOFF / 2,  # the library doubles it before the first wait
        max_backoff_wait=longest,
        backoff_jitter=0.5,
        validate_response=read,
    )


def reason(error: Exception) -> str:
    """Why a request failed, in words."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    if isinstance(error, httpx.TooManyRedirects):
        return "too many redirects"
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | UnicodeError):
        return "not a valid URL"
    return "the connection broke off"


# ---------------------------------------------------------------------------------------------------------------------
# JSON APIs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An API's answer: the status, the JSON of a good one, and what a refusal says."""

    status: int
    content: Any
    detail: str = ""
    title: str = ""
    wait: float | None = None
    """Seconds after which a 429 asks to be repeated."""


class UnavailableError(CogpressError):
    """A server cannot be asked now.

    Attributes:
        status: the last answer's; None where none came.
        begun: whether the server may have begun with the request.
    """

    def __init__(self, text: str, status: int | None, begun: bool) -> None:
        """Note what callers decide by."""
        super().__init__(text)
        self.status, self.begun = status, begun


class _Requests:
    """What the synchronous and the asynchronous client share."""

    def __init__(self, base: str, token: str | None, name: str, tries: int, longest: float, read: Any) -> None:
        self.base, self.name = base.rstrip("/"), name
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._retries = {safe: retries(tries, longest, idempotent=safe, read=read) for safe in (True, False)}
        # For callers that keep to a rate limit by themselves.
        self._paced = {
            safe: retries(tries, longest, idempotent=safe, read=read, statuses=BUSY - {429} if safe else {425})
            for safe in (True, False)
        }

    def _extensions(self, method: str, idempotent: bool | None, *, paced: bool = False) -> dict[str, Any]:
        safe = method not in ("POST", "PATCH") if idempotent is None else idempotent
        return {"retry": (self._paced if paced else self._retries)[safe]}

    def _answer(self, response: httpx.Response, retry: Retry) -> Reply:
        status = response.status_code
        if retry.is_retryable_status_code(status):
            tries = f"{retry.total + 1} times in a row" if retry.total else "once"
            raise UnavailableError(f"{self.name} answered {status}, {tries}. Try again later.", status, begun=False)
        try:
            content = response.json()
        except ValueError:
            content = None
        if response.is_success:
            if content is None and not (status in (202, 204) and not response.content):
                raise CogpressError(f"{self.name} did not answer with JSON. Check its address.")
            return Reply(status, content)
        detail = content.get("detail") or content.get("error") if isinstance(content, dict) else None
        said = content.get("retry_after") if isinstance(content, dict) else None  # the header may be missing
        try:
            wait: float | None = float(response.headers.get("Retry-After") or said or "")
        except ValueError:
            wait = None
        title = str(content.get("title") or "") if isinstance(content, dict) else ""
        return Reply(status, None, detail if isinstance(detail, str) else "", title, wait)

    def _unreachable(self, error: httpx.HTTPError, retry: Retry) -> UnavailableError:
        begun = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        problem = f"{self.name} cannot be reached ({reason(error)})"
        if begun and not retry.is_retryable_exception(error):
            problem = f"{self.name} broke off its answer ({reason(error)}), so it may have begun what it was asked"
            return UnavailableError(f"{problem}. Check there before you run this again.", None, begun)
        times = f", {retry.total + 1} times in a row" if retry.total else ""
        return UnavailableError(f"{problem}{times}. Check the network.", None, begun)


class Api(_Requests):
    """A JSON API, asked with retries. Its token goes to this server alone."""

    def __init__(self, base: str, token: str | None, name: str, *, tries: int, longest: float) -> None:
        """Nothing is asked yet.

        Args:
            base: the address before the routes.
            token: sent as a bearer token, in no message.
            name: the server's in messages.
            tries: of each request.
            longest: seconds of the longest wait between tries.
        """
        super().__init__(base, token, name, tries, longest, httpx.Response.read)
        self._http = connect(base, retry=self._retries[True], headers=self._headers, timeout=10)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def send(
        self,
        method: str,
        route: str,
        body: Any = None,
        *,
        idempotent: bool | None = None,
        paced: bool = False,
        **more: Any,
    ) -> Reply:
        """The answer to one request, good or refused.

        Args:
            method: of HTTP.
            route: after the base.
            body: sent as JSON; None sends none.
            idempotent: see `retries`; by default whether the method is.
            paced: return a 429 instead of repeating the request.
            more: for httpx, such as `files`.

        Raises:
            UnavailableError: no answer came, or only that the server is busy.
            CogpressError: the answer is not JSON.
        """
        extensions = self._extensions(method, idempotent, paced=paced)
        try:
            response = self._http.request(method, self.base + route, json=body, extensions=extensions, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error, extensions["retry"]) from None
        return self._answer(response, extensions["retry"])


class AsyncApi(_Requests):
    """As `Api`, for an event loop."""

    def __init__(
        self, base: str, token: str | None, name: str, *, tries: int, longest: float, timeout: httpx.Timeout
    ) -> None:
        """See `Api`; `timeout` is that of each try."""
        super().__init__(base, token, name, tries, longest, httpx.Response.aread)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = connect_async(
            base, retry=self._retries[True], headers=self._headers, timeout=timeout, limits=limits
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def send(
        self, method: str, route: str, body: Any = None, *, idempotent: bool | None = None, **more: Any
    ) -> Reply:
        """See `Api.send`."""
        extensions = self._extensions(method, idempotent)
        try:
            response = await self._http.request(method, self.base + route, json=body, extensions=extensions, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error, extensions["retry"]) from None
        return self._answer(response, extensions["retry"])


# ---------------------------------------------------------------------------------------------------------------------
# Event streams
# ---------------------------------------------------------------------------------------------------------------------

EVENT_STREAM = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
"""Headers that ask for one."""


def events(response: httpx.Response) -> Iterator[ServerSentEvent]:
    """The server-sent events of a response as they arrive, without the empty ones.

    Raises:
        httpx.TransportError: the response is no event stream, or breaks off.
    """
    return (event for event in EventSource(response).iter_sse() if event.event != "message" or event.data)


class EventDecoder:
    """Server-sent events from a stream's bytes, for a protocol that is handed them."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines = SSELineDecoder()
        self._events = SSEDecoder()

    def feed(self, block: bytes) -> Iterator[ServerSentEvent]:
        """The events that a block completes; it takes linear time however an event is cut."""
        text = self._text.decode(block)
        for line in self._lines.decode(text) if text else ():
            event = self._events.decode(line)
            if event is not None:
                yield event


async def events_async(response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
    """As `events`, for an event loop."""
    async with aclosing(EventSource(response).aiter_sse()) as found:
        async for event in found:
            if event.event != "message" or event.data:
                yield event
