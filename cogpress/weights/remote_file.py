"""Files on servers: what a server says of one, its content if it is small, and requests that begin again."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from cogpress import http, source
from cogpress.errors import CogpressError

CONNECTIONS = 8
"""Concurrent requests of a download."""

SILENCE_SECONDS = 30.0
"""How long a server may send nothing before the download is tried again."""

PROGRESS = 1 << 20
"""Bytes that count as progress."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, as the server describes it.

    Attributes:
        url: may hold a signature.
        size: bytes; None where the server does not say.
        validator: a strong ETag or the date of the last change, by which a server knows what to go on with.
        ranges: whether the server sends parts of it.
        version: all that the server says to tell versions of the file apart; None where it says nothing.
    """

    url: str
    size: int | None
    validator: str | None
    ranges: bool
    version: str | None

    @property
    def key(self) -> str:
        """Names this version of the file, as far as the server tells."""
        return hashlib.sha256(f"{self.url}|{self.version}|{self.size}".encode()).hexdigest()[:24]

    @property
    def shown(self) -> str:
        """The URL without what can be secret."""
        return source.shown(self.url)


def look(urls: Sequence[str]) -> list[RemoteFile]:
    """Each file's size and version, without downloading it.

    Raises:
        CogpressError: a server cannot be reached or refuses.
    """
    with client() as opened, ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(functools.partial(_look, opened), urls))


def read(url: str, most: int) -> bytes:
    """The content of a small file.

    Raises:
        CogpressError: it cannot be downloaded, or is larger than `most` bytes.
    """

    def get() -> bytes:
        content = bytearray()
        with request(opened, url) as response:
            for block in response.iter_raw():
                content += block
                if len(content) > most:
                    raise CogpressError(f"{source.shown(url)} is larger than {most >> 20} MB. Check the URL.")
        return bytes(content)

    with client() as opened:
        return retried(get, source.shown(url))


def retried(
    action: Callable[[], _T],
    shown: str,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], Any] = time.sleep,
) -> _T:
    """Repeat a request whose body breaks off, for as long as it makes progress.

    Args:
        action: makes the request and reads its body.
        shown: its name in messages.
        progress: bytes that arrived so far.
        pause: waits so many seconds.

    Raises:
        CogpressError: it failed `http.TRIES` times without progress.
    """
    failures, before = 0, progress()
    while True:
        try:
            return action()
        except httpx.TransportError as error:
            failures = 1 if progress() - before >= PROGRESS else failures + 1
            before = progress()
            if failures >= http.TRIES:
                raise _not_downloaded(shown, http.reason(error)) from None
            pause(min(http.BACKOFF * 2 ** (failures - 1), http.LONGEST_BACKOFF))


def _not_downloaded(shown: str, reason: str) -> CogpressError:
    return CogpressError(
        f"Could not download {shown}: {reason}, {http.TRIES} times in a row. Check the network and start again."
    )


@contextmanager
def client() -> Iterator[httpx.Client]:
    """A client for files from any server, which repeats requests until a response begins."""
    http.quiet()
    opened = httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(SILENCE_SECONDS, pool=None),
        # What is counted, resumed and hashed are the file's own bytes.
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [_check_allowed]},
    )
    with http.with_retries(opened, http.retries(http.TRIES, http.LONGEST_BACKOFF)):
        yield opened


def _check_allowed(asked: httpx.Request) -> None:
    """Called for redirected requests too."""
    if not source.allowed(str(asked.url)):
        raise CogpressError(f"{source.shown(str(asked.url))}, where the server redirects to, is not https.")


@contextmanager
def request(opened: httpx.Client, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx.Response]:
    """A response whose body is not read yet: a good one, or 416 for a range that does not exist.

    Reading the body may raise `httpx.TransportError`: see `retried`.

    Raises:
        CogpressError: the server cannot be reached or refuses.
    """
    shown = source.shown(url)
    try:
        response = opened.send(opened.build_request("GET", url, headers=headers), stream=True)
    except httpx.TransportError as error:
        raise _not_downloaded(shown, http.reason(error)) from None
    except (httpx.InvalidURL, httpx.TooManyRedirects, UnicodeError) as error:
        raise CogpressError(f"Could not download {shown}: {http.reason(error)}. Check the URL.") from None
    with closing(response):
        status = response.status_code
        if status in http.BUSY:
            raise _not_downloaded(shown, f"the server answered {status}")
        if not (200 <= status < 300 or status == 416):
            raise CogpressError(f"{shown}: the server answered {status}. Check the URL.")
        yield response


def _look(opened: httpx.Client, url: str) -> RemoteFile:
    def ask() -> RemoteFile:
        # One byte: a signed URL often allows GET alone, not HEAD.
        with request(opened, url, {"Range": "bytes=0-0"}) as response:
            headers = response.headers
            tag = headers.get("etag", "")
            date = headers.get("last-modified")
            validator = tag if tag and not tag.startswith("W/") else date
            if response.status_code == 206:
                size = headers.get("content-range", "").rpartition("/")[2]
            elif response.status_code == 416:
                size = "0"
            else:
                size = headers.get("content-length", "")
            known = int(size) if size.isascii() and size.isdecimal() else None
            version = "|".join(filter(None, (tag, date))) or None
            return RemoteFile(url, known, validator, ranges=response.status_code == 206, version=version)

    return retried(ask, source.shown(url))
