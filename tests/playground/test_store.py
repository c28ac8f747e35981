"""What the playground keeps: a full disk loses nothing, and what is old goes."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cogpress.playground import store as module
from cogpress.playground.api.webhooks import Webhooks
from cogpress.playground.catalog import Catalog
from cogpress.playground.files import Files
from cogpress.playground.keys import Keys
from cogpress.playground.predictions import Predictions
from cogpress.playground.records import Version
from cogpress.playground.store import Store, UnwritableError


def with_store(folder: Path, action: Callable[[Store], Awaitable[None]], **options: Any) -> None:
    async def work() -> None:
        store = Store(folder, **options)
        try:
            await action(store)
        finally:
            await store.close()

    asyncio.run(work())


def record(name: str, **more: Any) -> dict[str, Any]:
    found = dict.fromkeys(("webhook", "events", "error", "started", "completed", "output"))
    found |= {"id": name, "created": time.time(), "status": "starting", "model": "m", "version": "v", "source": "api"}
    return {**found, "input": {}, "logs": "", "metrics": {}, **more}


def limit(store: Store, pages: int) -> None:
    """SQLite's own limit, which fails as a full disk does."""
    store._database.execute(f"PRAGMA max_page_count = {pages}")


def test_what_a_full_disk_refused_is_written_later_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)

    async def work(store: Store) -> None:
        await store.insert(record("before"))
        limit(store, 1)  # no page more than there are
        with pytest.raises(UnwritableError, match="full"):
            await store.insert(record("a", input={"prompt": "x" * 200_000}))
        with pytest.raises(UnwritableError, match=r"full\)\. Free some disk space; it then goes on\.$"):
            store.check_writable()
        store.update(record("a", status="succeeded", output=["y" * 200_000]))  # it ended meanwhile
        store.write("UPDATE predictions SET rating = 'good' WHERE id = 'before'")
        await asyncio.sleep(0.2)
        assert [row["id"] for row in await store.read("SELECT id FROM predictions")] == ["before"], "it can be read"
        limit(store, 1 << 20)
        deadline = time.monotonic() + 60
        while not (found := await store.find("a")) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert found is not None
        assert (found["status"], len(found["output"][0])) == ("succeeded", 200_000)
        [before] = await store.read("SELECT rating FROM predictions WHERE id = 'before'")
        assert before["rating"] == "good"
        store.check_writable()

    with_store(tmp_path, work)
    assert capsys.readouterr().out.count("Free some disk space") == 1, "said once, not at each attempt"


def test_what_was_accepted_runs_and_what_comes_after_it_is_refused(tmp_path: Path) -> None:
    begun: list[Any] = []

    async def work(store: Store) -> None:
        catalog = SimpleNamespace(queue=lambda _version: SimpleNamespace(put=begun.append), on_end=None)
        predictions = Predictions(store, cast(Catalog, catalog))
        version = Version("1", "local/m", 1.0, {}, "folder:x", "", None)
        limit(store, 1)
        made = await predictions.create(version, {"prompt": "x" * 200_000})
        assert begun == [made]
        with pytest.raises(UnwritableError):
            await predictions.create(version, {"prompt": "short"})
        assert begun == [made]
        limit(store, 1 << 20)
        deadline = time.monotonic() + 60
        while not await store.find(made.id) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert await store.find(made.id)

    with_store(tmp_path, work)


def test_a_store_that_cannot_be_written_can_be_closed(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        limit(store, 1)
        with pytest.raises(UnwritableError):
            await store.insert(record("a", input={"prompt": "x" * 200_000}))

    with_store(tmp_path, work)


def test_trainings_go_with_age(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        for name, status, days in (("old", "succeeded", 9), ("new", "failed", 1), ("runs", "processing", 9)):
            data = json.dumps({"created": time.time() - days * 86400})
            await store.write("INSERT INTO trainings (status, data, id) VALUES (?, ?, ?)", status, data, name)
        await store.remove_old()
        assert [row["id"] for row in await store.read("SELECT id FROM trainings")] == ["new", "runs"]

    with_store(tmp_path, work, retention_days=7)


class Broken(io.RawIOBase):
    """A source that ends with a full disk after its first block."""

    def __init__(self) -> None:
        self.blocks = [b"x" * 10]

    def read(self, _size: int = -1) -> bytes:
        if not self.blocks:
            raise OSError(28, "No space left on device")
        return self.blocks.pop()


def test_a_folder_of_the_users_stays_as_it_is_and_what_is_added_is_private(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    for name in ("files", "trained"):
        (theirs / name).mkdir(0o755, parents=True)
        (theirs / name / "notes.txt").write_text("keep me")
    theirs.chmod(0o755)

    async def work(store: Store) -> None:
        Files(store, Keys(b"k"), "http://127.0.0.1")
        await Catalog(store, cast(Any, None)).load()
        await store.insert(record("a"))
        await store.remove_old()

    with_store(theirs, work)
    with_store(tmp_path / "made" / "here", work)
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o755
    assert [path.read_text() for path in sorted(theirs.glob("*/notes.txt"))] == ["keep me", "keep me"]
    databases = [*theirs.glob("predictions.sqlite*"), *(tmp_path / "made" / "here").glob("predictions.sqlite*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in databases} == {0o600}
    assert stat.S_IMODE((tmp_path / "made" / "here").stat().st_mode) == 0o700


def test_half_an_upload_is_not_kept(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        files = Files(store, Keys(b"k"), "http://127.0.0.1")
        with pytest.raises(UnwritableError, match=r"is full\. Free some space and upload it again\.$"):
            await files.add(Broken(), "a", "text/plain", {})  # type: ignore[arg-type]
        assert list(files.folder.iterdir()) == []
        kept = await files.add(io.BytesIO(b"whole"), "a", "text/plain", {})
        (files.folder / f"{'a' * 26}.part").write_bytes(b"half")  # of a run that was killed
        (files.folder / "film.part").write_bytes(b"the user's")
        Files(store, Keys(b"k"), "http://127.0.0.1")
        assert {path.name for path in files.folder.iterdir()} == {kept.id, "film.part"}
        assert files.path(kept).read_bytes() == b"whole"

    with_store(tmp_path, work)


def test_a_webhooks_receiver_whose_answer_never_ends_costs_nothing() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    sent = 0

    def answer() -> None:
        nonlocal sent
        connection, _ = server.accept()
        connection.recv(65536)
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while sent < 1 << 28:
                connection.sendall(b"x" * 65536)
                sent += 65536
        except OSError:
            pass

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()

    async def send() -> bool:
        webhooks = Webhooks(b"secret", private=True)
        try:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/"
            return await webhooks.send(url, {"id": "a"}, tries=1)
        finally:
            await webhooks.close()

    assert asyncio.run(send())
    thread.join(60)
    assert sent < 1 << 26, "its answer is not read"
    server.close()
