"""From a request to OpenAI's API to a prediction's inputs.

A parameter is passed on where the model has such an input. Where it has none, a parameter that would change the answer
is refused, and one that would not is ignored. What OpenAI's API does not know and the model does (`top_k`, `regex`,
`fields`, ...) is passed on by its name. What is not given stays as the model has it, which may differ from OpenAI's
defaults. Checking values is left to the model's schema, and everything after it to `predictions`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cogpress.playground.openai import tools as openai_tools
from cogpress.playground.openai.errors import Wrong
from cogpress.playground.openai.tools import Tools

_HARMLESS = frozenset(
    {
        *("model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
    }
)
"""What does not change the answer, or is read elsewhere."""

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
}
"""Values that ask for nothing, which a model without such an input gives."""

_INSTEAD = {
    "n": "This server gives one answer a request. Send the request as often as you want answers.",
    "best_of": "This server gives one answer a request. Leave best_of out.",
    "echo": "The prompt is not repeated in the answer. Leave echo out.",
    "suffix": "The model continues text and does not fill in. Leave suffix out.",
    "functions": "functions is the old form. Use tools.",
    "function_call": "function_call is the old form. Use tool_choice.",
}

_READ = frozenset(
    {
        *("messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs"),
        *("response_format", "tools", "tool_choice", "parallel_tool_calls"),
    }
)
"""What is more than an input of the same name."""


@dataclass
class Asked:
    """What a request asks for.

    Attributes:
        inputs: of the prediction.
        named: by which parameter each of them was given, where its name is another.
        tools: functions that may be called.
        logprobs: how many alternatives of each token are to be told; None for no log-probabilities.
        max_tokens: the most tokens, where given.
        stream: whether to answer as the text comes.
        usage: whether a stream ends with the number of tokens.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    tools: Tools | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    stream: bool = False
    usage: bool = False


def read(body: dict[str, Any], schema: dict[str, Any], adapter: str = "", *, chat: bool) -> Asked:
    """What a request asks for.

    Args:
        body: the request.
        schema: the model's OpenAPI document.
        adapter: that the model's name asks for.
        chat: whether it is a conversation; a text to go on from otherwise.

    Raises:
        Wrong: it can not be done with this model, or is not as OpenAI describes it.
    """
    body = {name: value for name, value in body.items() if value is not None}
    reader = _Reader(body, known(schema))
    if adapter:
        if "adapter" not in reader.known:
            raise Wrong("This model has no adapters. Leave @ and what follows out of its name.", "model", status=404)
        reader.put("adapter", adapter, "model")
    if chat:
        reader.conversation()
    else:
        reader.text()
    reader.length()
    reader.stops()
    reader.logprobs(chat=chat)
    reader.form()
    if chat:
        reader.tools()
    reader.others(chat=chat)
    return reader.asked


