"""Requests to a JSON API over HTTP: asked with a token, repeated while the server is busy, refusals explained.

Knows HTTP and that a token is a secret; leaves what the answers mean to who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from cogpress.cog import client
from cogpress.errors import CogpressError

BUSY = {429, 500, 502, 503, 504}
"""Answers that a later try may change."""

WAITS = (0.5, 1.0, 2.0)
"""Seconds before each further try, where the server names none."""

LONGEST_WAIT = 20.0
"""Seconds: a check that waits longer is no help."""

REFUSED = {
    401: ("does not know the token", "Set REPLICATE_API_TOKEN to one that is valid."),
    402: ("asks for a payment method", "Add one at replicate.com/account/billing."),
    403: ("does not let this token see it", "Take a token of the owner, or of a member of the organisation."),
    404: ("does not have it", "Check the name and REPLICATE_BASE_URL."),
    409: ("says that it collides with what is there", "Look at replicate.com what is there, and run it again."),
    422: ("does not take what was sent", "Correct what it names."),
}
"""What a refusal of Replicate's means, and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a server said: the status, and the JSON of a good answer."""

    status: int
    content: Any
    detail: str = ""


class Api:
    """One server, asked by `get` and `send`."""

    def __init__(
        self,
        base: str,
        token: str | None,
        name: str,
        pause: Callable[[float], object] = time.sleep,
        *,
        waits: Sequence[float] | None = None,
        longest: float = LONGEST_WAIT,
    ) -> None:
        """Describe it; nothing is asked yet.

        Args:
            base: the address before the routes.
            token: sent as a bearer token, and never shown.
            name: what messages call the server.
            pause: waits between tries.
            waits: seconds before each further try; `WAITS` where not given.
            longest: the most seconds to wait where the server names them.
        """
        self.base, self.name, self._pause, self._longest = base.rstrip("/"), name, pause, longest
        self._waits = WAITS if waits is None else tuple(waits)
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
        return self.send("GET", route)

    def send(self, method: str, route: str, body: Any = None, *, once: bool = False, **more: Any) -> Answer:
        """The answer to one request, good or refused.

        Args:
            method: of HTTP.
            route: after the address.
            body: sent as JSON; None for none.
            once: what must not be done twice; then it is repeated only where the server has not begun with it.
            more: for httpx, such as `files`.

        Raises:
            CogpressError: the server can not be reached, or stays busy.
        """
        for wait in (*self._waits, None):
            try:
                response = self._http.request(method, self.base + route, json=body, **more)
                problem = f"answered {response.status_code}"
                if response.status_code not in ({429} if once else BUSY):
                    return _answer(response, self.name)
                if wait is not None:
                    wait = _asked(response.headers.get("retry-after"), wait, self._longest)
            except httpx.HTTPError as error:
                problem = f"can not be reached ({type(error).__name__})"
                if once and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    raise CogpressError(
                        f"{self.name} {problem} while it was asked to begin something. Look at replicate.com whether "
                        "it has begun before you run this again."
                    ) from None
            if wait is None:
                break
            self._pause(wait)
        raise CogpressError(f"{self.name} {problem}, {len(self._waits) + 1} times.")


def _asked(header: str | None, otherwise: float, longest: float = LONGEST_WAIT) -> float:
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
    return min(max(seconds, 0.0), longest)


def _answer(response: httpx.Response, name: str) -> Answer:
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.is_success:
        if content is None and response.status_code != 204:
            raise CogpressError(f"{name} answered with something that is no JSON: is that its address?")
        return Answer(response.status_code, content)
    told = content.get("detail") or content.get("error") if isinstance(content, dict) else None
    return Answer(response.status_code, None, told if isinstance(told, str) else "")
