"""Downloads over a real local server: cut, resumed, refused, with and without pget."""

from __future__ import annotations

import logging
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import pytest

from cogpress import http, source
from cogpress.errors import CogpressError
from cogpress.weights import download, pget, remote_file
from tests.standins.fileserver import FileServer

MB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and no pget of this machine."""
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    monkeypatch.setattr(pget, "program", lambda: None)


def served(site: FileServer, name: str = "a.bin", size: int = 7 * MB + 13) -> bytes:
    content = random.Random(name).randbytes(size)
    (site.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (site.folder / name).write_bytes(content)
    return content


def get(site: FileServer, folder: Path, name: str = "a.bin", query: str = "") -> Path:
    place = folder / "places" / name
    [remote] = remote_file.look([f"{site.url}/{name}{query}"])
    download.get([(remote, place)], folder / "parts")
    return place


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_comes_in_one_stream(tmp_path: Path, site: FileServer) -> None:
    content = served(site)
    assert get(site, tmp_path / "out").read_bytes() == content
    assert site.asked("/a.bin") == ["bytes=0-7340044"]
    assert left(tmp_path / "out") == ["a.bin"]


@pytest.mark.parametrize("missing", ["ranges", "etags"])
def test_without_ranges_or_validators_every_try_starts_over(tmp_path: Path, site: FileServer, missing: str) -> None:
    content = served(site)
    setattr(site, missing, False)
    site.cuts, site.cut_after = 2, 3 * MB
    assert get(site, tmp_path / "out").read_bytes() == content
    assert site.asked("/a.bin") == [None] * 3


def test_a_cut_is_resumed_where_it_was(tmp_path: Path, site: FileServer) -> None:
    content = served(site, size=8 * MB)
    site.cuts, site.cut_after = 3, MB // 2
    assert get(site, tmp_path / "out").read_bytes() == content
    starts = [int(str(wanted)[6:].split("-")[0]) for wanted in site.asked("/a.bin")]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert starts[-1] >= 3 * MB // 2 - 3 * 65536, "what had arrived was not asked for again"


def test_a_server_that_falls_silent_is_asked_again(
    tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_file, "SILENCE_SECONDS", 0.5)
    content = served(site)
    site.stalls, site.cut_after = 2, 3 * MB
    assert get(site, tmp_path / "out").read_bytes() == content
    starts = [int(str(wanted)[6:].split("-")[0]) for wanted in site.asked("/a.bin")]
    assert len(starts) >= 3
    assert 0 == starts[0] < starts[1]
    assert starts == sorted(starts), "what had arrived was not asked for again"


def test_a_download_without_a_length_ends_where_the_disk_does(
    tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = served(site)
    site.chunked = True
    site.ranges = False
    assert get(site, tmp_path / "out").read_bytes() == content
    real = shutil.disk_usage
    monkeypatch.setattr(download, "_LOOK", MB)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda folder: real(folder)._replace(free=1000) if site.asked("/a.bin")[1:] else real(folder),
    )
    with pytest.raises(CogpressError, match=r"0\.00 GB free"):
        get(site, tmp_path / "other")
    assert left(tmp_path / "other") == []


@pytest.mark.slow
def test_another_process_resumes_but_never_another_version(tmp_path: Path, site: FileServer) -> None:
    content = served(site)
    site.cuts, site.cut_after = 1000, 0
    for _ in range(2):
        with pytest.raises(CogpressError, match=r"Could not download .*a\.bin: .* times in a row"):
            get(site, tmp_path / "out")
    [remote] = remote_file.look([f"{site.url}/a.bin"])
    # What a killed process leaves
    part = tmp_path / "out" / "parts" / f"{remote.key}.part"
    part.write_bytes(content[: 4 * MB])
    site.cuts = 0
    site.log.clear()
    assert get(site, tmp_path / "out").read_bytes() == content
    assert site.asked("/a.bin") == ["bytes=4194304-7340044"]
    # Neither a part of another version nor one longer than the file is resumed
    place = tmp_path / "out" / "places" / "a.bin"
    part.write_bytes(b"x" * 4 * MB)
    content = served(site, size=7 * MB)
    place.unlink()
    assert get(site, tmp_path / "out").read_bytes() == content
    [remote] = remote_file.look([f"{site.url}/a.bin"])
    (tmp_path / "out" / "parts" / f"{remote.key}.part").write_bytes(b"x" * 8 * MB)
    place.unlink()
    assert get(site, tmp_path / "out").read_bytes() == content
    # A complete part needs no request
    (tmp_path / "out" / "parts" / f"{remote.key}.part").write_bytes(content)
    place.unlink()
    site.log.clear()
    assert get(site, tmp_path / "out").read_bytes() == content
    assert site.asked("/a.bin") == []


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, site: FileServer) -> None:
    served(site)
    [remote] = remote_file.look([f"{site.url}/a.bin"])
    os.utime(site.folder / "a.bin", ns=(1, 1))
    with pytest.raises(CogpressError, match="changed while it was downloaded"):
        download.get([(remote, tmp_path / "out" / "a.bin")], tmp_path / "out" / "parts")
    assert left(tmp_path / "out") == []


def test_a_busy_server_is_retried_and_a_refusal_is_not(tmp_path: Path, site: FileServer) -> None:
    content = served(site)
    site.busy = 4
    assert get(site, tmp_path / "out").read_bytes() == content
    site.busy = 1000
    with pytest.raises(CogpressError, match="the server answered 503, 6 times in a row"):
        remote_file.look([f"{site.url}/a.bin"])
    site.busy = 0
    site.log.clear()
    with pytest.raises(CogpressError, match="the server answered 404"):
        remote_file.look([f"{site.url}/missing"])
    assert len(site.log) == 1


def test_many_files_of_all_sizes(tmp_path: Path, site: FileServer) -> None:
    contents = {f"f{size}/x y%ü": served(site, f"f{size}", size) for size in (0, 1, 5, 2 * MB, 3 * MB)}
    wanted = [(f"{site.url}/{name.partition('/')[0]}", tmp_path / "out" / name) for name in contents]
    remotes = remote_file.look([url for url, _ in wanted])
    download.get([(r, place) for r, (_, place) in zip(remotes, wanted, strict=True)], tmp_path / "out" / "parts")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in contents} == contents
    site.log.clear()
    download.get([(r, place) for r, (_, place) in zip(remotes, wanted, strict=True)], tmp_path / "out" / "parts")
    assert site.log == []


def test_redirects_are_followed_but_never_away_from_https(tmp_path: Path, site: FileServer) -> None:
    content = served(site)
    site.redirects = {"/here": f"{site.url}/a.bin?signature=inner", "/away": "http://example.com/a?signature=secret"}
    assert get(site, tmp_path / "out", "here").read_bytes() == content
    with pytest.raises(CogpressError, match=r"http://example\.com/a, where the server redirects to") as error:
        get(site, tmp_path / "out", "away")
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_no_secret_is_shown_or_logged(
    tmp_path: Path, site: FileServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    served(site)
    get(site, tmp_path / "out", query="?signature=secret")
    assert site.log[0][0] == "signature=secret", "but sent it is"
    site.cuts = 1000
    for name in ("missing", "a.bin"):
        with pytest.raises(CogpressError) as error:
            get(site, tmp_path / "other", name, "?signature=secret")
        assert "secret" not in str(error.value)
    with pytest.raises(CogpressError) as error:
        remote_file.look(["https://user:secret@127.0.0.1:1/a?secret#secret"])
    assert "secret" not in str(error.value)
    assert source.shown("https://user:secret@host:1/a/b.tar?secret#secret") == "https://host:1/a/b.tar"
    out = capfd.readouterr()
    assert "secret" not in caplog.text + out.out + out.err
    assert "a.bin: 100%" in out.err
    assert "B/s" in out.err


def test_room_is_checked_before_anything_is_fetched(tmp_path: Path, site: FileServer) -> None:
    served(site)
    [remote] = remote_file.look([f"{site.url}/a.bin"])
    site.log.clear()
    with pytest.raises(CogpressError, match=r"needs 1000000000\.01 GB.* GB free"):
        download.get([(remote, tmp_path / "a")], tmp_path / "parts", also=10**18)
    assert site.log == []


PGET = """#!{python}
import os, pathlib, sys, urllib.request
if sys.argv[1:] == ["version"]:
    print("{banner}")
    sys.exit()
