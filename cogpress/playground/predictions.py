"""The life of a prediction: queued, run, followed by any number of readers, kept for a while, canceled.

Knows states, times, the order of a queue and events; leaves how a model is asked to `backend`, what is kept for good
to `store`, and every shape of HTTP to `replicate` and `openai`.

For another face of the same predictions, this is all that is needed:

    prediction = await predictions.create(version, {"prompt": "…"})     # raises InvalidInput
    async for texts in prediction.texts():                              # each time a list of the chunks that are new
        ...
    prediction.status, prediction.error, prediction.metrics             # final once `texts()` has ended
    await prediction.wait(60)                                           # or only wait; True when it has ended
    await predictions.cancel(prediction)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from cogpress.playground.catalog import Catalog, Version
    from cogpress.playground.queue import Lane
    from cogpress.playground.store import Store

ENDED = frozenset({"succeeded", "failed", "canceled"})
"""The states that last."""

CANCEL_SECONDS = 10.0
"""How long a canceled prediction is waited for; it ends sooner unless its server hangs."""

START_SECONDS = 1.0
"""How long a canceled prediction that has not begun may take to end by itself."""

KEPT_SECONDS = 300.0
"""How long an ended prediction's events are kept for readers that come back; then only its output is known."""

KEPT_BYTES = 64 << 20
"""How much of events and inputs of ended predictions is kept at most."""

REDACTED = "[REDACTED]"
"""What is shown and stored of a secret input."""

_BREAKS = re.compile("\r\n|\r|\n")
_REASONS = {"failed": '{"reason": "error"}', "canceled": '{"reason": "canceled"}'}


def _frame(event: str, number: int, outputs: int, text: str) -> bytes:
    # A line break inside an event's data starts another line of data; clients join them again.
    if "\n" in text or "\r" in text:
        text = "\ndata: ".join(_BREAKS.split(text))
    # The id says how many events and how many outputs there were, to go on from either.
    return f"event: {event}\nid: {number}:{outputs}\ndata: {text}\n\n".encode(errors="replace")


def frames_of(record: dict[str, Any], seen: int = 0) -> list[bytes]:
    """The events of a prediction that ended, made of what the store keeps of it.

    Args:
        record: of an ended prediction.
        seen: so many outputs are left out, for a reader that has them.
    """
    output = record["output"]
    texts = output if isinstance(output, list) else [] if output is None else [output]
    texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in texts]
    frames = [_frame("output", number, number, text) for number, text in enumerate(texts, 1)][seen:]
    if record["status"] == "failed":
        detail = json.dumps({"detail": record["error"]}, ensure_ascii=False)
        frames.append(_frame("error", len(texts) + 1, len(texts), detail))
    frames.append(_frame("done", len(texts) + 2, len(texts), _REASONS.get(record["status"], "{}")))
    return frames


