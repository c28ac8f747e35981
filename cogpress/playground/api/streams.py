"""A prediction's events as Replicate's stream, to any number of readers, from any place on.

Knows the wire and that readers can be slow or gone; leaves what the events are to `predictions`. A reader holds no
events of its own, only a place in the prediction's list, so one that does not read costs nothing but its socket's
buffer and slows nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from cogpress.playground.access import answer, error
from cogpress.playground.predictions import Prediction, frames_of

if TYPE_CHECKING:
    from cogpress.playground.predictions import Predictions

_PART = 64 << 10
"""Bytes that are given to a connection at once; it takes more only when it has sent most of them."""

HEARTBEAT_SECONDS = 15.0
"""A stream is silent no longer than this: proxies drop connections on which nothing comes, and a gone reader shows."""

_HEARTBEAT = b": still running\n\n"
"""A comment, which every client passes over."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]

_PYTHON_BREAKS = re.compile(rb"\x0b|\x0c|\x1c|\x1d|\x1e|\xc2\x85|\xe2\x80[\xa8\xa9]")
"""Characters at which the Python client ends a line, and drops what follows, though the format does not say so."""


class Streams:
    """The endpoint behind `urls.stream`."""

    def __init__(self, predictions: Predictions, secret: bytes) -> None:
        """Made with what keys are made of."""
        self._predictions, self._secret = predictions, secret

    def path(self, identifier: str) -> str:
        """A prediction's address, which carries a key that nobody can guess."""
        return f"/v1/stream/{identifier}/{self.key(identifier)}"

    def key(self, identifier: str) -> str:
        """What must be known to read a prediction's events without a token."""
        return hmac.new(self._secret, f"stream:{identifier}".encode(), hashlib.sha256).hexdigest()[:40]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a reader."""
        identifier, _, key = scope["path"].removeprefix("/v1/stream/").partition("/")
        if scope["method"] != "GET" or not hmac.compare_digest(key.encode(), self.key(identifier).encode()):
            await answer(send, error(404, "Not found", "There is no such stream."), {})
            return
        headers = dict(scope["headers"])
        place = headers.get(b"last-event-id", b"").decode("latin-1")
        python = headers.get(b"user-agent", b"").startswith(b"replicate-python")
        prediction = self._predictions.find(identifier)
        if prediction is None:
            await self._ended(identifier, place, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        reader = _Reader(prediction, place, python=python)
        left = asyncio.get_running_loop().create_task(reader.watch(receive))
        try:
            await reader.send(send)
        finally:
            left.cancel()
            reader.close()

    async def _ended(self, identifier: str, place: str, send: Send) -> None:
        """The stream of a prediction whose events are gone: its output, made into events again."""
        record = await self._predictions.record(identifier)
        if record is None:
            await answer(send, error(404, "Not found", "This prediction was deleted."), {})
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        seen = place.partition(":")[2]
        frames = frames_of(record, int(seen) if seen.isdecimal() else 0)
        for begin in range(0, len(frames), 256):
            body = b"".join(frames[begin : begin + 256])
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _Reader:
    """One reader of one prediction."""

    def __init__(self, prediction: Prediction, place: str, *, python: bool) -> None:
        number = place.partition(":")[0]
        self._prediction = prediction
        self._seen = min(int(number), len(prediction.frames)) if number.isdecimal() else 0
        self._python = python
        self._gone = False
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._silent = False
        # One timer for each reader and none for each token: a token only notes when it was sent.
        self._timer = self._loop.call_later(HEARTBEAT_SECONDS, self._look)

    def _look(self) -> None:
        """Have a heartbeat sent where nothing was for too long, and look again when that can be."""
        wait = self._sent_at + HEARTBEAT_SECONDS - self._loop.time()
        if wait <= 0:
            self._silent, wait = True, HEARTBEAT_SECONDS
            self._prediction.nudge()
        self._timer = self._loop.call_later(wait, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    async def watch(self, receive: Receive) -> None:
        """Notice that the reader has gone."""
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            self._prediction.nudge()

    async def send(self, send: Send) -> None:
        """Send what there is and what comes, to the end."""
        prediction, frames = self._prediction, self._prediction.frames
        while not self._gone:
            if len(frames) > self._seen:
                body, self._seen = _part(frames, self._seen)
                if self._python:
                    body = _PYTHON_BREAKS.sub(b"\ndata: ", body)
                self._sent_at = self._loop.time()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            elif prediction.ended:
                break
            elif self._silent:
                self._silent, self._sent_at = False, self._loop.time()
                await send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})
            else:
                await prediction.changed(self._seen)
        if not self._gone:
            await send({"type": "http.response.body", "body": b""})


def _part(frames: list[bytes], begin: int) -> tuple[bytes, int]:
    """Several frames as one, at most so many bytes, and the place after them."""
    if len(frames) == begin + 1:
        return frames[begin], begin + 1
    end, size = begin, 0
    while end < len(frames) and size < _PART:
        size += len(frames[end])
        end += 1
    return b"".join(frames[begin:end]), end
