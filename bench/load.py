"""A load generator with closed and open loops, and the statistics of what each user saw.

One event loop runs all streams, so that the client takes little of a machine that it may share with the servers.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogpress.errors import CogpressError


@dataclass(frozen=True)
class Usage:
    """A server's token counts for one request; 0 if it does not report them."""

    prompt_tokens: int
    tokens: int


Later = Callable[[], Awaitable[Usage]]
"""Fetches the usage after the load, for servers that need another request for it."""

Ask = Callable[[Any], AsyncIterator[Usage | Later | None]]
"""Asks one question: yields None when a chunk with text arrives, and the usage once, at the end. Raises LostError if
the request fails."""


class LostError(CogpressError):
    """A request without a complete answer."""

    def __init__(self, text: str, cause: str, *, refused: bool = False) -> None:
        """Keep the cause for the report.

        Args:
            text: a sentence.
            cause: a few words, the same for all requests that were lost alike.
            refused: the server did not accept the request: all slots are in use, or too many requests came.
        """
        super().__init__(text)
        self.cause, self.refused = cause, refused


@dataclass(slots=True)
class Answer:
    """One request as its user saw it; times are readings of `time.perf_counter`."""

    number: int
    """The position of its question in the load, from 1."""
    started: float
    """When it was due: in an open loop at its arrival, so that a late client or server hides nothing."""
    late: float
    """Seconds from then until it was sent."""
    texts: list[float] = field(default_factory=list)
    """When each chunk with text arrived."""
    ended: float = 0.0
    usage: Usage | Later | None = None
    error: str = ""
    cause: str = ""
    """Why it was lost, in a few words; empty if it was not. An answer without text is lost without an error."""
    refused: bool = False

    @property
    def tokens(self) -> int:
        """The server's count, or the number of chunks with text."""
        counted = self.usage.tokens if isinstance(self.usage, Usage) else 0
        return counted or len(self.texts)


@dataclass(frozen=True)
class LoadResult:
    """The answers to a load, the seconds from the first request to the last end, and the share of one core that this
    process used."""

    answers: list[Answer]
    seconds: float
    client_share: float

    @property
    def error(self) -> str:
        """The first error; empty if there was none."""
        return next((answer.error for answer in self.answers if answer.error), "")


OnAnswer = Callable[[], None]
"""Called when a request has ended in any way."""


STAGGER_SECONDS = 0.1
"""Delay between the starts of two streams. Started at once they would stay in step for the whole load (prompts computed
together, answers ending together), which would decide the figures more than the server does."""


async def closed_loop(
    ask: Ask, questions: Sequence[Any], streams: int, on_answer: OnAnswer = lambda: None, *, stagger: float = 0.0
) -> LoadResult:
    """Ask with a number of streams, each of which sends its next question once the last is answered.

    Args:
        ask: asks one question.
        questions: each is asked once.
        streams: number of requests at once.
        on_answer: called after each.
        stagger: seconds between the starts of two streams.
    """
    waiting = iter(enumerate(questions, 1))

    async def stream(at: int) -> list[Answer]:
        await asyncio.sleep(at * stagger)
        # All streams share one iterator, so that none ends up with a longer list than the others.
        found = []
        for number, question in waiting:
            found.append(await _one(ask, number, question, time.perf_counter()))
            on_answer()
        return found

    return await _taken([stream(at) for at in range(streams)])


async def open_loop(
    ask: Ask, questions: Sequence[Any], times: Sequence[float], on_answer: OnAnswer = lambda: None
) -> LoadResult:
    """Ask each question at its time, whether or not earlier ones are answered, like many independent users.

    Args:
        ask: asks one question.
        questions: each is asked once.
        times: seconds from the start, one for each question.
        on_answer: called after each.
    """
    begun = time.perf_counter()

    async def user(number: int, question: Any, due: float) -> list[Answer]:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        answer = await _one(ask, number, question, due)
        on_answer()
        return [answer]

    due = zip(questions, times, strict=True)
    return await _taken([user(number, question, begun + at) for number, (question, at) in enumerate(due, 1)])


async def _taken(work: list[Any]) -> LoadResult:
    begun, used = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    used = time.process_time() - used
    answers = sorted((answer for task in tasks for answer in task.result()), key=lambda answer: answer.started)
    ended = max((answer.ended for answer in answers), default=begun)
    for answer in answers:
        if answer.usage is not None and not isinstance(answer.usage, Usage):
            try:
                answer.usage = await answer.usage()
            except CogpressError:
                answer.usage = None
    seconds = max(ended - begun, 1e-9)
    return LoadResult(answers, seconds, used / seconds)


