"""Serving speed against vLLM's own OpenAI server on the same weights, in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cogpress import chat, client, engine, manifest
from cogpress.bench import alternate, medians
from cogpress.config import Prompt, Serve, load
from cogpress.errors import CogpressError
from cogpress.server import Server, end_family, free_port

MAX_TOKENS = 160
"""More than any expected answer of the worked example has."""


@dataclass(frozen=True)
class Stream:
    """One streamed answer as its client saw it: seconds to the first text, seconds in all, tokens."""

    first_seconds: float
    seconds: float
    tokens: int


def run(
    root: Path, weights: Path, questions: Sequence[dict[str, Any]], out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Serving speed against vLLM's own OpenAI server on the same weights, engine options and questions.

    Both servers run side by side and are asked in turn, first alone and then with 16 streams, in an order that
    alternates; the report holds medians over all rounds.

    Args:
        root: the project's folder.
        weights: the folder that both serve.
        questions: held-out rows of the worked example.
        out: where the JSON goes.
        rounds: how often both are measured.
        console: where progress is shown.
    """
    facts = manifest.read(weights) or {}
    prompt = Prompt.model_validate(facts["prompt"])
    settings = load(root / "model.yaml").serve
    with (
        Server(root, weights=str(weights), log=out.with_name("bench-cogpress.log")) as ours,
        _vllm_server(weights, settings, out.with_name("bench-vllm.log")) as theirs,
    ):
        ours.wait_ready()
        _wait_for(f"{theirs}/health")
        sides: dict[str, Callable[[dict[str, Any]], Stream]] = {
            "cogpress": lambda row: _ask_cog(ours.url, row),
            "vllm": lambda row: _ask_openai(theirs, str(weights), prompt, row),
        }
        for side in sides.values():  # the first requests after a start are slower on both
            for row in questions[:4]:
                side(row)
        measured = alternate(
            {name: partial(_load, side, questions) for name, side in sides.items()},
            rounds,
            lambda number, name, found: console.print(
                f"  round {number}/{rounds}, {name}: "
                + ", ".join(f"{found[f'tokens_per_second_{n}']:.0f} tokens/s with {n}" for n in LOADS)
            ),
        )
    found = medians(measured)
    ours_, theirs_ = found["cogpress"], found["vllm"]
    report: dict[str, Any] = {
        **found,
        "ttft_difference_seconds": {n: ours_[f"ttft_{n}"] - theirs_[f"ttft_{n}"] for n in LOADS},
        "throughput_ratio": {n: ours_[f"tokens_per_second_{n}"] / theirs_[f"tokens_per_second_{n}"] for n in LOADS},
        "rounds": measured,
    }
    table = Table("", "cogpress", "vLLM's server", "cogpress against vLLM")
    for n in LOADS:
        difference = f"{1000 * report['ttft_difference_seconds'][n]:+.0f} ms"
        table.add_row(
            f"time to first token, {n} streams",
            f"{ours_[f'ttft_{n}']:.3f} s",
            f"{theirs_[f'ttft_{n}']:.3f} s",
            difference,
        )
        speed = [f"{side[f'tokens_per_second_{n}']:.0f}" for side in (ours_, theirs_)]
        table.add_row(f"tokens per second, {n} streams", *speed, f"x {report['throughput_ratio'][n]:.2f}")
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(out, report)
    return report


LOADS = (1, 16)
"""Streams at once."""


def _load(ask: Callable[[dict[str, Any]], Stream], questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for streams in LOADS:
        rows = list(questions[: 12 if streams == 1 else 64])
        started = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            answers = list(pool.map(ask, rows))
        seconds = time.perf_counter() - started
        found[f"ttft_{streams}"] = statistics.median(answer.first_seconds for answer in answers)
        found[f"tokens_per_second_{streams}"] = sum(answer.tokens for answer in answers) / seconds
    return found


def _ask_cog(url: str, row: dict[str, Any]) -> Stream:
    started = time.perf_counter()
    first, tokens = 0.0, 0
    for event in client.stream(url, {"fields": json.dumps(row["prompt"]), "max_tokens": MAX_TOKENS}):
        if event.kind == "output":
            first = first or time.perf_counter() - started
        tokens = int(event.metrics.get("output_token_count", tokens))
    return Stream(first, time.perf_counter() - started, tokens)


def _ask_openai(url: str, model: str, prompt: Prompt, row: dict[str, Any]) -> Stream:
    body = {
        "model": model,
        "messages": chat.chat(prompt.render(row["prompt"]), prompt.system),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first, tokens = 0.0, 0
    with (
        client.connect(url) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - started
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return Stream(first, time.perf_counter() - started, tokens)


@contextmanager
def _vllm_server(weights: Path, settings: Serve, log: Path) -> Iterator[str]:
    """vLLM's own OpenAI server with the engine options that ours has."""
    import torch

    cuda = torch.cuda.is_available()
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", settings.dtype, "--disable-log-stats"]
    command += ["--max-num-seqs", "64", "--load-format", "safetensors"]
    command += ["--gpu-memory-utilization", str(settings.gpu_memory_share / 2)] if cuda else ["--enforce-eager"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **engine.environment(settings, cuda)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_family(process)


def _wait_for(url: str, timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise CogpressError(f"{url} did not answer within {timeout:.0f} s. Its log in runs/ tells why.")
