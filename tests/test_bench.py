"""The serving benchmark against stand-ins with known delays: what it measures, what it asks, what it judges."""

from __future__ import annotations

import asyncio
import io
import json
import runpy
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import environment, plots, serving
from cogpress.bench import asking, batch, load, serve, sides, speculative
from cogpress.bench.load import Usage
from cogpress.config import Prompt
from cogpress.errors import CogpressError
from examples import queries

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "r8_not-a-real-token"

Reply = tuple[int, str, AsyncIterator[bytes]]
"""Status, content type, and the body in pieces."""


class Request:
    """What a stand-in was asked."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers = method, path, headers
        self.body: dict[str, Any] = json.loads(body) if body else {}
        self.at = time.perf_counter()


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
    assert ready.wait(5)
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


def ask_all(url: str, side: Callable[[Any], load.Ask], questions: list[asking.Question], streams: int) -> load.Taken:
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        http = asking.connect(url, runner, stack)
        return runner.run(load.closed_loop(side(http), questions, streams))


def cog_questions(count: int) -> list[asking.Question]:
    return [asking.Question({"question": f"which {at}?", "columns": ["a"]}) for at in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Asking and counting
# ---------------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_known_delays() -> None:
    with standing_in(cog_answer(0.1, 0.05, 0.05, 0.05)) as server:
        taken = ask_all(server.url, lambda http: asking.cog(http, server.url), cog_questions(12), 4)
    found = load.summary(taken)
    assert server.most == 4, "no more and no fewer at once than there are streams"
    assert server.connections <= 4, "connections are used again"
    assert (found["requests"], found["lost"], found["tokens"]) == (12, 0, 96)
    assert found["prompt_tokens_mean"] == 100
    # A busy machine delays; nothing comes early.
    assert 0.098 <= found["ttft_p50"] < 0.16
    assert 0.045 <= found["itl_p50"] < 0.08
    assert found["ttft_p50"] <= found["ttft_p90"] <= found["ttft_p99"] < 0.4
    assert 0.24 <= found["latency_p50"] < 0.5
    assert 7 / 0.25 < found["stream_tokens_per_second"] <= 7 / 0.145
    assert found["tokens_per_second"] == pytest.approx(96 / taken.seconds)
    assert 3 * 0.25 <= taken.seconds < 1.5
    assert found["client_share"] < 1


def test_every_question_is_asked_once_whoever_is_free() -> None:
    with standing_in(cog_answer(0.01)) as server:
        ask_all(server.url, lambda http: asking.cog(http, server.url), cog_questions(9), 4)
    sent = [request.body["input"] for request in server.requests]
    assert sorted(json.loads(one["fields"])["question"] for one in sent) == [f"which {at}?" for at in range(9)]
    assert {(one["max_tokens"], one["temperature"]) for one in sent} == {(160, 0)}
    assert {request.headers["accept"] for request in server.requests} == {"text/event-stream"}


def test_what_is_lost_is_counted_and_told_apart() -> None:
    replies: dict[int, tuple[int, list[bytes]]] = {
        0: (200, [chunk("whole"), completed()]),
        1: (409, [b'{"error": "busy"}']),
        2: (500, [b"out of\nmemory"]),
        3: (200, [chunk("half")]),
        4: (200, [completed(0)]),
        5: (200, [chunk("x"), completed(status="failed", error="no room")]),
        6: (200, [chunk(""), completed(0)]),
        7: (200, [event("error", {"error": "events were dropped"})]),
    }

    async def answer(request: Request) -> Reply:
        at = int(json.loads(request.body["input"]["fields"])["question"].split()[1].rstrip("?"))
        status, pieces = replies[at]
        return status, "text/event-stream", body(*pieces)

    with standing_in(answer) as server:
        taken = ask_all(server.url, lambda http: asking.cog(http, server.url), cog_questions(8), 1)
    found = load.summary(taken)
    assert {key: found[key] for key in ("requests", "failed", "refused", "empty", "lost")} == {
        "requests": 8, "failed": 5, "refused": 1, "empty": 2, "lost": 7,
    }  # fmt: skip
    assert [answer.error for answer in taken.answers if answer.error] == [
        "The server answers 409: {\"error\": \"busy\"}",
        "The server answers 500: out of memory",
        "The answer broke off before its end.",
        "The prediction failed: no room",
        'The stream is not whole: {"error":"events were dropped"}',
    ]  # fmt: skip
    assert [(one["request"], one["cause"]) for one in load.lost(taken)] == [
        (2, "HTTP 409"), (3, "HTTP 500"), (4, "broken off"), (5, "no text"), (6, "prediction failed"), (7, "no text"),
        (8, "stream not whole"),
    ]  # fmt: skip
    assert load.lost(taken)[0]["error"] == taken.answers[1].error


@pytest.mark.parametrize("reply", [(503, b"full"), (200, b"event: output\ndata: cut")])
def test_nothing_is_asked_again(reply: tuple[int, bytes]) -> None:
    async def answer(_request: Request) -> Reply:
        return reply[0], "text/event-stream", body(reply[1])

    async def dropped(_request: Request) -> Reply:
        raise ConnectionError

    prompt = Prompt(template="{question} {columns}")
    for answers in (answer, dropped):
        with standing_in(answers) as server:
            for side in (
                lambda http: asking.cog(http, server.url),
                lambda http: asking.openai(http, server.url, "m", prompt),
                lambda http: asking.Replicate(http, server.url, "me/mine", TOKEN).ask,
            ):
                server.requests.clear()
                taken = ask_all(server.url, side, cog_questions(3), 1)
                assert all(one.error for one in taken.answers)
                assert len(server.requests) == 3


def test_a_load_of_which_nothing_is_answered_is_an_error() -> None:
    with pytest.raises(CogpressError, match=r"None of 2 requests was answered: The connection failed: "):
        load.summary(
            ask_all("http://127.0.0.1:9", lambda http: asking.cog(http, "http://127.0.0.1:9"), cog_questions(2), 2)
        )


def test_text_that_looks_like_an_empty_chunk_is_text() -> None:
    pieces = [chunk('"chunk":""'), chunk("\n"), chunk("\\"), completed()]

    async def answer(_request: Request) -> Reply:
        whole = b"".join(pieces)
        # Cut anywhere, also inside a line.
        return 200, "text/event-stream", body(*(whole[at : at + 7] for at in range(0, len(whole), 7)))

    with standing_in(answer) as server:
        taken = ask_all(server.url, lambda http: asking.cog(http, server.url), cog_questions(1), 1)
    assert len(taken.answers[0].texts) == 3


def test_an_openai_server_is_asked_for_the_same_and_its_chunks_are_read() -> None:
    def line(delta: Mapping[str, Any], **more: Any) -> bytes:
        made = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more}
        return f"data: {json.dumps(made, separators=(',', ':'))}\n\n".encode()

    usage = {"prompt_tokens": 90, "completion_tokens": 3, "total_tokens": 93}

    async def answer(request: Request) -> Reply:
        return 200, "text/event-stream", body(
            line({"role": "assistant", "content": ""}), 0.05, line({"content": "COUNT"}),
            line({"content": '"content":""'}),
            line({"content": ""}), b'data: {"id":"c","choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n",
            b"data: [DONE]\n\n",
        )  # fmt: skip

    prompt = Prompt(system="Write the query.", template="{question}\n{columns}")
    with standing_in(answer) as server:
        taken = ask_all(server.url, lambda http: asking.openai(http, server.url, "m", prompt), cog_questions(1), 1)
    [found] = taken.answers
    assert (found.error, len(found.texts), found.usage) == ("", 2, Usage(90, 3))
    assert found.texts[0] - found.started >= 0.048, "the first chunk has a role and no text"
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Write the query."}, {"role": "user", "content": "which 0?\na"}],
        "max_tokens": 160,
        "min_tokens": 0,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_arrivals_of_an_open_loop_are_kept_however_slow_answers_are() -> None:
    times = load.arrivals(20, 100.0, 3)
    with standing_in(cog_answer(0.5)) as server, ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        http = asking.connect(server.url, runner, stack)
        taken = runner.run(load.open_loop(asking.cog(http, server.url), cog_questions(20), times))
    began = server.requests[0].at - times[0]
    late = [request.at - began - due for request, due in zip(server.requests, times, strict=True)]
    assert max(map(abs, late)) < 0.1
    assert server.most == 20, "all are there before the first is answered"
    assert load.summary(taken)["ttft_p50"] >= 0.48
    assert [answer.started - taken.answers[0].started for answer in taken.answers] == pytest.approx(
        [at - times[0] for at in times]
    )


def test_in_an_open_loop_time_counts_from_the_arrival() -> None:
    """A client that is late must not hide a slow answer."""

    async def ask(_question: Any) -> AsyncIterator[Usage | load.Later | None]:
        time.sleep(0.05)  # blocks everybody who arrives meanwhile
        yield None
        yield Usage(1, 1)

    found = load.summary(asyncio.run(load.open_loop(ask, [1, 2, 3], [0.0, 0.0, 0.0])))
    assert found["ttft_p99"] > 0.14
    assert found["late_max"] > 0.09


def test_arrivals_are_seeded_and_as_many_a_second_as_asked() -> None:
    times = load.arrivals(4000, 8.0, 1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.05)
    assert load.arrivals(4000, 8.0, 1) == times != load.arrivals(4000, 8.0, 2)


def test_usage_that_comes_later_is_fetched_after_the_load() -> None:
    async def counted() -> Usage:
        return Usage(5, 7)

    async def refused() -> Usage:
        raise CogpressError("gone")

    async def ask(question: Any) -> AsyncIterator[Usage | load.Later | None]:
        yield None
        yield None
        yield question

    taken = asyncio.run(load.closed_loop(ask, [counted, refused], 1))
    assert [answer.tokens for answer in taken.answers] == [7, 2], "chunks count where the server does not tell"


def test_percentiles() -> None:
    assert load.percentile([], 0.5) == 0
    assert load.percentile([3.0], 0.99) == 3
    assert load.percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert load.percentile([float(one) for one in range(101)], 0.9) == pytest.approx(90)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


def examples(count: int) -> list[dict[str, Any]]:
    return [{"question": row["question"], "columns": row["columns"]} for row in queries.generate(count, "test", 1)]


def test_nothing_is_asked_twice_and_every_run_asks_the_same() -> None:
    loads = serve.planned(scale=2)
    asked = serve.questions_of(loads, 3, examples)
    assert asked == serve.questions_of(loads, 3, examples)
    assert [one.name for one in loads] == [
        "example-1", "example-4", "example-16", "example-32", "example-64", "long-1", "long-8", "open",
    ]  # fmt: skip
    for one in loads:
        assert [len(questions) for questions in asked[one.name]] == [one.requests] * 3
        assert all(len(questions) >= one.streams for questions in asked[one.name])
    every = [json.dumps(one.inputs) for rounds in asked.values() for questions in rounds for one in questions]
    assert len(set(every)) == len(every)


def test_a_long_prompt_begins_otherwise_each_time_and_forces_its_answers_length() -> None:
    one, other = serve.long_question("a"), serve.long_question("b")
    assert one == serve.long_question("a")
    assert one.text[:60] != other.text[:60]
    assert one.inputs == {"prompt": one.text, "max_tokens": 256, "temperature": 0, "min_tokens": 256}
    several = Prompt(system="S", template="{question} {columns}")
    assert one.messages(several)[-1]["content"] == one.text, (
        "as cogpress takes a prompt for a template of several fields"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("odd",)}, "There is no load with odd"),
        ({"streams": (0,)}, "There is no load with fewer than one stream"),
        ({"kinds": ("example",), "streams": ()}, "No load is left"),
    ],
)
def test_loads_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CogpressError, match=message):
        serve.planned(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Replicate
# ---------------------------------------------------------------------------------------------------------------------


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
            return 200, "text/event-stream", body(0.05, pieces, b"event: done\nid: 4\ndata: {}\n\n", 0.2)
        elif request.path == "/v1/predictions/p1":
            made = {"status": "succeeded", "metrics": {"input_token_count": 11, "output_token_count": 22}}
        else:
            status, made = 404, {"detail": "Not found."}
        return status, "application/json", body(json.dumps(made).encode())


def on_replicate(
    fake: FakeReplicate, url: str = "me/mine", token: str = TOKEN, count: int = 1
) -> tuple[load.Taken, list[Request]]:
    with standing_in(fake.answer) as server, ExitStack() as stack:
        fake.url = server.url
        runner = stack.enter_context(asyncio.Runner())
        environ = {"REPLICATE_API_TOKEN": token, "REPLICATE_BASE_URL": server.url}
        side = asking.remote(url, runner, stack, environ)
        assert side.title == "me/mine"
        return runner.run(load.closed_loop(side.ask, cog_questions(count), 1)), server.requests


@pytest.mark.parametrize("url", ["me/mine", "https://api.replicate.com/v1/models/me/mine"])
def test_a_model_on_replicate_is_asked_as_its_clients_do(url: str) -> None:
    taken, requests = on_replicate(FakeReplicate(), url)
    [answer] = taken.answers
    assert (answer.error, len(answer.texts), answer.usage) == ("", 2, Usage(11, 22)), (
        "a line break is text, nothing is not"
    )
    assert answer.texts[0] - answer.started >= 0.048
    assert answer.ended - answer.started < 0.2, "done is the end, whatever the server does with the connection"
    assert [(request.method, request.path) for request in requests] == [
        ("GET", "/v1/models/me/mine"),
        ("POST", "/v1/models/me/mine/predictions"),
        ("GET", "/streams/key"),
        ("GET", "/v1/predictions/p1"),
    ]
    _, create, stream, get = requests
    assert create.body == {"input": cog_questions(1)[0].inputs, "stream": True}
    assert create.headers["authorization"] == get.headers["authorization"] == f"Bearer {TOKEN}"
    assert stream.headers["accept"] == "text/event-stream"
    assert "authorization" not in stream.headers, "the address lets in by itself"


def test_a_model_that_is_not_run_by_name_is_run_by_version() -> None:
    taken, requests = on_replicate(FakeReplicate(official=False), count=2)
    assert [answer.error for answer in taken.answers] == ["", ""]
    created = [request for request in requests if request.method == "POST"]
    assert [request.path for request in created] == [
        "/v1/models/me/mine/predictions", "/v1/predictions", "/v1/predictions",
    ]  # fmt: skip
    assert created[-1].body == {"version": "5c7d", "input": cog_questions(2)[1].inputs, "stream": True}


@pytest.mark.parametrize(("status", "refused"), [(429, True), (500, False)])
def test_replicates_refusals_are_told_without_the_token(status: int, refused: bool) -> None:
    fake = FakeReplicate()
    fake.fault = (status, f"the header was Bearer {TOKEN}")
    taken, _ = on_replicate(fake)
    [answer] = taken.answers
    assert answer.error == f'The server answers {status}: {{"detail": "the header was Bearer [token]"}}'
    assert answer.refused is refused


@pytest.mark.parametrize(
    ("url", "environ", "message"),
    [
        ("me/mine", {}, "To ask me/mine on Replicate, set REPLICATE_API_TOKEN"),
        ("me/mine", {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": "http://127.0.0.1:9"}, "does not answer"),
        ("me/mine", {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": "http://example.com"}, "can not be asked"),
        (
            "https://example.com/v1/models/me/mine",
            {"REPLICATE_API_TOKEN": TOKEN},
            "is not Replicate, so it does not get",
        ),
        ("localhost:5000", {}, "is neither http://host:port, https://… nor OWNER/NAME"),
        ("http://user:word@example.com", {}, r"^http://example.com can not be asked: write https://"),
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 does not answer as a Cog server"),
    ],
)
def test_a_url_that_can_not_be_asked_is_one_sentence(url: str, environ: dict[str, str], message: str) -> None:
    with ExitStack() as stack, pytest.raises(CogpressError, match=message) as error:
        asking.remote(url, stack.enter_context(asyncio.Runner()), stack, environ)
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_that_replicate_does_not_know() -> None:
    with pytest.raises(CogpressError, match="does not accept the token in REPLICATE_API_TOKEN"):
        on_replicate(FakeReplicate(), token="another")


# ---------------------------------------------------------------------------------------------------------------------
# Starting and comparing
# ---------------------------------------------------------------------------------------------------------------------


def test_vllms_flags() -> None:
    assert sides.flags(
        {"model": "w", "enforce_eager": True, "trust_remote_code": False, "disable_log_stats": False,
         "max_model_len": None, "speculative_config": {"method": "ngram"}, "gpu_memory_utilization": 0.45}
    ) == [
        "--model", "w", "--enforce-eager", "--no-trust-remote-code", "--speculative-config", '{"method": "ngram"}',
        "--gpu-memory-utilization", "0.45",
    ]  # fmt: skip


def test_the_parts_of_a_start_are_read_from_the_servers_log() -> None:
    seconds = {"fetch": 1.5, "imports": 10.25, "saved": 1.5, "tokenizer": 0.5, "engine": 20.0, "total": 31.0}
    line = serving.cold_start_line(seconds)
    found = sides.cold_start(f"a line\n2026 INFO coglet::setup: {line} source=Stdout\n")
    assert found == pytest.approx(seconds, abs=0.06)
    assert sides.cold_start("nothing") == {}


def test_a_server_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "print('no room', flush=True); exit(3)"], stdout=output)
    with pytest.raises(
        CogpressError, match=r"ended with exit status 3 before it was ready, and said last: no room\. All"
    ):
        sides._wait_healthy(process, "http://127.0.0.1:9", log)


def test_a_project_for_half_the_gpu_is_the_project_but_for_that(tmp_path: Path) -> None:
    from cogpress import config

    made = sides._project(ROOT, tmp_path, 0.45)
    ours, theirs = config.load(made / "model.yaml"), config.load(ROOT / "model.yaml")
    assert ours.serve.gpu_memory_share == 0.45
    assert ours == theirs.model_copy(update={"serve": theirs.serve.model_copy(update={"gpu_memory_share": 0.45})})
    assert (made / "predict.py").resolve().parent == made.resolve()
    code = "from cogpress import engine; print(engine.__file__, engine.find('vllm').__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=made, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [f"{made}/cogpress/engine.py", f"{made}/cogpress/engines/vllm.py"]


def rounds(**figures: float) -> list[dict[str, float]]:
    usual = {
        "requests": 128.0, "failed": 0.0, "refused": 0.0, "empty": 0.0, "lost": 0.0, "seconds": 10.0, "tokens": 1000.0,
        "prompt_tokens_mean": 90.0, "tokens_per_second": 100.0, "requests_per_second": 2.0,
        "stream_tokens_per_second": 30.0, "latency_p50": 1.0, "late_max": 0.001, "client_share": 0.1,
        **{f"{kind}_p{share}": 0.1 + share / 1000 for kind in ("ttft", "itl") for share in (50, 90, 99)},
    }  # fmt: skip
    return [{**usual, **figures}] * 3


@pytest.mark.parametrize(
    ("figures", "failing"),
    [
        ({}, []),
        ({"tokens_per_second": 97.0, "ttft_p50": 0.165}, []),
        ({"tokens_per_second": 96.0}, ["tokens a second, 1 stream", "tokens a second, 16 streams"]),
        ({"ttft_p50": 0.166}, ["time to first token, 1 stream", "time to first token, 16 streams"]),
        ({"failed": 1.0, "refused": 1.0}, ["nothing lost with 64 streams"]),
        ({"empty": 1.0}, ["nothing lost with 64 streams"]),
    ],
)
def test_the_verdict(figures: dict[str, float], failing: list[str]) -> None:
    measured = {f"example-{n}": {"cogpress": rounds(**figures), "vllm": rounds()} for n in (1, 4, 16, 64)}
    checks = serve.verdict(measured)
    assert len(checks) == 5
    assert [check.requirement.partition(":")[0] for check in checks if not check.passed] == failing


def test_streams_begin_one_after_the_other() -> None:
    async def ask(_question: Any) -> AsyncIterator[Usage | load.Later | None]:
        yield None
        await asyncio.sleep(0.2)
        yield Usage(1, 1)

    taken = asyncio.run(load.closed_loop(ask, ["a", "b", "c", "d"], 3, stagger=0.05))
    starts = [answer.started - taken.answers[0].started for answer in taken.answers]
    assert starts == pytest.approx([0, 0.05, 0.1, 0.2], abs=0.03)


def test_one_loss_in_one_round_is_a_loss() -> None:
    three = rounds()
    three[1] = {**three[1], "failed": 1.0}
    [check] = serve.verdict({"example-64": {"cogpress": three, "vllm": rounds()}})
    assert not check.passed
    assert check.measured == "383 of 384 answered, 0 refused, 1 failed, 0 empty"


def test_what_was_not_measured_is_not_judged() -> None:
    assert serve.verdict({}) == []
    assert len(serve.verdict({"example-16": {"cogpress": rounds(), "vllm": rounds()}})) == 2


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_the_picture(tmp_path: Path) -> None:
    def points(speed: float) -> list[dict[str, float]]:
        return [
            {
                "streams": n,
                **rounds(tokens_per_second=speed * n**0.7, ttft_p50=0.05 * n**0.5, ttft_p99=0.09 * n**0.5)[0],
            }
            for n in (1, 4, 16, 32, 64)
        ]

    curves = {"cogpress": points(33), "vLLM's server": points(31), "owner/model": points(60)}
    plots.serving_curves(curves, tmp_path / "serve.png")
    assert png_size(tmp_path / "serve.png") == (1500, 528)


class Comparison:
    """`serve.run` with stand-ins for everything that loads a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, cog: StandIn, vllm: StandIn) -> None:
        self.folder, self.running, self.fails = folder, 0, False
        self.text = io.StringIO()
        machine = sides.Machine({"max_num_seqs": 64}, {}, [], 0.9)
        monkeypatch.setattr(sides, "in_fresh_process", lambda *_: machine)
        monkeypatch.setattr(sides, "_cogpress", lambda *_: self.server(cog.url))
        monkeypatch.setattr(sides, "_vllm", lambda *_: self.server("" if self.fails else vllm.url))
        (folder / "config.json").write_text("{}")

    @contextmanager
    def server(self, url: str) -> Iterator[str]:
        if not url:
            raise CogpressError("It ended before it was ready.")
        self.running += 1
        try:
            yield url
        finally:
            self.running -= 1

    def run(self, **options: Any) -> dict[str, Any]:
        console = Console(file=self.text, width=110)
        more = {"kinds": ("example", "open"), "streams": (1, 16), "rounds": 2, "warm_disk": False, **options}
        return serve.run(ROOT, self.folder, examples, self.folder / "out" / "serve.json", console, **more)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Comparison]:
    async def openai(_request: Request) -> Reply:
        text = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":8}}\n\n'
        return 200, "text/event-stream", body(0.01, text, 0.004, text, usage)

    with standing_in(cog_answer(0.01, 0.004)) as cog, standing_in(openai) as vllm:
        made = Comparison(monkeypatch, tmp_path, cog, vllm)
        made.cog, made.vllm = cog, vllm  # type: ignore[attr-defined]
        yield made


