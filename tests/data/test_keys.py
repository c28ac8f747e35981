"""No key of a row vanishes: each has a meaning, or is refused by name, or `data.ignore` names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest

from cogpress import config
from cogpress.data import prepare as data
from cogpress.data.example import key_paths
from cogpress.data.prepare import read_examples
from cogpress.errors import CogpressError
from cogpress.quantize import calibrate
from cogpress.serve import requests
from cogpress.verify import run as verify
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


def called(path: Path) -> list[Any]:
    """The arguments of the call in each of a file's examples."""
    reading = read_examples(path)
    assert not reading.problems
    return [one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in reading.conversations]


def test_a_null_argument_is_learnt(write: Write, tmp_path: Path) -> None:
    """Pydantic writes `default: null` for an optional parameter, and a client of the served model sends it."""
    city = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"sku": {}, "city": city}}}}]
    arguments = {"sku": "A7", "city": None}
    rows = []
    for given in (arguments, json.dumps(arguments)):
        call = {"id": None, "function": {"name": "f", "arguments": given}}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows += [{"tools": tools, "messages": turns}, {"tools": tools, "messages": json.dumps(turns)}]
    path = write(*rows)
    assert called(path) == [arguments] * 4
    for one in read_examples(path).conversations:
        assert list(one.tools) == requests.tools(json.dumps(tools))


def test_nulls_that_a_table_fills_in_are_absent(write: Write, tmp_path: Path) -> None:
    """All objects of a column have the keys of each, in Parquet and in what is exported from it."""

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        tools = [{"function": {"name": name, "parameters": {"properties": {key: {} for key in arguments}}}}]
        call = {"function": {"name": name, "arguments": arguments}}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"tools": json.dumps(tools), "messages": turns}

    expected = [{"sku": "A7"}, {"city": "Bonn"}]
    table = pyarrow.Table.from_pylist([row("stock", expected[0]), row("weather", expected[1])])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    exported = write(*table.to_pylist())
    assert '"city": null' in exported.read_text()
    assert called(tmp_path / "rows.parquet") == called(exported) == expected


def test_turns_in_json_text_lose_no_key(write: Write) -> None:
    turns = messages("a", "b")
    path = write({"messages": json.dumps([{**turns[0], "mood": "glad"}, turns[1]])})
    (found,) = read_examples(path).problems
    assert found.reason == "the key 'mood' would not be read"
    reading = read_examples(path, ignore=("mood",))
    assert (reading.ignored_keys, len(reading.examples)) == ({"mood": 1}, 1)
    assert "messages[].mood" in key_paths(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": {}}, None),
        ({"tools": " "}, None),
        ({"tools": {"name": "find"}}, "tools is an object and not a list"),
        ({"tools": [{"name": "find"}, {"type": "function", "name": "look", "parameters": {}}]}, None),
        ({"tools": [{"description": "find"}]}, "tools[0] must be"),
        ({"tools": [{"type": "web_search", "name": "find"}]}, "tools[0] must be"),
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
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "messages[1]: each of tool_calls must be"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "result": 12}]},
            "The call of f in messages[1] has the key 'result'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": math.nan}}]},
            "messages[1].tool_calls.function.arguments.a is nan, which is no number in JSON",
        ),
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


CALL = {"name": "stock_level", "arguments": {"sku": "A7"}}
FUNCTIONS = [{"name": "stock_level", "description": "Units on the shelf", "parameters": {"type": "object"}}]


