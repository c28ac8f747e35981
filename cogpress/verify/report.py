"""The verification report: JSON, Markdown and a picture in the weights' folder, with the files' hashes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

import cogpress
from cogpress.files import write_json
from cogpress.weights import manifest
from cogpress.weights.filenames import VERIFICATION, VERIFICATION_PAGE, VERIFICATION_PLOT

if TYPE_CHECKING:
    from cogpress.verify.forgotten import General


@dataclass(frozen=True)
class Check:
    """One comparison: the value found, the limit, and the most likely cause of a failure."""

    name: str
    value: float | str
    limit: float | str
    passed: bool
    cause: str = ""
    at_least: bool = False
    conclusive: bool = True
    """False where nothing can be concluded from what was found; `cause` says why."""

    @property
    def mark(self) -> str:
        """The check's result as one letter."""
        return _mark(self.passed, self.conclusive)

    @property
    def shown(self) -> tuple[str, str]:
        """Value and limit as people read them."""
        sign = "≥ " if self.at_least else "≤ "
        limit = self.limit if isinstance(self.limit, str) else sign + _short(self.limit)
        return self.value if isinstance(self.value, str) else _short(self.value), limit

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which has no infinity: an infinite value is None."""
        value = None if isinstance(self.value, float) and not math.isfinite(self.value) else self.value
        found = {"name": self.name, "value": value, "limit": self.limit, "passed": self.passed}
        if self.passed and self.conclusive:
            return found
        return {**found, "cause": self.cause} | ({} if self.conclusive else {"conclusive": False})


def _mark(passed: bool, conclusive: bool) -> str:
    return "✗" if not passed else "✓" if conclusive else "?"


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.4g}"


@dataclass(frozen=True)
class Verdict:
    """A whole verification of one folder of weights."""

    weights: Path
    scheme: str
    checks: list[Check]
    metrics: dict[str, Any]
    adapter: str
    base: dict[str, Any]
    examples: int
    engine: str
    general: General | None = None
    """What was measured beside the task; None where an earlier check failed."""

    @property
    def passed(self) -> bool:
        """Whether every check was made and passed; the engine's are the last."""
        return all(check.passed for check in self.checks) and "score" in self.metrics

    @property
    def causes(self) -> list[str]:
        """Why it failed, each cause once."""
        return list(dict.fromkeys(check.cause for check in self.checks if not check.passed))

    @property
    def doubts(self) -> list[str]:
        """Why nothing can be concluded from a check that did not fail."""
        found = (check.cause for check in self.checks if check.passed and not check.conclusive)
        return list(dict.fromkeys(found))

    def tables(self) -> list[Table]:
        """The checks, and what was measured beside the task, for a terminal."""
        return [self.table(), *([self.general.table()] if self.general else [])]

    def table(self) -> Table:
        """The checks, for a terminal."""
        table = Table("", "check", "found", "passes", title="Verification", title_justify="left")
        for check in self.checks:
            style = {"✓": "green", "✗": "bold red", "?": "yellow"}[check.mark]
            table.add_row(Text(check.mark, style), check.name, *check.shown)
        return table


def write(verdict: Verdict, pictures: dict[str, Any]) -> None:
    """Write the report into the weights' folder, with the hashes of the files it covers.

    Args:
        verdict: what was found.
        pictures: `kl`, the divergence of each token, and `parity`, log-probabilities of engine and reference; each
            only where it was measured.
    """
    content = {
        "format": 1,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cogpress": cogpress.__version__,
        "passed": verdict.passed,
        "scheme": verdict.scheme,
        "base": verdict.base,
        "adapter": verdict.adapter,
        "examples": verdict.examples,
        "engine": verdict.engine,
        "checks": [check.to_dict() for check in verdict.checks],
        "causes": verdict.causes,
        "doubts": verdict.doubts,
        "metrics": verdict.metrics,
        "general": verdict.general and verdict.general.to_dict(),
        "files": manifest.signed_files(verdict.weights),
    }
    from cogpress import plots  # a server reads verdicts and draws none

    plots.verification(
        pictures.get("kl"),
        pictures.get("parity"),
        {check.name: check.limit for check in verdict.checks if isinstance(check.limit, float)},
        "passed" if verdict.passed else "failed",
        verdict.weights / VERIFICATION_PLOT,
    )
    (verdict.weights / VERIFICATION_PAGE).write_text(_markdown(content), encoding="utf-8")
    # Last, because it is what counts.
    write_json(verdict.weights / VERIFICATION, content)


def _code(text: str) -> str:
    """Text for a span of code in one line."""
    return " ".join(text.replace("`", "'").split())


def _markdown(content: dict[str, Any]) -> str:
    lines = [
        f"# Verification: {'passed' if content['passed'] else 'failed'}",
        "",
        f"{content['created_at']}, {content['examples']} held-out examples, engine {content['engine']}, "
        f"scheme {content['scheme']}.",
        "",
        "| | check | found | passes |",
        "|---|---|---|---|",
    ]
    for check in content["checks"]:
        value, limit = (_short(one) if isinstance(one, float) else one for one in (check["value"], check["limit"]))
        mark = _mark(check["passed"], check.get("conclusive", True))
        lines.append(f"| {mark} | {check['name']} | {value} | {limit} |")
    lines += ["", *(f"- {cause}" for cause in [*content["causes"], *content["doubts"]]), ""]
    lines += ["| measured | |", "|---|---|"]
    lines += [f"| {name} | {_short(v) if isinstance(v, float) else v} |" for name, v in content["metrics"].items()]
    if content["general"]:
        lines += ["", "| beside the task | base | weights |", "|---|---|---|"]
        for name, both in content["general"]["measured"].items():
            lines.append(f"| {name} | {_short(both['base'])} | {_short(both['weights'])} |")
        lines += ["", "Plain instructions, as the base answers them and as these weights do:", ""]
        for one in content["general"]["instructions"]:
            lines += [f"- {one['asked']}", *(f"  - {who}: `{_code(one[who])}`" for who in ("base", "weights"))]
    lines += ["", f"![verification]({VERIFICATION_PLOT})", ""]
    lines += ["It covers these files only:", ""]
    lines += [f"- `{name}` sha256 `{digest}`" for name, digest in content["files"].items()]
    return "\n".join(lines) + "\n"
