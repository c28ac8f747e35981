"""How far the worker is, for people who wait for it."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """A step's live line: rewritten in place on a terminal, elsewhere a new line every 15 seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
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
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the live line."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
