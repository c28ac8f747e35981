"""Files and folders that appear whole or not at all, whenever their writer is killed.

A new folder is written in a workplace beside its target, `.NAME.part-XXXX/new`, and renamed. The workplace is locked
for as long as its process lives, so that the next writer can tell those of killed processes and remove them. The old
folder waits in `.NAME.part-XXXX/old` while the new one takes its name; a process killed between the two renames loses
nothing, because whoever looks for the folder next puts the old one back.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22


_SETTLED = 2.0
"""Seconds after which the times of a changed file differ from before; some file systems count in seconds."""

_known: dict[tuple[int, ...], str] = {}
"""sha256 by state of a file."""


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in blocks of 4 MiB, once per state of the file.

    The state is its place on the disk, size, and times of its last changes, which no program can set back. A file that
    changed moments ago is read again.
    """
    began = time.time()
    with path.open("rb") as file:
        state = _state(file.fileno())
        if state in _known:
            return _known[state]
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        found = digest.hexdigest()
        if began - max(state[-2:]) / 1e9 > _SETTLED and _state(file.fileno()) == state:
            _known[state] = found
    return found


def _state(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, IsADirectoryError) as error:
        raise ValueError(str(error)) from None


def is_file(path: Path) -> bool:
    """Whether there is such a file, whatever the name: one that is too long for a file is none's."""
    try:
        return path.is_file()
    except OSError:
        return False


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its place and rename it there, so that a reader never sees half of it."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def link(source: Path, target: Path) -> None:
    """Make a file known under another name too, in a folder that is made; a copy where the disk has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, a quota or a file size limit is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Where to write a file that replaces `target` when the block succeeds and vanishes when it does not."""
    with _workplace(target) as place:
        yield place / "new"
        os.replace(place / "new", target)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block succeeds and vanishes when it does not."""
    with _workplace(target) as place:
        new = place / "new"
        new.mkdir()
        new.chmod(0o755)
        yield new
        # Some libraries write files readable by their owner only; an image or another user must be able to serve them.
        for path in new.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        with _locked(target.parent):
            _swap(place, target)


def _swap(place: Path, target: Path) -> None:
    if not target.exists():
        os.replace(place / "new", target)
        return
    os.replace(target, place / "old")
    try:
        os.replace(place / "new", target)
    except OSError:
        os.replace(place / "old", target)
        raise


def recover(target: Path) -> bool:
    """Put back a folder that a killed writer had moved aside, and remove what killed writers left beside it.

    Call it before looking for a folder that may be missing; `new_folder` does so itself.

    Returns:
        whether there is something at `target`, at a moment when no writer is about to swap it.
    """
    if not target.parent.is_dir():
        return False
    with _locked(target.parent):
        _recover(target)
        return target.exists()


def _recover(target: Path) -> None:
    """Call it with the lock of the target's folder held, under which workplaces are made and swapped."""
    for place in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
        with suppress(OSError), ExitStack() as opened:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
            if not target.exists() and (place / "old").is_dir():
                os.replace(place / "old", target)
            shutil.rmtree(place)


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write in, locked by this process for as long as it lives, and then removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _locked(target.parent):
            _recover(target)
            place = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
            held.enter_context(_locked(place))
            held.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder itself, which ends with its holder; where the file system has none, lock nothing."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
