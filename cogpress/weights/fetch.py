"""From a source to a checked local folder of a model, for training and for serving.

Knows the cache, which files of a repository are needed, and what makes a folder usable; leaves HTTP to `download`,
tars to `archive` and hashes to `manifest`.

The cache has a folder for each source, named for a hash of it, with a folder for each version of it (the server's ETag
or date, the hash of a published manifest, a local tar's size and date). A version's folder appears complete and checked
or not at all. One process at a time works on a source; others wait and find its result.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import filelock

# safetensors imports it at its first use, which must not meet the engine's imports in another thread.
import numpy  # noqa: F401
import safetensors

from cogpress import http as web
from cogpress import source
from cogpress.errors import CogpressError
from cogpress.files import new_folder, recover, write_json
from cogpress.source import Source
from cogpress.verify import report as verdict
from cogpress.weights import archive, download, manifest

INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor, in Hugging Face's layout."""

ADAPTER = "adapter_config.json"
"""By which an adapter is known, in peft's layout."""

HUB_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "LICENSE*")
"""What training and serving need of a repository on the Hub beside the weights."""

MAX_MANIFEST = 16 << 20
"""Bytes of a published manifest."""

KEEP_SECONDS = 24 * 3600
"""How long an older version stays in the cache after its last use: a server may still be loading it."""


@dataclass(frozen=True)
class Model:
    """A model folder that can be used.

    Attributes:
        folder: where it is; not to be written to.
        manifest: what it was checked against; None where it has none.
        seconds: that getting the files took (`fetch`) and that checking them took (`check`).
    """

    folder: Path
    manifest: dict[str, Any] | None
    seconds: dict[str, float]


def model(text: str | os.PathLike[str], cache: Path) -> Model:
    """Get a model from its source and check it; what is in the cache already is only checked.

    Args:
        text: a source, in one of `source.FORMS`.
        cache: where fetched and unpacked models are kept.

    Raises:
        CogpressError: the source does not exist or can not be reached, the disk has no room, or what came is not a
            whole model in safetensors. What the cache held before is left as it was.
    """
    found = _get(text, cache)
    if not (found.folder / "config.json").is_file():
        raise CogpressError(f"{source.shown(os.fspath(text))} is an adapter, not a model. Merge it, or name a model.")
    return found


def _get(text: str | os.PathLike[str], cache: Path) -> Model:
    started = time.perf_counter()
    wanted = source.parse(os.fspath(text))
    try:
        found = {"path": _path, "hub": _hub, "tar": _tar, "files": _files}[wanted.kind](wanted, cache)
    except OSError as error:
        raise CogpressError(f"{wanted.shown} can not be fetched into {cache}: {error.strerror or error}.") from None
    spent = found.seconds["check"]
    return replace(found, seconds={"fetch": time.perf_counter() - started - spent, "check": spent})


def adapter(text: str | os.PathLike[str], cache: Path) -> Model:
    """Get an adapter from its source and check it, as `model` does with a model.

    Raises:
        CogpressError: as `model`; or it is a model and not an adapter.
    """
    found = _get(text, cache)
    if not (found.folder / ADAPTER).is_file():
        raise CogpressError(f"{source.shown(os.fspath(text))} has no {ADAPTER}, so it is not an adapter. Name one.")
    return found


def check(folder: Path, shown: str | None = None) -> Model:
    """Check that a folder is a whole model in safetensors, and against its manifest where it has one.

    Args:
        folder: the folder.
        shown: what messages call it; its path where not given.

    Raises:
        CogpressError: what is missing, cut off or changed.
    """
    started = time.perf_counter()
    try:
        facts = manifest.read(folder)
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER)):
            raise CogpressError(f"{folder} has no config.json, so it is not a model. Name the folder that holds one.")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            for path in folder.iterdir():
                archive.refuse_pickle(PurePosixPath(path.name), folder)
            raise CogpressError(f"{folder} holds no .safetensors file, which alone are used. Name a folder with them.")
        for name in _shards(folder):
            if not (folder / name).is_file():
                raise CogpressError(f"{folder} lacks {name}, which {INDEX} names. Fetch the model again.")
        for path in weights:
            _check_whole(path)
        if facts is not None:
            manifest.check(folder, facts)
    except CogpressError as error:
        raise CogpressError(str(error).replace(str(folder), shown or str(folder))) from None
    return Model(folder, facts, {"fetch": 0.0, "check": time.perf_counter() - started})


def _shards(folder: Path) -> list[str]:
    """The files that the index names; none where there is no index."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [str(archive.safe_name(str(name), str(folder))) for name in sorted(set(names))]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CogpressError(f"{folder / INDEX} is not an index of shards. Fetch the model again.") from None


def _check_whole(path: Path) -> None:
    """A file that was cut off has fewer bytes than its header describes, with or without a manifest."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CogpressError(f"{path} is cut off or damaged ({error}). Fetch the model again.") from None


