"""The steps of a push that were done, each under a key of all that it depends on, so that a later push goes on there.

Knows the file; leaves what a step depends on to `steps`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from cogpress.cli import step
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What became of a step.

    Attributes:
        key: of what it depended on.
        outcome: `failed` is a judgement of what was tested, which would be the same again.
        result: what later steps use of it.
        message: why it failed.
        seconds: that it took.
        at: when it ended, in seconds since 1970.
    """

    key: str
    outcome: Literal["passed", "failed"]
    result: dict[str, Any]
    message: str
    seconds: float
    at: float


class Journal:
    """The file of one destination."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read it; what can not be read, or is of another format, counts as nothing done.

        Args:
            path: where it is.
            fresh: forget what it holds.
        """
        self.path = path
        self._steps: dict[str, Entry] = {}
        if fresh:
            return
        try:
            content = read_json(path)
            if content["format"] == FORMAT:
                self._steps = {name: Entry(**entry) for name, entry in content["steps"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return

    def find(self, step: str, key: str) -> Entry | None:
        """What became of a step that depended on the same; None where it did not."""
        found = self._steps.get(step)
        return found if found is not None and found.key == key else None

    def note(self, step: str, key: str, seconds: float, result: dict[str, Any], message: str | None = None) -> None:
        """Write down that a step passed, or with a message that it failed."""
        outcome: Literal["passed", "failed"] = "passed" if message is None else "failed"
        self._steps[step] = Entry(key, outcome, result, message or "", round(seconds, 3), time.time())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = {name: asdict(entry) for name, entry in self._steps.items()}
        write_json(self.path, {"format": FORMAT, "steps": steps})


def key(depends: Any) -> str:
    """One text for everything that a step depends on, which must be JSON."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


Say = Callable[[str], None]


class RejectedError(CogpressError):
    """What was pushed did not do what was asked; it would be the same again, so the step is not done again."""


class StepRunner:
    """Does steps; `done` has the seconds and the result of each, by name."""

    def __init__(self, journal: Journal, console: Console) -> None:
        """Begin with what the journal holds."""
        self.done: dict[str, dict[str, Any]] = {}
        self._journal, self._console = journal, console

    def once(self, name: str, act: Callable[[Say], dict[str, Any]]) -> dict[str, Any]:
        """Run a step that takes seconds, whatever an earlier push did."""
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
            self.done[name] = {"seconds": before.seconds, "before": True, **before.result}
            return before.result
        return self._timed(name, made, act)

    def _timed(self, name: str, made: str | None, act: Callable[[Say], dict[str, Any]]) -> dict[str, Any]:
        began = time.monotonic()
        try:
            with step(name, self._console) as say:
                result = act(say)
        except CogpressError as error:
            seconds = time.monotonic() - began
            if made is not None and isinstance(error, RejectedError):
                self._journal.note(name, made, seconds, {}, str(error))
            self._console.print(Text.assemble(("✗ ", "bold red"), name, (f"  {seconds:.1f} s", "dim")))
            raise
        seconds = time.monotonic() - began
        if made is not None:
            self._journal.note(name, made, seconds, result)
        self.done[name] = {"seconds": round(seconds, 3), "before": False, **result}
        return result
