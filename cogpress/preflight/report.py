"""Preflight results: as a table by topic, worst first, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cogpress.preflight.check import OUTCOMES, Outcome, Row

MARKS: dict[Outcome, tuple[str, str]] = {
    "failed": ("✗", "bold red"),
    "warning": ("!", "yellow"),
    "skipped": ("-", "dim"),
    "passed": ("✓", "green"),
}


@dataclass(frozen=True)
class Report:
    """All findings of one preflight, in the order of the checks."""

    rows: list[Row]
    seconds: float
    fixed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.of("failed")

    def of(self, outcome: Outcome) -> list[Row]:
        """The findings of one outcome."""
        return [row for row in self.rows if row.finding.outcome == outcome]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": 1,
            "passed": self.passed,
            "counts": {outcome: len(self.of(outcome)) for outcome in OUTCOMES},
            "seconds": round(self.seconds, 2),
            "fixed": list(self.fixed),
            "checks": [row.to_dict() for row in self.rows],
        }

    def print(self, console: Console, *, everything: bool = False) -> None:
        """Print topics with failures first; what passed takes one line per topic, unless `everything`."""
        for line in self.fixed:
            console.print(Text.assemble(("✓ ", "green"), ("fixed  ", "bold"), line))
        width = max((len(row.name) for row in self.rows), default=0)
        for topic in self._topics():
            console.print()
            console.print(Text(topic, "bold"))
            rows = sorted((row for row in self.rows if row.topic == topic), key=_rank)
            console.print(Padding(_table(rows, width, everything), (0, 0, 0, 2)))
        console.print()
        console.print(self._summary())

    def _topics(self) -> list[str]:
        order = list(dict.fromkeys(row.topic for row in self.rows))
        return sorted(order, key=lambda topic: min(_rank(row) for row in self.rows if row.topic == topic))

    def _summary(self) -> Text:
        counts = [(outcome, len(self.of(outcome))) for outcome in OUTCOMES]
        text = Text()
        for outcome, count in counts:
            if count:
                word = "warnings" if outcome == "warning" and count > 1 else outcome
                text.append(", " if text else "").append(f"{count} {word}", MARKS[outcome][1])
        text.append(f" in {self.seconds:.1f} s. ", "dim")
        if self.passed:
            return text.append("A push can begin.", "bold green")
        text.append("A push would fail.", "bold red")
        if any(row.finding.safe for row in self.rows if row.finding.outcome in ("failed", "warning")):
            text.append(" scripts/preflight --fix can fix some of it.")
        return text


def _rank(row: Row) -> int:
    return OUTCOMES.index(row.finding.outcome)


def _table(rows: list[Row], width: int, everything: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold", min_width=width)
    table.add_column(overflow="fold")
    for row in rows:
        if everything or row.finding.outcome != "passed":
            mark, style = MARKS[row.finding.outcome]
            table.add_row(Text(mark, style), row.name, _said(row))
    good = list(dict.fromkeys(row.name for row in rows if row.finding.outcome == "passed"))
    good = [name for name in good if not any(row.name == name for row in rows if row.finding.outcome != "passed")]
    if good and not everything:
        mark, style = MARKS["passed"]
        table.add_row(Text(mark, style), "", Text(", ".join(good), "dim"))
    return table


def _said(row: Row) -> RenderableType:
    finding = row.finding
    message = Text(finding.message, "dim" if finding.outcome in ("skipped", "passed") else "")
    return Group(message, Text(f"→ {finding.fix}", "cyan")) if finding.fix else message