def _path(wanted: Source, cache: Path) -> Model:
    path = Path(wanted.text).expanduser()
    if not path.exists():
        recover(path)
    if path.is_dir():
        return check(path)
    if not path.is_file():
        raise CogpressError(f"{wanted.text!r} is not a folder or tar of a model. Name {source.FORMS}.")
    archive.refuse_pickle(PurePosixPath(path.name), path.parent)
    state = path.stat()

    def unpack(folder: Path) -> None:
        archive.unpack_into(path, folder)
        _lift(folder)

    with _alone(str(path.resolve()), wanted.shown, cache) as entry:
        return _version(entry, f"{state.st_size}:{state.st_mtime_ns}", wanted.shown, unpack)


def _lift(folder: Path) -> None:
    """A tar made of a folder has all its files in that one; take them out of it."""
    content = list(folder.iterdir())
    if len(content) == 1 and content[0].is_dir():
        inner = content[0].rename(folder.parent / "inner")
        folder.rmdir()
        inner.rename(folder)


def _tar(wanted: Source, cache: Path) -> Model:
    with _alone(wanted.text, wanted.shown, cache) as entry:
        try:
            [remote] = web.look([wanted.text])
        except CogpressError as error:
            return _kept(entry, wanted, error)
        tar = entry / "parts" / f"{remote.key}.tar"

        def fill(folder: Path) -> None:
            # What is unpacked is no smaller than the tar, which weights hardly compress in.
            download.get([(remote, tar)], tar.parent, also=remote.size or 0)
            try:
                archive.unpack_into(tar, folder, wanted.shown)
                _lift(folder)
            finally:
                tar.unlink()

        return _version(entry, remote.key, wanted.shown, fill)


