"""Replicate's parallel downloader, where it is installed: another program to call, and what can go wrong with that.

`pget multifile -` reads lines of a URL and a destination, makes several requests for each file, and does not overwrite
or continue. Packages of the same name are other programs.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class File:
    """What to fetch, where to, and how many bytes it must have."""

    url: str
    place: Path
    size: int


def program() -> str | None:
    """Where pget is; None where there is none, or something else of that name."""
    found = shutil.which("pget")
    return found if found is not None and _is_replicates(found) else None


@functools.cache
def _is_replicates(path: str) -> bool:
    try:
        done = subprocess.run([path, "version"], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith("pget Version ")


def get(files: Sequence[File], count: Callable[[int], Any]) -> bool:
    """Fetch files; False, with nothing left of them, where there is no pget or it failed.

    Args:
        files: what.
        count: is told of bytes that arrived, and with a negative number of those that were thrown away.
    """
    path = program()
    if path is None or any(character.isspace() for file in files for character in f"{file.url}{file.place}"):
        return False
    for file in files:
        file.place.unlink(missing_ok=True)
    counted = 0
    try:
        # On its standard input: arguments, which can hold signatures, are visible to everybody on the machine. What it
        # prints holds them too.
        with subprocess.Popen(
            [path, "multifile", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _tell(process, "".join(f"{file.url} {file.place}\n" for file in files))
                ended = False
                while not ended:
                    with suppress(subprocess.TimeoutExpired):
                        ended = process.wait(0.2) is not None
                    here = sum(_size(file.place) for file in files)
                    count(here - counted)
                    counted = here
            except BaseException:
                process.kill()
                raise
        complete = process.returncode == 0 and all(_size(file.place) == file.size for file in files)
    except BaseException:
        _remove(files)
        raise
    if not complete:
        count(-counted)
        _remove(files)
        print(f"pget failed (status {process.returncode}); downloading without it.", file=sys.stderr, flush=True)
    return complete


def _tell(process: subprocess.Popen[bytes], lines: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(lines.encode())
    with suppress(BrokenPipeError):
        process.stdin.close()


def _remove(files: Sequence[File]) -> None:
    for file in files:
        file.place.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
