"""One request to a Cog server whose answer streams: from bytes to a prediction's events, with as little as possible.

Runs once for every token of every stream, on cores that the model wants too: the HTTP framing is undone in C
(httptools), one pass finds the events, and what they hold goes straight to the prediction, without a task, a queue or a
copy between; `scripts/bench playground` measures it. Leaves connections, retries and what an answer means to `backend`.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httptools

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

_OUTPUT = b"event: output\ndata: "


class Exchange(asyncio.Protocol):
    """A request on a connection of its own; `done` is set when the answer is whole or the connection breaks."""

    def __init__(self, request: bytes, prediction: Prediction) -> None:
        self.status = 0
        self.body = b""
        """An answer that is no stream, when it is whole."""
        self.completed: dict[str, Any] | None = None
        """The last event of a stream that ended as it should."""
        self.broken = False
        """Whether the connection ended before the answer did."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._prediction = prediction
        self._parser = httptools.HttpResponseParser(self)
        self._streams = False
        self._rest = b""  # what came last and is not an event yet
        self._blocks: list[bytes] = []
        self._whole = True
        self._transport: asyncio.BaseTransport | None = None
        self._next = 0

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, ValueError, KeyError, TypeError):
            # A server that is not Cog's, or a wire that is not a wire.
            self._finish(broken=True)

    def connection_lost(self, _error: Exception | None) -> None:
        self._finish(broken=True)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._streams = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._streams = self._streams and self.status == 200

    def on_body(self, body: bytes) -> None:
        if not self._streams:
            self._blocks.append(body)  # joined once, at the end: it may be a file of many megabytes
            return
        if self._rest:
            body = self._rest + body
        *events, self._rest = body.split(b"\n\n")
        for event in events:
            self._event(event)

    def on_message_complete(self) -> None:
        self.body = b"".join(self._blocks)
        self._finish(broken=self._streams and self.completed is None)

    # What an event says.

    def _event(self, event: bytes) -> None:
        prediction = self._prediction
        if event.startswith(_OUTPUT):
            data = json.loads(event[len(_OUTPUT) :].decode())
            # After a gap nothing more is added; the last event has the whole output.
            self._whole = self._whole and data["index"] == self._next
            if self._whole:
                self._next += 1
                prediction.add_output(data["chunk"])
            return
        name, data = _parse(event)
        if name == "start":
            prediction.start()
        elif name == "log":
            prediction.add_log(str(data.get("data", "")))
        elif name == "metric":
            if data.get("mode", "replace") == "replace":
                prediction.metrics[str(data["name"])] = data["value"]
        elif name == "completed":
            whole = data.get("output")
            if isinstance(whole, list):
                for chunk in whole[self._next :]:
                    prediction.add_output(chunk)
            self.completed = data
            self._finish(broken=False)

    def _finish(self, *, broken: bool) -> None:
        if not self.done.done():
            self.broken = broken
            self.done.set_result(None)

    def close(self) -> None:
        """Drop the connection, which also cancels what still runs at its other end."""
        if self._transport is not None:
            self._transport.abort()  # type: ignore[attr-defined]


def _parse(event: bytes) -> tuple[str, dict[str, Any]]:
    name, data = "", []
    for line in event.split(b"\n"):
        if line.startswith(b"event:"):
            name = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return name, json.loads(b"\n".join(data)) if data else {}


def request(url: str, route: str, body: dict[str, Any], *, streams: bool) -> bytes:
    """The bytes of a request that creates a prediction."""
    content = json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode()
    parts = urlsplit(url)
    accept = "text/event-stream" if streams else "application/json"
    head = (
        f"PUT {parts.path.rstrip('/')}{route} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
