"""OpenAI's API in front of one model: a version or deployment on Replicate, or a Cog server.

It stores nothing. A caller's token goes to Replicate and nowhere else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cogpress import source
from cogpress.cog.process import check_free
from cogpress.config import Playground
from cogpress.errors import CogpressError
from cogpress.playground import access, listen, web
from cogpress.playground.backend import Backend, Cog
from cogpress.playground.background import Background
from cogpress.playground.openai import errors
from cogpress.playground.openai import routes as openai
from cogpress.playground.openai.errors import OpenAIError
from cogpress.playground.openai.routes import Asked
from cogpress.playground.queue import Queue, check_room, memory
from cogpress.playground.records import Options, Prediction, Version, new_id
from cogpress.playground.remote import CALLERS, Missing, ReplicateBackend
from cogpress.replicate.api import RefusedError, address

FRESH_SECONDS = 300.0
"""How long a schema is cached: an update of a deployment or a container may change it."""

MOST_LINKS = 1000
"""Most tokens with open connections; the oldest connection is closed first."""

_TOKEN = re.compile(r"[!-~]{1,500}")


@dataclass(frozen=True)
class Settings:
    """A gateway's settings.

    Attributes:
        name: by which clients name the model.
        source: `replicate:owner/name[:version]`, also of a deployment, or a Cog server's address.
        host: address to listen on.
        port: port to listen on.
        token: required from clients of a Cog server; None for none. Replicate checks its own.
        limits: the playground's, on requests.
    """

    name: str
    source: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    limits: Playground = field(default_factory=Playground)

    @property
    def replicate(self) -> str:
        """The name on Replicate; empty for a Cog server."""
        return self.source.removeprefix("replicate:") if self.source.startswith("replicate:") else ""

    @property
    def names(self) -> frozenset[str]:
        """Every name of the model."""
        return frozenset({self.name, self.name.rpartition("/")[2], self.replicate or self.name})


@dataclass(frozen=True)
class _Link:
    """The model as one token reaches it."""

    version: Version
    queue: Queue

    @property
    def fresh(self) -> bool:
        return time.time() - self.version.created < FRESH_SECONDS


class Gateway:
    """The model and its running predictions."""

    def __init__(self, settings: Settings) -> None:
        """Sends nothing yet."""
        self._settings = settings
        self._links: OrderedDict[str, asyncio.Task[_Link]] = OrderedDict()
        self._running: dict[Prediction, Queue] = {}
        self._background = Background()

    async def resolve(self, request: Request, named: str) -> Asked:
        """The model of a request.

        Raises:
            OpenAIError: it names another one, its token is refused, or the model does not answer.
        """
        reference, _, adapter = named.partition("@")
        token = self._token(request)
        if reference not in self._settings.names:
            detail = f"There is no model {reference[:100]!r} here. Use {self._settings.name}."
            raise OpenAIError(detail, "model", status=404, code="model_not_found")
        link = await self._link(token)
        return Asked(link.version, adapter, partial(self._create, link, web.client_of(request)), self._cancel)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        entry = await self._entry(request, self._settings.name)
        return web.json_response({"object": "list", "data": [entry]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        return web.json_response(await self._entry(request, request.path_params["name"]))

    async def _entry(self, request: Request, named: str) -> dict[str, Any]:
        version = (await self.resolve(request, named)).version
        owner = self._settings.name.rpartition("/")[0] or "local"
        return {"id": named, "object": "model", "created": int(version.created), "owned_by": owner}

    def _token(self, request: Request) -> str:
        """The caller's token, for Replicate; empty for a Cog server, which has none."""
        if not self._settings.replicate:
            return ""
        scheme, _, token = request.headers.get("authorization", "").strip().partition(" ")
        if scheme.lower() not in ("bearer", "token") or not _TOKEN.fullmatch(token := token.strip()):
            raise OpenAIError(f"There is no API key. {errors.API_KEY}", status=401)
        return token

    async def _link(self, token: str) -> _Link:
        """The link of a token, opened once for all requests that wait for it."""
        opening = self._links.get(token)
        if opening is not None and opening.done() and not opening.result().fresh:
            self._retire(token)
            opening = None
        if opening is None:
            opening = self._links[token] = self._background.start(self._open(token))
            if len(self._links) > MOST_LINKS:
                self._retire(next(iter(self._links)))
        return await asyncio.shield(opening)

    async def _open(self, token: str) -> _Link:
        try:
            return await self._opened(token)
        except BaseException:
            if self._links.get(token) is asyncio.current_task():
                del self._links[token]
            raise

    async def _opened(self, token: str) -> _Link:
        backend = self._backend(token)
        try:
            schema = await backend.schema()
        except CogpressError as error:
            await backend.close()
            if isinstance(error, RefusedError) and error.status in CALLERS:
                raise errors.refused(str(error), error.status) from None
            if isinstance(error, Missing):
                raise OpenAIError(str(error), "model", status=404, code="model_not_found") from None
            raise OpenAIError(str(error), status=503, code="model_unavailable") from None
        settings = self._settings
        identity = hashlib.sha256(json.dumps([settings.source, schema], sort_keys=True).encode()).hexdigest()
        version = Version(identity, settings.name, time.time(), schema, settings.source)
        return _Link(version, Queue(backend, self._end))

    def _backend(self, token: str) -> Backend:
        if self._settings.replicate:
            return ReplicateBackend(self._settings.replicate, token)
        return Cog(self._settings.source, None, _unchanged)

    def _retire(self, token: str) -> None:
        opening = self._links.pop(token)
        self._background.start(_close(opening))

    async def _create(self, link: _Link, client: str, inputs: dict[str, Any]) -> Prediction:
        payload = {name: value for name, value in inputs.items() if value is not None}
        link.version.check(payload)
        prediction = Prediction(new_id(), link.version, {}, payload, Options(client=client), size=memory(payload))
        limits = self._settings.limits
        check_room(prediction, self._running, limits.max_waiting, limits.max_waiting_mb << 20)
        self._running[prediction] = link.queue
        link.queue.put(prediction)
        return prediction

    def _end(self, prediction: Prediction) -> None:
        self._running.pop(prediction, None)

    def _cancel(self, prediction: Prediction) -> None:
        if prediction in self._running:
            self._background.start(self._running[prediction].cancel(prediction))

    async def close(self) -> None:
        """Cancel what runs, which would go on and cost on Replicate, and close every connection."""
        running = [queue.cancel(prediction) for prediction, queue in self._running.items()]
        await asyncio.gather(*running, return_exceptions=True)
        await self._background.close()
        links = [task.result() for task in self._links.values() if task.done() and not task.cancelled()]
        await asyncio.gather(*(link.queue.close() for link in links))


