"""Requests over real sockets: what is repeated and what is not, how long is waited, and event streams of any size."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from cogpress import http
from cogpress.errors import CogpressError

TOKEN = "r8_not-a-real-token"


class Site:
    """Gives its replies in turn, the last one again and again: status, headers, body; a status of 0 cuts the body."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, dict[str, str], bytes]] = []
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                site.asked.append(self.headers.get("authorization", ""))
                status, headers, body = site.replies.pop(0) if len(site.replies) > 1 else site.replies[0]
                self.send_response(status or 200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + (status == 0)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    made = Site()
    threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def api(site: Site, tries: int = 4, longest: float = 0.2) -> http.Api:
    return http.Api(site.url, TOKEN, "the site", tries=tries, longest=longest)


FINE = (200, {}, b'{"a": 1}')


@pytest.mark.parametrize("fault", [(503, {}, b""), (429, {"Retry-After": "0"}, b""), (0, {}, b'{"a": 1')])
def test_a_busy_server_and_a_cut_body_are_asked_again(site: Site, fault: Any) -> None:
    site.replies = [fault, fault, FINE]
    assert api(site).send("GET", "/").content == {"a": 1}
    assert site.asked == [f"Bearer {TOKEN}"] * 3


def test_what_may_have_begun_is_not_sent_again(site: Site) -> None:
    site.replies = [(503, {}, b"{")]
    assert api(site).send("POST", "/").status == 503
    assert len(site.asked) == 1
    for status, begun, tries in ((0, True, 1), (429, False, 4)):
        site.asked.clear()
        site.replies = [(status, {}, b"{")]
        with pytest.raises(http.UnavailableError) as error:
            api(site).send("POST", "/")
        assert (error.value.begun, len(site.asked)) == (begun, tries)
        assert TOKEN not in str(error.value)


def test_it_ends_after_so_many_tries(site: Site) -> None:
    site.replies = [(502, {}, b"")]
    with pytest.raises(http.UnavailableError, match="answered 502, 4 times in a row"):
        api(site).send("GET", "/")
    assert len(site.asked) == 4
    with pytest.raises(http.UnavailableError, match=r"cannot be reached \(no connection\), 2 times in a row"):
        http.Api("http://127.0.0.1:9", None, "nobody", tries=2, longest=0.1).send("POST", "/")


@pytest.mark.slow
def test_a_wait_that_a_server_asks_for_has_an_end(site: Site) -> None:
    for asked in ("100000", "Fri, 01 Jan 2100 00:00:00 GMT", "soon"):
        site.replies = [(503, {"Retry-After": asked}, b""), FINE]
        assert api(site).send("GET", "/").status == 200
    site.replies = [(503, {"Retry-After": "1"}, b""), FINE]
    began = time.monotonic()
    assert api(site, longest=5).send("GET", "/").status == 200
    assert time.monotonic() - began >= 1


def test_what_is_not_json_is_refused(site: Site) -> None:
    site.replies = [(200, {}, b"<html>")]
    with pytest.raises(CogpressError, match="did not answer with JSON"):
        api(site).send("GET", "/")


def test_retries_keep_the_environments_proxies(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with a transport of its own would ignore them; loopback addresses are asked directly all the same."""
    monkeypatch.setenv("HTTP_PROXY", site.url)
    site.replies = [(503, {}, b""), FINE]
    with http.connect("http://example.com", retry=http.retries(3, 1.0)) as opened:
        assert opened.get("http://example.com/").json() == {"a": 1}
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert api(site).send("GET", "/").status == 200


EVENTS = (
    b": keep-alive\n\nevent: output\r\nid: 1\r\ndata: a\xe2\x80\xa8b\r\n\r\n"
    b": keep-alive\n\nevent: output\ndata: \ndata: c\n\nevent: done\ndata: {}\n\nevent: cut"
)


def stream(site: Site, body: bytes) -> list[tuple[str, str]]:
    site.replies = [(200, {"Content-Type": "text/event-stream"}, body)]
    with http.connect(site.url) as opened, opened.stream("GET", site.url, headers=http.EVENT_STREAM) as response:
        return [(event.event, event.data) for event in http.events(response)]


def test_events_are_whole_with_their_own_line_breaks(site: Site) -> None:
    assert stream(site, EVENTS) == [("output", "a\u2028b"), ("output", "\nc"), ("done", "{}")]


def test_events_may_be_cut_anywhere() -> None:
    decoder = http.EventDecoder()
    found = [event for at in range(0, len(EVENTS), 3) for event in decoder.feed(EVENTS[at : at + 3])]
    assert [(event.event, event.data) for event in found if event.data] == [
        ("output", "a\u2028b"),
        ("output", "\nc"),
        ("done", "{}"),
    ]


def test_a_large_event_in_small_pieces_takes_linear_time() -> None:
    whole = b"event: completed\ndata: " + b"x" * 24_000_000 + b"\n\n"
    decoder = http.EventDecoder()
    began = time.process_time()
    found = [event for at in range(0, len(whole), 16384) for event in decoder.feed(whole[at : at + 16384])]
    assert [len(event.data) for event in found] == [24_000_000]
    assert time.process_time() - began < 4


def test_a_large_event_takes_linear_time(site: Site) -> None:
    data = json.dumps({"output": "x" * 24_000_000})
    began = time.process_time()
    assert stream(site, f"event: completed\ndata: {data}\n\n".encode()) == [("completed", data)]
    assert time.process_time() - began < 4


def test_what_is_no_event_stream_is_an_error(site: Site) -> None:
    site.replies = [FINE]
    with (
        http.connect(site.url) as opened,
        opened.stream("GET", site.url) as response,
        pytest.raises(httpx.TransportError),
    ):
        list(http.events(response))
