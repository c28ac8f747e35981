"""Steps as they are done: shown, timed, and not done twice.

Knows the journal and the terminal; leaves to `steps` what a step is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from cogpress.cli import step
from cogpress.errors import CogpressError
from cogpress.push.journal import Journal, key

Say = Callable[[str], None]


class Judged(CogpressError):
    """What was pushed did not do what was asked; it would be the same again, so the step is not done again."""


class Keeper:
    """Does steps; `steps` has the seconds and the result of each, by name."""

    def __init__(self, journal: Journal, console: Console) -> None:
        """Begin with what the journal holds."""
        self.steps: dict[str, dict[str, Any]] = {}
        self._journal, self._console = journal, console

    def once(self, name: str, act: Callable[[Say], dict[str, Any]]) -> dict[str, Any]:
        """Do a step that is always done, as it takes seconds."""
        return self._timed(name, None, act)

    def kept(
        self,
        name: str,
        depends: Any,
        act: Callable[[Say], dict[str, Any]],
        still: Callable[[dict[str, Any]], bool] = lambda _result: True,
    ) -> dict[str, Any]:
        """Do a step, unless it was done with all that it depends on as it is.

        Args:
            name: for people, and in the journal.
            depends: on what; JSON.
            act: does it; says what came of it and returns what later steps use.
            still: whether an earlier result is still there.

        Raises:
            CogpressError: it fails, or it failed before and nothing has changed.
        """
        made = key(depends)
        before = self._journal.find(name, made)
        if before is not None and before.outcome == "failed":
            raise CogpressError(
                f"{name} failed before, and nothing that it depends on has changed: {before.message}\nCorrect it and "
                "run this again; or do every step again, with --fresh."
            )
        if before is not None and still(before.result):
            told = f"as before ({before.seconds:.1f} s, {time.strftime('%Y-%m-%d %H:%M', time.localtime(before.at))})"
            self._console.print(Text.assemble(("✓ ", "green"), f"{name}: ", (told, "dim")))
            self.steps[name] = {"seconds": before.seconds, "before": True, **before.result}
            return before.result
        return self._timed(name, made, act)

    def _timed(self, name: str, made: str | None, act: Callable[[Say], dict[str, Any]]) -> dict[str, Any]:
        began = time.monotonic()
        try:
            with step(name, self._console) as say:
                result = act(say)
        except CogpressError as error:
            seconds = time.monotonic() - began
            if made is not None and isinstance(error, Judged):
                self._journal.note(name, made, seconds, {}, str(error))
            self._console.print(Text.assemble(("✗ ", "bold red"), name, (f"  {seconds:.1f} s", "dim")))
            raise
        seconds = time.monotonic() - began
        if made is not None:
            self._journal.note(name, made, seconds, result)
        self.steps[name] = {"seconds": round(seconds, 3), "before": False, **result}
        return result