async def _one(ask: Ask, number: int, question: Any, due: float) -> Answer:
    answer = Answer(number, due, time.perf_counter() - due)
    try:
        async for item in ask(question):
            if item is None:
                answer.texts.append(time.perf_counter())
            else:
                answer.ended, answer.usage = time.perf_counter(), item
        if answer.usage is None:
            raise LostError("The answer broke off before its end.", "broken off")
        answer.cause = "" if answer.texts else "no text"
    except LostError as error:
        answer.error, answer.cause, answer.refused = str(error), error.cause, error.refused
    answer.ended = answer.ended or time.perf_counter()
    return answer


def joined(parts: Sequence[LoadResult]) -> LoadResult:
    """Consecutive loads as one, with its answers numbered throughout."""
    answers = [answer for part in parts for answer in part.answers]
    for number, answer in enumerate(answers, 1):
        answer.number = number
    seconds = sum(part.seconds for part in parts)
    return LoadResult(answers, seconds, sum(part.client_share * part.seconds for part in parts) / seconds)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seeded Poisson arrivals: seconds from the start, ascending.

    Args:
        count: number of arrivals.
        rate: average arrivals per second.
        seed: the same seed gives the same times, scaled by the rate.
    """
    rng = random.Random(f"arrivals:{seed}")

    def times() -> Iterator[float]:
        now = 0.0
        for _ in range(count):
            now += rng.expovariate(1.0) / rate
            yield now

    return list(times())


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0 to 1) lies, interpolated; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def lost(taken: LoadResult) -> list[dict[str, Any]]:
    """The lost requests: `request` is the position of its question in the load, from 1; `error` is a sentence, and
    `cause` is the same for all requests that were lost alike, such as HTTP 409."""
    found = [answer for answer in taken.answers if answer.cause]
    return [{"request": answer.number, "cause": answer.cause, "error": answer.error} for answer in found]


PERCENTILES = (50, 90, 99)


def summary(taken: LoadResult) -> dict[str, float]:
    """The figures of a load, with times in seconds.

    `lost` counts requests that failed or whose answer has no text; times are those of the others. `ttft` is the time to
    first token, measured to the first chunk with text. `itl` is the inter-token latency, measured between chunks with
    text over all requests, so several tokens in one chunk count as one. `stream_tokens_per_second` is the median over
    requests of the speed after the first text. A figure without measurements is 0.

    Raises:
        CogpressError: nothing was answered.
    """
    answers = taken.answers
    failed = [answer for answer in answers if answer.error]
    good = [answer for answer in answers if not answer.cause]
    if not good:
        raise CogpressError(f"None of {len(answers)} requests was answered: {taken.error or 'there was no text'}")
    firsts = [answer.texts[0] - answer.started for answer in good]
    gaps = [after - before for one in good for before, after in zip(one.texts, one.texts[1:], strict=False)]
    speeds = [(one.tokens - 1) / (one.texts[-1] - one.texts[0]) for one in good if one.texts[-1] > one.texts[0]]
    prompts = [one.usage.prompt_tokens for one in good if isinstance(one.usage, Usage) and one.usage.prompt_tokens]
    tokens = sum(answer.tokens for answer in good)
    return {
        "requests": float(len(answers)),
        "failed": float(len(failed)),
        "refused": float(sum(answer.refused for answer in failed)),
        "empty": float(len(answers) - len(failed) - len(good)),
        "lost": float(len(answers) - len(good)),
        "seconds": taken.seconds,
        "tokens": float(tokens),
        "prompt_tokens_mean": statistics.fmean(prompts) if prompts else 0.0,
        "tokens_per_second": tokens / taken.seconds,
        "requests_per_second": len(good) / taken.seconds,
        "stream_tokens_per_second": statistics.median(speeds) if speeds else 0.0,
        **{f"ttft_p{one}": percentile(firsts, one / 100) for one in PERCENTILES},
        **{f"itl_p{one}": percentile(gaps, one / 100) for one in PERCENTILES},
        "latency_p50": percentile([answer.ended - answer.started for answer in good], 0.5),
        "late_max": max(answer.late for answer in answers),
        "client_share": taken.client_share,
    }
