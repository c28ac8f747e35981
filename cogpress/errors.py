"""The one exception that means "the user can fix this", and why another one came, in words."""

from __future__ import annotations

import subprocess


class CogpressError(Exception):
    """A user's mistake or a missing thing: what was wrong, where, and what to do, in one or two sentences.

    Commands print its text alone; anything else that escapes is a fault of cogpress and keeps its stack trace.
    """


def reason(error: BaseException) -> str:
    """Why an exception came, in one line without its class: its message, or what is meant where it has none."""
    if isinstance(error, (subprocess.TimeoutExpired, TimeoutError)):
        return "no answer in time"  # a message would repeat the whole command
    if isinstance(error, MemoryError):
        return "too little memory"
    if isinstance(error, EOFError):
        return "it ends too early"
    return (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0] or "no reason was given"