assert sys.argv[1:] == ["multifile", "-"], sys.argv
mode = pathlib.Path("{mode}").read_text()
for line in sys.stdin:
    url, place = line.split()
    assert not os.path.lexists(place), place
    body = urllib.request.urlopen(url).read()
    if mode.startswith("/"):
        pathlib.Path(mode).write_bytes(body[::-1])
    open(place, "wb").write(body[:-1] if mode == "short" else body)
    with open("{log}", "a") as log:
        log.write(url + "\\n")
    print(url), print(url, file=sys.stderr)
sys.exit(1 if mode == "fails" else 0)
"""


def install_pget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, banner: str = "") -> Path:
    """A program that reads its input as Replicate's pget 0.8 does, and really downloads."""
    program = tmp_path / "bin" / "pget"
    program.parent.mkdir()
    (tmp_path / "mode").write_text(mode)
    program.write_text(
        PGET.format(
            python=sys.executable,
            banner=banner or "pget Version v0.8.2 - Build Time 2024-05-01T00:00:00Z",
            mode=tmp_path / "mode",
            log=tmp_path / "pget.log",
        )
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "pget.log"


def test_pget_is_used_where_it_is_installed(
    tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log = install_pget(tmp_path, monkeypatch, "works")
    contents = {name: served(site, name, size) for name, size in (("a", 5 * MB), ("b", 100), ("empty", 0))}
    remotes = remote_file.look([f"{site.url}/{name}?signature=secret" for name in contents])
    places = [tmp_path / "out" / name for name in contents]
    download.get(list(zip(remotes, places, strict=True)), tmp_path / "out" / "parts")
    assert [place.read_bytes() for place in places] == list(contents.values())
    assert len(log.read_text().splitlines()) == 2, "an empty file is no file for pget"
    assert left(tmp_path / "out") == ["a", "b", "empty"]
    assert "secret" not in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["fails", "short"])
def test_a_failed_pget_is_replaced(
    tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    install_pget(tmp_path, monkeypatch, mode)
    content = served(site)
    assert get(site, tmp_path / "out").read_bytes() == content
    assert "downloading without it" in capfd.readouterr().err
    assert left(tmp_path / "out") == ["a.bin"]


def test_pget_never_mixes_two_versions(tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = served(site)
    log = install_pget(tmp_path, monkeypatch, str(site.folder / "a.bin"))
    with pytest.raises(CogpressError, match="changed while it was downloaded"):
        get(site, tmp_path / "out")
    assert left(tmp_path / "out") == []
    (tmp_path / "mode").write_text("works")
    assert get(site, tmp_path / "out").read_bytes() == content[::-1]
    log.unlink()
    site.etags = False
    assert get(site, tmp_path / "other").read_bytes() == content[::-1]
    assert not log.exists(), "where the server tells no version, nobody could know"


def test_another_program_of_that_name_is_not_run(
    tmp_path: Path, site: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_pget(tmp_path, monkeypatch, "works", banner="Pget v0.2.1, parallel file download client")
    content = served(site)
    assert get(site, tmp_path / "out").read_bytes() == content
    assert not log.exists()
