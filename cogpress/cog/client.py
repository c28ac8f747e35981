"""The client of a Cog server's HTTP API; applications use Replicate's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cogpress import http
from cogpress.cog.reasons import WORD
from cogpress.errors import CogpressError

_TIMEOUT = httpx.Timeout(10.0, read=None)
"""Connecting is quick or fails; an answer may take any time."""


DEAD = frozenset({"SETUP_FAILED", "DEFUNCT", "UNHEALTHY"})
"""Statuses of a health report after which a server takes no prediction any more."""

_NOT_SENT = "Failed to send request"
"""How the runtime's own error begins where its worker had ended: the prediction never began."""

_WORKER_ENDED = (_NOT_SENT, "Worker crashed", "Worker fatal")
"""How it begins where the worker ended before or during the prediction."""

_AROUND_ERRORS = re.compile(
    rf"(?:(?:(?:Async )?(?:prediction|training) failed|Generator iteration error|CogpressError|{WORD}): )+",
    re.IGNORECASE,
)
"""Prefixes that the runtime adds to a runner's error."""


class BusyError(CogpressError):
    """Every slot of the server is taken; the same request may succeed a moment later."""


@dataclass(frozen=True)
class Event:
    """One event of a stream: `start`, `output` with text, `log` with text, `metric`, or `completed`.

    `data` is what the server sent; `metrics` is set on the last event.
    """

    kind: str
    text: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def health(url: str) -> dict[str, Any] | None:
    """A server's health report; None where none answers within two seconds."""
    try:
        with http.connect(url, timeout=2.0) as opened:
            answer = opened.get(f"{url}/health-check").json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return answer if isinstance(answer, dict) and "status" in answer else None


def openapi(url: str) -> dict[str, Any]:
    """A server's OpenAPI document.

    Raises:
        CogpressError: no server answers, or it has no document.
    """
    return dict(_request("GET", url, "/openapi.json").json())


def predict(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a prediction to its end and return it, succeeded or canceled. Inputs that are None are left out.

    Raises:
        BusyError: every slot is taken.
        CogpressError: the input is refused, or the prediction fails.
    """
    return _finished(_request("POST", url, "/predictions", _body(inputs)).json())


def train(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a training to its end on a server in training mode and return it; raises as `predict` does.

    Output files come as data URLs.
    """
    return _finished(_request("POST", url, "/trainings", _body(inputs)).json())


def cancel(url: str, identifier: str) -> bool:
    """Cancel a running prediction; False where no prediction has this id."""
    try:
        _request("POST", url, f"/predictions/{identifier}/cancel")
    except _NotFound:
        return False
    return True


def stream(url: str, inputs: dict[str, Any], identifier: str | None = None) -> Iterator[Event]:
    """Run a prediction and yield its events as they arrive.

    Closing the iterator cancels the prediction, except between `start` and the runner's first output: the runtime loses
    a cancellation that comes before the runner begins.

    Args:
        url: a Cog server whose runner streams.
        inputs: the prediction's input; those that are None are left out.
        identifier: an id to `cancel` the prediction with.

    Raises:
        CogpressError: as `predict`, or the stream breaks off.
    """
    method, route = ("PUT", f"/predictions/{identifier}") if identifier else ("POST", "/predictions")
    try:
        with (
            http.connect(url, timeout=_TIMEOUT) as opened,
            opened.stream(method, f"{url}{route}", json=_body(inputs), headers=http.EVENT_STREAM) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise _refused(response)
            for event in http.events(response):
                yield _event(event.event, json.loads(event.data))
                if event.event == "completed":
                    return
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(url, error) from None
    raise CogpressError(f"{url} broke off the stream before its end. Look into the server's log.")


def _body(inputs: dict[str, Any]) -> dict[str, Any]:
    # The runtime refuses null, even for an optional input.
    return {"input": {name: value for name, value in inputs.items() if value is not None}}


def _event(name: str, data: dict[str, Any]) -> Event:
    if name == "error":
        raise CogpressError(f"The stream is incomplete: {data.get('error') or data}. Run the prediction again.")
    if name == "output":
        return Event(name, text=str(data["chunk"]), data=data)
    if name == "completed":
        return Event(name, metrics=_finished(data).get("metrics") or {}, data=data)
    return Event(name, text=str(data.get("data", "")) if name == "log" else "", data=data)


def _finished(prediction: dict[str, Any]) -> dict[str, Any]:
    if prediction.get("status") == "failed":
        raise CogpressError(plain_error(str(prediction.get("error") or "")))
    return prediction


def never_began(error: str) -> bool:
    """Whether a prediction failed because the server's worker has ended."""
    return error.startswith(_NOT_SENT)


def worker_ended(error: str) -> bool:
    """Whether a prediction failed because the server's worker ended, before it or during it."""
    return error.startswith(_WORKER_ENDED)


def said(error: str) -> str:
    """What the runner itself says in an error, without the runtime's prefixes; empty where it says nothing."""
    around = _AROUND_ERRORS.match(error)
    return "" if worker_ended(error) else error[around.end() if around else 0 :]


def plain_error(error: str) -> str:
    """A runner's error as a sentence."""
    if never_began(error):
        return "The server has stopped working. See its log, and restart it."
    if worker_ended(error):
        return "The model's process ended while this ran. See the server's log, then run it again."
    return said(error) or "The prediction failed. Look into the server's log."


class _NotFound(CogpressError):
    """The server has no such route or prediction."""


def _request(method: str, url: str, route: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        with http.connect(url, timeout=_TIMEOUT) as opened:
            response = opened.request(method, f"{url}{route}", json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(url, error) from None
    if response.status_code >= 400:
        raise _refused(response)
    return response


def _unreachable(url: str, error: Exception) -> CogpressError:
    return CogpressError(f"{url} does not answer ({http.reason(error)}). Start a server with scripts/serve.")


def refusal(content: bytes) -> str:
    """What the body of a refusal says: its `detail`, with each invalid input by name, or its `error`; else itself."""
    try:
        answer = json.loads(content)
        detail = answer.get("detail") or answer.get("error") or answer
    except (ValueError, AttributeError):
        detail = content[:300].decode(errors="replace")
    if isinstance(detail, list) and all(isinstance(item, dict) for item in detail):
        detail = "; ".join(f"{'.'.join(map(str, item.get('loc', ())[2:]))}: {item.get('msg')}" for item in detail)
    return str(detail)


def _refused(response: httpx.Response) -> CogpressError:
    detail = refusal(response.content)
    if response.status_code == 409:
        # The runtime refuses so too when its worker or engine is gone.
        at = response.request.url
        report = health(f"{at.scheme}://{at.netloc.decode()}") or {}
        if report.get("status") in DEAD:
            return CogpressError(f"The server has stopped working ({report['status']}). See its log, and restart it.")
        return BusyError(f"The server is busy ({detail}). Try again when a prediction has ended.")
    if response.status_code == 404:
        return _NotFound(f"The server has no {response.request.url.path}.")
    if response.status_code == 422:
        return CogpressError(f"The server rejects the input (422): {detail}")
    return CogpressError(f"The server answers {response.status_code}: {detail}")
