"""What an engine is: token ids in, text as it is generated out. Each engine is one file in `engines/`.

Knows what can be asked of every engine and how to find one by name; imports none of them, nor a library that computes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from cogpress import engines
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from cogpress.config import Serve

DEAD = "The engine has stopped; this server can not answer any more. Restart it and read its log for the cause."
"""What a prediction fails with when the engine can not answer any more."""

MAX_LOGPROBS = 20
"""The most alternatives whose log-probabilities are given for each token."""


Kind = Literal["json", "regex", "choice", "grammar"]

CALLED: dict[Kind, str] = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
"""The inputs that ask for each kind of structure."""


@dataclass(frozen=True)
class Structure:
    """What an answer must look like: JSON of a schema, a match of a regular expression, one of some texts, or a
    sentence of a grammar (EBNF as of GBNF, or Lark).

    `value` is the schema's JSON, the expression, the texts, or the grammar.
    """

    kind: Kind
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to answer with, on the base that the engine has loaded.

    `number` is positive and one adapter's own as long as the engine lives; `rank` the largest of its matrices.
    """

    name: str
    number: int
    folder: Path
    rank: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults change nothing; temperature 0 is greedy.

    `logprobs`: None for no log-probabilities, else of how many of the most likely tokens beside the chosen one.
    `logit_bias`: by token id, added to its logit. `stream`: give text as it is generated; otherwise an engine may give
    all of it at the end.
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
    """What one engine step added to an answer: whole characters, how many tokens, and why it ended, if so.

    Where log-probabilities were asked for, the step's token ids and theirs come along, and for each the most likely
    tokens, the chosen one among them: `{token id: log-probability}`.
    """

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)


class Engine(Protocol):
    """A loaded model. Constructed as `Engine(folder, serve, concurrency, adapters)`, which blocks until it can answer.

    Args:
        folder: the weights.
        serve: the engine's options; those that an engine does not have are refused by it.
        concurrency: requests at once.
        adapters: the largest rank of the adapters that requests may name; 0 where there are none.

    Raises:
        CogpressError: the weights can not be loaded, or an option is not the engine's.
    """

    max_context: int
    """The most tokens of a prompt with its answer."""

    async def check(self, sampling: Sampling) -> None:
        """Refuse what `generate` could not do, before anything is generated.

        Raises:
            CogpressError: the structure is not valid, or too costly.
        """

    def generate(self, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None) -> AsyncIterator[Delta]:
        """Answer a prompt. Closing the iterator, or cancelling the task that reads it, ends the work on it.

        Args:
            prompt: token ids.
            sampling: how tokens are chosen.
            adapter: answer with this one; None for the weights as they are.

        Raises:
            CogpressError: the engine is dead.
        """

    async def score(self, ids: list[int]) -> list[float]:
        """The log-probability of each token after those before it, in nats; 0 for the first.

        Raises:
            CogpressError: the engine is dead.
        """

    @property
    def dead(self) -> bool:
        """Whether nothing can be answered any more."""

    @property
    def unfinished(self) -> int:
        """Requests that are still worked on."""

    def settle(self) -> None:
        """Schedule the processes for a server, where this one does nothing but carry tokens. Nobody else calls it."""

    def shutdown(self) -> None:
        """End all work, and every process that was started."""


def names() -> list[str]:
    """The engines that there are."""
    found = {module.name for module in pkgutil.iter_modules(engines.__path__)}
    return sorted(found - {"base", "grammar"})


def find(name: str) -> ModuleType:
    """The module of an engine: its class is `Engine`, and its function `prepare(serve)` imports what that needs.

    Raises:
        CogpressError: there is none of this name.
    """
    if name not in names():
        raise CogpressError(f"serve.engine is {name!r}, and the engines are {', '.join(names())}. Name one of these.")
    return importlib.import_module(f"cogpress.engines.{name}")


def load(folder: Path, serve: Serve, concurrency: int, adapters: int = 0) -> Engine:
    """The configured engine over one folder of weights; see `Engine`."""
    made: Engine = find(serve.engine).Engine(folder, serve, concurrency, adapters)
    return made