@pytest.mark.parametrize("calls", [CALL, [CALL, {**CALL, "arguments": json.dumps({"sku": "B8"})}]])
def test_function_turns_of_sharegpt_are_calls_and_their_results(
    write: Write, prepare: Callable[..., data.Prepared], calls: Any
) -> None:
    turns = [
        {"from": "human", "value": "How many A7?"},
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": '{"units": 12}'},
        {"from": "gpt", "value": "Twelve."},
    ]
    tokenizer = tokenizer_of(SHAPES["qwen2.5"])
    several = calls if isinstance(calls, list) else [calls]
    as_openai: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "How many A7?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": one} for one in several]},
            {"role": "tool", "content": '{"units": 12}'},
            {"role": "assistant", "content": "Twelve."},
        ],
        "tools": [{"type": "function", "function": FUNCTIONS[0]}],
    }
    path = write({"conversations": turns, "tools": json.dumps(FUNCTIONS)})
    made = prepare(path, tokenizer=tokenizer, max_length=1024).train
    assert made == prepare(write(as_openai, name="openai.jsonl"), tokenizer=tokenizer, max_length=1024).train
    written = learnt(tokenizer, made[0])
    assert '<tool_call>\n{"name": "stock_level", "arguments": {"sku": "A7"}}\n</tool_call>' in written
    assert written.endswith("<|im_end|>Twelve.<|im_end|>")
    assert "units" not in written


def test_calls_of_a_row_are_its_answer(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    """As xLAM's rows have them, under other names."""
    row = {"query": "How many A7?", "answers": json.dumps([CALL]), "tools": json.dumps(FUNCTIONS)}
    tokenizer = tokenizer_of(SHAPES["qwen2.5"])

    def made(named: str) -> data.Prepared:
        renames = config.Data(rename={"query": "prompt", "answers": named})
        return prepare(write(row), tokenizer=tokenizer, max_length=1024, data=renames)

    call = '<tool_call>\n{"name": "stock_level", "arguments": {"sku": "A7"}}\n</tool_call><|im_end|>'
    assert learnt(tokenizer, made("tool_calls").train[0]) == call
    with pytest.raises(data.BadDataError, match=r"an answer is a call of a tool as text, .* give it as tool_calls"):
        made("completion")
    null = {**row, "answers": [{**CALL, "arguments": {"sku": None}}]}
    (found,) = read_examples(write(null), rename={"query": "prompt", "answers": "tool_calls"}).conversations
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"sku": None}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("stocks", "c1", None)], "stocks is called, which is not among the row's tools"),
        ([("stock_level", "c1", "c2")], "tool_call_id 'c2' is the id of no call before it"),
        ([("stock_level", "c1", "c1"), ("stock_level", "c2", "c1")], None),
        ([("stock_level", "c1", None)], None),
    ],
)
def test_calls_and_results_belong_together(
    write: Write, turns: list[tuple[str, str, str | None]], reason: str | None
) -> None:
    made = messages("a")
    for name, id, answers in turns:
        call = {"id": id, "function": {"name": name, "arguments": {}}}
        made += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        made += [{"role": "tool", "content": "12", "tool_call_id": answers}]
    found = read_examples(write({"messages": [*made, *messages("a", "b")[1:]], "tools": FUNCTIONS})).problems
    assert [one.reason for one in found] == ([reason] if reason else [])


def test_plain_text_with_another_templates_marks_is_noted(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    path = write({"text": "[INST] a [/INST] b"}, {"text": "### Human: a\n### Assistant: b"}, {"text": "# A title"})
    (note,) = [note for note in prepare(path).report.notes if "another template" in note]
    assert note.startswith("2 plain texts look like chats")


@pytest.mark.parametrize("asked", [{"prompt": "a"}, {}])
def test_a_preference_is_refused_with_the_way_out(write: Write, asked: dict[str, str]) -> None:
    chosen: Any = "b" if asked else messages("a", "b")
    path = write({**asked, "chosen": chosen, "rejected": chosen})
    (found,) = read_examples(path).problems
    assert "chosen and rejected are a preference" in found.reason
    new = found.reason.rpartition(" ")[2]
    assert turns_of(path, ignore=("rejected",), rename={"chosen": new}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (("function", "{}"), "conversations[1] is from 'function', not system, human, gpt, function_call, observation"),
        (("function_call", "look it up"), "conversations[1].value is not JSON"),
        (("function_call", "[]"), "conversations[1].value holds no call"),
        (("function_call", '{"name": "f"}'), 'conversations[1].value is not {"name": ..., "arguments": ...}'),
        (("function_call", '{"name": "f", "arguments": [1]}'), "the arguments of f must be a JSON object"),
        (("function_call", '{"name": "f", "arguments": {"a": 1, "a": 2}}'), "the key 'a' stands twice"),
    ],
)
def test_function_turns_of_sharegpt_that_cannot_be_read(write: Write, turn: tuple[str, str], reason: str) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": turn[0], "value": turn[1]}]
    (found,) = read_examples(write({"conversations": turns})).problems
    assert reason in found.reason


