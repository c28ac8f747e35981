"""The three facts that `cogpress/cog/streaming.py` works around, against the real runtime, and that it does.

When a new Cog makes one of the first tests fail, that part of the workaround can go.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from cogpress.cog import client, streaming
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from tests import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

RUNNER = """
import asyncio, sys
sys.path.insert(0, {root!r})
import cog
from cog import BaseRunner, ConcatenateIterator, Input
from cogpress.cog import streaming
from cogpress.errors import CogpressError

class Runner(BaseRunner):
    def setup(self) -> None:
        if {install}:
            streaming.install()

    async def chunks(self, count):
        if count == 999:
            raise CogpressError("Said while it runs.")
        try:
            for number in range(count):
                await asyncio.sleep(0.1)
                yield f"{{number}} "
        finally:
            open("ended", "a").write(f"{{number}}\\n")

    @cog.streaming
    @cog.concurrent(max=8)
    async def run(self, count: int = Input(default=5, ge=1, le=1000)) -> ConcatenateIterator[str]:
        if count == 1000:
            raise CogpressError("Said before it runs.")
        {body}
"""

PLAIN = "async for chunk in self.chunks(count):\n            yield chunk"
OURS = "return streaming.stream(self.chunks(count))"


def project(folder: Path, body: str, *, install: bool = True) -> Path:
    # As in the kit's own: with two threads the runtime answers 409 beside free slots.
    (folder / "cog.yaml").write_text(
        'build:\n  python_version: "3.12"\nenvironment: ["TOKIO_WORKER_THREADS=1"]\nrun: "predict.py:Runner"\n'
    )
    (folder / "predict.py").write_text(RUNNER.format(root=str(ROOT), body=body, install=install))
    return folder


def serve(folder: Path) -> Iterator[Server]:
    with Server(folder, log=folder / "server.log") as server:
        server.wait_ready(120)
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(project(tmp_path_factory.mktemp("plain"), PLAIN))


@pytest.fixture(scope="module")
def uninstalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(project(tmp_path_factory.mktemp("uninstalled"), OURS, install=False))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(project(tmp_path_factory.mktemp("ours"), OURS))


@pytest.fixture
def ours(installed: Server) -> Server:
    """The server once a slot is free: that is a little after an answer's end."""
    assert wait_until(lambda: (client.health(installed.url) or {}).get("status") == "READY")
    return installed


def arrivals(server: Server, count: int) -> list[float]:
    started = time.monotonic()
    return [
        time.monotonic() - started for event in client.stream(server.url, {"count": count}) if event.kind == "output"
    ]


def ended(server: Server, seconds: float) -> bool:
    """Whether a prediction's source is closed within so many seconds."""
    return wait_until((server.root / "ended").exists, seconds)


def canceled(server: Server, seconds: float = 15.0) -> bool:
    """Cancel a prediction of 20 s after its second chunk; whether its source ended within so many seconds."""
    (server.root / "ended").unlink(missing_ok=True)
    seen = 0
    status = ""
    for event in client.stream(server.url, {"count": 200}, identifier=f"cancel{time.monotonic_ns()}"):
        if event.kind == "start":
            identifier = event.data["id"]
        seen += event.kind == "output"
        if event.kind == "output" and seen == 2:
            assert not ended(server, 0.01), "the chunks came as they were made"
            assert client.cancel(server.url, identifier)
            return ended(server, seconds)
        status = event.data.get("status", status)
    raise AssertionError(f"ended before it was canceled: {status}")


def test_cog_does_not_stream_async_generators(plain: Server) -> None:
    times = arrivals(plain, 10)
    assert min(times) > 0.8  # nothing arrives before all is done: the reason for `stream`


def test_cog_does_not_cancel_a_returned_generator(uninstalled: Server) -> None:
    assert not canceled(uninstalled, 1)  # the reason for `install`


def test_predictions_run_at_once(ours: Server) -> None:
    """Each waits, with its first chunk, for all others to have theirs; one after the other they would take minutes."""
    all_run = threading.Barrier(8)
    deadline = time.monotonic() + 60

    def one(_: int) -> bool:
        try:
            with closing(client.stream(ours.url, {"count": 900})) as events:  # type: ignore[type-var]
                begun = any(event.kind == "output" for event in events)
                all_run.wait(60)
                return begun
        except CogpressError:  # a slot is freed a little after its answer
            assert time.monotonic() < deadline
            time.sleep(0.05)
            return one(_)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [True] * 8


def test_chunks_arrive_as_they_are_made_and_cancel_reaches_the_source(ours: Server) -> None:
    assert canceled(ours)


def test_a_dropped_connection_reaches_the_source(ours: Server) -> None:
    (ours.root / "ended").unlink(missing_ok=True)
    events = client.stream(ours.url, {"count": 200})
    for event in events:
        if event.kind == "output":
            break
    events.close()  # type: ignore[attr-defined]
    assert ended(ours, 15)


@pytest.mark.parametrize(
    ("count", "around", "sentence"),
    [
        (1000, "Prediction failed: Async prediction failed: reason: ", "Said before it runs."),
        (999, "Prediction failed: Generator iteration error: reason: ", "Said while it runs."),
    ],
)
def test_an_error_has_no_class_name(ours: Server, count: int, around: str, sentence: str) -> None:
    """In the container's own answer; clients of this project leave out the runtime's words too."""
    answer = httpx.post(f"{ours.url}/predictions", json={"input": {"count": count}}, trust_env=False, timeout=60)
    assert answer.json()["error"] == around + sentence
    with pytest.raises(CogpressError, match=f"^{sentence}$"):
        list(client.stream(ours.url, {"count": count}))


def test_slots_come_back(ours: Server) -> None:
    """Every slot at once, after a cancel and a dropped connection."""
    test_predictions_run_at_once(ours)


def test_a_stream_canceled_before_its_first_step_ends() -> None:
    """Otherwise its thread, and with it a slot of the runtime, would wait forever."""

    async def chunks() -> AsyncIterator[str]:
        yield "never"

    async def run() -> Iterator[str]:
        stream = streaming.stream(chunks())
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return stream

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.to_thread(list, await run()), 60)

    asyncio.run(main())


def test_what_the_source_raises_is_raised() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("broken")

    async def main() -> list[str]:
        found: list[str] = []

        def drain(stream: Iterator[str]) -> None:
            with pytest.raises(ValueError, match="broken"):
                found.extend(stream)

        await asyncio.to_thread(drain, streaming.stream(chunks()))
        return found

    asyncio.run(main())


def test_another_coglet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.metadata, "version", lambda _name: "0.24.0")
    with pytest.raises(CogpressError, match=r"coglet 0\.24\.0 is installed, .* coglet 0\.23\.1\..*coglet==0\.23\.1"):
        streaming.install()
