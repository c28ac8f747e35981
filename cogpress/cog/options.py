"""Cog's inputs in the shell: options for a training, `name=value` pairs for a prediction."""

from __future__ import annotations

import argparse
import base64
import json
import math
import mimetypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogpress.cog import schema
from cogpress.errors import CogpressError


def parser(root: Path, reference: str, **more: Any) -> argparse.ArgumentParser:
    """A parser with one option for each input of a Cog function, so that the shell and Cog share one definition.

    Parsing checks bounds. An option that is not given is None.

    Args:
        root: the project's folder.
        reference: what `cog.yaml` names, such as `train.py:train`.
        more: for `argparse.ArgumentParser`.

    Raises:
        CogpressError: the reference cannot be described.
    """
    made = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    for name, field in schema.inputs(root, reference).items():
        flag = f"--{name.replace('_', '-')}"
        text = _help(field).replace("%", "%%")
        if field.get("type") == "boolean" and field.get("default"):
            made.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif field.get("type") == "boolean":
            made.add_argument(flag, dest=name, action="store_true", help=text)
        else:
            metavar = None if "enum" in field else name.rpartition("_")[2].upper()
            without = {key: value for key, value in field.items() if key != "enum"}  # argparse checks choices itself
            made.add_argument(
                flag, dest=name, type=_option_type(without), choices=field.get("enum"), metavar=metavar, help=text
            )
    return made


def _help(field: dict[str, Any]) -> str:
    notes = []
    if "minimum" in field or "maximum" in field:
        notes.append(_bounds(field))
    if field.get("default") not in (None, "", False):
        notes.append(f"default: {field['default']}")
    return " ".join(filter(None, [str(field.get("description", "")), f"({'; '.join(notes)})" if notes else ""]))


def _option_type(field: dict[str, Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return _converted(text, field)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text} {error}") from None

    return convert


def parse_inputs(pairs: list[str], fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A prediction's inputs from `name=value` pairs, as `cog predict -i` takes them.

    `@file` is the file's text, or its content as a data URL where the input is a file. Lists and objects are JSON.

    Args:
        pairs: as given.
        fields: the model's inputs, as `schema.fields` and `schema.inputs` describe them.

    Raises:
        CogpressError: a pair without `=`, an unknown, repeated or missing input, a value of the wrong type or out of
            bounds, an unreadable file.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise CogpressError(f"-i {pair}: write -i name=value.")
        # The runtime drops unknown inputs silently.
        if name not in fields:
            raise CogpressError(f"There is no input {name!r}. Use one of {', '.join(fields)}.")
        if name in values:
            raise CogpressError(f"-i {name} is given twice. Give it once.")
        try:
            values[name] = _from_file(text[1:], fields[name]) if text.startswith("@") else _given(text, fields[name])
        except ValueError as error:
            raise CogpressError(f"-i {name}: {text!r} {error}.") from None
        except OSError as error:
            raise CogpressError(f"-i {name}: Could not read {text[1:]}: {error.strerror}.") from None
    missing = [name for name, field in fields.items() if field.get("required") and name not in values]
    if missing:
        raise CogpressError(f"The input {missing[0]} is missing. Give it with -i {missing[0]}=...")
    return values


def _from_file(name: str, field: dict[str, Any]) -> Any:
    path = Path(name).expanduser()
    content = path.read_bytes()
    if field.get("format") == "uri":
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    try:
        return _converted(content.decode("utf-8"), field)
    except UnicodeDecodeError:
        raise ValueError("is not a UTF-8 text file") from None


def _given(text: str, field: dict[str, Any]) -> Any:
    if field.get("format") == "uri" and not re.match(r"(https?|data):", text):
        raise ValueError("is not a URL; for a local file write @ before its name")
    return _converted(text, field)


_NUMBERS: dict[Any, tuple[type[int] | type[float], str]] = {
    "integer": (int, "is not an integer"),
    "number": (float, "is not a number"),
}


def _converted(text: str, field: dict[str, Any]) -> Any:
    """A text as a value of an input's schema; a ValueError says why it is not one."""
    kind = field.get("type")
    value: Any = text
    if kind in _NUMBERS:
        number, complaint = _NUMBERS[kind]
        try:
            value = number(text)
        except ValueError:
            raise ValueError(complaint) from None
        # JSON has no infinity.
        if not math.isfinite(value) or not field.get("minimum", value) <= value <= field.get("maximum", value):
            raise ValueError(f"is not {_bounds(field)}")
    elif kind == "boolean":
        if text.lower() not in ("true", "false"):
            raise ValueError("is neither true nor false")
        value = text.lower() == "true"
    elif kind in ("array", "object"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not JSON ({error})") from None
        if not isinstance(value, list if kind == "array" else dict):
            raise ValueError(f"is not a JSON {'list' if kind == 'array' else 'object'}")
    elif not field.get("minLength", 0) <= len(text) <= field.get("maxLength", len(text)):
        raise ValueError(f"is {len(text)} characters long, not {_lengths(field)}")
    elif "pattern" in field and not re.search(field["pattern"], text):
        raise ValueError(f"does not match {field['pattern']}")
    if "enum" in field and value not in field["enum"]:
        raise ValueError(f"is not one of {', '.join(map(str, field['enum']))}")
    return value


def _bounds(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is None and high is None:
        return "finite"
    if low is None or high is None:
        return f"at most {high}" if low is None else f"at least {low}"
    return f"between {low} and {high}"


def _lengths(field: dict[str, Any]) -> str:
    return _bounds({"minimum": field.get("minLength"), "maximum": field.get("maxLength")})
