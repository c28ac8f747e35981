"""One request to a Cog server whose answer streams: from bytes to a prediction's events.

It runs for every token of every stream on cores that the model needs, so it does without httpx: httptools parses HTTP
in C, and what an event holds goes straight to the prediction, without a task or a queue. `scripts/bench playground`
measures it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import httptools

from cogpress.http import EventDecoder
from cogpress.playground.records import Prediction


class Exchange(asyncio.Protocol):
    """A request on its own connection; `done` is set when the response is complete or the connection breaks."""

    def __init__(self, request: bytes, prediction: Prediction) -> None:
        self.status = 0
        self.body = b""
        """The complete response, if it is not a stream."""
        self.completed: dict[str, Any] | None = None
        """The last event of a complete stream."""
        self.broken = False
        """Whether the connection ended before the response did."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._prediction = prediction
        self._parser = httptools.HttpResponseParser(self)
        self._streams = False
        self._decoder = EventDecoder()
        self._blocks: list[bytes] = []
        self._whole = True
        self._transport: asyncio.BaseTransport | None = None
        self._next = 0

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, ValueError, KeyError, TypeError):
            # Not a Cog server, or a corrupt connection.
            self._finish(broken=True)

    def connection_lost(self, _error: Exception | None) -> None:
        self._finish(broken=True)

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._streams = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._streams = self._streams and self.status == 200

    def on_body(self, body: bytes) -> None:
        if not self._streams:
            self._blocks.append(body)  # joined once at the end: it may be a file of many megabytes
            return
        for event in self._decoder.feed(body):
            if event.data:
                self._event(event.event, json.loads(event.data))

    def on_message_complete(self) -> None:
        self.body = b"".join(self._blocks)
        self._finish(broken=self._streams and self.completed is None)

    def _event(self, name: str, data: dict[str, Any]) -> None:
        prediction = self._prediction
        if name == "output":
            # After a gap nothing is added; the last event has the whole output.
            self._whole = self._whole and data["index"] == self._next
            if self._whole:
                self._next += 1
                prediction.add_output(data["chunk"])
        elif name == "start":
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
        """Drop the connection, which cancels the prediction if it still runs."""
        if self._transport is not None:
            self._transport.abort()  # type: ignore[attr-defined]


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
