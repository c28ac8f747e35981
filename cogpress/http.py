"""Requests to web servers: what may be asked, tried again and said, and what a server tells of a file.

Knows HTTP and that a URL can hold a secret; leaves files to `download`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from cogpress import source
from cogpress.errors import CogpressError

CONNECTIONS = 8
"""Requests at once."""

TRIES = 6
"""How often a request is made without getting on, before the download fails."""

BACKOFF = 0.5
"""Seconds before the second try; doubled for each later one."""

PROGRESS = 1 << 20
"""Bytes that count as getting on."""

_BUSY = {408, 425, 429, 500, 502, 503, 504}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Remote:
    """A file on a server, as the server described it.

    Attributes:
        url: where it is; can hold a signature.
        size: bytes; None where the server does not say.
        validator: a strong ETag or the date of the last change, by which ranges of one version are told from another's.
        ranges: whether the server sends parts of it.
    """

    url: str
    size: int | None
    validator: str | None
    ranges: bool

    @property
    def key(self) -> str:
        """A name for this version of the file."""
        return hashlib.sha256(f"{self.url}|{self.validator}|{self.size}".encode()).hexdigest()[:24]

    @property
    def shown(self) -> str:
        """The URL without what can be secret."""
        return source.shown(self.url)


def look(urls: Sequence[str]) -> list[Remote]:
    """Ask for each file's size and version, without fetching it.

    Raises:
        CogpressError: a server can not be reached or refuses.
    """
    with client() as opened, ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(functools.partial(_look, opened), urls))


def read(url: str, most: int) -> bytes:
    """The content of a small file.

    Raises:
        CogpressError: it can not be had, or is larger than `most` bytes.
    """

    def get() -> bytes:
        content = bytearray()
        with request(opened, url) as response:
            for block in response.iter_raw():
                content += block
                if len(content) > most:
                    raise CogpressError(f"{source.shown(url)} is larger than {most >> 20} MB, so it is not a list.")
        return bytes(content)

    with client() as opened:
        return retried(get, source.shown(url))


class _Busy(Exception):
    """The server can not answer now."""


def retried(
    action: Callable[[], _T],
    shown: str,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], Any] = time.sleep,
) -> _T:
    """Do it again after cuts and while the server is busy, for as long as it gets on.

    Args:
        action: makes a request.
        shown: what messages call it.
        progress: bytes that arrived so far.
        pause: waits so many seconds.

    Raises:
        CogpressError: it failed `TRIES` times without getting on.
    """
    failures, before = 0, progress()
    while True:
        try:
            return action()
        except (httpx.TransportError, _Busy) as error:
            failures = 1 if progress() - before >= PROGRESS else failures + 1
            before = progress()
            if failures >= TRIES:
                reason = str(error) if isinstance(error, _Busy) else type(error).__name__
                raise CogpressError(
                    f"{shown} can not be downloaded: {reason}, {failures} times in a row. Check the network and start "
                    "again."
                ) from None
            pause(min(BACKOFF * 2 ** (failures - 1), 30.0))


@contextmanager
def client() -> Iterator[httpx.Client]:
    """Connections of one task."""
    # At their usual level these write each URL, with its signature, to whatever log the program keeps.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(30, pool=None),
        # What is counted, resumed and hashed are the file's own bytes.
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [_check_allowed]},
    ) as opened:
        yield opened


def _check_allowed(asked: httpx.Request) -> None:
    """Called for redirected requests too."""
    if not source.allowed(str(asked.url)):
        raise CogpressError(f"{source.shown(str(asked.url))}, where the server redirects to, is not https.")


@contextmanager
def request(opened: httpx.Client, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx.Response]:
    """An answer whose body is not read yet: a good one, or 416 for a range that is not there.

    To be called within `retried`.

    Raises:
        CogpressError: the server refuses.
    """
    try:
        with opened.stream("GET", url, headers=headers) as response:
            status = response.status_code
            if status in _BUSY:
                raise _Busy(f"the server answered {status}")
            if not (200 <= status < 300 or status == 416):
                raise CogpressError(f"{source.shown(url)}: the server answered {status}. Check the URL.")
            yield response
    except (httpx.InvalidURL, httpx.TooManyRedirects, UnicodeError) as error:
        raise CogpressError(f"{source.shown(url)} can not be fetched: {type(error).__name__}. Check it.") from None


def _look(opened: httpx.Client, url: str) -> Remote:
    def ask() -> Remote:
        # One byte: a signed URL often allows GET alone, not HEAD.
        with request(opened, url, {"Range": "bytes=0-0"}) as response:
            headers = response.headers
            tag = headers.get("etag", "")
            validator = tag if tag and not tag.startswith("W/") else headers.get("last-modified")
            if response.status_code == 206:
                size = headers.get("content-range", "").rpartition("/")[2]
            elif response.status_code == 416:
                size = "0"
            else:
                size = headers.get("content-length", "")
            known = int(size) if size.isascii() and size.isdecimal() else None
            return Remote(url, known, validator, ranges=response.status_code == 206)

    return retried(ask, source.shown(url))
