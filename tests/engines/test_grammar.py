"""User-supplied grammars are compiled in a process with time and memory limits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogpress.engines import grammar
from cogpress.engines.base import Structure
from cogpress.errors import CogpressError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guard(base_folder: Path) -> Iterator[grammar.Guard]:
    made = grammar.Guard(base_folder, 49152)
    yield made
    made.close()


def test_valid_and_invalid_structures_pass(guard: grammar.Guard) -> None:
    guard.check(Structure("json", '{"type": "object"}'))
    guard.check(Structure("regex", "[a-z]+@[a-z]+"))
    guard.check(Structure("choice", ("a", 'b"')))
    guard.check(Structure("grammar", 'root ::= "a"'))
    guard.check(Structure("regex", "(((("))  # the engine reports what is wrong with it


def test_compiling_has_the_engines_low_priority(guard: grammar.Guard) -> None:
    guard.start()
    assert guard._process is not None
    assert os.getpriority(os.PRIO_PROCESS, guard._process.pid) == max(grammar.NICENESS, os.nice(0))


def test_endless_compilation_is_refused_and_the_next_structure_is_not(
    guard: grammar.Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "SECONDS", 1.0)
    properties = {f"p{number}": {"type": "string"} for number in range(2200)}
    hostile = Structure("json", json.dumps({"type": "object", "properties": properties}))
    started = time.monotonic()
    with pytest.raises(CogpressError, match=r"json_schema takes longer than 1 s to compile\. Simplify it"):
        guard.check(hostile)
    assert time.monotonic() - started < 20
    started = time.monotonic()
    with pytest.raises(CogpressError, match="json_schema takes"):
        guard.check(hostile)
    assert time.monotonic() - started < 0.9, "it is remembered"
    monkeypatch.setattr(grammar, "SECONDS", 10.0)
    guard.check(Structure("regex", "a+b"))


def test_size_is_bounded(guard: grammar.Guard) -> None:
    with pytest.raises(CogpressError, match="choices has 70,000 characters; the limit is 65,536"):
        guard.check(Structure("choice", ("x" * 70_000,)))
