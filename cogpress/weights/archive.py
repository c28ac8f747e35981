"""Tars of models: packed the same way every time, and unpacked without trusting them, whole or not at all."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from cogpress.errors import CogpressError, reason
from cogpress.files import is_full, new_file, new_folder
from cogpress.weights.filenames import safe_name

MAX_MEMBERS = 10_000
"""More files than any model has."""

MAX_RATIO = 200
"""Unpacked bytes per packed byte: weights hardly compress, so a higher ratio is a compression bomb."""

MAX_HEADER = 1 << 20
"""Bytes of one member's headers: a name and some attributes, in whatever format."""

_OTHER_COMPRESSIONS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


def pack(folder: Path, tar: Path, inside: Mapping[str, Path] | None = None) -> Path:
    """Write a folder's files to an uncompressed tar, in a fixed order and without owners or times.

    Weights do not compress, so compression would cost time and save nothing.

    Args:
        folder: becomes the tar's top.
        tar: the file.
        inside: more folders, by their names in the tar.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    for name, other in (inside or {}).items():
        files |= {f"{name}/{path.relative_to(other)}": path for path in sorted(other.rglob("*"))}
    with new_file(tar) as part, tarfile.open(part, "w") as archive:
        for name, path in files.items():
            if path.is_file():
                archive.add(path, arcname=name, filter=_anonymous)
    return tar


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o644
    return member


def unpack(tar: Path, target: Path, then: Callable[[Path], object] | None = None) -> Path:
    """Unpack a tar into `target`, all or nothing; see `unpack_into`. `then` has the new folder before it is there."""
    with new_folder(target) as part:
        unpack_into(tar, part)
        if then is not None:
            then(part)
    return target


def unpack_into(tar: Path, folder: Path, shown: str | None = None) -> None:
    """Unpack a tar (plain or gzipped) of regular files into an empty folder.

    Args:
        tar: the file.
        folder: delete it when this raises.
        shown: what messages call the tar; its path where not given.

    Raises:
        CogpressError: the tar is incomplete; it holds a path outside the folder or a path twice, a link, a device or a
            pickle file; or it has too many members, too long headers, too high a compression ratio, or is too large
            for the disk.
    """
    shown = shown or str(tar)
    try:
        with _opened(tar, shown) as file:
            _unpack(file, folder, shown, min(tar.stat().st_size * MAX_RATIO, shutil.disk_usage(folder).free))
    except OSError as error:
        if is_full(error):
            raise CogpressError(f"The disk has no room to unpack {shown}; nothing was changed. Free some.") from None
        raise _unreadable(shown, error) from None
    # tarfile raises any of these for a hostile header.
    except (tarfile.TarError, EOFError, zlib.error, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _unreadable(shown, error) from None


def _unreadable(shown: str, error: Exception) -> CogpressError:
    return CogpressError(f"Could not unpack {shown} ({reason(error)}); nothing was changed. Fetch it again.")


class _Metered:
    """A seekable file that limits how much is read or skipped, whatever the headers claim."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file, self._shown, self._left = file, shown, 0
        self.last = b""

    def allow(self, count: int) -> None:
        """Limit what is read or skipped from here on, in bytes."""
        self._left = count

    def read(self, count: int = -1) -> bytes:
        self._spend(count)
        self.last = self._file.read(count)
        return self.last

    def seek(self, position: int) -> int:
        # Skipping costs as much as reading where the file is compressed.
        self._spend(max(0, position - self._file.tell()))
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def _spend(self, count: int) -> None:
        if count < 0 or count > self._left:
            raise CogpressError(f"{self._shown} has oversized headers and is refused. Check where it comes from.")
        self._left -= count


@contextmanager
def _opened(tar: Path, shown: str) -> Iterator[IO[bytes]]:
    with tar.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        for magic, name in _OTHER_COMPRESSIONS.items():
            if start.startswith(magic):
                raise CogpressError(
                    f"{shown} is compressed with {name}, which is not supported. Pack the files as a plain tar: "
                    "weights hardly compress."
                )
        if start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as decompressed:
                yield cast(IO[bytes], decompressed)
        else:
            yield file


def _unpack(file: IO[bytes], folder: Path, shown: str, room: int) -> None:
    metered = _Metered(file, shown)
    metered.allow(MAX_HEADER)
    with tarfile.TarFile(fileobj=cast(Any, metered), mode="r") as archive:
        names: set[str] = set()
        folders: set[str] = set()
        for _ in range(MAX_MEMBERS):
            metered.allow(MAX_HEADER)
            member = archive.next()
            if member is None:
                break
            # macOS's tar adds Finder's metadata to each file, under such a name.
            if member.isdir() or PurePosixPath(member.name).name.startswith("._"):
                continue
            name = _safe_member(member, shown)
            _refuse_collision(name, names, folders, shown)
            room -= member.size
            if room < 0:
                raise _bomb(shown)
            metered.allow(member.size + 2 * tarfile.BLOCKSIZE)
            _write(archive, member, folder / name)
        else:
            raise _bomb(shown)
        # tarfile takes a damaged header, or the end of the file, for the end of the archive too.
        if metered.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends before its end mark")
    if isinstance(file, gzip.GzipFile):
        _read_out(file, room, shown)


def _read_out(file: IO[bytes], room: int, shown: str) -> None:
    """Read a compressed file to its end, where its checksum is."""
    while block := file.read(1 << 20):
        room -= len(block)
        if room < 0:
            raise _bomb(shown)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None  # only regular files come here
    with source, place.open("xb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _bomb(shown: str) -> CogpressError:
    return CogpressError(
        f"{shown} would unpack to more than its size allows or the disk has room for; nothing was unpacked. Check "
        "where it comes from."
    )


def _safe_member(member: tarfile.TarInfo, shown: str) -> PurePosixPath:
    name = safe_name(member.name, shown)
    if not member.isreg() or member.issparse() or member.size < 0:
        raise CogpressError(f"{shown} holds {member.name[:80]!r}, a link, a device or a sparse file, and is refused.")
    return name


def _refuse_collision(name: PurePosixPath, names: set[str], folders: set[str], shown: str) -> None:
    """Refuse a name used twice, also in another case, or for both a file and a folder: which one wins is chance."""
    key = str(name).casefold()
    parents = {str(parent).casefold() for parent in name.parents}
    if key in names or key in folders or names & parents:
        raise CogpressError(f"{shown} holds {str(name)!r} twice, or as a file and a folder, and is refused.")
    names.add(key)
    folders.update(parents)
