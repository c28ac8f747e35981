"""Chat completions and completions in OpenAI's API, streamed or whole.

A model is named `owner/name`, `owner/name:version` or, if that is unambiguous, by its name alone; `@adapter` after it
selects an adapter. Models report log-probabilities at the end, so in a stream they are in the last chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cogpress.cog.schema import fields
from cogpress.errors import CogpressError
from cogpress.playground.catalog import NotFound
from cogpress.playground.openai import errors, parameters
from cogpress.playground.openai.errors import OpenAIError
from cogpress.playground.openai.parameters import CompletionRequest
from cogpress.playground.openai.responses import Completion
from cogpress.playground.records import HostedModel, InvalidInput, Options, Prediction, QueueFullError, Version
from cogpress.playground.store import UnwritableError
from cogpress.playground.web import RETRY, HTTPProblem, Parts, base_url, client_of, json_response, read_json

PULSE_SECONDS = 15.0
"""A stream begins after this long even without text, and then sends a comment this often until there is some."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


@dataclass(frozen=True)
class Asked:
    """The model that a request names.

    Attributes:
        version: of the model.
        adapter: of the version; empty for none.
        create: creates a prediction with these inputs.
        cancel: cancels it, in the background.
    """

    version: Version
    adapter: str
    create: Callable[[dict[str, Any]], Awaitable[Prediction]]
    cancel: Callable[[Prediction], None]


Resolve = Callable[[Request, str], Awaitable[Asked]]
"""Finds the model of a name in a request."""

Handler = Callable[[Request], Awaitable[Response]]


def routes(resolve: Resolve) -> list[Route]:
    """The routes of completions, and of what is not served."""
    made: dict[str, Handler] = {
        "/v1/chat/completions": partial(_complete, resolve, chat=True),
        "/v1/completions": partial(_complete, resolve, chat=False),
        **dict.fromkeys(errors.NOT_HERE, _not_here),
    }
    return [Route(path, endpoint(handler), methods=["POST"]) for path, handler in made.items()]


def hosted(parts: Parts) -> list[Route]:
    """The routes over the playground's models; those of models, which Replicate's clients call too, are elsewhere."""

    async def asked(request: Request, named: str) -> Asked:
        version, adapter = resolve(parts, named)
        options = Options(base_url=base_url(request), client=client_of(request))
        predictions = parts.predictions

        async def create(inputs: dict[str, Any]) -> Prediction:
            return await predictions.create(version, inputs, options)

        return Asked(version, adapter, create, lambda prediction: predictions.later(predictions.cancel(prediction)))

    async def model(request: Request) -> Response:
        """`GET /v1/models/NAME`, for a name without an owner or with %2F."""
        version, _ = resolve(parts, request.path_params["name"])
        return json_response(entry(parts.catalog.models[version.model]) | {"id": request.path_params["name"]})

    return [*routes(asked), Route("/v1/models/{name}", endpoint(model), methods=["GET"])]


def endpoint(handler: Handler) -> Handler:
    """A handler whose errors have OpenAI's form."""

    async def respond(request: Request) -> Response:
        try:
            return await handler(request)
        except OpenAIError as error:
            return problem(error)
        except HTTPProblem as error:
            return problem(OpenAIError(error.body["detail"], status=error.body["status"]))
        except NotFound as error:
            return problem(OpenAIError(str(error), "model", status=404, code="model_not_found"))
        except QueueFullError as error:
            return problem(OpenAIError(str(error), status=429), {**RETRY, "x-should-retry": "true"})
        except UnwritableError as error:
            return problem(OpenAIError(str(error), status=503))
        except CogpressError as error:
            return problem(OpenAIError(str(error)))

    return respond


def problem(error: OpenAIError, headers: dict[str, str] | None = None) -> Response:
    """An error response, which tells OpenAI's clients not to retry."""
    response = json_response(error.body, error.status)
    response.headers.update({"x-should-retry": "false", **(headers or {})})
    return response


async def _not_here(request: Request) -> Response:
    """What OpenAI's API has and this one has not."""
    raise OpenAIError(errors.NOT_HERE[request.url.path.rstrip("/")], status=404, code="unknown_url")


def entry(found: HostedModel) -> dict[str, Any]:
    """A model in OpenAI's form."""
    return {"id": found.full_name, "object": "model", "created": int(found.created), "owned_by": found.owner}


