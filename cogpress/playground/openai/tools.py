"""Tool calls in OpenAI's API: read a request's tools, and find the calls in the model's answer.

Models write calls as their chat template taught them. Three formats are recognized: JSON between `<tool_call>` and
`</tool_call>` (Hermes, Qwen, SmolLM3), JSON that is the whole answer (Llama), and a JSON list after `[TOOL_CALLS]` or
as the whole answer (Mistral). A call must name an offered function and hold an object of arguments; the rest is text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from cogpress.given import parse
from cogpress.playground.openai.errors import OpenAIError

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The arguments of a function that is described without any."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_WHOLE = ("{", "[", "<|python_tag|>")
"""How an answer begins that may be nothing but calls."""


_BEGUN = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
"""A call in the form of `Tools.schema`, up to its arguments."""


class ObjectReader:
    """Tells how far a JSON object goes in a text that arrives in pieces."""

    def __init__(self) -> None:
        """The first piece begins with the object."""
        self._depth, self._string, self._escaped, self._ended = 0, False, False, False

    def feed(self, text: str) -> str:
        """The part of a piece that belongs to the object."""
        if self._ended:
            return ""
        for at, one in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped, self._string = one == "\\", one != '"'
            elif one == '"':
                self._string = True
            elif one in "{}":
                self._depth += 1 if one == "{" else -1
                if self._depth == 0:
                    self._ended = True
                    return text[: at + 1]
        return text


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        given: the functions' descriptions, for the model.
        forced: the one function that must be called; the answer is then its arguments.
        single: whether at most one call is allowed.
        required: whether one of several functions must be called; `schema` is then the answer's form.
    """

    given: tuple[dict[str, Any], ...] = ()
    forced: dict[str, Any] | None = None
    single: bool = False
    required: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a call of any of the functions, as `calls` reads it."""
        calls = []
        for at, one in enumerate(self.given):
            arguments = _moved(one["function"].get("parameters") or NO_ARGUMENTS, f"#/anyOf/{at}/properties/arguments")
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": one["function"]["name"]}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": calls}

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(one["function"]["name"] for one in self.given)

    def calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text before the calls, and the calls in OpenAI's form; without calls, everything is text."""
        if self.forced is not None:
            return "", [new_call(self.forced["name"], text)]
        before, found = self._found(text)
        if not found:
            return text, []
        return before, [new_call(*one) for one in (found[:1] if self.single else found)]

    def _found(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        if OPEN in text:
            before, *parts = text.split(OPEN)
            found = [self._read(part.partition(CLOSE)[0]) for part in parts]
        else:
            stripped = text.strip()
            for mark in ("<|python_tag|>", "[TOOL_CALLS]"):
                stripped = stripped.removeprefix(mark).lstrip()
            before, found = "", [self._read(stripped)]
        calls = [call for part in found if part is not None for call in part]
        return (before.rstrip(), calls) if None not in found else (text, [])

    def _read(self, text: str) -> list[tuple[str, str]] | None:
        """(name, arguments as JSON) of each call in JSON; None if it is not calls."""
        try:
            value = parse(text, repeated=True)
        except ValueError:
            return None
        calls = []
        for one in value if isinstance(value, list) else [value]:
            name = one.get("name") if isinstance(one, dict) else None
            arguments = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
            if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
                return None
            calls.append((name, json.dumps(arguments, ensure_ascii=False)))
        return calls or None

    def begun(self, text: str) -> tuple[str, int] | None:
        """The name of a required call, and where its arguments begin in the unfinished answer; None before that."""
        found = _BEGUN.match(text)
        return (json.loads(found[1]), found.end()) if found is not None and json.loads(found[1]) in self.names else None

    def safe_length(self, text: str) -> int:
        """How many characters of an unfinished answer are certainly text, so that they can be sent."""
        if self.forced is not None or text.lstrip().startswith(_WHOLE) or not text.strip():
            return 0
        at = text.find(OPEN)
        if at < 0:
            # It may end with the first part of the marker.
            at = next((len(text) - n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), len(text))
        return len(text[:at].rstrip())


def _moved(schema: Any, place: str) -> Any:
    """A schema to stand at `place` in another one: its references to itself follow it there."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(one, place) for name, one in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved


def new_call(name: str, arguments: str) -> dict[str, Any]:
    """A call in OpenAI's form."""
    identifier = f"call_{secrets.token_hex(12)}"
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def read(given: Any, choice: Any, parallel: Any) -> Tools | None:
    """The tools of a request; None if none may be called.

    Args:
        given: `tools`.
        choice: `tool_choice`.
        parallel: `parallel_tool_calls`.

    Raises:
        OpenAIError: they are not in OpenAI's form, or cannot be used.
    """
    if not given or choice == "none":
        if choice not in (None, "none", "auto"):
            raise OpenAIError("tool_choice requires a tool, but tools is empty. Add one.", "tool_choice")
        return None
    if not isinstance(given, list):
        raise OpenAIError("tools must be a list of functions.", "tools")
    functions: dict[str, dict[str, Any]] = {}
    for at, one in enumerate(given, 1):
        function = one.get("function") if isinstance(one, dict) and one.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise OpenAIError(f'Tool {at} must be {{"type": "function", "function": {{"name": ..., ...}}}}.', "tools")
        if function["name"] in functions:
            told = (
                f"tools has two functions named {function['name'][:80]!r}, so a call would not say which. Rename one."
            )
            raise OpenAIError(told, "tools")
        if not isinstance(function.get("parameters", {}), dict | None):
            told = f'The parameters of {function["name"][:80]} must be a JSON schema, such as {{"type": "object"}}.'
            raise OpenAIError(told, "tools")
        functions[function["name"]] = function
    single = parallel is False
    if choice in (None, "auto"):
        return Tools(tuple(given), single=single)
    if choice == "required":
        if len(functions) > 1:
            return Tools(tuple(given), single=True, required=True)
        return Tools(tuple(given), next(iter(functions.values())))
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or name not in functions:
        raise OpenAIError("tool_choice must be none, auto, required, or name a function in tools.", "tool_choice")
    return Tools(tuple(given), functions[name])
