"""Errors in OpenAI's form, and middleware that gives every error on OpenAI's routes that form."""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogpress.engines.base import CONTEXT_EXCEEDED, CRASHED, DEAD, INCOMPLETE
from cogpress.playground.records import Prediction

_TEXT_ONLY = "This server's models answer with text. Use /v1/chat/completions."
NOT_HERE = {
    "/v1/responses": "This server has no Responses API. Use /v1/chat/completions, which takes messages and tools.",
    "/v1/embeddings": "This server's models give no embeddings. Use /v1/chat/completions, or another model.",
    "/v1/moderations": _TEXT_ONLY,
    "/v1/images/generations": _TEXT_ONLY,
    "/v1/audio/speech": _TEXT_ONLY,
    "/v1/audio/transcriptions": _TEXT_ONLY,
}
"""Paths of OpenAI's API that are not served, and the way out."""

_PATHS = re.compile(
    rf"/v1/(?:chat/completions|completions|models(?:/[^/]+){{0,2}})/?|(?:{'|'.join(map(re.escape, NOT_HERE))})/?"
)
"""Paths that OpenAI's clients call."""

API_KEY = "Use a token from replicate.com/account/api-tokens as the client's API key."

_KINDS = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}

_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b")
"""The start of the error of a model that crashed instead of rejecting an input."""


_FAULTS = (CRASHED, DEAD, INCOMPLETE)
"""Errors of a model that are the server's fault."""


class OpenAIError(Exception):
    """An error response in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        """An error response.

        Args:
            message: what is wrong and what to do.
            param: the invalid parameter.
            status: HTTP status.
            code: machine-readable, OpenAI's own where there is one.
        """
        super().__init__(message)
        self.status = status
        self.body = body(message, status, param, code)


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error in OpenAI's form."""
    kind, usual = _KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def refused(message: str, status: int) -> OpenAIError:
    """What a caller is told that Replicate refuses: their token, or their account."""
    if status == 401:
        return OpenAIError(f"Replicate rejects the API key. {API_KEY}", status=401)
    if status == 402:  # clients do not try again what has this code
        return OpenAIError(message, status=429, code="insufficient_quota")
    return OpenAIError(message, status=status)


def from_prediction(prediction: Prediction) -> OpenAIError | None:
    """The error that a prediction ended with; None if it succeeded, and its answer by a stop or a length.

    A model rejects an input by failing with a sentence before any output. An exception's name instead of a sentence, or
    a failed server, is not the client's fault.
    """
    if prediction.status in ("canceled", "aborted"):
        return OpenAIError("The prediction was canceled.", status=500, code="canceled")
    if prediction.status != "failed":
        told = prediction.metrics.get("finish_reason")
        incomplete = prediction.status == "succeeded" and told not in (None, "stop", "length")
        return OpenAIError(INCOMPLETE, status=500, code="prediction_failed") if incomplete else None
    message = prediction.error or "The prediction failed."
    if prediction.refused is not None:
        return refused(message, prediction.refused)
    if prediction.started_at is None and prediction.fault != "input":
        return OpenAIError(message, status=503, code="model_unavailable")
    broken = prediction.fault == "server" or message in _FAULTS or _EXCEPTION.match(message) is not None
    if prediction.output is None and not broken:
        if (exceeded := CONTEXT_EXCEEDED.match(message)) is not None:
            # Clients shorten the conversation, or choose another model, by this code; LiteLLM by OpenAI's words.
            words = f"This model's maximum context length is {exceeded[1]} tokens. {message}"
            return OpenAIError(words, "messages", code="context_length_exceeded")
        return OpenAIError(message, code="refused_by_model")
    return OpenAIError(message, status=500, code="prediction_failed")


class ErrorMiddleware:
    """Rewrites errors on OpenAI's routes into OpenAI's form, wherever they come from.

    Replicate's clients call the routes of models too, so errors there keep Replicate's keys beside OpenAI's.
    """

    def __init__(self, app: ASGIApp, *, alone: bool = False) -> None:
        """Wrap an application; `alone` where it serves no other API."""
        self._app, self._alone = app, alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and rewrite the response if it is an error."""
        if scope["type"] != "http" or not (self._alone or _PATHS.fullmatch(scope["path"])):
            await self._app(scope, receive, send)
            return
        keep = not self._alone and scope["path"].startswith("/v1/models")
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
                content = _translate(content, keep=keep)
                kind = b"application/problem+json" if keep else b"application/json"
                changed = {b"content-type": kind, b"content-length": str(len(content)).encode()}
                headers = [(name, changed.get(name.lower(), value)) for name, value in start["headers"]]
                await send({**start, "headers": headers})
                message = {"type": "http.response.body", "body": content}
            await send(message)

        await self._app(scope, receive, rewriting)


def _translate(content: bytes, *, keep: bool) -> bytes:
    problem = json.loads(content)
    made = body(problem["detail"], problem["status"])
    return json.dumps({**problem, **made} if keep else made).encode()
