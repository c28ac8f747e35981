"""Serving speed: the same load on cogpress's server, on vLLM's own with the same weights, and on one given by URL."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import clients, load, servers
from bench.clients import Question, Side
from bench.load import LoadResult
from bench.measure import Measured, alternate, medians
from bench.report import hardware, require_weights, versions, write_report
from bench.serve_report import milliseconds, show, verdict
from bench.servers import OURS, THEIRS
from bench.workloads import LOADS, STREAMS, Workload, long_question, planned, questions_of, short_questions
from cogpress import config, source
from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.weights import manifest

QUIET_SECONDS = 2.0
"""Pause before each measurement. For a second after its last step an engine spins (vLLM 0.32, `SpinCondition`), which
delayed the other server's first answer by 0.9 s."""

OPEN_SHARE = 0.7
"""Arrival rate in the open loop, as a share of the request rate with 16 streams."""


def run(
    root: Path,
    weights: Path,
    examples: Callable[[int], Sequence[Mapping[str, Any]]],
    out: Path,
    console: Console,
    *,
    kinds: Sequence[str] = LOADS,
    streams: Sequence[int] = STREAMS,
    rounds: int = 3,
    scale: int | None = None,
    url: str | None = None,
    warm_disk: bool = True,
) -> dict[str, Any]:
    """Measure all sides under the same loads, print tables, and write JSON and a plot.

    Both local servers run side by side and are asked in alternating order. Figures are medians over the rounds; lost
    requests are summed over them and listed one by one.

    Args:
        root: the project's folder.
        weights: the folder that both local servers serve.
        examples: as `questions_of` takes it.
        out: the JSON file to write, with the plot beside it.
        console: shows progress and tables.
        kinds: kinds of load, from `LOADS`.
        streams: numbers of streams for the worked example's questions.
        rounds: number of measurements of each side under each load.
        scale: multiplies the requests of each load; by default 1, with a GPU 8.
        url: one more side, as `clients.remote` takes it.
        warm_disk: start a server once, unmeasured; otherwise the first start reads from disk, and on a GPU compiles,
            for the second too.

    Returns:
        the report.

    Raises:
        CogpressError: a side does not start or answer; no server stays behind.
    """
    require_weights(weights)
    planned(kinds, streams, scale or 1)
    settings = config.load(root / "model.yaml")
    facts = (manifest.read(weights) or {}).get("prompt")
    prompt = Prompt.model_validate(facts) if facts else settings.prompt
    # Before servers start: the weights may ask for other fields than the example has.
    Question(fields=examples(1)[0]).messages(prompt)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        third = clients.remote(url, runner, stack) if url else None
        columns = (*Progress.get_default_columns(), TextColumn("left, after"), TimeElapsedColumn())
        # Only two updates per second, because this process also measures times.
        bar = Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=120)
        stack.enter_context(bar)
        progress = _Progress(bar, bar.add_task("looking at the machine", total=None))
        machine = servers.machine(root, weights, settings.serve)
        loads = planned(kinds, streams, scale or (8 if machine.gpus else 1))
        asked = questions_of(loads, rounds, examples)
        started = servers.start(root, weights, machine, out.parent, stack, progress.tell, warm_disk=warm_disk)
        ours, theirs = (started[name].url for name in (OURS, THEIRS))
        compared = [
            Side(OURS, "cogpress", clients.cog(clients.connect(ours, runner, stack), ours)),
            Side(
                THEIRS,
                "vLLM's server",
                clients.openai(clients.connect(theirs, runner, stack), theirs, str(weights), prompt),
            ),
            *([third] if third else []),
        ]
        progress.tell("warming up")
        bar.update(progress.task, total=rounds * len(compared) * sum(one.work for one in loads))
        for side in compared:
            _warm_up(side, runner)
        measuring = _Measuring(runner, {side.name: side for side in compared}, rounds, progress)
        measured = {one.name: measuring.load(one, asked[one.name]) for one in loads}
        memory = {name: server.memory_gb() for name, server in started.items()}
    report: dict[str, Any] = {
        "settings": {
            "weights": str(weights),
            "loads": [asdict(one) for one in loads],
            "rounds": rounds,
            "url": url and source.shown(url),
            "vllm_options": machine.options,
            "open_loop_requests_per_second": measuring.rate,
        },
        "sides": {side.name: side.title for side in compared},
        "versions": versions(),
        "machine": {**hardware(), "gpus": machine.gpus},
        "starts": {name: {"seconds": server.seconds, "parts": server.parts()} for name, server in started.items()},
        "memory_gb": memory,
        "gpu_memory_gb": {name: server.gpu_gb for name, server in started.items()} if machine.gpus else None,
        "medians": {name: medians(found) for name, found in measured.items()},
        "rounds": measured,
        "lost": measuring.lost,
        "verdict": [asdict(check) for check in verdict(measured)],
    }
    write_report(out, report)
    drawn = [one for one in loads if one.kind == "example"]
    picture = out.with_suffix(".png")
    if drawn:
        from cogpress import plots  # takes a second to import

        curves = {
            side.title: [{"streams": one.streams, **report["medians"][one.name][side.name]} for one in drawn]
            for side in compared
        }
        plots.serving_curves(curves, picture)
    show(report, console)
    console.print(f"Figures: {out}" + (f"   picture: {picture}" if drawn else ""))
    return report


