"""User-supplied grammars are compiled in a process with time and memory limits."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(("kind", "value"), [("regex", r"[^\s\S]"), ("grammar", "root ::= root")])
def test_a_structure_that_nothing_matches_is_refused(guard: grammar.Guard, kind: Any, value: str) -> None:
    """A model that no token is allowed ends its answer, as if an empty one were right."""
    with pytest.raises(CogpressError, match=f"{kind} matches no text at all. Correct it"):
        guard.check(Structure(kind, value))


def test_what_the_compiler_says_is_shown_without_its_source() -> None:
    told = "[05:09:09] /project/cpp/json_schema_converter.cc:936: Integer exceeds maximum limit.\n"
    assert grammar.explained(RuntimeError(told)) == "Integer exceeds maximum limit"
    assert grammar.explained(RuntimeError("")) == "it is not understood"


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
    for _ in range(2):
        with pytest.raises(CogpressError, match=r"json_schema takes longer than 1 s to compile\. Simplify it"):
            guard.check(hostile)
        assert guard._process is None, "it was ended, and what is remembered starts none"
    monkeypatch.setattr(grammar, "SECONDS", 10.0)
    guard.check(Structure("regex", "a+b"))


def test_slow_structures_make_nobody_else_wait(guard: grammar.Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "SECONDS", 1.5)
    monkeypatch.setattr(grammar, "WAIT_SECONDS", 2.0)
    known, new = Structure("regex", "a+c"), Structure("regex", "a+d")
    guard.check(known)

    def slow(number: int) -> Structure:
        properties = {f"p{n}": {"type": "string"} for n in range(2200)}
        return Structure("json", json.dumps({"title": str(number), "type": "object", "properties": properties}))

    async def said(structure: Structure) -> str:
        try:
            return await guard.checked(structure, lambda: "done")
        except CogpressError as error:
            return str(error)

    async def run() -> tuple[list[str], list[str]]:
        waiting = [asyncio.create_task(said(slow(number))) for number in range(40)]
        await asyncio.sleep(0)
        others = [await said(known), await asyncio.to_thread(str, "a long prompt")]
        assert not any(one.done() for one in waiting)
        await asyncio.gather(*waiting)
        monkeypatch.setattr(grammar, "SECONDS", 10.0)
        others.append(await said(new))
        return [one.result() for one in waiting], others

    answers, others = asyncio.run(run())
    assert others == ["done", "a long prompt", "done"]
    late = [one for one in answers if "could not be checked within 2 s" in one]
    assert "takes longer than" in answers[0]
    assert len(late) > 30


def test_size_is_bounded(guard: grammar.Guard) -> None:
    with pytest.raises(CogpressError, match="choices has 70,000 characters; the limit is 65,536"):
        guard.check(Structure("choice", ("x" * 70_000,)))
