"""Apply the fixes that are safe: `.dockerignore` entries and recovery from interrupted writers."""

from __future__ import annotations

from collections.abc import Iterator

from cogpress.files import recover
from cogpress.preflight import image, secrets
from cogpress.preflight.facts import Facts
from cogpress.preflight.ignore import NAME, Ignore

_HEADER = "# Never in an image: secrets, data, environments, caches (written by scripts/preflight --fix)."


def fix(facts: Facts) -> Iterator[str]:
    """Apply the safe fixes; yield a line for each."""
    lines = image.missing(facts)
    inside = [entry.name for entry in facts.entries if secrets.by_name(entry.name)] + image.data_files(facts)
    # By name only if no general pattern excludes the file.
    lines += [f"/{name}" for name in inside if not _covered(name, lines)]
    if lines:
        path = facts.root / NAME
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        gap = "\n" if before and not before.endswith("\n\n") else ""
        break_line = "\n" if before and not before.endswith("\n") else ""
        path.write_text(f"{before}{break_line}{gap}{_HEADER}\n" + "\n".join(lines) + "\n", encoding="utf-8")
        yield f"{NAME}: added {', '.join(lines)}"
    for name in facts.weights.left:
        place = facts.root / name
        target = place.with_name(place.name[1:].rpartition(".part-")[0])
        there = recover(target)
        shown = target.relative_to(facts.root).as_posix()
        if place.exists():
            yield f"{name} stays: its writer is at work"
        else:
            told = "" if there else "; there was no folder to put back"
            yield f"{shown}: removed what an interrupted writer left{told}"


def _covered(name: str, lines: list[str]) -> bool:
    return Ignore("\n".join(lines)).ignores(name)
