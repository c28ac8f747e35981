"""The local Replicate put together: one ASGI application of the API, the web page and its own routes.

Knows which part answers which path, and the order in which things start and end; leaves the answers to the parts.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from cogpress.cog.process import check_free
from cogpress.config import Playground, Prompt
from cogpress.errors import CogpressError
from cogpress.playground import access, history, web
from cogpress.playground.api import resources
from cogpress.playground.api import routes as replicate
from cogpress.playground.api.streams import Streams
from cogpress.playground.api.webhooks import TRIES, Webhooks
from cogpress.playground.catalog import Catalog
from cogpress.playground.files import Files
from cogpress.playground.openai import errors
from cogpress.playground.openai import routes as openai
from cogpress.playground.predictions import Prediction, Predictions
from cogpress.playground.servers import Servers
from cogpress.playground.store import Store
from cogpress.playground.trainings import Trainings
from cogpress.playground.versions import Version
from cogpress.playground.web import Parts

PAGE = Path(__file__).parent / "page"

HOUSEKEEPING_SECONDS = 60.0
"""How often what is too old is looked for."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from elsewhere and runs no script that is not a file of its own."""


@dataclass(frozen=True)
class Settings:
    """How a local Replicate is set up.

    Attributes:
        root: the project's folder.
        folder: where it keeps what lasts.
        models: (name or name:label, source) of each version that it serves; see `versions.Version.source`.
        playground: the options of model.yaml.
        host: the address to listen on.
        port: the port to listen on, where it is known before.
        token: that requests must carry; None for none.
        title: what the page is called.
        adapters: names of the model's adapters.
        prompt: what a prompt must look like, for rows of training data.
        servers_at_once: how many model servers may run.
        start_first: start the first model's server at once, where it is one of ours, instead of when it is asked.
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
        """How this machine's own servers reach this one."""
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


def routes(parts: Parts) -> list[BaseRoute]:
    """Every route but the streams'."""
    return [
        Route("/", page),
        Route("/p/{id}", page),
        Route("/compare", page),
        Mount("/static", _Static(directory=PAGE, check_dir=False)),
        Route("/hooks/trainings/{id}/{key}", web.endpoint(parts, _report), methods=["POST"]),
        *replicate.routes(parts),
        *resources.routes(parts),
        *history.routes(parts),
        *openai.routes(parts),
    ]


async def _report(parts: Parts, request: Request) -> Response:
    """News of a training from the runtime."""
    body = await web.read_json(request)
    if not parts.trainings.report(request.path_params["id"], request.path_params["key"], body):
        raise web.Refused(404, "Not found", "There is no such training.")
    return Response(status_code=204)


def build(settings: Settings) -> Parts:
    """Open the store and make the parts; nothing runs yet.

    Raises:
        CogpressError: the store can not be opened.
    """
    options = settings.playground
    store = Store(
        settings.folder,
        keep_prompts=options.keep_prompts,
        retention_days=options.retention_days,
        retention_count=options.retention_count,
    )
    files = Files(store, store.secret("urls"))
    files.loopback_url = settings.loopback_url
    catalog = Catalog(store, Servers(settings.folder, settings.servers_at_once), settings.root, rewrite=files.rewrite)
    predictions = Predictions(store, catalog)
    return Parts(
        store=store,
        catalog=catalog,
        predictions=predictions,
        trainings=Trainings(store, catalog, files, settings.root, store.secret("urls")),
        files=files,
        streams=Streams(predictions, store.secret("urls")),
        webhooks=Webhooks(store.secret("webhooks")),
        title=settings.title,
        token_required=settings.token is not None,
        adapters=list(settings.adapters),
        prompt=settings.prompt,
    )


