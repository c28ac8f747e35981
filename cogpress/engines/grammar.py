"""Compile user-supplied grammars in a sandboxed process with time and memory limits.

This file is also the program of that process, which imports nothing of this package.
"""

# A regular expression of a few characters can take hours and gigabytes to compile, and inside the engine nothing would
# stop it. Whether a grammar is valid is for the engine to say: invalid ones pass here.

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from cogpress.engines.base import Structure

_T = TypeVar("_T")

SECONDS = 5.0
"""Time limit for compiling one structure. Schemas that applications use take milliseconds."""

WAIT_SECONDS = 30.0
"""How long a structure may wait for those before it. Only slow ones make others wait."""

MAX_CHARACTERS = 1 << 16

MAX_DEPTH = 64
"""Maximum nesting of objects and lists in a JSON schema."""

MAX_WHITESPACE = 1
"""Maximum whitespace between two JSON tokens of an answer that follows a schema."""

MEMORY = 2 << 30
"""Memory limit in bytes, beyond what the process uses once it is ready."""

NICENESS = 10
"""On a CPU, the priority of computing processes (the engine and this one) below those that stream tokens."""

_CACHE_SIZE = 256
_START_SECONDS = 120.0


class Guard:
    """A process that compiles structures for one tokenizer. It starts on first use, or by `start`."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Does not start the process.

        Args:
            folder: the model whose tokenizer is used.
            vocabulary: width of the model's output layer.
        """
        import asyncio
        import threading
        from concurrent.futures import ThreadPoolExecutor

        self._folder = folder
        self._vocabulary = vocabulary
        self._info: str | None = None
        self._turn = asyncio.Lock()
        # Its own, so that slow structures take no thread from long prompts and adapters.
        self._thread = ThreadPoolExecutor(1, "structures")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._known: OrderedDict[Structure, str] = OrderedDict()

    async def checked(self, structure: Structure, then: Callable[[], _T]) -> _T:
        """`check` a structure and go on with `then`, both in a thread: one structure at a time, known ones at once.

        Raises:
            CogpressError: as `check` and `then`; or those before it took too long.
        """
        import asyncio

        from cogpress.engines.base import INPUT_NAMES
        from cogpress.errors import CogpressError

        def work() -> _T:
            self.check(structure)
            return then()

        if structure in self._known:
            return await asyncio.to_thread(work)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise CogpressError(
                f"{INPUT_NAMES[structure.kind]} could not be checked within {WAIT_SECONDS:.0f} s, because others' are "
                "slow to compile. Try again in a moment."
            ) from None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._turn.release()

    def check(self, structure: Structure) -> None:
        """Compile a structure, or recall the result of an earlier check.

        Raises:
            CogpressError: it is too large, or takes too long or too much memory.
        """
        from cogpress.engines.base import INPUT_NAMES
        from cogpress.errors import CogpressError

        value = structure.value if isinstance(structure.value, str) else "".join(structure.value)
        name = INPUT_NAMES[structure.kind]
        if len(value) > MAX_CHARACTERS:
            raise CogpressError(f"{name} has {len(value):,} characters; the limit is {MAX_CHARACTERS:,}. Shorten it.")
        if structure.kind == "json" and _depth(json.loads(value)) > MAX_DEPTH:
            raise CogpressError(f"{name} is nested more than {MAX_DEPTH} levels deep. Make it flatter.")
        if structure.kind == "regex" and (reason := _unenforced_pattern(value)):
            raise CogpressError(f"{name} cannot be enforced: {reason}. Write it without that.")
        if structure.kind == "json" and (reason := unenforced(json.loads(value))):
            raise CogpressError(f"{name} cannot be enforced: {reason}. Leave it out, or write the schema without it.")
        fault = self._known.get(structure)
        if fault is None:
            with self._lock:
                if (fault := self._known.get(structure)) is None:
                    fault = self._known[structure] = self._ask(structure)
                while len(self._known) > _CACHE_SIZE:
                    self._known.popitem(last=False)
        with suppress(KeyError):  # another thread may have dropped it meanwhile
            self._known.move_to_end(structure)
        if fault:
            raise CogpressError(f"{name} {fault}. Simplify it: fewer nested repetitions, smaller counts.")

    def _ask(self, structure: Structure) -> str:
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([structure.kind, structure.value]) + "\n")
            process.stdin.flush()
            line = self._read(SECONDS)
        except BrokenPipeError:
            line = ""
        if line:
            return ""
        timed_out = process.poll() is None
        self.close()
        return f"takes longer than {SECONDS:.0f} s to compile" if timed_out else "takes too much memory to compile"

    def _read(self, seconds: float) -> str:
        """A line of the process; empty if it ended or time is up."""
        import select

        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else ""

    def start(self) -> None:
        """Start the process unless it runs already; returns when it is ready."""
        import subprocess

        from cogpress.errors import CogpressError
        from cogpress.weights import base

        if self._process is not None and self._process.poll() is None:
            return
        if self._info is None:
            import xgrammar

            info = xgrammar.TokenizerInfo.from_huggingface(base.tokenizer(self._folder), vocab_size=self._vocabulary)
            self._info = json.dumps(info.serialize_json())
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._info + "\n")
        self._process.stdin.flush()
        if not self._read(_START_SECONDS):
            self.close()
            raise CogpressError("The process that checks schemas and grammars did not start. Is there enough memory?")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def _depth(value: Any) -> int:
    """The nesting of objects and lists, counted up to one above `MAX_DEPTH`."""
    deepest, level = 0, [value]
    while level:
        level = [one for outer in level for one in _inside(outer)]
        deepest += 1
        if deepest > MAX_DEPTH:
            break
    return deepest


