"""The tests; conftest.py has what several files use."""

from collections.abc import Callable

Script = Callable[..., tuple[int, str, str]]
"""Runs a script in this process: its name and arguments → exit status, output and errors."""
