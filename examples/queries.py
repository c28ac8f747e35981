"""The worked example's answers: observability queries in JSON, their schema, and when two of them mean the same.

Knows nothing of questions, which `examples.questions` words. Its `score` is what model.yaml names for this task.
"""

from __future__ import annotations

import json
from typing import Any

PERCENTILES = {"P50": "50th", "P90": "90th", "P95": "95th", "P99": "99th"}
NUMERIC = ("SUM", "AVG", "MAX", "MIN", *PERCENTILES, "HEATMAP")
_OF_COLUMN = ("COUNT_DISTINCT", *NUMERIC)
PRESENCE = ("exists",)
_COMPARISONS = ("=", "!=", ">")

OPS = ("COUNT", *_OF_COLUMN)
"""What a query can calculate; COUNT alone takes no column."""

FILTER_OPS = (*_COMPARISONS, *PRESENCE)
"""What a filter can demand of a column; the last two take no value."""

DEFAULTS: dict[str, Any] = {"limit": 100, "time_range": 7200}
"""What a query that leaves these out means: 100 groups, two hours (in seconds). No generated row asks for them, so an
answer that forgets a limit or a time range can never be right by default."""

_NAME = {"type": "string", "minLength": 1}
_SCALAR = {"type": ["string", "number", "boolean"]}
_COUNTING = {"type": "integer", "minimum": 1}


def _object(required: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": required, "required": list(required), "additionalProperties": False}


def _list(*items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": {"anyOf": list(items)}}


_DIRECTION = {"enum": ["descending", "ascending"]}

QUERY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "calculations": _list(
            _object({"op": {"enum": ["COUNT"]}}),
            _object({"op": {"enum": list(_OF_COLUMN)}, "column": _NAME}),
        ),
        "breakdowns": {"type": "array", "items": _NAME},
        "filters": _list(
            _object({"column": _NAME, "op": {"enum": list(PRESENCE)}}),
            _object({"column": _NAME, "op": {"enum": list(_COMPARISONS)}, "value": _SCALAR}),
        ),
        "orders": _list(
            _object({"column": _NAME, "order": _DIRECTION}),
            _object({"op": {"enum": ["COUNT"]}, "order": _DIRECTION}),
            _object({"op": {"enum": list(_OF_COLUMN)}, "column": _NAME, "order": _DIRECTION}),
        ),
        "limit": _COUNTING,
        "time_range": _COUNTING,
    },
    "additionalProperties": False,
}
"""JSON schema of a query; `properties` are in the order in which answers are written. `time_range` is in seconds."""

_UNORDERED = ("calculations", "breakdowns", "filters")
"""Lists whose order means nothing. The order of `orders` does: the first one counts most."""


def normalize(text: str) -> dict[str, Any] | None:
    """What a query means, in a form that is equal for queries that mean the same.

    The order of keys, calculations, breakdowns and filters is settled, whole numbers are ints, and empty lists and
    default values are left out. Only JSON is accepted, with JSON's own whitespace around it.

    Returns:
        The query, or None if the text is not one: invalid JSON, NaN, a key given twice with different values, or
        anything that `QUERY_SCHEMA` refuses. Compare results as `score` does: for Python, 1 and True are equal.
    """
    try:
        query = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_no_number)
    except (ValueError, RecursionError):  # RecursionError: brackets nested without end are a model's failure, not ours
        return None
    if not _fits(query, QUERY_SCHEMA):
        return None
    meant = {key: sorted(value, key=_bytes) if key in _UNORDERED else value for key, value in sorted(query.items())}
    return {key: value for key, value in meant.items() if value != [] and value != DEFAULTS.get(key)}


def score(expected: str, answer: str) -> bool:
    """Whether two texts are queries that mean the same; never raises, and False if either is not a query."""
    wanted, got = normalize(expected), normalize(answer)
    return wanted is not None and got is not None and _bytes(wanted) == _bytes(got)


def _bytes(value: Any) -> str:
    """A text that tells apart what `==` does not: 1 and True."""
    return json.dumps(value, sort_keys=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and _bytes(found[key]) != _bytes(value):
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return int(number) if number.is_integer() else number


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a parsed value fits a schema; knows the keywords `QUERY_SCHEMA` uses and no others.

    Written here because the scorer must run wherever Python does, and because one schema cannot contradict itself.
    """
    kinds = schema.get("type", [])
    names: list[str] = [kinds] if isinstance(kinds, str) else kinds
    if names and not any(_is(value, name) for name in names):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(_fits(value, option) for option in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        known = schema.get("additionalProperties", True) or value.keys() <= properties.keys()
        complete = all(key in value for key in schema.get("required", []))
        return known and complete and all(_fits(item, properties.get(key, {})) for key, item in value.items())
    if isinstance(value, list):
        return all(_fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, str):
        return len(value) >= int(schema.get("minLength", 0))
    return not isinstance(value, int | float) or bool(value >= schema.get("minimum", value))


def _is(value: Any, name: str) -> bool:
    # a bool is an int to Python but not to JSON
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
