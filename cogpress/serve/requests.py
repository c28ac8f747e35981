"""A prediction's inputs as a typed request; Cog checks the bounds of single numbers before."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from cogpress.engines.base import Sampling, Structure
from cogpress.errors import CogpressError
from cogpress.given import (
    REASONING,
    check_message,
    parse,
    read_json,
    reasoning_of,
    tool,
    tool_call,
    whole_characters,
)
from cogpress.options import InputName
from cogpress.prompts import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cogpress.config import Prompt

ROLES = ("system", "user", "assistant", "tool")

MAX_BIASES = 1024
"""Most entries of `logit_bias`."""

MAX_TOKEN_CHARACTERS = 128
"""Longest text by which `logit_bias` may name a token: it is tokenized while others' answers stream."""

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
"""Most stop sequences, and the length of each: engines look for all of them at every token."""

MAX_TOOLS = 128
"""OpenAI's limit."""

MAX_MESSAGES = 10_000

MAX_CALLS = 128
"""Most tool calls of a message; a template writes each."""

MAX_CHOICES = 1000
"""OpenAI's limit for the values of an enum."""

MAX_ITEMS = 10_000
"""Most items of a list that fills a field."""

MAX_TEXT, MAX_JSON = 1 << 24, 1 << 20
"""Most characters of a text that becomes part of the prompt, and of other JSON."""


@dataclass(frozen=True)
class Request:
    """What the model is asked, as typed: JSON inputs are text. `question` parses them."""

    prompt: str = ""
    system_prompt: str | None = None
    messages: str | None = None
    fields: str | None = None
    tools: str | None = None
    thinking: bool | None = None
    adapter: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The template's fields, each an input of its own."""


def read(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Request, Sampling]:
    """The request and the sampling options in a prediction's inputs, by name; None counts as not given.

    What is none of `options.InputName` is a field of the template; `question` refuses those that it does not have.

    Raises:
        CogpressError: an input is malformed.
    """
    values = {
        whole_characters(name): _typed(whole_characters(name), value)
        for name, value in given.items()
        if value is not None
    }
    asked = {name: values[name] for name in _ASKED if name in values}
    fields = {name: value for name, value in values.items() if name not in _INPUTS}
    plain = {name: values[name] for name in _PLAIN if name in values}
    sampling = Sampling(
        **plain,
        stop=stops(values.get("stop", "")),
        logit_bias=logit_bias(values.get("logit_bias"), tokenizer),
        structure=structure(*(values.get(name) for name in ("json_schema", "regex", "choices", "grammar"))),
    )
    return Request(**asked, values=fields), sampling


_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_PLAIN = (*_INTEGERS, *_NUMBERS)
"""The inputs that `Sampling` takes unchanged."""

_INPUTS = frozenset(get_args(InputName))
_ASKED = tuple(name for name in Request.__dataclass_fields__ if name in _INPUTS)

_LIMITS = {**dict.fromkeys(("prompt", "system_prompt", "messages", "fields"), MAX_TEXT), "stop": 1 << 16}


def _typed(name: str, value: Any) -> Any:
    """An input of the type that the engines expect. JSON does not tell 8.0 from 8, and neither does Cog's schema, but
    vLLM's input thread dies of it.

    Raises:
        CogpressError: it has another type, or is too long.
    """
    if name in _PLAIN:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**63) <= value < 2**63:
            raise CogpressError(f"{name} must be a number of at most 64 bits, not {_shown(value)}.")
        if name in _NUMBERS:
            return float(value)
        if isinstance(value, float) and not value.is_integer():
            raise CogpressError(f"{name} is {value}; it must be a whole number.")
        return int(value)
    if name == "thinking":
        if not isinstance(value, bool):
            raise CogpressError(f"{name} must be true or false, not {_shown(value)}.")
        return value
    if name not in _INPUTS and not isinstance(value, str):
        return _field(name, value)
    if not isinstance(value, str):
        raise CogpressError(f"{name} must be text, not {_shown(value)}.")
    most = _LIMITS.get(name, MAX_JSON if name in _INPUTS else MAX_TEXT)
    if len(value) > most:
        raise CogpressError(f"{name} has {len(value):,} characters; the limit is {most:,}. Shorten it.")
    return whole_characters(value)