async def _close(opening: asyncio.Task[_Link]) -> None:
    """Close a link once its last prediction has ended."""
    try:
        link = await opening
    except OpenAIError:
        return
    await link.queue.idle()
    await link.queue.close()


async def _unchanged(value: Any, _loopback: bool) -> Any:
    return value


def application(settings: Settings) -> ASGIApp:
    """The whole application.

    Raises:
        CogpressError: the address needs a token, or Replicate's is not safe to send one to.
    """
    if settings.replicate:
        address(os.environ)
        loopback = source.is_loopback(settings.host)
    else:
        loopback = access.check_address(settings.host, settings.token)
    gateway = Gateway(settings)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.close()

    made: dict[str, Callable[..., Any]] = {"/v1/models": gateway.models, "/v1/models/{name:path}": gateway.model}
    routes = [Route(path, openai.endpoint(handler), methods=["GET"]) for path, handler in made.items()]
    routes += openai.routes(gateway.resolve)
    inner = Starlette(routes=routes, lifespan=lifespan, exception_handlers=web.EXCEPTION_HANDLERS)
    required = None if settings.replicate else settings.token
    limits = settings.limits
    bounds = access.RequestLimits(required, loopback, limits.max_input_mb << 20, limits.requests_per_minute)
    return errors.ErrorMiddleware(access.Access(inner, bounds), alone=True)


def serve(settings: Settings) -> None:
    """Print the address, and serve until told to stop.

    Raises:
        CogpressError: it cannot start.
    """
    app = application(settings)
    check_free(settings.host, settings.port)
    key = "your Replicate token" if settings.replicate else "the token in COGPRESS_TOKEN" if settings.token else "any"
    base = listen.address(settings.host, settings.port)
    print(f"Ready at {base}/v1 with {settings.name}; the API key is {key}. Stop with Ctrl-C.", flush=True)
    listen.listen(app, settings.host, settings.port, asyncio.Event())
