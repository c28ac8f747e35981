"""Text, JSON, tools and calls as people and programs give them, made into what templates and tokenizers take."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from cogpress.errors import CogpressError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of an answer's reasoning in messages: Qwen's and DeepSeek's first, gpt-oss's last. Rows may use any of them."""


def whole_characters(value: Any) -> Any:
    """Text, or JSON with texts in it, in which U+FFFD replaces half characters (lone surrogates).

    JSON can name them (`"\\ud83d"`), but UTF-8 cannot hold them, so tokenizers, Cog and files refuse them.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [whole_characters(one) for one in value]
    if isinstance(value, dict):
        return {whole_characters(name): whole_characters(one) for name, one in value.items()}
    return value


def kind(value: Any) -> str:
    """A value's JSON type, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


MAX_DEPTH = 100
"""Most nesting of objects and lists in JSON from outside: what works on it here and in templates calls itself."""


def too_deep(value: Any) -> bool:
    """Whether JSON is nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
    return True


MAX_VALUES = 100_000
"""Most values in JSON from outside, with the names of those in objects: each costs the server some microseconds."""

MAX_DIGITS = 4000
"""Most digits of a whole number: Python reads no more than 4,300, as their time grows with the square."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


def _too_many(text: str) -> bool:
    """Whether JSON has more than `MAX_VALUES` values, told without making them."""
    if sum(map(text.count, ",:[{")) <= MAX_VALUES:
        return False
    return sum(map(_STRING.sub("", text).count, ",:[{")) > MAX_VALUES


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not allowed in JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits is too long")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object, so one of its values would be lost")
    return made


def parse(text: str, *, repeated: bool = False) -> Any:
    """Parse JSON from outside, strictly: what is made of it can be written as JSON again.

    Args:
        text: the JSON.
        repeated: of a key that an object has several times the last one counts, instead of being refused.

    Raises:
        ValueError: it is not JSON, too deep, or of too many values.
    """
    if _too_many(text):
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    deep = ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    try:
        hook = None if repeated else _unrepeated
        found = json.loads(
            text, parse_constant=_constant, parse_float=_finite, parse_int=_integer, object_pairs_hook=hook
        )
    except RecursionError:
        raise deep from None
    if too_deep(found):
        raise deep
    return whole_characters(found)


def read_json(text: str, name: str, *, repeated: bool = False) -> Any:
    """Parse JSON that a user typed; `repeated` as in `parse`.

    Raises:
        CogpressError: it is not JSON; says where.
    """
    try:
        return parse(text, repeated=repeated)
    except ValueError as error:
        raise CogpressError(f"{name} is not JSON: {error}. Give valid JSON, or leave it empty.") from None


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a client's message has, under any of its names; empty for none."""
    return next((text for name in REASONING if isinstance(text := message.get(name), str) and text), "")


_OF_MESSAGES = {"assistant": ("tool_calls", *REASONING), "tool": ("tool_call_id",)}
"""Keys of messages besides role, content and name, by the role that they are read of."""

_SENT_ALONG = frozenset(
    {
        *("id", "index", "name", "refusal", "annotations", "parsed", "parsed_arguments", "prefix", "weight"),
        *("finish_reason", "stop_reason", "created_at", "metadata", "cache_control", "provider_specific_fields"),
        *("reasoning_details", "extra_content", "train"),
    }
)
"""Keys that clients send along with messages, their parts and calls, such as what an answer had: they ask nothing."""


def refuse_unread(value: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Refuse keys that would vanish; what clients send along and empty values ask for nothing.

    Raises:
        CogpressError: there is such a key; names it and the place.
    """
    unread = [
        name
        for name, one in value.items()
        if name not in known and name not in _SENT_ALONG and one not in (None, "", [], {}, False)
    ]
    if unread:
        raise CogpressError(f"{place} has the key {unread[0][:80]!r}, which is not read here. Leave it out.")


def check_message(message: Mapping[str, Any], place: str) -> None:
    """Refuse a client's message of which something would vanish.

    Raises:
        CogpressError: it has a key that its role does not, or two reasonings; names the place.
    """
    refuse_unread(message, ("role", "content", *_OF_MESSAGES.get(message["role"], ())), place)
    reasoning = {name: message[name] for name in REASONING if message.get(name)}
    if message["role"] == "assistant" and any(one != reasoning_of(message) for one in reasoning.values()):
        raise CogpressError(f"{place}: {' and '.join(reasoning)} must be text, and the same. Give one of them.")


def tool(value: Any, place: str) -> dict[str, Any]:
    """A function that the model may call, as OpenAI's API describes it.

    Raises:
        CogpressError: it is not; names the place.
    """
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CogpressError(f'{place} must be {{"type": "function", "function": {{"name": ..., ...}}}}.')
    return dict(value)


def tool_call(value: Any, place: str) -> dict[str, Any]:
    """A call of a function as chat templates take it: OpenAI's clients send arguments as JSON text, templates write an
    object.

    Raises:
        CogpressError: it is malformed; names the place.
    """
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CogpressError(f'{place}: each of tool_calls must be {{"function": {{"name": ..., "arguments": ...}}}}.')
    within = f"{place[0].lower()}{place[1:]}"
    refuse_unread(value, ("id", "type", "function"), f"A call in {within}")
    refuse_unread(function, ("name", "arguments"), f"The call of {function['name'][:80]} in {within}")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        # A model wrote them, and whoever acted on them took the last of a repeated key.
        arguments = read_json(arguments, f"arguments in {within}", repeated=True) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise CogpressError(f"{place}: the arguments of {function['name'][:80]} must be a JSON object, such as {{}}.")
    kept: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": value["id"], **kept} if isinstance(value.get("id"), str) else kept
