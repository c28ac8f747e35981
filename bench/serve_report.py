"""The result of `serve`: requirements, and tables for the console."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import load
from bench.measure import Measured
from bench.report import Requirement, judged
from bench.servers import OURS, THEIRS
from bench.workloads import Workload

LEAST_THROUGHPUT, MOST_TTFT_SECONDS = 0.97, 0.015
"""Required against vLLM's own server: the share of its throughput, and the largest delay of the first token."""

JUDGED_STREAMS, LOSSLESS_STREAMS = (1, 16), 64


def verdict(measured: Mapping[str, Measured]) -> list[Requirement]:
    """The requirements that were measured, by the median over rounds of how the sides compare in each.

    Args:
        measured: by load and side, the `load.summary` of each round.
    """
    checks = []
    for streams in JUDGED_STREAMS:
        both = measured.get(f"example-{streams}", {})
        if not {OURS, THEIRS} <= both.keys():
            continue
        # Round by round, because a machine's speed varies more between rounds than the servers differ.
        rounds = list(zip(both[OURS], both[THEIRS], strict=True))
        ratio = statistics.median(ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in rounds)
        later = statistics.median(ours["ttft_p50"] - theirs["ttft_p50"] for ours, theirs in rounds)
        with_ = f"{streams} stream{'s' * (streams > 1)}"
        checks += [
            Requirement(
                f"tokens per second, {with_}: at least {LEAST_THROUGHPUT} of vLLM's",
                f"{ratio:.3f}",
                ratio >= LEAST_THROUGHPUT,
            ),
            Requirement(
                f"time to first token, {with_}: at most {1000 * MOST_TTFT_SECONDS:.0f} ms after vLLM's",
                f"{1000 * later:+.1f} ms",
                # A tolerance below the clock's resolution.
                later <= MOST_TTFT_SECONDS + 1e-9,
            ),
        ]
    if found := measured.get(f"example-{LOSSLESS_STREAMS}", {}).get(OURS):
        # Summed, because a median would hide losses in one round.
        asked, refused, failed, empty = (
            int(sum(one[key] for one in found)) for key in ("requests", "refused", "failed", "empty")
        )
        lost = failed + empty
        checks.append(
            Requirement(
                f"nothing lost with {LOSSLESS_STREAMS} streams",
                f"{asked - lost} of {asked} answered, {refused} refused, {failed - refused} failed, {empty} empty",
                lost == 0,
            )
        )
    return checks


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report's tables: the sides under each load, lost requests, starts and memory, and requirements."""
    titles: dict[str, str] = report["sides"]
    table = Table(title="Serving speed", title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for title in (*titles.values(), "cogpress\nto vLLM's"):
        table.add_column(title, justify="right")
    losses = []
    for one in (Workload(**settings) for settings in report["settings"]["loads"]):
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
    if report["verdict"]:
        console.print("", judged(report["verdict"]))
    measured = [found for one in report["rounds"].values() for rounds in one.values() for found in rounds]
    busy = max(found["client_share"] for found in measured)
    if busy > 0.7:
        console.print(f"The client used up to {busy:.0%} of a core, which limits the highest figures.")


_CAPTION = (
    "Medians over the rounds; times as p50 / p90 / p99. TTFT: time to first token, from sending (in the open loop from "
    "the arrival) to the first chunk with text. ITL: inter-token latency, between chunks that carry text."
)


def _rows(
    table: Table, one: Workload, found: Mapping[str, Mapping[str, float]], lost: Mapping[str, float], rounds: int
) -> None:
    ours, theirs = found[OURS], found[THEIRS]

    def row(title: str, cell: Callable[[Mapping[str, float]], str], compared: str = "") -> None:
        table.add_row(title, *(cell(figures) for figures in found.values()), compared)

    def ratio(key: str) -> str:
        return f"x {ours[key] / theirs[key]:.2f}" if theirs[key] else ""

    def times(key: str) -> Callable[[Mapping[str, float]], str]:
        def cell(figures: Mapping[str, float]) -> str:
            if not figures[f"{key}_p50"]:
                return "-"
            return " / ".join(milliseconds(figures[f"{key}_p{share}"]) for share in load.PERCENTILES)

        return cell

    def later(key: str) -> str:
        return f"{milliseconds(ours[key] - theirs[key], '+')} ms"

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


def milliseconds(seconds: float, sign: str = "") -> str:
    """Seconds as milliseconds without the unit, with one digit more for short times."""
    return f"{1000 * seconds:{sign},.{1 if abs(seconds) < 0.01 else 0}f}"
