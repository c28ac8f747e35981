"""The client against Cog's real runtime, and against servers that break off or answer oddly. No model is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cogpress.cog import client
from cogpress.cog.client import Event
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from tests import wait_until

pytestmark = pytest.mark.slow

RUNNER = """
import time
from typing import Optional

import cog
from cog import BaseRunner, ConcatenateIterator, Input


class Runner(BaseRunner):
    @cog.streaming
    def run(
        self,
        text: str = Input(default="a b"),
        seconds: float = Input(default=0.0, ge=0, le=2),
        fail: bool = Input(default=False),
        seed: Optional[int] = Input(default=None),
    ) -> ConcatenateIterator[str]:
        print("a line of the log")
        for number, word in enumerate(text.split(" ")):
            yield word + "\\n"
            time.sleep(seconds)
            if fail:
                raise ValueError("this cannot be said")
            self.record_metric("words", number + 1)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("client")
    (root / "predict.py").write_text(RUNNER)
    (root / "cog.yaml").write_text('run: "predict.py:Runner"')
    with Server(root, log=root / "server.log") as server:
        server.wait_ready(120)
        yield server.url


@pytest.fixture
def url(served: str) -> str:
    """The server, once its only slot is free again."""
    assert free(served)
    return served


def free(url: str) -> bool:
    return wait_until(lambda: (client.health(url) or {}).get("status") == "READY")


def begin(stream: Iterator[Event]) -> None:
    """Read up to the first text: the runtime loses a cancellation that comes after `start` but before the runner."""
    assert any(event.kind == "output" for event in stream)


def test_a_prediction_is_returned_whole(url: str) -> None:
    made = client.predict(url, {"text": "one two", "seed": None})
    assert made["output"] == ["one\n", "two\n"]
    assert made["status"] == "succeeded"
    assert made["logs"] == "a line of the log\n"
    assert made["metrics"]["words"] == 2


def test_a_stream_gives_each_event_as_the_runtime_sends_it(url: str) -> None:
    events = list(client.stream(url, {"text": "one two", "seed": None}))
    assert [event.kind for event in events] == ["start", "log", "output", "metric", "output", "metric", "completed"]
    assert events[1] == Event("log", "a line of the log\n", data={"data": "a line of the log\n", "source": "stdout"})
    assert events[2] == Event("output", "one\n", data={"chunk": "one\n", "index": 0})
    assert events[4] == Event("output", "two\n", data={"chunk": "two\n", "index": 1})
    assert events[3].data == {"mode": "replace", "name": "words", "value": 1}
    assert events[-1].metrics["words"] == 2
    assert events[-1].data["output"] == ["one\n", "two\n"]


def test_text_with_every_kind_of_line_break_arrives_whole(url: str) -> None:
    """Unicode has more line breaks than the stream's format, and a model writes any of them."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ni\u00e9\U0001f600"
    events = list(client.stream(url, {"text": text}))
    assert "".join(event.text for event in events if event.kind == "output") == f"{text}\n"


@pytest.mark.parametrize("ask", [client.predict, lambda url, inputs: list(client.stream(url, inputs))])
def test_what_goes_wrong_is_the_servers_own_words(url: str, ask: Callable[..., object]) -> None:
    with pytest.raises(CogpressError, match=r"^ValueError: this cannot be said$"):
        ask(url, {"fail": True})
    assert free(url)
    with pytest.raises(
        CogpressError, match=r"^The server rejects the input \(422\): seconds: 9 is greater than the maximum"
    ):
        ask(url, {"seconds": 9})


def test_events_arrive_while_the_prediction_runs_and_a_busy_server_says_so(url: str) -> None:
    stream = client.stream(url, {"text": " ".join("abcdefghij"), "seconds": 2}, "busy")
    begin(stream)
    for ask in (client.predict, lambda url, inputs: list(client.stream(url, inputs))):
        with pytest.raises(CogpressError, match=r"^The server is busy"):
            ask(url, {})
    assert client.cancel(url, "busy")
    assert list(stream)[-1].data["status"] == "canceled"
    assert free(url)


def test_a_prediction_that_is_canceled_is_returned(url: str) -> None:
    stream = client.stream(url, {"text": "a b c d e f", "seconds": 0.5}, "mine")
    begin(stream)
    assert client.cancel(url, "mine")
    last = list(stream)[-1]
    assert (last.kind, last.data["id"], last.data["status"]) == ("completed", "mine", "canceled")
    assert not client.cancel(url, "mine")


def test_closing_a_stream_cancels_its_prediction(url: str) -> None:
    stream = client.stream(url, {"text": "a b c d e f g h i j", "seconds": 1})
    begin(stream)
    stream.close()  # type: ignore[attr-defined]
    assert free(url)


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    assert client.health(nowhere) is None
    assert client.health("not a url") is None
    for call in (client.openapi, lambda url: client.predict(url, {}), lambda url: list(client.stream(url, {}))):
        with pytest.raises(CogpressError, match=r"does not answer .* Start a server with scripts/serve"):
            call(nowhere)
    with pytest.raises(CogpressError, match="does not answer"):
        client.openapi("127.0.0.1:9")
    with pytest.raises(CogpressError, match="does not answer"):
        client.cancel(nowhere, "some")


def test_a_proxy_for_the_internet_is_not_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client.health(url)
    assert list(client.stream(url.replace("127.0.0.1", "localhost"), {}))


@pytest.fixture
def answer() -> Iterator[Callable[..., str]]:
    """A function that starts a server with one answer to everything and returns its URL."""
    servers: list[HTTPServer] = []

    def start(body: str, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header(
                    "Content-Type", "text/event-stream" if body.startswith(("event:", ":")) else "text/plain"
                )
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_stream_that_breaks_off_is_an_error(answer: Callable[..., str]) -> None:
    url = answer('event: output\ndata: {"chunk": "half", "index": 0}\n\nevent: outp')
    stream = client.stream(url, {})
    assert next(stream).text == "half"
    with pytest.raises(CogpressError, match="broke off the stream"):
        next(stream)


def test_a_stream_that_lost_events_is_an_error(answer: Callable[..., str]) -> None:
    url = answer(': keep-alive\n\nevent: error\ndata: {"error": "events were dropped"}\n\n')
    with pytest.raises(CogpressError, match="incomplete: events were dropped"):
        list(client.stream(url, {}))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (503, '{"error": "Setup has not finished yet."}', "The server answers 503: Setup has not finished yet."),
        (500, "<html>broken</html>", "The server answers 500: <html>broken</html>"),
        (422, '{"detail": ["odd"]}', "The server rejects the input (422): ['odd']"),
        (404, "{}", "The server has no /predictions."),
    ],
)
def test_other_answers_are_told(answer: Callable[..., str], status: int, body: str, message: str) -> None:
    with pytest.raises(CogpressError) as error:
        client.predict(answer(body, status), {})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "around",
    [
        "",
        "CogpressError: ",
        "Prediction failed: CogpressError: ",
        "Async prediction failed: CogpressError: ",
        "Prediction failed: Generator iteration error: reason: ",
    ],
)
def test_errors_are_told_without_the_runtimes_words(around: str) -> None:
    assert client.plain_error(f"{around}The prompt is empty.") == "The prompt is empty."
    assert client.plain_error(around) == "The prediction failed. Look into the server's log."
    assert client.plain_error("Worker crashed").startswith("The model's process ended while this ran.")
