"""Cog servers of this machine that are started when a prediction needs them, so many at a time.

Knows starting, the order of recent use and leftovers of a killed run; leaves the runtime to `cogpress.cog.process` and
predictions to `backend`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cogpress.cog import process as server
from cogpress.cog import schema
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.playground.backend import Cog, Rewrite, as_they_are

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

READY_SECONDS = 1800.0


class Servers:
    """All that are running."""

    def __init__(self, folder: Path, at_once: int = 1) -> None:
        """Nothing starts yet; servers that a killed run left behind are ended.

        Args:
            folder: for logs and for the list of processes.
            at_once: how many may run; each holds a model in memory.
        """
        self.folder = folder
        self._at_once = at_once
        self._running: list[OnDemand] = []
        self._room = asyncio.Condition()
        self._starting = asyncio.Lock()
        self._processes = folder / "servers.json"
        self._end_leftovers()

    def _end_leftovers(self) -> None:
        try:
            noted = read_json(self._processes)
        except (OSError, ValueError):
            return
        for one in noted:
            with suppress(psutil.Error, KeyError, TypeError):
                process = psutil.Process(one["pid"])
                if process.create_time() == one["created"]:  # and not another of the same number
                    server.end_session(process)
        self._processes.unlink(missing_ok=True)

    def _note(self) -> None:
        found = []
        for one in self._running:
            with suppress(psutil.Error):
                pid = one.server.pid if one.server is not None else None
                if pid is not None:
                    found.append({"pid": pid, "created": psutil.Process(pid).create_time()})
        write_json(self._processes, found)

    async def enter(self, one: OnDemand) -> None:
        """Start a server, ending the one that was idle longest where there is no room.

        Raises:
            CogpressError: it does not start.
        """
        async with self._room:
            while len(self._running) >= self._at_once and one not in self._running:
                idle = [other for other in self._running if not other.users]
                if idle:
                    await self._end(idle[0])
                else:
                    await self._room.wait()
            if one in self._running:
                self._running.remove(one)
            self._running.append(one)
        try:
            await one.start(self._note)
        except BaseException:
            async with self._room:
                await self._end(one)
            raise

    async def leave(self) -> None:
        """To be called when a server has become idle."""
        async with self._room:
            self._room.notify_all()

    async def end(self, one: OnDemand) -> None:
        """End a server, whether it runs or not."""
        async with self._room:
            await self._end(one)

    async def _end(self, one: OnDemand) -> None:
        if one in self._running:
            self._running.remove(one)
        await one.stop()
        self._note()
        self._room.notify_all()

    async def close(self) -> None:
        """End all."""
        async with self._room:
            for one in list(self._running):
                await self._end(one)


class OnDemand:
    """A backend whose server runs only while it is needed, and is started again when it has died."""

    def __init__(
        self,
        servers: Servers,
        root: Path,
        weights: str | None,
        name: str,
        *,
        port: int = 0,
        rewrite: Rewrite = as_they_are,
    ) -> None:
        """Describe it.

        Args:
            servers: where it is one of.
            root: the project's folder.
            weights: as for `cogpress.cog.process.Server`.
            name: for its log.
            port: 0 takes a free one.
            rewrite: for files among the inputs.
        """
        self.root, self.weights, self.users = root, weights, 0
        self.server: server.Server | None = None
        self._servers, self._name, self._port, self._rewrite = servers, name, port, rewrite
        self._cog: Cog | None = None
        self._lock = asyncio.Lock()
        self._failed_at, self._failure = 0.0, ""
        settings = server.read_cog_yaml(root)
        self._run, self._train = settings.get("run"), settings.get("train")
        self.slots: int | None = schema.concurrency(root, self._run) if self._run else 1

    @property
    def log(self) -> Path:
        """What its server says."""
        return self._servers.folder / f"{self._name}.log"

    async def start(self, note: Any = lambda: None) -> None:
        """Start the server where it does not run, and wait until it is ready.

        Raises:
            CogpressError: it does not get ready.
        """
        asked = time.monotonic()
        async with self._lock:
            if self._cog is not None and self.server is not None and self.server.alive:
                return
            if self._failed_at > asked:
                # All who waited for this start learn why it failed; only who comes later has it tried again.
                raise CogpressError(self._failure)
            await self._stop()
            made = server.Server(self.root, weights=self.weights, port=self._port, log=self.log)
            self.server = made
            try:
                await asyncio.to_thread(made.start)
                note()
                await asyncio.to_thread(made.wait_ready, READY_SECONDS)
            except CogpressError as error:
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            self._cog = Cog(made.url, self.slots, self._rewrite)

    async def stop(self) -> None:
        """End the server."""
        async with self._lock:
            await self._stop()

    async def _stop(self) -> None:
        cog, ended = self._cog, self.server
        self._cog = self.server = None
        if cog is not None:
            await cog.close()
        if ended is not None:
            await asyncio.to_thread(ended.stop)

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        self.users += 1
        try:
            cog = self._cog
            if cog is None or self.server is None or not self.server.alive:
                await self._servers.enter(self)
                cog = self._cog
            if cog is None:
                raise CogpressError("The model's server was ended for another's sake. Run the prediction again.")
            if prediction.cancel_asked:
                prediction.end("canceled")
                return
            await cog.run(prediction)
        finally:
            self.users -= 1
            if not self.users:
                await self._servers.leave()

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        if self._cog is not None:
            await self._cog.cancel(prediction)

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`; no server is started for it."""
        return await asyncio.to_thread(schema.openapi, self.root, self._run, self._train)

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._servers.end(self)
