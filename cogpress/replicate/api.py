"""Replicate's API as a push and a training use it: models, versions, predictions, trainings, deployments, files.

Knows routes and what a refusal means; leaves repeating to `preflight.web` and what is asked to its callers. The token
is sent in a header to Replicate alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from cogpress import source
from cogpress.cog import client
from cogpress.errors import CogpressError
from cogpress.preflight.facts import REPLICATE
from cogpress.preflight.web import REFUSED, Answer, Api
from cogpress.redact import redacted

ENDED = ("succeeded", "failed", "canceled", "aborted")

POLL_SECONDS = 0.5

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try, where Replicate names none."""

LONGEST_WAIT = 120.0
"""Seconds that Replicate may ask to wait."""


class RefusedError(CogpressError):
    """Replicate answered with a 4xx: `status`."""

    def __init__(self, status: int, text: str) -> None:
        """Note the status and what to say of it."""
        super().__init__(text)
        self.status = status


class Replicate:
    """Replicate, asked with the token of the environment."""

    def __init__(self, token: str, base: str = REPLICATE, pause: Callable[[float], object] = time.sleep) -> None:
        """Describe it; nothing is asked yet.

        Args:
            token: the account's.
            base: the API's address without `/v1`.
            pause: waits so many seconds.
        """
        self.token, self.base, self.pause = token, base.rstrip("/"), pause
        name = f"Replicate's API at {source.shown(self.base)}"
        self._api = Api(self.base, token, name, pause, waits=WAITS, longest=LONGEST_WAIT)

    def close(self) -> None:
        """End its connections."""
        self._api.close()

    def ask(self, method: str, route: str, body: Any = None, *, what: str = "", once: bool = False, **more: Any) -> Any:
        """The content of a good answer.

        Args:
            method: of HTTP.
            route: after the address.
            body: sent as JSON.
            what: what messages call it.
            once: what must not be begun twice.
            more: for httpx.

        Raises:
            RefusedError: a 4xx, explained.
            CogpressError: it can not be reached, or stays busy.
        """
        answer = self._api.send(method, route, body, once=once, **more)
        if 200 <= answer.status < 300:
            return answer.content
        raise RefusedError(answer.status, redacted(_explained(answer, what or route), self.token))

    def find(self, route: str, what: str = "") -> dict[str, Any] | None:
        """What is at a route; None where nothing is."""
        try:
            return dict(self.ask("GET", route, what=what))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def account(self) -> str:
        """Whose token it is."""
        return str(self.ask("GET", "/v1/account", what="the account")["username"])

    def model(self, name: str) -> dict[str, Any] | None:
        """A model by its owner/name; None where there is none."""
        return self.find(f"/v1/models/{name}", name)

    def versions(self, name: str) -> list[dict[str, Any]]:
        """A model's versions, the newest first."""
        return list(self.ask("GET", f"/v1/models/{name}/versions", what=f"the versions of {name}")["results"])

    def version(self, name: str, identifier: str) -> dict[str, Any] | None:
        """A version of a model; None where there is none."""
        return self.find(f"/v1/models/{name}/versions/{identifier}", f"version {identifier[:12]} of {name}")

    def predict(self, version: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Create a prediction, which then runs."""
        body = {"version": version, "input": inputs, "stream": True}
        return dict(self.ask("POST", "/v1/predictions", body, what=f"a prediction of version {version[:12]}"))

    def prediction(self, identifier: str) -> dict[str, Any]:
        """A prediction as it is now."""
        return dict(self.ask("GET", f"/v1/predictions/{identifier}", what=f"prediction {identifier}"))

    def cancel(self, identifier: str, kind: str = "predictions") -> dict[str, Any]:
        """Cancel a prediction, or a training (`kind`)."""
        return dict(self.ask("POST", f"/v1/{kind}/{identifier}/cancel", what=f"the end of {identifier}"))

    def wait(self, made: dict[str, Any], seconds: float, until: tuple[str, ...] = ENDED) -> dict[str, Any]:
        """A prediction when its status is one of `until`, or as it is when time is up."""
        began = time.monotonic()
        while made.get("status") not in (*until, *ENDED) and time.monotonic() - began < seconds:
            self.pause(min(POLL_SECONDS, 0.05 + (time.monotonic() - began) / 4))
            made = self.prediction(made["id"])
        return made

    def stream(self, made: dict[str, Any], seconds: float) -> Iterator[tuple[str, str]]:
        """Name and text of each event of a prediction's stream.

        Raises:
            CogpressError: it has none, or the stream breaks off.
        """
        url = str((made.get("urls") or {}).get("stream") or "")
        if not source.allowed(url):
            raise CogpressError("Replicate gives no address for the stream. Add @cog.streaming to the runner's run().")
        # Without the token: the address itself lets in, and it can be another machine's.
        timeout = httpx.Timeout(10.0, read=seconds)
        try:
            with (
                client.connect(url, timeout) as http,
                http.stream("GET", url, headers={"Accept": "text/event-stream"}) as response,
            ):
                if response.status_code != 200:
                    raise CogpressError(f"The stream answers {response.status_code} instead of text.")
                for name, data in client.server_sent(response.iter_bytes()):
                    yield name, data.decode(errors="replace")
                    if name == "done":
                        return
        except httpx.HTTPError as error:
            raise CogpressError(f"The stream broke off ({type(error).__name__}).") from None
        raise CogpressError("The stream ended without its last event.")

    def upload(self, path: Path) -> str:
        """Upload a file; the address under which Replicate's own models get it.

        Raises:
            CogpressError: there is no such file, or it is refused.
        """
        try:
            # Read whole, as a second try needs it again.
            content = path.read_bytes()
        except OSError as error:
            raise CogpressError(f"{path} can not be read: {error.strerror}. Name a file.") from None
        files = {"content": (path.name, content, "application/octet-stream")}
        what = f"the upload of {path.name}"
        return str(self.ask("POST", "/v1/files", files=files, timeout=300, what=what)["urls"]["get"])


def _explained(answer: Answer, what: str) -> str:
    told = f": {answer.detail.strip().rstrip('.')}" if answer.detail.strip() else ""
    reason, fix = REFUSED.get(answer.status, (f"answers {answer.status}", "Read what it says and run it again."))
    return f"Asked for {what}, Replicate {reason}{' '.join(told.split(chr(10)))}. {fix}"


def connect() -> Replicate:
    """Replicate as the environment names it.

    Raises:
        CogpressError: there is no token, or the address is not safe to send it to.
    """
    token = os.environ.get("REPLICATE_API_TOKEN", "").strip()
    if not token:
        raise CogpressError(
            "REPLICATE_API_TOKEN is not set. Set it to a token from replicate.com/account/api-tokens, in no file here."
        )
    base = os.environ.get("REPLICATE_BASE_URL") or REPLICATE
    if not source.allowed(base):
        raise CogpressError(f"{source.shown(base)} (REPLICATE_BASE_URL) is neither https nor this machine. Correct it.")
    return Replicate(token, base)


def text_of(output: Any) -> str:
    """An output as one text: the chunks of a stream joined, anything but text as JSON."""
    if isinstance(output, list) and all(isinstance(one, str) for one in output):
        return "".join(output)
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
