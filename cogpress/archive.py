"""One tar from a folder of weights, and back, without trusting the tar.

Knows names, kinds and sizes of members; leaves the meaning of the files to `manifest`.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from cogpress.errors import CogpressError

MAX_MEMBERS = 10_000
"""More files than any model has."""

MAX_RATIO = 200
"""Unpacked bytes per packed byte: weights hardly compress, so more than this is a compression bomb."""

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
"""Suffixes of files that run code when they are loaded."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block succeeds and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    part.chmod(0o755)
    try:
        yield part
        replace_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, target: Path) -> None:
    """Rename a finished folder to its place; what was there stays until the new one is in place."""
    # Some libraries write files readable by their owner only; an image or another user must be able to serve them.
    for path in part.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old / target.name)
        os.replace(part, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(part, target)


def pack(folder: Path, tar: Path) -> Path:
    """Write a folder's files to an uncompressed tar, in a fixed order and without owner or time.

    Weights do not compress, so the tar is as large as they are and as fast as the disk.
    """
    tar.parent.mkdir(parents=True, exist_ok=True)
    part = tar.with_name(f".{tar.name}.part{os.getpid()}")
    try:
        with tarfile.open(part, "w") as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.add(path, arcname=str(path.relative_to(folder)), filter=_anonymous)
        os.replace(part, tar)
    finally:
        part.unlink(missing_ok=True)
    return tar


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o644
    return member


def unpack(tar: Path, target: Path) -> Path:
    """Unpack a tar (plain or compressed) of regular files into `target`, all or nothing.

    Raises:
        CogpressError: not a tar; a path outside the target, a link or a device; pickle files; more members, a higher
            compression ratio or a larger size than the disk has room for.
    """
    try:
        with new_folder(target) as part, tarfile.open(tar) as archive:
            room = min(tar.stat().st_size * MAX_RATIO, shutil.disk_usage(part).free)
            for count, member in enumerate(archive):
                if member.isdir():
                    continue
                name = _safe_name(member, tar)
                room -= member.size
                if count >= MAX_MEMBERS or room < 0:
                    raise CogpressError(
                        f"{tar} would unpack to more than its size allows or the disk has room for; nothing was "
                        "unpacked. Check where it comes from."
                    )
                place = part / name
                place.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # _safe_name lets only regular files through
                with source, place.open("xb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CogpressError(f"{tar} can not be unpacked ({error}); nothing was changed. Fetch it again.") from None
    return target


def _safe_name(member: tarfile.TarInfo, tar: Path) -> PurePosixPath:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or not name.parts:
        raise CogpressError(f"{tar} holds {member.name!r}, a path outside its folder; nothing was unpacked.")
    if not member.isreg():
        raise CogpressError(f"{tar} holds {member.name!r}, a link or a device; nothing was unpacked.")
    refuse_pickle(name, tar)
    return name


def refuse_pickle(name: PurePosixPath, place: Path | str) -> None:
    """Raise for a file that runs code when it is loaded.

    Raises:
        CogpressError: with the way to convert it.
    """
    if name.suffix in PICKLES:
        raise CogpressError(
            f"{place} holds {name}, a pickle file, which can run code when it is loaded. Load the model where you "
            "trust it and save it again with save_pretrained(folder), which writes safetensors."
        )
