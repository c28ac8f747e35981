"""A runner's errors as Cog's runtime shows them to users: with a word before the sentence, and no class name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cogpress.errors import CogpressError

WORD = "reason"
"""What the runtime writes before the sentence: `Prediction failed: Async prediction failed: reason: …`."""


class _Reason(CogpressError):
    """A `CogpressError`; the runtime shows a class by its `__qualname__`."""


_Reason.__qualname__ = WORD


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a `CogpressError` of the block so that the runtime shows its sentence without the name of its class."""
    try:
        yield
    except CogpressError as error:
        raise _Reason(str(error)) from error
