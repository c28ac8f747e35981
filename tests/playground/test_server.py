"""The playground over the real engine with a trained model, through Replicate's own client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples import questions
from tests.standins.localreplicate import ROOT, Local

replicate = pytest.importorskip("replicate", reason="requirements/dev.in lists Replicate's client")

pytestmark = [pytest.mark.server, pytest.mark.slow]

MODEL = "local/queries"
CLIENTS = 64


@pytest.fixture(scope="module")
def local(trained_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """As scripts/playground starts it, with a server of its own."""
    data = tmp_path_factory.mktemp("local")
    local = Local(ROOT, [("queries", f"folder:{trained_weights}")], data=data, start_first=True)
    try:
        local.start(300)
        yield local
    finally:
        local.stop()


@pytest.fixture
def client(local: Local) -> Any:
    return replicate.Client(base_url=local.url, api_token="any", timeout=120)


@pytest.fixture(scope="module")
def rows() -> list[questions.Row]:
    return questions.generate(CLIENTS, "test", seed=0)


def inputs(row: questions.Row) -> dict[str, Any]:
    return {"fields": json.dumps({"question": row["question"], "columns": row["columns"]}), "max_tokens": 160}


def test_the_worked_example_through_the_official_client(
    client: Any, rows: list[questions.Row], answered: list[dict[str, Any]]
) -> None:
    same = 0
    for row, known in zip(rows[:4], answered, strict=False):
        said = "".join(client.run(MODEL, input=inputs(row)))
        events = list(client.stream(MODEL, input=inputs(row)))
        texts = [str(one) for one in events if one.event.value == "output"]
        assert len(texts) > 10  # in pieces, and the same
        assert "".join(texts) == said
        same += said == known["answer"]
    assert same >= 3, "as the same weights answer by transformers"
    metrics = client.predictions.list().results[0].metrics
    assert metrics["input_token_count"] > 30
    assert metrics["output_token_count"] > 10
    assert 0 < metrics["time_to_first_token"] < metrics["predict_time"]


def test_sixty_four_clients_at_once_lose_nothing(
    client: Any, rows: list[questions.Row], answered: list[dict[str, Any]], local: Local
) -> None:
    def ask(row: questions.Row) -> tuple[str, str]:
        made = client.models.predictions.create(MODEL, input=inputs(row))
        return made.id, "".join(str(one) for one in made.stream() if one.event.value == "output")

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, rows))
    same = 0
    for known, (identifier, text) in zip(answered, found, strict=True):
        kept = local.get(identifier)
        assert kept["status"] == "succeeded", kept["error"]
        assert "".join(kept["output"]) == text
        same += text == known["answer"]
    assert same >= 0.95 * CLIENTS, "as the same weights answer by transformers"


def test_every_prediction_is_accounted_for_when_the_model_server_is_killed(client: Any, local: Local) -> None:
    long = {"prompt": "Count up.", "min_tokens": 2000, "max_tokens": 2000}
    version = client.models.get(MODEL).latest_version.id
    made = [client.predictions.create(version=version, input=long) for _ in range(100)]  # more than there are slots
    deadline = time.monotonic() + 300
    while sum(bool(local.get(one.id)["output"]) for one in made) < 70:
        assert time.monotonic() < deadline
        time.sleep(2)  # a hundred requests: more often, they would slow the engine down
    [noted] = json.loads((local.data / "servers.json").read_text())
    leader = psutil.Process(noted["pid"])
    family = [leader, *leader.children(recursive=True)]
    leader.kill()
    # Those that ran fail at once and say why; those that waited are given to the server that is started anew.
    short = local.create({"prompt": "Say a word.", "max_tokens": 2}, MODEL)
    deadline = time.monotonic() + 300
    states: dict[str, list[dict[str, Any]]] = {}
    while True:
        states = {}
        for one in made:
            found = local.get(one.id)
            states.setdefault(found["status"], []).append(found)
        if len(states.get("failed", [])) >= 70 and states.get("processing") and not states.get("starting"):
            break
        assert time.monotonic() < deadline, {name: len(found) for name, found in states.items()}
        time.sleep(2)
    assert sum(map(len, states.values())) == len(made)
    assert all("stopped while" in one["error"] for one in states["failed"])
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive  # the engine of the killed server is gone too, and does not hold its memory
    assert local.wait(short["id"], 60)["status"] == "succeeded"
    for one in states["processing"]:
        client.predictions.cancel(one["id"])
    ended = {local.wait(one.id)["status"] for one in made}
    assert ended == {"failed", "canceled"}
