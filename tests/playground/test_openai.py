"""OpenAI's official client and Instructor, unmodified, against the playground over the real Cog runtime."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from pydantic import BaseModel, Field

from cogpress.cog.process import Server
from cogpress.engines.base import INCOMPLETE
from cogpress.engines.schemas import unenforced
from cogpress.playground.openai import parameters
from cogpress.playground.openai import routes as openai_routes
from cogpress.playground.openai import tools as openai_tools
from cogpress.playground.openai.errors import OpenAIError, from_prediction
from cogpress.playground.openai.responses import Completion, chat_logprobs, encoded, text_logprobs
from cogpress.playground.openai.tools import Tools
from cogpress.playground.records import Prediction, Version
from tests import wait_until
from tests.standins.localreplicate import ROOT, TOKEN, Local
from tests.standins.teller import say

openai = pytest.importorskip("openai", reason="requirements/dev.in lists OpenAI's client")
instructor = pytest.importorskip("instructor", reason="requirements/dev.in lists Instructor")

pytestmark = pytest.mark.slow

SCHEMA = {
    "components": {
        "schemas": {
            "Input": {
                "properties": {
                    "messages": {"type": "string"},
                    "json_schema": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                }
            }
        }
    }
}
"""The schema of a model that takes conversations and JSON schemas."""


@pytest.fixture
def client(local: Local) -> Any:
    return openai.OpenAI(base_url=f"{local.url}/v1", api_key=TOKEN)


def told(client: Any, **more: Any) -> dict[str, Any]:
    """The inputs that the model got."""
    messages = more.pop("messages", [])
    made = client.chat.completions.create(
        model=more.pop("model", "teller"),
        messages=[*messages, {"role": "user", "content": '{"tell": true}'}],
        **more,
    )
    return dict(json.loads(made.choices[0].message.content))


def test_a_chat_completion(client: Any, local: Local) -> None:
    made = client.chat.completions.create(model="local/teller", messages=say("Hello", " wörld 🎈"))
    [choice] = made.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello wörld 🎈")
    assert (choice.finish_reason, choice.logprobs, made.object) == ("stop", None, "chat.completion")
    assert made.usage.completion_tokens == 2
    assert made.usage.total_tokens == made.usage.prompt_tokens + 2
    assert made.id == f"chatcmpl-{made._request_id}"
    kept = local.get(made._request_id)
    assert (kept["status"], kept["output"]) == ("succeeded", ["Hello", " wörld 🎈"])


def test_a_streamed_chat_completion(client: Any) -> None:
    texts = ["One\n", " two\u2028\x85\r\n\x0b", '"three"', "日本", "🎈"]
    with client.chat.completions.create(
        model="teller",
        messages=say(*texts),
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(one or "" for one in deltas) == "".join(texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_wire(local: Local) -> None:
    """Each chunk is one line of ASCII, and the stream ends as OpenAI's does."""
    body = {"model": "teller", "messages": say("a\u2028b", "c"), "stream": True}
    answer = local.ask("POST", "/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.content.isascii()
    *events, last = answer.text.split("\n\n")
    assert (last, events[-1]) == ("", "data: [DONE]")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "usage" not in chunks[0]
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


def test_completions(client: Any) -> None:
    made = client.completions.create(model="teller", prompt="Some text", max_tokens=1)
    assert (made.choices[0].text, made.object, made.choices[0].finish_reason) == (
        "Some text",
        "text_completion",
        "length",
    )
    stream = client.completions.create(model="teller", prompt=[json.dumps({"say": ["a", "b"]})], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert chunks[-1].choices[0].finish_reason == "stop"
    for wrong in (["a", "b"], [1, 2, 3], 5):
        with pytest.raises(openai.BadRequestError, match="prompt must be a string"):
            client.completions.create(model="teller", prompt=wrong)
    for name, value in {"echo": True, "suffix": "x", "best_of": 2, "n": 2}.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="teller", prompt="a", **{name: value})
        assert refused.value.param == name


def test_the_async_client(local: Local) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{local.url}/v1", api_key=TOKEN) as client:
            made = await client.chat.completions.create(model="teller", messages=say("a"))
            assert made.choices[0].message.content == "a"

            async def stream(number: int) -> str:
                messages = say(*(f"{number}-{part} " for part in range(30)), delay=0.005)
                chunks = await client.chat.completions.create(model="teller", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            found = await asyncio.gather(*(stream(number) for number in range(64)))
            assert found == ["".join(f"{number}-{part} " for part in range(30)) for number in range(64)]

    asyncio.run(main())


def test_the_streaming_helper(client: Any) -> None:
    with client.chat.completions.stream(model="teller", messages=say("a", "b")) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(texts) == "ab"
        assert stream.get_final_completion().choices[0].message.content == "ab"


def status_of(local: Local, identifier: str, seconds: float = 60) -> str:
    return str(local.wait(identifier, seconds)["status"])


def test_closing_cancels(client: Any, local: Local) -> None:
    stream = client.chat.completions.create(model="teller", messages=say("x", times=2000, delay=0.05), stream=True)
    identifier = next(iter(stream)).id.removeprefix("chatcmpl-")
    stream.close()
    assert status_of(local, identifier) == "canceled"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1, max_retries=0).chat.completions.create(
            model="teller", messages=say("unstreamed", times=2000, delay=0.05)
        )

    def newest() -> Any:
        return local.ask("GET", "/v1/predictions").json()["results"][0]["id"]

    assert wait_until(lambda: "unstreamed" in json.dumps(local.get(newest())["input"])), "it may come late"
    assert status_of(local, newest()) == "canceled"

    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{local.url}/v1", api_key=TOKEN) as made:
            messages = say("x", times=2000, delay=0.05)
            chunks = await made.chat.completions.create(model="teller", messages=messages, stream=True)
            first = await anext(aiter(chunks))
            await chunks.close()
            return str(first.id.removeprefix("chatcmpl-"))

    assert status_of(local, asyncio.run(main())) == "canceled"


def test_parameters_reach_the_model(client: Any) -> None:
    found = told(
        client,
        max_completion_tokens=7,
        temperature=1,
        top_p=0.5,
        stop=["END", "##"],
        seed=3,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"15": 5, "16": -100},
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        n=1,
        metadata={"a": "b"},
        store=False,
        parallel_tool_calls=True,
        extra_body={"top_k": 4},
    )
    names = ("max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "logprobs", "top_k")
    assert [found[name] for name in names] == [7, 1, 0.5, 3, 0.5, -1, 2, 4]
    assert json.loads(found["stop"]) == ["END", "##"]
    assert json.loads(found["logit_bias"]) == {"15": 5, "16": -100}
    assert told(client, stop="plain")["stop"] == "plain"
    assert json.loads(told(client, stop="[not a list")["stop"]) == ["[not a list"]
    assert told(client, logprobs=True)["logprobs"] == 0
    assert told(client, max_tokens=9)["max_tokens"] == 9


def test_messages_reach_the_model(client: Any) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    found = told(
        client,
        messages=[
            {"role": "system", "content": "One."},
            {"role": "developer", "content": [{"type": "text", "text": "Two."}, {"type": "text", "text": "Three."}]},
            {"role": "user", "content": "Hi", "name": "someone"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "assistant", "refusal": "No."},
        ],
    )
    assert json.loads(found["messages"])[:-1] == [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "Two.\nThree."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "done", "tool_call_id": "c1"},
        {"role": "assistant", "content": "No."},
    ]


