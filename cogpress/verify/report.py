"""What a verification found, kept in the weights' folder and signed to them: JSON, Markdown and a picture.

Knows how a verdict is written and read, and whether it still is about the weights beside it; leaves to `verify` how it
is reached.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

import cogpress
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.weights import manifest

NAME = "verification.json"
MARKDOWN = "verification.md"
PICTURE = "verification.png"
FILES = (NAME, MARKDOWN, PICTURE)

State = Literal["verified", "failed", "changed", "unverified"]

TOLD = {
    "verified": "The weights are verified.",
    "failed": "The weights FAILED verification: their answers are not those that training scored.",
    "changed": "The weights have CHANGED since they were verified. Run scripts/verify.",
    "unverified": "The weights are not verified. Run scripts/verify.",
}
"""What a server's log says of a state."""


@dataclass(frozen=True)
class Check:
    """One comparison: what was found, what passes, and what a failure most likely comes from."""

    name: str
    value: float | str
    limit: float | str
    passed: bool
    cause: str = ""
    at_least: bool = False

    @property
    def shown(self) -> tuple[str, str]:
        """Value and limit as people read them."""
        sign = "≥ " if self.at_least else "≤ "
        limit = self.limit if isinstance(self.limit, str) else sign + _short(self.limit)
        return self.value if isinstance(self.value, str) else _short(self.value), limit

    def to_dict(self) -> dict[str, Any]:
        """JSON has no infinity: what has no distance is None."""
        value = None if isinstance(self.value, float) and not math.isfinite(self.value) else self.value
        found = {"name": self.name, "value": value, "limit": self.limit, "passed": self.passed}
        return found if self.passed else {**found, "cause": self.cause}


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

    @property
    def passed(self) -> bool:
        """Whether every check passed, and all were made: the engine's are the last."""
        return all(check.passed for check in self.checks) and "score" in self.metrics

    @property
    def causes(self) -> list[str]:
        """Why it failed, each reason once."""
        return list(dict.fromkeys(check.cause for check in self.checks if not check.passed))

    def table(self) -> Table:
        """The checks, for a terminal."""
        table = Table("", "check", "found", "passes", title="Verification", title_justify="left")
        for check in self.checks:
            mark = Text("✓", "green") if check.passed else Text("✗", "bold red")
            table.add_row(mark, check.name, *check.shown)
        return table


def signed_files(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a verdict is about: those of the manifest, or all that an engine reads."""
    from cogpress.merge.merge import INDEX, SERVING_FILES

    facts = manifest.read(folder)
    if facts is not None:
        names = sorted(facts["files"])
    else:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
        names += [name for name in (*SERVING_FILES, INDEX) if (folder / name).is_file()]
    return {name: found["sha256"] for name, found in manifest.hashes(folder, names).items()}


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write(verdict: Verdict, pictures: dict[str, Any]) -> None:
    """Write the report into the weights' folder, with the hashes of the files that it is about.

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
        "metrics": verdict.metrics,
        "files": signed_files(verdict.weights),
    }
    from cogpress import plots  # a server reads verdicts and draws none

    plots.verification(
        pictures.get("kl"),
        pictures.get("parity"),
        {check.name: check.limit for check in verdict.checks if isinstance(check.limit, float)},
        "passed" if verdict.passed else "failed",
        verdict.weights / PICTURE,
    )
    (verdict.weights / MARKDOWN).write_text(_markdown(content), encoding="utf-8")
    # Last, because it is what counts.
    write_json(verdict.weights / NAME, content)


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
        lines.append(f"| {'✓' if check['passed'] else '✗'} | {check['name']} | {value} | {limit} |")
    lines += ["", *(f"- {cause}" for cause in content["causes"]), ""]
    lines += ["| measured | |", "|---|---|"]
    lines += [f"| {name} | {_short(v) if isinstance(v, float) else v} |" for name, v in content["metrics"].items()]
    lines += ["", f"![verification]({PICTURE})", ""]
    lines += ["It holds for these files and no others:", ""]
    lines += [f"- `{name}` sha256 `{digest}`" for name, digest in content["files"].items()]
    return "\n".join(lines) + "\n"


def read(folder: Path) -> dict[str, Any] | None:
    """A folder's verdict as it was written, None where it has none.

    Raises:
        CogpressError: it is not JSON.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise CogpressError(f"{folder / NAME} is no verification report. Verify the weights again.") from None
    checks = content.get("checks", []) if isinstance(content, dict) else None
    whole = isinstance(checks, list) and all(isinstance(check, dict) for check in checks)
    if not whole or not isinstance(content.get("files"), dict):
        raise CogpressError(f"{folder / NAME} is no verification report. Verify the weights again.")
    return content


def state(folder: Path, checked: dict[str, Any] | None = None) -> State:
    """Whether the weights in a folder are verified: every file that the verdict is about is hashed again.

    `changed` weights were verified once and are not the same any more.

    Args:
        folder: the weights.
        checked: their manifest, where the files were compared with it just now; they are then not hashed again.
    """
    try:
        content = read(folder)
    except CogpressError:
        content = None  # some other program's file, or one that was cut off
    if content is None:
        return "unverified"
    try:
        known = {name: file["sha256"] for name, file in (checked or {}).get("files", {}).items()}
        now = known or signed_files(folder)
    except (OSError, CogpressError):
        return "changed"
    if now != content["files"]:
        return "changed"
    return "verified" if content.get("passed") is True else "failed"
