"""What LangChain, LiteLLM and LlamaIndex get from a server, as one JSON object on standard output.

It runs in an environment of its own, from requirements/clients.lock.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}

import litellm
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

BASE, KEY, MODEL = sys.argv[1:]

CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'
CITY = '{"name": "Köln", "people": 1087353}'
TOO_LONG = "The prompt is 9000 tokens long and the context 8192, which must also hold the answer. Shorten the prompt."
LOGPROBS = {"logprobs": [{"token": "Hi", "logprob": -0.1, "top": [{"token": "Hi", "logprob": -0.1}]}]}
TELL = json.dumps({"tell": True})


class City(BaseModel):
    """A city."""

    name: str
    people: int


def weather(city: str) -> str:
    """The weather."""
    return city


def now() -> str:
    """The time."""
    return "noon"


def say(*texts: str, **more: Any) -> str:
    return json.dumps({"say": texts, **more})


def error(call: Callable[[], Any]) -> list[str]:
    """The names of an error's classes, and what it says."""
    try:
        call()
    except Exception as raised:  # noqa: BLE001 - whatever the library raises
        return [*(kind.__name__ for kind in type(raised).__mro__), str(raised)]
    return []


def langchain() -> dict[str, Any]:
    settings: dict[str, Any] = {"base_url": BASE, "api_key": KEY, "model": MODEL, "max_retries": 0}
    model = ChatOpenAI(**settings)
    both = [tool(weather), tool(now)]
    history = [
        *(SystemMessage("First."), HumanMessage([{"type": "text", "text": "The time?"}])),
        *(AIMessage("", tool_calls=[{"name": "now", "args": {}, "id": "c1"}]), ToolMessage("noon", tool_call_id="c1")),
        *(SystemMessage("Late."), HumanMessage(TELL)),
    ]
    answer = model.invoke(say("a", "b"))
    steps = model.bind(logprobs=True, top_logprobs=1).invoke(say("Hi", metrics=LOGPROBS)).response_metadata
    return {
        "text": answer.content,
        "usage": answer.usage_metadata["output_tokens"],
        "stream": "".join(chunk.content for chunk in model.stream(say("a", "b", delay=0.01))),
        "required": model.bind_tools(both, tool_choice="any").invoke(say(CALL)).tool_calls[0]["args"],
        "named": model.bind_tools(both, tool_choice="weather").invoke(say('{"city": "Köln"}')).tool_calls[0]["args"],
        "schema": model.with_structured_output(City, method="json_schema").invoke(say(CITY)).people,
        "call": model.with_structured_output(City, method="function_calling").invoke(say(CITY)).people,
        "json": model.with_structured_output(City, method="json_mode").invoke(say(CITY)).people,
        "told": json.loads(model.invoke(history).content),
        "bytes": steps["logprobs"]["content"][0]["bytes"],
        "too long": error(lambda: model.invoke(say(refuse=TOO_LONG))),
        "responses": error(lambda: ChatOpenAI(**settings, use_responses_api=True).invoke("x")),
    }


def lite() -> dict[str, Any]:
    litellm.suppress_debug_info = True
    more: dict[str, Any] = {"api_base": BASE, "api_key": KEY, "max_retries": 0}

    def ask(content: str, *before: dict[str, Any], **options: Any) -> Any:
        messages = [*before, {"role": "user", "content": content}]
        return litellm.completion(model=f"openai/{MODEL}", messages=messages, **{**more, **options})

    both = [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
        {"type": "function", "function": {"name": "now"}},
    ]
    required = {"tools": both, "tool_choice": "required"}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    history = [
        {"role": "developer", "content": "First."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "now", "content": "noon"},
    ]
    nothing = {"top_k": -1, "extra_body": {"ignore_eos": False, "chat_template_kwargs": {}}}
    pieces = ask(say(*CALL.split(" "), delay=0.01), stream=True, **required)
    called = [call for chunk in pieces for call in chunk.choices[0].delta.tool_calls or ()]
    return {
        "text": ask(say("a", "b")).choices[0].message.content,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in ask(say("a", "b"), stream=True)),
        "required": json.loads(ask(say(CALL), **required).choices[0].message.tool_calls[0].function.arguments),
        "pieces": [call.function.arguments for call in called],
        "told": json.loads(ask(TELL, *history, **nothing).choices[0].message.content),
        "too long": error(lambda: ask(say(refuse=TOO_LONG))),
        "too long, streamed": error(lambda: list(ask(say(refuse=TOO_LONG), stream=True))),
        "failed": error(lambda: ask(json.dumps({"raise": "oh"}))),
        "unauthorized": error(lambda: ask(say("a"), api_key="wrong")),
        "embedding": error(lambda: litellm.embedding(model=f"openai/{MODEL}", input=["x"], **more)),
    }


def llama_index() -> dict[str, Any]:
    settings: dict[str, Any] = {"api_base": BASE, "api_key": KEY, "model": MODEL, "max_retries": 0}
    model = OpenAILike(is_chat_model=True, is_function_calling_model=True, **settings)
    both = [FunctionTool.from_defaults(weather), FunctionTool.from_defaults(now)]
    required = model.chat_with_tools(both, user_msg=say(CALL), tool_required=True)
    streamed = list(model.stream_chat_with_tools(both, user_msg=say(CALL, delay=0.01), tool_required=True))[-1]
    free = model.chat_with_tools(both, user_msg=say(f"<tool_call>{CALL}</tool_call>"))
    messages = [ChatMessage(role="system", content="s"), ChatMessage(role="user", content=say("a", "b"))]
    return {
        "text": model.chat(messages).message.content,
        "stream": "".join(chunk.delta or "" for chunk in model.stream_chat(messages)),
        "calls": [model.get_tool_calls_from_response(one)[0].tool_kwargs for one in (required, streamed, free)],
        "schema": model.structured_predict(City, PromptTemplate("{text}"), text=say(CITY)).people,
        "completion": OpenAILike(is_chat_model=False, **settings).complete("hi there").text,
    }


print(json.dumps({"langchain": langchain(), "litellm": lite(), "llama_index": llama_index()}))