@pytest.mark.parametrize("given", [{}, {"continue_final_message": True}, {"add_generation_prompt": False}])
def test_an_answer_that_was_begun_goes_on(given: dict[str, Any]) -> None:
    schema = {"components": {"schemas": {"Input": {"properties": {"messages": {"type": "string"}}}}}}
    begun = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    found = parameters.parse({"messages": begun, **given}, schema, chat=True)
    assert json.loads(found.inputs["messages"]) == begun
    with pytest.raises(
        OpenAIError, match="continue_final_message must be false where the last message is of role user"
    ):
        parameters.parse({"messages": begun[:1], "continue_final_message": True}, schema, chat=True)
    with pytest.raises(OpenAIError, match="add_generation_prompt must be false"):
        parameters.parse({"messages": begun, "add_generation_prompt": True}, schema, chat=True)


@pytest.mark.parametrize("name", ["responses", "embeddings", "moderations"])
def test_what_is_not_served_says_the_way_out(client: Any, name: str) -> None:
    route = getattr(client, name)
    with pytest.raises(openai.NotFoundError, match="Use /v1/chat/completions") as refused:
        route.create(model="teller", input="x")
    assert refused.value.code == "unknown_url"


def test_names_of_models(client: Any, local: Local) -> None:
    version = local.ask("GET", "/v1/models/local/teller").json()["latest_version"]["id"]
    for name in ("local/teller", f"local/teller:{version}", "teller"):
        assert told(client, model=name)["adapter"] == ""
        assert told(client, model=f"{name}@blue")["adapter"] == "blue"
    made = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "a"}])
    assert (made.model, made.choices[0].message.content) == ("echo", "a0 a1 a2 a3 a4 ")
    for name in ("gpt-4o", "local/nothing", "local/teller:1a2b"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model=name, messages=say("a"))
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="has no adapters"):
        client.chat.completions.create(model="echo@blue", messages=say("a"))


