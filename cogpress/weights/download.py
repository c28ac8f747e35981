"""Files from URLs: one resumable stream for each, several files at once, each complete or not there.

Where Replicate's `pget` is installed, it fetches what is not begun yet, over many connections. A download under way is
`KEY.part` in the folder of parts. The key is made from the URL, the server's validator (ETag or date) and the size, so
that another version of the file is never continued with.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from cogpress.errors import CogpressError
from cogpress.files import is_full
from cogpress.weights import pget, remote_file

SPARE = 64 << 20
"""Bytes of the disk that a download leaves free."""

_LOOK = 64 << 20
"""Bytes between two looks at the disk, where nobody said how many there are."""


def get(wanted: Sequence[tuple[remote_file.RemoteFile, Path]], parts: Path, *, also: int = 0) -> None:
    """Download files to their places, with a progress bar; those in place already are not downloaded again.

    Args:
        wanted: each file and its place, in the file system of `parts`.
        parts: the folder of interrupted downloads, which are resumed where they fit.
        also: bytes of disk that will be needed beside the files.

    Raises:
        CogpressError: the disk has no room, which is checked first; a server cannot be reached, refuses, or changed
            the file meanwhile. `parts` keeps only what another try can resume.
    """
    todo = [_Job(remote, place, parts / f"{remote.key}.part") for remote, place in wanted if not place.exists()]
    if not todo:
        return
    parts.mkdir(parents=True, exist_ok=True)
    for job in todo:
        job.place.parent.mkdir(parents=True, exist_ok=True)
        if not job.here():
            job.forget()
    total = None if any(job.remote.size is None for job in todo) else sum(job.remote.size or 0 for job in todo)
    here = sum(job.here() for job in todo)
    check_room(parts, (total or 0) - here + also)
    name = f"{len(todo)} files" if len(todo) > 1 else Path(todo[0].remote.shown).name
    try:
        with _bar(name, total, here) as bar:
            left = _by_pget(todo, bar)
            if left:
                with remote_file.client() as client:
                    _Streams(client, bar).run(left)
    except OSError as error:
        for job in todo:
            job.forget()
        raise _not_written(parts, error) from None


def _not_written(parts: Path, error: OSError) -> CogpressError:
    if is_full(error):
        return CogpressError(f"The disk of {parts} is full; the download was removed. Free some space and start again.")
    return CogpressError(f"Could not write the download to {parts}: {error.strerror}.")


def check_room(folder: Path, needed: int) -> None:
    """Refuse a download for which the disk of `folder` has no room.

    Raises:
        CogpressError: with the bytes needed and free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + SPARE > free:
        raise CogpressError(
            f"The download needs {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} GB free. "
            "Free some space, or keep the model elsewhere and name its folder."
        )


@dataclass(frozen=True)
class _Job:
    """One file to download, and the part of it that is here."""

    remote: remote_file.RemoteFile
    place: Path
    part: Path

    @property
    def resumable(self) -> bool:
        """Whether ranges can be asked for and be known to be of one version."""
        return self.remote.ranges and self.remote.validator is not None and bool(self.remote.size)

    def here(self) -> int:
        """Bytes of the part that need not be downloaded again."""
        size = self.part.stat().st_size if self.part.is_file() else 0
        return size if self.resumable and size <= (self.remote.size or 0) else 0

    def forget(self) -> None:
        self.part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the complete file its name."""
        os.replace(self.part, self.place)


class _Stopped(Exception):
    """Another thread failed."""


class _Streams:
    """Downloads in several threads that stop together."""

    def __init__(self, client: httpx.Client, bar: tqdm[Any]) -> None:
        self._client, self._bar = client, bar
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, jobs: list[_Job]) -> None:
        with ThreadPoolExecutor(remote_file.CONNECTIONS) as pool:
            futures = [pool.submit(self._download, job) for job in jobs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Also when waiting was cut off, by Ctrl-C.
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        # The cause comes first; a thread that another one stopped has nothing to say.
        errors.sort(key=lambda error: (isinstance(error, _Stopped), not isinstance(error, CogpressError)))
        if errors:
            raise errors[0]
        for job in jobs:
            job.finish()

    def _download(self, job: _Job) -> None:
        """Download one file: after a cut from where it was, or from the beginning where the server has no ranges."""
        remote, size = job.remote, job.remote.size
        at = job.here()

        def stream() -> None:
            nonlocal at
            if not job.resumable:
                self._count(-at)
                at = 0
            headers = {"Range": f"bytes={at}-{(size or 0) - 1}", "If-Range": str(remote.validator)}
            with remote_file.request(self._client, remote.url, headers if job.resumable else None) as response:
                expected = f"bytes {at}-{(size or 0) - 1}/{size}"
                if job.resumable and (response.status_code != 206 or response.headers.get("content-range") != expected):
                    job.forget()
                    raise CogpressError(f"{remote.shown} changed while it was downloaded. Start again.")
                with job.part.open("ab" if at else "wb") as file:
                    for block in response.iter_raw():
                        if self._stop.is_set():
                            raise _Stopped
                        at += len(block)
                        if size is not None and at > size:
                            raise CogpressError(f"{remote.shown} sends more than its {size:,} bytes. Check the URL.")
                        file.write(block)
                        self._count(len(block))
                        if size is None and at // _LOOK > (at - len(block)) // _LOOK:
                            check_room(job.part.parent, 1)  # nobody said how much there is
            if size not in (None, at):
                raise httpx.RemoteProtocolError("The answer ended early.")

        try:
            if not job.resumable or at != size:
                remote_file.retried(
                    stream, remote.shown, progress=lambda: at if job.resumable else 0, pause=self._pause
                )
        except BaseException:
            if not job.resumable or at > (size or 0):
                job.forget()
            raise

    def _count(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped


class _Bar(tqdm):  # type: ignore[type-arg] # it is generic for type checkers alone
    monitor_interval = 0  # no thread that outlives the bar: the engine's process is forked after it


def _bar(name: str, total: int | None, here: int) -> tqdm[Any]:
    """A progress bar with speed and time left; in a log, a line now and then."""
    return _Bar(
        desc=name,
        total=total,
        initial=here,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


def _by_pget(jobs: list[_Job], bar: tqdm[Any]) -> list[_Job]:
    """Download what is not begun yet with pget, where it is installed; returns the jobs that are left."""
    # pget asks for the size itself, and takes an empty file for a failure. Its requests for parts of a file name no
    # version, so what it brought may be of two: only a version that is the same before and after tells.
    fresh = {
        job.part.with_suffix(".pget"): job
        for job in jobs
        if job.remote.size and job.remote.version is not None and not job.part.exists()
    }
    files = [pget.Wanted(job.remote.url, place, job.remote.size or 0) for place, job in fresh.items()]
    if not files or not pget.get(files, bar.update):
        return jobs
    after = remote_file.look([job.remote.url for job in fresh.values()])
    for job, now in zip(fresh.values(), after, strict=True):
        if now.version != job.remote.version:
            for one in fresh:
                one.unlink()
            raise CogpressError(f"{job.remote.shown} changed while it was downloaded. Start again.")
    for place, job in fresh.items():
        os.replace(place, job.place)
    return [job for job in jobs if not job.place.exists()]
