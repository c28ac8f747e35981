"""The tests; conftest.py has what several files use."""

import time
from collections.abc import Callable

Script = Callable[..., tuple[int, str, str]]
"""Runs a script in this process: its name and arguments → exit status, output and errors."""


def wait_until(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether a condition comes true in time, which is long enough for a slow and busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
