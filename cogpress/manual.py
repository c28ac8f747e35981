"""docs/configuration.md, generated from the options: `python -m cogpress.manual > docs/configuration.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cogpress.config import Config

_HEAD = """# Configuration

The options of `model.yaml`; what is left out keeps its default. A misspelled option, a value out of bounds and a
malformed source are refused when the file is read. [README](../README.md) has the ten that a first model needs.

Generated from `cogpress/options.py`: `.venv/bin/python -m cogpress.manual > docs/configuration.md`.

## Top level
"""

_Schema = dict[str, Any]


def page() -> str:
    """The whole page in Markdown: the options outside sections, then each section, in the order of the file."""
    schema = Config.model_json_schema()
    defined = schema["$defs"]
    own = {name: one for name, one in schema["properties"].items() if _section(one, defined) is None}
    lines = [_HEAD, *_table("", {**schema, "properties": own}, defined)]
    for name, one in schema["properties"].items():
        lines += _chapter(name, _section(one, defined), defined, "##")
    return "\n".join(lines) + "\n"


def _chapter(place: str, section: _Schema | None, defined: _Schema, level: str) -> Iterator[str]:
    # The tests of a training are those of push.tests.
    if section is None or place == "push.training.tests":
        return
    yield f"\n{level} `{place}`\n\n{_one_line(section['description'])}\n"
    yield from _table(f"{place}.", section, defined)
    for name, one in section["properties"].items():
        inner = f"{place}.{name}.NAME" if "additionalProperties" in one else f"{place}.{name}"
        yield from _chapter(inner, _section(one, defined), defined, "###")


def _table(prefix: str, section: _Schema, defined: _Schema) -> Iterator[str]:
    yield "| option | value | default | what it does |\n|---|---|---|---|"
    for name, one in section["properties"].items():
        default = "required" if name in section.get("required", ()) else _default(one)
        what = "section" if _section(one, defined) else _words(one)
        if what == "section":
            what = {"array": "list of sections", "object": "mapping to sections"}.get(one.get("type", ""), what)
        cells = (f"`{prefix}{name}`", what, default, _one_line(one["description"]))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _section(schema: _Schema, defined: _Schema) -> _Schema | None:
    """The section that an option holds: itself, optional, in a list or in a mapping."""
    if "$ref" in schema:
        found: _Schema = defined[schema["$ref"].rpartition("/")[2]]
        return found
    inner = [*schema.get("anyOf", ())]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    return next((deeper for one in inner if (deeper := _section(one, defined))), None)


def _words(schema: _Schema) -> str:
    """What a value may be, without null: an option that may be null is left out instead."""
    if "anyOf" in schema:
        return " or ".join(_words(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    if "type" not in schema:
        return "any value"
    if schema["type"] == "array":
        return f"list of {_words(schema['items'])}"
    if schema["type"] == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {_words(inner)}" if isinstance(inner, dict) else "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {schema[key]:,}" for key, sign in signs.items() if key in schema)
    words = {"string": "text", "boolean": "true or false"}.get(schema["type"], schema["type"])
    return f"{words} {bounds}".rstrip()


def _default(schema: _Schema) -> str:
    value = schema.get("default")
    if value in (None, "", [], {}) or isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value).removesuffix('.0')}`"


if __name__ == "__main__":
    print(page(), end="")
