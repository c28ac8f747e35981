"""Try out, in a process that can be ended, whether the form that users want of an answer compiles in reasonable time.

A regular expression of a few characters can need hours and gigabytes to compile, and in the engine nothing would stop
it. So each form is compiled here first, with bounds on both. Whether it is valid is for the engine to say.

This file is also the program of that process, which imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

    from cogpress.engines.base import Structure

SECONDS = 5.0
"""How long a form may take to compile. Schemas that applications use take milliseconds."""

MAX_BYTES = 1 << 16
"""Of a form, in characters."""

MAX_DEPTH = 64
"""Objects and lists inside each other in a JSON schema."""

MAX_WHITESPACE = 1
"""Characters of whitespace between two tokens of JSON that has a schema."""

MEMORY = 2 << 30
"""Bytes of memory that the process may take beyond what it has when it is ready."""

_REMEMBERED = 256
_STARTING = 120.0


NICENESS = 10
"""How far what computes stands back, on a CPU, for what carries tokens: the engine, and so this process beside it."""


class Guard:
    """One process that compiles forms for one tokenizer. It starts at the first use, or by `start`."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Describe it.

        Args:
            folder: the model whose tokenizer is used.
            vocabulary: width of the model's output layer.
        """
        import threading

        self._folder = folder
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._known: OrderedDict[Structure, str] = OrderedDict()

    def check(self, structure: Structure) -> None:
        """Compile a form, unless that was done before.

        Raises:
            CogpressError: it is too large, or takes too long or too much memory.
        """
        from cogpress.engines.base import CALLED
        from cogpress.errors import CogpressError

        value = structure.value if isinstance(structure.value, str) else "".join(structure.value)
        called = CALLED[structure.kind]
        if len(value) > MAX_BYTES:
            raise CogpressError(f"{called} has {len(value):,} characters, and {MAX_BYTES:,} are the most. Shorten it.")
        if structure.kind == "json" and _depth(json.loads(value)) > MAX_DEPTH:
            raise CogpressError(f"{called} has objects inside each other more than {MAX_DEPTH} deep. Make it flatter.")
        with self._lock:
            if structure not in self._known:
                self._known[structure] = self._ask(structure)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            self._known.move_to_end(structure)
            fault = self._known[structure]
        if fault:
            raise CogpressError(f"{called} {fault}. Make it simpler: fewer nested repetitions, smaller counts.")

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
        """A line of the process; nothing when it ended or time is up."""
        import select

        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else ""

    def start(self) -> None:
        """Start the process if it does not run; returns when it is ready."""
        import subprocess

        from cogpress.errors import CogpressError
        from cogpress.weights import base

        if self._process is not None and self._process.poll() is None:
            return
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(base.tokenizer(self._folder), vocab_size=self._vocabulary)
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(info.serialize_json()) + "\n")
        self._process.stdin.flush()
        if not self._read(_STARTING):
            self.close()
            raise CogpressError("The process that checks schemas and grammars did not start. Is there memory left?")

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
    """How deep objects and lists are inside each other."""
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


def _work() -> None:
    """The process: a tokenizer's description, then forms, a line each; answers each with a line when it is compiled."""
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
        except Exception as error:  # noqa: BLE001 - not valid, which the engine says better
            if "bad_alloc" in str(error):
                return
        print("done", flush=True)


if __name__ == "__main__":
    _work()
