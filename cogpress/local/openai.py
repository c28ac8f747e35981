"""OpenAI's API over the same predictions: chat completions, completions and models, streamed or not.

Knows OpenAI's requests and answers; leaves parameters to `openai_inputs`, tools to `openai_tools`, errors to
`openai_errors`, and what happens to `predictions`.

A model is named `owner/name`, `owner/name:version`, by its name alone where that is clear, by a deployment's name, each
with `@adapter` after it where an adapter is to answer. Log-probabilities come when the text has ended, because models
tell them then: in a stream they are in its last chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cogpress.errors import CogpressError
from cogpress.local import openai_errors, openai_inputs
from cogpress.local.catalog import Model, NotFound, Version
from cogpress.local.openai_errors import Wrong
from cogpress.local.openai_inputs import Asked
from cogpress.local.predictions import InvalidInput, Options, Prediction
from cogpress.local.web import Parts, Refused, answer, base_of, read_json

PULSE_SECONDS = 15.0
"""After so long without text, a stream begins all the same, and then says so often that it is alive."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}

_DONE = b"data: [DONE]\n\n"

_PARTIAL = "�"
"""What a token's text holds where it is a part of a character."""

Handler = Callable[[Parts, Request], Awaitable[Response]]


def routes(parts: Parts) -> list[Route]:
    """The routes; the list of models is Replicate's too, and there."""
    made = {
        ("POST", "/v1/chat/completions"): chat_completions,
        ("POST", "/v1/completions"): completions,
        ("GET", "/v1/models/{name}"): model,
    }
    return [Route(path, _endpoint(parts, handler), methods=[method]) for (method, path), handler in made.items()]


