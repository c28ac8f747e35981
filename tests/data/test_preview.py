"""What scripts/data shows is what training sees: the same rows, and every key."""

from __future__ import annotations

import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from cogpress import config, prompts
from cogpress.data import prepare as data
from cogpress.data import preview
from cogpress.data.example import key_paths
from cogpress.prompts import NO_LOSS
from tests import Script
from tests.standins.chatexamples import Write, messages, pair
from tests.standins.shapes import SHAPES, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDE = "漢字 🎈é <script>alert(1)</script> [bold]"
TOOL = {"type": "function", "function": {"name": "stock", "parameters": {}}}
CALL = {"function": {"name": "stock", "arguments": {"sku": 7}}}
ROWS: list[dict[str, Any]] = [
    {"tools": [TOOL], "messages": [*messages("How many?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    {"messages": [*messages("Why?"), {"role": "assistant", "content": WIDE, "reasoning_content": "Because."}]},
    pair("word " * 300, "b", weight=2, id=1),
    *[pair(f"question {number} " * number, "b", id=1) for number in range(1, 9)],
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of(SHAPES["qwen3"])


@pytest.fixture
def made(tokenizer: PreTrainedTokenizerBase, write: Write) -> preview.Preview:
    settings = config.parse({"data": {"ignore": ["id"], "validation_share": 0}, "train": {"max_length": 400}}, "test")
    return preview.make(write(*ROWS), tokenizer=tokenizer, settings=settings)


def printed(made: preview.Preview, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    console.print(preview.printed(made, console), highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["qwen3", "mistral-v1", "gemma3", "sentencepiece"])
def test_tokens_are_the_rows_text(name: str) -> None:
    tokenizer = tokenizer_of(SHAPES[name])
    asked = prompts.Question("Say  it:\n" + WIDE)
    example = prompts.with_answer(asked, config.Prompt(), [{"role": "assistant", "content": WIDE + "\n x"}])
    [row] = prompts.rows(tokenizer, [example])
    found = preview.tokens(tokenizer, row)
    assert sum(token.count for token in found) == len(row.input_ids)
    assert "".join(token.text for token in found).strip() == tokenizer.decode(row.input_ids).strip()
    assert sum(token.count for token in found if token.learnt) == row.learnt
    answer = tokenizer.decode([label for label in row.labels if label != NO_LOSS])
    assert "".join(token.text for token in found if token.learnt).strip() == answer.strip()
    assert "漢" in {token.text for token in found}, "tokens of one character are one piece"


def test_rows_are_those_of_the_training(made: preview.Preview, tokenizer: PreTrainedTokenizerBase) -> None:
    prepared = data.prepare(
        made.path,
        tokenizer=tokenizer,
        prompt=config.Prompt(),
        data=config.Data(ignore=("id",), validation_share=0),
        max_length=400,
        seed=0,
    )
    assert [some for _, some in made.shown] == [preview.tokens(tokenizer, row) for row in prepared.train[:3]]
    assert made.report.to_dict() == prepared.report.to_dict()
    assert made.refused == ""


def test_every_key_is_named_with_its_meaning(made: preview.Preview) -> None:
    assert {name: count for name, count, _ in made.keys} == {
        "tools": 1, "messages": 2, "messages[].role": 2, "messages[].content": 2, "messages[].tool_calls": 1,
        "messages[].reasoning_content": 1, "prompt": 9, "completion": 9, "weight": 1, "id": 9,
    }  # fmt: skip
    said = {name: meaning for name, _, meaning in made.keys}
    assert said["id"] == "left out by data.ignore"
    assert said["messages[].reasoning_content"] == "reasoning before the answer, learnt"
    assert not [name for name, meaning in said.items() if "not read" in meaning]
    silent = {"messages": [{"role": "assistant", "content": "x", "weight": 0, "train": False, "name": None}]}
    assert {"messages[].weight", "messages[].train"} < key_paths(silent), "what is 0 or false is given all the same"
    assert "messages[].name" not in key_paths(silent)


def test_it_fits_a_terminal(made: preview.Preview) -> None:
    plain = printed(made, force_terminal=False)
    assert max(map(len, plain.splitlines())) <= 80
    for part in ("⟦<think>\nBecause.\n</think>", '⟦<tool_call>\n{"name": "stock"', "too long", "reasoning_content"):
        assert part in plain
    assert WIDE in plain.replace("\n", " ")
    coloured = printed(made, force_terminal=True, color_system="truecolor", no_color=False)
    assert "⟦" not in coloured
    green = "".join(re.findall(r"\x1b\[30;(?:102|42)m(.*?)\x1b\[0m", coloured))
    assert "<tool_call>" in green
    assert "Because." in green
    assert "How many?" not in green


def test_a_long_row_is_shortened_in_a_terminal_alone(tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
    made = preview.make(write(pair("first " + "word " * 900 + "last", "b")), tokenizer=tokenizer, settings=long_rows())
    plain = printed(made, force_terminal=False)
    [left_out] = re.findall(r"… ([\d,]+) more …", plain)
    some = made.shown[0][1]
    asked = next(index for index, token in enumerate(some) if token.learnt)
    assert int(left_out.replace(",", "")) == asked - 2 * preview.CONTEXT
    assert "first" in plain
    assert "last" in plain
    assert len(re.findall(r'<span class="[gl][01]">', preview.page(made).partition("<pre>")[2])) == len(some)


def long_rows() -> config.Config:
    return config.parse({"train": {"max_length": 8192}, "data": {"validation_share": 0}}, "test")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}, "the page loads nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_every_token_and_runs_nothing(made: preview.Preview) -> None:
    page = _Text()
    page.feed(preview.page(made))
    assert "script" not in page.tags
    assert WIDE in page.text
    for _, some in made.shown:
        assert "".join(token.text for token in some) in page.text.replace("↵", "")
    learnt = "".join(re.findall(r'<span class="l[01]">(.*?)</span>', preview.page(made)))
    assert "&lt;tool_call&gt;" in learnt


def test_a_refused_file_is_shown_as_far_as_it_goes(tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
    path = write(pair("a", "b"), pair("c", "d", topic="e"), b'{"prompt": ')
    made = preview.make(path, tokenizer=tokenizer, settings=long_rows())
    assert made.refused.startswith("2 of 3 lines cannot be used")
    assert ("topic", 1, "not read: its rows are bad lines; name it in data.ignore") in made.keys
    assert len(made.shown) == 1
    nothing = preview.make(write(b'{"prompt": '), tokenizer=tokenizer, settings=long_rows())
    assert (nothing.shown, "leaves nothing to train on" in nothing.refused) == ([], True)
    assert "bad line" in printed(nothing, force_terminal=False)
    assert nothing.refused.split(":")[0] in preview.page(nothing)


def test_a_bar_holds_only_rows_that_fit_or_only_longer_ones() -> None:
    for lengths, most in (([1, 2, 3], 512), ([5, 99, 100, 101, 1000], 100), ([], 8), ([7], 7)):
        report = data.Report(lengths=lengths, max_length=most)
        bars = preview.histogram(report)
        assert sum(count for _, _, count in bars) == len(lengths)
        assert not [bar for bar in bars if bar[0] <= most < bar[1] and most < max(lengths)]
        assert all(bar[1] + 1 == following[0] for bar, following in itertools.pairwise(bars))


def test_fields_are_keys(tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
    settings = config.parse({"prompt": {"template": "{a} {b}"}, "data": {"validation_share": 0}}, "test")
    made = preview.make(write(pair({"a": "x", "b": 2}, "c")), tokenizer=tokenizer, settings=settings)
    assert [name for name, _, _ in made.keys] == ["completion", "prompt", "prompt.a", "prompt.b"]
    assert made.keys[2][2] == "a field of prompt.template"


def test_the_script_needs_a_tokenizer_alone(
    tokenizer: PreTrainedTokenizerBase,
    write: Write,
    tmp_path: Path,
    script: Script,
) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    page = tmp_path / "data.html"
    (tmp_path / "base" / "config.json").write_text("{}")
    given = ["--base", tmp_path / "base", "--html", page, "--rows", "1"]
    status, shown, _ = script("data", write(pair({"question": "a", "columns": ["b"]}, "c")), *given)
    assert status == 0
    assert "Row 1 (training)" in shown
    assert "Row 1 (training)" in page.read_text(encoding="utf-8")
    status, _, error = script("data", write(pair("a", "b"), b'{"prompt": '), *given)
    assert status == 1
    assert "1 of 2 lines cannot be used" in error
