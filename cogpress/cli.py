"""What every script shares: errors without stack traces, steps with their times, and speeds."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from cogpress.errors import CogpressError


def run(main: Callable[[], None]) -> None:
    """Run a command: an expected error is one message and exit status 1, Ctrl-C is 130, a bug keeps its traceback.

    SIGTERM ends the command in order too, with 143, so that its servers end with it.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except CogpressError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("Error: ", "bold red"), str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        sys.exit(130)


def _terminated(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


class Stopwatch:
    """Measures speed from the first result on."""

    def __init__(self) -> None:
        self._began: float | None = None

    def rate(self, amount: float) -> float:
        """The amount per second since the first call with an amount."""
        now = time.perf_counter()
        if not amount:
            return 0.0
        if self._began is None:
            self._began = now
        return amount / (now - self._began) if now > self._began else 0.0


@contextmanager
def step(name: str, console: Console) -> Iterator[Callable[[str], None]]:
    """Print a step's name at its start, and its result and seconds at its end; the block may `say` the result."""
    console.print(Text.assemble(("▸ ", "cyan"), (name, "bold")))
    started = time.perf_counter()
    results: list[str] = []
    yield results.append
    seconds = f"{time.perf_counter() - started:.1f} s"
    console.print(Text.assemble(("✓ ", "green"), f"{name}: " if results else name, *results, "  ", (seconds, "dim")))


def progress_bar(console: Console) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress bar for a loop, removed at its end; nothing if the output is not a terminal."""
    if not console.is_terminal:
        return lambda items, _total: items
    return lambda items, total: track(items, total=total, description="  ", transient=True, console=console)
