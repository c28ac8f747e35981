"""Where webhooks may go: to the internet, and nowhere else unless the project allows it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cogpress import source
from cogpress.errors import CogpressError
from cogpress.playground.api import webhooks
from cogpress.playground.api.webhooks import Webhooks
from tests.standins.receiver import Receiver

PUBLIC = "93.184.215.14"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """A name server whose answers change; the last one stays."""
    left = list(answers)

    async def resolve(_host: str, _port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(webhooks, "resolve", resolve)


def check(url: Any, *, private: bool = False) -> None:
    asyncio.run(webhooks.check(url, None, private=private))


def send(url: str, *, private: bool = False) -> bool:
    async def work() -> bool:
        made = Webhooks(b"secret", private=private)
        try:
            return await made.send(url, {"id": "a"}, tries=1)
        finally:
            await made.close()

    return asyncio.run(work())


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f.1", "localhost", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "[ff02::1]",
    ],
)  # fmt: skip
def test_addresses_of_this_machine_and_its_network_are_refused(host: str) -> None:
    with pytest.raises(CogpressError, match=r"on the internet\. Set playground\.private_webhooks in model\.yaml"):
        check(f"https://{host}/hook")


def test_what_the_option_allows(receiver: Receiver) -> None:
    with pytest.raises(CogpressError, match="must be an https URL"):
        check(f"http://{PUBLIC}/")
    check(f"https://{PUBLIC}/")
    check(None)
    check(receiver.url, private=True)
    assert send(receiver.url, private=True)
    with pytest.raises(CogpressError, match=r"host nowhere\.invalid, which cannot be found\. Check the URL"):
        check("https://nowhere.invalid/")
    for odd in ("ftp://x", "https://", "http://[", 3):
        with pytest.raises(CogpressError, match="must be an http or https URL"):
            check(odd, private=True)


def test_one_private_address_of_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, [PUBLIC, "10.0.0.1"])
    with pytest.raises(CogpressError, match="on the internet"):
        check("https://hooks.example/")


def test_a_name_that_changes_its_address_after_the_check_reaches_nothing(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    resolving(monkeypatch, [PUBLIC], ["127.0.0.1"])
    check("https://hooks.example/")
    assert not send(receiver.url.replace("127.0.0.1", "hooks.example"))
    assert not send(receiver.url), "nor does an address"
    assert receiver.got == []


def test_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    resolving(monkeypatch, ["127.0.0.1"], [PUBLIC])
    monkeypatch.setattr(source, "is_public", lambda address: address == "127.0.0.1")
    assert send(receiver.url.replace("127.0.0.1", "hooks.example"))
    assert receiver.got[0]["headers"]["host"].startswith("hooks.example:")
