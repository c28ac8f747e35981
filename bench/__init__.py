"""Side-by-side measurements: the same work, by cogpress and by what people would use instead, in one run.

Knows how to make a comparison fair (fresh processes, alternating order, medians); each file compares one thing.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from rich.console import Console

Measured = dict[str, list[dict[str, float]]]
"""What each side did in each round."""


Found = TypeVar("Found")


def in_fresh_process(function: Any, *args: Any) -> Any:
    """Run a function in a new process, so that its memory is its own and no cache is warm from another's work."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def alternate(
    sides: Mapping[str, Callable[[], Found]], rounds: int, tell: Callable[[int, str, Found], None]
) -> dict[str, list[Found]]:
    """Measure each side once a round, in an order that alternates: a machine that slows down favours neither.

    Args:
        sides: what to measure, by name.
        rounds: how often.
        tell: takes the round, from 1, the side's name and what was measured.
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
    """`alternate`, with a line on the console for every measurement: its round, its side, and it in words."""
    return alternate(
        sides,
        rounds,
        lambda number, name, found: console.print(f"  round {number}/{rounds}, {name}: {words(found)}"),
    )


def medians(measured: Measured) -> dict[str, dict[str, float]]:
    """The median over all rounds of everything that was measured."""
    return {
        name: {key: statistics.median(found[key] for found in results) for key in results[0]}
        for name, results in measured.items()
    }
