"""The steps of a push that were done, each under a key of all that it depends on, so that a later push goes on there.

Knows the file; leaves what a step depends on to `steps`.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
