"""Which JSON schemas an answer can be held to, and the grammar of each.

Imports nothing heavy, because the process that compiles grammars waits for it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from cogpress.engines import patterns

MAX_DEPTH = 64
"""Maximum nesting of objects and lists in a JSON schema."""

UNREACHABLE = 1 << 30
"""A number of characters or items that no answer has: more than any context's tokens stand for."""

MAX_BRANCHES = 128
"""Most branches of a `oneOf`: each is compared with each."""

MAX_WHITESPACE = 1
"""Maximum whitespace between two JSON tokens of an answer that follows a schema."""

_ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "nullable"),
        *("$schema", "$comment", "$defs", "definitions", "discriminator"),
    }
)
"""Keywords that may stand beside any other, because they allow and forbid nothing."""

_NEVER = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "multipleOf"),
    *("uniqueItems", "contains", "minContains", "maxContains", "additionalItems", "divisibleBy", "extends", "disallow"),
    *("$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "patternProperties"),
    "propertyNames",
)
"""Keywords that xgrammar ignores, or obeys in some places only."""

_OF_TYPE = {
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"),
    "object": (
        *("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
        "unevaluatedProperties",
    ),
}
"""Keywords that apply to values of one type only (`number` includes integers)."""

_LEAP = "(?:0[48]|[2468][048]|[13579][26])"
_YEAR = r"(?:\d{3}[1-9]|\d{2}[1-9]0|\d[1-9]00|[1-9]000)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|(?:\d\d{_LEAP}|{_LEAP}00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+\-](?:[01]\d|2[0-3]):[0-5]\d)"
_HOURS = r"T(?:\d+H(?:\d+M(?:\d+S)?)?|\d+M(?:\d+S)?|\d+S)"
_DAYS = r"(?:\d+Y(?:\d+M(?:\d+D)?)?|\d+M(?:\d+D)?|\d+D)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = "[0-9a-fA-F]{1,4}"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9\-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM = r"a-zA-Z0-9!#$%&'*+/=?^_`{|}~\-"
_IN_URI = r"(?:[a-zA-Z0-9._~!$&'()*+,;=\-]|%[0-9a-fA-F]{2})"

_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P(?:\d+W|{_DAYS}(?:{_HOURS})?|{_HOURS})",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "|".join(
        [
            f"(?:{_GROUP}:){{7}}{_GROUP}",
            f"(?:{_GROUP}:){{1,7}}:",
            *(f"(?:{_GROUP}:){{1,{7 - after}}}(?::{_GROUP}){{1,{after}}}" for after in range(1, 7)),
            f":(?:(?::{_GROUP}){{1,7}}|:)",
        ]
    ),
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "hostname": _HOST,
    "email": rf"[{_ATOM}]+(?:\.[{_ATOM}]+)*@{_HOST}",
    "uri": (
        rf"[a-zA-Z][a-zA-Z0-9+.\-]*:(?://(?:{_IN_URI}*@)?{_IN_URI}*(?::\d*)?(?:/(?:{_IN_URI}|[:@])*)*"
        rf"|/?(?:(?:{_IN_URI}|[:@])+(?:/(?:{_IN_URI}|[:@])*)*)?)(?:\?(?:{_IN_URI}|[:@/?])*)?(?:#(?:{_IN_URI}|[:@/?])*)?"
    ),
}
"""The formats that are known, as regular expressions (RFC 3339 with its appendix A, 4291, 4122, 1123, 5322 and 3986).
xgrammar's own are loose: they allow the 31st of February and the address 01.02.03.04."""

_PYTHON: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "null": type(None),
    "array": list,
}
_TYPES = frozenset({*_PYTHON, "object"})