def _field(name: str, value: Any) -> Any:
    """A value of a template's field that is no text.

    Raises:
        CogpressError: it is no number, switch or list of texts; or too long.
    """
    if isinstance(value, list):
        if len(value) > MAX_ITEMS:
            raise CogpressError(f"{name[:80]} has {len(value):,} items; the limit is {MAX_ITEMS:,}. Leave out some.")
        if not all(isinstance(one, str | int | float) for one in value):
            raise CogpressError(f"{name[:80]} must be a list of texts, not {_shown(value)}.")
        size = sum(len(one) for one in value if isinstance(one, str))
        if size > MAX_TEXT:
            raise CogpressError(f"{name[:80]} has {size:,} characters; the limit is {MAX_TEXT:,}. Shorten it.")
        return [whole_characters(one) if isinstance(one, str) else _field(name, one) for one in value]
    if not isinstance(value, bool | int | float):
        raise CogpressError(f"{name[:80]} must be text, not {_shown(value)}.")
    if not (math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63):
        raise CogpressError(f"{name[:80]} must be a number of at most 64 bits.")
    return value


def _shown(value: Any) -> str:
    """The beginning of a value that may be of any type, depth and size."""
    return (json.dumps(value[:80]) if isinstance(value, str) else _SHORT.repr(value))[:80]


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def question(request: Request, settings: Prompt) -> Question:
    """The question in a request: `messages` win over `fields`, `fields` over `prompt`, and `prompt` over the form's.

    Raises:
        CogpressError: an input is malformed; or nothing replaces the form's fields, and one is unknown or missing.
    """
    fields: Mapping[str, Any] | None = None
    if request.fields and not request.messages:
        fields = read_json(request.fields, "fields")
        if not isinstance(fields, dict):
            raise CogpressError('fields must be a JSON object, such as {"question": "..."}.')
    elif not request.messages and not request.prompt.strip():
        fields = _values(request.values, settings)
    return Question(
        request.prompt,
        fields,
        messages(request.messages) if request.messages else (),
        request.system_prompt,
        tools(request.tools),
        request.thinking,
    )


def _values(given: Mapping[str, Any], settings: Prompt) -> Mapping[str, Any] | None:
    """The form's fields; None where the template describes none and none is given."""
    names = settings.names
    if unknown := [name for name in given if name not in names]:
        raise CogpressError(
            f"This model has no input {', '.join(unknown)[:200]}; its template's fields are {', '.join(names)}. "
            "Leave it out, or run scripts/form and push again."
        )
    if not given and not settings.fields:
        return None
    optional = {name for name, one in settings.fields.items() if one.default is not None}
    missing = [name for name in names if name not in optional and _blank(given.get(name))]
    if missing:
        nothing = len(missing) == len(names) - len(optional)
        raise CogpressError(
            f"{'There is nothing to answer: ' if nothing else ''}{' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} empty. Give a value, or prompt, messages or fields instead."
        )
    return given


def _blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def messages(text: str) -> list[dict[str, Any]]:
    """A conversation to continue, reduced to the keys that chat templates know.

    Raises:
        CogpressError: a message is malformed; names it.
    """
    found = read_json(text, "messages")
    if not isinstance(found, list) or not found:
        raise CogpressError('messages must be a non-empty JSON list of {"role": ..., "content": ...}.')
    if len(found) > MAX_MESSAGES:
        raise CogpressError(f"messages has {len(found):,} messages; the limit is {MAX_MESSAGES:,}. Leave out old ones.")
    checked = [_message(at, message) for at, message in enumerate(found, 1)]
    if all(one["role"] == "system" for one in checked):
        raise CogpressError("messages holds only system messages. Add the user's message, which is the one to answer.")
    if checked[-1]["role"] == "assistant" and (checked[-1].get("tool_calls") or not checked[-1]["content"].strip()):
        raise CogpressError(
            "The last message is the assistant's, so the answer goes on with it, but it has no text. Leave it out, or "
            "add the tools' messages."
        )
    return checked


def _message(at: int, message: Any) -> dict[str, Any]:
    calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
    if calls and message.get("content") is None:
        message = {**message, "content": ""}
    if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise CogpressError(f"Message {at} must be an object with role and content, both strings.")
    role = message["role"]
    if role not in ROLES:
        raise CogpressError(f"Message {at} has role {role[:40]!r}; use system, user, assistant or tool.")
    check_message(message, f"Message {at}")
    kept: dict[str, Any] = {"role": role, "content": message["content"]}
    if calls:
        listed = calls if isinstance(calls, list) else [calls]
        if len(listed) > MAX_CALLS:
            raise CogpressError(f"Message {at} has {len(listed):,} tool_calls; the limit is {MAX_CALLS}.")
        kept["tool_calls"] = [tool_call(call, f"Message {at}") for call in listed]
    if role == "assistant" and (reasoning := reasoning_of(message)):
        kept[REASONING[0]] = reasoning
    if role == "tool":
        kept |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    return kept


