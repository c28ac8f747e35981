"""Examples from file to messages: every format and kind of file, and every way a line can be bad."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest

from cogpress import config
from cogpress.data.prepare import Reading, read_examples
from cogpress.data.read import rows
from cogpress.errors import CogpressError
from cogpress.prompts import Conversation
from tests.standins.chatexamples import Write, messages, pair

if TYPE_CHECKING:
    pass


def problem(path: Path, **options: Any) -> str:
    """The one problem a file has."""
    (found,) = read_examples(path, **options).problems
    return found.reason


def only(reading: Reading) -> Conversation:
    assert not reading.problems
    (conversation,) = reading.conversations
    return conversation


def system_of(conversation: Conversation) -> str:
    assert conversation.messages[0]["role"] == "system"
    return str(conversation.messages[0]["content"])


# --- formats ----------------------------------------------------------------------------------------------------------


def test_the_four_formats_in_one_file(write: Write) -> None:
    reading = read_examples(
        write(
            {"messages": messages("Hi", "Hello", "Bye", "So long", system="Be kind"), "id": 7},
            pair(source="somewhere"),
            pair(messages("Hi"), messages("", "Hello")[1:]),
            {"instruction": "Add", "input": "2, 2", "output": "4", "text": None},
            {"instruction": "Greet", "input": "", "output": "Hello"},
            {"instruction": "Greet", "output": "Hello"},
            {"text": "Once upon a time"},
        ),
        ignore=("id", "source"),
    )
    assert not reading.problems
    assert reading.lines == 7
    assert [example.format for example in reading.examples] == [
        "messages", "prompt/completion", "prompt/completion", "alpaca", "alpaca", "alpaca", "text"
    ]  # fmt: skip
    assert [example.line for example in reading.examples] == [1, 2, 3, 4, 5, 6, 7]
    conversation, simple, listed, alpaca, empty_input, no_input, text = reading.conversations
    assert (system_of(conversation), conversation.answer) == ("Be kind", "So long")
    assert conversation.prompt == "Hi\n\nHello\n\nBye"
    assert conversation.asked[-1] == {"role": "user", "content": "Bye"}
    assert (simple.prompt, simple.answer) == ("What is two and two?", "Four.")
    assert (listed.prompt, listed.answer) == ("Hi", "Hello")
    assert (alpaca.prompt, alpaca.answer) == ("Add\n\n2, 2", "4")
    assert empty_input.messages == no_input.messages
    assert text.messages == ()
    assert text.answer == "Once upon a time"
    assert text.prompt == ""
    assert text.asked == []


def test_a_null_is_no_key(write: Write) -> None:
    [example] = read_examples(write({"messages": None, "prompt": "Hi", "completion": "Hello", "text": None})).examples
    assert example.format == "prompt/completion"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'prompt': 1}", "not JSON: Expecting property name"),
        (b'{"prompt": "Hi", ', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"text": "a\0b"}', "NUL"),
        (b'{"text": "a\\u0000b"}', "text contains a NUL"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        ([1, 2], "a list and not a JSON object"),
        ("text", "a string and not a JSON object"),
        (None, "null and not a JSON object"),
        (
            {},
            "unknown format: neither messages, nor prompt and completion, nor instruction and output, "
            "nor conversations, nor text; it has",
        ),
        ({"question": "Hi", "answer": "Hello"}, "it has 'question', 'answer'"),
        ({"prompt": "Hi", "completion": None}, "prompt without completion: it has 'prompt'; if it has the same under"),
        ({"instruction": "Hi", "response": "Hello"}, "instruction without output: it has 'instruction', 'response'"),
        ({f"key {number}\x1b[31m": 1 for number in range(20)}, "'key 7\\x1b[31m', ..."),
        ({"text": 3}, "text is a number and not a string"),
        ({"text": True}, "text is a boolean and not a string"),
        (pair(3), "prompt is a number and not a string"),
        (pair(completion={"a": 1}), "completion is an object and not a string"),
        (pair("  \n"), "the prompt is empty"),
        (pair({"topic": "tea"}), "fields are prompt; the input lacks prompt"),
        (pair({"prompt": " "}), "nothing to answer"),
        (pair({"prompt": ["a\0b"]}), "prompt.prompt[0] contains a NUL"),
        (pair({"prompt": "\ud800"}), "prompt.prompt contains half of a surrogate pair"),
        ({"instruction": "", "output": "Hello"}, "instruction is empty"),
        ({"instruction": "Hi", "input": 3, "output": "Hello"}, "input is a number and not a string"),
        ({"messages": "Hi"}, "messages is a string and not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["Hi"]}, "messages[0] is a string and not an object"),
        (
            {"messages": [{"content": "Hi"}]},
            "messages[0] has neither role and content nor from and value; it has 'content'",
        ),
        ({"messages": [{"role": 3, "content": "Hi"}]}, "messages[0] has the role 3"),
        ({"conversations": [{"input": "Hi", "output": "a"}]}, "conversations[0] has neither role"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "messages[0] has the role 'human'"),
        ({"messages": [{"role": "", "content": "Hi"}]}, "messages[0] has the role ''"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0] has the role ['user']"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null and not a string"),
        ({"messages": messages("Hi")}, "ends with user"),
        ({"messages": messages("Hi", "Hello", system="Be kind")[:1]}, "ends with system"),
        ({"messages": messages("Hi", "Hello")[1:]}, "message 1 is assistant, but first comes system or user"),
        ({"messages": messages("Hi") + messages("Hi", "Hello")}, "message 2 is user, but after user comes assistant"),
        ({"messages": messages("Hi", "a") + messages("b", "c", system="d")}, "message 3 is system"),
        ({"messages": messages(" ", "Hello")}, "the prompt is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(write: Write, line: Any, reason: str) -> None:
    reading = read_examples(write(pair(), line, pair()))
    (found,) = reading.problems
    assert reason in found.reason
    assert found.line == 2
    assert len(reading.examples) == 2
    assert reading.lines == 3
    assert "\n" not in found.reason
    assert "\x1b" not in found.reason


def test_tools_may_answer_between(write: Write) -> None:
    turns = [
        *messages("Weather?", "call"),
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    assert only(read_examples(write({"messages": turns}))).answer == "Sun."


def test_a_line_of_many_megabytes_is_refused_and_the_next_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogpress.data.read.MAX_LINE_BYTES", 2**20)
    reading = read_examples(write({"text": "a" * 3 * 2**20}, pair(), b"{" * 2**21, pair("Last")))
    assert [(found.line, found.reason) for found in reading.problems] == [
        (1, "longer than 1 MiB"),
        (3, "longer than 1 MiB"),
    ]
    assert [example.line for example in reading.examples] == [2, 4]


# --- files ------------------------------------------------------------------------------------------------------------


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "b\xc3\xa9"}')
    reading = read_examples(path)
    assert [one.answer for one in reading.conversations] == ["a", "bé"]
    assert [example.line for example in reading.examples] == [1, 4]
    assert reading.lines == 2
    assert not reading.problems


def test_line_separators_in_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert only(read_examples(path)).answer == "a\u2028b\x85c"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "examples.json"
    path.write_text("\n " + json.dumps([pair(), 3, pair("Again")], indent=indent))
    reading = read_examples(path)
    assert [example.line for example in reading.examples] == [1, 3]
    assert [(found.line, found.reason) for found in reading.problems] == [(2, "a number and not a JSON object")]


def test_many_objects_over_several_lines_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join([json.dumps(pair("q", "a"), indent=1)] * 40_000))
    began = time.process_time()
    assert sum(1 for _ in rows(path, ("prompt",))) == 40_000
    assert time.process_time() - began < 15


def test_json_lines_named_json(write: Write) -> None:
    assert len(read_examples(write(pair(), pair(), name="examples.json")).examples) == 2


def test_a_broken_json_list(write: Write) -> None:
    with pytest.raises(CogpressError, match=r"begins like a JSON list but is not JSON: .*line 2 column 1"):
        read_examples(write(b'[{"text": "a"},', name="examples.json"))


@pytest.mark.parametrize("name", ["examples.jsonl.gz", "examples.json.gz", "examples.jsonl"])
def test_gzip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(pair()).encode() + b"\n"))
    assert only(read_examples(path)).answer == "Four."


@pytest.mark.parametrize("kept", [30, 60])
def test_broken_gzip(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "examples.jsonl.gz"
    path.write_bytes(gzip.compress(random.Random(0).randbytes(1000))[:kept])
    with pytest.raises(CogpressError, match=r"cannot be read"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "holds no examples"),
        ("blank.jsonl", b"\n \r\n", "holds no examples"),
        ("mark.jsonl", b"\xef\xbb\xbf", "holds no examples"),
        ("none.json", b"[]", "holds no examples"),
        ("examples.csv", b"a,b", r"has an unknown suffix.*: pandas\.read_csv"),
        ("examples.jsonl.zst", b"a", "has an unknown suffix"),
        ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("bad.parquet", b"PAR1 and then nothing", "not readable as Parquet|cannot be read"),
        ("empty.parquet", b"", "not readable as Parquet|cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CogpressError, match=said) as raised:
        read_examples(path)
    assert name in str(raised.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="does not exist"):
        read_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(CogpressError, match="is not a file"):
        read_examples(tmp_path)


def test_parquet_with_mixed_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogpress.data.read._PARQUET_BATCH", 2)
    path = tmp_path / "examples.parquet"
    rows = [
        {"prompt": "Hi", "completion": "Hello", "messages": None, "text": None, "id": 1},
        {"prompt": None, "completion": None, "messages": messages("Hi", "Hello"), "text": None, "id": 2},
        {"prompt": None, "completion": "Hello", "messages": None, "text": None, "id": 3},
        {"prompt": None, "completion": None, "messages": None, "text": "Once", "id": 4},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    unread = read_examples(path)
    assert not unread.examples
    assert [found.reason for found in unread.problems][:2] == ["the key 'id' would not be read"] * 2
    reading = read_examples(path, ignore=["id"])
    assert [(example.format, example.line) for example in reading.examples] == [
        ("prompt/completion", 1), ("messages", 2), ("text", 4)
    ]  # fmt: skip
    assert [(found.line, found.reason.split(";")[0]) for found in reading.problems] == [
        (3, "completion without prompt: it has 'completion'")
    ]


def test_parquet_text_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    column = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column.view(pyarrow.string())}), path)
    reading = read_examples(path)
    assert [(found.line, found.reason) for found in reading.problems] == [(2, "not UTF-8")]
    assert [one.answer for one in reading.conversations] == ["good", "fine"]


def test_parquet_without_a_known_column(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(CogpressError, match=r"none of the columns .*; it has 'question', 'answer'"):
        read_examples(path)


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(CogpressError, match="holds no examples"):
        read_examples(path)


# --- prompt and task --------------------------------------------------------------------------------------------------


def test_the_system_text_goes_before_messages_that_have_none(write: Write) -> None:
    path = write({"messages": messages("Hi", "Hello", system="Mine")}, pair(), {"messages": messages("Hi", "Hello")})
    own, simple, conversation = read_examples(path, prompt=config.Prompt(system="Be brief.")).conversations
    assert [system_of(one) for one in (own, simple, conversation)] == ["Mine", "Be brief.", "Be brief."]


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": "b"}\n', '[{"text": "a"}, {"text": "b"}]'])
def test_a_file_without_a_suffix_is_told_by_its_content(tmp_path: Path, content: str) -> None:
    """Cog downloads a training's file to such a name."""
    path = tmp_path / "tmpfile"
    path.write_text(content)
    assert [one.text for one in read_examples(path).conversations] == ["a", "b"]


