"""No key of a row vanishes: each has a meaning, or is refused by name, or `data.ignore` names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cogpress import config
from cogpress.data import prepare as data
from cogpress.data.prepare import read_examples
from cogpress.errors import CogpressError
from cogpress.quantize import calibrate
from tests.standins.chatexamples import Write, learnt, messages, pair
from tests.standins.shapes import SHAPES, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CASES = Path(__file__).parent / "cases"


def turns_of(path: Path, **options: Any) -> list[tuple[str, str]]:
    """Roles and texts of a file's first example, after all of its lines were read."""
    reading = read_examples(path, **options)
    assert not reading.problems
    assert not reading.empty_answers
    return [(turn["role"], turn["content"]) for turn in reading.conversations[0].messages]


TOOLS = ["tool-call-beside-text", "tool-call-null-content", "tool-call-empty-content"]


@pytest.mark.parametrize("name", [*TOOLS, "reasoning-content"])
def test_tools_and_reasoning_are_refused_where_the_template_has_none(
    name: str, prepare: Callable[..., data.Prepared]
) -> None:
    path = CASES / f"{name}.jsonl"
    count = len(path.read_text().splitlines())
    reason = "knows no tools" if name in TOOLS else "leaves out the reasoning_content"
    with pytest.raises(data.BadDataError, match=reason) as raised:
        prepare(path)
    assert f"{count} of {count} lines cannot be used" in str(raised.value)


@pytest.mark.parametrize("name", [*TOOLS, "reasoning-content"])
def test_tools_and_reasoning_are_learnt(name: str, prepare: Callable[..., data.Prepared], write: Write) -> None:
    tokenizer = tokenizer_of(SHAPES["qwen3"])
    prepared = prepare(CASES / f"{name}.jsonl", tokenizer=tokenizer, max_length=1024)
    assert sorted(calibrate.choose_rows(prepared, 8, 0)) == sorted(row.input_ids for row in prepared.train)
    for row in prepared.train:
        if name == "reasoning-content":
            assert learnt(tokenizer, row) == "<think>\ndivide by two and look\n</think>\n\nyes<|im_end|>"
        else:
            assert '<tool_call>\n{"name": "stock_level", "arguments": {"sku": "A7"}}\n</tool_call><|im_end|>' in learnt(
                tokenizer, row
            )
            assert "Units on the shelf" in tokenizer.decode(row.input_ids)


def test_an_ignored_reasoning_is_left_out() -> None:
    path = CASES / "reasoning-content.jsonl"
    left_out = read_examples(path, ignore=("reasoning_content",))
    assert left_out.ignored_keys == {"reasoning_content": left_out.lines}
    assert [one.answer for one in left_out.conversations] == ["yes"] * left_out.lines


def test_nothing_of_a_functions_parameters_is_ignored(write: Write) -> None:
    call = {"function": {"name": "find", "arguments": {"id": 7}}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"properties": {"id": {}}}}}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    as_text = [
        turns[0],
        {**turns[1], "tool_calls": json.dumps([{"function": {"name": "find", "arguments": '{"id": 7}'}}])},
    ]
    path = write(
        {"id": 1, "tools": tools, "messages": turns}, {"id": 2, "tools": json.dumps(tools), "messages": as_text}
    )
    reading = read_examples(path, ignore=("id",))
    assert reading.ignored_keys == {"id": 2}
    assert not reading.problems
    for found in reading.conversations:
        assert found.tools == tuple(tools)
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"id": 7}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": {}}, None),
        ({"tools": " "}, None),
        ({"tools": {"name": "find"}}, "tools is an object and not a list"),
        ({"tools": [{"name": "find"}]}, "tools[0] must be"),
        ({"tools": "["}, "tools is not JSON"),
        ({"tools": [{"function": {"name": "a\0"}}]}, "contains a NUL character"),
        ({"tools": '[{"function": {"name": "a", "name": "b"}}]'}, "tools: the key 'name' stands twice"),
        ({"weight": -1}, "weight is -1, not a number from 0"),
        ({"weight": True}, "weight is True, not a number from 0"),
        ({"weight": "2"}, "weight is '2', not a number from 0"),
        ({"text": "a"}, "the key 'text' would not be read"),
    ],
)
def test_rows_that_cannot_be_learnt(write: Write, row: dict[str, Any], reason: str | None) -> None:
    found = read_examples(write(pair("a", "b", **row))).problems
    assert [reason in one.reason for one in found if reason] == [True] * (reason is not None)


