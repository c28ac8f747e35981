"""The queue before one backend: first come, first served, and never a 409 for those who asked.

Knows order, slots and when to try again; leaves running to `backend` and states to `predictions`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cogpress.errors import CogpressError
from cogpress.playground.backend import Backend, Busy, Unreachable

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

PATIENCE_SECONDS = 10.0
"""How long predictions wait for a server that does not answer, because it may be starting again."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.004, 0.25
"""Seconds. The runtime frees a slot a few milliseconds after its answer."""

_UNKNOWN_SLOTS = 64
_PROBE_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_LATE_SECONDS = 0.25
"""A refusal this soon after an answer tells nothing of how many slots there are: the answer's may not be free yet."""


class Lane:
    """What waits for a backend and what runs on it."""

    def __init__(self, backend: Backend, on_end: Callable[[Prediction], None]) -> None:
        """A queue of its own for each backend.

        Args:
            backend: runs them.
            on_end: called once for each prediction that has ended.
        """
        self.backend = backend
        self.running: set[Prediction] = set()
        self._on_end = on_end
        self._waiting: list[tuple[int, Prediction]] = []
        self._numbers = itertools.count()
        self._limit = float(backend.slots or _UNKNOWN_SLOTS)
        self._pause = 0.0
        self._paused: asyncio.TimerHandle | None = None
        self._refused_at = 0.0
        self._ended_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(not prediction.ended for _, prediction in self._waiting)

    def put(self, prediction: Prediction) -> None:
        """Run a prediction as soon as there is room."""
        prediction.lane = self
        heapq.heappush(self._waiting, (next(self._numbers), prediction))
        self._fill()

    def drop(self, prediction: Prediction) -> bool:
        """End a prediction that still waits as canceled; False where it runs."""
        if prediction in self.running:
            return False
        prediction.end("canceled")
        self._on_end(prediction)
        return True

    def _fill(self) -> None:
        if self._paused is not None:
            return
        while self._waiting and len(self.running) < self._limit:
            number, prediction = heapq.heappop(self._waiting)
            if prediction.ended:
                continue
            self.running.add(prediction)
            task = asyncio.get_running_loop().create_task(self._run(number, prediction))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, number: int, prediction: Prediction) -> None:
        again = False
        try:
            await self.backend.run(prediction)
            self._pause = 0.0
        except Busy:
            again = True
            self._refused_at = time.monotonic()
            # Where the number of slots is not known, it is learnt.
            if self.backend.slots is None and self._refused_at - self._ended_at > _LATE_SECONDS:
                self._limit = max(1, len(self.running) - 1)
        except Unreachable as error:
            prediction.unreachable_since = prediction.unreachable_since or time.monotonic()
            again = time.monotonic() - prediction.unreachable_since < PATIENCE_SECONDS
            if not again:
                prediction.end("failed", error=str(error))
        except CogpressError as error:
            prediction.end("failed", error=str(error))
        except asyncio.CancelledError:
            prediction.end("failed", error="The local Replicate was stopped while this prediction ran. Run it again.")
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the prediction must not stay open for ever
            prediction.end("failed", error=f"The local Replicate failed ({type(error).__name__}: {error}).")
        finally:
            self.running.discard(prediction)
            if again and prediction.cancel_asked:
                prediction.end("canceled")
                again = False
            if again:
                prediction.status = "starting"
                heapq.heappush(self._waiting, (number, prediction))
                self._wait()
            else:
                if not prediction.ended:
                    prediction.end("failed", error="The model server gave no result. Its log may tell why.")
                self._ended_at = time.monotonic()
                self._on_end(prediction)
                self._grow()
                self._go_on()

    def _wait(self) -> None:
        """Pause before the next try."""
        if self._paused is None:
            self._pause = min(max(_FIRST_PAUSE, self._pause * 2), _LONGEST_PAUSE)
            self._paused = asyncio.get_running_loop().call_later(self._pause, self._go_on)

    def _go_on(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        self._fill()

    def _grow(self) -> None:
        # Others may have used the server when it refused; now and then one more is tried.
        if self.backend.slots is None and time.monotonic() - self._refused_at > _PROBE_SECONDS:
            self._limit = min(self._limit + 1, _UNKNOWN_SLOTS)

    async def idle(self) -> None:
        """Wait until nothing waits and nothing runs."""
        while self.running or self.waiting:
            await asyncio.sleep(_IDLE_SECONDS)

    async def close(self) -> None:
        """End everything: what waits and what runs is marked as failed."""
        if self._paused is not None:
            self._paused.cancel()
        for _, prediction in self._waiting:
            if not prediction.ended:
                prediction.end("failed", error="The local Replicate was stopped before this ran. Run it again.")
                self._on_end(prediction)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.backend.close()
