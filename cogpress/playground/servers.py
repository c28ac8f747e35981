"""Start Cog servers on this machine when a prediction needs them, a limited number at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogpress.cog import process, schema
from cogpress.engines.gpus import ENGINES
from cogpress.errors import CogpressError
from cogpress.playground.backend import Busy, Cog, Defunct, Rewrite
from cogpress.playground.records import Prediction

READY_SECONDS = 1800.0

TURN_SECONDS = 30.0
"""How long a server may stay busy while others wait; then it accepts nothing new, finishes, and makes room."""


class ServerPool:
    """The running servers; the least recently used idle one is stopped to make room."""

    def __init__(self, folder: Path, at_once: int = 1) -> None:
        """Stops servers that a killed run left behind, and starts none.

        Args:
            folder: for logs and the list of processes.
            at_once: how many may run; each holds a model in memory.
        """
        self.folder = folder
        self.at_once, self.known = at_once, 0
        """How many may run, and how many are registered."""
        self._running: list[OnDemandServer] = []
        """In the order in which they started."""
        self._waiting: dict[OnDemandServer, int] = {}
        """Number of requests that wait for each server to start, in order of arrival."""
        self._room = asyncio.Condition()
        self._processes = folder / "servers.json"
        process.end_noted(self._processes)

    def _note(self) -> None:
        process.note(self._processes, [one.server for one in self._running if one.server is not None])

    async def start(self, one: OnDemandServer) -> None:
        """Start a server, and wait for room if there is none.

        Raises:
            CogpressError: it does not start.
        """
        async with self._room:
            self._waiting[one] = self._waiting.get(one, 0) + 1
            try:
                while one not in self._running and not (
                    len(self._running) < self.at_once and next(iter(self._waiting)) is one
                ):
                    idle = [other for other in self._running if not other.users]
                    if idle and len(self._running) >= self.at_once:
                        await self._stop(idle[0])
                    else:
                        await self._room.wait()
            finally:
                self._waiting[one] -= 1
                if not self._waiting[one]:
                    del self._waiting[one]
                self._room.notify_all()
            if one in self._running:
                self._running.remove(one)
            self._running.append(one)
        try:
            await one.start(self._note)
        except BaseException:
            async with self._room:
                await self._stop(one)
            raise

    def must_yield(self, one: OnDemandServer) -> bool:
        """Whether a running server had its turn and must make room for another before it starts more predictions."""
        others = sum(other is not one for other in self._waiting)
        had_its_turn = time.monotonic() - one.ready_at > TURN_SECONDS
        return had_its_turn and one in self._running[:others]

    async def notify_idle(self) -> None:
        """Called when a server has become idle."""
        async with self._room:
            self._room.notify_all()

    async def stop(self, one: OnDemandServer) -> None:
        """Stop a server, whether it runs or not."""
        async with self._room:
            await self._stop(one)

    async def _stop(self, one: OnDemandServer) -> None:
        if one in self._running:
            self._running.remove(one)
        await one.stop()
        self._note()
        self._room.notify_all()

    async def close(self) -> None:
        """Stop all."""
        async with self._room:
            for one in list(self._running):
                await self._stop(one)


class OnDemandServer:
    """A backend whose server starts when it is needed, and again after it died."""

    def __init__(self, pool: ServerPool, root: Path, weights: str | None, name: str, rewrite: Rewrite) -> None:
        """Starts nothing yet.

        Args:
            pool: limits how many run.
            root: the project's folder.
            weights: as for `cogpress.cog.process.Server`.
            name: of its log.
            rewrite: applied to inputs.
        """
        self.root, self.weights, self.users = root, weights, 0
        pool.known += 1
        self.server: process.Server | None = None
        self._pool, self._log, self._rewrite = pool, pool.folder / f"{name}.log", rewrite
        self._cog: Cog | None = None
        self._lock = asyncio.Lock()
        self._failed_at, self._failure = 0.0, ""
        self.ready_at = 0.0
        """When it was ready last, by `time.monotonic`."""
        settings = process.read_cog_yaml(root)
        self._run, self._train = settings.get("run"), settings.get("train")
        self.slots: int | None = schema.concurrency(root, self._run) if self._run else 1

    async def start(self, on_process: Callable[[], None]) -> None:
        """Start the server unless it runs, and wait until it is ready.

        Args:
            on_process: called when its process exists.

        Raises:
            CogpressError: it does not get ready.
        """
        asked = time.monotonic()
        async with self._lock:
            if self._cog is not None and self.server is not None and self.server.alive:
                return
            if self._failed_at > asked:
                # Everyone who waited for this start gets its error; only later callers retry.
                raise CogpressError(self._failure)
            await self._stop()
            # Servers that may run at once share the GPU; a single model has it for itself.
            shares = {ENGINES: str(min(self._pool.at_once, self._pool.known))}
            made = process.Server(self.root, weights=self.weights, port=0, log=self._log, env=shares)
            self.server = made
            try:
                await asyncio.to_thread(made.start)
                on_process()
                await asyncio.to_thread(made.wait_ready, READY_SECONDS)
            except CogpressError as error:
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            self._cog = Cog(made.url, self.slots, self._rewrite)
            self.ready_at = time.monotonic()

    async def stop(self) -> None:
        """Stop the server."""
        async with self._lock:
            await self._stop()

    async def _stop(self) -> None:
        cog, ended = self._cog, self.server
        self._cog = self.server = None
        if cog is not None:
            await cog.close()
        if ended is not None:
            await asyncio.to_thread(ended.stop)

    async def warm(self) -> None:
        """Start the server before anyone needs it.

        Raises:
            CogpressError: it does not get ready.
        """
        await self._pool.start(self)

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        if self._cog is not None and self._pool.must_yield(self):
            raise Busy
        self.users += 1
        try:
            cog = await self._ready()
            if prediction.cancel_requested:
                prediction.end("canceled")
                return
            try:
                await cog.run(prediction)
            except Defunct:
                # Its predictions fail with it; those that had not begun run on the next one.
                await self._stop_defunct(cog)
                await (await self._ready()).run(prediction)
        finally:
            self.users -= 1
            if not self.users:
                await self._pool.notify_idle()

    async def _ready(self) -> Cog:
        cog = self._cog
        if cog is None or self.server is None or not self.server.alive:
            await self._pool.start(self)
            cog = self._cog
        if cog is None:
            raise CogpressError("The model's server was stopped to make room for another. Run it again.")
        return cog

    async def _stop_defunct(self, cog: Cog) -> None:
        """Stop the server behind `cog`, unless another prediction has done so."""
        async with self._lock:
            if self._cog is cog:
                await self._stop()

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        if self._cog is not None:
            await self._cog.cancel(prediction)

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`; needs no running server."""
        return await asyncio.to_thread(schema.openapi, self.root, self._run, self._train)

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._pool.stop(self)
