"""The workloads of `serve`, and the questions of each round, none of which is asked twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.clients import Question
from cogpress.errors import CogpressError

LOADS = ("example", "long", "open")
"""The worked example's questions with fixed numbers of streams, long prompts, and the questions as Poisson arrivals."""

STREAMS = (1, 4, 16, 32, 64)
"""Numbers of streams for the worked example's questions."""

LONG_STREAMS = (1, 8)

LONG_TOKENS = 256
"""The exact number of tokens of each answer to a long prompt."""

LONG_WORDS = 1380
"""Words of a long prompt: about 1,500 tokens."""


@dataclass(frozen=True)
class Workload:
    """A load to run; `streams` is 0 for the open loop."""

    kind: str
    streams: int
    requests: int

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.kind}-{self.streams}" if self.streams else self.kind

    @property
    def title(self) -> str:
        """Its display name."""
        if not self.streams:
            return "open loop, random arrivals"
        asked = "example" if self.kind == "example" else "long prompts"
        return f"{asked}, {self.streams} stream{'s' * (self.streams > 1)}"

    @property
    def turns(self) -> int:
        """The number of parts of a round, each run on all sides in turn. Few streams take minutes for few tokens, in
        which the speed of a shared machine changes."""
        return 4 if self.kind == "example" and self.streams <= 4 else 1

    @property
    def work(self) -> float:
        """Its relative duration, as throughput grows with about the 0.7th power of the streams."""
        tokens = 2 * LONG_TOKENS if self.kind == "long" else 60
        return self.requests * tokens / (self.streams or 8) ** 0.7


def planned(kinds: Sequence[str] = LOADS, streams: Sequence[int] = STREAMS, scale: int = 1) -> list[Workload]:
    """The loads to run, in order; 16 streams come before the open loop, which takes its rate from them.

    Args:
        kinds: kinds of load, from `LOADS`.
        streams: numbers of streams for the worked example's questions.
        scale: multiplies the requests of each load; a fast machine needs more for stable figures.

    Raises:
        CogpressError: there is no such kind, or no load is left.
    """
    unknown = [kind for kind in kinds if kind not in LOADS]
    if unknown or min(streams, default=1) < 1 or scale < 1:
        wrong = unknown[0] if unknown else "fewer than one stream or request"
        raise CogpressError(f"There is no load with {wrong}. The loads are {', '.join(LOADS)}, streams from 1.")
    loads = []
    if "example" in kinds:
        loads += [Workload("example", n, scale * max(12, min(6 * n, 80 + n))) for n in sorted(set(streams))]
    if "long" in kinds:
        loads += [Workload("long", n, scale * max(3, 2 * n)) for n in LONG_STREAMS]
    if "open" in kinds:
        loads.append(Workload("open", 0, scale * 64))
    if not loads:
        raise CogpressError("No load is left to measure. Name at least one, and streams for the example.")
    return loads


def questions_of(
    loads: Sequence[Workload], rounds: int, examples: Callable[[int], Sequence[Mapping[str, Any]]]
) -> dict[str, list[list[Question]]]:
    """The questions of each load and round, the same for every side.

    Rounds and loads share no question, so that the prefix cache only hits on the common start of all prompts.

    Args:
        loads: as planned.
        rounds: number of rounds.
        examples: returns a number of different values of the prompt template; the same number gives the same values.
    """
    short = [one for one in loads if one.kind != "long"]
    found = iter(examples(rounds * sum(one.requests for one in short)))
    return {
        one.name: [
            [
                long_question(f"{one.name}, round {number}, request {at}")
                if one.kind == "long"
                else Question(dict(next(found)))
                for at in range(one.requests)
            ]
            for number in range(rounds)
        ]
        for one in loads
    }


_WORDS = (
    "the of and to in a is that for it was on are as with they be at one have this from or had by word but what some "
    "we can out other were all there when up use your how said each she which their time if will way about many then "
    "them write would like so these her long make thing see him two has look more day could go come did number sound "
    "no most people over know water than call first who may down side been now find any new work part take get place"
)


def long_question(seed: str) -> Question:
    """A prompt of about 1,500 tokens of common words, which begins otherwise for each seed."""
    rng = random.Random(seed)
    words = " ".join(rng.choices(_WORDS.split(), k=LONG_WORDS))
    return Question(text=f"{words}\nGo on.", max_tokens=LONG_TOKENS, min_tokens=LONG_TOKENS)


def short_questions(seed: str, count: int, tokens: int) -> list[Question]:
    """For warming up and the like: not the example's, whose rows are all for what is measured."""
    return [
        Question(text=long_question(f"{seed} {at}").text[:300], max_tokens=tokens, min_tokens=tokens)
        for at in range(count)
    ]
