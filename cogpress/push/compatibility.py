"""Breaking changes of a model's schema: what callers of the live version would notice of a new one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cogpress.cog import schema

_LOWER = {"minimum", "minLength"}
_UPPER = {"maximum", "maxLength"}


def breaking(live: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Each change that makes a call of the live version fail, or mean something else, with the new one.

    Args:
        live: the live version's OpenAPI document.
        new: that of the version to replace it.
    """
    return [*_inputs(schema.fields(live), schema.fields(new)), *_output(live, new)]


def _inputs(live: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, before in live.items():
        if name not in new:
            yield f"input {name} is removed"
            continue
        yield from _narrowed(name, before, new[name])
    for name, field in new.items():
        if name not in live and field.get("required"):
            yield f"input {name} is new and required"


def _narrowed(name: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if _kind(before) != _kind(now) and (_kind(before), _kind(now)) != ("integer", "number"):
        yield f"input {name} takes {_kind(now)} instead of {_kind(before)}"
        return
    if now.get("required") and not before.get("required"):
        yield f"input {name} is required now"
    if before.get("nullable") and not now.get("nullable"):
        yield f"input {name} can no longer be null"
    for key in sorted(_LOWER | _UPPER):
        old, bound = before.get(key), now.get(key)
        if bound is not None and (old is None or _tighter(key, float(old), float(bound))):
            yield f"input {name} has the {key} {bound} instead of {'none' if old is None else old}"
    if now.get("pattern") not in (None, before.get("pattern")):
        yield f"input {name} must match {now['pattern']}"
    if "enum" in now:
        lost = [str(one) for one in before.get("enum", []) if one not in now["enum"]]
        if "enum" not in before:
            yield f"input {name} takes only {', '.join(map(str, now['enum']))}"
        elif lost:
            yield f"input {name} no longer takes {', '.join(lost)}"
    if not now.get("required") and not before.get("required") and before.get("default") != now.get("default"):
        yield f"input {name} has the default {now.get('default')!r} instead of {before.get('default')!r}"


def _tighter(key: str, old: float, bound: float) -> bool:
    """Whether a bound lets less through; as float64, which is how Cog writes bounds."""
    return bound > old if key in _LOWER else bound < old


def _kind(field: dict[str, Any]) -> str:
    kind = str(field.get("type", "anything"))
    if kind == "array":
        return f"a list of {_kind(field.get('items') or {})}"
    return f"{kind} ({field['format']})" if "format" in field else kind


def _output(live: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, now = _shape(live), _shape(new)
    if before != now:
        yield f"the output is {now} instead of {before}"
    if _streams(live) and not _streams(new):
        yield "the output no longer streams"


def _shape(document: dict[str, Any]) -> str:
    schemas = document.get("components", {}).get("schemas", {})
    return _described(schemas.get("Output", {}), schemas, 0)


def _described(made: dict[str, Any], schemas: dict[str, Any], depth: int) -> str:
    """An output's type in words, with an object's properties."""
    reference = str(made.get("$ref", ""))
    if reference and depth < 8:
        return _described(schemas.get(reference.rpartition("/")[2], {}), schemas, depth + 1)
    kind = _kind(made)
    if made.get("type") == "array":
        parts = _described(made.get("items") or {}, schemas, depth + 1)
        return f"{'an iterator' if made.get('x-cog-array-type') == 'iterator' else 'a list'} of {parts}"
    if made.get("properties") and depth < 8:
        inner = (f"{name}: {_described(one, schemas, depth + 1)}" for name, one in sorted(made["properties"].items()))
        return f"object ({', '.join(inner)})"
    return kind


def _streams(document: dict[str, Any]) -> bool:
    return bool(document.get("paths", {}).get("/predictions", {}).get("post", {}).get("x-cog-streaming"))
