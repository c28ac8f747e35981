"""Preparing examples: what is counted and left out, the split, and the report."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from cogpress import config, plots
from cogpress.data import prepare as data
from cogpress.data.prepare import read_examples
from cogpress.errors import CogpressError
from tests.standins.chatexamples import Write, learnt, messages, numbered, pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# --- preparing --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_lines_are_all_named_and_refused_unless_skipped(
    write: Write, prepare: Callable[..., data.Prepared]
) -> None:
    path = write(*[pair() if number % 2 else {"text": number} for number in range(60)])
    with pytest.raises(data.BadDataError) as raised:
        prepare(path)
    text = str(raised.value)
    assert text.startswith("30 of 60 lines cannot be used: examples.jsonl line 1: text is a number and not a string; ")
    assert "line 9:" in text
    assert "line 11:" not in text
    assert "and 25 more" in text
    assert "--skip-bad-lines" in text
    report = raised.value.report
    assert [found.line for found in report.problems] == list(range(1, 60, 2))
    said = report.to_dict()
    assert said["bad_lines"] == 30
    assert len(said["first_bad_lines"]) == 20
    assert json.loads(json.dumps(said)) == said

    prepared = prepare(path, skip_bad=True)
    assert len(prepared.train) == 1
    assert prepared.report.duplicates == 29
    assert len(prepared.report.problems) == 30


def test_what_is_counted_and_left_out(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    path = write(
        pair("One?", "1"),
        pair("One?", "1"),
        {"messages": messages("One?", "1")},
        pair("One?", "I"),
        pair("Two?", "  "),
        {"text": " "},
        pair("Long?", "word " * 300),
        pair("word " * 300, "Yes."),
        {"text": "word " * 300},
    )
    prepared = prepare(path)
    report = prepared.report
    assert (report.lines, report.empty_answers, report.duplicates) == (9, 2, 2)
    assert (report.too_long, report.no_room, report.cut) == (2, 1, 1)
    assert report.formats == {"prompt/completion": 5, "text": 1, "messages": 1}
    assert [example.answer for example in prepared.train_examples] == ["1", "I", "word " * 300]
    assert len(prepared.train[2].input_ids) == 256 == len(prepared.train[2].labels)
    assert report.train == 3
    assert report.validation == 0
    assert len(report.lengths) == 5
    assert report.length_max == max(report.lengths) > 300
    assert report.tokens == sum(len(row.input_ids) for row in prepared.train)
    assert report.learnt_tokens == sum(row.learnt for row in prepared.train)
    kept = prepare(path, max_length=report.length_max).report
    assert (kept.too_long, kept.cut, kept.length_max) == (0, 0, report.length_max)


def test_nothing_left(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    with pytest.raises(data.BadDataError, match=r"of 2 lines, 1 empty answers, 1 longer than 64 tokens"):
        prepare(write(pair(completion=""), pair("word " * 99)), max_length=64)


def test_validation_file_and_leakage(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    validation = write(pair("one  IS\n", "x"), pair("One is", "y"), pair("Three is", "3"), name="validation.jsonl")
    path = write(pair("One is", "1"), pair("Two is", "2"))
    prepared = prepare(path, data=config.Data(validation_share=0.5), validation_path=validation)
    assert [example.prompt for example in prepared.validation_examples] == ["Three is"]
    assert len(prepared.train) == 2, "the file wins over the share"
    assert (prepared.report.leaked, prepared.report.near_leaked, prepared.report.lines) == (2, 1, 5)
    with pytest.raises(data.BadDataError, match=r"nothing to validate with.* 2 with a prompt that is also trained on"):
        prepare(path, validation_path=path)


def test_problems_name_their_file(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    with pytest.raises(CogpressError, match=r"2 of 3 lines.* a.jsonl line 1: .* b.jsonl line 2: "):
        prepare(write(3, name="a.jsonl"), validation_path=write(pair(), 4, name="b.jsonl"))


def test_the_table_says_what_was_done(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    path = write(*numbered(40), *[{"text": number, "[red]": 1} for number in range(25)], pair("Long?", "word " * 300))
    out = io.StringIO()
    report = prepare(path, skip_bad=True, data=config.Data(validation_share=0, ignore=("[red]",))).report
    Console(file=out, width=120).print(report.table())
    text = out.getvalue()
    assert f"left out: over 256 tokens; max_length {report.length_max} would keep all" in text
    assert text.count("text is a number") == 20
    assert "5 │ more" in text
    assert "66 │ 41 prompt/completion" in text
    assert "25 │ '[red]': left out by data.ignore" in text


def test_a_report_of_nothing_has_a_table() -> None:
    Console(file=io.StringIO()).print(data.Report().table())


# --- split ------------------------------------------------------------------------------------------------------------


def test_the_split_depends_on_seed_and_prompts_alone(write: Write) -> None:
    examples = read_examples(write(*numbered(200))).conversations
    chosen = data.split(examples, 0.1, 3)
    assert len(chosen) == 20
    assert chosen == data.split(examples, 0.1, 3) != data.split(examples, 0.1, 4)
    shuffled = random.Random(1).sample(examples, len(examples))
    prompts = {examples[index].prompt for index in chosen}
    assert {shuffled[index].prompt for index in data.split(shuffled, 0.1, 3)} == prompts
    other_answers = read_examples(write(*[row | {"completion": "?"} for row in numbered(200)])).conversations
    assert data.split(other_answers, 0.1, 3) == chosen


@pytest.mark.parametrize(("count", "share", "expected"), [(20, 0.01, 1), (19, 0.01, 0), (4, 0.5, 2), (100, 0.0, 0)])
def test_how_many_validate(write: Write, count: int, share: float, expected: int) -> None:
    assert len(data.split(read_examples(write(*numbered(count))).conversations, share, 0)) == expected


@pytest.mark.parametrize("seed", range(10))
def test_equal_prompts_stay_together(write: Write, seed: int) -> None:
    rows = [pair(f"{'Question' if n % 2 else 'question '} {n // 3}", f"answer {n}") for n in range(90)]
    examples = read_examples(write(*rows)).conversations
    chosen = data.split(examples, 0.2, seed)
    sides = [{" ".join(e.prompt.casefold().split()) for i, e in enumerate(examples) if (i in chosen) is side}
             for side in (True, False)]  # fmt: skip
    assert not sides[0] & sides[1]
    assert len(chosen) == 18


def test_one_prompt_or_groups_larger_than_the_share(write: Write, prepare: Callable[..., data.Prepared]) -> None:
    path = write(*[pair("Same", str(number)) for number in range(40)])
    prepared = prepare(path, data=config.Data(validation_share=0.1))
    assert len(prepared.train) == 40
    assert "there is no validation" in prepared.report.notes[0]
    path = write(*[pair(str(number // 10), str(number)) for number in range(20)])
    assert len(prepare(path, data=config.Data(validation_share=0.05)).validation) == 10


def test_split_and_rows_go_together(
    write: Write, prepare: Callable[..., data.Prepared], tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared = prepare(write(*numbered(50)), data=config.Data(validation_share=0.1))
    assert (len(prepared.train), len(prepared.validation)) == (45, 5)
    for examples, rows in (
        (prepared.train_examples, prepared.train), (prepared.validation_examples, prepared.validation)
    ):  # fmt: skip
        for example, row in zip(examples, rows, strict=True):
            assert learnt(tokenizer, row) == example.answer + "<|im_end|>"
    assert prepare(write(*numbered(50)), data=config.Data(validation_share=0.1)).train == prepared.train


# --- picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[], [5], [30, 40, 2000], list(range(1, 900)), [10] * 500 + [100_000]])
def test_the_histogram_is_drawn(tmp_path: Path, lengths: list[int]) -> None:
    path = tmp_path / "lengths.png"
    plots.token_lengths(lengths, 512, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content[16:24] == (960).to_bytes(4, "big") + (540).to_bytes(4, "big")