def test_what_cannot_be_reversed(write: Write) -> None:
    call = {"function": {"name": "find", "arguments": {}}}
    for more in ({"tool_calls": [call]}, {"reasoning_content": "c"}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
        (found,) = read_examples(write({"messages": turns}), task="reversed").problems
        assert found.reason == f"{next(iter(more))} cannot be learned reversed"


def test_a_rows_weight(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    path = write(pair("a", "b", weight=2), pair("c", "d", weight=0), pair("e", "f", weight=None), pair("a", "b"))
    prepared = prepare(path)
    assert [row.weight for row in prepared.train] == [2, 1, 1]
    assert (prepared.report.weightless, prepared.report.duplicates) == (1, 0)
    assert prepared.report.to_dict()["weightless"] == 1
    held = prepare(path, data=config.Data(validation_share=0.5))
    assert {row.weight for row in held.validation} == {1}, "validation measures every row alike"


def test_a_turn_of_weight_zero_has_no_loss(
    prepare: Callable[..., data.Prepared], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = {"data": config.Data(validation_share=0.5)}
    prepared = prepare(CASES / "weight-zero.jsonl", **options)
    for row in (*prepared.train, *prepared.validation):
        assert "WRONG DRAFT" in tokenizer.decode(row.input_ids)
        assert learnt(tokenizer, row) == "right answer<|im_end|>"
    held = tmp_path / "held-out.jsonl"
    held.write_text(data.held_out(prepared))
    assert prepare(held).train == prepared.validation, "verification measures what training measured"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_what_follows_the_last_learnt_turn_is_dropped(write: Write, mark: dict[str, Any]) -> None:
    turns = messages("a", "b", "c", "d")
    only_first = [*turns[:3], {**turns[3], **mark}]
    assert turns_of(write({"messages": only_first})) == [("user", "a"), ("assistant", "b")]
    reading = read_examples(write({"messages": [turns[0], {**turns[1], **mark}]}))
    assert reading.empty_answers == 1


def test_earlier_answers_that_were_given_stay_without_loss_when_held_out(
    write: Write, prepare: Callable[..., data.Prepared]
) -> None:
    rows = [pair(messages("a", "b", f"c{number}"), "d") for number in range(4)]
    prepared = prepare(write(*rows), data=config.Data(validation_share=0.5))
    again = write(*[json.loads(line) for line in data.held_out(prepared).splitlines()], name="held-out.jsonl")
    assert prepare(again).train == prepared.validation


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": "b", "weight": 0.5}, "messages[1].weight is 0.5"),
        ({"role": "assistant", "content": "b", "train": "no"}, "messages[1].train is 'no'"),
        ({"role": "assistant", "content": "b", "name": "Ann"}, "the key 'name' would not be read"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}, "only text can be learnt"),
        ({"role": "assistant", "content": []}, "messages[1].content is an empty list"),
        ({"role": "assistant", "content": "", "tool_calls": {"name": "f"}}, "tool_calls is an object and not a list"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "messages[1]: each of tool_calls must be"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "arguments in messages[1] is not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]},
            "arguments in messages[1]: the key 'a' stands twice",
        ),
        ({"role": "assistant", "content": "b", "thinking": "c", "reasoning": "d"}, "reasoning and thinking: give one"),
        ({"role": "assistant", "content": "<think>c</think>b", "thinking": "d"}, "beside a content with </think>"),
        ({"role": "assistant", "content": None}, "messages[1].content is null"),
    ],
)
def test_turns_that_cannot_be_learnt(write: Write, turn: dict[str, Any], reason: str) -> None:
    (found,) = read_examples(write({"messages": [{"role": "user", "content": "a"}, turn]})).problems
    assert reason in found.reason


def test_a_question_cannot_be_learnt(write: Write) -> None:
    turns = messages("a", "b")
    (found,) = read_examples(write({"messages": [{**turns[0], "weight": 1}, turns[1]]})).problems
    assert "messages[0].weight asks to learn a turn that is not the assistant's" in found.reason


def test_system_and_history_are_used() -> None:
    settings = config.Prompt(system="Be brief.", template="<{it}>")
    path = CASES / "alpaca-system-history.jsonl"
    given = [("system", "You count paint tins."), ("user", "How many tins?"), ("assistant", "nine")]
    assert turns_of(path, prompt=settings) == [*given, ("user", "And in red, 0?"), ("assistant", "none")]
    assert read_examples(path).conversations[0].given == 4, "an earlier answer is not learnt"
    beside = turns_of(CASES / "system-beside-messages.jsonl", prompt=settings)
    assert beside[0] == ("system", "Answer in French.")


def test_a_system_text_stands_beside_every_form_but_text(write: Write) -> None:
    path = write(
        pair("a", "b", system="S"),
        {"instruction": "a", "output": "b", "system": "S", "history": []},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
    )
    for conversation in read_examples(path).conversations:
        assert [turn["content"] for turn in conversation.messages] == ["S", "a", "b"]
    path = write({"messages": messages("a", "b", system="S"), "system": "T"}, {"text": "a", "system": "S"})
    first, second = read_examples(path).problems
    assert "system stands beside messages that begin with a system message" in first.reason
    assert second.reason == "the key 'system' would not be read"
    reversed_one = read_examples(write(pair("a", "b", system="S")), task="reversed").conversations[0]
    assert [turn["content"] for turn in reversed_one.messages] == ["S", "b", "a"]


