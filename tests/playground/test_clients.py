"""Replicate's official clients, unmodified, against the playground over the real Cog runtime."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cogpress.cog.process import Server
from tests import wait_until
from tests.standins.localreplicate import TOKEN, Local, javascript, project
from tests.standins.receiver import Receiver

replicate = pytest.importorskip("replicate", reason="requirements/dev.in lists Replicate's client")

pytestmark = pytest.mark.slow


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    root = project(tmp_path_factory.mktemp("echo"))
    with (
        Server(root, log=root / "server.log") as cog,
        Local(root, [("echo", cog.url)], token=TOKEN, options={"private_webhooks": True}) as local,
    ):
        cog.wait_ready(120)
        yield local


@pytest.fixture
def client(local: Local) -> Any:
    return replicate.Client(base_url=local.url, api_token=TOKEN)


@pytest.fixture
def version(client: Any) -> str:
    return str(client.models.get("local/echo").latest_version.id)


@pytest.fixture(scope="module")
def many(local: Local) -> None:
    """More predictions than a page of a list has."""
    for _ in range(101):
        local.create({"count": 1})


def test_python_run(client: Any, version: str) -> None:
    assert client.run("local/echo", input={"prompt": "py", "count": 2}) == ["py0 ", "py1 "]
    output = client.run(f"local/echo:{version}", input={"prompt": "py", "count": 2})
    assert list(output) == ["py0 ", "py1 "]
    unblocked = client.run(f"local/echo:{version}", input={"prompt": "py", "count": 2, "delay": 0.2}, wait=False)
    assert list(unblocked) == ["py0 ", "py1 "]
    with pytest.raises(replicate.exceptions.ModelError, match="bad things happen"):
        client.run("local/echo", input={"prompt": "fail"})
    with pytest.raises(replicate.exceptions.ReplicateError, match="less than the minimum") as refused:
        client.run("local/echo", input={"count": 0})
    assert refused.value.status == 422


def test_python_stream(client: Any, local: Local) -> None:
    events = list(client.stream("local/echo", input={"prompt": "a\nb", "count": 2}))
    assert "".join(map(str, events)) == "a\nb0 a\nb1 "
    assert events[-1].event.value == "done"
    # The client ends lines at these characters, which the format does not; nothing of the text may be lost for it.
    texts = [
        str(event) for event in client.stream("local/echo", input={"prompt": "raw:a\u2028b\x85c\x0bd", "count": 1})
    ]
    assert "".join(texts) == "raw:a\nb\nc\nd"
    with pytest.raises(RuntimeError, match="bad things happen"):
        list(client.stream("local/echo", input={"prompt": "fail"}))


def test_python_async(local: Local) -> None:
    async def main() -> None:
        client = replicate.Client(base_url=local.url, api_token=TOKEN)
        assert await client.async_run("local/echo", input={"prompt": "py", "count": 1}) == ["py0 "]
        text = "".join([str(one) async for one in await client.async_stream("local/echo", input={"count": 2})])
        assert text == "word0 word1 "

    asyncio.run(main())


def test_python_predictions(client: Any, version: str, many: None) -> None:
    made = client.predictions.create(version=version, input={"count": 3, "delay": 0.05})
    assert made.status == "starting"
    made.wait()
    assert (made.status, made.output) == ("succeeded", ["word0 ", "word1 ", "word2 "])
    assert client.predictions.get(made.id).output == made.output
    long = client.predictions.create(version=version, input={"count": 1000, "delay": 0.05})
    long.cancel()
    assert client.predictions.get(long.id).status == "canceled"
    pages = list(replicate.pagination.paginate(client.predictions.list))
    assert len(pages[0].results) == 100
    ids = [one.id for page in pages for one in page.results]
    assert len(ids) == len(set(ids)) > 100


def test_python_files(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("from a file")
    assert client.run("local/echo", input={"file": path, "count": 1}) == ["raw:from a file"]
    with path.open("rb") as file:
        output = client.run("local/echo", input={"file": file, "count": 1}, file_encoding_strategy="base64")
    assert output == ["raw:from a file"]
    made = client.files.create(path)
    assert client.files.get(made.id).checksums == made.checksums
    assert made.id in [one.id for one in client.files.list()]
    client.files.delete(made.id)


def test_python_models_and_the_account(client: Any, version: str) -> None:
    assert client.models.list().results[0].name == "echo"
    assert client.models.get("local/echo").versions.get(version).id == version
    assert len(client.models.get("local/echo").versions.list().results) == 1
    assert client.accounts.current().username == "local"


def test_a_wrong_token_is_refused(local: Local) -> None:
    client = replicate.Client(base_url=local.url, api_token="wrong")
    with pytest.raises(replicate.exceptions.ReplicateError, match="valid token") as refused:
        client.models.get("local/echo")
    assert refused.value.status == 401


def test_webhooks_are_signed_filtered_and_not_too_often(client: Any, version: str, receiver: Receiver) -> None:
    secret = client.webhooks.default.secret()
    inputs = {"count": 60, "delay": 0.02}
    made = client.predictions.create(version=version, input=inputs, webhook=receiver.url)
    made.wait()
    assert wait_until(lambda: json.loads(receiver.wait(1)[-1]["body"])["status"] == "succeeded")
    bodies = [json.loads(one["body"]) for one in receiver.got]
    assert bodies[0]["status"] == "processing"
    assert bodies[-1]["output"] == made.output
    started, completed = (datetime.fromisoformat(at) for at in (bodies[-1]["started_at"], bodies[-1]["completed_at"]))
    # Start, one each half second at most, completed.
    assert 3 <= len(bodies) <= 3 + (completed - started).total_seconds() / 0.5
    for one in receiver.got:
        replicate.webhook.Webhooks.validate(headers=one["headers"], body=one["body"], secret=secret, tolerance=60)
    with pytest.raises(replicate.webhook.InvalidSignatureError):
        replicate.webhook.Webhooks.validate(headers=one["headers"], body=one["body"] + " ", secret=secret)
    receiver.got.clear()
    client.predictions.create(
        version=version, input=inputs, webhook=receiver.url, webhook_events_filter=["completed"]
    ).wait()
    receiver.wait(1)
    time.sleep(0.2)
    assert [json.loads(one["body"])["status"] for one in receiver.got] == ["succeeded"]


def test_webhooks_are_tried_again(client: Any, version: str, receiver: Receiver) -> None:
    receiver.refuse = 2
    client.predictions.create(
        version=version, input={"count": 1}, webhook=receiver.url, webhook_events_filter=["completed"]
    )
    tries = receiver.wait(3)
    assert len({one["headers"]["webhook-id"] for one in tries}) == 1


@pytest.fixture(scope="module")
def packages() -> Path:
    return javascript()


def test_javascript(packages: Path, local: Local, client: Any, version: str, receiver: Receiver, many: None) -> None:
    client.predictions.create(
        version=version, input={"count": 1}, webhook=receiver.url, webhook_events_filter=["completed"]
    )
    hook = receiver.wait(1)[0]
    headers = {name: hook["headers"][f"webhook-{name}"] for name in ("id", "timestamp", "signature")}
    env = {
        **os.environ,
        "REPLICATE_API_TOKEN": TOKEN,
        "WEBHOOK": json.dumps({**headers, "body": hook["body"]}),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        ["node", "clients.mjs", local.url, version], cwd=packages, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    words = ["js0 ", "js1 ", "js2 "]
    assert found["run"] == found["runVersion"] == found["poll"] == found["waited"] == words
    assert found["statuses"][-1] == "succeeded"
    assert [data for name, data in found["stream"] if name == "output"] == ["a\nb0 ", "a\nb1 "]
    assert found["stream"][-1] == ["done", "{}"]
    assert "bad things happen" in found["streamError"]
    assert found["runError"] == "Prediction failed: ValueError: bad things happen"
    assert found["refused"] == [422, True]
    assert (found["canceled"], found["get"]) == ("canceled", "canceled")
    assert found["listed"] > 100
    assert found["file"] == [11, {"a": 1}]
    assert found["fileRun"] == ["raw:blob"]
    assert found["fileDeleted"] is True
    assert found["models"][0] == "echo"
    assert found["model"] == found["version"] == version
    assert found["versions"] == 1
    assert found["account"] == "local"
    assert (found["webhook"], found["forged"]) == (True, False)