def entries(parts: Parts) -> list[dict[str, Any]]:
    """All models with a version, and one entry for each of their adapters, in OpenAI's form."""
    found = []
    for one in parts.catalog.models.values():
        if one.versions:
            adapters = parts.adapters if "adapter" in fields(one.versions[-1].schema) else ()
            made = entry(one)
            found += [made, *({**made, "id": f"{one.full_name}@{name}"} for name in adapters)]
    return found


def resolve(parts: Parts, named: str) -> tuple[Version, str]:
    """The version and adapter that a model's name means.

    Raises:
        NotFound: there is no such model.
    """
    reference, _, adapter = named.partition("@")
    try:
        return parts.catalog.resolve(reference), adapter
    except NotFound:
        same = [one for one in parts.catalog.models.values() if one.name == reference]
        if len(same) != 1:
            raise
        return parts.catalog.latest(same[0]), adapter


async def _complete(resolve: Resolve, request: Request, *, chat: bool) -> Response:
    """A chat completion or a completion, whose prompt goes through the model's template, as in a prediction."""
    body = await read_json(request)
    named = body.get("model")
    if not isinstance(named, str) or not named:
        raise OpenAIError("model must name a model. GET /v1/models lists them.", "model")
    asked = await resolve(request, named)
    parsed = parameters.parse(body, asked.version.schema, asked.adapter, chat=chat)
    try:
        prediction = await asked.create(parsed.inputs)
    except InvalidInput as invalid:
        raise _invalid(invalid, parsed) from None
    completion = Completion(prediction, parsed, named, chat=chat)
    return _CompletionResponse(prediction, completion, asked.cancel, stream=parsed.stream)


def _invalid(invalid: InvalidInput, request: CompletionRequest) -> OpenAIError:
    names = [request.named.get(name, name) for name, _ in invalid.fields]
    message = "; ".join(f"{name}: {what}" for name, (_, what) in zip(names, invalid.fields, strict=True))
    return OpenAIError(message, names[0] if len(names) == 1 else None)


class _CompletionResponse(Response):
    """A response whose prediction still runs; it is canceled when the client disconnects."""

    def __init__(
        self,
        prediction: Prediction,
        completion: Completion,
        cancel: Callable[[Prediction], None],
        *,
        stream: bool,
    ) -> None:
        super().__init__()
        self._prediction, self._completion, self._cancel, self._streams = prediction, completion, cancel, stream
        self._extra = {"x-request-id": prediction.id}
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            if self._streams:
                await self._stream(scope, receive, send)
                return
            await self._prediction.wait()
            error = errors.from_prediction(self._prediction)
            if error is None:
                response = json_response(self._completion.whole())
                response.headers.update(self._extra)
            else:
                response = problem(error, self._extra)
            await response(scope, receive, send)
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            # Its end also ends the response.
            self._cancel(self._prediction)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        prediction, completion, begun = self._prediction, self._completion, False
        while not await _begun(prediction, PULSE_SECONDS):
            if not begun:
                await self._begin(send)
            begun = True
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
        if not begun:
            # An error before any text still gets its own status.
            error = errors.from_prediction(prediction) if prediction.ended and prediction.output is None else None
            if error is not None:
                await problem(error, self._extra)(scope, receive, send)
                return
            await self._begin(send)
        waiting = completion.first()
        pulse = asyncio.get_running_loop().create_task(self._pulse(send))
        try:
            async for texts in prediction.texts():
                chunks = completion.chunks(texts)
                if chunks:
                    body, waiting = waiting + chunks, b""
                    self._sent_at = time.monotonic()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            pulse.cancel()
        await send({"type": "http.response.body", "body": waiting + completion.last()})

    async def _pulse(self, send: Send) -> None:
        """A comment after each silence: what may become a tool call waits for the end of the answer."""
        self._sent_at = time.monotonic()
        while True:
            silence = time.monotonic() - self._sent_at
            if silence >= PULSE_SECONDS:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                self._sent_at, silence = time.monotonic(), 0.0
            await asyncio.sleep(PULSE_SECONDS - silence)

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in {**_HEADERS, **self._extra}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _begun(prediction: Prediction, seconds: float) -> bool:
    """Wait up to `seconds` for the first text or the end; whether either came."""
    try:
        async with asyncio.timeout(seconds):
            while not prediction.first_output and not prediction.ended:
                await prediction.changed(len(prediction.frames))
    except TimeoutError:
        return False
    return True
