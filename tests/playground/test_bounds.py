"""What one client costs the others: pages read what they show, and what waits is bounded and takes turns."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from starlette.requests import Request

from cogpress.config import Prompt
from cogpress.playground import history
from cogpress.playground.api import routes
from cogpress.playground.catalog import Catalog
from cogpress.playground.predictions import Predictions
from cogpress.playground.store import Store
from cogpress.playground.web import PAGE_BYTES, Parts
from tests.playground.test_store import record, with_store

LONG = 2_000_000


def asked(path: str, query: str = "") -> Request:
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
    return Request({**scope, "scheme": "http", "server": ("127.0.0.1", 8000)})


def parts_of(store: Store) -> Parts:
    catalog = cast("Catalog", SimpleNamespace(on_end=None, streams=lambda *_: False))
    parts = SimpleNamespace(store=store, catalog=catalog, predictions=Predictions(store, catalog), prompt=Prompt())
    return cast("Parts", parts)


def with_long_rows(folder: Path, action: Callable[[Parts], Awaitable[None]]) -> None:
    """Call with twelve rated predictions whose inputs and outputs have megabytes."""

    async def work(store: Store) -> None:
        for number in range(12):
            inputs = {"system_prompt": "Be brief.", "prompt": f"question {number} " + "x" * LONG, "count": 3}
            one = record(f"p{number}", input=inputs)
            store.insert(one)
            ended = {
                "status": "succeeded",
                "output": [f"answer {number} ", "y" * LONG],
                "metrics": {"predict_time": 1.5},
            }
            await store.update(one | ended)
        await store.write("UPDATE predictions SET rating = 'good'")
        store.insert(record("wrong", input={"fields": '{"question": "why"}', "temperature": 0.5}))
        await store.update(record("wrong", status="failed", error="It is too long."))
        await action(parts_of(store))

    with_store(folder, work)


async def peak(work: Awaitable[Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return await work, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_pages_and_the_export_read_what_they_show(tmp_path: Path) -> None:
    async def work(parts: Parts) -> None:
        answer, most = await peak(history.history(parts, asked("/playground/api/history")))
        assert most < 2 * LONG, "no row was read whole"
        page = json.loads(answer.body)
        assert page["total"] == len(page["results"]) == 13
        wrong, newest = page["results"][:2]
        assert (wrong["input_preview"], wrong["output_preview"]) == ('{"question": "why"}', "It is too long.")
        assert newest["input_preview"].startswith("question 11 xxx"), "the prompt, and no setting"
        assert newest["output_preview"].startswith("answer 11 yyy")
        assert (newest["predict_time"], newest["tokens_per_second"], newest["rating"]) == (1.5, None, "good")

        seen, pages, cursor = [], 0, ""
        while True:
            listing, most = await peak(routes.predictions(parts, asked("/v1/predictions", cursor)))
            assert most < 8 * PAGE_BYTES
            page = json.loads(listing.body)
            assert len(listing.body) < PAGE_BYTES + 5 * LONG
            seen += [one["id"] for one in page["results"]]
            pages += 1
            if page["next"] is None:
                break
            cursor = page["next"].partition("?")[2]
        assert seen == ["wrong", *(f"p{number}" for number in reversed(range(12)))]
        assert pages >= 6

        answer, most = await peak(history.export(parts, asked("/playground/api/export", "rating=good")))
        assert most < 8 * PAGE_BYTES
        content = b"".join([block async for block in answer.body_iterator])
        rows = [json.loads(line) for line in content.splitlines()]
        assert len(content) == int(answer.headers["content-length"])
        assert [row["messages"][1]["content"].split()[1] for row in rows] == [str(number) for number in range(12)]
        await answer.background()

    with_long_rows(tmp_path, work)
