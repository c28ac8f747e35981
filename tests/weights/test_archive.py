"""A tar is unpacked completely and only inside its folder, or not at all."""

from __future__ import annotations

import gzip
import io
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cogpress.errors import CogpressError
from cogpress.weights import archive


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_a_folder_survives_packing_and_unpacking(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "a.safetensors").write_bytes(b"\0" * 5000)
    first = archive.pack(source, tmp_path / "a.tar").read_bytes()
    (source / "config.json").touch()
    assert archive.pack(source, tmp_path / "b.tar").read_bytes() == first
    out = archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        "config.json": b"{}",
        "sub/a.safetensors": b"\0" * 5000,
    }


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"),
        member("/tmp/outside"),
        member("a/../../outside"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.LNKTYPE, "config.json"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
        member("pytorch_model.bin"),
        member("weights.pt"),
        member("a/model.CKPT"),
        member("modeling.py"),
        member("kernels/a.SO"),
        member("compiled/torch_compile_cache/torch_aot_compile/0a1b/rank_0_0/model"),
        member("sparse", tarfile.GNUTYPE_SPARSE),
        member("config.json"),
        member("CONFIG.JSON"),
        member("config.json/inside"),
        member("bell\a"),
        member("new\nline"),
        member("x" * 256),
        member("/".join("deep" * 100)),
    ],
    ids=lambda info: f"{info.name[:20]!r}-{info.type.decode()}",
)
def test_unsafe_members_are_refused_and_nothing_is_left(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    tar = tar_of(tmp_path / "bad.tar", (member("config.json"), b"{}"), (bad, b""))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("good")
    with pytest.raises(CogpressError, match=r"holds .*(is refused|safetensors)"):
        archive.unpack(tar, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tar", "out"}
    assert (tmp_path / "out" / "kept").read_text() == "good"


BLOCK = tarfile.BLOCKSIZE
HUGE = 1 << 40


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header alone."""
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**values: str) -> bytes:
    """An extended header, whose values apply to the next member."""
    records = b""
    for name, value in values.items():
        record = f" {name.replace('_', '.')}={value}\n".encode()
        length = len(record) + 3
        records += b"%03d%s" % (length, record)
    return header("x", len(records), tarfile.XHDTYPE) + records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0")


def negative(name: str) -> bytes:
    """A header with a negative size, in the format for sizes above 8 GB."""
    data = bytearray(header(name, 0))
    data[124:136] = b"\xff" * 11 + b"\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def write_raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def write_many(count: int, kind: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tar_of(path, *((member(f"f{number}", kind), b"") for number in range(count)))

    return write


def write_zeros(first: bytes) -> Callable[[Path], None]:
    """A small gzip file of a header and gigabytes of zeros."""

    def write(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(first)
            for _ in range(64):
                file.write(bytes(1 << 22))

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_raw(header("a", HUGE) + bytes(BLOCK)), "would unpack to more"),
        (write_raw(header("a", HUGE, tarfile.GNUTYPE_LONGNAME) + bytes(BLOCK)), "oversized headers"),
        (write_raw(header("a", HUGE, tarfile.XHDTYPE) + bytes(BLOCK)), "oversized headers"),
        (write_raw(header("a", HUGE, tarfile.XGLTYPE) + bytes(BLOCK)), "oversized headers"),
        (write_raw(negative("a") * 3), "is refused"),
        (write_raw(pax(size="-512") + header("a", 0) + bytes(BLOCK)), "is refused"),
        (write_raw(pax(size=str(HUGE)) + header("a", 0) + bytes(BLOCK)), "would unpack to more"),
        (write_raw(pax(path="a\0b") + header("a", 0) + bytes(BLOCK)), "no file name"),
        (write_raw(pax(path="../a") + header("a", 0) + bytes(BLOCK)), "outside its folder"),
        (write_raw(pax(GNU_sparse_size=str(HUGE)) + header("a", 0) + bytes(BLOCK)), "is refused|Could not unpack"),
        (write_raw(pax(GNU_sparse_map="x", GNU_sparse_size="x") + header("a", 0) + bytes(BLOCK)), "Could not unpack"),
        (write_raw(header("x", 0, tarfile.XGLTYPE) * 5000), "Could not unpack|oversized headers"),
        (
            write_raw(pax(GNU_sparse_major="1", GNU_sparse_minor="0") + header("a", BLOCK) + b"99999999\n1\n"),
            "Could not unpack",
        ),
        (write_many(101, tarfile.REGTYPE), "would unpack to more"),
        (write_many(101, tarfile.DIRTYPE), "would unpack to more"),
        (write_zeros(header("zeros.safetensors", 1 << 28)), "would unpack to more"),
        (write_zeros(header("a", 1 << 28, tarfile.XHDTYPE)), "oversized headers"),
        (write_zeros(header("a", 0) + bytes(2 * BLOCK)), "would unpack to more"),
        (write_raw(b"BZh91AY"), "compressed with bzip2"),
        (write_raw(b"\xfd7zXZ\0\0"), "compressed with xz"),
        (write_raw(b"\x28\xb5\x2f\xfd\0\0"), "compressed with zstd"),
        (write_raw(b"PK\3\4\0\0"), "compressed with zip"),
        (write_raw(b"no tar at all"), "Could not unpack"),
        (write_raw(b""), "Could not unpack"),
        (write_raw(header("a", 3) + b"abc"), "Could not unpack"),
        # Complete members, but truncated between two of them or followed by garbage.
        (write_raw(header("a", 0) * 1), "before its end mark"),
        (write_raw(header("a", 0) + b"x" * BLOCK), "before its end mark"),
    ],
)
def test_bombs_and_damage_are_refused_quickly_and_nothing_is_left(
    tmp_path: Path, write: Callable[[Path], None], said: str, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 100)
    tar = tmp_path / "bad.tar"
    write(tar)
    started = time.process_time()
    with pytest.raises(CogpressError, match=said):
        archive.unpack(tar, tmp_path / "out")
    assert time.process_time() - started < 5
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte of memory left, so that allocating a header's claimed size fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar.gz", (member("config.json"), bytes(range(256))), mode="w:gz")
    good = tar.read_bytes()
    archive.unpack(tar, tmp_path / "good")
    for bad in (good[:-9], good[:-8] + bytes(4) + good[-4:]):
        tar.write_bytes(bad)
        with pytest.raises(CogpressError, match="Could not unpack"):
            archive.unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tars_of_common_programs_are_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "._config.json").write_text("Finder's")
    for form, name in (("ustar", "short"), ("gnu", "long" * 30), ("posix", "lang-ü" * 20)):
        (source / "a" / "b" / name).write_text("content")
        subprocess.run(["tar", f"--format={form}", "-C", source, "-czf", tmp_path / "a.tar", "."], check=True)
        out = archive.unpack(tmp_path / "a.tar", tmp_path / form)
        assert [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()] == [f"a/b/{name}"]
        (source / "a" / "b" / name).unlink()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The kernel really refuses to write, in a process of its own."""
    tar = tar_of(tmp_path / "a.tar", (member("config.json"), b"{}"), (member("a.safetensors"), b"x" * 3_000_000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("good")
    code = f"""
import resource
from pathlib import Path
from cogpress.weights import archive
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
archive.unpack(Path({str(tar)!r}), Path({str(tmp_path / "out")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CogpressError: The disk has no room to unpack" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_killed_packers_part_is_removed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    code = f"""
import os, signal
from pathlib import Path
from cogpress.weights import archive
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
archive.pack(Path({str(source)!r}), Path({str(tmp_path / "a.tar")!r}))
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert len(list(tmp_path.iterdir())) == 2
    archive.pack(source, tmp_path / "a.tar")
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "source"]
