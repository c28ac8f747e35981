"""Assemble the playground: one ASGI application of the core, Replicate's and OpenAI's APIs and the page."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from cogpress.cog.process import check_free
from cogpress.config import Playground, Prompt
from cogpress.playground import access, history, listen, web
from cogpress.playground.api import resources
from cogpress.playground.api import routes as api
from cogpress.playground.api.streams import Streams
from cogpress.playground.api.webhooks import TRIES, Webhooks
from cogpress.playground.catalog import Catalog
from cogpress.playground.files import Files
from cogpress.playground.keys import Keys
from cogpress.playground.openai import errors
from cogpress.playground.openai import routes as openai
from cogpress.playground.predictions import Predictions
from cogpress.playground.records import Prediction, Version
from cogpress.playground.servers import OnDemandServer, ServerPool
from cogpress.playground.sources import Sources
from cogpress.playground.store import Store
from cogpress.playground.trainings import Trainings
from cogpress.playground.web import Parts

PAGE = Path(__file__).parent / "page"

HOUSEKEEPING_SECONDS = 60.0
"""How often old data is removed."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from other sites and runs no inline scripts."""


@dataclass(frozen=True)
class Settings:
    """A playground's settings.

    Attributes:
        root: the project's folder.
        folder: where predictions, files and trained weights are kept.
        models: (NAME or NAME:LABEL, source) of each version to serve; see `records.Version.source`.
        playground: its section of model.yaml.
        host: address to listen on.
        port: port to listen on.
        token: required from clients; None for none.
        title: of the page.
        adapters: names of the model's adapters.
        prompt: the project's prompt settings, for rows of training data.
        servers_at_once: how many model servers may run.
        start_first: start the first model's server at once if it runs here, rather than on the first request.
    """

    root: Path
    folder: Path
    models: tuple[tuple[str, str], ...] = ()
    playground: Playground = field(default_factory=Playground)
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    title: str = "cogpress"
    adapters: tuple[str, ...] = ()
    prompt: Prompt = field(default_factory=Prompt)
    servers_at_once: int = 2
    start_first: bool = False

    @property
    def loopback_url(self) -> str:
        """The address at which servers on this machine reach the playground."""
        host = self.host if self.host not in ("0.0.0.0", "::") else "127.0.0.1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


async def page(_request: Request) -> Response:
    """The one page behind `/`, `/p/ID` and `/compare`."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


class _Static(StaticFiles):
    """The page's files, with the page's headers."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers.update(PAGE_HEADERS)
        return response


def routes(parts: Parts, webhook_secret: str) -> list[BaseRoute]:
    """Every route but the streams'."""
    return [
        Route("/", page),
        Route("/p/{id}", page),
        Route("/compare", page),
        Mount("/static", _Static(directory=PAGE, check_dir=False)),
        *web.bind(
            parts,
            {
                ("GET", "/v1/models"): models,
                ("GET", "/v1/models/{owner}/{name}"): model,
                ("POST", "/hooks/trainings/{id}/{key}"): training_log,
            },
        ),
        *api.routes(parts),
        *resources.routes(parts, webhook_secret),
        *history.routes(parts),
        *openai.hosted(parts),
    ]


async def models(parts: Parts, request: Request) -> Response:
    """`GET /v1/models`, for Replicate's and OpenAI's clients at once: each finds its keys."""
    base = web.base_url(request)
    found = [resources.model_json(base, one) for one in parts.catalog.models.values()]
    return web.json_response({**resources.page(found), "object": "list", "data": openai.entries(parts)})


