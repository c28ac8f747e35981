"""scripts/openai: OpenAI's official client through it, to a stand-in for Replicate and to the real Cog runtime."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from starlette.types import ASGIApp

from cogpress.cog.process import Server, free_port
from cogpress.config import Playground
from cogpress.errors import CogpressError
from cogpress.playground import gateway
from cogpress.playground.gateway import Settings
from tests import Script, wait_until
from tests.standins import refusingreplicate
from tests.standins.localreplicate import ROOT, TOKEN, Local
from tests.standins.refusingreplicate import Reply, replicate
from tests.standins.teller import say

openai = pytest.importorskip("openai", reason="requirements/dev.in lists OpenAI's client")

pytestmark = pytest.mark.slow


def inside(app: ASGIApp, key: str) -> httpx.AsyncClient:
    """A client of a gateway in this process."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)


class Running:
    """scripts/openai as a process, with what it prints in `log`."""

    def __init__(self, log: Path, process: subprocess.Popen[bytes], url: str) -> None:
        self.log, self.process, self.url = log, process, url

    def client(self, key: str = TOKEN, **more: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **more)


@contextmanager
def running(log: Path, *arguments: str, **environ: str) -> Iterator[Running]:
    port = free_port("127.0.0.1")
    command = [sys.executable, ROOT / "scripts" / "openai", *arguments, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environ})
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield Running(log, process, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def far(local: Local, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """In front of a model on Replicate, for which the playground stands in."""
    log = tmp_path_factory.mktemp("gateway") / "far.log"
    with running(log, "--replicate", "local/teller", REPLICATE_BASE_URL=local.url, REPLICATE_API_TOKEN="") as made:
        yield made


@pytest.fixture(scope="module")
def near(teller: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """In front of a Cog server."""
    log = tmp_path_factory.mktemp("gateway") / "near.log"
    with running(log, "--cog", teller.url, "--name", "acme/teller", COGPRESS_TOKEN="") as made:
        yield made


@pytest.fixture(params=["far", "near"])
def either(request: pytest.FixtureRequest) -> Running:
    return request.getfixturevalue(request.param)


class City(BaseModel):
    name: str


def test_it_speaks_as_the_playground_does(either: Running) -> None:
    client = either.client()
    made = client.chat.completions.create(model="teller", messages=say("a\n", "b"))
    assert (made.choices[0].message.content, made.usage.completion_tokens) == ("a\nb", 2)
    stream = client.chat.completions.create(model="teller", messages=say("a", "b", "🎈"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab🎈"
    tool = {"type": "function", "function": {"name": "now"}}
    called = client.chat.completions.create(
        model="teller", messages=say("{}"), tools=[tool], tool_choice="required", stream=True
    )
    names = [call.function.name for chunk in called for call in chunk.choices[0].delta.tool_calls or []]
    assert names[0] == "now"
    parsed = client.chat.completions.parse(model="teller", messages=say('{"name": "Köln"}'), response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Köln")
    assert client.completions.create(model="teller", prompt="x", max_tokens=1).choices[0].text == "x"


def test_names_and_errors(either: Running) -> None:
    client = either.client()
    [listed] = client.models.list()
    assert listed.id.endswith("/teller")
    for name in (listed.id, "teller"):
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, messages=say("a")).model == name
    for call in (client.models.retrieve, lambda name: client.chat.completions.create(model=name, messages=say("a"))):
        with pytest.raises(openai.NotFoundError, match=f"Use {listed.id}") as missing:
            call("gpt-4o")
        assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum") as invalid:
        client.chat.completions.create(model="teller", messages=say("a"), temperature=9)
    assert invalid.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="Use /v1/chat/completions"):
        client.embeddings.create(model="teller", input="x")
    with pytest.raises(openai.APIError, match="oh"):
        client.chat.completions.create(model="teller", messages=say(**{"raise": "oh"}))
    for method, path, status in (("POST", "/v1/nothing", 404), ("GET", "/", 404), ("PUT", "/v1/models", 405)):
        answer = httpx.request(method, f"{either.url}{path}", trust_env=False)
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_many_at_once(either: Running) -> None:
    """More than the model has slots for: what has none waits."""

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{either.url}/v1", api_key=TOKEN, max_retries=0) as client:

            async def stream(number: int) -> str:
                messages = say(*(f"{number}-{part} " for part in range(10)), delay=0.005)
                chunks = await client.chat.completions.create(model="teller", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            found = await asyncio.gather(*(stream(number) for number in range(40)))
            assert found == ["".join(f"{number}-{part} " for part in range(10)) for number in range(40)]

    asyncio.run(main())


def newest(local: Local) -> dict[str, Any]:
    return dict(local.ask("GET", "/v1/predictions").json()["results"][0])


def test_a_client_that_leaves_cancels_on_replicate(far: Running, local: Local) -> None:
    client = far.client()
    stream = client.chat.completions.create(model="teller", messages=say("x", times=2000, delay=0.05), stream=True)
    next(iter(stream))
    stream.close()
    assert local.wait(newest(local)["id"])["status"] == "canceled"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(
            model="teller", messages=say("unstreamed", times=2000, delay=0.05)
        )
    assert wait_until(lambda: "unstreamed" in json.dumps(newest(local)["input"])), "which it gave up, came late"
    assert local.wait(newest(local)["id"])["status"] == "canceled"


def test_a_client_that_leaves_frees_the_cog_servers_slot(near: Running) -> None:
    client = near.client(timeout=120)
    for _ in range(20):  # more than there are slots
        stream = client.chat.completions.create(model="teller", messages=say("x", times=2000, delay=0.05), stream=True)
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(model="teller", messages=say("a")).choices[0].message.content == "a"


def test_the_callers_token_decides_and_is_in_no_log(far: Running, local: Local) -> None:
    for key in ("r8_a-token-that-replicate-rejects", "a token\\with blanks", TOKEN.upper()):
        for call in (
            lambda client: client.models.list(),
            lambda client: client.chat.completions.create(model="teller", messages=say("a")),
        ):
            with pytest.raises(openai.AuthenticationError, match="/account/api-tokens") as refused:
                call(far.client(key))
            assert refused.value.code == "invalid_api_key"
            assert key not in str(refused.value)
    answer = httpx.post(f"{far.url}/v1/chat/completions", json={"model": "teller"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["message"][:22]) == (401, "There is no API key. U")
    before = newest(local)["id"]
    assert far.client().chat.completions.create(model="teller", messages=say("a")).choices[0].message.content == "a"
    assert newest(local)["id"] != before
    printed = far.log.read_text()
    assert printed.startswith(f"Ready at {far.url}/v1 with local/teller")
    assert TOKEN not in printed
    assert printed.count("\n") == 1, printed


def test_a_cog_server_that_others_reach_needs_a_token(teller: Server) -> None:
    with pytest.raises(CogpressError, match="a token is required"):
        gateway.application(Settings("m", teller.url, host="0.0.0.0"))
    guarded = gateway.application(Settings("m", teller.url, host="0.0.0.0", token=TOKEN))

    async def models(key: str) -> httpx.Response:
        async with inside(guarded, key) as client:
            return await client.get("/v1/models")

    refused, answered = (asyncio.run(models(key)) for key in ("another", TOKEN))
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answered.json()["data"][0]["id"] == "m"
    gateway.application(Settings("o/m", "replicate:o/m", host="0.0.0.0"))  # Replicate checks every caller's own


def test_its_end_ends_what_runs_on_replicate(local: Local, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--replicate", "local/teller", REPLICATE_BASE_URL=local.url) as made:
        stream = made.client().chat.completions.create(
            model="teller", messages=say("x", times=2000, delay=0.05), stream=True
        )
        next(iter(stream))
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(120)
    assert local.wait(newest(local)["id"])["status"] == "canceled"


INPUT = {"properties": {"prompt": {"type": "string"}}}
SCHEMA = {"components": {"schemas": {"Input": INPUT}}}
VERSION = {"id": "v1", "openapi_schema": SCHEMA}
MODEL = {"latest_version": VERSION}
DONE = {"id": "far", "status": "succeeded", "output": ["a", "b"], "urls": {}}
TOO_LONG = "Async prediction failed: CogpressError: The prompt is 9000 tokens long and the context 8192, too little."
LONG = {"id": "far", "status": "failed", "error": TOO_LONG, "started_at": "2026-11-30T12:00:00Z", "urls": {}}
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
FIND, CREATE = "GET /v1/models/o/m", "POST /v1/models/o/m/predictions"


@contextmanager
def replies(monkeypatch: pytest.MonkeyPatch, given: dict[str, list[Reply]], **limits: int) -> Iterator[tuple[Any, Any]]:
    """A gateway in this process to a Replicate with these answers; the stub, and what asks the gateway."""
    with replicate(given) as stub:
        monkeypatch.setenv("REPLICATE_BASE_URL", stub.url)
        app = gateway.application(Settings("o/m", "replicate:o/m", limits=Playground(**limits)))

        async def ask(*bodies: dict[str, Any]) -> list[httpx.Response]:
            async with inside(app, refusingreplicate.TOKEN) as client:
                return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

        yield stub, ask


@pytest.mark.parametrize(
    ("given", "status", "code", "words"),
    [
        ({FIND: [(401, {"detail": "Invalid"})]}, 401, "invalid_api_key", "rejects the API key"),
        ({FIND: [(404, {"detail": "Not found"})]}, 404, "model_not_found", "cannot find it"),
        ({FIND: [(200, {})]}, 503, "model_unavailable", "no version with a schema"),
        ({FIND: [(200, MODEL)], CREATE: [(401, {})]}, 401, "invalid_api_key", "rejects the API key"),
        ({FIND: [(200, MODEL)], CREATE: [(402, {"detail": "Credit"})]}, 429, "insufficient_quota", "payment"),
        ({FIND: [(200, MODEL)], CREATE: [(403, {})]}, 403, None, "does not allow it"),
        ({FIND: [(200, MODEL)], CREATE: [(422, {"detail": "no"})]}, 400, "refused_by_model", "): no. Correct"),
        ({FIND: [(200, MODEL)], CREATE: [(500, {})]}, 503, "model_unavailable", "answers 500"),
        (
            {FIND: [(200, MODEL)], CREATE: [(201, LONG)]},
            400,
            "context_length_exceeded",
            "is 8192 tokens. The prompt is",
        ),
    ],
)
def test_what_replicate_refuses(
    given: dict[str, list[Reply]], status: int, code: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replies(monkeypatch, given) as (stub, ask):
        [answer] = asyncio.run(ask(BODY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert words in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert stub.count(CREATE) <= 1


def test_a_model_is_looked_up_once_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {
        "latest_version": {"id": "v2", "openapi_schema": {"components": {"schemas": {"Input": {**INPUT, "x": 1}}}}}
    }
    with replies(monkeypatch, {FIND: [(200, MODEL), (200, other)], CREATE: [(201, DONE)]}) as (stub, ask):

        async def main() -> None:
            first = await ask(*[BODY] * 5)
            assert {answer.json()["choices"][0]["message"]["content"] for answer in first} == {"ab"}
            assert stub.count(FIND) == 1
            monkeypatch.setattr(gateway, "FRESH_SECONDS", 0.0)
            [later] = await ask(BODY)
            assert stub.count(FIND) == 2
            assert later.json()["system_fingerprint"] != first[0].json()["system_fingerprint"]

        asyncio.run(main())


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with replies(monkeypatch, {FIND: [(200, MODEL)], CREATE: [(201, DONE)]}, max_waiting=4) as (_, ask):
        found = sorted(asyncio.run(ask(*[BODY] * 5)), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in found] == [200, 200, 429, 429, 429], "half of them is one client's"
        assert found[-1].headers["x-should-retry"] == "true"


def test_a_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, list[Reply]] = {
        "GET /v1/deployments/o/m": [(200, {"current_release": {"model": "o/x", "version": "v1"}})],
        "GET /v1/models/o/x/versions/v1": [(200, VERSION)],
        "POST /v1/deployments/o/m/predictions": [(201, DONE)],
    }
    with replies(monkeypatch, given) as (_, ask):
        [answer] = asyncio.run(ask(BODY))
        assert answer.json()["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cog", "runs/model"], "http://HOST:PORT"),
        (["--replicate", "o/m", "--cog", "http://127.0.0.1:1"], "not allowed with"),
    ],
)
def test_what_it_does_not_start_with(arguments: list[str], words: str, script: Script) -> None:
    status, _, said = script("openai", *arguments)
    assert status
    assert words in said
