"""Tell an engine that stalls from one that is busy.

While requests wait, the engine is asked a question that passes through the same threads and the same loop as they do.
It is dead if it leaves the question open and does nothing else meanwhile, or leaves it open far too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator

import psutil

LOOK_SECONDS = 1.0
"""Between two looks. Looks are counted and not seconds, so that a suspended or blocked event loop accuses nobody."""

IDLE_LOOKS = 20
"""So many looks in turn without an answer and without work make a stall."""

BUSY_LOOKS = 300
"""So many without an answer make a stall, whatever work is done: no step takes that long."""

STUCK_LOOKS = 1800
"""So many without any progress make a stall even where the engine answers: it does not take up what waits."""

WORKING_SHARE = 0.05
"""Share of a core from which an engine works."""

_WORKING = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class Watch:
    """Looks after one engine while it has requests."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[object]],
        processes: Callable[[], Iterable[psutil.Process]],
        on_stall: Callable[[str], None],
        busy_looks: int | None = None,
    ) -> None:
        """Looks at nothing yet.

        Args:
            ask: ends when the engine has answered; may raise if it is dead.
            processes: those that compute.
            on_stall: called once, with the reason.
            busy_looks: for this engine, instead of `BUSY_LOOKS`.
        """
        self._ask, self._processes, self._on_stall = ask, processes, on_stall
        self._busy_looks = busy_looks
        self._task: asyncio.Task[None] | None = None
        self._requests = self._unmoved = 0
        self._seconds = 0.0

    @contextlib.contextmanager
    def request(self) -> Iterator[Callable[[], None]]:
        """Look while a request is in the block, in the engine's event loop; call what it gives at every progress."""
        self._requests += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            yield self._moved
        finally:
            self._requests -= 1

    def _moved(self) -> None:
        self._unmoved = 0

    async def _look(self) -> None:
        self._works()
        self._unmoved = 0
        # A request that its client gave up leaves the question open, which still tells.
        while self._requests:
            asked = asyncio.ensure_future(self._ask())
            idle = open_ = 0
            try:
                while not asked.done():
                    await asyncio.sleep(LOOK_SECONDS)
                    if asked.done():
                        break
                    open_ += 1
                    idle = 0 if self._works() else idle + 1
                    if idle >= IDLE_LOOKS or open_ >= (self._busy_looks or BUSY_LOOKS):
                        done = "did nothing" if idle >= IDLE_LOOKS else "did not finish a step"
                        self._on_stall(f"its processes {done} for {open_ * LOOK_SECONDS:.0f} s while requests waited")
                        return
            finally:
                asked.cancel()
            if not asked.cancelled() and asked.exception() is not None:
                return  # it is dead, and says so itself
            self._unmoved += 1
            if self._unmoved >= STUCK_LOOKS:
                self._on_stall(f"no request made progress for {self._unmoved * LOOK_SECONDS:.0f} s")
                return

    def _works(self) -> bool:
        """Whether the processes worked since the last look, or are about to."""
        seconds, busy = 0.0, False
        for process in self._processes():
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                seconds += times.user + times.system
                # This process always runs when it asks.
                busy = busy or (process.pid != os.getpid() and process.status() in _WORKING)
        worked = seconds - self._seconds
        self._seconds = seconds
        return busy or worked >= WORKING_SHARE * LOOK_SECONDS
