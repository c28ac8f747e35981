"""Small questions to a JSON API over HTTP: asked with a token, repeated while the server is busy, refusals explained.

Knows HTTP and that a token is a secret; leaves what the answers mean to who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from cogpress import client
from cogpress.errors import CogpressError

BUSY = {429, 500, 502, 503, 504}
"""Answers that a later try may change."""

WAITS = (0.5, 1.0, 2.0)
"""Seconds before each further try, where the server names none."""

LONGEST_WAIT = 20.0
"""Seconds: a check that waits longer is no help."""


@dataclass(frozen=True)
class Answer:
    """What a server said: the status, and the JSON of a good answer."""

    status: int
    content: Any
    detail: str = ""


class Api:
    """One server, asked by `get`."""

    def __init__(self, base: str, token: str | None, name: str, pause: Callable[[float], object] = time.sleep) -> None:
        """Describe it; nothing is asked yet.

        Args:
            base: the address before the routes.
            token: sent as a bearer token, and never shown.
            name: what messages call the server.
            pause: waits between tries.
        """
        self.base, self.name, self._pause = base.rstrip("/"), name, pause
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            headers=headers, timeout=10, trust_env=not client.is_loopback(httpx.URL(self.base).host)
        )

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def get(self, route: str) -> Answer:
        """The answer to one question, good or refused.

        Raises:
            CogpressError: the server can not be reached, or stays busy.
        """
        for wait in (*WAITS, None):
            try:
                response = self._http.get(self.base + route)
                problem = f"answered {response.status_code}"
                if response.status_code not in BUSY:
                    return _answer(response, self.name)
                wait = None if wait is None else _asked(response.headers.get("retry-after"), wait)
            except httpx.HTTPError as error:
                problem = f"can not be reached ({type(error).__name__})"
            if wait is None:
                break
            self._pause(wait)
        raise CogpressError(f"{self.name} {problem}, {len(WAITS) + 1} times.")


def _asked(header: str | None, otherwise: float) -> float:
    """Seconds to wait, as `Retry-After` says: a number, or a date."""
    if not header:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            seconds = otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _answer(response: httpx.Response, name: str) -> Answer:
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.is_success:
        if content is None:
            raise CogpressError(f"{name} answered with something that is no JSON: is that its address?")
        return Answer(response.status_code, content)
    told = content.get("detail") or content.get("error") if isinstance(content, dict) else None
    return Answer(response.status_code, None, told if isinstance(told, str) else "")
