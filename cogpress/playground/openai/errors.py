"""Errors in OpenAI's form, for the routes that OpenAI's clients call.

Knows what such an error looks like and which of OpenAI's kinds a fault is; leaves finding faults to the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogpress.engines.base import DEAD

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

_OURS = re.compile(r"/v1/(?:chat/completions|completions|models(?:/[^/]+){0,2})/?")
"""The paths whose errors OpenAI's clients read."""

_KINDS = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}

_REFUSALS = ("The model server refuses", "Replicate refuses (422)")
"""How a backend tells that the model does not take an input."""

_BROKEN = re.compile(
    r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b"
    r"|The (?:model server (?!refuses)|model's server|local Replicate)"
)
"""How a failure is told that is not a refusal: by an exception's name, or as news of a server."""


class Wrong(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        """Describe it.

        Args:
            message: what is wrong and what to do.
            param: the parameter that is wrong.
            status: of HTTP.
            code: OpenAI's word for it, or one in its manner.
        """
        super().__init__(message)
        self.status = status
        self.body = body(message, status, param, code)


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI gives it."""
    kind, usual = _KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def of(prediction: Prediction) -> Wrong | None:
    """What a prediction ended with, None where that is its answer.

    A model refuses an input by failing before it says anything, with a sentence; what is none, but an exception's name
    or the news of a server that is gone, is not the asker's fault.
    """
    if prediction.status == "canceled":
        return Wrong("The prediction was canceled.", status=500, code="canceled")
    if prediction.status != "failed":
        return None
    message = prediction.error or "The prediction failed."
    if prediction.started_at is None and not message.startswith(_REFUSALS):
        return Wrong(message, status=503, code="model_unavailable")
    broken = message == DEAD or _BROKEN.match(message) is not None
    if prediction.output is None and not broken:
        return Wrong(message, code="refused_by_model")
    return Wrong(message, status=500, code="prediction_failed")


class Face:
    """Stands before everything and gives errors on OpenAI's routes OpenAI's form, whoever found them.

    The list of models is Replicate's as well, so an error there keeps Replicate's keys beside OpenAI's.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and rewrite an answer that is a problem."""
        if scope["type"] != "http" or not _OURS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        keep = scope["path"].startswith("/v1/models")
        start: MutableMapping[str, Any] | None = None
        content = b""

        async def rewriting(message: Message) -> None:
            nonlocal start, content
            if message["type"] == "http.response.start":
                if (b"content-type", b"application/problem+json") in message["headers"]:
                    start = message
                    return
            elif start is not None:
                content += message.get("body", b"")
                if message.get("more_body"):
                    return
                content = _translated(content, keep=keep)
                kind = b"application/problem+json" if keep else b"application/json"
                changed = {b"content-type": kind, b"content-length": str(len(content)).encode()}
                headers = [(name, changed.get(name.lower(), value)) for name, value in start["headers"]]
                await send({**start, "headers": headers})
                message = {"type": "http.response.body", "body": content}
            await send(message)

        await self._app(scope, receive, rewriting)


def _translated(content: bytes, *, keep: bool) -> bytes:
    problem = json.loads(content)
    made = body(problem["detail"], problem["status"])
    return json.dumps({**problem, **made} if keep else made).encode()