def test_functions_and_calls_may_stand_without_what_openai_puts_around_them(write: Write) -> None:
    flat = {"name": "stock_level", "arguments": {"sku": "A7"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [flat]}]
    nested = [turns[0], {**turns[1], "tool_calls": [{"type": "function", "function": flat}]}]
    tools = [{"type": "function", "function": FUNCTIONS[0]}]
    path = write({"messages": turns, "tools": FUNCTIONS}, {"messages": nested, "tools": tools})
    first, second = read_examples(path).conversations
    assert first == second


@pytest.mark.parametrize(
    ("row", "rename", "turns"),
    [
        ({"question": "a", "answer": "b"}, {"question": "prompt", "answer": "completion"}, [("user", "a")]),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"context": "input", "response": "output"},
            [("user", "a\n\nc")],
        ),
        (
            {"system_prompt": "S", "question": "a", "response": "b", "system": None},
            {"system_prompt": "system", "question": "prompt", "response": "completion"},
            [("system", "S"), ("user", "a")],
        ),
        ({"dialog": messages("a", "b")}, {"dialog": "messages"}, [("user", "a")]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_keys_of_other_names_are_renamed(
    write: Write, tmp_path: Path, row: dict[str, Any], rename: dict[str, str], turns: list[tuple[str, str]], kind: str
) -> None:
    path = write({**row, "id": 7})
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "id": 7}]), path)
    assert turns_of(path, rename=rename, ignore=("id",)) == [*turns, ("assistant", "b")]


def test_names_that_cannot_be_given(write: Write) -> None:
    path = write({"question": "a", "prompt": "b", "completion": "c"})
    (found,) = read_examples(path, rename={"question": "prompt"}).problems
    assert found.reason == "it has prompt twice, as data.rename makes prompt one: leave one out"
    assert turns_of(path, rename={"question": "prompt"}, ignore=("prompt",)) == [("user", "a"), ("assistant", "c")]
    with pytest.raises(
        CogpressError, match=r"data\.rename names answer, which is no key of a row\. Choose from messages"
    ):
        read_examples(path, rename={"question": "answer"})
    (found,) = read_examples(write({"question": "a"})).problems
    assert found.reason.endswith("it has 'question'; if it has the same under other names, say so in data.rename")


def test_what_verifies_is_read_as_what_trains(write: Write, tmp_path: Path) -> None:
    write({"question": "Name a tea", "answer": "Assam", "id": 3})
    settings = config.Data(task="reversed", ignore=("id",), rename={"question": "prompt", "answer": "completion"})
    verifies = config.Verify(examples="examples.jsonl")
    [example] = verify.held_out(verifies, tmp_path, tmp_path, config.Prompt(), settings)
    assert (example.prompt, example.answer) == ("Assam", "Name a tea")


def test_messages_may_be_json_text_and_name_a_developer(write: Write) -> None:
    parts = [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "input_text", "text": "a"}]}]
    turns = [*parts, {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]}]
    for row in ({"messages": turns}, {"messages": json.dumps(turns)}):
        assert turns_of(write(row)) == [("system", "S"), ("user", "a"), ("assistant", "b")]
    (found,) = read_examples(write({"messages": "[{"})).problems
    assert "messages is not JSON" in found.reason
    (found,) = read_examples(write({"messages": [{"role": "function", "name": "f", "content": "1"}]})).problems
    assert found.reason.startswith("messages[0] has the role 'function', not system, user")


