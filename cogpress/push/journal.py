"""Run the steps of a push and record each under a key of everything that it depends on, so that a push can resume."""

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
class StepRecord:
    """The outcome of a step.

    Attributes:
        key: of everything that it depended on.
        outcome: `failed` where the version was rejected, as it would be again.
        result: for later steps.
        message: why it failed.
        seconds: its duration.
        at: when it ended, as a Unix time.
    """

    key: str
    outcome: Literal["passed", "failed"]
    result: dict[str, Any]
    message: str
    seconds: float
    at: float


class Journal:
    """The recorded steps of one destination."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read the file; one that is damaged or of another format counts as empty.

        Args:
            path: of the file.
            fresh: ignore what it holds.
        """
        self.path = path
        self._steps: dict[str, StepRecord] = {}
        if fresh:
            return
        try:
            content = read_json(path)
            if content["format"] == FORMAT:
                self._steps = {name: StepRecord(**entry) for name, entry in content["steps"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return

    def find(self, step: str, key: str) -> StepRecord | None:
        """The outcome of a step with the same key; None where there is none."""
        found = self._steps.get(step)
        return found if found is not None and found.key == key else None

    def note(self, step: str, key: str, seconds: float, result: dict[str, Any], message: str | None = None) -> None:
        """Record that a step passed, or with a message that it failed."""
        outcome: Literal["passed", "failed"] = "passed" if message is None else "failed"
        self._steps[step] = StepRecord(key, outcome, result, message or "", round(seconds, 3), time.time())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = {name: asdict(entry) for name, entry in self._steps.items()}
        write_json(self.path, {"format": FORMAT, "steps": steps})


def key(depends: Any) -> str:
    """A hash of everything that a step depends on, which must be JSON."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


Say = Callable[[str], None]


class RejectedError(CogpressError):
    """A test rejects what was pushed. It would do so again, so the step is not repeated until something changes."""


class StepRunner:
    """Runs steps; `done` has the seconds and the result of each, by name."""

    def __init__(self, journal: Journal, console: Console) -> None:
        """Start from a journal."""
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
        """Run a step, unless it passed before and nothing that it depends on has changed.

        Args:
            name: in the terminal and the journal.
            depends: what it depends on, as JSON.
            act: does it, says its result and returns what later steps need.
            still: whether an earlier result still exists.

        Raises:
            CogpressError: it fails, or it failed before and nothing has changed.
        """
        made = key(depends)
        before = self._journal.find(name, made)
        if before is not None and before.outcome == "failed":
            raise CogpressError(
                f"{name} failed before, and nothing that it depends on has changed: {before.message}\nFix it and run "
                "this again, or repeat every step with --fresh."
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
