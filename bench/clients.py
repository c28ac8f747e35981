"""Clients for one question: the streams of Cog's runtime, of OpenAI's API and of Replicate's.

Requests are never retried: a retried one would be measured as slow instead of counted as lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import ServerSentEvent

from bench.load import Ask, Later, LostError, Usage
from cogpress import http, prompts, source
from cogpress.cog import client
from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.http import UnavailableError
from cogpress.redact import redacted
from cogpress.replicate import routes
from cogpress.replicate.api import ADDRESS, ENDED, AsyncReplicate, NoStreamError, RefusedError, credentials

MAX_TOKENS = 160
"""More than any expected answer of the worked example needs."""

TIMEOUT = httpx.Timeout(10.0, read=600.0, pool=None)
"""A model on Replicate may need a cold start, which takes minutes."""


@dataclass(frozen=True)
class Question:
    """A question for every side: values of the prompt template, or a text."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    max_tokens: int = MAX_TOKENS
    min_tokens: int = 0

    @property
    def inputs(self) -> dict[str, Any]:
        """The question as a prediction's input."""
        asked = {"fields": json.dumps(self.fields)} if self.fields else {"prompt": self.text}
        least = {"min_tokens": self.min_tokens} if self.min_tokens else {}
        return {**asked, "max_tokens": self.max_tokens, "temperature": 0, **least}

    def messages(self, prompt: Prompt) -> list[prompts.Message]:
        """The question as the conversation that cogpress makes of it, for a server without the prompt template."""
        return prompts.conversation(prompts.Question(self.text, self.fields or None), prompt)


@dataclass(frozen=True)
class Side:
    """One of the compared servers: its name in files, its display name, and its client."""

    name: str
    title: str
    ask: Ask


class StatusError(LostError):
    """A server answered with an error status."""

    def __init__(self, status: int, text: str) -> None:
        """Derive the cause from the status."""
        super().__init__(text, f"HTTP {status}", refused=status in (409, 429, 503))
        self.status = status


def connect(url: str, runner: asyncio.Runner, stack: ExitStack) -> httpx.AsyncClient:
    """One HTTP client for all requests of a side.

    Args:
        url: https, or http on this machine.
        runner: runs the event loop.
        stack: closes the connections.

    Raises:
        CogpressError: it is neither.
    """
    if not source.allowed(url):
        raise CogpressError(f"{source.shown(url)} cannot be asked: write https://…, or http:// for this machine.")
    # By default httpx keeps 20 connections open, so 64 streams would reconnect for most of their questions.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    opened = http.connect_async(url, timeout=TIMEOUT, limits=limits, headers={"Accept-Encoding": "identity"})
    stack.callback(lambda: runner.run(opened.aclose()))
    return opened


async def _events(
    opened: httpx.AsyncClient, method: str, url: str, **more: Any
) -> AsyncGenerator[ServerSentEvent, None]:
    """The server-sent events of an answer."""
    try:
        async with opened.stream(method, url, **more) as response:
            if response.status_code >= 400:
                raise _refused(response.status_code, await response.aread())
            async for event in http.events_async(response):
                yield event
    except httpx.HTTPError as error:
        raise _disconnected("The connection failed: {}.", error) from None


def _refused(status: int, body: bytes) -> StatusError:
    return StatusError(status, f"The server answers {status}: {_words(body.decode(errors='replace'))}")


def _disconnected(text: str, error: httpx.HTTPError) -> LostError:
    kind = type(error).__name__
    return LostError(text.format(error or kind), kind)


def _broken(data: str) -> LostError:
    return LostError(f"The stream is incomplete: {_words(data)}", "stream incomplete")


def _words(text: str) -> str:
    return " ".join(text[:300].split())


_COG_TEXT = re.compile(r'"chunk":\s*"(?!")')
_OPENAI_TEXT = re.compile(r'"content":\s*"(?!")')
_OPENAI_USAGE = re.compile(r'"usage":\s*\{')


def cog(opened: httpx.AsyncClient, url: str) -> Ask:
    """A client for a Cog server whose runner streams.

    Args:
        opened: the HTTP client.
        url: of the server, without a path.
    """

    async def ask(question: Question) -> AsyncIterator[Usage | Later | None]:
        more: dict[str, Any] = {"json": {"input": question.inputs}, "headers": http.EVENT_STREAM}
        async with aclosing(_events(opened, "POST", f"{url}/predictions", **more)) as events:
            async for event in events:
                if event.event == "output":
                    if _COG_TEXT.search(event.data):
                        yield None
                elif event.event == "completed":
                    made = json.loads(event.data)
                    if (status := made.get("status")) != "succeeded":
                        raise LostError(f"The prediction {status}: {made.get('error')}", f"prediction {status}")
                    yield _usage(made)
                elif event.event == "error":
                    raise _broken(event.data)

    return ask


def _usage(prediction: Mapping[str, Any]) -> Usage:
    metrics = prediction.get("metrics") or {}
    return Usage(int(metrics.get("input_token_count") or 0), int(metrics.get("output_token_count") or 0))


