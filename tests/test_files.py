"""A folder appears complete or not at all, whenever its writer is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cogpress import files
from cogpress.files import new_folder, recover


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.mkdir()
    (target / "old").write_text("old")

    def dies() -> None:
        with new_folder(target) as part:
            (part / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        dies()
    assert [path.name for path in target.iterdir()] == ["old"]
    with new_folder(target) as part:
        (part / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


WRITER = """
import os, signal, sys, time
from pathlib import Path
from cogpress.files import new_folder
replace = os.replace
def deadly(source, target):
    replace(source, target)
    if Path(target).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = deadly
with new_folder(Path(sys.argv[1])) as part:
    (part / "new").write_text("new")
    print("writing", flush=True)
    if sys.argv[2] == "while writing":
        time.sleep(60)
"""


def writer(target: Path, dies: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, target, dies], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(("dies", "kept"), [("while writing", "old"), ("old", "old"), ("weights", "new")])
def test_a_killed_writers_part_is_removed_and_nothing_is_lost(tmp_path: Path, dies: str, kept: str) -> None:
    target = tmp_path / "weights"
    with new_folder(target) as part:
        (part / "old").write_text("old")
    process = writer(target, dies)
    if dies == "while writing":
        recover(target)
        assert len(list(tmp_path.iterdir())) == 2, "a writer that lives is left alone"
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert target.exists() == (dies != "old")
    (tmp_path / ".weights.backup").mkdir()  # a user's own
    recover(target)
    assert [path.name for path in target.iterdir()] == [kept]
    assert {path.name for path in tmp_path.iterdir()} == {"weights", ".weights.backup"}


@pytest.mark.slow
def test_concurrent_writers_and_readers(tmp_path: Path) -> None:
    """After `recover`, readers find one complete version, however many processes write."""
    target = tmp_path / "weights"
    with new_folder(target) as part:
        (part / "a").write_text("first")
    end = time.monotonic() + 2
    problems: list[str] = []

    def write(number: int) -> None:
        while time.monotonic() < end:
            try:
                with new_folder(target) as part:
                    (part / "a").write_text(str(number))
            except OSError as error:
                problems.append(repr(error))

    def read() -> None:
        while time.monotonic() < end:
            if not target.exists() and not recover(target):
                problems.append("there is none")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_file_is_hashed_once_per_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], hashlib.sha256

    def counted() -> Any:
        hashed.append(1)
        return real()

    monkeypatch.setattr(hashlib, "sha256", counted)
    monkeypatch.setattr(files, "_SETTLED", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert [files.sha256(path) for _ in range(3)] == [real(b"one").hexdigest()] * 3
    assert len(hashed) == 1
    times = path.stat()
    time.sleep(0.05)
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of the inode's change stays true
    assert files.sha256(path) == real(b"two").hexdigest()
    (tmp_path / "other").write_bytes(b"six")
    os.replace(tmp_path / "other", path)
    assert files.sha256(path) == real(b"six").hexdigest()


def test_a_file_that_just_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for content in (b"one", b"two", b"one"):  # faster than the clock of a file system
        path.write_bytes(content)
        assert files.sha256(path) == hashlib.sha256(content).hexdigest()
