"""Overhead of the local Replicate: the same Cog server asked directly and through scripts/playground, in turn.

Through the local Replicate a question takes two requests, as the official clients send it: one creates the prediction,
one reads its stream.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from bench import clients, load
from bench.clients import Question
from bench.measure import Measured, alternate, medians
from bench.report import Requirement, judged, require_weights, versions, write_report
from cogpress.cog.process import Server, end_family, free_port
from cogpress.errors import CogpressError
from cogpress.replicate.api import AsyncReplicate

DIRECT, THROUGH = "direct", "local"
_TITLES = {DIRECT: "Cog server", THROUGH: "through the\nlocal Replicate"}

ALONE, STREAMS = 1, 16
"""Numbers of streams: the first is judged by its time to first token, the second by its throughput."""

REQUESTS = {ALONE: 16, STREAMS: 64}

ALONE_TOKENS = 8
"""Tokens of each answer with one stream, where only the first is measured."""

LEAST_THROUGHPUT, MOST_TTFT_SECONDS = 0.97, 0.010
"""Required: the share of the Cog server's throughput, and the largest delay of the first token."""

START_SECONDS = 120.0


def run(
    root: Path,
    weights: Path,
    examples: Callable[[int], Sequence[Mapping[str, Any]]],
    out: Path,
    console: Console,
    *,
    rounds: int = 4,
    requests: Mapping[int, int] = REQUESTS,
) -> dict[str, Any]:
    """Measure both ways to one server, print a table and write JSON.

    Args:
        root: the project's folder.
        weights: the folder that the Cog server serves.
        examples: returns a number of different values of the prompt template.
        out: the JSON file to write, with logs beside it.
        console: shows progress and the table.
        rounds: number of measurements of each way under each load.
        requests: per round, by number of streams.

    Returns:
        the report.

    Raises:
        CogpressError: a server does not start or answer; none stays behind.
    """
    require_weights(weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        console.print("Starting the Cog server and the local Replicate before it")
        cog = stack.enter_context(Server(root, weights=str(weights), log=out.parent / "playground-server.log"))
        cog.wait_ready()
        local, process = stack.enter_context(_playground(root, cog.url, out.parent / "playground-local.log"))
        replicate = AsyncReplicate("none-is-required", local, tries=1, timeout=clients.TIMEOUT)
        stack.callback(lambda: runner.run(replicate.close()))
        model = clients.ReplicateModel(replicate, "local/bench")
        runner.run(model.open())
        asks = {DIRECT: clients.cog(clients.connect(cog.url, runner, stack), cog.url), THROUGH: model.ask}
        ways = {name: _Way(runner, ask, process) for name, ask in asks.items()}
        questions = questions_of(requests, rounds, examples)
        for way in ways.values():
            way.ask(questions[STREAMS].pop(), STREAMS)
        measured = {
            f"streams-{streams}": _alternate(ways, streams, questions[streams], rounds, console) for streams in requests
        }
    report: dict[str, Any] = {
        "settings": {"weights": str(weights), "rounds": rounds, "requests": dict(requests)},
        "versions": versions(),
        "medians": {name: medians(found) for name, found in measured.items()},
        "rounds": measured,
        "verdict": [asdict(check) for check in verdict(measured)],
    }
    write_report(out, report)
    show(report, console)
    console.print(f"Figures: {out}")
    return report


def questions_of(
    requests: Mapping[int, int], rounds: int, examples: Callable[[int], Sequence[Mapping[str, Any]]]
) -> dict[int, list[list[Question]]]:
    """Sets of questions by number of streams: two for each round, and two more of the larger load as warm-up.

    Nothing is asked twice, as both ways share one engine and its prefix cache.
    """
    sets = {streams: 2 * rounds + 2 * (streams == STREAMS) for streams in requests}
    found = iter(examples(sum(sets[streams] * count for streams, count in requests.items())))

    def question(streams: int) -> Question:
        asked = Question(dict(next(found)))
        return replace(asked, max_tokens=ALONE_TOKENS) if streams == ALONE else asked

    return {
        streams: [[question(streams) for _ in range(count)] for _ in range(sets[streams])]
        for streams, count in requests.items()
    }


class _Way:
    """One way to the engine."""

    def __init__(self, runner: asyncio.Runner, ask: load.Ask, process: psutil.Process) -> None:
        self._runner, self._ask, self._process = runner, ask, process

    def ask(self, questions: Sequence[Question], streams: int) -> dict[str, float]:
        """The figures of a load, with the local Replicate's processor time per token."""
        before = sum(self._process.cpu_times()[:2])
        taken = self._runner.run(load.closed_loop(self._ask, questions, streams))
        used = sum(self._process.cpu_times()[:2]) - before
        found = load.summary(taken)
        if found["lost"]:
            raise CogpressError(f"{found['lost']:.0f} of {len(questions)} requests were lost: {taken.error}")
        return {**found, "local_cpu_us_per_token": 1e6 * used / found["tokens"]}


def _alternate(
    ways: Mapping[str, _Way], streams: int, questions: Sequence[Sequence[Question]], rounds: int, console: Console
) -> Measured:
    sets = iter(questions)
    title = f"{streams} stream{'s' * (streams > 1)}"

    def side(way: _Way) -> Callable[[], dict[str, float]]:
        return lambda: way.ask(next(sets), streams)

    def tell(number: int, name: str, found: Mapping[str, float]) -> None:
        speed, first = found["tokens_per_second"], 1000 * found["ttft_p50"]
        figures = f"{speed:,.0f} tokens/s, time to first token {first:.1f} ms"
        console.print(f"  {title}, round {number}/{rounds}, {_title(name)}: {figures}", highlight=False, soft_wrap=True)

    return alternate({name: side(way) for name, way in ways.items()}, rounds, tell)


def _title(name: str) -> str:
    return " ".join(_TITLES[name].split())


@contextmanager
def _playground(root: Path, url: str, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A local Replicate in front of a Cog server, in its own process; yields its address and process."""
    port = free_port("127.0.0.1")
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data, log.open("wb") as output:
        command = [sys.executable, str(root / "scripts" / "playground"), "--model", f"bench={url}"]
        process = subprocess.Popen(
            [*command, "--port", str(port), "--data", data],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if name != "COGPRESS_TOKEN"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    end = log.read_text(errors="replace").strip().splitlines()[-5:]
                    raise CogpressError("The local Replicate did not start:\n" + "\n".join(end))
                time.sleep(0.1)
            yield address, psutil.Process(process.pid)
        finally:
            end_family(process)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/playground/api/config", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def verdict(measured: Mapping[str, Measured]) -> list[Requirement]:
    """The requirements that were measured, by the median over rounds of how the ways compare in each.

    Args:
        measured: by load and way, the `load.summary` of each round.
    """
    checks = []
    if alone := measured.get(f"streams-{ALONE}"):
        later = statistics.median(
            through["ttft_p50"] - direct["ttft_p50"]
            for direct, through in zip(alone[DIRECT], alone[THROUGH], strict=True)
        )
        checks.append(
            Requirement(
                f"time to first token, alone: at most {1000 * MOST_TTFT_SECONDS:.0f} ms later",
                f"{1000 * later:+.1f} ms",
                later <= MOST_TTFT_SECONDS + 1e-9,  # a tolerance below the clock's resolution
            )
        )
    if many := measured.get(f"streams-{STREAMS}"):
        ratio = statistics.median(
            through["tokens_per_second"] / direct["tokens_per_second"]
            for direct, through in zip(many[DIRECT], many[THROUGH], strict=True)
        )
        checks.append(
            Requirement(
                f"tokens per second, {STREAMS} streams: at least {LEAST_THROUGHPUT} of the Cog server's",
                f"{ratio:.3f}",
                ratio >= LEAST_THROUGHPUT,
            )
        )
    return checks


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report's tables."""
    table = Table("", title="Overhead of the local Replicate", title_justify="left", caption=_CAPTION)
    for title in _TITLES.values():
        table.add_column(title, justify="right")
    for name, found in report["medians"].items():
        streams = int(name.rpartition("-")[2])
        table.add_row(f"[bold]{streams} stream{'s' * (streams > 1)}[/]")
        ways = [found[way] for way in _TITLES]
        table.add_row("  tokens/s", *(f"{way['tokens_per_second']:,.0f}" for way in ways))
        table.add_row("  TTFT, p50 / p90 (ms)", *(f"{_ms(way, 50)} / {_ms(way, 90)}" for way in ways))
        table.add_row("  its processor time (µs/token)", "-", f"{ways[1]['local_cpu_us_per_token']:,.0f}")
    console.print(table)
    console.print("", judged(report["verdict"]))


_CAPTION = "Medians over the rounds. TTFT: time to first token, from before the prediction is created."


def _ms(found: Mapping[str, float], share: int) -> str:
    return f"{1000 * found[f'ttft_p{share}']:,.1f}"