async def model(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME`, for both likewise."""
    found = resources.model_of(parts, request)
    counted = await parts.store.read("SELECT count(*) AS run_count FROM predictions WHERE model = ?", found.full_name)
    shown = openai.entry(found) | resources.model_json(web.base_url(request), found)
    return web.json_response({**shown, **counted[0]})


async def training_log(parts: Parts, request: Request) -> Response:
    """A training's log so far, from the runtime."""
    identifier = request.path_params["id"]
    if not parts.trainings.expects(identifier, request.path_params["key"]):  # before a byte of the body is read
        raise web.HTTPProblem(404, "Not found", "There is no such training.")
    parts.trainings.report(identifier, await web.read_json(request))
    return Response(status_code=204)


def build(settings: Settings) -> Parts:
    """Open the store and create the parts; nothing runs yet.

    Raises:
        CogpressError: the store cannot be opened.
    """
    options = settings.playground
    store = Store(
        settings.folder,
        keep_prompts=options.keep_prompts,
        retention_days=options.retention_days,
        retention_count=options.retention_count,
    )
    keys = Keys(store.secret("urls"))
    files = Files(store, keys, settings.loopback_url)
    pool = ServerPool(settings.folder, settings.servers_at_once)
    sources = Sources(pool, settings.root, files.rewrite)
    catalog = Catalog(store, sources)
    return Parts(
        store=store,
        keys=keys,
        pool=pool,
        sources=sources,
        catalog=catalog,
        predictions=Predictions(store, catalog, options.max_waiting, options.max_waiting_mb << 20),
        trainings=Trainings(store, catalog, files, keys, settings.root),
        files=files,
        title=settings.title,
        token_required=settings.token is not None,
        private_webhooks=options.private_webhooks,
        adapters=list(settings.adapters),
        prompt=settings.prompt,
    )


def _send_webhooks(parts: Parts, webhooks: Webhooks) -> None:
    def follow(prediction: Prediction) -> None:
        if prediction.options.webhook:
            parts.predictions.later(webhooks.follow(prediction, render))

    def render(prediction: Prediction) -> dict[str, Any]:
        return api.prediction_json(parts, prediction.options.base_url, prediction.record())

    async def send(record: dict[str, Any], event: str) -> None:
        body = api.training_json(record["base_url"], record)
        await webhooks.send(record["webhook"], body, tries=TRIES if event == "completed" else 1)

    parts.predictions.on_create = follow
    parts.trainings.send = send


def application(
    settings: Settings,
    parts: Parts | None = None,
    on_ready: Callable[[Parts], None] = lambda _parts: None,
    stopped: asyncio.Event | None = None,
) -> ASGIApp:
    """The whole application.

    Args:
        settings: how it is set up.
        parts: from `build`, if it was called before.
        on_ready: called when the application is ready.
        stopped: set when it must stop, also while it starts.

    Raises:
        CogpressError: the address needs a token, or the store cannot be opened.
    """
    loopback = access.check_address(settings.host, settings.token)
    made = parts or build(settings)
    stopped = stopped or asyncio.Event()
    webhooks = Webhooks(made.store.secret("webhooks"), private=made.private_webhooks)
    streams = Streams(made.predictions, made.keys)
    _send_webhooks(made, webhooks)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            await made.catalog.load()
            added = [await _add(made, name, source) for name, source in settings.models]
            made.predictions.later(_housekeeping(made))
            backend = made.catalog.queue(added[0]).backend if added else None
            if settings.start_first and isinstance(backend, OnDemandServer):
                await _unless(stopped, backend.warm())
            if not stopped.is_set():
                on_ready(made)
            yield
        finally:
            await made.trainings.close()
            await made.catalog.close()
            await made.pool.close()
            await made.predictions.close()
            await webhooks.close()
            await made.store.close()

    inner = Starlette(routes=routes(made, webhooks.key), lifespan=lifespan, exception_handlers=web.EXCEPTION_HANDLERS)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        # Streams are long and busy, so they bypass the framework.
        if scope["type"] == "http" and scope["path"].startswith("/v1/stream/"):
            await streams(scope, receive, send)
        else:
            await inner(scope, receive, send)

    options = settings.playground
    limits = access.RequestLimits(settings.token, loopback, options.max_input_mb << 20, options.requests_per_minute)
    return errors.ErrorMiddleware(access.Access(dispatch, limits))


async def _unless(stopped: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, but cancel it when stopped: a model may take minutes to start, and Ctrl-C must not."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    elif not stopped.is_set():
        task.result()


async def _housekeeping(parts: Parts) -> None:
    """Remove old data for as long as the application runs."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        parts.predictions.forget_old()
        try:
            await parts.store.remove_old()
        except (sqlite3.Error, OSError) as error:  # a full disk now is no reason to remove nothing later
            print(f"Cannot remove what is old from {parts.store.folder}: {error}.", flush=True)


async def _add(parts: Parts, name: str, source: str) -> Version:
    """Add the version NAME or NAME:LABEL."""
    name, _, label = name.partition(":")
    # Without a label, the source is what tells it from the model's other versions.
    shown = Path(source).name if source.startswith("folder:/") else re.sub(r"^(folder:|https?://)", "", source)
    return await parts.catalog.add(name, source, label=label or shown)


def serve(settings: Settings, on_ready: Callable[[Parts], None] = lambda _parts: None) -> None:
    """Serve until told to stop.

    Args:
        settings: how it is set up.
        on_ready: called when it is ready, before the first request.

    Raises:
        CogpressError: it cannot start; nothing is left running.
    """
    check_free(settings.host, settings.port)
    os.umask(0o077)  # logs hold prompts too
    stopped = asyncio.Event()
    listen.listen(application(settings, on_ready=on_ready, stopped=stopped), settings.host, settings.port, stopped)


def greeting(parts: Parts, host: str, port: int) -> str:
    """The address, and how to point clients at it."""
    base = listen.address(host, port)
    names = ", ".join(name for name, model in parts.catalog.models.items() if model.versions)
    return (
        f"Ready at {base} with {names}. Stop with Ctrl-C.\n"
        f"  Replicate's Python client: REPLICATE_BASE_URL={base}   JavaScript: baseUrl {base}/v1   "
        f"OpenAI's: base_url {base}/v1"
    )
