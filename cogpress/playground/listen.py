"""Serve an ASGI application until a signal, which counts during the start too; a failed start is one sentence."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from cogpress.errors import CogpressError


def address(host: str, port: int) -> str:
    """The address of a server that listens there, for clients on this machine."""
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def listen(application: ASGIApp, host: str, port: int, stopped: asyncio.Event) -> None:
    """Serve until told to stop.

    Args:
        application: what answers.
        host: address to listen on.
        port: port to listen on; check before that it is free.
        stopped: set on a signal.

    Raises:
        CogpressError: the application does not start.
    """
    # The reason is raised below; uvicorn need not add to it.
    logging.getLogger("uvicorn.error").addFilter(lambda line: "startup failed" not in line.getMessage())
    app = _StartupErrors(application)
    options = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )

    class Stoppable(uvicorn.Server):
        """Reports a signal at once; uvicorn itself would only notice it after the start."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            # A signal alone does not wake every kind of event loop.
            asyncio.get_running_loop().call_soon_threadsafe(stopped.set)

    try:
        Stoppable(options).run()
    except SystemExit:
        if app.error is None:
            raise
    if app.error is not None:
        raise app.error


class _StartupErrors:
    """Keeps the error of a failed start, which uvicorn would print as a stack trace."""

    def __init__(self, app: ASGIApp) -> None:
        self.error: CogpressError | None = None
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def silenced(message: Any) -> None:
            if message["type"] == "lifespan.startup.failed":
                message = {**message, "message": ""}
            await send(message)

        try:
            await self._app(scope, receive, silenced)
        except CogpressError as error:
            self.error = error
