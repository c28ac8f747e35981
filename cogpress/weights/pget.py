"""Replicate's parallel downloader `pget`, called where it is installed.

`pget multifile -` reads lines of a URL and a destination, makes several requests for each file, and neither overwrites
nor resumes. Python packages of the same name are other programs.
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
class Wanted:
    """A URL, the place of its file, and the bytes that the file must have."""

    url: str
    place: Path
    size: int


def program() -> str | None:
    """The path of pget; None where it is missing or the program of that name is another."""
    found = shutil.which("pget")
    return found if found is not None and _is_replicates(found) else None


@functools.cache
def _is_replicates(path: str) -> bool:
    try:
        done = subprocess.run([path, "version"], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith("pget Version ")


def get(files: Sequence[Wanted], count: Callable[[int], Any]) -> bool:
    """Download files.

    Args:
        files: what to download.
        count: is called with the bytes that arrived, and with a negative number for those that were thrown away.

    Returns:
        False, with nothing left of the files, where there is no pget or it failed.
    """
    path = program()
    if path is None or any(character.isspace() for file in files for character in f"{file.url}{file.place}"):
        return False
    for file in files:
        file.place.unlink(missing_ok=True)
    counted = 0
    try:
        # URLs can hold signatures, and arguments are visible to every user of the machine: use standard input. What it
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


def _remove(files: Sequence[Wanted]) -> None:
    for file in files:
        file.place.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
