"""Serve a prediction's events as server-sent events to any number of readers, each from any position.

A reader holds no events, only its position in the prediction's list, so a slow one costs a socket buffer and slows
nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

from starlette.types import Receive, Scope, Send

from cogpress.playground import events
from cogpress.playground.access import error, problem
from cogpress.playground.keys import Keys
from cogpress.playground.predictions import Predictions
from cogpress.playground.records import Prediction

_PART = 64 << 10
"""Bytes written to a connection at once; it takes more once it has sent most of them."""

HEARTBEAT_SECONDS = 15.0
"""The longest silence: proxies drop idle connections, and writing shows whether the reader is gone."""

_HEARTBEAT = b": still running\n\n"
"""A comment, which clients ignore."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]

_PYTHON_BREAKS = re.compile(rb"\x0b|\x0c|\x1c|\x1d|\x1e|\xc2\x85|\xe2\x80[\xa8\xa9]")
"""Characters at which Replicate's Python client splits lines, against the format, and drops what follows."""


def path(keys: Keys, identifier: str) -> str:
    """The path of a prediction's stream, with the key that stands in for a token."""
    return f"/v1/stream/{identifier}/{keys.make('stream', identifier)}"


class Streams:
    """The ASGI endpoint behind `urls.stream`."""

    def __init__(self, predictions: Predictions, keys: Keys) -> None:
        """Streams any of `predictions`."""
        self._predictions, self._keys = predictions, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one reader."""
        identifier, _, key = scope["path"].removeprefix("/v1/stream/").partition("/")
        if scope["method"] != "GET" or not self._keys.match("stream", identifier, key):
            await problem(error(404, "Not found", "There is no such stream."))(scope, receive, send)
            return
        headers = dict(scope["headers"])
        place = headers.get(b"last-event-id", b"").decode("latin-1")
        python = headers.get(b"user-agent", b"").startswith(b"replicate-python")
        prediction = self._predictions.find(identifier)
        if prediction is None:
            await self._ended(identifier, place, scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        reader = _Reader(prediction, place, python=python)
        left = asyncio.get_running_loop().create_task(reader.watch(receive))
        try:
            await reader.send(send)
        finally:
            left.cancel()
            reader.close()

    async def _ended(self, identifier: str, place: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Replay a prediction whose events are no longer in memory from its stored output."""
        record = await self._predictions.record(identifier)
        if record is None:
            await problem(error(404, "Not found", "This prediction was deleted."))(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        seen = place.partition(":")[2]
        frames = events.replay(record, int(seen[:9]) if seen.isdecimal() else 0)
        for begin in range(0, len(frames), 256):
            body = b"".join(frames[begin : begin + 256])
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _Reader:
    """One reader of one prediction."""

    def __init__(self, prediction: Prediction, place: str, *, python: bool) -> None:
        number = place.partition(":")[0]
        self._prediction = prediction
        self._seen = min(int(number[:9]), len(prediction.frames)) if number.isdecimal() else 0
        self._python = python
        self._gone = False
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._silent = False
        # One timer a reader rather than one a token: sending a token only notes the time.
        self._timer = self._loop.call_later(HEARTBEAT_SECONDS, self._check)

    def _check(self) -> None:
        """Ask for a heartbeat after a silence, and check again when the next one can be due."""
        wait = self._sent_at + HEARTBEAT_SECONDS - self._loop.time()
        if wait <= 0:
            self._silent, wait = True, HEARTBEAT_SECONDS
            self._prediction.nudge()
        self._timer = self._loop.call_later(wait, self._check)

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    async def watch(self, receive: Receive) -> None:
        """Notice when the reader disconnects."""
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            self._prediction.nudge()

    async def send(self, send: Send) -> None:
        """Send past and future events, to the end."""
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
    """Join frames up to `_PART` bytes; returns them and the position after them."""
    if len(frames) == begin + 1:
        return frames[begin], begin + 1
    end, size = begin, 0
    while end < len(frames) and size < _PART:
        size += len(frames[end])
        end += 1
    return b"".join(frames[begin:end]), end
