"""Map the parameters of a request to OpenAI's API to a prediction's inputs.

A parameter is passed on if the model has such an input. Otherwise it is rejected if it would change the answer, and
ignored if not. Inputs that only the model has (`top_k`, `regex`, `fields`, ...) are passed on by name. Parameters left
out keep the model's defaults, which may differ from OpenAI's. The model's schema validates the values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cogpress.cog import form
from cogpress.cog.schema import fields
from cogpress.errors import CogpressError
from cogpress.given import REASONING, check_message, reasoning_of, refuse_unread
from cogpress.playground.openai import tools as openai_tools
from cogpress.playground.openai.errors import OpenAIError
from cogpress.playground.openai.tools import Tools
from cogpress.prompts import SWITCHES

_HARMLESS = frozenset(
    {
        *("model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
    }
)
"""Parameters that do not change the answer, or are read elsewhere."""

_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_p": (1,),
    "stop": ("", []),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none",),
    "ignore_eos": (False,),
    "top_k": (-1, 0),
    "chat_template_kwargs": ({},),
    "reasoning_effort": ("none",),
}
"""Values that have no effect, and are accepted from a model without such an input."""

_INSTEAD = {
    "n": "This server returns one answer per request. Send the request once per answer.",
    "best_of": "This server returns one answer per request. Leave out best_of.",
    "echo": "This server does not repeat the prompt. Leave out echo.",
    "suffix": "This model cannot fill in text before a suffix. Leave out suffix.",
    "functions": "functions is deprecated. Use tools.",
    "function_call": "function_call is deprecated. Use tool_choice.",
}

_READ = frozenset(
    {
        *("messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs"),
        *("response_format", "tools", "tool_choice", "parallel_tool_calls"),
    }
)
"""Parameters that are not simply inputs of the same name."""


@dataclass
class CompletionRequest:
    """A request, parsed.

    Attributes:
        inputs: of the prediction.
        named: the parameter that set each input, if their names differ.
        tools: functions that may be called.
        logprobs: how many alternatives to return for each token; None for no log-probabilities.
        max_tokens: most tokens in the answer, if given.
        stream: whether to stream the answer.
        usage: whether a stream ends with token counts.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    tools: Tools | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    stream: bool = False
    usage: bool = False


def parse(body: dict[str, Any], schema: dict[str, Any], adapter: str = "", *, chat: bool) -> CompletionRequest:
    """Parse a request.

    Args:
        body: the request's JSON.
        schema: the model's OpenAPI schema.
        adapter: from the model's name.
        chat: whether it is a chat completion rather than a completion.

    Raises:
        OpenAIError: it is not in OpenAI's form, or this model cannot do it.
    """
    body = {name: value for name, value in body.items() if value is not None}
    known = fields(schema)
    parser = _Parser(body, known)
    if adapter:
        if "adapter" not in parser.known:
            raise OpenAIError("This model has no adapters. Leave out the @ and what follows it.", "model", status=404)
        parser.put("adapter", adapter, "model")
    if chat:
        parser.conversation()
    else:
        parser.text()
    parser.length()
    parser.stops()
    parser.logprobs(chat=chat)
    parser.form()
    if chat:
        parser.tools()
    parser.others(chat=chat)
    parser.request.inputs = form.completed(parser.request.inputs, known)
    return parser.request