def unenforced(schema: Any) -> str:
    """What in a JSON schema xgrammar does not enforce, in words; empty if it enforces everything.

    xgrammar ignores what it does not know, and much of what stands beside a keyword that it handles first (`$ref`,
    `const`, `enum`, `anyOf`, `allOf`). `tests/engines/test_schemas.py` compares it with a validator.
    """
    places: dict[str, Any] = {}
    references: list[str] = []
    waiting = [("#", schema)]
    while waiting:
        place, one = waiting.pop()
        places[place] = one
        if one is True:
            continue
        if not isinstance(one, dict):
            return f"{place} is {json.dumps(one)[:40]}, which is no schema that an answer can follow"
        reason = _unenforced_here(one, root=place == "#")
        if reason:
            return f"{reason} at {place}"
        if "$ref" in one:
            references.append(one["$ref"])
        waiting += [(f"{place}/{where}", inner) for where, inner in _subschemas(one)]
    for reference in references:
        if reference not in places:
            return f"$ref {json.dumps(reference)[:80]} names no schema inside this one"
    if place := _circular(places):
        return f"the reference at {place} leads back to itself and says nothing of the answer"
    for place, one in places.items():
        if isinstance(one, dict) and len(one.get("oneOf", ())) > MAX_BRANCHES:
            return f"oneOf at {place} has more than {MAX_BRANCHES} branches"
        if isinstance(one, dict) and "oneOf" in one and not _exclusive(one["oneOf"], places):
            return f"oneOf at {place} has branches that may match the same value; anyOf would take them"
    return ""


def ebnf(schema: str) -> str:
    """The grammar of a JSON schema that `unenforced` has nothing against, in xgrammar's notation.

    What xgrammar itself makes of lengths allows control characters, which JSON forbids in strings, and no quote and no
    line break. It allows any number of whitespace characters too, and a model that is unsure of what comes next writes
    them until its answer is full.

    Raises:
        RuntimeError, ValueError: xgrammar does not understand the schema.
    """
    import xgrammar

    parsed, mark = json.loads(schema), "length"
    while mark in json.dumps(parsed):
        mark += "."
    strings: dict[str, None] = {}
    exact = json.dumps(_exact(parsed, mark, strings))
    text = str(xgrammar.Grammar.from_json_schema(exact, any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE))
    for at, inside in enumerate(strings):
        text = text.replace(rf'"\"{mark}{at};\""', f"string_{at}")
        text += f'string_{at} ::= "\\"" {inside} "\\""\n'
    return text + (patterns.RULES if strings else "")


