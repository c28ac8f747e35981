"""Trainings through Cog's real training endpoint, and models on Replicate as backends."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cogpress.errors import CogpressError
from cogpress.playground import sources, trainings
from cogpress.playground.records import REDACTED, Version
from tests import Script, wait_until
from tests.standins.localreplicate import SLOTS, TOKEN, Local, javascript, project
from tests.standins.receiver import Receiver

pytestmark = pytest.mark.slow

replicate = pytest.importorskip("replicate", reason="requirements/dev.in lists Replicate's client")

DATA = "data:text/plain;base64," + base64.b64encode(b"what was learnt").decode()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    root = project(tmp_path_factory.mktemp("echo"))
    weights = root / "base"
    weights.mkdir()
    (weights / "config.json").write_text("untrained")
    with Local(root, [("echo", f"folder:{weights}")], options={"private_webhooks": True}) as local:
        yield local


@pytest.fixture
def client(local: Local) -> Any:
    return replicate.Client(base_url=local.url, api_token="any")


def wait(client: Any, identifier: str) -> Any:
    assert wait_until(lambda: client.trainings.get(identifier).status not in ("starting", "processing"))
    return client.trainings.get(identifier)


def test_a_training_becomes_a_version_that_can_be_run(client: Any, local: Local, tmp_path: Path) -> None:
    base = client.models.get("local/echo").latest_version
    receiver = Receiver()
    path = tmp_path / "data.txt"
    path.write_text("what was learnt")
    made = client.trainings.create(
        model="local/echo",
        version=base.id,
        destination="local/tuned",
        input={"train_data": client.files.create(path).urls["get"], "steps": 6},
        webhook=receiver.url,
    )
    assert made.status == "starting"
    now = wait(client, made.id)
    assert now.status == "succeeded", now.error
    assert now.logs.splitlines() == [f"step {number}" for number in range(6)]
    assert client.models.get("local/tuned").latest_version.id == now.output["version"].partition(":")[2]
    assert client.run("local/tuned", input={"prompt": "weights", "count": 1}) == ["raw:what was learnt"]
    left = [path.name for path in (local.data / "trained" / made.id).iterdir()]
    assert left == ["config.json"], "what no model has is left out of a version"
    assert "Left out of the training's tar" in (local.data / "local.log").read_text()
    assert client.run(now.output["version"], input={"prompt": "weights", "count": 1})
    assert client.run("local/echo", input={"prompt": "weights", "count": 1}) == ["raw:untrained"]
    assert httpx.get(now.output["weights"], trust_env=False).headers["content-disposition"].startswith("attachment")
    statuses = [json.loads(one["body"])["status"] for one in receiver.wait(2)]
    assert statuses[0] == "processing"
    assert wait_until(lambda: json.loads(receiver.got[-1]["body"])["status"] == "succeeded")
    assert made.id in [one.id for one in client.trainings.list()]


def test_training_faults(client: Any, local: Local) -> None:
    base = client.models.get("local/echo").latest_version
    route = f"/v1/models/local/echo/versions/{base.id}/trainings"
    answer = local.ask("POST", route, {"destination": "local/../x", "input": {"train_data": DATA}})
    assert (answer.status_code, "not a valid model name" in answer.json()["detail"]) == (422, True)
    answer = local.ask("POST", route, {"destination": "local/echo", "input": {"steps": 0}})
    assert {one["field"] for one in answer.json()["invalid_fields"]} == {"input", "input.steps"}
    answer = local.ask("POST", route, {"input": {"train_data": DATA}})
    assert answer.status_code == 422
    failed = local.ask("POST", route, {"destination": "local/echo", "input": {"train_data": "http://127.0.0.1:9/x"}})
    assert wait(client, failed.json()["id"]).status == "failed"


def test_a_training_is_canceled_while_it_waits_and_while_it_runs(client: Any, local: Local) -> None:
    base = client.models.get("local/echo").latest_version
    inputs = {"train_data": DATA, "steps": 1000}
    made = [
        client.trainings.create(model="local/echo", version=base.id, destination="local/echo", input=inputs)
        for _ in range(2)
    ]
    assert client.trainings.cancel(made[1].id).status == "canceled"
    assert wait_until(lambda: "step 1" in (client.trainings.get(made[0].id).logs or ""))
    client.trainings.cancel(made[0].id)
    assert wait(client, made[0].id).status == "canceled"


def test_javascript(client: Any, local: Local) -> None:
    folder = javascript()
    base = client.models.get("local/echo").latest_version
    receiver = Receiver()
    done = subprocess.run(
        ["node", "trainings.mjs", local.url, base.id, DATA, receiver.url],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["made"] == ["starting", "local/echo", base.id]
    assert (found["statuses"][0], found["statuses"][-1]) == ("starting", "succeeded"), found["error"]
    assert found["logs"].splitlines() == ["step 0", "step 1"]
    assert found["output"] == ["raw:what was learnt"]
    assert found["latest"] is True
    assert found["canceled"] == "canceled"
    assert found["listed"] == found["ids"]
    assert found["refused"] == [422, True]
    assert json.loads(receiver.wait(1)[0]["body"])["status"] == "succeeded"


def test_trained_weights_go_with_their_version(client: Any, local: Local) -> None:
    base = client.models.get("local/echo").latest_version
    trained = local.data / "trained"
    kept = {path.name for path in trained.iterdir()}
    made = [
        client.trainings.create(
            model="local/echo", version=base.id, destination=f"local/{name}", input={"train_data": DATA, "steps": 1}
        )
        for name in ("one", "two")
    ]
    versions = [wait(client, one.id).output["version"] for one in made]
    assert {path.name for path in trained.iterdir()} == kept | {one.id for one in made}
    assert list(client.run(versions[0], input={"prompt": "weights", "count": 1}))
    route = f"/v1/models/{versions[0].replace(':', '/versions/')}"
    long = local.create({"count": 40, "delay": 0.05}, "local/one")
    assert local.ask("DELETE", route).status_code == 202
    gone = local.ask("POST", "/v1/models/local/one/predictions", {"input": {}})
    assert (gone.status_code, "has no version yet" in gone.json()["detail"]) == (404, True)
    assert local.wait(long["id"])["status"] == "succeeded"  # what ran is not cut off
    assert wait_until(lambda: not (trained / made[0].id).exists())
    assert list(client.run(versions[1], input={"prompt": "weights", "count": 1})) == ["raw:what was learnt"]
    # What a run left behind that was killed while it trained goes at the next start.
    (trained / "left.part").write_text("half")
    (trained / "left").mkdir()
    (trained / "unknown").mkdir()
    local.stop()
    with contextlib.closing(sqlite3.connect(local.data / "predictions.sqlite")) as database, database:
        database.execute("INSERT INTO trainings (id, status, data) VALUES ('left', 'processing', '{}')")
    local.start()
    assert {path.name for path in trained.iterdir()} == kept | {made[1].id, "unknown"}


@pytest.mark.parametrize("mark", [{"x-cog-secret": True}, {"format": "password"}])
def test_a_training_s_secrets_are_neither_shown_nor_quoted(mark: dict[str, Any]) -> None:
    key = {"type": "string", "maxLength": 8, **mark}
    training = {"type": "object", "properties": {"key": key, "data": {"type": "string"}}}
    version = Version("1", "local/m", 1.0, {"components": {"schemas": {"TrainingInput": training}}}, "folder:x")
    assert version.redacted({"key": "s3cret", "data": "d"}, "TrainingInput") == {"key": REDACTED, "data": "d"}
    with pytest.raises(CogpressError, match=r"^key: does not match the schema$"):
        version.check({"key": "a long s3cret"}, "TrainingInput")


def test_a_report_without_its_key_is_refused(local: Local) -> None:
    assert local.ask("POST", "/hooks/trainings/abc/def", {"logs": "x"}).status_code == 404
    with socket.create_connection(("127.0.0.1", local.port), timeout=60) as connection:
        head = "POST /hooks/trainings/abc/def HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 60000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 404"), "before a byte of the body"


def test_a_killed_playground_leaves_no_trainer(tmp_path: Path) -> None:
    root = project(tmp_path / "echo")
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text("untrained")
    alone = Local(root, [("echo", f"folder:{root / 'base'}")])

    def trainers() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline", "cwd"])
        return [one for one in found if one.info["cwd"] == str(root) and "train" in (one.info["cmdline"] or [])]

    with alone:
        api = replicate.Client(base_url=alone.url, api_token="any")
        base = api.models.get("local/echo").latest_version
        inputs = {"train_data": DATA, "steps": 1000}
        made = api.trainings.create(model="local/echo", version=base.id, destination="local/echo", input=inputs)
        assert wait_until(lambda: "step 1" in (api.trainings.get(made.id).logs or ""))
        assert trainers()
        alone.kill()
        assert trainers(), "it goes on, with the GPU"
        alone.start()
        assert not trainers()
        assert api.trainings.get(made.id).status == "failed"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 3 << 20])
def test_a_file_in_an_answer_is_undone_in_pieces(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "_BLOCK", 4096)
    content = os.urandom(size)
    url = f"data:application/x-tar;base64,{base64.b64encode(content).decode()}"
    answer = {"logs": 'a "quoted" log', "output": {"weights": url}, "status": "succeeded"}
    (tmp_path / "answer").write_text(json.dumps(answer))
    found = trainings._split(tmp_path / "answer", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == content
    assert found == {**answer, "output": {"weights": ""}}
    (tmp_path / "answer").write_text(json.dumps(answer)[:-40])
    with pytest.raises(CogpressError):
        trainings._split(tmp_path / "answer", tmp_path / "part")


def test_a_model_on_replicate_is_fronted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another playground stands in for Replicate."""
    root = project(tmp_path / "echo")
    (root / "w").mkdir()
    (root / "w" / "config.json").write_text("w")
    with Local(root, [("echo", f"folder:{root / 'w'}")], token=TOKEN) as far:
        monkeypatch.setenv("REPLICATE_BASE_URL", far.url)
        monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
        with Local(root, [("near", "replicate:local/echo")], data=tmp_path / "near") as near:
            made = near.create({"prompt": "a\nb", "count": 3}, "local/near", wait=True)
            assert (made["status"], "".join(made["output"])) == ("succeeded", "a\nb0 a\nb1 a\nb2 ")
            assert made["metrics"]["output_token_count"] == 3
            failed = near.create({"prompt": "fail"}, "local/near", wait=True)
            assert (failed["status"], failed["error"]) == ("failed", "ValueError: bad things happen")
            long = near.create({"count": 1000, "delay": 0.05}, "local/near")
            assert wait_until(lambda: near.get(long["id"])["output"])
            assert near.ask("POST", f"/v1/predictions/{long['id']}/cancel").json()["status"] == "canceled"
            assert far.ask("GET", "/v1/predictions").json()["results"][0]["status"] == "canceled"
            many = [near.create({"count": 3, "delay": 0.05}, "local/near") for _ in range(3 * SLOTS)]
            assert {near.wait(one["id"])["status"] for one in many} == {"succeeded"}
            assert not any(TOKEN.encode() in path.read_bytes() for path in near.data.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://127.0.0.1:5000/", "http://127.0.0.1:5000"),
        ("replicate:owner/name", "replicate:owner/name"),
        ("replicate:owner/name:1a2b", "replicate:owner/name:1a2b"),
        ("hf://o/n@main", "folder:hf://o/n@main"),
        (".", f"folder:{Path.cwd()}"),
    ],
)
def test_sources(text: str, found: str) -> None:
    assert sources.parse(text) == found


@pytest.mark.parametrize(
    "text", ["replicate:name", "replicate:a/b/c", "nothing/here", "http://", "http://user:pw@host"]
)
def test_what_is_no_source_is_said(text: str) -> None:
    with pytest.raises(CogpressError):
        sources.parse(text)


def test_the_command_says_that_a_server_does_not_answer(tmp_path: Path, script: Script) -> None:
    status, _, said = script("playground", "--url", "http://127.0.0.1:9", "--port", "0", "--data", tmp_path)
    assert status == 1
    assert "127.0.0.1:9 does not answer" in said