def _files(wanted: Source, cache: Path) -> Model:
    """A folder published with its manifest, whose URL names it; the files lie beside it."""
    with _alone(wanted.text, wanted.shown, cache) as entry:
        try:
            listed = web.read(wanted.text, MAX_MANIFEST)
        except CogpressError as error:
            return _kept(entry, wanted, error)

        def fill(folder: Path) -> None:
            (folder / manifest.NAME).write_bytes(listed)
            sizes = _listed(folder, wanted.shown)
            remotes = web.look([beside(wanted.text, name) for name in sizes])
            for remote, (name, size) in zip(remotes, sizes.items(), strict=True):
                if remote.size not in (None, size):
                    raise CogpressError(
                        f"{remote.shown} has {remote.size} bytes, and the manifest says that {name} has {size}. "
                        "Publish the folder again."
                    )
            parts = entry / "parts"
            places = [parts / f"{remote.key}.file" for remote in remotes]
            download.get(list(zip(remotes, places, strict=True)), parts)
            for place, name in zip(places, sizes, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                place.rename(folder / name)

        found = _version(entry, hashlib.sha256(listed).hexdigest(), wanted.shown, fill)
        _bring_verdict(wanted.text, found.folder)
        return found


def _bring_verdict(url: str, folder: Path) -> None:
    """The verification report published beside a manifest, if there is one: it can be newer than the weights here."""
    try:
        report = web.read(beside(url, verdict.NAME), MAX_MANIFEST)
        write_json(folder / verdict.NAME, json.loads(report))
    except (CogpressError, ValueError):
        return  # it has none, or what answers is some page


def beside(url: str, name: str) -> str:
    """The URL of a file beside the manifest; a query, such as the token of a storage container, holds for it too."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.removesuffix(manifest.NAME) + quote(name)))


def _listed(folder: Path, shown: str) -> dict[str, int]:
    """`{name: bytes}` of the files that a manifest from elsewhere lists.

    Raises:
        CogpressError: it is no manifest, or names a file that is not to be fetched.
    """
    try:
        files = (manifest.read(folder) or {}).get("files")
    except CogpressError as error:
        raise CogpressError(str(error).replace(str(folder / manifest.NAME), shown)) from None
    if not isinstance(files, dict) or not 0 < len(files) <= archive.MAX_MEMBERS:
        raise CogpressError(f"{shown} lists no files, so it is not a manifest of weights. Check the URL.")
    sizes = {}
    for name, facts in files.items():
        if (
            str(archive.safe_name(name, shown)) != name
            or not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or facts["bytes"] < 0
            or not re.fullmatch("[0-9a-f]{64}", str(facts.get("sha256")))
        ):
            raise CogpressError(f"{shown} lists {name!r} without a plain name, its bytes and its sha256.")
        sizes[name] = facts["bytes"]
    return sizes


@contextmanager
def _alone(key: str, shown: str, cache: Path) -> Iterator[Path]:
    """The cache's folder of a source, for one process at a time."""
    entry = cache / "fetched" / hashlib.sha256(key.encode()).hexdigest()[:16]
    entry.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(entry / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"Another process fetches {shown}; waiting for it.")
        lock.acquire()
    try:
        yield entry
    finally:
        lock.release()


def _version(entry: Path, version: str, shown: str, fill: Callable[[Path], None]) -> Model:
    """The folder of one version, filled and checked first where it is not there or was damaged since."""
    target = entry / f"model-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    recover(target)
    if target.is_dir():
        try:
            return _used(check(target))
        except CogpressError as error:
            _say(f"{error} It is fetched again.")
    with new_folder(target) as folder:
        fill(folder)
        found = check(folder, shown)
    shutil.rmtree(entry / "parts", ignore_errors=True)
    for old in entry.glob("model-*"):
        if old != target and time.time() - old.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return _used(replace(found, folder=target))


def _kept(entry: Path, wanted: Source, error: CogpressError) -> Model:
    """What was fetched last from a source that can not be reached now; without it, the error."""
    versions = sorted(entry.glob("model-*"), key=lambda folder: folder.stat().st_mtime)
    if not versions:
        raise error
    _say(f"{error} What was fetched before from {wanted.shown} is used.")
    return _used(check(versions[-1]))


def _used(found: Model) -> Model:
    with suppress(OSError):
        os.utime(found.folder)
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(text: str | os.PathLike[str]) -> None:
    """Import what fetching from a source needs, before the engine's imports begin in another thread."""
    if os.fspath(text).startswith("hf://"):
        import huggingface_hub  # noqa: F401
        from huggingface_hub import errors, hf_hub_download, snapshot_download  # noqa: F401


def _hub(wanted: Source, cache: Path) -> Model:
    """The Hub's own client fetches, resumes and keeps; it is told which files."""
    from huggingface_hub import constants, snapshot_download

    def snapshot(**options: Any) -> Any:
        return snapshot_download(wanted.repository, revision=wanted.revision, **options)

    try:
        listed = {info.filename: info for info in snapshot(dry_run=True)}
    except (OSError, ValueError) as error:
        refused = not_had(wanted, error.__cause__ or error)
        try:
            folder = Path(snapshot(local_files_only=True, allow_patterns=["config.json"]))
        except (OSError, ValueError):
            raise refused from None
        _say(f"{refused} What was fetched before is used.")
        return check(folder)
    names = _needed(wanted, listed.keys())
    missing = sum(listed[name].file_size for name in names if listed[name].will_download)
    download.check_room(Path(constants.HF_HUB_CACHE), missing)
    try:
        folder = Path(snapshot(allow_patterns=[glob.escape(name) for name in names]))
    except (OSError, ValueError) as error:
        raise not_had(wanted, error) from None
    return check(folder)


def _needed(wanted: Source, names: Iterable[str]) -> list[str]:
    """Which of a repository's files to fetch: what its manifest lists, else one set of weights and the settings."""
    from huggingface_hub import hf_hub_download

    def near(name: str) -> Path:
        try:
            return Path(hf_hub_download(wanted.repository, name, revision=wanted.revision)).parent
        except (OSError, ValueError) as error:
            raise not_had(wanted, error) from None

    names = set(names)
    top = {name for name in names if "/" not in name}
    weights = {name for name in top if name.endswith(".safetensors")}
    if not weights:
        for name in sorted(top):
            archive.refuse_pickle(PurePosixPath(name), wanted.text)
        raise CogpressError(f"{wanted.text} holds no .safetensors file, which alone are used. Name another model.")
    if manifest.NAME in names and (listed := _own_list(near(manifest.NAME))):
        needed = {manifest.NAME, *listed, *names.intersection(verdict.FILES)}
    else:
        settings = {name for name in top - weights if any(fnmatch.fnmatch(name, form) for form in HUB_FILES)}
        settings = {name for name in settings if PurePosixPath(name).suffix not in archive.PICKLES}
        # Some repositories hold the same weights again under other names.
        if INDEX in names:
            weights = set(_shards(near(INDEX)))
        elif "model.safetensors" in names:
            weights = {"model.safetensors"}
        needed = weights | settings - {manifest.NAME}
    if missing := sorted(needed - names):
        raise CogpressError(f"{wanted.text} lacks {missing[0]}, which its own list of files names. Name another model.")
    return sorted(needed)


def _own_list(folder: Path) -> dict[str, int]:
    """What the manifest in a folder lists; nothing where the file of that name is some other program's."""
    try:
        return _listed(folder, str(folder / manifest.NAME))
    except CogpressError:
        return {}


def not_had(wanted: Source, error: BaseException) -> CogpressError:
    said = str(error).strip().splitlines()
    # An address that the Hub redirects to is signed.
    reason = re.sub(r"\?\S+", "", said[0]) if said else type(error).__name__
    return CogpressError(
        f"{wanted.text} can not be had from the Hub: {reason} Check the name and the network; for a private or gated "
        "model set HF_TOKEN."
    )
