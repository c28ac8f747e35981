"""How far a step of a set-up is, for people who wait for it.

It runs before any environment is there, as `environment` does: standard library only, in Python 3.8's syntax.
"""

from __future__ import annotations

import shutil
import sys
import time


def say(text: str) -> None:
    """Progress goes to standard error: standard output is the script's own."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A step's live line: rewritten in place on a terminal, elsewhere a new line every 15 seconds."""

    def __init__(self, label: str, tells_end: bool = True) -> None:
        self.label = label
        self.tells_end = tells_end
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, detail: str) -> None:
        """Say how far it is, where that is due."""
        now = time.monotonic()
        if now - self.shown < (0.3 if self.live else 15):
            return
        self.shown = now
        text = f"  {self.label}: {detail + ', ' if detail else ''}{now - self.started:.0f} s"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    def end(self, succeeded: bool) -> None:
        """Say how long it took."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)
        if self.tells_end or not succeeded:
            say(f"  {self.label}: {'done' if succeeded else 'stopped'} in {time.monotonic() - self.started:.0f} s")