class InvalidInput(CogpressError):
    """An input that the model's schema does not allow; `fields` has (name, what is wrong) for each."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {what}" for name, what in fields))
        self.fields = fields


@dataclass(frozen=True)
class Options:
    """What a request may say of a prediction besides its input.

    Attributes:
        deployment: `owner/name` of the deployment that was asked.
        webhook: where to send news.
        webhook_events: which of start, output, logs, completed; all where None.
        base_url: how the asker reaches this server, for the addresses in webhooks.
        source: "api" or "web".
    """

    deployment: str | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] | None = None
    base_url: str = ""
    source: str = "api"


@dataclass(eq=False)
class Prediction:
    """One prediction, alive: a backend adds to it and readers follow it, each with a place of its own in `frames`."""

    id: str
    version: Version
    input: dict[str, Any]
    """As it is shown and kept: secrets are redacted."""
    payload: dict[str, Any]
    """As the model gets it; emptied at the end."""
    options: Options = field(default_factory=Options)
    status: str = "starting"
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    output: Any = None
    """A list of chunks for a model that streams; None before there is any."""
    logs: list[str] = field(default_factory=list)
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    frames: list[bytes] = field(default_factory=list)
    """The events of Replicate's stream, ready to be sent."""
    size: int = 0
    """Bytes of events and, roughly, of the input."""
    first_output: float = 0.0
    cancel_asked: bool = False
    unreachable_since: float = 0.0
    lane: Lane | None = None
    _outputs: int = 0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    def record(self) -> dict[str, Any]:
        """What the store keeps, and what it gives back for a prediction of earlier."""
        return {
            "id": self.id,
            "model": self.version.model,
            "version": self.version.id,
            "deployment": self.options.deployment,
            "source": self.options.source,
            "status": self.status,
            "input": self.input,
            "output": self.output,
            "logs": "".join(self.logs),
            "error": self.error,
            "metrics": self.metrics,
            "created": self.created_at,
            "started": self.started_at,
            "completed": self.completed_at,
            "webhook": self.options.webhook,
            "events": self.options.webhook_events,
            "removed": 0,
        }

    # What a backend calls, once for each thing that happens; nothing here awaits.

    def start(self) -> None:
        """It runs now."""
        if self.ended:  # it was given up, and its backend does not know it yet; so below
            return
        self.status = "processing"
        if self.started_at is None:
            self.started_at = time.time()
        self._wake()

    def add_output(self, chunk: Any) -> None:
        """The next chunk of a streamed output."""
        if self.ended:
            return
        if self._outputs == 0:
            self.first_output = time.time()
            self.output = []
        self.output.append(chunk)
        self._outputs += 1
        text = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
        self._add("output", text)

    def add_log(self, text: str) -> None:
        """More of the log."""
        if self.ended:
            return
        self.logs.append(text)
        self._add("logs", text.removesuffix("\n"))

    def end(self, status: str, *, error: str | None = None, output: Any = None) -> None:
        """The last thing that happens; a second end changes nothing.

        Args:
            status: succeeded, failed or canceled.
            error: why it failed.
            output: the whole output, where it was not added in chunks.
        """
        if self.ended:
            return
        if output is not None and self._outputs == 0:
            if isinstance(output, list):
                for chunk in output:
                    self.add_output(chunk)
            else:
                self._add("output", output if isinstance(output, str) else json.dumps(output, ensure_ascii=False))
                self.output = output
        self.status, self.error, self.completed_at = status, error, time.time()
        self.payload = {}
        self.metrics.setdefault("predict_time", round(self.completed_at - (self.started_at or self.completed_at), 6))
        self.metrics["total_time"] = round(self.completed_at - self.created_at, 6)
        if self.first_output and self.started_at and "time_to_first_token" not in self.metrics:
            self.metrics["time_to_first_token"] = round(self.first_output - self.started_at, 4)
        if status == "failed":
            self._add("error", json.dumps({"detail": error}, ensure_ascii=False))
        self._add("done", _REASONS.get(status, "{}"))

    def _add(self, event: str, text: str) -> None:
        frame = _frame(event, len(self.frames) + 1, self._outputs, text)
        self.frames.append(frame)
        self.size += len(frame)
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    # What readers call.

    async def changed(self, seen: int) -> None:
        """Wait until there are more than `seen` frames, or the status changes; at once where it has ended.

        The caller compares for itself what is new: a wake-up may come for something else.
        """
        if len(self.frames) > seen or self.ended:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def nudge(self) -> None:
        """Wake every reader, for one that wants to leave."""
        self._wake()

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it came within so many seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not self.ended:
                    await self.changed(len(self.frames))
        except TimeoutError:
            return self.ended
        return True

    async def texts(self) -> AsyncIterator[list[str]]:
        """The output's chunks from the first on, as lists of what is new each time; ends with the prediction.

        How it ended is in `status` and `error` then.
        """
        seen = 0
        while True:
            frames = len(self.frames)
            ended = self.ended
            chunks = self.output if isinstance(self.output, list) else []
            if not isinstance(self.output, list) and self.output is not None and ended:
                chunks = [self.output]
            if len(chunks) > seen:
                new = chunks[seen:]
                seen = len(chunks)
                yield [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in new]
            elif ended:
                return
            else:
                await self.changed(frames)


