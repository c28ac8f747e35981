"""A model, its versions and their predictions as plain data, which all other modules pass around."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import jsonschema

from cogpress.errors import CogpressError
from cogpress.playground import events

ENDED = frozenset({"succeeded", "failed", "canceled", "aborted"})
"""The final states."""

Fault = Literal["input", "server"]

Kind = Literal["Input", "TrainingInput"]
"""The schema of a prediction's inputs, or of a training's."""

REDACTED = "[REDACTED]"
"""Shown and stored in place of a secret input."""


class InvalidInput(CogpressError):
    """An input that the model's schema rejects; `fields` holds (name, problem) for each."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in fields))
        self.fields = fields


class QueueFullError(CogpressError):
    """So much waits or runs that no more is accepted."""


def now() -> float:
    """Seconds since the epoch, as exactly as the APIs write them: a client that sends back a time means this one."""
    return round(time.time(), 6)


def new_id() -> str:
    """A random id in Replicate's form: 26 letters and digits."""
    number = secrets.randbits(130)
    return "".join("0123456789abcdefghjkmnpqrstvwxyz"[number >> 5 * place & 31] for place in range(26))


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a model: its schema, and where it runs."""

    id: str
    model: str
    created: float
    schema: dict[str, Any]
    source: str
    """`http(s)://…` for a Cog server, `replicate:owner/name[:version]`, or `folder:PATH` of weights ("" for the
    project's own)."""
    label: str = ""
    verified: str | None = None

    @property
    def cog_version(self) -> str:
        """The Cog that built it, as far as its schema says."""
        return str(self.schema.get("info", {}).get("version", "unknown"))

    @cached_property
    def iterator(self) -> bool:
        """Whether its output is a growing list."""
        return self._schemas.get("Output", {}).get("x-cog-array-type") == "iterator"

    @cached_property
    def streams(self) -> bool:
        """Whether its output can be read while it runs."""
        if self.source.startswith("replicate:"):
            return self.iterator
        return bool(self.schema.get("paths", {}).get("/predictions", {}).get("post", {}).get("x-cog-streaming"))

    def _secrets(self, kind: Kind) -> set[str]:
        properties = self._schemas.get(kind, {}).get("properties", {})
        return {name for name, one in properties.items() if one.get("x-cog-secret") or one.get("format") == "password"}

    @property
    def _schemas(self) -> dict[str, Any]:
        return self.schema.get("components", {}).get("schemas", {})

    def redacted(self, inputs: dict[str, Any], kind: Kind = "Input") -> dict[str, Any]:
        """Inputs as they may be shown and stored."""
        secrets = self._secrets(kind)
        return {name: REDACTED if name in secrets else value for name, value in inputs.items()}

    def unknown(self, inputs: dict[str, Any]) -> list[str]:
        """The names of inputs that the model does not have; Cog's runtime drops them."""
        properties = self._schemas.get("Input", {}).get("properties")
        return [] if properties is None else [name for name in inputs if name not in properties]

    @cached_property
    def _validators(self) -> dict[Kind, jsonschema.Draft7Validator]:
        components = {"schemas": {**{kind: {} for kind in get_args(Kind)}, **self._schemas}}
        return {
            kind: jsonschema.Draft7Validator({"$ref": f"#/components/schemas/{kind}", "components": components})
            for kind in get_args(Kind)
        }

    def check(self, inputs: dict[str, Any], kind: Kind = "Input") -> None:
        """Validate inputs.

        Raises:
            InvalidInput: listing each invalid input.
        """
        secrets, wrong = self._secrets(kind), []
        for error in self._validators[kind].iter_errors(inputs):
            name = str(error.absolute_path[0]) if error.absolute_path else "input"
            if error.validator == "required":
                missing = [one for one in error.validator_value if one not in inputs]
                wrong += [(one, f"{one} is required") for one in missing if (one, f"{one} is required") not in wrong]
            else:
                wrong.append((name, "does not match the schema" if name in secrets else _shorten(error.message)))
        if wrong:
            raise InvalidInput(wrong)


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"


@dataclass
class HostedModel:
    """A model and its versions, the newest last."""

    owner: str
    name: str
    created: float = field(default_factory=time.time)
    versions: list[Version] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """owner/name."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True)
class Options:
    """What a request may set for a prediction or training besides its inputs.

    Attributes:
        webhook: URL that receives its events.
        webhook_events: which of start, output, logs, completed; None for all.
        base_url: this server's address as the client sees it, for the URLs in webhooks.
        source: "api" or "web".
        client: the address that it came from; clients take turns.
        deadline: when it is canceled at the latest, as a Unix time.
    """

    webhook: str | None = None
    webhook_events: tuple[str, ...] | None = None
    base_url: str = ""
    source: str = "api"
    client: str = ""
    deadline: float | None = None


@dataclass(eq=False)
class Prediction:
    """One prediction in memory: a backend appends to it, and each reader keeps its own position in `frames`."""

    id: str
    version: Version
    input: dict[str, Any]
    """As shown and stored: secrets are redacted."""
    payload: dict[str, Any]
    """As the model gets it; emptied at the end."""
    options: Options = field(default_factory=Options)
    status: str = "starting"
    created_at: float = field(default_factory=now)
    started_at: float | None = None
    completed_at: float | None = None
    output: Any = None
    """A list of chunks for a model that streams; None until there is any."""
    logs: list[str] = field(default_factory=list)
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    frames: list[bytes] = field(default_factory=list)
    """Its events so far, encoded and ready to send."""
    size: int = 0
    """Bytes of the events and, roughly, of the input."""
    first_output: float = 0.0
    fault: Fault | None = None
    """Whose fault a failure is, if it was not the model that failed."""
    refused: int | None = None
    """The status with which Replicate refuses it to the caller's own token."""
    cancel_requested: bool = False
    expired: bool = False
    """Its deadline has passed: if it has not begun, it is aborted."""
    unreachable_since: float = 0.0
    _outputs: int = 0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    def record(self) -> dict[str, Any]:
        """What the store keeps, and returns for earlier predictions."""
        return {
            "id": self.id,
            "model": self.version.model,
            "version": self.version.id,
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

    # For backends. None of these awaits.

    def start(self) -> None:
        """Mark it as running."""
        if self.ended:  # canceled, and its backend does not know yet; likewise below
            return
        self.status = "processing"
        if self.started_at is None:
            self.started_at = time.time()
        self.nudge()

    def add_output(self, chunk: Any) -> None:
        """Append a chunk of streamed output."""
        if self.ended:
            return
        if self._outputs == 0:
            self.first_output = time.time()
            self.output = []
        before = events.text_of(self.output[-1]) if self.output else ""
        self.output.append(chunk)
        self._outputs += 1
        self._add("output", events.after(before, events.text_of(chunk)))

    def add_log(self, text: str) -> None:
        """Append to the log."""
        if self.ended:
            return
        self.logs.append(text)
        self._add("logs", text.removesuffix("\n"))

    def fail(self, error: str, *, fault: Fault | None = None) -> None:
        """Finish it with an error; one that comes after a cancellation is its consequence, and goes to the log."""
        if self.cancel_requested and not self.ended:
            self.add_log(f"After the cancellation: {error}\n")
            self.end("canceled")
        self.end("failed", error=error, fault=fault)

    def end(self, status: str, *, error: str | None = None, output: Any = None, fault: Fault | None = None) -> None:
        """Finish it; only the first call counts.

        Args:
            status: succeeded, failed, canceled or aborted.
            error: why it failed.
            output: the whole output, unless it was added in chunks.
            fault: "input" if the model rejected it, "server" if the server failed; None if the model failed.
        """
        if self.ended:
            return
        if output is not None and self._outputs == 0:
            if isinstance(output, list):
                for chunk in output:
                    self.add_output(chunk)
            else:
                self._add("output", events.text_of(output))
                self.output = output
        if status == "canceled" and self.expired and self.started_at is None:
            status = "aborted"
        self.status, self.error, self.fault, self.completed_at = status, error, fault, time.time()
        self.payload = {}
        self.metrics.setdefault("predict_time", round(self.completed_at - (self.started_at or self.completed_at), 6))
        self.metrics["total_time"] = round(self.completed_at - self.created_at, 6)
        if self.first_output and self.started_at and "time_to_first_token" not in self.metrics:
            self.metrics["time_to_first_token"] = round(self.first_output - self.started_at, 4)
        if status == "failed":
            self._add("error", events.failure(error))
        self._add("done", events.reason(status))

    def _add(self, event: str, text: str) -> None:
        frame = events.encode(event, len(self.frames) + 1, self._outputs, text)
        self.frames.append(frame)
        self.size += len(frame)
        if self._waiting:
            self.nudge()

    # For readers.

    def nudge(self) -> None:
        """Wake every reader, also for a reader that wants to leave."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    async def changed(self, seen: int) -> None:
        """Wait until there are more than `seen` frames or the status changes; returns at once after the end.

        The caller checks what is new: the wake-up may have been for another reader.
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

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it came within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not self.ended:
                    await self.changed(len(self.frames))
        except TimeoutError:
            return self.ended
        return True

    async def texts(self) -> AsyncIterator[list[str]]:
        """The output from the first chunk on, each time as a list of the new chunks; ends with the prediction.

        `status` and `error` are then final.
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
                yield list(map(events.text_of, new))
            elif ended:
                return
            else:
                await self.changed(frames)
