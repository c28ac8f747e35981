"""A model or adapter from its source to a checked local folder, for training and for serving.

The cache has a folder for each source, named for a hash of it, with a folder for each version (the server's ETag or
date, the hash of a published manifest, a local tar's size and date). A version's folder appears complete and checked,
or not at all. One process at a time works on a source; others wait and find its result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import filelock

# safetensors imports it at its first use, which must not meet the engine's imports in another thread.
import numpy  # noqa: F401
import safetensors

from cogpress import source
from cogpress.errors import CogpressError
from cogpress.files import new_folder, recover, sha256, write_json
from cogpress.source import Source
from cogpress.weights import archive, download, embedded, hub, manifest, remote_file, tensors
from cogpress.weights.filenames import ADAPTER_CONFIG, VERIFICATION, is_taken, refuse_pickle

MAX_MANIFEST = 16 << 20
"""Bytes of a published manifest."""

KEEP_SECONDS = 24 * 3600
"""How long an older version stays in the cache after its last use: a server may still be loading it."""


@dataclass(frozen=True)
class FetchedModel:
    """A checked model folder.

    Attributes:
        folder: where it is; do not write to it.
        manifest: what it was checked against; None where it has none.
        seconds: the time spent getting the files (`fetch`) and checking them (`check`).
    """

    folder: Path
    manifest: dict[str, Any] | None
    seconds: dict[str, float]


def base(text: str, cache: Path) -> Path:
    """The checked folder of a base model.

    Args:
        text: `embedded`, or a source as `model` takes it.
        cache: where fetched and converted models are kept.

    Raises:
        CogpressError: as `model`; or the embedded model's package is not installed.
    """
    return embedded.fetch(cache) if text == "embedded" else model(text, cache).folder


def tokenizer_folder(text: str, cache: Path) -> Path:
    """A folder with a base's configuration and tokenizer; from the Hub only these are downloaded.

    Args:
        text: as `base` takes it.
        cache: where fetched and converted models are kept.

    Raises:
        CogpressError: as `base`.
    """
    wanted = None if text == "embedded" else source.parse(text)
    if wanted and wanted.kind == "hub":
        return hub.snapshot(wanted, weights=False)
    if wanted and wanted.kind == "path" and (folder := Path(wanted.text).expanduser()).is_dir():
        return folder
    return base(text, cache)


def model(text: str | os.PathLike[str], cache: Path) -> FetchedModel:
    """Fetch a model from its source and check it; one that is in the cache already is only checked.

    Args:
        text: a source, in one of `source.FORMS`.
        cache: where fetched and unpacked models are kept.

    Raises:
        CogpressError: the source does not exist or cannot be reached, the disk has no room, or the result is not a
            complete model in safetensors. The cache keeps what it held before.
    """
    found = _get(text, cache)
    if not (found.folder / "config.json").is_file():
        raise CogpressError(f"{source.shown(os.fspath(text))} is an adapter, not a model. Merge it, or name a model.")
    return found


def prepare(text: str | os.PathLike[str]) -> None:
    """Import what fetching from a source needs, before the engine's imports begin in another thread."""
    if os.fspath(text).startswith("hf://"):
        hub.prepare()


def _get(text: str | os.PathLike[str], cache: Path) -> FetchedModel:
    started = time.perf_counter()
    wanted = source.parse(os.fspath(text))
    try:
        found = {"path": _path, "hub": _hub, "tar": _tar, "files": _files}[wanted.kind](wanted, cache)
    except OSError as error:
        raise CogpressError(f"Could not fetch {wanted.shown} into {cache}: {error.strerror or error}.") from None
    spent = found.seconds["check"]
    return replace(found, seconds={"fetch": time.perf_counter() - started - spent, "check": spent})


def adapter(text: str | os.PathLike[str], cache: Path) -> FetchedModel:
    """Fetch an adapter from its source and check it, as `model` does with a model.

    Raises:
        CogpressError: as `model`; or it is a model, not an adapter.
    """
    found = _get(text, cache)
    if not (found.folder / ADAPTER_CONFIG).is_file():
        raise CogpressError(
            f"{source.shown(os.fspath(text))} has no {ADAPTER_CONFIG}, so it is not an adapter. Name one."
        )
    return found


