"""Checks and findings: a check is a named function from facts to findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cogpress.preflight.facts import Facts

Outcome = Literal["failed", "warning", "skipped", "passed"]

OUTCOMES: tuple[Outcome, ...] = ("failed", "warning", "skipped", "passed")
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        outcome: `failed` stops a push, `warning` does not, `skipped` could not be checked.
        message: what was found and where; for `skipped`, why it was not checked.
        fix: what to do; empty if there is nothing to do.
        safe: whether `--fix` does it.
    """

    outcome: Outcome
    message: str
    fix: str = ""
    safe: bool = False


def passed(message: str) -> Finding:
    """All is well; the message says what was found."""
    return Finding("passed", message)


def failed(message: str, fix: str, *, safe: bool = False) -> Finding:
    """The push would fail, or ship what must not be shipped."""
    return Finding("failed", message, fix, safe)


def warning(message: str, fix: str, *, safe: bool = False) -> Finding:
    """The push works, but somebody should know this first."""
    return Finding("warning", message, fix, safe)


def skipped(message: str, fix: str = "") -> Finding:
    """Not checked, and why."""
    return Finding("skipped", message, fix)


@dataclass(frozen=True)
class Check:
    """One rule: `look` gives at least one finding."""

    topic: str
    name: str
    look: Callable[[Facts], Iterable[Finding]]


@dataclass(frozen=True)
class Row:
    """A finding and its check."""

    topic: str
    name: str
    finding: Finding

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"topic": self.topic, "check": self.name, "outcome": self.finding.outcome}
        found["message"] = self.finding.message
        if self.finding.fix:
            found |= {"fix": self.finding.fix, "fix_is_safe": self.finding.safe}
        return found


def some(names: Iterable[str], most: int = 4) -> str:
    """A list for a message, shortened if long."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
