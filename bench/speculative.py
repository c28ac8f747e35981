"""What a draft gains: tokens per second without one, with n-gram lookup and with the weights' own table.

On the task and off it, with and without a JSON schema, at several loads, side by side in one run; how much of each
draft is taken; and whether every greedy answer stays the same.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.measure import alternate_aloud, in_fresh_process, medians
from bench.report import judged, write_report
from cogpress import config, plots
from cogpress.cog.process import free_port
from cogpress.draft import file as draft
from cogpress.draft import proposer
from cogpress.errors import CogpressError
from cogpress.prompts import Question, encode
from cogpress.serve import model as serving
from cogpress.weights import base

SIDES: dict[str, Any] = {
    "none": "none",
    "n-gram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "table": "auto",
}
"""`serve.speculative` of each side; `auto` is the table that comes with the weights."""

SUFFIX = {"method": "suffix", "num_speculative_tokens": proposer.MOST}
"""A side of its own where its package, arctic-inference, is installed."""

LOADS = {1: 12, 4: 24, 16: 48, 64: 64}
"""Streams, and the answers that each load asks for."""

REQUIRED = {1: 3.0, 16: 1.8, 64: 1.25}
"""Least speed of the table against none, by number of streams."""

OFF_TASK = 0.98
"""Least speed where the prompts are of no task that the table knows."""

MAX_TOKENS = 160

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "calculations": {"type": "array", "items": {"type": "object"}},
            "filters": {"type": "array", "items": {"type": "object"}},
            "limit": {"type": "integer"},
        },
        "required": ["calculations"],
    }
)
"""A form that every right answer has."""

OTHER = (
    "Why do leaves change their colour in autumn?",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "Explain how a bicycle stays upright.",
    "Name three things to pack for a week by the sea, and why.",
    "What is the difference between weather and climate?",
    "Tell a story of four sentences about a lighthouse.",
    "How is bread made?",
    "Describe the taste of an orange to someone who never had one.",
)
"""Prompts of another kind than the worked example's."""


def run(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Ask the worked example's held-out questions, whose column names no training answer has, and other prompts.

    Args:
        root: the project's folder.
        weights: the folder to serve, with a draft.
        rows: rows of the worked example, `prompt` and `completion`.
        out: the JSON file to write; a picture is written beside it.
        rounds: number of measurements of each side.
        console: shows progress and the tables.

    Raises:
        CogpressError: the weights have no draft.
    """
    if not draft.path_in(weights).is_file():
        raise CogpressError(f"{weights} has no draft. Make one with scripts/draft.")
    answers: dict[str, dict[str, list[str]]] = {}
    chosen = SIDES | ({"suffix": SUFFIX} if importlib.util.find_spec("arctic_inference") else {})

    def side(name: str) -> dict[str, float]:
        found, texts = in_fresh_process(_measure, root, weights, list(rows), chosen[name])
        answers[name] = texts
        return dict(found)

    sides = {name: partial(side, name) for name in chosen}
    measured = alternate_aloud(sides, rounds, console, lambda found: f"{found['task 1']:.1f} tokens/s in one stream")
    found = medians(measured)
    ratios = {
        name: {key: figures[key] / found["none"][key] for key in figures if not key.startswith("share")}
        for name, figures in found.items()
    }
    same = {
        name: [sum(one == other for one, other in zip(*pair, strict=True)) for pair in _pairs(answers, name)]
        for name in chosen
    }
    total = [len(texts) for texts in answers["none"].values()]
    checks = [
        {
            "requirement": f"table, {streams} stream{'s' * (streams > 1)}: at least {least} times none",
            "measured": f"{ratios['table'][f'task {streams}']:.2f}",
            "passed": ratios["table"][f"task {streams}"] >= least,
        }
        for streams, least in REQUIRED.items()
    ]
    worst = min(ratios["table"][key] for key in ratios["table"] if key.startswith("off"))
    checks += [
        {
            "requirement": f"table, off the task: at least {OFF_TASK} times none",
            "measured": f"{worst:.2f}",
            "passed": worst >= OFF_TASK,
        },
        {
            "requirement": "table: every greedy answer on the task is the one without",
            "measured": f"{same['table'][0]} of {total[0]}",
            "passed": same["table"][0] == total[0],
        },
    ]
    asked = _asking(root, weights, rows)
    report = {
        "asking_ms": asked,
        "sides": chosen,
        "found": found,
        "ratios": ratios,
        "same": same,
        "checks": checks,
        "rounds": measured,
    }
    console.print(_table(found, ratios))
    console.print(f"Asking the table takes {asked:.3f} ms for each of {len(rows)} requests.")
    console.print(judged(checks))
    write_report(out, report)
    plots.drafts(ratios, out.with_suffix(".png"))
    console.print(f"Report: {out}   picture: {out.with_suffix('.png')}")
    return report


def _asking(root: Path, weights: Path, rows: Sequence[dict[str, Any]]) -> float:
    """Milliseconds a request that one step's drafts take, all requests at once, halfway through the right answers."""
    tokenizer = base.tokenizer(weights)
    settings = config.load(root / "model.yaml").prompt
    prompts = [encode(tokenizer, Question(fields=row["prompt"]), settings) for row in rows]
    answers = [tokenizer.encode(row["completion"], add_special_tokens=False) for row in rows]
    steps = min(map(len, answers)) - 1
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) + proposer.MOST
    ids: np.ndarray = np.zeros((len(rows), width), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = [*prompt, *answer]
    asked = proposer.Proposer(
        SimpleNamespace(
            additional_config={proposer.OPTION: str(draft.path_in(weights))},
            model_config=SimpleNamespace(max_model_len=width),
        )
    )
    took = []
    for step in range(steps):
        lengths = np.array([len(prompt) + step + 1 for prompt in prompts], np.int32)
        started = time.perf_counter()
        asked.propose([answer[step : step + 1] for answer in answers], lengths, ids)
        took.append(time.perf_counter() - started)
    return 1000 * statistics.median(took) / len(rows)


def _pairs(answers: dict[str, dict[str, list[str]]], name: str) -> list[tuple[list[str], list[str]]]:
    return [(answers[name][kind], texts) for kind, texts in answers["none"].items()]


def _table(found: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]) -> Table:
    table = Table("prompts", "streams", *found, title="Tokens per second", title_justify="left")
    for key in found["none"]:
        kind, _, load = key.rpartition(" ")
        if kind.startswith("share"):
            continue
        cells = [
            f"{figures[key]:,.1f}" + ("" if name == "none" else f"  x {ratios[name][key]:.2f}")
            for name, figures in found.items()
        ]
        table.add_row(kind, load, *cells)
    for streams in LOADS:
        steps = [one[f"share per step {streams}"] for one in found.values()]
        table.add_row("tokens per step", str(streams), *(f"{one:.2f}" for one in steps))
    for streams in LOADS:
        shares = [one.get(f"share taken {streams}") for one in found.values()]
        table.add_row("taken of those drafted", str(streams), *("" if one is None else f"{one:.0%}" for one in shares))
    for place in range(1, proposer.MOST + 1):
        shares = [one.get(f"share place {place}") for one in found.values()]
        table.add_row(f"taken, place {place}", "1", *("" if one is None else f"{one:.0%}" for one in shares))
    return table


