"""The worked example's answers: observability queries in JSON, their schema, and `score`, which model.yaml names."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

PERCENTILES = {"P50": "50th", "P90": "90th", "P95": "95th", "P99": "99th"}
NUMERIC = ("SUM", "AVG", "MAX", "MIN", *PERCENTILES, "HEATMAP")
_OF_COLUMN = ("COUNT_DISTINCT", *NUMERIC)
PRESENCE = ("exists",)
_COMPARISONS = ("=", "!=", ">")

OPS = ("COUNT", *_OF_COLUMN)
"""The calculations; all but COUNT take a column."""

FILTER_OPS = (*_COMPARISONS, *PRESENCE)
"""The comparisons of a filter; `exists` takes no value."""

DEFAULTS: dict[str, Any] = {"limit": 100, "time_range": 7200}
"""Meaning of a query without these: 100 groups, two hours (in seconds). No generated row asks for them, so that an
answer that forgets a limit or a time range is never right by default."""

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
"""JSON schema of a query, `properties` in the order of the answers. `time_range` is in seconds."""

_VALID = jsonschema.Draft202012Validator(QUERY_SCHEMA)

_UNORDERED = ("calculations", "breakdowns", "filters")
"""Lists in any order; `orders` is not among them: the first one counts most."""


def normalize(text: str) -> dict[str, Any] | None:
    """A query in canonical form, equal for queries with the same meaning.

    Keys, calculations, breakdowns and filters are sorted, whole numbers are ints, and empty lists and default values
    are left out.

    Returns:
        The query, or None for invalid JSON, NaN, a key given twice with different values, or anything else that
        `QUERY_SCHEMA` refuses. Compare results as `score` does: for Python, 1 and True are equal.
    """
    try:
        query = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_no_number)
    except (ValueError, RecursionError):  # RecursionError: a model may nest brackets without end
        return None
    if not _VALID.is_valid(query):
        return None
    meant = {key: sorted(value, key=_bytes) if key in _UNORDERED else value for key, value in sorted(query.items())}
    return {key: value for key, value in meant.items() if value != [] and value != DEFAULTS.get(key)}


def score(expected: str, answer: str) -> bool:
    """Whether two texts are queries with the same meaning; False if either is not a query. Never raises."""
    wanted, got = normalize(expected), normalize(answer)
    return wanted is not None and got is not None and _bytes(wanted) == _bytes(got)


def _bytes(value: Any) -> str:
    """A text that differs for 1 and True, which `==` does not."""
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
