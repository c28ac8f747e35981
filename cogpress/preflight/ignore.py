"""`.dockerignore` as Docker reads it, and the build context that it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NAME = ".dockerignore"


@dataclass(frozen=True)
class Entry:
    """A file of the build context: its path from the top with slashes, its size in bytes, whether it is a link."""

    name: str
    size: int
    link: bool = False


@dataclass(frozen=True)
class _Pattern:
    text: str
    keeps: bool
    expression: re.Pattern[str]


class Ignore:
    """The patterns of a `.dockerignore`; the last that matches a path or a folder above it decides."""

    def __init__(self, text: str) -> None:
        """Parse the file's text."""
        self._patterns = [_pattern(line.strip()) for line in text.splitlines() if line.strip() and line[0] != "#"]

    def ignores(self, path: str) -> bool:
        """Whether a path is excluded from the context."""
        parts = path.split("/")
        places = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        decision = False
        for pattern in self._patterns:
            if pattern.keeps == decision and any(map(pattern.expression.fullmatch, places)):
                decision = not pattern.keeps
        return decision

    def names(self, path: str) -> bool:
        """Whether a `!` pattern names this very path, which nobody writes by accident."""
        return any(pattern.keeps and pattern.text == path for pattern in self._patterns)

    def may_hold(self, folder: str) -> bool:
        """Whether a `!` pattern can let in anything below an ignored folder."""
        parts = folder.split("/")
        for pattern in self._patterns:
            if pattern.keeps:
                wanted = pattern.text.split("/")
                if "**" in pattern.text:
                    return True
                if len(wanted) > len(parts) and all(map(_matches, wanted, parts)):
                    return True
        return False


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(_expression(pattern), name) is not None


def _pattern(line: str) -> _Pattern:
    keeps = line.startswith("!")
    text = os.path.normpath(line.lstrip("!").strip().strip("/") or ".")
    return _Pattern(text, keeps, re.compile(_expression(text)))


def _expression(pattern: str) -> str:
    made, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            made, at = made + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            made, at = made + ".*", at + 2
        elif pattern[at] == "*":
            made, at = made + "[^/]*", at + 1
        elif pattern[at] == "?":
            made, at = made + "[^/]", at + 1
        elif pattern[at] == "[" and "]" in pattern[at + 2 :]:
            end = pattern.index("]", at + 2) + 1
            made, at = made + pattern[at:end].replace("\\", "\\\\"), end
        else:
            at += pattern[at] == "\\" and at + 1 < len(pattern)
            made, at = made + re.escape(pattern[at]), at + 1
    return made


def context(root: Path, ignore: Ignore) -> list[Entry]:
    """The files that a build would send, by name; links are sent as links, even to folders."""
    return sorted(_walk(root, "", ignore), key=lambda entry: entry.name)


def _walk(root: Path, folder: str, ignore: Ignore) -> Iterator[Entry]:
    try:
        children = list(os.scandir(root / folder))
    except OSError:
        return
    for child in children:
        name = f"{folder}/{child.name}" if folder else child.name
        ignored = ignore.ignores(name)
        if child.is_dir(follow_symlinks=False):
            if not ignored or ignore.may_hold(name):
                yield from _walk(root, name, ignore)
        elif not ignored:
            # A file may be gone by now, such as one of git's locks.
            with suppress(FileNotFoundError):
                yield Entry(name, child.stat(follow_symlinks=False).st_size, child.is_symlink())