def test_the_template_is_filled_as_the_server_fills_it(write: Write) -> None:
    one = config.Prompt(template="Q: {question}")
    several = config.Prompt(template="{a} of {b}")
    path = write(pair("Why?"), pair({"question": "Why?"}), {"instruction": "Why?", "output": "So."})
    assert [one.prompt for one in read_examples(path, prompt=one).conversations] == ["Q: Why?"] * 3
    path = write(pair({"a": "tea", "b": ["x", "y"]}), pair("as it is"))
    assert [one.prompt for one in read_examples(path, prompt=several).conversations] == ["tea of x\ny", "as it is"]
    path = write({"messages": messages("Hi", "Hello")})
    assert only(read_examples(path, prompt=one)).prompt == "Hi", "a chat is taken as it is"


def test_reversed_swaps_question_and_answer(write: Write) -> None:
    path = write(
        pair("Name a tea", "Assam"),
        {"messages": messages("Name a tea", "Assam", system="Be brief.")},
        {"instruction": "Name", "input": "tea", "output": "Assam"},
    )
    form = config.Prompt(template="<{it}>")
    simple, conversation, alpaca = read_examples(path, prompt=form, task="reversed").conversations
    assert (simple.prompt, simple.answer) == ("<Assam>", "Name a tea")
    assert (conversation.prompt, conversation.answer) == ("<Assam>", "Name a tea")
    assert system_of(conversation) == "Be brief."
    assert (alpaca.prompt, alpaca.answer) == ("<Assam>", "Name\n\ntea")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"messages": messages("a", "b", "c", "d")}, "several turns cannot be learned reversed"),
        ({"text": "Once"}, "text has no prompt"),
        (pair({"prompt": "a"}), "object of fields"),
    ],
)
def test_what_cannot_be_reversed(write: Write, item: dict[str, Any], reason: str) -> None:
    assert reason in problem(write(item), task="reversed")


def test_reversed_needs_one_field(write: Write) -> None:
    with pytest.raises(CogpressError, match="fields a, b"):
        read_examples(write(pair()), prompt=config.Prompt(template="{a}{b}"), task="reversed")
