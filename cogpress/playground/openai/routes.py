"""Chat completions and completions in OpenAI's API, streamed or whole.

A model is named `owner/name`, `owner/name:version` or, if that is unambiguous, by its name alone; `@adapter` after it
selects an adapter. Models report log-probabilities at the end, so in a stream they are in the last chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cogpress.errors import CogpressError
from cogpress.playground.catalog import NotFound
from cogpress.playground.openai import errors, parameters
from cogpress.playground.openai.errors import OpenAIError
from cogpress.playground.openai.parameters import CompletionRequest
from cogpress.playground.openai.responses import Completion, encoded
from cogpress.playground.records import HostedModel, InvalidInput, Options, Prediction, QueueFullError, Version
from cogpress.playground.store import UnwritableError
from cogpress.playground.web import RETRY, Handler, HTTPProblem, Parts, base_url, client_of, json_response, read_json

PULSE_SECONDS = 15.0
"""A stream begins after this long even without text, and then sends a comment this often until there is some."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


def routes(parts: Parts) -> list[Route]:
    """The routes; those of models, which Replicate's clients call too, are in the application."""
    made = {
        ("POST", "/v1/chat/completions"): chat_completions,
        ("POST", "/v1/completions"): completions,
        ("GET", "/v1/models/{name}"): model,
        **{("POST", path): not_here for path in errors.NOT_HERE},
    }
    return [Route(path, _endpoint(parts, handler), methods=[method]) for (method, path), handler in made.items()]


def _endpoint(parts: Parts, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        try:
            return await handler(parts, request)
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


async def chat_completions(parts: Parts, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    return await _complete(parts, request, chat=True)


async def completions(parts: Parts, request: Request) -> Response:
    """`POST /v1/completions`; the prompt goes through the model's template, as in a prediction."""
    return await _complete(parts, request, chat=False)


async def model(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/NAME`, for a name without an owner or with %2F."""
    version, _ = resolve(parts, request.path_params["name"])
    return json_response(entry(parts.catalog.models[version.model]) | {"id": request.path_params["name"]})


async def not_here(parts: Parts, request: Request) -> Response:
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
            adapters = parts.adapters if "adapter" in parameters.inputs_of(one.versions[-1].schema) else ()
            made = entry(one)
            found += [made, *({**made, "id": f"{one.full_name}@{name}"} for name in adapters)]
    return found


def resolve(parts: Parts, named: Any) -> tuple[Version, str]:
    """The version and adapter that a model's name means.

    Raises:
        OpenAIError: it is not a string.
        NotFound: there is no such model.
    """
    if not isinstance(named, str) or not named:
        raise OpenAIError("model must name a model. GET /v1/models lists them.", "model")
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
    parsed = parameters.parse(body, version.schema, adapter, chat=chat)
    try:
        options = Options(base_url=base_url(request), client=client_of(request))
        prediction = await parts.predictions.create(version, parsed.inputs, options)
    except InvalidInput as invalid:
        raise _invalid(invalid, parsed) from None
    completion = Completion(prediction, parsed, str(body["model"]), chat=chat)
    return _CompletionResponse(parts, prediction, completion, stream=parsed.stream)


def _invalid(invalid: InvalidInput, request: CompletionRequest) -> OpenAIError:
    names = [request.named.get(name, name) for name, _ in invalid.fields]
    message = "; ".join(f"{name}: {what}" for name, (_, what) in zip(names, invalid.fields, strict=True))
    return OpenAIError(message, names[0] if len(names) == 1 else None)


class _CompletionResponse(Response):
    """A response whose prediction still runs; it is canceled when the client disconnects."""

    def __init__(self, parts: Parts, prediction: Prediction, completion: Completion, *, stream: bool) -> None:
        super().__init__()
        self._parts, self._prediction, self._completion, self._streams = parts, prediction, completion, stream
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
            self._parts.predictions.later(self._parts.predictions.cancel(self._prediction))

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
        waiting, (before, after) = completion.first(), completion.around()
        pulse = asyncio.get_running_loop().create_task(self._pulse(send))
        try:
            async for texts in prediction.texts():
                text = completion.safe_text(texts)
                if text:
                    # Only the text differs between chunks, so only the text is encoded.
                    body, waiting = waiting + before + encoded(text) + after, b""
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
