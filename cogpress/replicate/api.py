"""The client of Replicate's HTTP API: requests with retries, refusals explained, streams."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from cogpress import http, source
from cogpress.errors import CogpressError
from cogpress.http import Reply
from cogpress.redact import redacted
from cogpress.replicate import routes
from cogpress.replicate.routes import Call

ADDRESS = "https://api.replicate.com"

ENDED = ("succeeded", "failed", "canceled", "aborted")
"""The statuses of a prediction or training that has ended."""

POLL_SECONDS = 0.5

TRIES = 7
"""Attempts at a request while Replicate is busy or cannot be reached."""

LONGEST_WAIT = 120.0
"""Seconds between two tries, whatever Replicate asks for."""

UPLOAD_BYTES = 100_000_000
"""Of the largest file that Replicate takes."""

RATE_SECONDS = 10.0
"""Between two predictions where a 429 names no pause: an account without credit may make 6 a minute."""

RATE_TRIES = 30
"""Attempts at a creation that the rate limit refuses."""

CODES = {
    "E1001": "out of memory: choose hardware with more, or lower serve.max_context or serve.gpu_memory_share",
    "E6716": "the model did not start in time: make its start shorter with smaller weights, or weights in the image",
}
"""Replicate's own error codes, which stand in a prediction's error or log."""

_REFUSALS = {
    401: ("rejects the token", "Set REPLICATE_API_TOKEN to a valid one."),
    402: (
        "has no credit or payment method for it",
        "Add one at replicate.com/account/billing, wait some minutes, and run this again.",
    ),
    403: ("does not allow it with this token", "Use a token of the owner or of a member of the organization."),
    404: ("cannot find it", "Check the name and REPLICATE_BASE_URL."),
    413: ("takes no file of this size", "Give an address that Replicate can read instead of the file."),
    409: ("reports a conflict", "Look at what exists on replicate.com, then run this again."),
    422: ("rejects the request", "Correct what it names."),
}


class RefusedError(CogpressError):
    """Replicate answered with an error: `status`, and whether it is the input that the model refuses."""

    def __init__(self, status: int, text: str, title: str = "") -> None:
        """Keep what callers decide by."""
        super().__init__(text)
        self.status = status
        self.input = status == 422 and "input" in title.lower()  # an unknown version is a 422 too


def explained(answer: Reply, what: str) -> tuple[str, str]:
    """What a refusal of a request means, and what to do."""
    detail = " ".join(answer.detail.split()).rstrip(".")
    reason, fix = _REFUSALS.get(answer.status, (f"answers {answer.status}", "Read what it says and run this again."))
    return f"Replicate {reason} (request for {what}){f': {detail}' if detail else ''}.", fix


def _content(call: Call, answer: Reply, token: str) -> Any:
    if 200 <= answer.status < 300:
        return answer.content
    raise RefusedError(answer.status, redacted(" ".join(explained(answer, call.what)), token), answer.title)


def _name(base: str) -> str:
    return f"Replicate's API at {source.shown(base)}"


class NoStreamError(CogpressError):
    """A prediction does not stream."""


def _stream_url(made: Mapping[str, Any], base: str) -> str:
    url = str((made.get("urls") or {}).get("stream") or "")
    if not source.allowed(url) or urlsplit(url).scheme != urlsplit(base).scheme:
        raise NoStreamError("Replicate gives no address for the stream. Add @cog.streaming to the runner's run().")
    return url


class _Rate:
    """Paces creations over all threads: unlimited until Replicate refuses one, then at an interval."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interval = self._next = 0.0

    def wait(self) -> None:
        """Sleep until it is this thread's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)

    def slow(self, seconds: float) -> None:
        """Slow down after a refusal, by the pause that Replicate asks for."""
        with self._lock:
            self._interval = max(self._interval, seconds)
            self._next = max(self._next, time.monotonic() + seconds)


class Replicate(http.Api):
    """Replicate, asked with a token."""

    def __init__(self, token: str, base: str = ADDRESS, *, tries: int = TRIES, longest: float = LONGEST_WAIT) -> None:
        """See `http.Api`; `base` is the API's address without `/v1`."""
        super().__init__(base, token, _name(base), tries=tries, longest=longest)
        self.token = token
        self._rate = _Rate()

    def answer(self, call: Call) -> Reply:
        """The answer to a request, good or refused; raises as `http.Api.send`.

        Creations keep to the rate that the account gets, all threads together: after a 429 they come one by one.
        """
        if not call.paced:
            return self.send(call.method, call.route, call.body, idempotent=call.idempotent, **call.more)
        for _ in range(RATE_TRIES):
            self._rate.wait()
            reply = self.send(call.method, call.route, call.body, idempotent=call.idempotent, paced=True, **call.more)
            if reply.status != 429:
                return reply
            self._rate.slow(RATE_SECONDS if reply.wait is None else min(reply.wait, LONGEST_WAIT))
        raise http.UnavailableError(
            f"{self.name} refuses {call.what} because of its rate limit, {RATE_TRIES} times in a row. Without credit "
            "or a payment method an account may make 6 a minute: see replicate.com/account/billing, or wait.",
            429,
            begun=False,
        )

    def ask(self, call: Call) -> Any:
        """The content of a good answer.

        Raises:
            RefusedError: any other answer, explained.
            UnavailableError: Replicate cannot be reached, or stays busy.
        """
        return _content(call, self.answer(call), self.token)

    def find(self, call: Call) -> dict[str, Any] | None:
        """The content of a good answer; None where there is no such thing."""
        try:
            return dict(self.ask(call))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def make_model(self, name: str, visibility: str, sku: str) -> None:
        """Create a model.

        Raises:
            CogpressError: Replicate refuses, or the name is taken by a model that is not there.
        """
        try:
            self.ask(routes.create_model(name, visibility, sku))
        except RefusedError as error:
            # The first try may have made it though its answer was lost.
            if error.status != 409:
                raise
            if self.find(routes.model(name)) is None:
                raise CogpressError(
                    f"Replicate has no model {name} that this token can see, but its name is taken: that of a deleted "
                    "model stays so. Choose another name."
                ) from None

    def wait(self, made: dict[str, Any], seconds: float, until: tuple[str, ...] = ENDED) -> dict[str, Any]:
        """A prediction when its status is one of `until`, or as it is when time is up."""
        began = time.monotonic()
        while made.get("status") not in (*until, *ENDED) and time.monotonic() - began < seconds:
            time.sleep(min(POLL_SECONDS, 0.05 + (time.monotonic() - began) / 4))
            made = dict(self.ask(routes.prediction(made["id"])))
        return made

    def stream(self, made: dict[str, Any], seconds: float) -> Iterator[tuple[str, str]]:
        """Name and text of each event of a prediction's stream, up to `done`.

        Args:
            made: the prediction.
            seconds: the longest silence.

        Raises:
            CogpressError: there is no stream, or it breaks off.
        """
        url = _stream_url(made, self.base)
        try:
            # Without the token: the address itself is the key, and it may be another server's.
            with (
                http.connect(url, timeout=httpx.Timeout(10.0, read=seconds)) as opened,
                opened.stream("GET", url, headers=http.EVENT_STREAM) as response,
            ):
                if response.status_code != 200:
                    raise NoStreamError(f"The stream answers {response.status_code} instead of text.")
                for event in http.events(response):
                    yield event.event, event.data
                    if event.event == "done":
                        return
        except httpx.HTTPError as error:
            raise CogpressError(f"The stream broke off ({http.reason(error)}).") from None
        raise CogpressError("The stream ended without its last event.")

    def upload(self, path: Path) -> str:
        """Upload a file; the address at which Replicate's own models read it.

        Raises:
            CogpressError: the file cannot be read, or Replicate refuses.
        """
        try:
            if path.stat().st_size > UPLOAD_BYTES:
                raise CogpressError(
                    f"{path} has {path.stat().st_size / 1e6:,.0f} MB, and Replicate takes files of up to "
                    f"{UPLOAD_BYTES / 1e6:.0f}. Write it as Parquet, which is smaller, or leave examples out."
                )
            content = path.read_bytes()  # whole, as a second try needs it again
        except OSError as error:
            raise CogpressError(f"Could not read {path}: {error.strerror}. Name a file.") from None
        return str(self.ask(routes.upload(path.name, content))["urls"]["get"])


