"""Asking one server one question: the streams of Cog's runtime, of OpenAI's API and of Replicate's, with its token.

Knows the three protocols and which of them a URL means. A request is sent once, whatever comes of it: one that was sent
again would be measured as slow instead of counted as lost. Leaves asking many questions at once to `load`.
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

from bench.load import Ask, Later, LostError, Usage
from cogpress import prompts, source
from cogpress.cog import client
from cogpress.config import Prompt
from cogpress.errors import CogpressError

MAX_TOKENS = 160
"""More than any expected answer of the worked example has."""

_TIMEOUT = httpx.Timeout(10.0, read=600.0, pool=None)
"""A model on Replicate may have to be started first, which takes minutes."""


@dataclass(frozen=True)
class Question:
    """What is asked of every side: the values of the prompt template, or a text."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    max_tokens: int = MAX_TOKENS
    min_tokens: int = 0

    @property
    def inputs(self) -> dict[str, Any]:
        """As a prediction's input."""
        asked = {"fields": json.dumps(self.fields)} if self.fields else {"prompt": self.text}
        least = {"min_tokens": self.min_tokens} if self.min_tokens else {}
        return {**asked, "max_tokens": self.max_tokens, "temperature": 0, **least}

    def messages(self, prompt: Prompt) -> list[prompts.Message]:
        """As the conversation that cogpress makes of it, for a server that does not know the prompt template."""
        return prompts.conversation(prompts.Question(self.text, self.fields or None), prompt)


@dataclass(frozen=True)
class Side:
    """One of the servers that are compared: its name in files, its name for people, and how it is asked."""

    name: str
    title: str
    ask: Ask


class StatusError(LostError):
    """A server answered with a status that is an error."""

    def __init__(self, status: int, text: str) -> None:
        """Note the status and what to say of it."""
        super().__init__(text, f"HTTP {status}", refused=status in (409, 429, 503))
        self.status = status


def connect(url: str, runner: asyncio.Runner, stack: ExitStack) -> httpx.AsyncClient:
    """One HTTP client for all requests of a side; as `client.connect`, without certificates for plain HTTP.

    Args:
        url: https, or http on this machine.
        runner: of the event loop.
        stack: closes the connections.

    Raises:
        CogpressError: it is neither.
    """
    if not source.allowed(url):
        raise CogpressError(f"{source.shown(url)} can not be asked: write https://…, or http:// for this machine.")
    secure = urlsplit(url).scheme == "https"
    http = httpx.AsyncClient(
        timeout=_TIMEOUT,
        trust_env=secure,
        verify=secure,
        # The client keeps 20 connections by default, and 64 streams would connect anew for most of their questions.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        headers={"Accept-Encoding": "identity"},
    )
    stack.callback(lambda: runner.run(http.aclose()))
    return http


async def _events(
    http: httpx.AsyncClient, method: str, url: str, **more: Any
) -> AsyncGenerator[tuple[bytes, bytes], None]:
    """Name and data of server-sent events, split by hand: parsing takes the time of the machine that is measured."""
    try:
        async with http.stream(method, url, **more) as response:
            if response.status_code >= 400:
                raise _refused(response.status_code, await response.aread())
            name, data, rest = b"", [], b""
            async for block in response.aiter_raw():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        data.append(line[5:].removeprefix(b" ").removesuffix(b"\r"))
                    elif line.startswith(b"event:"):
                        name = line[6:].strip()
                    elif data and line in (b"", b"\r"):
                        yield name, b"\n".join(data)
                        name, data = b"", []
    except httpx.HTTPError as error:
        raise _disconnected("The connection failed: {}.", error) from None


def _refused(status: int, body: bytes) -> StatusError:
    return StatusError(status, f"The server answers {status}: {_words(body)}")


def _disconnected(text: str, error: httpx.HTTPError) -> LostError:
    kind = type(error).__name__
    return LostError(text.format(error or kind), kind)


def _broken(data: bytes) -> LostError:
    return LostError(f"The stream is not whole: {_words(data)}", "stream not whole")


def _words(data: bytes) -> str:
    return " ".join(data[:300].decode(errors="replace").split())


