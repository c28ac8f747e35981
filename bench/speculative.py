"""Single-stream speed with and without speculation, and whether greedy answers stay the same."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import alternate_aloud, in_fresh_process, medians
from bench.report import speeds, write_report
from cogpress import config
from cogpress.prompts import Question, conversation
from cogpress.serve import model as serving

NGRAM: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 10,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 1,
}
"""The options if model.yaml sets no speculation."""

MAX_TOKENS = 160


def run(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Ask the worked example's questions one after the other, each after an answered one in the same conversation.

    N-gram speculation gains where the prompt shows the form of the answer.

    Args:
        root: the project's folder.
        weights: the folder to serve.
        rows: rows of the worked example, `prompt` and `completion`; the first is the answered one.
        out: the JSON file to write.
        rounds: number of measurements of each side.
        console: shows progress and the table.
    """
    settings = config.load(root / "model.yaml")
    speculative = settings.serve.speculative or NGRAM
    answers: dict[str, list[str]] = {}

    def side(options: dict[str, Any] | None) -> dict[str, float]:
        found, texts = in_fresh_process(_measure, root, weights, list(rows), options)
        answers["with" if options else "without"] = texts
        return dict(found)

    sides = {"without": partial(side, None), "with": partial(side, speculative)}
    measured = alternate_aloud(
        sides,
        rounds,
        console,
        lambda found: f"{found['tokens_per_second']:.1f} tokens/s",
    )
    found = medians(measured)
    same = sum(one == other for one, other in zip(answers["with"], answers["without"], strict=True))
    report: dict[str, Any] = {
        **found,
        "speculative": speculative,
        "speedup": found["with"]["tokens_per_second"] / found["without"]["tokens_per_second"],
        "same_answers": same,
        "answers": len(answers["with"]),
        "rounds": measured,
    }
    titles = {"without": "without", "with": "with speculation"}
    table = speeds(found, titles, "tokens per second, 1 stream", report["speedup"])
    table.add_row("same greedy answers", "", f"{same} of {report['answers']}", "")
    console.print(table)
    write_report(out, report)
    return report


def _measure(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], speculative: dict[str, Any] | None
) -> tuple[dict[str, float], list[str]]:
    return asyncio.run(_ask_all(root, weights, rows, speculative))


async def _ask_all(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], speculative: dict[str, Any] | None
) -> tuple[dict[str, float], list[str]]:
    settings = config.load(root / "model.yaml")
    serve = settings.serve.model_copy(update={"speculative": speculative})
    server = serving.ServedModel(str(weights), settings.model_copy(update={"serve": serve}), root, concurrency=16)

    async def ask(row: dict[str, Any]) -> tuple[str, int]:
        metrics: dict[str, Any] = {}
        shown = [
            *conversation(Question(fields=rows[0]["prompt"], system=""), server.prompt),
            {"role": "assistant", "content": rows[0]["completion"]},
            *conversation(Question(fields=row["prompt"], system=""), server.prompt),
        ]
        inputs = {"messages": json.dumps(shown), "max_tokens": MAX_TOKENS}
        text = "".join([chunk async for chunk in await server.answer(inputs, metrics.__setitem__)])
        return text, int(metrics["output_token_count"])

    try:
        for row in rows[1:3]:
            await ask(row)  # the first requests after a start are slower
        started = time.perf_counter()
        found = [await ask(row) for row in rows[1:]]
        seconds = time.perf_counter() - started
    finally:
        server.engine.shutdown()
    tokens = sum(count for _, count in found)
    return {"tokens_per_second": tokens / seconds, "tokens": tokens}, [text for text, _ in found]
