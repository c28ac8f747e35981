"""The exported ratings are training data whose prompts are those that were served."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from cogpress import config
from cogpress.data.prepare import read_examples
from cogpress.playground.export import example
from cogpress.playground.store import Store
from cogpress.prompts import Conversation
from tests.standins.localreplicate import Local

FORM = config.Prompt(system="Answer in SQL.", template="Columns: {columns}\nQuestion: {question}")
FIELDS = {"question": 'how "many"?', "columns": ["a.b", "ü"]}
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "an odd answer"},
    {"role": "user", "content": "again"},
]
OWN, USUAL = ("system", "Be brief."), ("system", "Answer in SQL.")
ASKED = ("user", 'Columns: a.b\nü\nQuestion: how "many"?')
TALKED = tuple((one["role"], one["content"]) for one in TALK)

CASES: list[tuple[dict[str, Any], tuple[tuple[str, str], ...]]] = [
    ({"fields": json.dumps(FIELDS)}, (USUAL, ASKED)),
    ({"fields": FIELDS, "prompt": "not used"}, (USUAL, ASKED)),
    ({"fields": json.dumps(FIELDS), "system_prompt": "Be brief."}, (OWN, ASKED)),
    ({"prompt": "filled already"}, (USUAL, ("user", "filled already"))),
    ({"prompt": "filled already", "system_prompt": "Be brief."}, (OWN, ("user", "filled already"))),
    ({"messages": json.dumps(TALK), "fields": "not used"}, (USUAL, *TALKED)),
    ({"messages": json.dumps(TALK), "system_prompt": "Be brief."}, (OWN, *TALKED)),
    (
        {"messages": [{"role": "system", "content": "Be kind."}, *TALK], "system_prompt": "not used"},
        (("system", "Be kind."), *TALKED),
    ),
]


def rated(inputs: dict[str, Any], rating: str = "good", **more: Any) -> dict[str, Any]:
    known = {"rating": rating, "status": "succeeded", "output": ["SELECT ", "1"], "correction": None}
    return {"input": inputs, **known, **more}


def read(path: Path, rows: list[dict[str, Any]]) -> list[Conversation]:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = read_examples(path, prompt=FORM)
    assert found.problems == []
    return found.conversations


def turns(conversation: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((one["role"], one["content"]) for one in conversation.messages)


@pytest.mark.parametrize(("inputs", "asked"), CASES)
def test_a_row_is_learnt_as_it_was_asked(inputs: dict[str, Any], asked: Any, tmp_path: Path) -> None:
    row = example(rated(inputs), FORM)
    assert row is not None
    [found] = read(tmp_path / "rated.jsonl", [row])
    assert turns(found) == (*asked, ("assistant", "SELECT 1"))
    if "messages" in inputs:
        assert found.given == len(asked)  # the answers before the one that was rated are not learnt


def test_tools_that_the_model_had_are_in_the_row(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    for given in (json.dumps(tools), tools):
        row = example(rated({"messages": TALK, "tools": given}), FORM)
        assert row is not None
        [found] = read(tmp_path / "rated.jsonl", [row])
        assert found.tools == tuple(tools)
    assert "tools" not in (example(rated({"prompt": "how many?", "tools": " "}), FORM) or {})
    assert example(rated({"prompt": "how many?", "tools": "["}), FORM) is None


def test_only_what_is_right_is_learnt(tmp_path: Path) -> None:
    inputs = {"prompt": "how many?"}
    right = [
        rated(inputs),
        rated(inputs, correction="better"),  # good, and somebody wrote a better one all the same
        rated(inputs, "bad", correction="right"),
        rated(inputs, "bad", correction="right", status="failed", output=None),
    ]
    rows = [example(one, FORM) for one in right]
    assert all(rows)
    answers = [one.answer for one in read(tmp_path / "rated.jsonl", [row for row in rows if row])]
    assert answers == ["SELECT 1", "better", "right", "right"]
    wrong = [
        rated(inputs, "bad"),
        rated(inputs, "bad", correction="  "),
        rated(inputs, output=[]),
        rated(inputs, status="canceled"),  # half an answer
        rated({"fields": '{"question": "without columns"}', "system_prompt": "Be brief."}),
        rated({"fields": "{"}),
        rated({"messages": "[]", "system_prompt": "Be brief."}),
        rated({"other": "input"}),
        rated({}, output=None),
        rated(inputs) | {"input": None},  # kept out of the store
    ]
    assert [example(one, FORM) for one in wrong] == [None] * len(wrong)


@pytest.mark.slow
def test_the_export_is_a_file_that_training_reads(tmp_path: Path) -> None:
    async def fill() -> None:
        store = Store(tmp_path / "data")
        for number, (inputs, _) in enumerate(CASES):
            for rating, correction in (("good", None), ("bad", f"right {number}"), ("bad", None), (None, None)):
                name = f"{number}{rating}{correction}"
                record = dict.fromkeys(("webhook", "events", "error", "started", "completed"))
                record |= {"id": name, "created": time.time(), "status": "succeeded", "model": "m", "version": "v"}
                record |= {"source": "web", "input": inputs, "output": ["SELECT 1"], "logs": "", "metrics": {}}
                store.insert(record)
                store.update(record)
                store.write("UPDATE predictions SET rating = ?, correction = ? WHERE id = ?", rating, correction, name)
        await store.close()

    asyncio.run(fill())
    with Local(tmp_path, [], data=tmp_path / "data", prompt=FORM.model_dump()) as local:
        for rating, left_out in (("good", 0), ("bad", len(CASES)), ("all", len(CASES))):
            answer = local.ask("GET", f"/playground/api/export?rating={rating}")
            assert answer.headers["x-left-out"] == str(left_out)
            (tmp_path / "rated.jsonl").write_bytes(answer.content)
            found = read_examples(tmp_path / "rated.jsonl", prompt=FORM)
            assert found.problems == []
            expected = []
            for number, (_, asked) in enumerate(CASES):
                if rating != "bad":
                    expected.append((*asked, ("assistant", "SELECT 1")))
                if rating != "good":
                    expected.append((*asked, ("assistant", f"right {number}")))
            assert [turns(one) for one in found.conversations] == expected
