"""Queue predictions before one backend: clients in turn, each one's in order, retried while it is busy."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from cogpress.errors import CogpressError
from cogpress.playground.backend import Backend, Busy, Rejected, Unreachable
from cogpress.playground.background import Background
from cogpress.playground.records import Prediction, QueueFullError

PATIENCE_SECONDS = 10.0
"""How long predictions wait for a server that does not answer: it may be restarting."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.004, 0.25
"""Seconds between retries. The runtime frees a slot a few milliseconds after its answer."""

CANCEL_SECONDS = 10.0
"""How long `cancel` waits for a running prediction to end; only a hanging server takes that long."""

START_SECONDS = 1.0
"""How long `cancel` waits for a prediction whose server has not begun it."""

_UNKNOWN_SLOTS = 64
_PROBE_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_LATE_SECONDS = 0.25
"""A refusal this soon after an answer says nothing about the number of slots: the answer's may not be free yet."""


class _Lines:
    """Waiting predictions, one line per client; clients take turns, so that a long line delays nobody else."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, list[tuple[int, Prediction]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Prediction]:
        return (prediction for line in self._lines.values() for _, prediction in line)

    def add(self, number: int, prediction: Prediction, *, again: bool) -> None:
        """Line up in the order of numbers; a client whose prediction came back is the next."""
        client = prediction.options.client
        bisect.insort(self._lines.setdefault(client, []), (number, prediction))
        if again:
            self._lines.move_to_end(client, last=False)

    def take(self) -> tuple[int, Prediction]:
        """Remove and return the next client's first prediction, with its number."""
        client, line = next(iter(self._lines.items()))
        first = line.pop(0)
        self._lines.move_to_end(client)
        if not line:
            del self._lines[client]
        return first

    def remove(self, prediction: Prediction) -> None:
        """Remove a prediction if it waits."""
        client = prediction.options.client
        line = [one for one in self._lines.get(client, ()) if one[1] is not prediction]
        if line:
            self._lines[client] = line
        else:
            self._lines.pop(client, None)