def _exact(schema: Any, mark: str, strings: dict[str, None]) -> Any:
    """A schema with a constant, which `ebnf` replaces, for each of its strings that have a length, pattern or format.

    `strings` receives what each may hold; its place there is in the constant.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in ("maxItems", "maxProperties"):
        if made.get(name, 0) >= UNREACHABLE:
            del made[name]
    for name in ("properties", "$defs", "definitions"):
        if name in made:
            made[name] = {key: _exact(one, mark, strings) for key, one in made[name].items()}
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if name in made:
            made[name] = [_exact(one, mark, strings) for one in made[name]]
    for name in ("items", "additionalProperties"):
        if name in made:
            made[name] = _exact(made[name], mark, strings)
    types = made.get("type", [])
    types = [types] if isinstance(types, str) else types
    inside = _string(made) if "string" in types else ""
    for name in _OF_TYPE["string"]:
        made.pop(name, None)
    if not inside:
        return made
    strings[inside] = None
    del made["type"]
    text = {"const": f"{mark}{list(strings).index(inside)};"}
    others = [one for one in types if one != "string"]
    # Definitions and properties stay where references look for them.
    return {**made, "anyOf": [text, *([{**made, "type": others}] if others else [])]}


def _string(schema: dict[str, Any]) -> str:
    """What a string of this schema holds, as EBNF; empty for anything.

    Raises:
        ValueError: names what in its pattern cannot be enforced.
    """
    pattern = _FORMATS[schema["format"]] if "format" in schema else schema.get("pattern")
    if pattern is not None:
        return patterns.ebnf(pattern if "pattern" in schema else f"^(?:{pattern})$")
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if high is not None and high >= UNREACHABLE:
        high = None
    return patterns.repeated(patterns.CHARACTER, low, high) if low or high is not None else ""


def _subschemas(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    """The schemas directly inside one, by their place in it."""
    found: list[tuple[str, Any]] = []
    for name in ("properties", "$defs", "definitions"):
        for key, inner in (schema.get(name) or {}).items():
            found.append((f"{name}/{key.replace('~', '~0').replace('/', '~1')}", inner))
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        found += [(f"{name}/{at}", inner) for at, inner in enumerate(schema.get(name) or [])]
    for name in ("items", "additionalProperties"):
        if name in schema and schema[name] is not False:
            found.append((name, schema[name]))
    return found


def _unenforced_here(schema: dict[str, Any], *, root: bool) -> str:
    """What a schema itself asks for in vain, without those inside it."""
    wrong = _misshapen(schema)
    if wrong:
        return f"{wrong} has the wrong type"
    for name in ("minLength", "minItems", "minProperties"):
        if schema.get(name, 0) >= UNREACHABLE:
            return f"{name} that no answer reaches"
    for name in _OF_TYPE["number"]:
        bound = schema.get(name, 0)
        if abs(bound) >= 2**63 and (isinstance(bound, int) or "integer" in schema.get("type", ())):
            return f"{name} beyond 64 bits"
    for name in _NEVER:
        if name in schema and not (name == "uniqueItems" and schema[name] is False):
            return name
    if "$id" in schema and not root:
        return "$id"
    for first in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
        if first in schema:
            return _beside(first, schema)
    return _typed(schema)


def _misshapen(schema: dict[str, Any]) -> str:
    """The first keyword whose value is not of the form that the walk relies on."""
    shapes: dict[str, Any] = {
        **dict.fromkeys(("properties", "$defs", "definitions"), dict),
        **dict.fromkeys(("prefixItems", "anyOf", "oneOf", "allOf", "enum", "required"), list),
        **dict.fromkeys(("$ref", "pattern", "format"), str),
        "type": (str, list),
    }
    for name, shape in shapes.items():
        if name in schema and not isinstance(schema[name], shape):
            return name
        if name in ("prefixItems", "anyOf", "oneOf", "allOf", "enum") and schema.get(name) == []:
            return name
    for name in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        if type(schema.get(name, 0)) is not int or schema.get(name, 0) < 0:
            return name
    for name in _OF_TYPE["number"]:
        if type(schema.get(name, 0)) not in (int, float):
            return name
    for name in ("required", "type"):
        if not all(isinstance(one, str) for one in schema.get(name, ())):
            return name
    return ""


def _beside(first: str, schema: dict[str, Any]) -> str:
    """What stands beside a keyword that xgrammar handles alone."""
    allowed = {*_ANNOTATIONS, "$id", first}
    if first in ("const", "enum"):
        values = [schema["const"]] if first == "const" else schema["enum"]
        if "type" in schema and not all(_is_of(one, schema["type"]) for one in values):
            return f"type beside {first} with a value of another type"
        if any(isinstance(one, dict | list) for one in values):
            return f"{first} with an object or a list"
        allowed.add("type")
        if json.dumps(schema.get("enum")) == json.dumps([schema.get("const")]):
            allowed.add("enum")
    if first == "allOf" and len(schema["allOf"]) > 1:
        return "allOf of several schemas"
    known = {
        "$ref",
        "const",
        "enum",
        "anyOf",
        "oneOf",
        "allOf",
        "type",
        *(one for of in _OF_TYPE.values() for one in of),
    }
    others = sorted((known & schema.keys()) - allowed)
    return f"{others[0]} beside {first}" if others else ""


def _is_of(value: Any, types: str | list[Any]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, _PYTHON.get(name, ())) for name in names if name != "boolean")


def _typed(schema: dict[str, Any]) -> str:
    """What the keywords of single types ask for in vain."""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    unknown = [one for one in types if one not in _TYPES]
    if unknown or ("type" in schema and not types):
        return f"the unknown type {json.dumps(unknown[0])}" if unknown else "an empty list of types"
    if not types:
        given = {kind for kind, names in _OF_TYPE.items() if any(name in schema for name in names)}
        if given and not (given == {"object"} and "properties" in schema):
            return f"a schema without type: {next(iter(sorted(given)))} must be told"
    bounded = "minLength" in schema or "maxLength" in schema
    for name in ("pattern", "format"):
        if name in schema and bounded:
            return f"{name} beside a length"
    if schema.get("minLength", 0) > schema.get("maxLength", math.inf):
        return "minLength above maxLength"
    if "pattern" in schema and "format" in schema:
        return "pattern beside format"
    if "format" in schema and "string" in types and schema["format"] not in _FORMATS:
        return f"format {json.dumps(schema['format'])[:40]}"
    try:
        _string(schema if "string" in types else {})
    except ValueError as error:
        return f"pattern with {error}"

    if "minProperties" in schema and schema.get("additionalProperties", False) is not False:
        return "minProperties beside additionalProperties"  # a name that comes twice would count twice
    for name in ("unevaluatedItems", "unevaluatedProperties"):
        if name in schema and not isinstance(schema[name], bool):
            return name
    missing = [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]
    if missing:
        return f"required names {json.dumps(missing[0])[:40]}, which properties lacks,"
    return ""


def _circular(places: dict[str, Any]) -> str:
    """A place from which references and combinations lead back to it; empty if there is none."""

    def next_of(place: str) -> list[str]:
        one = places[place]
        if not isinstance(one, dict):
            return []
        branches = [(name, at) for name in ("anyOf", "oneOf", "allOf") for at in range(len(one.get(name) or ()))]
        return [*([one["$ref"]] if "$ref" in one else []), *(f"{place}/{name}/{at}" for name, at in branches)]

    done: set[str] = set()
    for start in places:
        path: dict[str, Any] = {start: iter(next_of(start))}
        while path:
            at = next(reversed(path))
            follows = next(path[at], None)
            if follows is None:
                done.add(at)
                path.pop(at)
            elif follows in path:
                return follows
            elif follows not in done:
                path[follows] = iter(next_of(follows))
    return ""


def _exclusive(branches: list[Any], places: dict[str, Any]) -> bool:
    """Whether no value can match two of these schemas."""
    found = [_Branch.of(_resolved(one, places)) for one in branches]
    return all(one.excludes(other) for at, one in enumerate(found) for other in found[:at])


@dataclass(frozen=True)
class _Branch:
    """What tells one branch of a `oneOf` from another.

    Attributes:
        kinds: the types of its values; empty for any.
        values: all that there are; empty where they are not listed.
        required: of an object, the values of each property that it requires.
    """

    kinds: set[str]
    values: set[str]
    required: dict[str, set[str]]

    @classmethod
    def of(cls, schema: dict[str, Any]) -> _Branch:
        properties = schema.get("properties", {})
        told = {name: _values(properties.get(name)) for name in schema.get("required", ())}
        return cls(_kinds(schema), _values(schema), {name: values for name, values in told.items() if values})

    def excludes(self, other: _Branch) -> bool:
        """Whether no value is of both."""
        if self.kinds and other.kinds and self.kinds.isdisjoint(other.kinds):
            return True
        if self.values and other.values:
            return self.values.isdisjoint(other.values)
        if self.kinds != {"object"} or other.kinds != {"object"}:
            return False
        # As of discriminated unions: both require a property, with different values.
        return any(
            values.isdisjoint(other.required[name]) for name, values in self.required.items() if name in other.required
        )


def _resolved(schema: Any, places: dict[str, Any]) -> dict[str, Any]:
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = places.get(schema["$ref"])
    return schema if isinstance(schema, dict) else {}


def _kinds(schema: dict[str, Any]) -> set[str]:
    types = schema.get("type", [])
    return {"number" if one == "integer" else one for one in ([types] if isinstance(types, str) else types)}


def _values(schema: Any) -> set[str]:
    """The values of `const` or `enum`; numbers by value, as JSON schema compares them."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {json.dumps(float(one) if type(one) is int and abs(one) < 2**53 else one) for one in values}