def test_turns_are_known_by_their_keys_wherever_they_stand(write: Write) -> None:
    other = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for row in ({"conversations": messages("a", "b")}, {"messages": other}, {"prompt": other[:1], "completion": "b"}):
        assert turns_of(write(row)) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_a_mask_of_turns_says_which_are_learnt(
    write: Write, prepare: Callable[..., data.Prepared], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    turns = messages("a", "WRONG DRAFT", "c", "d")
    weighted = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    expected = prepare(write({"messages": weighted}, name="weighted.jsonl")).train
    shared = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in turns]
    for row in (
        {"messages": turns, name: [0, 0, 0, 1]},
        {"conversations": shared, name: [False, False, False, True]},
        pair(turns[:1], turns[1:], **{name: [0, 0, 0, 1]}),
    ):
        assert prepare(write(row)).train == expected
    assert learnt(tokenizer, expected[0]) == "d<|im_end|>"
    assert learnt(tokenizer, prepare(write(pair("a", "b", **{name: [0, 1]}))).train[0]) == "b<|im_end|>"
    assert read_examples(write(pair("a", "b", **{name: [0, 0]}))).empty_answers == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"completion_mask": [0, 0, 0, 1, 1, 1]}, "completion_mask has 6 entries for 2 turns; a mask of tokens"),
        ({"assistant_masks": [1, 1]}, "assistant_masks[0] asks to learn a turn that is no answer"),
        ({"assistant_masks": [0, 0.5]}, "assistant_masks is no list of 1 (learnt) and 0 (not)"),
        ({"assistant_masks": "01"}, "assistant_masks is no list of 1 (learnt) and 0 (not)"),
        ({"assistant_masks": [0, 1], "completion_mask": [0, 1]}, "stand in one row: give one of them"),
    ],
)
def test_masks_that_cannot_be_used(write: Write, more: dict[str, Any], reason: str) -> None:
    (found,) = read_examples(write({"messages": messages("a", "b"), **more})).problems
    assert reason in found.reason


def test_a_mask_cannot_learn_what_is_given(write: Write) -> None:
    row = pair(messages("a", "b", "c"), "d", completion_mask=[0, 1, 0, 1])
    (found,) = read_examples(write(row)).problems
    assert found.reason == "completion_mask[1] asks to learn a turn that is no answer"


def test_rows_of_tokens_are_refused_as_such(write: Write) -> None:
    (found,) = read_examples(write({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]})).problems
    assert (
        found.reason == "input_ids are tokens, which only their own tokenizer reads: give the texts they were made from"
    )


def test_tools_and_their_results_are_written_once(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    """Hermes' rows list tools in the system text, and write the template's marks around results, themselves."""
    turns = [
        {"from": "system", "value": 'You may call <tools> [{"name": "f"}] </tools>'},
        {"from": "human", "value": "How many?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n12\n</tool_response>"},
        {"from": "gpt", "value": "Twelve."},
    ]
    path = write({"conversations": turns, "tools": json.dumps(FUNCTIONS)})
    (found,) = read_examples(path).problems
    assert "the chat template would list them again" in found.reason
    with pytest.raises(data.BadDataError, match="writes <tool_response> around a tool's result, and this one holds it"):
        prepare(path, tokenizer=tokenizer_of(SHAPES["qwen2.5"]), data=config.Data(ignore=("tools",)))
    turns[3]["value"] = "12"
    path = write({"conversations": turns, "tools": json.dumps(FUNCTIONS)})
    made = prepare(path, tokenizer=tokenizer_of(SHAPES["qwen2.5"]), data=config.Data(ignore=("tools",)), max_length=512)
    assert not made.report.problems


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
