"""Servers that the playground's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cogpress.cog.process import Server
from tests.standins.localreplicate import TOKEN, Local, echoing
from tests.standins.teller import telling


@pytest.fixture(scope="session")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that answers what a message tells it to."""
    with telling(tmp_path_factory.mktemp("teller")) as cog:
        yield cog


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of few inputs that repeats a word."""
    with echoing(tmp_path_factory.mktemp("echo")) as cog:
        yield cog


@pytest.fixture(scope="session")
def local(teller: Server, echo: Server) -> Iterator[Local]:
    """The playground with both models."""
    models = [("teller", teller.url), ("acme/echo", echo.url)]
    with Local(teller.root, models, token=TOKEN, adapters=["blue"], options={"max_input_mb": 1}) as local:
        yield local
