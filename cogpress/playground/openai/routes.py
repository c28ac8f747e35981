"""OpenAI's API over the same predictions: chat completions, completions and models, streamed or not.

Knows names of models and the way of a request; leaves parameters to `openai_inputs`, shapes to `openai_answers`, tools
to `openai_tools`, errors to `openai_errors`, and what happens to `predictions`.

A model is named `owner/name`, `owner/name:version`, by its name alone where that is clear, by a deployment's name, each
with `@adapter` after it where an adapter is to answer. Log-probabilities come when the text has ended, because models
tell them then: in a stream they are in its last chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cogpress.errors import CogpressError
from cogpress.playground.catalog import Model, NotFound, Version
from cogpress.playground.openai import errors, inputs
from cogpress.playground.openai.answers import Form, encoded
from cogpress.playground.openai.errors import Wrong
from cogpress.playground.openai.inputs import Asked
from cogpress.playground.predictions import InvalidInput, Options, Prediction
from cogpress.playground.web import Parts, Refused, answer, base_of, read_json

PULSE_SECONDS = 15.0
"""After so long without text, a stream begins all the same, and then says so often that it is alive."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}

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
            adapters = parts.adapters if "adapter" in inputs.known(one.versions[-1].schema) else ()
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
    asked = inputs.read(body, version.schema, adapter, chat=chat)
    try:
        prediction = await parts.predictions.create(version, asked.inputs, Options(base_url=base_of(request)))
    except InvalidInput as invalid:
        raise _invalid(invalid, asked) from None
    form = Form(prediction, asked, str(body["model"]), chat=chat)
    return _Answer(parts, prediction, form, stream=asked.stream)


def _invalid(invalid: InvalidInput, asked: Asked) -> Wrong:
    names = [asked.named.get(name, name) for name, _ in invalid.fields]
    message = "; ".join(f"{name}: {what}" for name, (_, what) in zip(names, invalid.fields, strict=True))
    return Wrong(message, names[0] if len(names) == 1 else None)


class _Answer(Response):
    """An answer that is not made yet; where nobody waits for it any more, its prediction is canceled."""

    def __init__(self, parts: Parts, prediction: Prediction, form: Form, *, stream: bool) -> None:
        super().__init__()
        self._parts, self._prediction, self._form, self._streams = parts, prediction, form, stream
        self._extra = {"x-request-id": prediction.id}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            if self._streams:
                await self._stream(scope, receive, send)
                return
            await self._prediction.wait()
            wrong = errors.of(self._prediction)
            if wrong is None:
                response = answer(self._form.whole())
                response.headers.update(self._extra)
            else:
                response = problem(wrong, self._extra)
            await response(scope, receive, send)
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            # Its end also ends what is sent to nobody.
            self._parts.predictions.later(self._parts.predictions.cancel(self._prediction))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        prediction, form, begun = self._prediction, self._form, False
        while not await _begun(prediction, PULSE_SECONDS):
            if not begun:
                await self._begin(send)
            begun = True
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
        if not begun:
            # A refusal still gets a status of its own.
            wrong = errors.of(prediction) if prediction.ended and prediction.output is None else None
            if wrong is not None:
                await problem(wrong, self._extra)(scope, receive, send)
                return
            await self._begin(send)
        waiting, (before, after) = form.first(), form.around()
        async for texts in prediction.texts():
            text = form.free(texts)
            if text:
                # Only the text is new in each chunk, so only the text is made into JSON.
                body, waiting = waiting + before + encoded(text) + after, b""
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": waiting + form.last()})

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in {**_HEADERS, **self._extra}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _begun(prediction: Prediction, seconds: float) -> bool:
    """Whether there is text, or never will be, within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            while not prediction.first_output and not prediction.ended:
                await prediction.changed(len(prediction.frames))
    except TimeoutError:
        return False
    return True


__all__ = ["entries", "routes"]