def check(folder: Path, shown: str | None = None) -> FetchedModel:
    """Check that a folder is a complete model in safetensors, and against its manifest where it has one.

    Args:
        folder: the folder.
        shown: what messages call it; its path where not given.

    Raises:
        CogpressError: what is missing, cut off or changed.
    """
    started = time.perf_counter()
    try:
        facts = manifest.read(folder)
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise CogpressError(f"{folder} has no config.json, so it is not a model. Name the folder that holds one.")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            for path in folder.iterdir():
                refuse_pickle(PurePosixPath(path.name), folder)
            raise CogpressError(f"{folder} holds no .safetensors file, which is all that cogpress loads. Name another.")
        tensors.files(folder)
        for path in weights:
            _check_whole(path)
        if facts is not None:
            manifest.check(folder, facts)
    except CogpressError as error:
        raise CogpressError(str(error).replace(str(folder), shown or str(folder))) from None
    return FetchedModel(folder, facts, {"fetch": 0.0, "check": time.perf_counter() - started})


def _check_whole(path: Path) -> None:
    """A file that was cut off has fewer bytes than its header describes, with or without a manifest."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CogpressError(f"{path} is cut off or damaged ({error}). Fetch the model again.") from None


def _path(wanted: Source, cache: Path) -> FetchedModel:
    path = Path(wanted.text).expanduser()
    if not path.exists():
        recover(path)
    if path.is_dir():
        return check(path)
    if not path.is_file():
        raise CogpressError(f"{wanted.text!r} is not a folder or tar of a model. Name {source.FORMS}.")
    refuse_pickle(PurePosixPath(path.name), path.parent)
    state = path.stat()

    def unpack(folder: Path) -> None:
        archive.unpack_into(path, folder)
        _lift(folder)
        leave_out(folder, wanted.shown)

    with _alone(str(path.resolve()), wanted.shown, cache) as entry:
        return _version(entry, f"{state.st_size}:{state.st_mtime_ns}", wanted.shown, unpack)


def _lift(folder: Path) -> None:
    """Lift the files out of the one folder that a tar made of a folder holds."""
    content = list(folder.iterdir())
    if len(content) == 1 and content[0].is_dir():
        inner = content[0].rename(folder.parent / "inner")
        folder.rmdir()
        inner.rename(folder)


def leave_out(folder: Path, shown: str) -> None:
    """Delete what no model has from an unpacked tar, and say so.

    Args:
        folder: where it was unpacked.
        shown: what messages call the tar.

    Raises:
        CogpressError: its manifest lists such a file.
    """
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    strange = [name for name in names if not is_taken(name)]
    if not strange:
        return
    facts = manifest.read(folder) or {}
    manifest.refuse_strange(facts.get("files") or {}, shown)
    for name in strange:
        (folder / name).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    _say(f"Left out of {shown}, as no model needs them: {', '.join(strange[:5])}{more}.")


def _tar(wanted: Source, cache: Path) -> FetchedModel:
    with _alone(wanted.text, wanted.shown, cache) as entry:
        try:
            [remote] = remote_file.look([wanted.text])
        except CogpressError as error:
            return _kept(entry, wanted, error)
        tar = entry / "parts" / f"{remote.key}.tar"

        def get() -> None:
            # Unpacked files are no smaller than the tar: weights hardly compress.
            download.get([(remote, tar)], tar.parent, also=remote.size or 0)

        def fill(folder: Path) -> None:
            get()
            archive.unpack_into(tar, folder, wanted.shown)
            _lift(folder)
            leave_out(folder, wanted.shown)

        version = remote.key
        try:
            if remote.version is None:
                _say(f"The server of {wanted.shown} tells no version of it, so it is downloaded at every start.")
                tar.unlink(missing_ok=True)
                try:
                    get()
                except CogpressError as error:
                    return _kept(entry, wanted, error)
                version = sha256(tar)
            return _version(entry, version, wanted.shown, fill)
        finally:
            tar.unlink(missing_ok=True)


def _files(wanted: Source, cache: Path) -> FetchedModel:
    """A folder published with its manifest, whose URL names it; the files are beside it."""
    with _alone(wanted.text, wanted.shown, cache) as entry:
        try:
            listed = remote_file.read(wanted.text, MAX_MANIFEST)
        except CogpressError as error:
            return _kept(entry, wanted, error)

        def fill(folder: Path) -> None:
            (folder / manifest.NAME).write_bytes(listed)
            sizes = manifest.listed(folder, wanted.shown)
            remotes = remote_file.look([beside(wanted.text, name) for name in sizes])
            for remote, (name, size) in zip(remotes, sizes.items(), strict=True):
                if remote.size not in (None, size):
                    raise CogpressError(
                        f"{remote.shown} has {remote.size} bytes, and the manifest says that {name} has {size}. "
                        "Publish the folder again."
                    )
            # Where a server does not say a size, the manifest's holds.
            remotes = [replace(one, size=size) for one, size in zip(remotes, sizes.values(), strict=True)]
            parts = entry / "parts"
            places = [parts / f"{remote.key}.file" for remote in remotes]
            download.get(list(zip(remotes, places, strict=True)), parts)
            for place, name in zip(places, sizes, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                place.rename(folder / name)

        found = _version(entry, hashlib.sha256(listed).hexdigest(), wanted.shown, fill)
        _fetch_verification(wanted.text, found.folder)
        return found


def _fetch_verification(url: str, folder: Path) -> None:
    """Fetch the verification report published beside a manifest, if there is one: it can be newer than the weights."""
    try:
        report = remote_file.read(beside(url, VERIFICATION), MAX_MANIFEST)
        write_json(folder / VERIFICATION, json.loads(report))
    except (CogpressError, ValueError, RecursionError):
        return  # there is none, or the server answers with a page of its own


def beside(url: str, name: str) -> str:
    """The URL of a file beside the manifest, with the same query: a storage container's token holds for all files."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.removesuffix(manifest.NAME) + quote(name)))


