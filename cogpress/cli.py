"""What the scripts share: errors without stack traces, steps with times, options made from Cog's inputs."""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cogpress import schema
from cogpress.errors import CogpressError


def run(main: Callable[[], None]) -> None:
    """Run a command: a user's mistake is one message and exit status 1, Ctrl-C is 130, a fault keeps its trace."""
    try:
        main()
    except CogpressError as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error: ", "bold red"), str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        sys.exit(130)


@contextmanager
def step(name: str, console: Console) -> Iterator[Callable[[str], None]]:
    """Print a step's name when it begins and its result and seconds when it ends; the block may `say` the result."""
    console.print(Text.assemble(("▸ ", "cyan"), (name, "bold")))
    started = time.perf_counter()
    results: list[str] = []
    yield results.append
    seconds = f"{time.perf_counter() - started:.1f} s"
    console.print(Text.assemble(("✓ ", "green"), f"{name}: " if results else name, *results, "  ", (seconds, "dim")))


_TYPES: dict[str, type] = {"integer": int, "number": float, "string": str}


def options(root: Path, reference: str, **parser: Any) -> argparse.ArgumentParser:
    """A parser with one option for each input of a Cog function, so that a shell and Cog share one definition.

    Bounds are checked when parsing; an option that is not given is None, which the configuration reads as not given.
    """
    made = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **parser)
    for name, field in schema.inputs(root, reference).items():
        flag = f"--{name.replace('_', '-')}"
        text = str(field.get("description", "")).replace("%", "%%")
        if field.get("type") == "boolean":
            made.add_argument(flag, dest=name, action="store_true", help=text)
        else:
            made.add_argument(
                flag,
                dest=name,
                type=_bounded(field),
                choices=field.get("enum"),
                metavar=None if field.get("enum") else name.rpartition("_")[2].upper(),
                help=text,
            )
    return made


def _bounded(field: dict[str, Any]) -> Callable[[str], Any]:
    kind = _TYPES.get(str(field.get("type")), str)
    low, high = field.get("minimum"), field.get("maximum")

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole number' if kind is int else 'number'}") from None
        if (low is not None and value < low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return convert


def parse_inputs(pairs: list[str], fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`name=value` pairs, as `cog predict -i` takes them, to a prediction's input.

    A value `@file` is the file's text, or for a file input its content as a data URL.

    Raises:
        CogpressError: a pair without `=`, an input that does not exist, a value of the wrong type, a missing file.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise CogpressError(f"-i {pair}: write -i name=value.")
        if name not in fields:
            raise CogpressError(f"There is no input {name!r}. There are: {', '.join(fields)}.")
        values[name] = _value(name, text, fields[name])
    return values


def _value(name: str, text: str, field: dict[str, Any]) -> Any:
    is_file = field.get("format") == "uri"
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CogpressError(f"-i {name}: {path} can not be read: {error.strerror}.") from None
        if is_file:
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
        text = content.decode("utf-8", errors="replace")
    kind = field.get("type")
    if kind == "boolean":
        if text.lower() not in ("true", "false"):
            raise CogpressError(f"-i {name} must be true or false.")
        return text.lower() == "true"
    try:
        return _TYPES.get(str(kind), str)(text)
    except ValueError:
        raise CogpressError(f"-i {name} must be of type {kind}, not {text!r}.") from None
