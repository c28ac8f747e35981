"""Compile user-supplied grammars in a sandboxed process with time and memory limits.

This file is also the program of that process, which imports no more of this package than it needs.
"""

# A regular expression of a few characters can take hours and gigabytes to compile, and inside the engine nothing would
# stop it. Whether a grammar is valid is for the engine to say: invalid ones pass here.

from __future__ import annotations

import json
import re
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cogpress.engines import patterns, schemas

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

MEMORY = 2 << 30
"""Memory limit in bytes, beyond what the process uses once it is ready."""

NICENESS = 10
"""On a CPU, the priority of computing processes (the engine and this one) below those that stream tokens."""

_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from cogpress.engines import grammar; grammar._work()"

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
            CogpressError: it is too large, takes too long or too much memory, or no text begins as it asks.
        """
        from cogpress.engines.base import INPUT_NAMES
        from cogpress.errors import CogpressError

        value = structure.value if isinstance(structure.value, str) else "".join(structure.value)
        name = INPUT_NAMES[structure.kind]
        if len(value) > MAX_CHARACTERS:
            raise CogpressError(f"{name} has {len(value):,} characters; the limit is {MAX_CHARACTERS:,}. Shorten it.")
        if structure.kind == "json" and _depth(json.loads(value)) > schemas.MAX_DEPTH:
            raise CogpressError(f"{name} is nested more than {schemas.MAX_DEPTH} levels deep. Make it flatter.")
        if structure.kind == "regex" and (reason := patterns.unenforced(value)):
            raise CogpressError(f"{name} cannot be enforced: {reason}. Write it without that.")
        if structure.kind == "json" and (reason := schemas.unenforced(json.loads(value))):
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
            raise CogpressError(f"{name} {fault}.")

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
            return "" if line.strip() == "done" else "matches no text at all. Correct it"
        timed_out = process.poll() is None
        self.close()
        took = f"longer than {SECONDS:.0f} s" if timed_out else "too much memory"
        return f"takes {took} to compile. Simplify it: fewer nested repetitions, smaller counts"

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
            [sys.executable, "-I", "-c", _PROGRAM, str(Path(__file__).parents[2])],
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
    """The nesting of objects and lists, counted up to one above `schemas.MAX_DEPTH`."""
    deepest, level = 0, [value]
    while level:
        level = [one for outer in level for one in _inside(outer)]
        deepest += 1
        if deepest > schemas.MAX_DEPTH:
            break
    return deepest


def _inside(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [one for one in inner if isinstance(one, dict | list)]


def ebnf(kind: str, value: str) -> str:
    """The grammar of a structure's value, but choices', in xgrammar's notation; one in Lark's stays as it is.

    Raises:
        RuntimeError, ValueError: xgrammar does not understand it.
    """
    import xgrammar

    if kind == "json":
        return schemas.ebnf(value)
    if kind == "regex":
        return patterns.shortened(str(xgrammar.Grammar.from_regex(value)))
    return patterns.shortened(str(xgrammar.Grammar.from_ebnf(value))) if "::=" in value else value


def explained(error: Exception) -> str:
    """What xgrammar says of a structure, without the time and the place in its source."""
    text = str(error).strip()
    return re.sub(r"\[[\d:]+\] \S+?:\d+: ", "", text).rstrip(".").partition("\n")[0] or "it is not understood"


def _work() -> None:
    """Read a tokenizer's description, then one structure per line; answer each with a line once it is compiled.

    The line says "nothing" where no token may come first: a model that is left without one writes anything, or ends.
    """
    import os
    import resource

    import xgrammar

    os.nice(max(0, NICENESS - os.nice(0)))
    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline()))
    compiler: Any = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    first = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        kind, value = json.loads(line)
        answer = "done"
        try:
            text = "root ::= " + " | ".join(map(json.dumps, value)) if kind == "choice" else ebnf(kind, value)
            xgrammar.GrammarMatcher(compiler.compile_grammar(text)).fill_next_token_bitmask(first)
            if not first.any():
                answer = "nothing"
        except MemoryError:
            return
        except Exception as error:  # noqa: BLE001 - invalid; the engine reports that
            if "bad_alloc" in str(error):
                return
        print(answer, flush=True)
