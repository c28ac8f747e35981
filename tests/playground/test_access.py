"""Access control: tokens, origins, body sizes and rates."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from cogpress.playground import access
from cogpress.playground.api import routes
from tests import Script
from tests.standins.localreplicate import TOKEN, Local

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(echo: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    data = tmp_path_factory.mktemp("data")
    with Local(echo.root, [("echo", echo.url)], data=data, options={"max_input_mb": 1}) as local:
        yield local


@pytest.fixture(scope="module")
def guarded(echo: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    data = tmp_path_factory.mktemp("guarded")
    options = {"requests_per_minute": 120}
    with Local(echo.root, [("echo", echo.url)], data=data, token=TOKEN, host="0.0.0.0", options=options) as local:
        yield local


def test_any_other_address_needs_a_token() -> None:
    assert access.check_address("127.0.0.1", None)
    assert access.check_address("::1", None)
    assert not access.check_address("0.0.0.0", "x" * 16)
    for host in ("0.0.0.0", "192.168.1.2", "example.org", "::"):
        with pytest.raises(CogpressError, match="COGPRESS_TOKEN"):
            access.check_address(host, None)
    with pytest.raises(CogpressError, match="shorter than 16"):
        access.check_address("0.0.0.0", "short")


def test_the_command_refuses_to_start_without_a_token(tmp_path: Path, script: Script) -> None:
    status, _, said = script("playground", "--url", "http://127.0.0.1:9", "--host", "0.0.0.0", "--data", tmp_path)
    assert status == 1
    assert "a token is required" in said


def test_requests_of_other_sites_pages_are_refused(local: Local) -> None:
    route = "/v1/predictions"
    assert local.ask("GET", route).status_code == 200
    assert local.ask("GET", route, headers={"Origin": local.url}).status_code == 200
    assert local.ask("GET", route, headers={"Origin": "http://evil.example"}).status_code == 403
    for odd in ("null", "http://[", "http://[::1", "http://a]b", ""):
        assert local.ask("GET", route, headers={"Origin": odd}).status_code == 403
    assert local.ask("GET", route, headers={"Origin": local.url.replace(str(local.port), "1")}).status_code == 403
    assert local.ask("GET", route, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert local.ask("GET", "/p/x", headers=followed).status_code == 200
    assert local.ask("OPTIONS", route, headers={"Origin": "http://evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in local.ask("GET", route).headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "["])
def test_dns_rebinding_is_refused(local: Local, host: str) -> None:
    with socket.create_connection(("127.0.0.1", local.port)) as connection:
        connection.sendall(f"GET /v1/account HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 421 ")
    assert httpx.get(f"http://localhost:{local.port}/v1/account", trust_env=False).status_code == 200


def test_a_request_has_one_host(local: Local) -> None:
    """Of two, some look at the first and others at the last."""
    with socket.create_connection(("127.0.0.1", local.port)) as connection:
        hosts = b"Host: evil.example\r\nHost: localhost\r\n"
        connection.sendall(b"GET /v1/account HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 421 ")


def test_clients_that_leave_and_those_of_other_protocols_are_no_faults(local: Local) -> None:
    """At every stage of a request; a fault would fill the log with its trace."""
    body = b'{"input": {"count": 1}}'
    head = f"POST /v1/models/local/echo/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    for sent in (whole[:20], whole[: len(head)], whole[:-1], whole):
        for reset in (False, True):
            with socket.create_connection(("127.0.0.1", local.port)) as connection:
                connection.sendall(sent)
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "a"}
    assert local.ask("GET", "/v1/account", headers=upgrade).status_code == 200
    assert local.create({"count": 2}, wait=True)["status"] == "succeeded"
    assert "Traceback" not in (local.data / "local.log").read_text()


def test_the_token_is_asked_for(guarded: Local) -> None:
    def status(route: str, **headers: str) -> int:
        return httpx.get(guarded.url + route, headers=headers, trust_env=False).status_code

    assert status("/v1/account") == 401
    assert status("/v1/account", Authorization="Bearer wrong") == 401
    assert status("/v1/account", Authorization=TOKEN) == 401
    assert status("/v1/account", Authorization=f"Bearer {TOKEN}") == 200
    assert status("/v1/account", Authorization=f"Token {TOKEN}") == 200
    assert status("/playground/api/history") == 401
    assert status("/") == status("/p/x") == status("/compare") == 200
    config = httpx.get(f"{guarded.url}/playground/api/config", trust_env=False).json()
    assert (config["token_required"], config["models"]) == (True, [])
    made = guarded.create({"count": 2}, wait=True)
    assert made["status"] == "succeeded"
    assert "event: done" in httpx.get(made["urls"]["stream"], trust_env=False).text  # its key lets it in
    log = (guarded.data / "local.log").read_bytes()
    assert not any(TOKEN.encode() in path.read_bytes() for path in guarded.data.iterdir() if path.is_file())
    assert TOKEN.encode() not in log


def test_too_much_is_refused(local: Local) -> None:
    answer = local.ask("POST", "/v1/predictions", {"version": "echo", "input": {"prompt": "x" * (1 << 20)}})
    assert (answer.status_code, answer.json()["status"]) == (413, 413)

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    answer = httpx.post(f"{local.url}/v1/files", content=endless(), trust_env=False)
    assert answer.status_code in (413, 422)
    answer = httpx.post(f"{local.url}/v1/predictions", content=endless(), trust_env=False)
    assert answer.status_code == 413
    assert local.create({"count": 1}, wait=True)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.7"),
        ("testclient", "testclient"),
    ],
)
def test_a_network_that_one_client_has_counts_as_one(address: str, client: str) -> None:
    assert access.client(address) == client


def test_headers_with_endless_numbers_are_read() -> None:
    assert routes._wait(f"respond-async, wait={'9' * 5000}") == routes.WAIT_SECONDS


def test_a_rate_limited_client_is_told_when_to_retry(echo: Server, tmp_path: Path) -> None:
    options = {"requests_per_minute": 20}
    with Local(echo.root, [("echo", echo.url)], data=tmp_path, options=options) as limited:
        answers = [limited.ask("GET", "/v1/account") for _ in range(60)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert refused[0].json()["title"] == "Too many requests"
    assert int(refused[0].headers["retry-after"]) >= 1


def test_the_page_allows_nothing_from_elsewhere(local: Local) -> None:
    answer = local.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for route in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"):
        assert local.ask("GET", route).status_code == 404
