"""Prediction lifecycle: queue, run, fan out to readers, retain, cancel.

For example:

    prediction = await predictions.create(version, {"prompt": "…"})     # raises InvalidInput
    async for texts in prediction.texts():                              # lists of new chunks
        ...
    prediction.status, prediction.error, prediction.metrics             # final once `texts()` has ended
    await prediction.wait(60)                                           # or just wait; True once it has ended
    await predictions.cancel(prediction)
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from cogpress.playground.background import Background
from cogpress.playground.catalog import Catalog
from cogpress.playground.queue import Queue, check_room, memory
from cogpress.playground.records import Options, Prediction, Version, new_id
from cogpress.playground.store import Store, UnwritableError

KEPT_SECONDS = 300.0
"""How long the events of an ended prediction are kept for readers that reconnect; later only its output is known."""

KEPT_BYTES = 64 << 20
"""Most memory for the events and inputs of ended predictions."""


class Predictions:
    """All predictions: running and recently ended ones in memory, the others in the store."""

    def __init__(self, store: Store, catalog: Catalog, most: int = 2000, most_bytes: int = 512 << 20) -> None:
        """Nothing runs yet.

        Args:
            store: where they are saved.
            catalog: has the queues on which they run.
            most: how many may wait or run, one client's at most half of them.
            most_bytes: of their inputs and events so far, likewise.
        """
        self._most, self._most_bytes = most, most_bytes
        self.on_create: Callable[[Prediction], None] = lambda _prediction: None
        """Called with each prediction before it begins."""
        self._store, self._catalog = store, catalog
        self._alive: dict[str, tuple[Prediction, Queue]] = {}
        self._kept: OrderedDict[str, Prediction] = OrderedDict()
        self._kept_bytes = 0
        self._background = Background()
        catalog.on_end = self._end

    async def create(self, version: Version, inputs: dict[str, Any], options: Options | None = None) -> Prediction:
        """Validate inputs and queue a prediction; returns once it is in the store.

        Args:
            version: from `Catalog.resolve`.
            inputs: by name; None values are dropped.
            options: see `Options`.

        Raises:
            InvalidInput: the schema rejects the inputs.
            QueueFullError: too many wait or run.
            CogpressError: the version cannot be run, or the store cannot be written.
        """
        self._store.check_writable()
        # The runtime rejects null, even for an optional input.
        payload = {name: value for name, value in inputs.items() if value is not None}
        version.check(payload)
        queue = self._catalog.queue(version)
        shown = version.redacted(payload)
        prediction = Prediction(new_id(), version, shown, payload, options or Options(), size=memory(shown))
        check_room(prediction, [one for one, _ in self._alive.values()], self._most, self._most_bytes)
        if unknown := version.unknown(payload):
            prediction.add_log(f"Not used, as the model has no such input: {', '.join(unknown)}.\n")
        self._alive[prediction.id] = prediction, queue
        self.on_create(prediction)
        written = self._store.insert(prediction.record())
        # It begins meanwhile: the write takes a few milliseconds.
        queue.put(prediction)
        with contextlib.suppress(UnwritableError):  # it runs; its record is kept, and written later
            await written
        return prediction

    def _end(self, prediction: Prediction) -> None:
        if self._alive.pop(prediction.id, None) is None:
            return  # canceled before its backend let go of it
        self._kept[prediction.id] = prediction
        self._kept_bytes += prediction.size
        self._store.update(prediction.record())
        while self._kept_bytes > KEPT_BYTES and next(iter(self._kept)) != prediction.id:
            self._forget_first()

    def forget_old(self) -> None:
        """Drop the events of predictions that ended long ago; call it now and then."""
        oldest = time.time() - KEPT_SECONDS
        while self._kept and (next(iter(self._kept.values())).completed_at or 0) < oldest:
            self._forget_first()

    def _forget_first(self) -> None:
        _, first = self._kept.popitem(last=False)
        self._kept_bytes -= first.size

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something in the background until `close`."""
        self._background.start(work)

    def find(self, identifier: str) -> Prediction | None:
        """A prediction that runs, or ended so recently that its events are still kept."""
        alive = self._alive.get(identifier)
        return alive[0] if alive is not None else self._kept.get(identifier)

    async def record(self, identifier: str) -> dict[str, Any] | None:
        """A prediction's record, from memory or the store; None if there is none."""
        alive = self.find(identifier)
        return alive.record() if alive is not None else await self._store.find(identifier)

    def now(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the store, brought up to date if its prediction is in memory."""
        alive = self.find(row["id"])
        return row | alive.record() if alive is not None else row

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction and wait for its end; does nothing if it has ended."""
        if prediction.ended or prediction.id not in self._alive:
            return
        _, queue = self._alive[prediction.id]
        await queue.cancel(prediction)

    def cancel_at(self, prediction: Prediction, deadline: float) -> None:
        """Cancel a prediction at a Unix time, if it has not ended by then; one that has not begun is aborted."""

        async def work() -> None:
            if not await prediction.wait(max(0.0, deadline - time.time())):
                prediction.expired = True
                prediction.add_log("Canceled: its deadline has passed.\n")
                await self.cancel(prediction)

        self.later(work())

    async def close(self) -> None:
        """Stop the background work."""
        await self._background.close()