def openai(opened: httpx.AsyncClient, url: str, model: str, prompt: Prompt) -> Ask:
    """A client for an OpenAI server, such as vLLM's.

    Args:
        opened: the HTTP client.
        url: of the server, without a path.
        model: the name that it is served under.
        prompt: template and system text of the questions.
    """

    async def ask(question: Question) -> AsyncIterator[Usage | Later | None]:
        body = {
            "model": model,
            "messages": question.messages(prompt),
            "max_tokens": question.max_tokens,
            "min_tokens": question.min_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with aclosing(_events(opened, "POST", f"{url}/v1/chat/completions", json=body)) as events:
            async for event in events:
                data = event.data
                if _OPENAI_TEXT.search(data):
                    yield None
                elif _OPENAI_USAGE.search(data):
                    usage = json.loads(data)["usage"]
                    yield Usage(usage["prompt_tokens"], usage["completion_tokens"])
                elif data.startswith('{"error"'):
                    raise _broken(data)

    return ask


# ---------------------------------------------------------------------------------------------------------------------
# A server by its URL
# ---------------------------------------------------------------------------------------------------------------------

_MODEL = re.compile(r"[\w.-]+/[\w.-]+")


class ReplicateModel:
    """A client for a model on Replicate, which sends the requests that the official client sends for a stream."""

    def __init__(self, replicate: AsyncReplicate, model: str) -> None:
        """Sends nothing yet.

        Args:
            replicate: a client that does not retry.
            model: `owner/name`.
        """
        self._replicate, self._model = replicate, model
        self._version = ""
        self._by_version = False

    async def open(self) -> None:
        """Find the model.

        Raises:
            CogpressError: there is no such model, the token is rejected, or the API cannot be reached.
        """
        found = await self._replicate.ask(routes.model(self._model))
        self._version = str((found.get("latest_version") or {}).get("id") or "")

    async def ask(self, question: Question) -> AsyncIterator[Usage | Later | None]:
        """See `load.Ask`. Time starts before the prediction is created; usage is fetched after the load."""
        try:
            made = await self._create(question.inputs)
            async with aclosing(self._replicate.stream(made)) as events:
                async for name, data in events:
                    if name == "output":
                        if data:
                            yield None
                    elif name == "error":
                        raise LostError(self._hidden(f"The prediction failed: {_words(data)}"), "prediction failed")
                    elif name == "done":
                        if reason := json.loads(data or "{}").get("reason"):
                            text = self._hidden(f"The prediction ended with {reason}.")
                            raise LostError(text, "prediction ended early")
                        yield partial(self._counted, str(made.get("id")))
        except LostError:
            raise
        except RefusedError as error:
            raise StatusError(error.status, str(error)) from None
        except UnavailableError as error:
            if error.status is not None:
                raise StatusError(error.status, str(error)) from None
            raise LostError(str(error), "unreachable") from None
        except httpx.HTTPError as error:
            raise _disconnected("The connection failed: {}.", error) from None
        except CogpressError as error:
            raise LostError(str(error), "no stream" if isinstance(error, NoStreamError) else "no JSON") from None

    async def _create(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self._by_version:
            try:
                return dict(await self._replicate.ask(routes.predict_by_name("models", self._model, inputs)))
            except RefusedError as error:
                # Replicate runs only its official models by name, all others by version.
                if error.status != 404 or not self._version:
                    raise
                self._by_version = True
        return dict(await self._replicate.ask(routes.predict(self._version, inputs)))

    async def _counted(self, identifier: str) -> Usage:
        """The metrics, which appear a moment after the end of the stream."""
        for _ in range(10):
            made = await self._replicate.ask(routes.prediction(identifier))
            if made.get("status") in ENDED:
                return _usage(made)
            await asyncio.sleep(0.5)
        return Usage(0, 0)

    def _hidden(self, text: str) -> str:
        return redacted(text, self._replicate.token)


def remote(url: str, runner: asyncio.Runner, stack: ExitStack, environ: Mapping[str, str] = os.environ) -> Side:
    """The side behind a URL, once it answers.

    Args:
        url: of a Cog server, or `OWNER/NAME` or `https://api.replicate.com/v1/models/OWNER/NAME`.
        runner: runs the event loop.
        stack: closes the connections.
        environ: holds REPLICATE_API_TOKEN and REPLICATE_BASE_URL.

    Raises:
        CogpressError: the URL is none of these or does not answer, or there is no token for Replicate.
    """
    base = (environ.get("REPLICATE_BASE_URL") or ADDRESS).rstrip("/")
    model = _replicate_model(url, base)
    if model is None:
        address = url.rstrip("/")
        opened = connect(address, runner, stack)
        health = client.health(address)
        if health is None or health["status"] not in ("READY", "BUSY"):
            state = "does not answer as a Cog server" if health is None else f"is not ready ({health['status']})"
            raise CogpressError(f"{source.shown(address)} {state}. Check the address, and that its server has started.")
        return Side("url", urlsplit(address).netloc.rpartition("@")[2], cog(opened, address))
    replicate = AsyncReplicate(*credentials(environ), tries=1, timeout=TIMEOUT)
    stack.callback(lambda: runner.run(replicate.close()))
    found = ReplicateModel(replicate, model)
    runner.run(found.open())
    return Side("url", model, found.ask)


def _replicate_model(url: str, base: str) -> str | None:
    """`owner/name` if a URL means a model on Replicate. The token goes nowhere that the official client's does not."""
    if "://" not in url:
        if not _MODEL.fullmatch(url):
            raise CogpressError(f"{url} is neither http://host:port, https://… nor OWNER/NAME. Write one of these.")
        return url
    origin, mark, model = url.rstrip("/").partition("/v1/models/")
    if not mark or not _MODEL.fullmatch(model):
        return None
    if origin not in (ADDRESS, base):
        raise CogpressError(
            f"{source.shown(origin)} is not Replicate, so it does not get the token. If it should, set "
            f"REPLICATE_BASE_URL to it and give {model} as the URL."
        )
    return model
