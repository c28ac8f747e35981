"""Engine versus transformers: greedy tokens and log-probabilities.

An engine can load perfect weights and answer nonsense, without an error.
"""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress import phases
from cogpress.config import Serve
from cogpress.errors import CogpressError, reason
from cogpress.prompts import NO_LOSS, Row
from cogpress.verify import distributions
from cogpress.verify.distributions import Scored
from cogpress.weights import base

if TYPE_CHECKING:
    from cogpress.engines.base import Engine
    from cogpress.prompts import Row

STREAMS = 16
"""Answers at once when total throughput is measured."""

_SINGLE = 4
"""Answers one after the other from which the speed of one stream is taken."""

MakeEngine = Callable[[Path, Serve, int], "Engine"]


@dataclass(frozen=True)
class Answer:
    """What the engine generated for one prompt, greedily: text, token ids and their log-probabilities."""

    text: str
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Served:
    """What the engine made of held-out rows.

    Speeds are tokens per second, of one stream whose prompt is known and of 16 at once. `undrafted`: the same without
    the weights' draft, where that can be switched off; all its prompts are known by then.
    """

    answers: list[Answer]
    expected_logprobs: list[list[float]]
    stream_tokens_per_second: float
    concurrent_tokens_per_second: float
    ready_seconds: float
    undrafted: Served | None = None


@dataclass(frozen=True)
class Parity:
    """Engine against transformers on the same weights, over all generated and all expected answer tokens.

    `agreement`: share of generated tokens that transformers also finds most likely. `mean_difference`: mean absolute
    difference of the log-probabilities, nats. `served_perplexity`: the engine's, on the expected answers.
    """

    agreement: float
    mean_difference: float
    served_perplexity: float
    tokens: int
    points: list[tuple[float, float]]