def tools(text: str | None) -> list[dict[str, Any]]:
    """Functions that the model may call, as OpenAI's API describes them.

    Raises:
        CogpressError: the list or a description is malformed.
    """
    if not text or not text.strip():
        return []
    found = read_json(text, "tools")
    if not isinstance(found, list):
        raise CogpressError('tools must be a JSON list of {"type": "function", "function": {"name": ...}}.')
    if len(found) > MAX_TOOLS:
        raise CogpressError(f"tools has {len(found)} functions; the limit is {MAX_TOOLS}. Leave out some.")
    return [tool(one, f"Tool {at}") for at, one in enumerate(found, 1)]


def stops(text: str) -> list[str]:
    """Stop sequences: one text, or a JSON list of texts.

    Raises:
        CogpressError: a JSON list with something other than non-empty texts, too many, or too long ones.
    """
    values: Any = [text] if text else []
    if text.lstrip().startswith("["):
        try:
            values = parse(text)
        except ValueError:
            values = [text]
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise CogpressError('stop must be a text or a JSON list of texts, such as ["\\n\\n", "END"].')
    if len(values) > MAX_STOPS or any(len(value) > MAX_STOP_CHARACTERS for value in values):
        raise CogpressError(f"stop may have at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters.")
    return values


def structure(json_schema: str | None, regex: str | None, choices: str | None, grammar: str | None) -> Structure | None:
    """The form that the answer must have; None for any.

    Raises:
        CogpressError: more than one is given, or one is malformed.
    """
    given = {
        name: text
        for name, text in (("json_schema", json_schema), ("regex", regex), ("choices", choices), ("grammar", grammar))
        if text is not None and text.strip()
    }
    if not given:
        return None
    if len(given) > 1:
        raise CogpressError(f"{' and '.join(given)} are given, but an answer can have only one form. Keep one.")
    [(name, text)] = given.items()
    if name == "json_schema":
        schema = read_json(text, name)
        if not isinstance(schema, dict):
            raise CogpressError('json_schema must be a JSON object, such as {"type": "object"}.')
        return Structure("json", json.dumps(schema))
    if name == "choices":
        found = read_json(text, name)
        if not isinstance(found, list) or not found or not all(isinstance(one, str) and one for one in found):
            raise CogpressError('choices must be a JSON list of texts, such as ["yes", "no"].')
        if len(found) > MAX_CHOICES:
            raise CogpressError(f"choices has {len(found):,} texts; the limit is {MAX_CHOICES:,}. Leave out some.")
        return Structure("choice", tuple(found))
    return Structure("regex" if name == "regex" else "grammar", text)


def logit_bias(text: str | None, tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
    """What is added to the logits of tokens, by token id. Users name a token by its id or its text.

    Raises:
        CogpressError: a text is not one token, an id is beyond the vocabulary, or a bias is outside -100 to 100.
    """
    if not text or not text.strip():
        return {}
    found = read_json(text, "logit_bias")
    if not isinstance(found, dict) or len(found) > MAX_BIASES:
        raise CogpressError(f'logit_bias must be a JSON object of at most {MAX_BIASES} entries, such as {{"yes": 5}}.')
    biases: dict[int, float] = {}
    for name, bias in found.items():
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise CogpressError(
                f"logit_bias gives {name[:80]!r} the bias {_SHORT.repr(bias)}; use a number from -100 to 100."
            )
        biases[_token(name, tokenizer)] = float(bias)
    return biases


def _token(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    size = len(tokenizer)
    if name.isascii() and name.isdigit() and len(name) < 10:
        if int(name) >= size:
            raise CogpressError(f"logit_bias names token {name}, but the model has {size:,}.")
        return int(name)
    if len(name) > MAX_TOKEN_CHARACTERS:
        raise CogpressError(
            f"logit_bias names a text of {len(name):,} characters; a token has at most {MAX_TOKEN_CHARACTERS}."
        )
    ids: list[int] = tokenizer(name, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise CogpressError(f"logit_bias names {name!r}, which is {len(ids)} tokens. Name one token, or its id.")
    return int(ids[0])
