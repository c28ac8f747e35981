"""A server's log, one JSON line per prediction, and its Prometheus metrics on a loopback port.

Neither contains prompts or answers, unless `serve.log` is `prompts`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cogpress.engines.base import Sampling
from cogpress.errors import CogpressError
from cogpress.serve.requests import Request

if TYPE_CHECKING:
    from cogpress.config import Serve

HOST = "127.0.0.1"

Outcome = Literal["succeeded", "failed", "canceled"]

Record = Callable[[str, Any], None]
"""Takes the name and the value of a metric."""


@dataclass
class RunningPrediction:
    """A prediction in progress.

    `given` holds its inputs, `started` a reading of `time.perf_counter`; `text` and `generated` grow as it runs.
    """

    given: Mapping[str, Any]
    _record: Record
    started: float
    text: list[str] = field(default_factory=list)
    generated: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: Any) -> None:
        """Pass a metric to the caller, and keep it."""
        self.metrics[name] = value
        self._record(name, value)


class Observer:
    """Logs and counts predictions, as `serve.log` and `serve.metrics_port` say."""

    def __init__(self, serve: Serve) -> None:
        """Open the metrics port, if one is set.

        Raises:
            CogpressError: the port cannot be opened.
        """
        self._log = serve.log
        self._metrics = _Metrics(serve.metrics_port) if serve.metrics_port is not None else None

    @contextmanager
    def watch(self, prediction: RunningPrediction) -> Iterator[None]:
        """Count a prediction as running within the block, and log how it ended."""
        if self._metrics is not None:
            self._metrics.running.inc()
        outcome: Outcome = "canceled"
        error = ""
        try:
            yield
            outcome = "succeeded"
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as fault:
            outcome, error = "failed", str(fault)
            raise
        finally:
            if self._metrics is not None:
                self._metrics.running.dec()
                self._metrics.count(prediction, outcome)
            self._tell(prediction, outcome, error)

    def refused(self, given: Mapping[str, Any], error: str) -> None:
        """Count and log a prediction that was refused before anything was generated."""
        if self._metrics is not None:
            self._metrics.predictions.labels("failed").inc()
        self._tell(RunningPrediction(given, lambda _name, _value: None, time.perf_counter()), "failed", error)

    def _tell(self, prediction: RunningPrediction, outcome: Outcome, error: str) -> None:
        if self._log == "none":
            return
        facts: dict[str, Any] = {
            "event": "prediction",
            "status": outcome,
            "seconds": round(time.perf_counter() - prediction.started, 4),
            "inputs": sorted(
                name for name, value in prediction.given.items() if value not in (None, "", *_unset(name))
            ),
            "generated": prediction.generated,
            **{name: value for name, value in prediction.metrics.items() if name != "logprobs"},
        }
        if error:
            facts["error"] = error if self._log == "prompts" else _without_typed(error, prediction.given)
        if self._log == "prompts":
            facts |= {"input": dict(prediction.given), "output": "".join(prediction.text)}
        # The prediction's log may be closed already, and the answer is complete.
        with suppress(OSError, ValueError):
            print(json.dumps(facts, ensure_ascii=False, default=str), file=sys.stderr, flush=True)


MOST_COMPARED = 100_000
"""Characters of inputs up to which an error's words are compared with them: all streams wait meanwhile."""

_QUOTE = re.compile(r""":|(?<!\w)["'`]""")


def _without_typed(error: str, given: Mapping[str, Any]) -> str:
    """The beginning of an error, up to what it quotes and without any word of the inputs."""
    if sum(len(value) for value in given.values() if isinstance(value, str)) > MOST_COMPARED:
        return "…"
    typed = {word.casefold() for text in _texts(list(given.values())) for word in re.findall(r"\w+", text)}
    typed -= {name.casefold() for name in given}  # these are logged anyway
    shown = _QUOTE.split(error, maxsplit=1)[0].strip()[:80]
    return re.sub(r"\w+", lambda word: "…" if word[0].casefold() in typed else word[0], shown)


def _texts(value: Any) -> Iterator[str]:
    """Every text in an input, also within JSON that is a text."""
    if isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ("{", "["):
            with suppress(ValueError, RecursionError):
                yield from _texts(json.loads(value))
    elif isinstance(value, Mapping):
        yield from map(str, value)
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _unset(name: str) -> list[Any]:
    """Values that mean an input was not given, since the runtime fills in defaults."""
    return [None, "", *(getattr(one, name) for one in (Request(), Sampling()) if hasattr(one, name))]


class _Metrics:
    """cogpress's metrics; vLLM adds its own (queue, KV cache) to the same port."""

    def __init__(self, port: int) -> None:
        from prometheus_client import Counter, Gauge, Histogram, start_http_server

        self.running = Gauge("cogpress_predictions_running", "Predictions in progress or waiting for the engine.")
        self.predictions = Counter("cogpress_predictions", "Predictions that ended, by status.", ["status"])
        self.tokens = Counter("cogpress_tokens", "Tokens read (prompt) and generated (answer).", ["kind"])
        self.first = Histogram(
            "cogpress_time_to_first_token_seconds",
            "Seconds from a prediction's start to its first token.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30),
        )
        try:
            start_http_server(port, addr=HOST)
        except OSError as error:
            raise CogpressError(
                f"serve.metrics_port is {port}, which cannot be opened: {error.strerror}. Set another."
            ) from None

    def count(self, prediction: RunningPrediction, outcome: Outcome) -> None:
        self.predictions.labels(outcome).inc()
        self.tokens.labels("prompt").inc(prediction.metrics.get("input_token_count", 0))
        self.tokens.labels("answer").inc(prediction.generated)
        if "time_to_first_token" in prediction.metrics:
            self.first.observe(prediction.metrics["time_to_first_token"])