def test_models(client: Any, local: Local) -> None:
    found = client.models.list()
    assert {"local/teller", "local/teller@blue", "acme/echo"} <= {one.id for one in found}
    assert client.models.retrieve("teller").id == "teller"
    assert client.models.retrieve("local/teller").id == "local/teller"
    assert local.ask("GET", "/v1/models/local/teller").json()["id"] == "local/teller"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    both = local.ask("GET", "/v1/models").json()
    assert {one["name"] for one in both["results"]} == {"teller", "echo"}


def test_a_model_with_few_inputs(client: Any) -> None:
    """Parameters that have no input are refused if they would change the answer, and ignored if not."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    made = client.chat.completions.create(
        model="echo", messages=messages, presence_penalty=0, top_p=1, user="u", logprobs=False, extra_body={"count": 2}
    )
    assert made.choices[0].message.content == "hi0 hi1 "
    for name, value in {"temperature": 0.5, "seed": 1, "stop": "x", "max_tokens": 5, "logprobs": True}.items():
        with pytest.raises(openai.BadRequestError, match="has no input") as refused:
            client.chat.completions.create(model="echo", messages=messages, **{name: value})
        assert refused.value.param == name
    with pytest.raises(openai.BadRequestError, match="does not support response_format"):
        client.chat.completions.create(model="echo", messages=messages, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="takes no conversations"):
        client.chat.completions.create(model="echo", messages=[*messages, *messages[1:]])


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"n": 2}, "n", "one answer per request"),
        ({"temperature": 7}, "temperature", "maximum"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "minimum"),
        ({"temperature": "hot"}, "temperature", "type"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"stop": [1]}, "stop", "string"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"extra_body": {"sparkle": 1}}, "sparkle", "has no input"),
        ({"extra_body": {"prompt": "x"}}, "prompt", "other route"),
        ({"extra_body": {"stream": 1}}, "stream", "true or false"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "has no input"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "robot"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "use text",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages[0]", "the key 'mood'"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0]", "the key 'audio'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "y"}]}]},
            "messages[0].content",
            "the key 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]},
            "messages[0].content",
            "x{20,40}; use text",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "Tool 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "two functions named 'f'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools", "parameters of f"),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
    ],
)
def test_unsupported_requests_are_refused(client: Any, more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.chat.completions.create(**{"model": "teller", "messages": say("a"), **more})
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_failures_of_the_model(client: Any, local: Local) -> None:
    before = local.ask("GET", "/playground/api/history").json()["total"]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="The prompt is too long"):
            client.chat.completions.create(
                model="teller", messages=say(refuse="The prompt is too long."), stream=stream
            )
        with pytest.raises(openai.InternalServerError, match="ValueError: oh") as failed:
            client.chat.completions.create(model="teller", messages=say(**{"raise": "oh"}), stream=stream)
        assert (failed.value.code, failed.value.type) == ("prediction_failed", "server_error")
    # The client would try an internal error again by itself, which changes nothing here.
    assert local.ask("GET", "/playground/api/history").json()["total"] == before + 4
    with pytest.raises(openai.InternalServerError, match="midway"):
        client.chat.completions.create(model="teller", messages=say("some text", fail="midway"))
    messages = say("some", " text", fail="midway", delay=0.05)
    texts = []
    stream = client.chat.completions.create(model="teller", messages=messages, stream=True)
    with pytest.raises(openai.APIError, match="midway") as broken:
        texts.extend(chunk.choices[0].delta.content for chunk in stream)
    assert ("".join(texts), broken.value.code) == ("some text", "prediction_failed")


def test_a_prediction_that_somebody_else_cancels(client: Any, local: Local) -> None:
    stream = client.chat.completions.create(model="teller", messages=say("x", times=2000, delay=0.05), stream=True)
    chunks = iter(stream)
    identifier = next(chunks).id.removeprefix("chatcmpl-")
    with ThreadPoolExecutor(1) as pool:
        canceled = pool.submit(local.ask, "POST", f"/v1/predictions/{identifier}/cancel")
        with pytest.raises(openai.APIError, match="was canceled"):
            list(chunks)
        assert canceled.result().json()["status"] == "canceled"


def test_access_and_limits_have_the_form_too(local: Local) -> None:
    stranger = openai.OpenAI(base_url=f"{local.url}/v1", api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.chat.completions.create(model="teller", messages=say("a"))
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    address = f"{local.url}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for more, status in (
        ({"content": b"{"}, 400),
        ({"content": b"[]"}, 400),
        ({"content": b"x" * (2 << 20)}, 413),
        ({"content": iter([b"x" * (1 << 20)] * 3)}, 413),
        ({"json": {}, "headers": {**headers, "Origin": "http://elsewhere.example"}}, 403),
    ):
        answer = httpx.post(address, **{"headers": headers, "trust_env": False, **more})
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"] == "application/json"
    assert httpx.get(address, headers=headers, trust_env=False).json()["error"]["message"]
    both = httpx.get(f"{local.url}/v1/models", trust_env=False).json()
    assert {"detail", "status", "error"} <= set(both)


def test_log_probabilities(client: Any) -> None:
    top = [{"token": "Hi", "id": 1, "logprob": -0.1}, {"token": "Ho", "id": 2, "logprob": -3.0}]
    metrics = {"logprobs": [{"token": "Hi", "id": 1, "logprob": -0.1, "top": top}]}
    more = {"model": "teller", "messages": say("Hi", metrics=metrics), "logprobs": True, "top_logprobs": 1}
    [one] = client.chat.completions.create(**more).choices[0].logprobs.content
    assert (one.token, one.logprob, one.bytes, len(one.top_logprobs)) == ("Hi", -0.1, [72, 105], 1)
    chunks = list(client.chat.completions.create(**more, stream=True))
    assert chunks[-1].choices[0].logprobs.content[0].token == "Hi"
    prompt = json.dumps({"say": ["Hi"], "metrics": metrics})
    found = client.completions.create(model="teller", prompt=prompt, logprobs=2).choices[0].logprobs
    assert (found.tokens, found.token_logprobs, found.text_offset) == (["Hi"], [-0.1], [0])
    assert found.top_logprobs == [{"Hi": -0.1, "Ho": -3.0}]


def test_log_probabilities_of_half_a_character() -> None:
    [one] = chat_logprobs([{"token": "�", "id": 1, "logprob": -1.0}], 0)["content"]
    assert one == {"token": "�", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    assert text_logprobs([], 2)["tokens"] == []
    # An emoji of two tokens, whose alternatives begin with the same half.
    halves = [
        {"token": "\ufffd", "id": 1, "logprob": -1.0, "bytes": [0xF0, 0x9F]},
        {"token": "\ufffd", "id": 2, "logprob": -2.0, "bytes": [0x8E, 0x88]},
    ]
    told = [{"token": "a", "logprob": 0.0}, *({**one, "top": halves} for one in halves), {"token": "b", "logprob": 0.0}]
    chat = chat_logprobs(told, 2)["content"]
    assert bytes(byte for one in chat for byte in one["bytes"]).decode() == "a🎈b"
    plain = text_logprobs(told, 2)
    assert plain["tokens"] == ["a", "bytes:\\xf0\\x9f", "bytes:\\x8e\\x88", "b"]
    assert plain["text_offset"] == [0, 1, 1, 2]
    assert [len(one) for one in plain["top_logprobs"]] == [0, 2, 2, 0]
    assert json.loads(encoded("a\ud800b🎈")) == "a?b🎈"


def test_why_it_ended(client: Any) -> None:
    messages = say("a", metrics={"finish_reason": "length"})
    assert client.chat.completions.create(model="teller", messages=messages).choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(model="teller", messages=messages, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'


@pytest.mark.parametrize(
    ("parts", "content", "calls"),
    [
        (["Let me", " see.\n<tool", "_call>", CALL, "</tool_call>"], "Let me see.", 1),
        ([f"<tool_call>\n{CALL}\n</tool_call>\n", f"<tool_call>\n{CALL}\n</tool_call>"], None, 2),
        ([CALL[:9], CALL[9:].replace("arguments", "parameters")], None, 1),
        ([f"[{CALL},", f"{CALL}]"], None, 2),
        (["It is ", "<tool", " warm", "."], "It is <tool warm.", 0),
        (["{", '"a": 1}'], '{"a": 1}', 0),
        (["<tool_call>", '{"name": "other", "arguments": {}}', "</tool_call>"], None, 0),
        ([" \n"], " \n", 0),
    ],
)
def test_tools(client: Any, parts: list[str], content: str | None, calls: int) -> None:
    more = {"model": "teller", "messages": say(*parts, delay=0.02), "tools": [TOOL]}
    [choice] = client.chat.completions.create(**more).choices
    content = "".join(parts) if content is None and not calls else content
    assert choice.message.content == content
    found = choice.message.tool_calls or []
    assert [json.loads(one.function.arguments) for one in found] == [{"city": "Köln"}] * calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    chunks = list(client.chat.completions.create(**more, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (content or "")
    streamed = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert [(one.index, one.function.name) for one in streamed] == [(at, "weather") for at in range(calls)]
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_which_tools_the_model_is_told_of(client: Any) -> None:
    assert json.loads(told(client, tools=[TOOL])["tools"]) == [TOOL]
    assert told(client, tools=[TOOL], tool_choice="none")["tools"] is None
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        messages = say('{"city": "Köln"}')
        made = client.chat.completions.create(model="teller", messages=messages, tools=[TOOL], tool_choice=choice)
        [call] = made.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    chunks = list(
        client.chat.completions.create(
            model="teller",
            messages=say('{"city"', ': "Köln"}', delay=0.05),
            tools=[TOOL],
            tool_choice=named,
            stream=True,
        )
    )
    streamed = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert [one.function.name for one in streamed] == ["weather", None, None]
    assert [one.function.arguments for one in streamed] == ["", '{"city"', ': "Köln"}']
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": named}
    inputs = parameters.parse(body, SCHEMA, chat=True).inputs
    assert json.loads(inputs["json_schema"]) == TOOL["function"]["parameters"]  # type: ignore[index]
    assert "tools" not in inputs
    assert len(Tools((TOOL,), single=True).calls(f"[{CALL},{CALL}]")[1]) == 1
    no_json = CALL.replace('"Köln"', "NaN")
    assert Tools((TOOL,)).calls(no_json) == (no_json, []), "no client could read such arguments"


def test_one_of_several_functions_must_be_called(client: Any) -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/end"}]}}}
    tree = {"type": "function", "function": {"name": "walk", "parameters": node | {"$defs": {"end": {"type": "null"}}}}}
    tools = [TOOL, {"type": "function", "function": {"name": "now"}}, tree]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required"}
    known = {**SCHEMA["components"]["schemas"]["Input"]["properties"], "tools": {"type": "string"}}
    inputs = parameters.parse(body, {"components": {"schemas": {"Input": {"properties": known}}}}, chat=True).inputs
    assert json.loads(inputs["tools"]) == tools
    schema = json.loads(inputs["json_schema"])
    assert unenforced(schema) == "", "every form is enforced, references too"
    validator = jsonschema.Draft202012Validator(schema)
    right = (
        {"name": "now", "arguments": {}},
        {"name": "walk", "arguments": {"next": {"next": None}}},
        json.loads(CALL),
    )
    assert all(map(validator.is_valid, right))
    wrong = ({"name": "other", "arguments": {}}, {"name": "now"}, {"name": "walk", "arguments": {"next": 1}})
    assert not any(map(validator.is_valid, wrong))
    made = client.chat.completions.create(model="teller", messages=say(CALL), tools=tools, tool_choice="required")
    [call] = made.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    assert made.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("left_out", [0, 9])
def test_a_required_call_streams_in_pieces(size: int, left_out: int) -> None:
    """Also one that its length cuts off, of which the client must learn."""
    arguments = '{"city": "a } \\" {\\\\", "more": {"deep": [{}, 1]}}'
    text = f' {{ "name" : "weather", "arguments": {arguments} }}\n'
    text = text[: len(text) - left_out]
    prediction = Prediction("x", Version("1" * 64, "local/x", 0.0, {}, "http://nowhere"), {}, {})
    now = {"type": "function", "function": {"name": "now"}}
    request = parameters.CompletionRequest(stream=True, tools=openai_tools.read([now, TOOL], "required", None))
    form = Completion(prediction, request, "x", chat=True)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]

    async def main() -> bytes:
        sent = b"".join(form.chunks([piece]) for piece in pieces)
        prediction.metrics["finish_reason"] = "length" if left_out else "stop"
        prediction.end("succeeded")
        return sent + form.last()

    *events, done = asyncio.run(main()).decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    calls = [call["function"] for one in choices for call in one["delta"].get("tool_calls", ())]
    assert [call.get("name") for call in calls] == ["weather"] + [None] * (len(calls) - 1)
    said = "".join(call["arguments"] for call in calls)
    assert said == arguments[: len(arguments) + 3 - left_out] if left_out else json.loads(said) == json.loads(arguments)
    assert len(calls) > 1 + len(arguments) // (2 * size)
    assert choices[-1]["finish_reason"] == ("length" if left_out else "tool_calls")


KNOWS = {
    "components": {
        "schemas": {
            "Input": {
                "properties": {
                    **SCHEMA["components"]["schemas"]["Input"]["properties"],
                    "max_tokens": {"type": "integer"},
                    "top_k": {"type": "integer"},
                    "logprobs": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "temperature": {"type": "number"},
                }
            }
        }
    }
}


def parsed(**more: Any) -> parameters.CompletionRequest:
    return parameters.parse({"messages": [{"role": "user", "content": "x"}], **more}, KNOWS, chat=True)


def test_fields_that_ask_for_nothing_are_ignored() -> None:
    plain = parsed().inputs
    assert parsed(ignore_eos=False, chat_template_kwargs={}, reasoning_effort="none").inputs == plain
    assert parsed(top_k=-1).inputs == {**plain, "top_k": 0}
    body = {"messages": [{"role": "user", "content": "x"}], "top_k": -1}
    assert parameters.parse(body, SCHEMA, chat=True).inputs == plain
    for more in ({"ignore_eos": True}, {"chat_template_kwargs": {"a": 1}}, {"reasoning_effort": "low"}):
        with pytest.raises(OpenAIError, match="has no input"):
            parsed(**more)


def test_the_switch_for_reasoning_is_found() -> None:
    knows = {"components": {"schemas": {"Input": {"properties": {"messages": {}, "thinking": {"type": "boolean"}}}}}}
    for name in ("enable_thinking", "thinking"):
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: False}}
        assert parameters.parse(body, knows, chat=True).inputs["thinking"] is False
        with pytest.raises(OpenAIError, match="does not support chat_template_kwargs"):
            parsed(chat_template_kwargs={name: False})


def test_whole_numbers_become_integers() -> None:
    request = parsed(max_tokens=8.0, top_k=3.0, logprobs=True, top_logprobs=2.0, temperature=1.0)
    found = {name: request.inputs[name] for name in ("max_tokens", "top_k", "logprobs")}
    assert found == {"max_tokens": 8, "top_k": 3, "logprobs": 2}
    assert all(type(one) is int for one in (*found.values(), request.max_tokens, request.logprobs))
    assert type(request.inputs["temperature"]) is float
    assert parsed(max_tokens=8.5).inputs["max_tokens"] == 8.5, "the model's schema refuses it"


def test_a_function_without_parameters_takes_no_arguments() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    assert json.loads(parsed(tools=[tool], tool_choice="required").inputs["json_schema"]) == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


class City(BaseModel):
    name: str
    people: int = Field(ge=0)


CITY = '{"name": "Köln", "people": 1087353}'


def test_structured_output_with_the_client(client: Any) -> None:
    made = client.chat.completions.parse(model="teller", messages=say(CITY), response_format=City)
    assert made.choices[0].message.parsed == City(name="Köln", people=1087353)
    form = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema()}}
    assert json.loads(told(client, response_format=form)["json_schema"]) == City.model_json_schema()
    assert json.loads(told(client, response_format={"type": "json_object"})["json_schema"]) == {"type": "object"}
    assert told(client, response_format={"type": "text"})["json_schema"] is None


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON", "TOOLS"])
def test_instructor(client: Any, mode: str) -> None:
    made = instructor.from_openai(client, mode=instructor.Mode[mode])
    found = made.chat.completions.create(model="teller", messages=say(CITY), response_model=City)
    assert (found.name, found.people) == ("Köln", 1087353)
    parts = [CITY[at : at + 5] for at in range(0, len(CITY), 5)]
    partial = list(
        made.chat.completions.create_partial(
            model="teller", messages=say(*parts, delay=0.02), response_model=City, stream=True
        )
    )
    assert partial[-1].people == 1087353


def test_instructor_asks_again(client: Any, local: Local) -> None:
    """Instructor repeats a request whose answer does not fit the schema, with the error."""
    made = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    before = local.ask("GET", "/playground/api/history").json()["total"]
    with pytest.raises(Exception, match="greater than or equal to 0"):
        made.chat.completions.create(
            model="teller", messages=say('{"name": "x", "people": -1}'), response_model=City, max_retries=2
        )
    assert local.ask("GET", "/playground/api/history").json()["total"] > before + 1


def test_a_model_on_replicate_is_fronted(local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other playground stands in for Replicate."""
    monkeypatch.setenv("REPLICATE_BASE_URL", local.url)
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    with Local(local.root, [("near", "replicate:local/teller")], data=tmp_path) as near:
        client = openai.OpenAI(base_url=f"{near.url}/v1", api_key="any")
        made = client.chat.completions.create(model="near", messages=say("a\n", "b"))
        assert (made.choices[0].message.content, made.usage.completion_tokens) == ("a\nb", 2)
        chunks = client.chat.completions.create(model="near", messages=say("a", "b", delay=0.1), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"
        with pytest.raises(openai.APIError, match="oh"):
            client.chat.completions.create(model="near", messages=say(**{"raise": "oh"}))
        stream = client.chat.completions.create(model="near", messages=say("x", times=2000, delay=0.05), stream=True)
        identifier = next(iter(stream)).id.removeprefix("chatcmpl-")
        stream.close()
        assert near.wait(identifier)["status"] == "canceled"
        far = local.ask("GET", "/v1/predictions").json()["results"][0]
        assert local.wait(far["id"])["status"] == "canceled"


def test_a_stream_that_waits_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without text begins with comments after a while; a later failure is reported in the stream."""
    monkeypatch.setattr(openai_routes, "PULSE_SECONDS", 0.05)

    version = Version("1" * 64, "local/x", 0.0, {}, "http://nowhere")

    async def main(status: str) -> list[dict[str, Any]]:
        prediction = Prediction("x", version, {}, {})
        form = Completion(prediction, parameters.CompletionRequest(stream=True), "x", chat=True)
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        response = openai_routes._CompletionResponse(prediction, form, lambda _: None, stream=True)
        running = asyncio.create_task(response({"type": "http"}, asyncio.Event().wait, send))  # type: ignore[arg-type]
        while len(sent) < 3:
            await asyncio.sleep(0.01)
        prediction.start()
        prediction.end(status, error="ValueError: oh", output="text" if status == "succeeded" else None)
        await running
        return sent

    for status, last in (("succeeded", '"content":"text"'), ("failed", "ValueError: oh")):
        start, *bodies = asyncio.run(main(status))
        assert start["status"] == 200
        assert bodies[0]["body"] == bodies[1]["body"] == b": waiting\n\n"
        assert last in b"".join(one["body"] for one in bodies).decode()
        assert bodies[-1]["body"].endswith(b"data: [DONE]\n\n")


def test_a_long_tool_call_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_routes, "PULSE_SECONDS", 0.05)
    version = Version("1" * 64, "local/x", 0.0, {}, "http://nowhere")
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    async def main() -> list[bytes]:
        prediction = Prediction("x", version, {}, {})
        request = parameters.CompletionRequest(stream=True, tools=openai_tools.read([function], "auto", None))
        form = Completion(prediction, request, "x", chat=True)
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        response = openai_routes._CompletionResponse(prediction, form, lambda _: None, stream=True)
        running = asyncio.create_task(response({"type": "http"}, asyncio.Event().wait, send))  # type: ignore[arg-type]
        prediction.start()
        prediction.add_output('<tool_call>{"name": "f", "arguments": {"a": "b')
        while sent.count(b": waiting\n\n") < 3:  # each piece is sooner than a pulse, and none can be sent
            prediction.add_output("bbbb")
            await asyncio.sleep(0.02)
        prediction.add_output('"}}</tool_call>')
        prediction.end("succeeded")
        await running
        return sent

    sent = asyncio.run(main())
    assert b'"tool_calls"' in sent[-1]


@pytest.mark.server
@pytest.mark.slow
def test_with_the_real_engine(trained_server: Server, tmp_path: Path) -> None:
    """A trained model through the official client and Instructor."""
    with Local(ROOT, [("queries", trained_server.url)], data=tmp_path / "data") as local:
        client = openai.OpenAI(base_url=f"{local.url}/v1", api_key="any")
        ask = [{"role": "user", "content": "Count to three."}]
        more: dict[str, Any] = {"model": "queries", "messages": ask, "max_tokens": 12}
        greedy = client.chat.completions.create(**more, temperature=0)
        assert greedy.usage.completion_tokens <= 12
        chunks = list(client.chat.completions.create(**more, temperature=0, stream=True))
        assert "".join(one.choices[0].delta.content or "" for one in chunks) == greedy.choices[0].message.content
        warm = [client.chat.completions.create(**more, temperature=1.5, seed=seed) for seed in (5, 5)]
        assert len({one.choices[0].message.content for one in warm}) == 1
        text = greedy.choices[0].message.content
        stopped = client.chat.completions.create(**more, temperature=0, stop=[text[3:6]])
        assert stopped.choices[0].message.content == text[: text.index(text[3:6])]
        found = client.chat.completions.create(**more, temperature=0, logprobs=True, top_logprobs=2)
        steps = found.choices[0].logprobs.content
        assert len(steps) == found.usage.completion_tokens
        assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in steps)
        first = client.completions.create(model="queries", prompt="Count to three.", max_tokens=1, temperature=0)
        assert first.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="tokens long and the context"):
            client.chat.completions.create(model="queries", messages=[{"role": "user", "content": "word " * 20000}])
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            client.chat.completions.create(**more, tools=[TOOL])
        structured = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        city = structured.chat.completions.create(
            **{**more, "max_tokens": 200}, response_model=Colour, temperature=0, max_retries=1
        )
        assert city.colour in ("red", "green")
        stream = client.chat.completions.create(
            **{**more, "max_tokens": 2000}, stream=True, extra_body={"min_tokens": 2000}
        )
        identifier = next(iter(stream)).id.removeprefix("chatcmpl-")
        stream.close()
        assert local.wait(identifier)["status"] == "canceled"


class Colour(BaseModel):
    colour: str = Field(pattern="^(red|green)$")


@pytest.mark.parametrize(
    ("started", "fault", "error", "status", "code"),
    [
        (False, "server", "The model server at http://x does not answer.", 503, "model_unavailable"),
        (True, "server", "The model server at http://x stopped while this prediction ran.", 500, "prediction_failed"),
        (False, "input", "The model server refused the prediction (422): too long", 400, "refused_by_model"),
        (True, None, "The prompt is too long.", 400, "refused_by_model"),
        (True, None, "ValueError: oh", 500, "prediction_failed"),
        (True, None, INCOMPLETE, 500, "prediction_failed"),
        (
            True,
            None,
            "The prompt is 9000 tokens long and the context 8192, which must also hold the answer. Shorten the prompt.",
            400,
            "context_length_exceeded",
        ),
    ],
)
def test_whose_fault_a_failure_is(started: bool, fault: Any, error: str, status: int, code: str) -> None:
    async def failed() -> Prediction:
        prediction = Prediction("x", Version("1" * 64, "local/x", 0.0, {}, "http://nowhere"), {}, {})
        if started:
            prediction.start()
        prediction.end("failed", error=error, fault=fault)
        return prediction

    found = from_prediction(asyncio.run(failed()))
    assert found is not None
    assert (found.status, found.body["error"]["code"]) == (status, code)


@pytest.mark.parametrize(("reason", "complete"), [(None, True), ("stop", True), ("length", True), ("abort", False)])
def test_an_answer_that_its_engine_gave_up_is_an_error(reason: str | None, complete: bool) -> None:
    async def ended() -> Prediction:
        prediction = Prediction("x", Version("1" * 64, "local/x", 0.0, {}, "http://nowhere"), {}, {})
        prediction.start()
        prediction.metrics |= {"finish_reason": reason} if reason else {}
        prediction.end("succeeded", output=["half"])
        return prediction

    found = from_prediction(asyncio.run(ended()))
    assert (found is None) == complete
    assert found is None or (found.status, str(found)) == (500, INCOMPLETE)