def new_id() -> str:
    """An id such as Replicate's: letters and digits, 26 of them."""
    number = secrets.randbits(130)
    return "".join("0123456789abcdefghjkmnpqrstvwxyz"[number >> 5 * place & 31] for place in range(26))


class Predictions:
    """All predictions: those that run or ended lately, in memory; the others in the store."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        """Made with where predictions last and what runs them."""
        self.on_create: Callable[[Prediction], None] = lambda _prediction: None
        """Told of each prediction before it begins, for those who follow it."""
        self._store, self._catalog = store, catalog
        self._alive: dict[str, Prediction] = {}
        self._kept: OrderedDict[str, Prediction] = OrderedDict()
        self._kept_bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        catalog.on_end = self._end

    async def create(self, version: Version, inputs: dict[str, Any], options: Options = Options()) -> Prediction:
        """Check an input and start a prediction, or queue it; returns when it is written down.

        Args:
            version: of `Catalog.resolve`.
            inputs: by name; one that is None is left out.
            options: see `Options`.

        Raises:
            InvalidInput: the schema does not allow it.
            CogpressError: the version can not be run.
        """
        # The runtime refuses null, even for an input that may be left out.
        payload = {name: value for name, value in inputs.items() if value is not None}
        version.check(payload)
        lane = self._catalog.lane(version)
        shown = {name: REDACTED if name in version.secrets else value for name, value in payload.items()}
        size = sum(len(value) for value in shown.values() if isinstance(value, str))
        prediction = Prediction(new_id(), version, shown, payload, options, size=size)
        self._alive[prediction.id] = prediction
        self.on_create(prediction)
        written = self._store.insert(prediction.record())
        # It begins meanwhile: writing costs a few milliseconds, which nobody needs to wait for twice.
        lane.put(prediction)
        await written
        return prediction

    def _end(self, prediction: Prediction) -> None:
        if self._alive.pop(prediction.id, None) is None:
            return  # it was given up before its backend had let it go
        self._kept[prediction.id] = prediction
        self._kept_bytes += prediction.size
        self._store.update(prediction.record())
        while self._kept_bytes > KEPT_BYTES and next(iter(self._kept)) != prediction.id:
            self._forget_first()

    def forget_old(self) -> None:
        """Let go of the events of predictions that ended long ago; to be called now and then."""
        oldest = time.time() - KEPT_SECONDS
        while self._kept and (next(iter(self._kept.values())).completed_at or 0) < oldest:
            self._forget_first()

    def _forget_first(self) -> None:
        _, first = self._kept.popitem(last=False)
        self._kept_bytes -= first.size

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def find(self, identifier: str) -> Prediction | None:
        """A prediction that runs, or ended so lately that its events are still kept."""
        return self._alive.get(identifier) or self._kept.get(identifier)

    async def record(self, identifier: str) -> dict[str, Any] | None:
        """What is known of a prediction, alive or not; None where there is none."""
        alive = self.find(identifier)
        return alive.record() if alive is not None else await self._store.find(identifier)

    def now(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the store as it is at this moment, if its prediction is in memory."""
        alive = self.find(row["id"])
        return row | alive.record() if alive is not None else row

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction that waits or runs, and wait for its end; one that has ended stays as it is."""
        if prediction.ended or prediction.lane is None:
            return
        prediction.cancel_asked = True
        if prediction.lane.drop(prediction):
            return
        with contextlib.suppress(CogpressError):  # it is said again, or its end is seen
            await prediction.lane.backend.cancel(prediction)
        if prediction.status == "processing":
            await prediction.wait(CANCEL_SECONDS)
        if prediction.status == "starting" and not await prediction.wait(START_SECONDS):
            # Its server has yet to start, which takes minutes; when it has, it finds nothing to do.
            prediction.end("canceled")
            self._end(prediction)

    async def close(self) -> None:
        """End what runs, and what is done beside it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