def _inside(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [one for one in inner if isinstance(one, dict | list)]


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

_FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "ipv4", "ipv6", "hostname", "uuid", "uri"})
"""Formats that xgrammar enforces, but for the number of days in a month."""

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
    for place, one in places.items():
        if isinstance(one, dict) and "oneOf" in one and not _exclusive(one["oneOf"], places):
            return f"oneOf at {place} has branches that may match the same value; anyOf would take them"
    return ""


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
    return "" if all(isinstance(one, str) for one in schema.get("required", ())) else "required"


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
    if "pattern" in schema and "format" in schema:
        return "pattern beside format"
    if "format" in schema and "string" in types and schema["format"] not in _FORMATS:
        return f"format {json.dumps(schema['format'])[:40]}"
    if "pattern" in schema and (reason := _unenforced_pattern(schema["pattern"])):
        return f"pattern with {reason}"
    if "minProperties" in schema and schema.get("additionalProperties", False) is not False:
        return "minProperties beside additionalProperties"  # a name that comes twice would count twice
    for name in ("unevaluatedItems", "unevaluatedProperties"):
        if name in schema and not isinstance(schema[name], bool):
            return name
    missing = [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]
    if missing:
        return f"required names {json.dumps(missing[0])[:40]}, which properties lacks,"
    return ""


def _unenforced_pattern(pattern: str) -> str:
    """What in a regular expression xgrammar ignores, in words; empty if nothing."""
    depth, inside, at = 0, False, 0
    while at < len(pattern):
        one, before, after = pattern[at], pattern[at - 1 : at], pattern[at + 1 : at + 2]
        if one == "\\":
            at += 1
        elif inside:
            inside = one != "]"
        elif one == "[":
            inside = True
        elif one == "(":
            depth += 1
            if after == "?" and pattern[at + 2 : at + 3] != ":":
                return f"the group {json.dumps(pattern[at : at + 4])}"
        elif one == ")":
            depth -= 1
        elif one == "^" and at and (depth or before != "|"):
            return "^ inside it"
        elif one == "$" and after and (depth or after != "|"):
            return "$ inside it"
        at += 1
    return ""


def _exclusive(branches: list[Any], places: dict[str, Any]) -> bool:
    """Whether no value can match two of these schemas."""
    found = [_resolved(one, places) for one in branches]
    return all(_disjoint(one, other) for at, one in enumerate(found) for other in found[:at])


def _resolved(schema: Any, places: dict[str, Any]) -> dict[str, Any]:
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = places.get(schema["$ref"])
    return schema if isinstance(schema, dict) else {}


def _disjoint(one: dict[str, Any], other: dict[str, Any]) -> bool:
    kinds, others = _kinds(one), _kinds(other)
    if kinds and others and not kinds & others:
        return True
    values, more = _values(one), _values(other)
    if values and more:
        return not values & more
    if kinds == others == {"object"}:
        # As of discriminated unions: both require a property, with different values.
        for name in {*one.get("required", ())} & {*other.get("required", ())}:
            values, more = (_values(of.get("properties", {}).get(name)) for of in (one, other))
            if values and more and not values & more:
                return True
    return False


def _kinds(schema: dict[str, Any]) -> set[str]:
    types = schema.get("type", [])
    return {"number" if one == "integer" else one for one in ([types] if isinstance(types, str) else types)}


def _values(schema: Any) -> set[str]:
    """The values of `const` or `enum`; numbers by value, as JSON schema compares them."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {json.dumps(float(one) if type(one) is int and abs(one) < 2**53 else one) for one in values}


def _work() -> None:
    """Read a tokenizer's description, then one structure per line; answer each with a line once it is compiled."""
    import os
    import resource

    import xgrammar

    os.nice(max(0, NICENESS - os.nice(0)))
    compiler: Any = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline())), max_threads=1, cache_enabled=False
    )
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print("ready", flush=True)
    compile_ = {
        "json": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "grammar": compiler.compile_grammar,
        "choice": lambda texts: compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, texts))),
    }
    for line in sys.stdin:
        kind, value = json.loads(line)
        try:
            compile_[kind](value)
        except MemoryError:
            return
        except Exception as error:  # noqa: BLE001 - invalid; the engine reports that
            if "bad_alloc" in str(error):
                return
        print("done", flush=True)


if __name__ == "__main__":
    _work()