@contextmanager
def _alone(key: str, shown: str, cache: Path) -> Iterator[Path]:
    """Hold the cache's folder of a source, one process at a time."""
    entry = cache / "fetched" / hashlib.sha256(key.encode()).hexdigest()[:16]
    entry.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(entry / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"Another process is fetching {shown}; waiting for it.")
        lock.acquire()
    try:
        yield entry
    finally:
        lock.release()


def _version(entry: Path, version: str, shown: str, fill: Callable[[Path], None]) -> FetchedModel:
    """The folder of one version; filled and checked first where it is missing or damaged."""
    target = entry / f"model-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    recover(target)
    if target.is_dir():
        try:
            return _used(check(target))
        except CogpressError as error:
            _say(f"{error} Fetching it again.")
    with new_folder(target) as folder:
        fill(folder)
        found = check(folder, shown)
    shutil.rmtree(entry / "parts", ignore_errors=True)
    for old in entry.glob("model-*"):
        if old != target and time.time() - old.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return _used(replace(found, folder=target))


def _kept(entry: Path, wanted: Source, error: CogpressError) -> FetchedModel:
    """The copy fetched last from a source that cannot be reached now.

    Raises:
        CogpressError: `error`, where there is no copy.
    """
    versions = sorted(entry.glob("model-*"), key=lambda folder: folder.stat().st_mtime)
    if not versions:
        raise error
    _say(f"{error} Using the copy of {wanted.shown} fetched before.")
    return _used(check(versions[-1]))


def _used(found: FetchedModel) -> FetchedModel:
    with suppress(OSError):
        os.utime(found.folder)
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _hub(wanted: Source, cache: Path) -> FetchedModel:
    return check(hub.snapshot(wanted))
