"""What one client costs the others: pages read what they show, and what waits is bounded and takes turns."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from cogpress import given
from cogpress.config import Prompt
from cogpress.playground import history, servers
from cogpress.playground.api import routes
from cogpress.playground.backend import Backend, Busy, Cog
from cogpress.playground.catalog import Catalog
from cogpress.playground.openai import routes as openai
from cogpress.playground.predictions import Predictions
from cogpress.playground.queue import Queue
from cogpress.playground.records import Options, Prediction, QueueFullError, Version, new_id
from cogpress.playground.store import Store
from cogpress.playground.web import PAGE_BYTES, Parts
from tests.playground.test_store import record, with_store
from tests.standins.localreplicate import project

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


@pytest.mark.slow
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


class Gated:
    """A backend that runs one prediction at a time, each as long as the test wants, and sometimes says it is busy."""

    slots = 1

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.busy = 0
        self.gate = asyncio.Event()

    async def run(self, prediction: Prediction) -> None:
        await self.gate.wait()
        if self.busy:
            self.busy -= 1
            raise Busy
        self.ran.append(prediction.input["prompt"])
        prediction.start()
        prediction.end("succeeded")


def with_queue(
    folder: Path, action: Callable[[Predictions, Gated, Queue, Version], Awaitable[None]], **most: int
) -> None:
    async def work(store: Store) -> None:
        backend = Gated()
        catalog = SimpleNamespace(on_end=lambda _: None)
        queue = Queue(cast("Backend", backend), lambda prediction: catalog.on_end(prediction))
        catalog.queue = lambda _version: queue
        predictions = Predictions(store, cast("Catalog", catalog), **most)
        await action(predictions, backend, queue, Version("v", "local/m", 0.0, {}, ""))

    with_store(folder, work)


def test_clients_take_turns_and_each_keeps_its_order(tmp_path: Path) -> None:
    async def work(predictions: Predictions, backend: Gated, queue: Queue, version: Version) -> None:
        made = [await predictions.create(version, {"prompt": f"a{n}"}, Options(client="a")) for n in range(5)]
        for name in ("b0", "b1", "c0"):
            made.append(await predictions.create(version, {"prompt": name}, Options(client=name[0])))
        await predictions.cancel(made[2])
        assert queue.waiting == 6, "one runs, and what was canceled is forgotten"
        backend.busy = 2
        backend.gate.set()
        assert all([await one.wait(60) for one in made])
        assert backend.ran == ["a0", "b0", "c0", "a1", "b1", "a3", "a4"]
        assert queue.waiting == 0

    with_queue(tmp_path, work)


def test_what_waits_is_bounded_by_number_and_size_and_for_each_client(tmp_path: Path) -> None:
    async def work(predictions: Predictions, backend: Gated, queue: Queue, version: Version) -> None:
        def create(client: str, size: int = 1) -> Awaitable[Prediction]:
            return predictions.create(version, {"prompt": "x" * size}, Options(client=client))

        first = [await create("a") for _ in range(3)]
        with pytest.raises(QueueFullError, match=r"3 with 0 MB from this address\. Try again once"):
            await create("a")
        first += [await create("b"), await create("b"), await create("c")]
        with pytest.raises(QueueFullError, match=r"6 with 0 MB\. Try again once"):
            await create("d")
        backend.gate.set()
        assert all([await one.wait(60) for one in first])
        backend.gate.clear()
        large = await create("a", 3 << 20)
        assert large.size > 3 << 20
        with pytest.raises(QueueFullError, match="with 3 MB from this address"):
            await create("a")
        await create("b", 500_000)
        with pytest.raises(QueueFullError, match="2 with 3 MB\\. "):
            await create("c", 2 << 20)
        backend.gate.set()
        await queue.idle()

    with_queue(tmp_path, work, most=6, most_bytes=4 << 20)


def test_both_apis_say_when_to_come_back(tmp_path: Path) -> None:
    async def work(predictions: Predictions, backend: Gated, queue: Queue, _version: Version) -> None:
        schema = {"components": {"schemas": {"Input": {"properties": {"messages": {}, "prompt": {}}}}}}
        version = Version("v", "local/m", 0.0, schema, "")
        await predictions.create(version, {"prompt": "first"}, Options(client="127.0.0.1"))
        catalog = SimpleNamespace(resolve=lambda _name: version)
        parts = cast("Parts", SimpleNamespace(predictions=predictions, catalog=catalog, private_webhooks=False))
        app = Starlette(routes=[*routes.routes(parts), *openai.hosted(parts)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            told = await client.post("/v1/predictions", json={"version": "m", "input": {"prompt": "x"}})
            assert (told.status_code, told.headers["retry-after"], told.json()["status"]) == (429, "5", 429)
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            told = await client.post("/v1/chat/completions", json=body)
            assert (told.status_code, told.headers["retry-after"]) == (429, "5")
            assert (told.headers["x-should-retry"], told.json()["error"]["type"]) == ("true", "rate_limit_error")
            # What a list of predictions could not say again, and what it takes seconds to look through.
            for text, said in (("1e999", "too large a number"), (f"[{'[],' * given.MAX_VALUES}1]", "100,000 values")):
                for path in ("/v1/predictions", "/v1/chat/completions"):
                    told = await client.post(path, content=f'{{"version": "m", "model": "m", "other": {text}}}')
                    assert told.status_code == 400
                    assert said in told.text
        backend.gate.set()
        await queue.idle()

    with_queue(tmp_path, work, most=2)


@pytest.mark.slow
def test_a_model_that_is_always_busy_makes_room_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "TURN_SECONDS", 0.5)
    root = project(tmp_path / "echo")

    async def same(inputs: Any, _loopback: bool) -> Any:
        return inputs

    async def work() -> None:
        pool = servers.ServerPool(tmp_path, at_once=1)
        busy, other = (servers.OnDemandServer(pool, root, None, name, same) for name in ("busy", "other"))
        version = Version("v", "local/echo", 0.0, await busy.schema(), "")
        queues = [Queue(backend, lambda _: None) for backend in (busy, other)]

        def put(queue: Queue) -> Prediction:
            inputs = {"prompt": "x", "count": 10, "delay": 0.05}
            made = Prediction(new_id(), version, inputs, inputs)
            queue.put(made)
            return made

        begun = [put(queues[0])]
        while begun[0].status == "starting":
            await asyncio.sleep(0.05)
        waits = put(queues[1])
        deadline = asyncio.get_running_loop().time() + 60
        while not waits.ended and asyncio.get_running_loop().time() < deadline:
            begun.append(put(queues[0]))
            await asyncio.sleep(0.2)
        assert waits.status == "succeeded"
        assert all([await one.wait(60) for one in begun])
        assert {one.status for one in begun} == {"succeeded"}, "what ran ended, and what waited ran after it"
        await asyncio.gather(*(queue.close() for queue in queues))

    asyncio.run(work())


def test_a_server_that_takes_nothing_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime says that it is busy, and is: with what nobody here asked for."""
    monkeypatch.setattr("cogpress.playground.backend.BUSY_SECONDS", 0.5)
    monkeypatch.setattr("cogpress.playground.queue.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("cogpress.cog.process.GRACE_SECONDS", 0.5)  # what it works on does not end by itself

    async def same(inputs: Any, _loopback: bool) -> Any:
        return inputs

    async def work() -> None:
        pool = servers.ServerPool(tmp_path, at_once=1)
        ours = servers.OnDemandServer(pool, project(tmp_path / "echo", slots=2), None, "echo", same)
        await ours.warm()
        assert ours.server is not None
        url = ours.server.url
        version = Version("v", "local/echo", 0.0, await ours.schema(), "")
        queues = [Queue(one, lambda _: None) for one in (Cog(url, None, same), ours)]
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"input": {"count": 100, "delay": 10}}
            held = [asyncio.ensure_future(client.post(f"{url}/predictions", json=body)) for _ in range(2)]
            while (await client.get(f"{url}/health-check")).json()["status"] != "BUSY":
                await asyncio.sleep(0.05)
            made = []
            for one in queues:
                made.append(Prediction(new_id(), version, {}, {"prompt": "x"}))
                one.put(made[-1])
                assert await made[-1].wait(60)
            await asyncio.gather(*held, return_exceptions=True)
        await asyncio.gather(*(one.close() for one in queues))
        assert made[0].status == "failed"
        assert "has taken no prediction for" in str(made[0].error)
        assert made[1].status == "succeeded", "its server is ours: another one was started"

    asyncio.run(work())
