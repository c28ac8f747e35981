"""Small servers for the benchmarks' tests: they answer with known delays, and keep what was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import clients, load

TOKEN = "r8_not-a-real-token"

Reply = tuple[int, str, AsyncIterator[bytes]]
"""Status, content type, and the body in pieces."""


class Request:
    """What a stand-in was asked."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers = method, path, headers
        self.body: dict[str, Any] = json.loads(body) if body else {}


class StandIn:
    """A small HTTP server on an event loop of its own, which counts what happens."""

    def __init__(self, answer: Callable[[Request], Awaitable[Reply]]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = self.running = self.most = 0
        self.url = ""
        self.loop: asyncio.AbstractEventLoop

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (line := await reader.readline()) != b"\r\n":
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(method, path, headers, body)
                self.requests.append(request)
                self.running += 1
                self.most = max(self.most, self.running)
                status, kind, pieces = await self.answer(request)
                writer.write(
                    f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
                )
                async for piece in pieces:
                    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    await writer.drain()
                self.running -= 1
                writer.write(b"0\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextmanager
def standing_in(answer: Callable[[Request], Awaitable[Reply]]) -> Iterator[StandIn]:
    made = StandIn(answer)
    ready, ended = threading.Event(), asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(made.connected, "127.0.0.1", 0)
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        made.loop = asyncio.get_running_loop()
        ready.set()
        await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield made
    made.loop.call_soon_threadsafe(ended.set)
    thread.join(5)


async def body(*pieces: bytes | float) -> AsyncIterator[bytes]:
    """Pieces of a body, with seconds to wait between them."""
    for piece in pieces:
        if isinstance(piece, float):
            await asyncio.sleep(piece)
        else:
            yield piece


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def chunk(text: str) -> bytes:
    return event("output", {"chunk": text, "index": 0})


def completed(tokens: int = 8, **more: Any) -> bytes:
    metrics = {"input_token_count": 100, "output_token_count": tokens}
    return event("completed", {"status": "succeeded", "metrics": metrics, **more})


def cog_answer(*gaps: float) -> Callable[[Request], Awaitable[Reply]]:
    """Answers as Cog's runtime does, waiting before each chunk."""

    async def answer(_request: Request) -> Reply:
        pieces: list[bytes | float] = [event("start", {"id": "p"})]
        for gap in gaps:
            pieces += [gap, chunk("word ")]
        return 200, "text/event-stream", body(*pieces, completed())

    return answer


def ask_all(
    url: str, side: Callable[[Any], load.Ask], questions: list[clients.Question], streams: int
) -> load.LoadResult:
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        http = clients.connect(url, runner, stack)
        return runner.run(load.closed_loop(side(http), questions, streams))


def cog_questions(count: int) -> list[clients.Question]:
    return [clients.Question({"question": f"which {at}?", "columns": ["a"]}) for at in range(count)]


class FakeReplicate:
    """The routes that a stream takes; a model that is not Replicate's own runs by version alone."""

    def __init__(self, *, official: bool = True) -> None:
        self.official = official
        self.url = ""
        self.fault: tuple[int, str] | None = None

    async def answer(self, request: Request) -> Reply:
        status, made = 200, {}
        if request.path == "/v1/models/me/mine":
            made = {"owner": "me", "name": "mine", "latest_version": {"id": "5c7d"}}
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                status, made = 401, {"detail": "no"}
        elif request.path.endswith("/predictions") and self.fault:
            status, text = self.fault
            made = {"detail": text}
        elif request.path == "/v1/predictions" or (request.path == "/v1/models/me/mine/predictions" and self.official):
            status, made = 201, {"id": "p1", "urls": {"stream": f"{self.url}/streams/key"}}
        elif request.path == "/streams/key":
            pieces = b"event: output\r\nid: 1\r\ndata: SELECT\r\n\r\nevent: output\nid: 2\ndata: \ndata: \n\n"
            pieces += b"event: output\nid: 3\ndata: \n\n"
            return 200, "text/event-stream", body(0.05, pieces, b"event: done\nid: 4\ndata: {}\n\n", 60.0)
        elif request.path == "/v1/predictions/p1":
            made = {"status": "succeeded", "metrics": {"input_token_count": 11, "output_token_count": 22}}
        else:
            status, made = 404, {"detail": "Not found."}
        return status, "application/json", body(json.dumps(made).encode())
