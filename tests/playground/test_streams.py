"""Comments keep a silent stream open, and no client takes them for events."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cogpress.playground import events
from cogpress.playground.api import streams
from cogpress.playground.keys import Keys
from cogpress.playground.records import Prediction, Version

pytestmark = pytest.mark.slow

VERSION = Version("1" * 64, "local/x", 0.0, {}, "http://nowhere")


class Alive:
    """One prediction, as `Streams` finds it."""

    def __init__(self) -> None:
        self.prediction = Prediction("x", VERSION, {}, {})

    def find(self, _identifier: str) -> Prediction:
        return self.prediction


class Impatient(asyncio.SelectorEventLoop):
    """Its time passes only where all wait, and then at once: a busy machine delays nothing in it."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def read(act: Any) -> bytes:
    """What a reader gets while `act` happens to the prediction; it may look at what has come."""

    async def main() -> bytes:
        alive, keys = Alive(), Keys(b"secret")
        made = streams.Streams(alive, keys)  # type: ignore[arg-type]
        body = bytearray()

        async def send(message: Any) -> None:
            body.extend(message.get("body", b""))

        scope = {"type": "http", "method": "GET", "path": streams.path(keys, "x"), "headers": []}
        reading = asyncio.create_task(made(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
        await act(alive.prediction, body)
        await asyncio.wait_for(reading, 1000)
        return bytes(body)

    with asyncio.Runner(loop_factory=Impatient) as runner:
        return runner.run(main())


def test_a_silent_stream_is_kept_open() -> None:
    async def comments(body: bytearray, count: int) -> None:
        while body.count(b": still running\n\n") < count:
            await asyncio.sleep(1)

    async def act(prediction: Prediction, body: bytearray) -> None:
        await comments(body, 2)
        prediction.start()
        prediction.add_output("a")
        await comments(body, 4)
        prediction.end("succeeded")

    body = read(act)
    assert body.endswith(b"event: done\nid: 2:1\ndata: {}\n\n")
    decoder = pytest.importorskip("replicate.stream", reason="requirements/dev.in lists Replicate's client")
    decode = decoder.EventSource.Decoder().decode
    found = [event for line in body.decode().split("\n") if (event := decode(line))]
    assert [(one.event.value, one.data) for one in found] == [("output", "a"), ("done", "{}")]


def test_a_stream_that_says_something_gets_no_comments() -> None:
    async def act(prediction: Prediction, _body: bytearray) -> None:
        for _ in range(5):
            await asyncio.sleep(0.9 * streams.HEARTBEAT_SECONDS)
            prediction.add_output("a")
        prediction.end("succeeded")

    assert b"still running" not in read(act)


def test_a_line_end_between_two_chunks_is_one() -> None:
    prediction = Prediction("x", Version("1" * 64, "local/x", 0.0, {}, "http://nowhere"), {}, {})
    prediction.start()
    chunks = ["a\r", "\nb", "\n", "c\r\n", "\r", "\n"]
    for chunk in chunks:
        prediction.add_output(chunk)
    prediction.end("succeeded")
    assert prediction.output == chunks
    replayed = events.replay(prediction.record() | {"output": chunks, "error": None, "status": "succeeded"})
    for frames in (prediction.frames, replayed):
        data = [
            "\n".join(line.removeprefix("data: ") for line in frame.decode().splitlines() if line.startswith("data: "))
            for frame in frames
            if frame.startswith(b"event: output")
        ]
        assert "".join(data) == "a\nb\nc\n\n"