def _measure(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], speculative: Any
) -> tuple[dict[str, float], dict[str, list[str]]]:
    return asyncio.run(_ask_all(root, weights, rows, speculative))


async def _ask_all(
    root: Path, weights: Path, rows: Sequence[dict[str, Any]], speculative: Any
) -> tuple[dict[str, float], dict[str, list[str]]]:
    settings = config.load(root / "model.yaml")
    # With metrics, vLLM counts what is drafted and taken.
    serve = settings.serve.model_copy(update={"speculative": speculative, "metrics_port": free_port("127.0.0.1")})
    server = serving.ServedModel(str(weights), settings.model_copy(update={"serve": serve}), root, concurrency=64)

    async def ask(inputs: dict[str, Any]) -> tuple[str, int]:
        metrics: dict[str, Any] = {}
        chunks = await server.answer({"max_tokens": MAX_TOKENS, **inputs}, metrics.__setitem__)
        text = "".join([chunk async for chunk in chunks])
        return text, int(metrics["output_token_count"])

    async def speed(asked: Sequence[dict[str, Any]], streams: int) -> tuple[float, list[str], int]:
        slots = asyncio.Semaphore(streams)

        async def one(inputs: dict[str, Any]) -> tuple[str, int]:
            async with slots:
                return await ask(inputs)

        started = time.perf_counter()
        got = await asyncio.gather(*map(one, asked))
        tokens = sum(count for _, count in got)
        return tokens / (time.perf_counter() - started), [text for text, _ in got], tokens

    task = [{"fields": json.dumps(row["prompt"])} for row in rows]
    other = [{"prompt": text, "system_prompt": "", "max_tokens": 96} for text in OTHER]
    found: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    try:
        await speed(task[:2], 2)  # the first requests after a start are slower
        for streams, count in LOADS.items():
            before = _counted()
            found[f"task {streams}"], texts["task"], tokens = await speed(task[:count], streams)
            counted = _counted()
            counted.subtract(before)
            found |= _shares(counted, streams, tokens)
        with_schema = [{**inputs, "json_schema": SCHEMA} for inputs in task]
        found["schema 1"], _, _ = await speed(with_schema[:8], 1)
        found["schema 16"], texts["schema"], _ = await speed(with_schema[:32], 16)
        found["off task 1"], _, _ = await speed(other[:3], 1)
        found["off task 8"], texts["off task"], _ = await speed(other, 8)
    finally:
        server.engine.shutdown()
    return found, texts


def _counted() -> Counter[str]:
    """What vLLM has counted since its start: drafts (`drafts`), their tokens (`drafted`), and those taken, by place."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    names = {"vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_draft_tokens": "drafted"}
    found: Counter[str] = Counter()
    for metric in get_metrics_snapshot():
        if metric.name in names:
            found[names[metric.name]] += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found.update({str(place): count for place, count in enumerate(metric.values, 1)})
    return found


def _shares(counted: Counter[str], streams: int, tokens: int) -> dict[str, float]:
    """Tokens that a request gets in a step, what share of its drafted ones, and by place where it is alone.

    Args:
        counted: a difference of `_counted`.
        streams: the load.
        tokens: of the answers.
    """
    taken = sum(count for name, count in counted.items() if name.isdecimal())
    found = {f"share per step {streams}": tokens / max(1, tokens - taken)}
    if "drafted" in counted:
        found[f"share taken {streams}"] = taken / max(1, counted["drafted"])
        if streams == 1:
            found |= {
                f"share place {place}": counted[place] / max(1, counted["drafts"])
                for place in counted
                if place.isdecimal()
            }
    return found
