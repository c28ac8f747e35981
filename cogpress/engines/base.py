"""The interface that every engine implements, and the lookup of an engine by name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from cogpress import engines
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from cogpress.config import Serve

DEAD = "The engine has stopped and this server cannot answer any more. Restart it, and see its log for the cause."
"""The error of every prediction once the engine has died."""

INCOMPLETE = "The engine gave up this answer before its end. Run it again, and see the server's log for the cause."
"""The error of a prediction that ended for another reason than its stop or its length."""

CRASHED = "The server failed on this input, which is the server's fault. See its log, or try another input."
"""The error of a prediction on which an exception came that nobody foresaw; its trace is in the log."""

CONTEXT_EXCEEDED = re.compile(r"The prompt is (?:more than )?\d+ tokens long and the context (\d+), ")
"""How the error of a prompt begins that leaves no room for an answer, with the context's tokens."""

MAX_LOGPROBS = 20
"""The most alternatives per token for which log-probabilities are given."""

Kind = Literal["json", "regex", "choice", "grammar"]

INPUT_NAMES: dict[Kind, str] = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
"""The prediction input that sets each kind of structure."""


@dataclass(frozen=True)
class Structure:
    """A constraint on the answer: JSON of a schema, a match of a regular expression, one of several texts, or a
    sentence of a grammar (EBNF in GBNF notation, or Lark).

    `value` is the schema as JSON, the expression, the texts, or the grammar.
    """

    kind: Kind
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter over the base that the engine has loaded.

    `number` is positive and identifies the adapter for the engine's lifetime; `rank` is the largest of its matrices.
    """

    name: str
    number: int
    folder: Path
    rank: int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults are greedy decoding without penalties.

    `logprobs`: how many of the most likely tokens to report beside the chosen one; None for no log-probabilities.
    `logit_bias`: added to the logits, by token id. `stream`: yield text as it is generated; otherwise an engine may
    yield all of it at the end.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    structure: Structure | None = None
    stream: bool = True


@dataclass(frozen=True)
class Delta:
    """What one engine step adds to an answer: whole characters, a number of tokens, and the reason if it ended.

    Any reason but stop and length is the engine's failure (vLLM: abort, error, repetition).

    Where log-probabilities were requested, `token_ids` and `logprobs` hold the step's tokens and `alternatives` maps,
    for each, the most likely token ids and the chosen one to their log-probabilities.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)


class Engine(Protocol):
    """A loaded model. `Engine(folder, serve, concurrency, adapters)` blocks until it is ready.

    Args:
        folder: the weights.
        serve: the engine's options; an engine refuses those that it does not support.
        concurrency: number of requests at once.
        adapters: the largest rank of the adapters that requests may name; 0 for none.

    Raises:
        CogpressError: the weights cannot be loaded, or the engine does not support an option.
    """

    max_context: int
    """Maximum number of tokens in prompt and answer together."""

    async def check(self, sampling: Sampling) -> None:
        """Refuse what `generate` could not do, before anything is generated.

        Raises:
            CogpressError: the structure is invalid or too expensive to compile.
        """

    def generate(self, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None) -> AsyncIterator[Delta]:
        """Answer a prompt. Closing the iterator, or canceling the task that reads it, aborts the request.

        Args:
            prompt: token ids.
            sampling: sampling parameters.
            adapter: the adapter to apply; None for the weights as they are.

        Raises:
            CogpressError: the engine is dead.
        """

    async def score(self, ids: list[int]) -> list[float]:
        """The log-probability of each token given those before it, in nats; 0 for the first.

        Raises:
            CogpressError: the engine is dead.
        """

    async def drafting(self, on: bool) -> bool:
        """Switch the weights' own draft on or off, from the next step; whether there is one to be switched."""

    @property
    def dead(self) -> bool:
        """Whether the engine can no longer answer."""

    @property
    def unfinished(self) -> int:
        """Number of requests in progress."""

    def yield_cores(self) -> None:
        """CPU only: lower the engine's priority and pin the API threads to one core. For servers, not for scripts."""

    def shutdown(self) -> None:
        """Abort all requests and end every process that the engine started."""


def names() -> list[str]:
    """The engines, sorted by name."""
    found = {module.name for module in pkgutil.iter_modules(engines.__path__)}
    return sorted(found - {"base", "gpus", "grammar", "patterns", "schemas", "watch"})


def find(name: str) -> ModuleType:
    """The module of an engine: it has a class `Engine` and a function `prepare(serve)` that does its slow imports.

    Raises:
        CogpressError: there is no engine of this name.
    """
    if name not in names():
        raise CogpressError(f"serve.engine is {name!r}. Set it to one of {', '.join(names())}.")
    return importlib.import_module(f"cogpress.engines.{name}")


def load(folder: Path, serve: Serve, concurrency: int, adapters: int = 0) -> Engine:
    """Load a folder of weights into the configured engine; see `Engine`."""
    made: Engine = find(serve.engine).Engine(folder, serve, concurrency, adapters)
    return made
