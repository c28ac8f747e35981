"""Libraries that speak OpenAI's API, unmodified, each with what it really sends: all ask one playground."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.standins import libraries
from tests.standins.localreplicate import ROOT, TOKEN, Local, javascript

pytestmark = pytest.mark.slow

KÖLN = {"city": "Köln"}


def printed(local: Local, *command: str | Path, folder: Path = ROOT) -> Any:
    """What a program prints that is given the server, the key and the model."""
    given = [*map(str, command), f"{local.url}/v1", TOKEN, "teller"]
    done = subprocess.run(given, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().rpartition("\n")[2])


@pytest.fixture(scope="module")
def python(local: Local, cache: Path) -> dict[str, Any]:
    return dict(printed(local, libraries.python(cache), ROOT / "tests" / "sdks" / "libraries.py"))


@pytest.fixture(scope="module")
def node(local: Local) -> dict[str, Any]:
    return dict(printed(local, "node", "libraries.mjs", folder=javascript()))


def test_langchain(python: dict[str, Any]) -> None:
    found = python["langchain"]
    assert (found["text"], found["usage"], found["stream"]) == ("ab", 2, "ab")
    assert (found["required"], found["named"]) == (KÖLN, KÖLN)
    assert {found[name] for name in ("schema", "call", "json")} == {1087353}
    messages = json.loads(found["told"]["messages"])
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "tool", "system", "user"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert found["bytes"] == [*b"Hi"]
    assert "ContextOverflowError" in found["too long"]
    assert "Use /v1/chat/completions" in found["responses"][-1]


def test_litellm(python: dict[str, Any]) -> None:
    found = python["litellm"]
    assert (found["text"], found["stream"], found["required"]) == ("ab", "ab", KÖLN)
    assert (len(found["pieces"]) > 2, json.loads("".join(found["pieces"]))) == (True, KÖLN)
    messages = json.loads(found["told"]["messages"])
    assert [one["role"] for one in messages] == ["system", "assistant", "tool", "user"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == ""
    assert found["told"]["top_k"] == 0
    for name in ("too long", "too long, streamed"):
        assert found[name][0] == "ContextWindowExceededError", "its fallbacks go by this class"
    errors = {"failed": "InternalServerError", "unauthorized": "AuthenticationError", "embedding": "NotFoundError"}
    assert {name: found[name][0] for name in errors} == errors


def test_llama_index(python: dict[str, Any]) -> None:
    found = python["llama_index"]
    assert (found["text"], found["stream"], found["completion"]) == ("ab", "ab", "hi there")
    assert found["calls"] == [KÖLN] * 3
    assert found["schema"] == 1087353


def test_openais_javascript_client(node: dict[str, Any]) -> None:
    found = node["openai"]
    assert (found["text"], found["streamed"]) == ("ab", "a\u2028🎈")
    assert (found["required"]["name"], json.loads(found["required"]["arguments"])) == ("weather", KÖLN)
    assert (len(found["deltas"]) > 1, found["final"]) == (True, ["tool_calls", KÖLN])
    assert found["tools"] == "noon"
    assert "local/teller" in found["models"]
    for name in ("responses", "embeddings"):
        assert found[name][:2] == [404, "unknown_url"]
        assert "Use /v1/chat/completions" in found[name][2]


def test_ai_sdk(node: dict[str, Any]) -> None:
    found = node["ai"]
    assert (found["text"], found["usage"], found["steps"]) == ("ab", 2, [2, "noon"])
    assert found["parts"].count("tool-input-delta") > 1, "arguments arrive in pieces"
    assert (found["called"], found["output"], found["openai"]) == (KÖLN, KÖLN, "ab")
    assert json.loads(found["told"]["messages"])[0] == {"role": "system", "content": "First."}
    assert len(json.loads(found["told"]["tools"])) == 2
    assert found["refused"] == [400, "refused_by_model", "Not this."]
    assert found["embedding"][0] == 404
