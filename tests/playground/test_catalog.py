"""Trained weights go only when the store records that they may."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from cogpress.playground.catalog import Catalog
from cogpress.playground.records import HostedModel, Version
from cogpress.playground.sources import Sources
from cogpress.playground.store import Store


def with_store(folder: Path, action: Callable[[Store, Catalog], Awaitable[None]]) -> None:
    async def work() -> None:
        store = Store(folder)
        catalog = Catalog(store, cast(Sources, None))
        await catalog.load()
        await action(store, catalog)
        await catalog.close()
        await store.close()

    asyncio.run(work())


async def nothing(_store: Store, _catalog: Catalog) -> None:
    pass


def test_a_store_begun_afresh_keeps_trained_weights(tmp_path: Path) -> None:
    weights = tmp_path / "trained" / "abc"
    weights.mkdir(parents=True)
    with_store(tmp_path, nothing)
    assert weights.is_dir(), "the database was moved away, as its error advises"

    async def remove(store: Store, catalog: Catalog) -> None:
        catalog.models["local/m"] = HostedModel("local", "m", 1.0)
        version = Version("1", "local/m", 1.0, {}, f"folder:{weights}", "", None)
        catalog.models["local/m"].versions.append(version)
        catalog.remove_version(version)
        await asyncio.gather(*catalog._removals.tasks)

    with_store(tmp_path, remove)
    assert not weights.exists()


def test_a_version_is_on_disk_before_its_write_ends(tmp_path: Path) -> None:
    seen: list[str] = []

    async def write(store: Store, _catalog: Catalog) -> None:
        store._database.set_trace_callback(seen.append)
        await store.write("INSERT INTO versions VALUES ('1', 'm', 1.0, '{}')")
        await store.write("INSERT INTO settings VALUES ('a', 'b')")

    with_store(tmp_path, write)
    modes = [line.split()[-1] for line in seen if line.startswith("PRAGMA synchronous")]
    assert modes == ["FULL", "NORMAL"]
    assert sqlite3.connect(tmp_path / "predictions.sqlite").execute("SELECT id FROM versions").fetchall() == [("1",)]