class AsyncReplicate(http.AsyncApi):
    """As `Replicate`, for an event loop."""

    def __init__(
        self, token: str, base: str = ADDRESS, *, tries: int, longest: float = LONGEST_WAIT, timeout: httpx.Timeout
    ) -> None:
        """See `http.AsyncApi`; `timeout` is of each try, and of the silence in a stream."""
        super().__init__(base, token, _name(base), tries=tries, longest=longest, timeout=timeout)
        self.token = token
        # Without the token: a stream's address itself is the key, and it may be another server's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._streams = http.connect_async(self.base, timeout=timeout, limits=limits)

    async def close(self) -> None:
        """Close its connections."""
        await super().close()
        await self._streams.aclose()

    async def ask(self, call: Call) -> Any:
        """See `Replicate.ask`."""
        answer = await self.send(call.method, call.route, call.body, idempotent=call.idempotent, **call.more)
        return _content(call, answer, self.token)

    async def stream(self, made: dict[str, Any]) -> AsyncGenerator[tuple[str, str], None]:
        """See `Replicate.stream`; a stream that breaks off raises `httpx.HTTPError`."""
        async with self._streams.stream("GET", _stream_url(made, self.base), headers=http.EVENT_STREAM) as response:
            if response.status_code != 200:
                raise NoStreamError(f"The stream answers {response.status_code} instead of text.")
            async for event in http.events_async(response):
                yield event.event, event.data
                if event.event == "done":
                    return  # the server may keep the stream open


def credentials(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The token and the API's address, from REPLICATE_API_TOKEN and REPLICATE_BASE_URL.

    Raises:
        CogpressError: there is no token, or the address is not safe to send it to.
    """
    token = environ.get("REPLICATE_API_TOKEN", "").strip()
    if not token:
        raise CogpressError(
            "REPLICATE_API_TOKEN is not set. Set it to a token from replicate.com/account/api-tokens, in no file here."
        )
    return token, address(environ)


def address(environ: Mapping[str, str] = os.environ) -> str:
    """The API's address, from REPLICATE_BASE_URL.

    Raises:
        CogpressError: it is not safe to send a token to.
    """
    base = (environ.get("REPLICATE_BASE_URL") or ADDRESS).rstrip("/")
    if not source.allowed(base):
        raise CogpressError(f"{source.shown(base)} (REPLICATE_BASE_URL) is neither https nor this machine. Correct it.")
    return base


def connect() -> Replicate:
    """Replicate as the environment names it; raises as `credentials`."""
    return Replicate(*credentials())


def code_of(made: Mapping[str, Any]) -> str:
    """What Replicate's own error code in a prediction's error or log means; empty without one."""
    told = f"{made.get('error') or ''}\n{made.get('logs') or ''}"
    return next((f"{code}, {meaning}" for code, meaning in CODES.items() if re.search(rf"\b{code}\b", told)), "")


def text_of(output: Any) -> str:
    """An output as one text: the chunks of a stream joined, anything but text as JSON."""
    if isinstance(output, list) and all(isinstance(one, str) for one in output):
        return "".join(output)
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
