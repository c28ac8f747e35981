"""Files from URLs: many at once, in ranges, resumed after a cut, each whole or not there.

Knows ranges and what is left of an interrupted download; leaves single requests to `web`, the meaning of the files and
their hashes to `fetch`, and a download from its beginning to `pget` where there is one.

A download that is under way is `KEY.part` in the folder of parts, with the ranges that are complete in `KEY.done`. The
key is made from the URL, the server's validator (ETag or date) and the size, so that another version of the file is
never continued with.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from cogpress import http as web
from cogpress.errors import CogpressError
from cogpress.files import is_full
from cogpress.weights import pget

RANGE = 32 << 20
"""Bytes of one request, where the server sends ranges; what is lost of a connection when the process is killed."""

SPARE = 64 << 20
"""Bytes of the disk that a download leaves free."""


def get(wanted: Sequence[tuple[web.Remote, Path]], parts: Path, *, also: int = 0) -> None:
    """Fetch files to their places, with a progress bar; those that are in place already are not fetched again.

    Args:
        wanted: what, and where to; the places are in the file system of `parts`.
        parts: the folder of interrupted downloads, whose content is used where it fits.
        also: bytes of disk that will be needed beside the files.

    Raises:
        CogpressError: the disk has no room, which is checked first; a server can not be reached, refuses, or changed
            the file meanwhile. What was fetched is kept in `parts` only where trying again can use it.
    """
    todo = [_Job(remote, place, parts / remote.key) for remote, place in wanted if not place.exists()]
    if not todo:
        return
    parts.mkdir(parents=True, exist_ok=True)
    for job in todo:
        job.place.parent.mkdir(parents=True, exist_ok=True)
        job.fit()
    total = None if any(job.remote.size is None for job in todo) else sum(job.remote.size or 0 for job in todo)
    here = sum(job.here() for job in todo)
    check_room(parts, (total or 0) - here + also)
    name = f"{len(todo)} files" if len(todo) > 1 else Path(todo[0].remote.shown).name
    try:
        with _bar(name, total, here) as bar:
            left = _by_pget(todo, bar)
            if left:
                with web.client() as client:
                    _Transfer(client, bar).run(left)
    except OSError as error:
        for job in todo:
            job.forget()
        raise _not_written(parts, error) from None


def _not_written(parts: Path, error: OSError) -> CogpressError:
    if is_full(error):
        return CogpressError(f"The disk of {parts} is full; the download was removed. Free some room and start again.")
    return CogpressError(f"The download can not be written to {parts}: {error.strerror}.")


def check_room(folder: Path, needed: int) -> None:
    """Raise before a download for which the disk of `folder` has no room.

    Raises:
        CogpressError: with the bytes needed and free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + SPARE > free:
        raise CogpressError(
            f"The download needs {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} GB free. "
            "Free some room, or keep the model elsewhere and name its folder."
        )