def _warm_up(side: Side, runner: asyncio.Runner) -> None:
    """Send the first requests after a start, which are slower: single ones, many at once, and long prompts."""
    long = [replace(long_question(f"warm {at}"), max_tokens=32, min_tokens=32) for at in range(2)]
    short = short_questions("warm", 18, 32)
    for questions, streams in ((short[:2], 1), (short[2:], 16), (long, 1)):
        taken = runner.run(load.closed_loop(side.ask, questions, streams))
        if all(answer.error for answer in taken.answers):
            raise CogpressError(f"{side.title} answers nothing: {taken.error}")


@dataclass(frozen=True)
class _Progress:
    """The one task of a progress bar."""

    bar: Progress
    task: TaskID

    def tell(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def print(self, text: str) -> None:
        self.bar.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


@dataclass
class _Measuring:
    """Runs one load after the other, each on all sides in turn."""

    runner: asyncio.Runner
    sides: Mapping[str, Side]
    rounds: int
    progress: _Progress
    rate: float | None = None
    """Requests per second in the open loop, the same for all sides."""
    lost: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By load and side: every lost request, and counts by cause."""

    def load(self, one: Workload, asked: Sequence[Sequence[Question]]) -> Measured:
        """Measure all rounds of one load."""
        if one.kind == "open" and self.rate is None:  # there was no load with 16 streams
            side = next(iter(self.sides.values()))
            self.progress.tell(f"the rate of {side.title} with 16 streams")
            taken = self.runner.run(load.closed_loop(side.ask, short_questions("rate", 64, 60), 16))
            self.rate = OPEN_SHARE * load.summary(taken)["requests_per_second"]
        size = -(-one.requests // one.turns)
        parts = [
            (number, some[at : at + size]) for number, some in enumerate(asked, 1) for at in range(0, len(some), size)
        ]
        # Each side has its own iterator over the same parts.
        ways = {name: iter(parts) for name in self.sides}
        asks = {name: partial(self._ask, one, side, ways[name]) for name, side in self.sides.items()}
        waiting: dict[str, list[LoadResult]] = {name: [] for name in self.sides}
        measured: Measured = {name: [] for name in self.sides}

        def end_round(at: int, name: str, part: LoadResult) -> None:
            waiting[name].append(part)
            if at % (len(parts) // len(asked)) == 0:
                whole, waiting[name] = load.joined(waiting[name]), []
                measured[name].append(self._found(one, self.sides[name], whole, len(measured[name]) + 1))

        alternate(asks, len(parts), end_round)
        return measured

    def _ask(self, one: Workload, side: Side, way: Iterator[tuple[int, Sequence[Question]]]) -> LoadResult:
        number, questions = next(way)
        self.progress.tell(f"{one.title}, round {number}/{self.rounds}, {side.title}")
        done = partial(self.progress.bar.advance, self.progress.task, one.work / one.requests)
        if one.streams:
            running = load.closed_loop(side.ask, questions, one.streams, done, stagger=load.STAGGER_SECONDS)
        else:
            times = load.arrivals(len(questions), self.rate or 1.0, number)
            running = load.open_loop(side.ask, questions, times, done)
        time.sleep(QUIET_SECONDS)
        return self.runner.run(running)

    def _found(self, one: Workload, side: Side, taken: LoadResult, number: int) -> dict[str, float]:
        try:
            found = load.summary(taken)
        except CogpressError as error:
            raise CogpressError(f"{side.title}, {one.title}: {error}") from None
        if taken.error:
            self.progress.print(f"{side.title}: {taken.error}")
        self._note(one, side, [{"round": number, **request} for request in load.lost(taken)])
        self.progress.print(
            f"{one.title}, round {number}/{self.rounds}, {side.title}: {found['tokens_per_second']:,.0f} tokens/s, "
            f"time to first token {milliseconds(found['ttft_p50'])} ms"
            + (f", {found['lost']:.0f} lost" if found["lost"] else "")
        )
        if one.name == "example-16" and self.rate is None:
            self.rate = OPEN_SHARE * found["requests_per_second"]
        return found

    def _note(self, one: Workload, side: Side, lost: list[dict[str, Any]]) -> None:
        if lost:
            of_side = self.lost.setdefault(one.name, {}).setdefault(side.name, {"causes": {}, "requests": []})
            of_side["requests"] += lost
            of_side["causes"] = dict(Counter(request["cause"] for request in of_side["requests"]).most_common())