_COG_TEXT = re.compile(rb'"chunk":\s*"(?!")')
_OPENAI_TEXT = re.compile(rb'"content":\s*"(?!")')
_OPENAI_USAGE = re.compile(rb'"usage":\s*\{')


def cog(http: httpx.AsyncClient, url: str) -> Ask:
    """Asks a Cog server whose runner streams.

    Args:
        http: what to ask with.
        url: the server's, without a path.
    """
    headers = {"Accept": "text/event-stream"}

    async def ask(question: Question) -> AsyncIterator[Usage | Later | None]:
        body = {"input": question.inputs}
        async with aclosing(_events(http, "POST", f"{url}/predictions", json=body, headers=headers)) as events:
            async for name, data in events:
                if name == b"output":
                    if _COG_TEXT.search(data):
                        yield None
                elif name == b"completed":
                    made = json.loads(data)
                    if (status := made.get("status")) != "succeeded":
                        raise LostError(f"The prediction {status}: {made.get('error')}", f"prediction {status}")
                    yield _usage(made)
                elif name == b"error":
                    raise _broken(data)

    return ask


def _usage(prediction: Mapping[str, Any]) -> Usage:
    metrics = prediction.get("metrics") or {}
    return Usage(int(metrics.get("input_token_count") or 0), int(metrics.get("output_token_count") or 0))