def _follow(parts: Parts) -> None:
    """Have webhooks sent."""

    def begun(prediction: Prediction) -> None:
        if prediction.options.webhook:
            parts.predictions.later(parts.webhooks.follow(prediction, render))

    def render(prediction: Prediction) -> dict[str, Any]:
        return replicate.shape(parts, prediction.options.base_url, prediction.record())

    async def send(record: dict[str, Any], event: str) -> None:
        body = replicate.training_shape(record["base_url"], record)
        await parts.webhooks.send(record["webhook"], body, tries=TRIES if event == "completed" else 1)

    parts.predictions.on_create = begun
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
        parts: what it works with, where it was made before.
        on_ready: called when it answers.
        stopped: set when it is told to stop, also while it starts.

    Raises:
        CogpressError: the address needs a token, or the store can not be opened.
    """
    loopback = access.check_address(settings.host, settings.token)
    made = parts or build(settings)
    stopped = stopped or asyncio.Event()
    _follow(made)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            await made.catalog.load()
            added = [await _add(made, name, source) for name, source in settings.models]
            made.predictions.later(_keep_house(made))
            if settings.start_first and added:
                await _unless(stopped, made.catalog.warm(added[0]))
            if not stopped.is_set():
                on_ready(made)
            yield
        finally:
            await made.trainings.close()
            await made.catalog.close()
            await made.predictions.close()
            await made.webhooks.close()
            await made.store.close()

    handlers = {HTTPException: _http_error, access.TooLarge: _too_large, Exception: _fault}
    inner = Starlette(routes=routes(made), lifespan=lifespan, exception_handlers=handlers)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        # A stream is long and hot, so it goes past the framework.
        if scope["type"] == "http" and scope["path"].startswith("/v1/stream/"):
            await made.streams(scope, receive, send)
        else:
            await inner(scope, receive, send)

    options = settings.playground
    limits = access.Limits(settings.token, loopback, options.max_input_mb << 20, options.requests_per_minute)
    return errors.Face(access.Access(dispatch, limits))


async def _unless(stopped: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Wait for some work's end, or stop it: a model may take minutes to start, and Ctrl-C must not."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    elif not stopped.is_set():
        task.result()


async def _keep_house(parts: Parts) -> None:
    """Remove what is too old, for as long as it runs."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        parts.predictions.forget_old()
        await parts.store.remove_old()


async def _add(parts: Parts, name: str, source: str) -> Version:
    """A version that is given by `NAME` or `NAME:LABEL`, and by where it runs."""
    name, _, label = name.partition(":")
    # People see where it comes from, if nothing else tells it from its model's other versions.
    shown = Path(source).name if source.startswith("folder:/") else re.sub(r"^(folder:|https?://)", "", source)
    return await parts.catalog.add(name, source, label=label or shown)


def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    titles = {404: "Not found", 405: "Method not allowed", 400: "Bad request"}
    detail = "There is nothing at this address." if status == 404 else str(getattr(error, "detail", ""))
    return web.problem(access.error(status, titles.get(status, "Error"), detail))


def _too_large(_request: Request, error: Exception) -> Response:
    assert isinstance(error, access.TooLarge)
    return web.problem(error.body)


def _fault(_request: Request, error: Exception) -> Response:
    return web.problem(access.error(500, "Internal error", f"The local Replicate failed ({type(error).__name__})."))


def serve(settings: Settings, on_ready: Callable[[Parts], None] = lambda _parts: None) -> None:
    """Serve until told to stop.

    Args:
        settings: how it is set up.
        on_ready: called when everything is ready, before the first request.

    Raises:
        CogpressError: it can not start; nothing is left running.
    """
    import uvicorn

    check_free(settings.host, settings.port)
    # What a start failed with is raised, so that nothing more needs to be said.
    logging.getLogger("uvicorn.error").addFilter(lambda line: "startup failed" not in line.getMessage())
    stopped = asyncio.Event()
    app = _Reporting(application(settings, on_ready=on_ready, stopped=stopped))
    options = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
    )

    class Server(uvicorn.Server):
        """Passes on that it is to stop, which it would itself look at only after the start."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            # A signal alone does not wake every kind of loop.
            asyncio.get_running_loop().call_soon_threadsafe(stopped.set)

    try:
        Server(options).run()
    except SystemExit:
        if app.error is None:
            raise
    if app.error is not None:
        raise app.error


class _Reporting:
    """Passes on, and keeps what a start failed with, which uvicorn would print as a stack trace."""

    def __init__(self, app: ASGIApp) -> None:
        self.error: CogpressError | None = None
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def noted(message: Any) -> None:
            if message["type"] == "lifespan.startup.failed":
                message = {**message, "message": ""}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except CogpressError as error:
            self.error = error


__all__ = ["Settings", "application", "build", "serve"]