def _endpoint(parts: Parts, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        try:
            return await handler(parts, request)
        except Wrong as wrong:
            return problem(wrong)
        except Refused as refused:
            return problem(Wrong(refused.body["detail"], status=refused.body["status"]))
        except NotFound as missing:
            return problem(Wrong(str(missing), "model", status=404, code="model_not_found"))
        except CogpressError as error:
            return problem(Wrong(str(error)))

    return respond


def problem(wrong: Wrong, headers: dict[str, str] | None = None) -> Response:
    """An error's answer. Clients are told not to send the same again, as what fails is not the network."""
    response = answer(wrong.body, wrong.status)
    response.headers.update({"x-should-retry": "false", **(headers or {})})
    return response


async def chat_completions(parts: Parts, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    return await _complete(parts, request, chat=True)


async def completions(parts: Parts, request: Request) -> Response:
    """`POST /v1/completions`: the prompt goes through the model's own template, as a prediction's does."""
    return await _complete(parts, request, chat=False)


async def model(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/NAME`, for a name without an owner or with %2F."""
    version, _ = resolve(parts, request.path_params["name"])
    return answer(entry(parts.catalog.models[version.model]) | {"id": request.path_params["name"]})


def entry(found: Model) -> dict[str, Any]:
    """A model as OpenAI lists it."""
    return {"id": found.full_name, "object": "model", "created": int(found.created), "owned_by": found.owner}


def entries(parts: Parts) -> list[dict[str, Any]]:
    """All models that can be asked, and each with its adapters, as OpenAI lists them."""
    found = []
    for one in parts.catalog.models.values():
        if one.versions:
            adapters = parts.adapters if "adapter" in openai_inputs.known(one.versions[-1].schema) else ()
            made = entry(one)
            found += [made, *({**made, "id": f"{one.full_name}@{name}"} for name in adapters)]
    return found


def resolve(parts: Parts, named: Any) -> tuple[Version, str]:
    """The version that a model's name means, and the adapter in it.

    Raises:
        Wrong: it is no name.
        NotFound: nothing has this name.
    """
    if not isinstance(named, str) or not named:
        raise Wrong("model must name a model. GET /v1/models lists them.", "model")
    reference, _, adapter = named.partition("@")
    try:
        return parts.catalog.resolve(reference), adapter
    except NotFound:
        same = [one for one in parts.catalog.models.values() if one.name == reference]
        if len(same) != 1:
            raise
        return parts.catalog.latest(same[0]), adapter


async def _complete(parts: Parts, request: Request, *, chat: bool) -> Response:
    body = await read_json(request)
    version, adapter = resolve(parts, body.get("model"))
    asked = openai_inputs.read(body, version.schema, adapter, chat=chat)
    try:
        prediction = await parts.predictions.create(version, asked.inputs, Options(base_url=base_of(request)))
    except InvalidInput as invalid:
        raise _invalid(invalid, asked) from None
    return _Answer(parts, prediction, asked, str(body["model"]), chat=chat)


def _invalid(invalid: InvalidInput, asked: Asked) -> Wrong:
    names = [asked.named.get(name, name) for name, _ in invalid.fields]
    message = "; ".join(f"{name}: {what}" for name, (_, what) in zip(names, invalid.fields, strict=True))
    return Wrong(message, names[0] if len(names) == 1 else None)


class _Answer(Response):
    """An answer that is not made yet; where nobody waits for it any more, its prediction is canceled."""

    def __init__(self, parts: Parts, prediction: Prediction, asked: Asked, named: str, *, chat: bool) -> None:
        super().__init__()
        self._parts, self._prediction, self._asked, self._chat = parts, prediction, asked, chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{prediction.id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(prediction.created_at),
            "model": named,
            "system_fingerprint": f"fp_{prediction.version.id[:12]}",
        }
        self._extra = {"x-request-id": prediction.id}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            if self._asked.stream:
                await self._stream(scope, receive, send)
            else:
                await self._prediction.wait()
                await self._whole()(scope, receive, send)
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            # Its end also ends what is sent to nobody.
            self._parts.predictions.later(self._parts.predictions.cancel(self._prediction))

    # The whole answer.

    def _whole(self) -> Response:
        wrong = openai_errors.of(self._prediction)
        if wrong is not None:
            return problem(wrong, self._extra)
        text = _text(self._prediction)
        choice: dict[str, Any] = {"index": 0}
        calls: list[dict[str, Any]] = []
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self._asked.tools is not None:
                before, calls = self._asked.tools.calls(text)
                if calls:
                    message |= {"content": before or None, "tool_calls": calls}
            choice["message"] = message
        else:
            choice["text"] = text
        choice |= {"logprobs": self._logprobs(), "finish_reason": self._reason(calls)}
        response = answer({**self._common, "choices": [choice], "usage": self._usage()})
        response.headers.update(self._extra)
        return response

    def _reason(self, calls: list[dict[str, Any]]) -> str:
        """Why the text ended, by the model's word or by its length."""
        metrics, most = self._prediction.metrics, self._asked.max_tokens
        told, count = metrics.get("finish_reason"), metrics.get("output_token_count")
        if told not in ("stop", "length"):
            told = "length" if most is not None and isinstance(count, int) and count >= most else "stop"
        # Of calls that were cut off, the length must be told.
        return "tool_calls" if calls and told == "stop" else told

    def _usage(self) -> dict[str, Any] | None:
        """Tokens, where the model counts them."""
        metrics = self._prediction.metrics
        counts = [metrics.get(name) for name in ("input_token_count", "output_token_count")]
        if not all(isinstance(one, int | float) for one in counts):
            return None
        read, written = (int(one) for one in counts if one is not None)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _logprobs(self) -> dict[str, Any] | None:
        most, told = self._asked.logprobs, self._prediction.metrics.get("logprobs")
        if most is None or not isinstance(told, list):
            return None
        return chat_logprobs(told, most) if self._chat else text_logprobs(told, most)

    # The answer as it comes.

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        while not await _begun(self._prediction, PULSE_SECONDS):
            await self._send(send, b": waiting\n\n", begin=not begun)
            begun = True
        if self._prediction.ended and self._prediction.output is None and not begun:
            wrong = openai_errors.of(self._prediction)
            if wrong is not None:
                await problem(wrong, self._extra)(scope, receive, send)
                return
        role = {"role": "assistant", "content": "", "refusal": None}
        waiting = self._event([self._choice(role)]) if self._chat else b""
        pieces = self._pieces() if self._asked.tools is None else self._pieces_beside_tools()
        before, after = self._around()
        async for text in pieces:
            # Only the text is new in each chunk, so only the text is made into JSON.
            await self._send(send, waiting + before + _encoded(text) + after, begin=not begun)
            begun, waiting = True, b""
        await self._send(send, waiting + self._end(), begin=not begun, more=False)

    async def _send(self, send: Send, body: bytes, *, begin: bool = False, more: bool = True) -> None:
        if begin:
            headers = [(name.encode(), value.encode()) for name, value in {**_HEADERS, **self._extra}.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _pieces(self) -> AsyncIterator[str]:
        """The text, as much at once as has come since the last time."""
        async for texts in self._prediction.texts():
            text = "".join(texts)
            if text:
                yield text

    async def _pieces_beside_tools(self) -> AsyncIterator[str]:
        """What is text for sure; the rest is for the end."""
        assert self._asked.tools is not None
        text, self._sent = "", 0
        async for new in self._pieces():
            text += new
            free = self._asked.tools.free(text)
            if free > self._sent:
                piece, self._sent = text[self._sent : free], free
                yield piece

    def _around(self) -> tuple[bytes, bytes]:
        """What stands before and after the text in each chunk."""
        mark = "\0"
        choice = self._choice({"content": mark} if self._chat else mark)
        before, _, after = self._event([choice]).partition(_encoded(mark))
        return before, after

    def _choice(self, delta: Any, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        key = "delta" if self._chat else "text"
        return {"index": 0, key: delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk: dict[str, Any] = {**self._common, "choices": choices}
        if self._chat:
            chunk["object"] = "chat.completion.chunk"
        if self._asked.usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    def _end(self) -> bytes:
        """The last chunks."""
        wrong = openai_errors.of(self._prediction)
        if wrong is not None:
            return b"data: " + json.dumps(wrong.body).encode() + b"\n\n" + _DONE
        events = []
        calls: list[dict[str, Any]] = []
        if self._asked.tools is not None:
            text = _text(self._prediction)
            _, calls = self._asked.tools.calls(text)
            if calls:
                delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}
                events.append(self._event([self._choice(delta)]))
            elif text[self._sent :]:
                events.append(self._event([self._choice({"content": text[self._sent :]})]))
        last: Any = {} if self._chat else ""
        events.append(self._event([self._choice(last, self._reason(calls), self._logprobs())]))
        if self._asked.usage:
            events.append(self._event([], self._usage()))
        return b"".join(events) + _DONE


async def _begun(prediction: Prediction, seconds: float) -> bool:
    """Whether there is text, or never will be, within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            while not prediction.first_output and not prediction.ended:
                await prediction.changed(len(prediction.frames))
    except TimeoutError:
        return False
    return True


def _text(prediction: Prediction) -> str:
    output = prediction.output
    if isinstance(output, list):
        return "".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in output)
    return output if isinstance(output, str) else "" if output is None else json.dumps(output, ensure_ascii=False)


def _encoded(text: str) -> bytes:
    """A text as JSON in ASCII, so that no client sees the end of a line in it."""
    encoded = json.dumps(text)
    if "\\ud" in encoded:  # half a character is no text, and some parsers refuse it
        encoded = json.dumps(text.encode(errors="replace").decode())
    return encoded.encode()


def chat_logprobs(told: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Log-probabilities as chat completions have them, of what a prediction's metrics have."""

    def described(one: dict[str, Any]) -> dict[str, Any]:
        token = str(one["token"])
        raw = None if _PARTIAL in token else list(token.encode(errors="replace"))
        return {"token": token, "logprob": one["logprob"], "bytes": raw}

    content = [
        {**described(one), "top_logprobs": [described(other) for other in one.get("top", ())[:most]]} for one in told
    ]
    return {"content": content, "refusal": None}


def text_logprobs(told: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Log-probabilities as completions have them."""
    tokens = [str(one["token"]) for one in told]
    offsets, place = [], 0
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [
            {str(other["token"]): other["logprob"] for other in one.get("top", ())[:most]} for one in told
        ],
        "text_offset": offsets,
    }


__all__ = ["entries", "routes"]
