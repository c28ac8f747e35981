"""What makes a comparison fair: fresh processes, alternating order, medians over rounds."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from rich.console import Console

Measured = dict[str, list[dict[str, float]]]
"""The figures of each side, one entry per round."""

Found = TypeVar("Found")


def in_fresh_process(function: Any, *args: Any) -> Any:
    """Run a function in a new process, so that its memory is its own and its caches are cold."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def alternate(
    sides: Mapping[str, Callable[[], Found]], rounds: int, tell: Callable[[int, str, Found], None]
) -> dict[str, list[Found]]:
    """Measure each side once per round, in alternating order, so that a machine that slows down favors neither.

    Args:
        sides: what to measure, by name.
        rounds: number of rounds.
        tell: called after each measurement with the round (from 1), the side's name and the result.
    """
    measured: dict[str, list[Found]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found = sides[name]()
            measured[name].append(found)
            tell(number + 1, name, found)
    return measured


def alternate_aloud(
    sides: Mapping[str, Callable[[], dict[str, float]]],
    rounds: int,
    console: Console,
    words: Callable[[dict[str, float]], str],
) -> Measured:
    """`alternate`, printing a line for each measurement: its round, its side, and its figures as `words` puts them."""
    return alternate(
        sides,
        rounds,
        lambda number, name, found: console.print(f"  round {number}/{rounds}, {name}: {words(found)}"),
    )


def medians(measured: Measured) -> dict[str, dict[str, float]]:
    """The median of each figure over all rounds."""
    return {
        name: {key: statistics.median(found[key] for found in results) for key in results[0]}
        for name, results in measured.items()
    }