def test_a_comparison_asks_all_sides_the_same_and_writes_what_it_found(
    comparison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeReplicate()
    with standing_in(fake.answer) as server:
        fake.url = server.url
        monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
        monkeypatch.setenv("REPLICATE_BASE_URL", server.url)
        report = comparison.run(kinds=("example",), streams=(1,), url="me/mine")
        third = [request for request in server.requests if request.method == "POST"]
    assert comparison.running == 0
    inputs = [request.body["input"] for request in comparison.cog.requests]
    assert inputs[20:] == [request.body["input"] for request in third][20:]
    prompt = serve.config.load(ROOT / "model.yaml").prompt
    asked = [request.body["messages"][-1]["content"] for request in comparison.vllm.requests]
    assert asked[20:] == [prompt.render(json.loads(one["fields"])) for one in inputs[20:]]
    assert len(set(asked)) == len(asked) == 20 + 2 * 12, "after the warm-up, two rounds of different questions"
    out = comparison.folder / "out"
    assert json.loads((out / "serve.json").read_text()) == json.loads(json.dumps(report))
    assert png_size(out / "serve.png")[0] == 1500
    shown = comparison.text.getvalue()
    assert TOKEN not in shown + (out / "serve.json").read_text()
    for words in (
        "me/mine",
        "vLLM's server",
        "example, 1 stream",
        "TTFT (ms)",
        "Verdict",
        "Start and memory",
        "24 / 0",
    ):
        assert words in shown, words


def test_a_comparison_measures_each_load_and_judges(comparison: Any) -> None:
    report = comparison.run()
    assert list(report["rounds"]) == ["example-1", "example-16", "open"]
    assert all(len(found) == 2 for sides in report["rounds"].values() for found in sides.values())
    rate = report["settings"]["open_loop_requests_per_second"]
    assert rate == pytest.approx(0.7 * report["rounds"]["example-16"]["cogpress"][0]["requests_per_second"])
    assert len(report["verdict"]) == 4
    assert report["lost"] == {}
    assert {"cogpress", "python", "httpx"} <= report["versions"].keys()
    assert report["machine"]["cores"] >= 1


def test_the_report_says_which_requests_were_lost_and_why(comparison: Any) -> None:
    usual, asked = comparison.cog.answer, []

    async def sometimes_busy(request: Request) -> Reply:
        asked.append(request)
        # After the warm-up, the third of the first round's 12 and the first two of the second's.
        if len(asked) - 20 in (3, 13, 14):
            return (409 if len(asked) - 20 < 14 else 500), "text/plain", body(b"no")
        return await usual(request)

    comparison.cog.answer = sometimes_busy
    report = comparison.run(kinds=("example",), streams=(1,))
    assert report["lost"] == {
        "example-1": {
            "cogpress": {
                "causes": {"HTTP 409": 2, "HTTP 500": 1},
                "requests": [
                    {"round": 1, "request": 3, "cause": "HTTP 409", "error": "The server answers 409: no"},
                    {"round": 2, "request": 1, "cause": "HTTP 409", "error": "The server answers 409: no"},
                    {"round": 2, "request": 2, "cause": "HTTP 500", "error": "The server answers 500: no"},
                ],
            }
        }
    }
    assert "Lost by cogpress, example, 1 stream: 2 for HTTP 409, 1 for HTTP 500" in comparison.text.getvalue()
    assert "24 / 3" in comparison.text.getvalue()


def test_where_a_side_does_not_start_the_other_is_ended(comparison: Any) -> None:
    comparison.fails = True
    with pytest.raises(CogpressError, match=r"^It ended before it was ready\.$"):
        comparison.run()
    assert comparison.running == 0
    assert not (comparison.folder / "out" / "serve.json").exists()


def test_a_side_that_answers_nothing_is_named(comparison: Any) -> None:
    async def broken(_request: Request) -> Reply:
        return 500, "text/plain", body(b"no")

    comparison.vllm.answer = broken
    with pytest.raises(CogpressError, match=r"^vLLM's server answers nothing: The server answers 500: no$"):
        comparison.run()
    assert comparison.running == 0


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="There are no weights at"):
        serve.run(ROOT, tmp_path, examples, tmp_path / "serve.json", Console(quiet=True))


def test_help_names_the_options() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "--help"], capture_output=True, text=True, check=True
    )
    options = ("--rounds", "--loads", "--streams", "--scale", "--quick", "--url", "REPLICATE_API_TOKEN")
    for option in (*options, "speculative", "batch"):
        assert option in done.stdout


@pytest.mark.parametrize(("module", "count"), [(speculative, 17), (batch, 512)])
def test_speculation_and_batches_are_measured_with_held_out_rows(
    module: Any, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[Any, ...]] = []
    what = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(environment, "enter", lambda: None)
    monkeypatch.setattr(module, "run", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(sys, "argv", ["bench", what, "--weights", str(tmp_path), "--rounds", "5"])
    runpy.run_path(str(ROOT / "scripts" / "bench"))["main"]()
    [(root, weights, rows, out, times, _)] = given
    assert (root, weights, out, times) == (ROOT, tmp_path, ROOT / "runs" / "bench" / f"{what}.json", 5)
    assert len(rows) == count
    assert all(
        row.keys() == {"prompt", "completion"} and row["prompt"].keys() == {"question", "columns"} for row in rows
    )