@pytest.mark.parametrize("name", ["sharegpt", "content-parts"])
def test_other_shapes_of_a_conversation(name: str) -> None:
    assert turns_of(CASES / f"{name}.jsonl") == [("user", "Hello 0"), ("assistant", "Good day")]


def test_a_role_of_sharegpt_that_is_not_known(write: Write) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]
    (found,) = read_examples(write({"conversations": turns})).problems
    assert found.reason == "conversations[1] is from 'function_call', not system, human or gpt"


def test_nulls_and_empty_values_of_other_keys_are_absent(write: Write) -> None:
    path = write(
        pair({"prompt": "a", "topic": None}, "b", tools=[], note=None, source=""),
        {"messages": [{**turn, "tool_calls": [], "name": None} for turn in messages("a", "b")]},
    )
    assert turns_of(path) == [("user", "a"), ("assistant", "b")]


def test_an_ignored_key_may_be_one_with_a_meaning(write: Write) -> None:
    path = write({"prompt": "a", "messages": messages("a", "b")}, {**pair("a", "b"), "text": "a b"})
    assert [found.reason for found in read_examples(path).problems] == [
        "the key 'prompt' would not be read", "the key 'text' would not be read"
    ]  # fmt: skip
    reading = read_examples(path, ignore=("prompt", "text"))
    assert [example.format for example in reading.examples] == ["messages"]


def test_a_key_that_stands_twice_is_refused_by_line(write: Write, tmp_path: Path) -> None:
    (found,) = read_examples(CASES / "duplicate-keys.jsonl").problems
    assert found.reason == "the key 'prompt' stands twice in one object, so one of its values would be lost"
    inner = b'{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
    (found,) = read_examples(write(pair(), inner, pair("Last"))).problems
    assert (found.line, "'content' stands twice" in found.reason) == (2, True)
    path = tmp_path / "list.json"
    path.write_bytes(b"[" + json.dumps(pair()).encode() + b",\n" + inner + b"]")
    reading = read_examples(path)
    assert [(found.line, "'content'" in found.reason) for found in reading.problems] == [(2, True)]
    assert len(reading.examples) == 1


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_objects_over_several_lines_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (
        "\ufeff" + (CASES / "pretty.json").read_text(),
        json.dumps(pair("q", "a"), indent=2),
        "\n\n".join(json.dumps(pair("q", "a"), indent=2) for _ in range(3)) + "\n",
        json.dumps([pair("q", "a")], indent=1),
        json.dumps({"messages": messages("q", "a")}, indent=4),
    ):
        path.write_text(content, encoding="utf-8")
        assert turns_of(path) == [("user", "q"), ("assistant", "a")]
    path.write_text('{\n "prompt": "q",\n "prompt": "r",\n "completion": "a"\n}')
    assert "'prompt' stands twice" in read_examples(path).problems[0].reason
    path.write_text('{\n "prompt": "q",\n}')
    with pytest.raises(CogpressError, match=r"holds JSON over several lines, which cannot be read: .* line 3"):
        read_examples(path)


def test_a_file_of_lines_whose_first_is_bad_stays_one_of_lines(write: Write) -> None:
    reading = read_examples(write(b'{"prompt": "Hi", ', pair(), name="examples.json"))
    assert [found.line for found in reading.problems] == [1]
    assert len(reading.examples) == 1
    wrapped = read_examples(write({"data": [pair(), 3]}, name="wrapped.json"))
    assert [found.reason for found in wrapped.problems] == ["a number and not a JSON object"]


def test_every_kind_of_bad_line_can_be_skipped(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    deep: Any = "a"
    for _ in range(400):
        deep = [deep]
    path = write(
        b"{", b'{"text": "a", "text": "b"}', b"\xff", 3, pair(id=1), pair({"prompt": deep}), pair({"\ud800": "a"}),
        pair({"a": "b"}), pair("<|im_end|>"), {"messages": messages("a")}, pair("Good?", "Yes."),
    )  # fmt: skip
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])  # a first line of "{" opens an object over several lines
    prepared = prepare(path, skip_bad=True)
    assert [example.answer for example in prepared.train_examples][-1] == "Yes."
    assert {found.line for found in prepared.report.problems} >= {1, 2, 3, 4, 6, 7, 8, 9}


@pytest.mark.parametrize("depth", [100, 300, 450, 900])
def test_deeply_nested_tools_are_a_bad_line_at_most(
    depth: int, write: Write, prepare: Callable[..., data.Prepared]
) -> None:
    deep: Any = {}
    for _ in range(depth):
        deep = {"properties": deep}
    row = {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}], **pair()}
    prepared = prepare(
        write(row, pair("Good?", "Yes.")), tokenizer=tokenizer_of(SHAPES["qwen3"]), max_length=10**6, skip_bad=True
    )
    assert prepared.train_examples[-1].answer == "Yes."