class _Parser:
    """Parses one request; each method reads the parameters that belong together."""

    def __init__(self, body: dict[str, Any], known: dict[str, Any]) -> None:
        self.body, self.known = body, known
        self.request = CompletionRequest(stream=self._boolean("stream"))
        options = body.get("stream_options")
        if options is not None and (not isinstance(options, dict) or not self.request.stream):
            raise OpenAIError("stream_options must be an object, and needs stream.", "stream_options")
        self.request.usage = bool((options or {}).get("include_usage"))

    def _boolean(self, name: str) -> bool:
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise OpenAIError(f"{name} must be true or false.", name)
        return value

    def put(self, name: str, value: Any, param: str | None = None) -> None:
        """Set an input, as JSON if the model expects a string."""
        param = param or name
        if name not in self.known:
            detail = f"This model has no input {name[:80]}, so it does not support {param[:80]}. Leave it out."
            raise OpenAIError(detail, param[:80], code="unsupported_parameter")
        if not isinstance(value, str) and _takes(self.known[name], "string"):
            value = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, float) and value.is_integer() and _takes(self.known[name], "integer"):
            value = int(value)
        self.request.inputs[name] = value
        if param != name:
            self.request.named[name] = param

    def conversation(self) -> None:
        """`messages`."""
        given = self.body.get("messages")
        if not isinstance(given, list) or not given:
            raise OpenAIError("messages must be a list of at least one message.", "messages")
        messages = [_message(at, one) for at, one in enumerate(given)]
        continues = messages[-1]["role"] == "assistant"
        for name, usual in (("continue_final_message", continues), ("add_generation_prompt", not continues)):
            if self.body.pop(name, usual) is not usual:
                detail = (
                    f"{name} must be {str(usual).lower()} where the last message is of role {messages[-1]['role']}."
                )
                raise OpenAIError(detail, name)
        if "messages" in self.known:
            self.put("messages", messages)
            return
        if [one["role"] for one in messages] not in (["user"], ["system", "user"]):
            detail = "This model takes no conversations: send one user message, optionally after a system message."
            raise OpenAIError(detail, "messages")
        self.put("prompt", messages[-1]["content"], "messages")
        if len(messages) > 1:
            self.put("system_prompt", messages[0]["content"], "messages")

    def text(self) -> None:
        """`prompt`."""
        prompt = self.body.get("prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise OpenAIError("prompt must be a string; lists of strings or token ids are not supported.", "prompt")
        if "prompt" in self.known or "messages" not in self.known:
            self.put("prompt", prompt)
        else:
            self.put("messages", [{"role": "user", "content": prompt}], "prompt")

    def length(self) -> None:
        """`max_completion_tokens` or `max_tokens`."""
        param = "max_completion_tokens" if "max_completion_tokens" in self.body else "max_tokens"
        value = self.body.get(param)
        if value is not None:
            name = "max_tokens" if "max_tokens" in self.known else "max_new_tokens"
            self.put(name if name in self.known else "max_tokens", value, param)
            self.request.max_tokens = int(value) if isinstance(value, int | float) and value == value // 1 else None

    def stops(self) -> None:
        """`stop`."""
        value = self.body.get("stop")
        if not value:
            return
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
            raise OpenAIError("stop must be a string or a list of strings.", "stop")
        # The model reads a string that begins like a list as one.
        plain = len(texts) == 1 and not texts[0].lstrip().startswith("[")
        self.put("stop", texts[0] if plain and _takes(self.known.get("stop", {}), "string") else texts)

    def logprobs(self, *, chat: bool) -> None:
        """`logprobs` and `top_logprobs`."""
        value: Any = self.body.get("logprobs")
        if chat:
            top = self.body.get("top_logprobs")
            if not self._boolean("logprobs"):
                if top:
                    raise OpenAIError("top_logprobs needs logprobs.", "top_logprobs")
                return
            value = 0 if top is None else top
        if value is None or value is False:
            return
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            name = "top_logprobs" if chat else "logprobs"
            raise OpenAIError(f"{name} must be an integer.", name)
        self.put("logprobs", value, "top_logprobs" if chat and value else None)
        self.request.logprobs = value

    def form(self) -> None:
        """`response_format`."""
        given = self.body.get("response_format")
        if given is None or given == {"type": "text"}:
            return
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "json_object":
            self.put("json_schema", {"type": "object"}, "response_format")
        elif kind == "json_schema":
            described = given.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                raise OpenAIError("response_format.json_schema.schema must be a JSON schema.", "response_format")
            self.put("json_schema", schema, "response_format")
        else:
            raise OpenAIError("response_format.type must be text, json_object or json_schema.", "response_format")

    def tools(self) -> None:
        """`tools`, `tool_choice` and `parallel_tool_calls`."""
        get = self.body.get
        tools = openai_tools.read(get("tools"), get("tool_choice"), get("parallel_tool_calls"))
        if tools is None:
            return
        self.request.tools = tools
        if tools.forced is None:
            self.put("tools", list(tools.given))
        if not tools.required and tools.forced is None:
            return
        if "json_schema" in self.request.inputs:
            raise OpenAIError("A forced tool call excludes response_format. Leave out one of them.", "response_format")
        if tools.forced is None:
            self.put("json_schema", tools.schema, "tool_choice")
            return
        # Only the arguments are left to generate. The model does not see the tools: its template, if it supports tools
        # at all, would have it write something around the arguments.
        self.put("json_schema", tools.forced.get("parameters") or openai_tools.NO_ARGUMENTS, "tool_choice")

    def others(self, *, chat: bool) -> None:
        """Everything else."""
        for name, value in self.body.items():
            no_effect = any(value == one and type(value) in _LIKE[type(one)] for one in _NOTHING.get(name, ()))
            if name in _HARMLESS or (no_effect and name not in self.known):
                continue
            if name in _INSTEAD:
                if not no_effect:
                    raise OpenAIError(_INSTEAD[name], name)
            elif name not in _READ:
                self._other(name, value)
            elif name == ("prompt" if chat else "messages"):
                other = "messages" if chat else "prompt"
                raise OpenAIError(f"{name} belongs to the other route; use {other} here.", name)
            elif not chat and name in ("tools", "tool_choice", "parallel_tool_calls", "top_logprobs") and value:
                raise OpenAIError(f"{name} needs /v1/chat/completions.", name)

    def _other(self, name: str, value: Any) -> None:
        if name in self.request.inputs:
            other = self.request.named.get(name, name)
            raise OpenAIError(f"{name} is also set by {other}. Leave out one of them.", name)
        if name == "chat_template_kwargs" and isinstance(value, dict) and [*value] in [[one] for one in SWITCHES]:
            # So clients of vLLM and SGLang switch reasoning on or off.
            [given] = value.values()
            self.put("thinking", given, name)
            return
        # vLLM's servers take -1 for all tokens.
        self.put(name, 0 if name == "top_k" and value == -1 else value)


_LIKE: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int, float), str: (str,), list: (list,), dict: (dict,)}
"""Types that may equal each; in Python 1 == True."""