@dataclass(frozen=True)
class _Job:
    """One file to fetch, and what is there of it: `stem.part` and `stem.done`."""

    remote: web.Remote
    place: Path
    stem: Path

    @property
    def part(self) -> Path:
        return self.stem.with_suffix(".part")

    @property
    def done(self) -> Path:
        return self.stem.with_suffix(".done")

    @property
    def resumable(self) -> bool:
        """Whether ranges can be asked for and be known to be of one version."""
        return self.remote.ranges and self.remote.validator is not None and bool(self.remote.size)

    def fit(self) -> None:
        """Forget an earlier part that can not be continued."""
        if not self.resumable or not self.part.is_file():
            self.forget()

    def complete(self) -> set[int]:
        """Where the ranges that are complete start."""
        try:
            # A line that was cut off is not taken for a shorter number.
            return {int(line) for line in self.done.read_text().splitlines(keepends=True) if line.endswith("\n")}
        except (FileNotFoundError, ValueError):
            return set()

    def here(self) -> int:
        """Bytes that need not be fetched."""
        return sum(min(RANGE, max(0, (self.remote.size or 0) - start)) for start in self.complete())

    def forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the complete file its name."""
        os.replace(self.part, self.place)
        self.done.unlink(missing_ok=True)


class _Stopped(Exception):
    """Another thread failed."""


class _Transfer:
    """Requests of several threads that stop together."""

    def __init__(self, client: httpx.Client, bar: tqdm[Any]) -> None:
        self._client, self._bar = client, bar
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, jobs: list[_Job]) -> None:
        tasks: list[Callable[[], None]] = []
        for job in jobs:
            complete = job.complete()
            if not job.resumable:
                tasks.append(functools.partial(self._whole, job))
                continue
            job.part.touch()
            starts = range(0, job.remote.size or 0, RANGE)
            tasks += [functools.partial(self._range, job, start) for start in starts if start not in complete]
        with ThreadPoolExecutor(web.CONNECTIONS) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Also when waiting was cut off, by Ctrl-C.
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        # What says why comes first; a thread that was stopped by another has nothing to say.
        errors.sort(key=lambda error: (isinstance(error, _Stopped), not isinstance(error, CogpressError)))
        if errors:
            raise errors[0]
        for job in jobs:
            job.finish()

    def _count(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _range(self, job: _Job, start: int) -> None:
        """Fetch one range, going on from where a connection was cut."""
        remote = job.remote
        end = min(start + RANGE, remote.size or 0)
        at = start

        def go_on() -> None:
            nonlocal at
            headers = {"Range": f"bytes={at}-{end - 1}", "If-Range": str(remote.validator)}
            with web.request(self._client, remote.url, headers) as response:
                expected = f"bytes {at}-{end - 1}/{remote.size}"
                if response.status_code != 206 or response.headers.get("content-range") != expected:
                    job.forget()
                    raise CogpressError(f"{remote.shown} changed while it was downloaded. Start again.")
                for block in response.iter_raw():
                    self._check_stopped()
                    _write_at(file.fileno(), block[: end - at], at)
                    self._count(min(len(block), end - at))
                    at += min(len(block), end - at)
            if at < end:
                raise httpx.RemoteProtocolError("The answer ended early.")

        with job.part.open("r+b") as file:
            web.retried(go_on, remote.shown, progress=lambda: at, pause=self._pause)
            # The range is recorded as complete only when it is.
            os.fdatasync(file.fileno())
        with self._lock, job.done.open("a") as file_of_done:
            file_of_done.write(f"{start}\n")

    def _whole(self, job: _Job) -> None:
        """Fetch a file in one stream, from its beginning after each cut."""
        counted = 0

        def from_start() -> None:
            nonlocal counted
            self._count(-counted)
            counted = 0
            with web.request(self._client, job.remote.url) as response, job.part.open("wb") as file:
                for block in response.iter_raw():
                    self._check_stopped()
                    file.write(block)
                    self._count(len(block))
                    counted += len(block)
            if job.remote.size not in (None, counted):
                raise httpx.RemoteProtocolError("The answer ended early.")

        try:
            web.retried(from_start, job.remote.shown, pause=self._pause)
        except BaseException:
            job.forget()
            raise

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped


def _write_at(descriptor: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


class _Bar(tqdm):  # type: ignore[type-arg] # it is generic for type checkers alone
    monitor_interval = 0  # no thread that outlives the bar: the engine's process is forked after it


def _bar(name: str, total: int | None, here: int) -> tqdm[Any]:
    """Progress with speed and time left; in a log, a line now and then."""
    return _Bar(
        desc=name,
        total=total,
        initial=here,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


def _by_pget(jobs: list[_Job], bar: tqdm[Any]) -> list[_Job]:
    """Fetch what is not begun yet with pget, where there is one; returns what is left to do."""
    # It asks for the size by itself, and takes none for a failure.
    fresh = {job.stem.with_suffix(".pget"): job for job in jobs if job.remote.size and not job.part.exists()}
    files = [pget.File(job.remote.url, place, job.remote.size or 0) for place, job in fresh.items()]
    if not files or not pget.get(files, bar.update):
        return jobs
    for place, job in fresh.items():
        os.replace(place, job.place)
    return [job for job in jobs if not job.place.exists()]