def known(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A model's inputs, by name."""
    found: dict[str, dict[str, Any]] = (
        schema.get("components", {}).get("schemas", {}).get("Input", {}).get("properties", {})
    )
    return found


class _Reader:
    """One request; each method reads what belongs together."""

    def __init__(self, body: dict[str, Any], known: dict[str, Any]) -> None:
        self.body, self.known = body, known
        self.asked = Asked(stream=self._boolean("stream"))
        options = body.get("stream_options")
        if options is not None and (not isinstance(options, dict) or not self.asked.stream):
            raise Wrong("stream_options is an object that goes with stream.", "stream_options")
        self.asked.usage = bool((options or {}).get("include_usage"))

    def _boolean(self, name: str) -> bool:
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise Wrong(f"{name} must be true or false.", name)
        return value

    def put(self, name: str, value: Any, param: str | None = None) -> None:
        """Give an input a value, as JSON where the model takes a text."""
        param = param or name
        if name not in self.known:
            detail = (
                f"This model has no input {name[:80]}, so {param[:80]} can not be followed. Leave {param[:80]} out."
            )
            raise Wrong(detail, param[:80], code="unsupported_parameter")
        if not isinstance(value, str) and _takes_text(self.known[name]):
            value = json.dumps(value, ensure_ascii=False)
        self.asked.inputs[name] = value
        if param != name:
            self.asked.named[name] = param

    def conversation(self) -> None:
        """`messages`."""
        given = self.body.get("messages")
        if not isinstance(given, list) or not given:
            raise Wrong("messages must be a list of at least one message.", "messages")
        messages = _joined([_message(at, one) for at, one in enumerate(given)])
        if "messages" in self.known:
            self.put("messages", messages)
            return
        if [one["role"] for one in messages] not in (["user"], ["system", "user"]):
            detail = "This model answers one question: messages may hold a system message and one of the user's."
            raise Wrong(detail, "messages")
        self.put("prompt", messages[-1]["content"], "messages")
        if len(messages) > 1:
            self.put("system_prompt", messages[0]["content"], "messages")

    def text(self) -> None:
        """`prompt`."""
        prompt = self.body.get("prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise Wrong("prompt must be one text; lists of texts or of token ids are not taken.", "prompt")
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
            self.asked.max_tokens = value if isinstance(value, int) else None

    def stops(self) -> None:
        """`stop`."""
        value = self.body.get("stop")
        if not value:
            return
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
            raise Wrong("stop must be a text or a list of texts.", "stop")
        # A text that begins like a list would be read as one.
        plain = len(texts) == 1 and not texts[0].lstrip().startswith("[")
        self.put("stop", texts[0] if plain and _takes_text(self.known.get("stop", {})) else texts)

    def logprobs(self, *, chat: bool) -> None:
        """`logprobs` and `top_logprobs`."""
        value: Any = self.body.get("logprobs")
        if chat:
            top = self.body.get("top_logprobs")
            if not self._boolean("logprobs"):
                if top:
                    raise Wrong("top_logprobs goes with logprobs.", "top_logprobs")
                return
            value = 0 if top is None else top
        if value is None or value is False:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            name = "top_logprobs" if chat else "logprobs"
            raise Wrong(f"{name} must be a whole number.", name)
        self.put("logprobs", value, "top_logprobs" if chat and value else None)
        self.asked.logprobs = value

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
                raise Wrong("response_format.json_schema.schema must be a JSON schema.", "response_format")
            self.put("json_schema", schema, "response_format")
        else:
            raise Wrong("response_format.type must be text, json_object or json_schema.", "response_format")

    def tools(self) -> None:
        """`tools`, `tool_choice` and `parallel_tool_calls`."""
        get = self.body.get
        tools = openai_tools.read(get("tools"), get("tool_choice"), get("parallel_tool_calls"))
        if tools is None:
            return
        self.asked.tools = tools
        if tools.forced is None:
            self.put("tools", list(tools.given))
            return
        # What must be called is known, so its arguments are all that is left to say. The tools are not shown to the
        # model: its template, if it knows tools at all, would have it write something around the arguments.
        if "json_schema" in self.asked.inputs:
            raise Wrong("A forced tool call and response_format exclude each other. Leave one out.", "response_format")
        self.put("json_schema", tools.forced.get("parameters") or {"type": "object"}, "tool_choice")

    def others(self, *, chat: bool) -> None:
        """Everything else."""
        for name, value in self.body.items():
            asks_nothing = any(value == one and type(value) in _LIKE[type(one)] for one in _NOTHING.get(name, ()))
            if name in _HARMLESS or (asks_nothing and name not in self.known):
                continue
            if name in _INSTEAD:
                if not asks_nothing:
                    raise Wrong(_INSTEAD[name], name)
            elif name not in _READ:
                self._other(name, value)
            elif name == ("prompt" if chat else "messages"):
                other = "messages" if chat else "prompt"
                raise Wrong(f"{name} belongs to the other route; {other} is what is answered here.", name)
            elif not chat and name in ("tools", "tool_choice", "parallel_tool_calls", "top_logprobs") and value:
                raise Wrong(f"{name} goes with /v1/chat/completions.", name)

    def _other(self, name: str, value: Any) -> None:
        if name in self.asked.inputs:
            raise Wrong(f"{name} is given twice, also by {self.asked.named.get(name, name)}. Leave one out.", name)
        self.put(name, value)


_LIKE: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int, float), str: (str,), list: (list,), dict: (dict,)}
"""1 and True are equal in Python, and not the same to ask for."""


def _takes_text(schema: dict[str, Any]) -> bool:
    return any(one.get("type") == "string" for one in (schema, *schema.get("anyOf", ())))


def _message(at: int, given: Any) -> dict[str, Any]:
    place = f"messages[{at}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise Wrong(f"{place} must be an object with a role and content.", place)
    role = "system" if given["role"] == "developer" else given["role"]
    if role not in ("system", "user", "assistant", "tool"):
        raise Wrong(f"{place} has the role {role[:40]!r}; use system, developer, user, assistant or tool.", place)
    if given.get("function_call"):
        raise Wrong(f"{place} has function_call, which is the old form. Use tool_calls.", place)
    content = given.get("content")
    if content is None and role == "assistant" and given.get("refusal"):
        content = given["refusal"]
    calls = given.get("tool_calls") if role == "assistant" else None
    if content is None and not calls:
        raise Wrong(f"{place} has no content.", f"{place}.content")
    kept: dict[str, Any] = {"role": role, "content": _content(content, place)}
    if calls:
        kept["tool_calls"] = calls
    for name in ("tool_call_id", "name") if role == "tool" else ():
        if isinstance(given.get(name), str):
            kept[name] = given[name]
    return kept


def _content(given: Any, place: str) -> str:
    """A message's text; parts are put below each other."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise Wrong(f"{place}.content must be a text or a list of parts.", f"{place}.content")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise Wrong(f"{place}.content has a part of type {kind!r}; this model takes text.", f"{place}.content")
        texts.append(text)
    return "\n".join(texts)


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the system's at the beginning as one, which is all that chat templates take."""
    count = next((at for at, one in enumerate(messages) if one["role"] != "system"), len(messages))
    if count < 2:
        return messages
    text = "\n\n".join(one["content"] for one in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]
