"""A client for Cog's HTTP API, for our own commands; applications use Replicate's.

Knows the routes and the stream's events; leaves what is asked to its callers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cogpress.errors import CogpressError

_TIMEOUT = httpx.Timeout(10.0, read=None)
"""Connecting is quick or fails; an answer takes as long as it takes."""


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
    """What a server says of itself; None where none answers."""
    try:
        answer = httpx.get(f"{url}/health-check", timeout=2).json()
    except (httpx.HTTPError, ValueError):
        return None
    return answer if isinstance(answer, dict) and "status" in answer else None


def openapi(url: str) -> dict[str, Any]:
    """A server's OpenAPI document."""
    response = _request("GET", f"{url}/openapi.json")
    return dict(response.json())


def predict(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a prediction to its end and return it whole.

    Raises:
        CogpressError: the input is refused, every slot is taken, or the prediction fails.
    """
    return _finished(_request("POST", f"{url}/predictions", json={"input": inputs}).json())


def train(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a training on a server in training mode to its end and return it whole; raises as `predict` does."""
    return _finished(_request("POST", f"{url}/trainings", json={"input": inputs}).json())


def cancel(url: str, identifier: str) -> bool:
    """Cancel a running prediction; False where there is none of that id."""
    return httpx.post(f"{url}/predictions/{identifier}/cancel", timeout=_TIMEOUT).status_code == 200


def stream(url: str, inputs: dict[str, Any], identifier: str | None = None) -> Iterator[Event]:
    """Run a prediction and yield its events as they arrive. Closing the iterator cancels the prediction.

    Raises:
        CogpressError: as `predict`.
    """
    route = f"{url}/predictions/{identifier}" if identifier else f"{url}/predictions"
    headers = {"Accept": "text/event-stream"}
    try:
        with httpx.stream(
            "PUT" if identifier else "POST", route, json={"input": inputs}, headers=headers, timeout=_TIMEOUT
        ) as response:
            if response.status_code != 200:
                response.read()
                raise _refused(response)
            for name, data in _events(response.iter_lines()):
                yield _event(name, data)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from None


def _events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events: name and parsed data."""
    name, data = "message", []
    for line in lines:
        if not line and data:
            yield name, json.loads("\n".join(data))
            name, data = "message", []
        elif line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))


def _event(name: str, data: dict[str, Any]) -> Event:
    if name == "output":
        return Event(name, text=str(data["chunk"]), data=data)
    if name == "completed":
        return Event(name, metrics=_finished(data).get("metrics") or {}, data=data)
    return Event(name, text=str(data.get("data", "")) if name == "log" else "", data=data)


def _finished(prediction: dict[str, Any]) -> dict[str, Any]:
    if prediction.get("status") == "failed":
        raise CogpressError(str(prediction.get("error") or "The prediction failed; the server's log tells why."))
    return prediction


def _request(method: str, url: str, **options: Any) -> httpx.Response:
    try:
        response = httpx.request(method, url, timeout=_TIMEOUT, **options)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from None
    if response.status_code >= 400:
        raise _refused(response)
    return response


def _unreachable(url: str, error: httpx.HTTPError) -> CogpressError:
    return CogpressError(f"{url} does not answer ({error or type(error).__name__}). Start a server with scripts/serve.")


def _refused(response: httpx.Response) -> CogpressError:
    if response.status_code == 409:
        return CogpressError("The server is busy: every slot is taken. Try again when a prediction has ended.")
    try:
        detail = response.json().get("detail") or response.json().get("error")
    except ValueError:
        detail = response.text
    if isinstance(detail, list):
        detail = "; ".join(f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg')}" for item in detail)
    return CogpressError(f"The server refuses the input ({response.status_code}): {detail}")
