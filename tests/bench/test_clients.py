"""Asking in the benchmarks, against stand-ins with known delays: three protocols, what is measured, what is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from bench import clients, load
from bench.load import Usage
from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.replicate.api import AsyncReplicate
from tests.standins.benchserver import (
    TOKEN,
    FakeReplicate,
    Reply,
    Request,
    ask_all,
    body,
    chunk,
    cog_answer,
    cog_questions,
    completed,
    event,
    standing_in,
)


@pytest.mark.slow
def test_figures_are_those_of_known_delays() -> None:
    with standing_in(cog_answer(0.1, 0.05, 0.05, 0.05)) as server:
        taken = ask_all(server.url, lambda http: clients.cog(http, server.url), cog_questions(12), 4)
    found = load.summary(taken)
    assert server.most == 4, "no more and no fewer at once than there are streams"
    assert server.connections <= 4, "connections are used again"
    assert (found["requests"], found["lost"], found["tokens"]) == (12, 0, 96)
    assert found["prompt_tokens_mean"] == 100
    # A busy machine delays, by any time; nothing comes early.
    assert 0.098 <= found["ttft_p50"] <= found["ttft_p90"] <= found["ttft_p99"]
    assert found["latency_p50"] >= 0.24
    assert taken.seconds >= 3 * 0.24
    gaps = [after - before for one in taken.answers for before, after in itertools.pairwise(one.texts)]
    assert (len(gaps), found["itl_p50"]) == (3 * 12, pytest.approx(statistics.median(gaps)))
    speeds = [7 / (one.texts[-1] - one.texts[0]) for one in taken.answers]
    assert found["stream_tokens_per_second"] == pytest.approx(statistics.median(speeds))
    assert found["tokens_per_second"] == pytest.approx(96 / taken.seconds)
    assert found["client_share"] < 1


def test_every_question_is_asked_once_whoever_is_free() -> None:
    with standing_in(cog_answer(0.01)) as server:
        ask_all(server.url, lambda http: clients.cog(http, server.url), cog_questions(9), 4)
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
        taken = ask_all(server.url, lambda http: clients.cog(http, server.url), cog_questions(8), 1)
    found = load.summary(taken)
    assert {key: found[key] for key in ("requests", "failed", "refused", "empty", "lost")} == {
        "requests": 8, "failed": 5, "refused": 1, "empty": 2, "lost": 7,
    }  # fmt: skip
    assert [answer.error for answer in taken.answers if answer.error] == [
        "The server answers 409: {\"error\": \"busy\"}",
        "The server answers 500: out of memory",
        "The answer broke off before its end.",
        "The prediction failed: no room",
        'The stream is incomplete: {"error":"events were dropped"}',
    ]  # fmt: skip
    assert [(one["request"], one["cause"]) for one in load.lost(taken)] == [
        (2, "HTTP 409"), (3, "HTTP 500"), (4, "broken off"), (5, "no text"), (6, "prediction failed"), (7, "no text"),
        (8, "stream incomplete"),
    ]  # fmt: skip
    assert load.lost(taken)[0]["error"] == taken.answers[1].error


def on_the_stand_in(url: str) -> Callable[[Any], load.Ask]:
    replicate = AsyncReplicate(TOKEN, url, tries=1, timeout=clients.TIMEOUT)
    return lambda _http: clients.ReplicateModel(replicate, "me/mine").ask


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
                lambda http: clients.cog(http, server.url),
                lambda http: clients.openai(http, server.url, "m", prompt),
                on_the_stand_in(server.url),
            ):
                server.requests.clear()
                taken = ask_all(server.url, side, cog_questions(3), 1)
                assert all(one.error for one in taken.answers)
                assert len(server.requests) == 3


def test_a_load_of_which_nothing_is_answered_is_an_error() -> None:
    with pytest.raises(CogpressError, match=r"None of 2 requests was answered: The connection failed: "):
        load.summary(
            ask_all("http://127.0.0.1:9", lambda http: clients.cog(http, "http://127.0.0.1:9"), cog_questions(2), 2)
        )


def test_text_that_looks_like_an_empty_chunk_is_text() -> None:
    pieces = [chunk('"chunk":""'), chunk("\n"), chunk("\\"), completed()]

    async def answer(_request: Request) -> Reply:
        whole = b"".join(pieces)
        # Cut anywhere, also inside a line.
        return 200, "text/event-stream", body(*(whole[at : at + 7] for at in range(0, len(whole), 7)))

    with standing_in(answer) as server:
        taken = ask_all(server.url, lambda http: clients.cog(http, server.url), cog_questions(1), 1)
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
        taken = ask_all(server.url, lambda http: clients.openai(http, server.url, "m", prompt), cog_questions(1), 1)
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


@pytest.mark.slow
def test_arrivals_of_an_open_loop_are_kept_however_slow_answers_are() -> None:
    """None is answered before all are there."""
    times, usual = load.arrivals(20, 100.0, 3), cog_answer(0.1)

    async def answer(request: Request) -> Reply:
        while len(server.requests) < 20:
            await asyncio.sleep(0.01)
        return await usual(request)

    with standing_in(answer) as server, ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        http = clients.connect(server.url, runner, stack)
        taken = runner.run(load.open_loop(clients.cog(http, server.url), cog_questions(20), times))
    assert server.most == 20
    assert load.summary(taken)["ttft_p50"] >= 0.098
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


def test_streams_begin_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    async def ask(_question: Any) -> AsyncIterator[Usage | load.Later | None]:
        yield None
        yield Usage(1, 1)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    taken = asyncio.run(load.closed_loop(ask, ["a", "b", "c", "d"], 3, stagger=0.05))
    assert waits == pytest.approx([0, 0.05, 0.1])
    assert len(taken.answers) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Replicate
# ---------------------------------------------------------------------------------------------------------------------


def on_replicate(
    fake: FakeReplicate, url: str = "me/mine", token: str = TOKEN, count: int = 1
) -> tuple[load.LoadResult, list[Request]]:
    with standing_in(fake.answer) as server, ExitStack() as stack:
        fake.url = server.url
        runner = stack.enter_context(asyncio.Runner())
        environ = {"REPLICATE_API_TOKEN": token, "REPLICATE_BASE_URL": server.url}
        side = clients.remote(url, runner, stack, environ)
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
    assert answer.ended - answer.started < 30, "done is the end, whatever the server does with the connection"
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
    assert f"answer{'ed' if refused else 's'} {status}" in answer.error
    assert TOKEN not in answer.error
    assert answer.refused is refused


@pytest.mark.parametrize(
    ("url", "environ", "message"),
    [
        ("me/mine", {}, "REPLICATE_API_TOKEN is not set"),
        ("me/mine", {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": "http://127.0.0.1:9"}, "cannot be reached"),
        (
            "me/mine",
            {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": "http://example.com"},
            "neither https",
        ),
        (
            "https://example.com/v1/models/me/mine",
            {"REPLICATE_API_TOKEN": TOKEN},
            "is not Replicate, so it does not get",
        ),
        ("localhost:5000", {}, "is neither http://host:port, https://… nor OWNER/NAME"),
        ("http://user:word@example.com", {}, r"^http://example.com cannot be asked: write https://"),
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 does not answer as a Cog server"),
    ],
)
def test_a_url_that_cannot_be_asked_is_one_sentence(url: str, environ: dict[str, str], message: str) -> None:
    with ExitStack() as stack, pytest.raises(CogpressError, match=message) as error:
        clients.remote(url, stack.enter_context(asyncio.Runner()), stack, environ)
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_that_replicate_does_not_know() -> None:
    with pytest.raises(CogpressError, match="rejects the token"):
        on_replicate(FakeReplicate(), token="another")
