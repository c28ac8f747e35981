"""A tar is unpacked whole and only inside its folder, or not at all."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cogpress import archive
from cogpress.errors import CogpressError


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


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
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
        member("a/model.ckpt"),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_what_does_not_belong_is_refused_and_nothing_left(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    tar = tar_of(tmp_path / "bad.tar", (member("config.json"), b"{}"), (bad, b""))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("good")
    with pytest.raises(CogpressError, match=bad.name.rpartition("/")[2]):
        archive.unpack(tar, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tar", "out"}
    assert (tmp_path / "out" / "kept").read_text() == "good"


def test_a_compression_bomb_is_refused(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "bomb.tar.gz", (member("zeros.safetensors"), b"\0" * 50_000_000), mode="w:gz")
    assert tar.stat().st_size < 100_000
    with pytest.raises(CogpressError, match="would unpack to more"):
        archive.unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no tar at all"])
def test_a_damaged_tar_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    tar = tar_of(tmp_path / "a.tar", (member("model.safetensors"), bytes(range(256)) * 400))
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(CogpressError, match="can not be unpacked"):
        archive.unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.mkdir()
    (target / "old").write_text("old")

    def dies() -> None:
        with archive.new_folder(target) as part:
            (part / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        dies()
    assert [path.name for path in target.iterdir()] == ["old"]
    with archive.new_folder(target) as part:
        (part / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