def serve(
    folder: Path,
    settings: Serve,
    prompts: Sequence[list[int]],
    rows: Sequence[Row] | None,
    max_tokens: int,
    log: Path,
    make: MakeEngine | None = None,
) -> Served:
    """Have the engine answer prompts greedily and score the expected answers, in a process of its own.

    An expected answer that the engine gave itself has its log-probabilities already.

    Args:
        folder: the weights.
        settings: the engine's options.
        prompts: token ids.
        rows: prompts with their expected answers, tokenized; None to score none.
        max_tokens: the most to generate for one prompt.
        log: takes what the engine prints.
        make: makes the engine; the configured one by default.

    Raises:
        CogpressError: the engine cannot load the weights, or dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_serve, folder, settings, prompts, rows, max_tokens, log, make or _configured).result()
        except CogpressError as error:
            raise CogpressError(f"{error} Its output is in {log}.") from error
        except Exception as error:
            raise CogpressError(
                f"The engine did not serve {folder}: {reason(error)}. Its output is in {log}."
            ) from error


def _configured(folder: Path, settings: Serve, concurrency: int) -> Engine:
    from cogpress.engines import base as engine

    return engine.load(folder, settings, concurrency)


def _serve(
    folder: Path,
    settings: Serve,
    prompts: Sequence[list[int]],
    rows: Sequence[Row] | None,
    max_tokens: int,
    log: Path,
    make: MakeEngine,
) -> Served:
    with log.open("wb") as output:
        for stream in (1, 2):  # the engine's own process writes there too
            os.dup2(output.fileno(), stream)
    base.quiet_libraries()
    try:
        return asyncio.run(_ask_all(folder, settings, prompts, rows, max_tokens, make))
    finally:
        # An engine that is only collected when Python ends complains about what is gone by then.
        gc.collect()


async def _ask_all(
    folder: Path,
    settings: Serve,
    prompts: Sequence[list[int]],
    rows: Sequence[Row] | None,
    max_tokens: int,
    make: MakeEngine,
) -> Served:
    started = time.perf_counter()
    engine = make(folder, settings, STREAMS)
    ready = time.perf_counter() - started
    try:
        for prompt in prompts[:_SINGLE]:  # the first request after a start is slower, and one with a new prompt
            await _answer(engine, prompt, 1)
        answers, single, together = await _timed(engine, prompts, max_tokens)
        undrafted = None
        if await engine.drafting(False):
            plain, *speeds = await _timed(engine, prompts, max_tokens)
            undrafted = Served(plain, [], speeds[0], speeds[1], ready)
        rows = [] if rows is None else rows
        asked = list(zip(prompts, answers, strict=True))[: len(rows)]
        given = [
            expected_answer(prompt, row) == answer.tokens for (prompt, answer), row in zip(asked, rows, strict=True)
        ]
        others = [row for row, same in zip(rows, given, strict=True) if not same]
        scores = iter(await _at_once(engine.score, [row.input_ids for row in others]))
        expected = [
            answer.logprobs if same else _labelled(row, next(scores))
            for row, (_, answer), same in zip(rows, asked, given, strict=True)
        ]
    finally:
        engine.shutdown()
    return Served(
        answers=answers,
        expected_logprobs=expected,
        stream_tokens_per_second=single,
        concurrent_tokens_per_second=together,
        ready_seconds=ready,
        undrafted=undrafted,
    )


async def _timed(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> tuple[list[Answer], float, float]:
    """All answers, and the tokens per second of one stream and of all at once."""
    alone = []
    for prompt in prompts[:_SINGLE]:
        began = time.perf_counter()
        answer = await _answer(engine, prompt, max_tokens)
        alone.append(len(answer.tokens) / (time.perf_counter() - began))
    began = time.perf_counter()
    answers = await _at_once(lambda prompt: _answer(engine, prompt, max_tokens), prompts)
    seconds = time.perf_counter() - began
    return answers, sorted(alone)[len(alone) // 2], sum(len(answer.tokens) for answer in answers) / seconds


async def _at_once(ask: Callable[[list[int]], Awaitable[Any]], prompts: Sequence[list[int]]) -> list[Any]:
    """Ask for all, `STREAMS` at a time; results in order."""
    slots = asyncio.Semaphore(STREAMS)

    async def one(prompt: list[int]) -> Any:
        async with slots:
            return await ask(prompt)

    return list(await asyncio.gather(*map(one, prompts)))


async def _answer(engine: Engine, prompt: list[int], max_tokens: int) -> Answer:
    from cogpress.engines.base import Sampling

    text, tokens, logprobs = "", [], []
    async for delta in engine.generate(prompt, Sampling(max_tokens=max_tokens, logprobs=0)):
        text += delta.text
        tokens += delta.token_ids
        logprobs += delta.logprobs
    return Answer(text, tokens, logprobs)


def expected_answer(prompt: list[int], row: Row) -> list[int]:
    """The tokens of the answer that a row expects to its prompt; none where other tokens are learnt, too."""
    learnt = [label for label in row.labels if label != NO_LOSS]
    return learnt if row.input_ids[: len(prompt) + len(learnt)] == prompt + learnt else []


def _labelled(row: Row, logprobs: Sequence[float]) -> list[float]:
    return [value for value, label in zip(logprobs, row.labels, strict=True) if label != NO_LOSS]


def compare(
    load: distributions.Load,
    prompts: Sequence[list[int]],
    rows: Sequence[Row],
    served: Served,
    pad: int,
    scored: Sequence[Scored] | None = None,
) -> Parity:
    """What transformers makes of the tokens that the engine generated, and of the expected ones.

    Args:
        load: loads the same weights with transformers; called only where something is left to score.
        prompts: token ids, as the engine got them.
        rows: prompts with their expected answers, as the engine got them.
        served: what the engine made of both.
        pad: fills short rows; its value changes nothing.
        scored: what the model makes of the rows, where that is known already.
    """
    if scored is None:
        scored = phases.run("comparison", _scored, load, rows, pad)
    found: dict[int, Scored] = {
        at: scored[at] for at, row in enumerate(rows) if expected_answer(prompts[at], row) == served.answers[at].tokens
    }
    others = [at for at in range(len(prompts)) if at not in found]
    generated = [
        Row(prompts[at] + served.answers[at].tokens, [NO_LOSS] * len(prompts[at]) + served.answers[at].tokens)
        for at in others
    ]
    pairs = [(served.expected_logprobs[at], scored[at]) for at in range(len(rows)) if at not in found]
    if others:
        found |= zip(others, phases.run("comparison", _scored, load, generated, pad), strict=True)
    pairs += [(served.answers[at].logprobs, one) for at, one in found.items()]
    points = [point for theirs, one in pairs for point in zip(theirs, one.logprobs, strict=True)]
    same = [one for scores in found.values() for one in scores.most_likely]
    expected = [value for values in served.expected_logprobs for value in values]
    return Parity(
        agreement=sum(same) / max(len(same), 1),
        mean_difference=sum(abs(theirs - ours) for theirs, ours in points) / max(len(points), 1),
        served_perplexity=math.exp(-sum(expected) / max(len(expected), 1)),
        tokens=len(points),
        points=points,
    )


def _scored(load: distributions.Load, rows: Sequence[Row], pad: int) -> list[Scored]:
    return distributions.score(load(), rows, pad)


def changed(drafted: Sequence[Answer], plain: Sequence[Answer], difference: float) -> int:
    """How many greedy answers a draft changed.

    Where two tokens are as likely as each other, the other requests of a batch decide which comes first, with or
    without a draft; these do not count.

    Args:
        drafted: the engine's answers with the draft.
        plain: its answers without one.
        difference: of log-probabilities, in nats, up to which two tokens are as likely as each other.
    """
    found = 0
    for one, other in zip(drafted, plain, strict=True):
        pairs = list(zip(one.tokens, other.tokens, strict=False))
        at = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if at is None:
            found += len(one.tokens) != len(other.tokens)
        else:
            found += abs(one.logprobs[at] - other.logprobs[at]) > difference
    return found
