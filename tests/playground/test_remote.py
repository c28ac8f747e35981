"""A model on Replicate as a backend, against a stub that refuses and fails as the real one may."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cogpress.errors import CogpressError
from cogpress.playground import remote
from cogpress.playground.queue import Queue
from cogpress.playground.records import Prediction, Version
from tests.standins.refusingreplicate import TOKEN, Reply, Stub, replicate

pytestmark = pytest.mark.slow

SCHEMA = {"openapi": "3.0.2", "components": {"schemas": {}}}
MADE = {"id": "far", "status": "starting", "urls": {}}
DONE = {**MADE, "status": "succeeded", "output": ["a", "b"], "metrics": {"output_token_count": 2}}


def run(
    stub: Stub,
    name: str = "o/m",
    act: Callable[[Prediction, Queue], Any] | None = None,
    seconds: float = 60,
) -> Prediction:
    """One prediction through a queue, as the playground runs it."""

    async def main() -> Prediction:
        queue = Queue(remote.ReplicateBackend(name, TOKEN, stub.url), lambda _prediction: None)
        version = Version("1" * 64, "local/x", 0.0, SCHEMA, f"replicate:{name}")
        prediction = Prediction("near", version, {}, {"prompt": "x"})
        queue.put(prediction)
        if act is not None:
            await act(prediction, queue)
        assert await prediction.wait(seconds)
        await queue.close()
        assert TOKEN not in str(prediction.record())
        return prediction

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.02)


MODEL: Reply = (200, {"latest_version": {"id": "v1", "openapi_schema": SCHEMA}})
BY_NAME = "POST /v1/models/o/m/predictions"


def test_what_is_refused_for_now_is_asked_again_and_made_once() -> None:
    busy: Reply = (429, {"detail": "Request was throttled."}, {"Retry-After": "1"})
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        BY_NAME: [busy, (429, {"detail": "throttled"}), (201, MADE)],
        "GET /v1/predictions/far": [busy, (502, {}), (200, {**MADE, "status": "processing"}), (200, DONE)],
    }
    with replicate(replies) as stub:
        found = run(stub)
    assert (found.status, found.output) == ("succeeded", ["a", "b"])
    assert found.metrics["output_token_count"] == 2
    # Two refusals, then one that was made: what hindered looking at it did not have it made again.
    assert stub.count(BY_NAME) == 3


def test_a_model_that_is_run_by_version_alone() -> None:
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        "POST /v1/predictions": [(201, DONE)],
    }
    with replicate(replies) as stub:
        assert run(stub).status == "succeeded"
    assert stub.bodies[-1] == {"input": {"prompt": "x"}, "stream": True, "version": "v1"}


def test_a_deployment_is_asked_by_its_name() -> None:
    replies: dict[str, list[Reply]] = {
        "GET /v1/deployments/o/m": [(200, {"current_release": {"model": "a/b", "version": "v7"}})],
        "GET /v1/models/a/b/versions/v7": [(200, {"id": "v7", "openapi_schema": SCHEMA})],
        "POST /v1/deployments/o/m/predictions": [(201, DONE)],
    }
    with replicate(replies) as stub:
        assert asyncio.run(remote.ReplicateBackend("o/m", TOKEN, stub.url).schema()) == SCHEMA
        assert run(stub).status == "succeeded"


def test_refusals_are_told_and_nothing_that_is_not_there_is_waited_for() -> None:
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        BY_NAME: [(422, {"detail": "- input.prompt: prompt is too long"})],
    }
    with replicate(replies) as stub:
        found = run(stub)
        assert found.status == "failed"
        assert "prompt is too long" in str(found.error)
        with pytest.raises(CogpressError, match="cannot find it"):
            asyncio.run(remote.ReplicateBackend("o/none", TOKEN, stub.url).schema())


@pytest.mark.parametrize("status", ["canceled", "aborted"])
def test_a_prediction_that_waits_there_is_canceled_there(status: str) -> None:
    """A cold model stays at starting for minutes."""
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        BY_NAME: [(201, MADE)],
        "GET /v1/predictions/far": [(200, MADE)],
        "POST /v1/predictions/far/cancel": [(429, {}), (200, MADE)],
    }

    async def act(prediction: Prediction, queue: Queue) -> None:
        while not stub.count("GET /v1/predictions/far"):
            await asyncio.sleep(0.01)
        prediction.cancel_requested = True
        await queue.backend.cancel(prediction)
        replies["GET /v1/predictions/far"] = [(200, {**MADE, "status": status})]

    with replicate(replies) as stub:
        assert run(stub, act=act).status == status
    assert stub.count("POST /v1/predictions/far/cancel") == 2


def test_a_prediction_that_stays_unreachable_fails_and_is_not_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.2)
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        BY_NAME: [(201, MADE)],
        "GET /v1/predictions/far": [(503, {})],
    }
    with replicate(replies) as stub:
        found = run(stub)
    assert found.status == "failed"
    assert "Lost track of" in str(found.error)
    assert stub.count(BY_NAME) == 1


@pytest.mark.parametrize("made", [False, True])
def test_refusals_for_now_have_an_end(made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogpress.playground.backend.BUSY_SECONDS", 0.2)
    throttled: Reply = (429, {"detail": "Request was throttled.", "retry_after": 0})
    replies: dict[str, list[Reply]] = {
        "GET /v1/models/o/m": [MODEL],
        BY_NAME: [(201, MADE) if made else throttled],
        "GET /v1/predictions/far": [throttled],
    }
    with replicate(replies) as stub:
        found = run(stub, seconds=60)
    assert found.status == "failed"
    assert "Replicate has refused every request" in str(found.error)
    assert stub.count(BY_NAME) == 1 or not made