def _takes(schema: dict[str, Any], kind: str) -> bool:
    return any(one.get("type") == kind for one in (schema, *schema.get("anyOf", ())))


def _message(at: int, given: Any) -> dict[str, Any]:
    place = f"messages[{at}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise OpenAIError(f"{place} must be an object with a role and content.", place)
    role = "system" if given["role"] == "developer" else given["role"]
    if role not in ("system", "user", "assistant", "tool"):
        raise OpenAIError(f"{place} has the role {role[:40]!r}. Use system, developer, user, assistant or tool.", place)
    if given.get("function_call"):
        raise OpenAIError(f"{place} has function_call, which is deprecated. Use tool_calls.", place)
    try:
        check_message({**given, "role": role}, place)
    except CogpressError as error:
        raise OpenAIError(str(error), place) from None
    content = given.get("content")
    if content is None and role == "assistant" and given.get("refusal"):
        content = given["refusal"]
    calls = given.get("tool_calls") if role == "assistant" else None
    if content is None and not calls:
        raise OpenAIError(f"{place} has no content.", f"{place}.content")
    kept: dict[str, Any] = {"role": role, "content": _content(content, place)}
    if calls:
        kept["tool_calls"] = calls
    if role == "assistant" and (reasoning := reasoning_of(given)):
        kept[REASONING[0]] = reasoning
    for name in ("tool_call_id", "name") if role == "tool" else ():
        if isinstance(given.get(name), str):
            kept[name] = given[name]
    return kept


def _content(given: Any, place: str) -> str:
    """A message's text; parts become lines."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise OpenAIError(f"{place}.content must be a string or a list of parts.", f"{place}.content")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            shown = repr(kind)[:40]
            raise OpenAIError(f"{place}.content has a part of type {shown}; use text.", f"{place}.content")
        try:
            refuse_unread(part, ("type", str(kind)), f"{place}.content")
        except CogpressError as error:
            raise OpenAIError(str(error), f"{place}.content") from None
        texts.append(text)
    return "\n".join(texts)