def openai(http: httpx.AsyncClient, url: str, model: str, prompt: Prompt) -> Ask:
    """Asks an OpenAI server, such as vLLM's.

    Args:
        http: what to ask with.
        url: the server's, without a path.
        model: by the name that it is served under.
        prompt: what a question must look like.
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
        async with aclosing(_events(http, "POST", f"{url}/v1/chat/completions", json=body)) as events:
            async for _, data in events:
                if _OPENAI_TEXT.search(data):
                    yield None
                elif _OPENAI_USAGE.search(data):
                    usage = json.loads(data)["usage"]
                    yield Usage(usage["prompt_tokens"], usage["completion_tokens"])
                elif data.startswith(b'{"error"'):
                    raise _broken(data)

    return ask


# ---------------------------------------------------------------------------------------------------------------------
# A server by its URL
# ---------------------------------------------------------------------------------------------------------------------

REPLICATE = "https://api.replicate.com"
_MODEL = re.compile(r"[\w.-]+/[\w.-]+")
_ENDED = ("succeeded", "failed", "canceled", "aborted")


class Replicate:
    """One model on Replicate, asked as the official client asks for a stream."""

    def __init__(self, http: httpx.AsyncClient, base: str, model: str, token: str) -> None:
        """Nothing is asked yet.

        Args:
            http: what to ask with.
            base: the API's address, without a path.
            model: `owner/name`.
            token: goes to the API alone, and into no message.
        """
        self._http, self._base, self._model, self._token = http, base, model, token
        self._version = ""
        self._by_version = False

    async def open(self) -> None:
        """Find the model.

        Raises:
            CogpressError: there is none, the token is not accepted, or the API can not be reached.
        """
        found = await self._api("GET", f"/v1/models/{self._model}")
        self._version = str((found.get("latest_version") or {}).get("id") or "")

    async def ask(self, question: Question) -> AsyncIterator[Usage | Later | None]:
        """See `load.Ask`. The seconds begin before the prediction is created; usage is asked for after the load."""
        made = await self._create({"input": question.inputs, "stream": True})
        url = str((made.get("urls") or {}).get("stream") or "")
        if not source.allowed(url) or urlsplit(url).scheme != urlsplit(self._base).scheme:
            raise LostError(
                f"Replicate gives no address for the stream of {self._model}, so it does not stream.", "no stream"
            )
        # Without the token: the address itself lets in, and it can be another machine's.
        async with aclosing(_events(self._http, "GET", url, headers={"Accept": "text/event-stream"})) as events:
            async for name, data in events:
                if name == b"output":
                    if data:
                        yield None
                elif name == b"error":
                    raise LostError(self._hidden(f"The prediction failed: {_words(data)}"), "prediction failed")
                elif name == b"done":
                    if reason := json.loads(data or b"{}").get("reason"):
                        text = self._hidden(f"The prediction ended with {reason}.")
                        raise LostError(text, "prediction ended early")
                    yield partial(self._counted, str(made.get("id")))
                    return  # the server may keep the stream open

    async def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self._by_version:
            try:
                return await self._api("POST", f"/v1/models/{self._model}/predictions", body)
            except StatusError as error:
                # Replicate runs only models of its own choice by name, all others by version.
                if error.status != 404 or not self._version:
                    raise
                self._by_version = True
        return await self._api("POST", "/v1/predictions", {"version": self._version, **body})

    async def _counted(self, identifier: str) -> Usage:
        """The metrics appear a moment after the stream's end."""
        for _ in range(10):
            made = await self._api("GET", f"/v1/predictions/{identifier}")
            if made.get("status") in _ENDED:
                return _usage(made)
            await asyncio.sleep(0.5)
        return Usage(0, 0)

    async def _api(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            response = await self._http.request(method, f"{self._base}{route}", json=body, headers=headers)
            status = response.status_code
            made = response.json() if status < 400 else {}
        except httpx.HTTPError as error:
            raise _disconnected(f"{self._base} does not answer ({{}}).", error) from None
        except ValueError:
            raise LostError(
                f"{self._base}{route} does not answer with JSON. Is it Replicate's API?", "no JSON"
            ) from None
        if status in (401, 403):
            raise StatusError(
                status, "Replicate does not accept the token in REPLICATE_API_TOKEN. Set one that may use it."
            )
        if status == 404:
            raise StatusError(status, f"Replicate has no {route}. Check the model's name.")
        if status >= 400:
            raise StatusError(status, self._hidden(str(_refused(status, response.content))))
        return dict(made) if isinstance(made, dict) else {}

    def _hidden(self, text: str) -> str:
        return text.replace(self._token, "[token]")


def remote(url: str, runner: asyncio.Runner, stack: ExitStack, environ: Mapping[str, str] = os.environ) -> Side:
    """The side behind a URL, found to answer.

    Args:
        url: of a Cog server, or `OWNER/NAME` or `https://api.replicate.com/v1/models/OWNER/NAME`.
        runner: of the event loop.
        stack: closes the connections.
        environ: where REPLICATE_API_TOKEN and REPLICATE_BASE_URL are.

    Raises:
        CogpressError: it is none of these, it does not answer, or there is no token for Replicate.
    """
    base = (environ.get("REPLICATE_BASE_URL") or REPLICATE).rstrip("/")
    model = _replicate_model(url, base)
    if model is None:
        address = url.rstrip("/")
        http = connect(address, runner, stack)
        health = client.health(address)
        if health is None or health["status"] not in ("READY", "BUSY"):
            state = "does not answer as a Cog server" if health is None else f"is not ready ({health['status']})"
            raise CogpressError(f"{source.shown(address)} {state}. Check the address, and that its server has started.")
        return Side("url", urlsplit(address).netloc.rpartition("@")[2], cog(http, address))
    token = environ.get("REPLICATE_API_TOKEN", "").strip()
    if not token:
        raise CogpressError(f"To ask {model} on Replicate, set REPLICATE_API_TOKEN to a token of yours.")
    found = Replicate(connect(base, runner, stack), base, model, token)
    runner.run(found.open())
    return Side("url", model, found.ask)


def _replicate_model(url: str, base: str) -> str | None:
    """`owner/name` where a URL means a model on Replicate. The token goes nowhere else than the official client's."""
    if "://" not in url:
        if not _MODEL.fullmatch(url):
            raise CogpressError(f"{url} is neither http://host:port, https://… nor OWNER/NAME. Write one of them.")
        return url
    origin, mark, model = url.rstrip("/").partition("/v1/models/")
    if not mark or not _MODEL.fullmatch(model):
        return None
    if origin not in (REPLICATE, base):
        raise CogpressError(
            f"{source.shown(origin)} is not Replicate, so it does not get the token. To mean it, set "
            f"REPLICATE_BASE_URL to it and give {model} as the URL."
        )
    return model