class Queue:
    """The predictions that wait for a backend or run on it."""

    def __init__(self, backend: Backend, on_end: Callable[[Prediction], None]) -> None:
        """Each backend has its own queue.

        Args:
            backend: runs the predictions.
            on_end: called for each prediction that has ended, and once more when the backend lets go of one that had
                not begun when it was canceled.
        """
        self.backend = backend
        self.running: set[Prediction] = set()
        self._on_end = on_end
        self._waiting = _Lines()
        self._numbers = itertools.count()
        self._limit = float(backend.slots or _UNKNOWN_SLOTS)
        self._pause = 0.0
        self._paused: asyncio.TimerHandle | None = None
        self._refused_at = 0.0
        self._ended_at = 0.0
        self._background = Background()

    @property
    def waiting(self) -> int:
        """The number of waiting predictions."""
        return len(self._waiting)

    def put(self, prediction: Prediction) -> None:
        """Run a prediction as soon as a slot is free and it is its client's turn."""
        self._waiting.add(next(self._numbers), prediction, again=False)
        self._fill()

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction and wait for its end."""
        prediction.cancel_requested = True
        if prediction not in self.running:
            self._waiting.remove(prediction)
            prediction.end("canceled")
            self._on_end(prediction)
            return
        with contextlib.suppress(CogpressError):  # the wait below shows whether it ended
            await self.backend.cancel(prediction)
        if prediction.status == "processing":
            await prediction.wait(CANCEL_SECONDS)
        if prediction.status == "starting" and not await prediction.wait(START_SECONDS):
            # Its server is still starting, which takes minutes; once ready, it finds nothing to do.
            prediction.end("canceled")
            self._on_end(prediction)

    def _fill(self) -> None:
        if self._paused is not None:
            return
        while self._waiting and len(self.running) < self._limit:
            number, prediction = self._waiting.take()
            self.running.add(prediction)
            self._background.start(self._run(number, prediction))

    async def _run(self, number: int, prediction: Prediction) -> None:
        again = False
        try:
            await self.backend.run(prediction)
            self._pause = 0.0
        except Busy:
            again = True
            self._refused_at = time.monotonic()
            # Learn the number of slots if the backend does not know it.
            if self.backend.slots is None and self._refused_at - self._ended_at > _LATE_SECONDS:
                self._limit = max(1, len(self.running) - 1)
        except Unreachable as error:
            prediction.unreachable_since = prediction.unreachable_since or time.monotonic()
            again = time.monotonic() - prediction.unreachable_since < PATIENCE_SECONDS
            if not again:
                prediction.end("failed", error=str(error), fault="server")
        except CogpressError as error:
            prediction.fail(str(error), fault="input" if isinstance(error, Rejected) else "server")
        except asyncio.CancelledError:
            stopped = "The playground was stopped while this prediction ran. Run it again."
            prediction.end("failed", error=stopped, fault="server")
            raise
        except Exception:  # noqa: BLE001 - a prediction must never stay open
            traceback.print_exc()
            told = "The playground failed on this prediction; its log says why. Run it again."
            prediction.end("failed", error=told, fault="server")
        finally:
            self.running.discard(prediction)
            if again and prediction.cancel_requested:
                prediction.end("canceled")
                again = False
            if again:
                prediction.status = "starting"
                self._waiting.add(number, prediction, again=True)
                self._back_off()
            else:
                if not prediction.ended:
                    prediction.end(
                        "failed", error="The model server returned no result. Check its log.", fault="server"
                    )
                self._ended_at = time.monotonic()
                self._on_end(prediction)
                self._probe()
                self._resume()

    def _back_off(self) -> None:
        """Pause before the next attempt."""
        if self._paused is None:
            self._pause = min(max(_FIRST_PAUSE, self._pause * 2), _LONGEST_PAUSE)
            self._paused = asyncio.get_running_loop().call_later(self._pause, self._resume)

    def _resume(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        self._fill()

    def _probe(self) -> None:
        # Other clients may have held the slots when the server refused, so now and then one more is tried.
        if self.backend.slots is None and time.monotonic() - self._refused_at > _PROBE_SECONDS:
            self._limit = min(self._limit + 1, _UNKNOWN_SLOTS)

    async def idle(self) -> None:
        """Wait until nothing waits and nothing runs."""
        while self.running or self.waiting:
            await asyncio.sleep(_IDLE_SECONDS)

    async def close(self) -> None:
        """Fail whatever waits or runs, and close the backend."""
        if self._paused is not None:
            self._paused.cancel()
        for prediction in self._waiting:
            stopped = "The playground was stopped before this prediction ran. Run it again."
            prediction.end("failed", error=stopped, fault="server")
            self._on_end(prediction)
        await self._background.close()
        await self.backend.close()


def check_room(new: Prediction, alive: Collection[Prediction], most: int, most_bytes: int) -> None:
    """Refuse a prediction where too many wait or run.

    Args:
        new: the prediction, with its client and size.
        alive: those that wait or run.
        most: how many there may be, one client's at most half of them.
        most_bytes: of their inputs and events so far, likewise.

    Raises:
        QueueFullError: there are too many.
    """
    own = [prediction for prediction in alive if prediction.options.client == new.options.client]
    for found, share, whose in ((alive, 1, ""), (own, 2, " from this address")):
        size = sum(prediction.size for prediction in found)
        # One alone may be of any size that a request may have.
        if found and (len(found) >= most // share or size + new.size > most_bytes // share):
            raise QueueFullError(
                f"Too many predictions are queued or running: {len(found):,} with {size >> 20:,} MB{whose}. Try again "
                "once some have ended, or raise playground.max_waiting and playground.max_waiting_mb in model.yaml."
            )


def memory(value: Any) -> int:
    """Bytes of JSON in memory."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sys.getsizeof(value) + sum(map(memory, inner))
