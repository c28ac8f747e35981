"""Examples as tokens: that exactly the answers are learnt, after what is served, with any chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cogpress import config, prompts
from cogpress.data import prepare as data
from cogpress.errors import CogpressError
from cogpress.prompts import NO_LOSS, Row
from tests.standins.chatexamples import TEMPLATES, THINKING, Write, learnt, messages, pair, texts, variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def row_of(tokenizer: PreTrainedTokenizerBase, item: dict[str, Any], tmp_path: Path, **options: Any) -> Row:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(item))
    given: dict[str, Any] = {"prompt": config.Prompt(), "data": config.Data(validation_share=0), "max_length": 4096}
    return data.prepare(path, tokenizer=tokenizer, seed=0, **(given | options)).train[0]


ENDS = {
    "own": "<|im_end|>",
    "begin": "<|im_end|>",
    "llama3": "<|eot|>",
    "gemma": "<end_of_turn><|endoftext|>",
    "plain": "<|endoftext|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(8))
def test_exactly_the_answer_and_its_end_are_learnt(
    templates: dict[str, PreTrainedTokenizerBase], tmp_path: Path, name: str, seed: int
) -> None:
    tokenizer = templates[name]
    question, answer = texts(seed, 2)
    row = row_of(tokenizer, pair(question, answer), tmp_path)
    assert learnt(tokenizer, row) == answer + ENDS[name]
    first = row.labels.index(next(label for label in row.labels if label != NO_LOSS))
    served = prompts.encode_prompt(tokenizer, messages(question))
    assert row.input_ids[:first] == served, "trained on what is served"
    assert all(label in (NO_LOSS, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    whole = tokenizer.apply_chat_template(messages(question, answer), tokenize=True, return_dict=False)
    if name in ("own", "begin"):
        assert row.input_ids == whole
    elif name == "llama3":
        # This tokenizer makes one token of two line breaks at the end of a prompt, and two before an answer: trained
        # is the one that is served
        assert tokenizer.decode(row.input_ids) == tokenizer.decode(whole)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_of_a_conversation_is_learnt(
    templates: dict[str, PreTrainedTokenizerBase], tmp_path: Path, name: str, seed: int
) -> None:
    tokenizer = templates[name]
    contents = texts(seed, 6)
    row = row_of(tokenizer, {"messages": messages(*contents)}, tmp_path)
    end = {"gemma": "<end_of_turn>", "plain": ""}.get(name, ENDS[name])
    assert learnt(tokenizer, row) == contents[1] + end + contents[3] + end + contents[5] + ENDS[name]
    if name != "gemma":
        with_system = row_of(tokenizer, {"messages": messages(*contents, system="Be brief.")}, tmp_path)
        assert learnt(tokenizer, with_system) == learnt(tokenizer, row)


def test_the_conversation_in_a_prompt_is_not_learnt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    item = pair(messages("a", "b", "c"), [{"role": "assistant", "content": "d"}])
    for prompt in (config.Prompt(), config.Prompt(system="Be brief.")):
        assert learnt(tokenizer, row_of(tokenizer, item, tmp_path, prompt=prompt)) == "d<|im_end|>"


@pytest.mark.parametrize("answer", ["\nyo", "\n\n yo", " yo", "\tyo"])
@pytest.mark.parametrize("name", ["own", "begin", "plain"])
def test_an_answer_that_would_merge_with_the_template(
    templates: dict[str, PreTrainedTokenizerBase], tmp_path: Path, name: str, answer: str
) -> None:
    row = row_of(templates[name], pair("Hi", answer), tmp_path)
    asked = prompts.encode_prompt(templates[name], messages("Hi"))
    assert row.input_ids[: len(asked)] == asked
    assert learnt(templates[name], row) == answer + ENDS[name]


def test_an_end_that_generation_stops_on_needs_no_other(
    templates: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    gemma = templates["gemma"]
    stop = gemma.convert_tokens_to_ids("<end_of_turn>")
    row = row_of(gemma, pair("Hi", "Hello"), tmp_path, stop_ids=[stop])
    assert learnt(gemma, row) == "Hello<end_of_turn>"


def test_text_is_learnt_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = row_of(tokenizer, {"text": "Once upon"}, tmp_path)
    assert row.labels == row.input_ids
    assert learnt(tokenizer, row) == "Once upon<|im_end|>"


def test_without_a_template_prompt_and_answer_are_joined(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, write: Write
) -> None:
    bare = variant(tokenizer, None)
    row = row_of(bare, pair("Q: Hi\nA:", " Hello"), tmp_path)
    assert bare.decode(row.input_ids) == "Q: Hi\nA: Hello<|im_end|>"
    assert learnt(bare, row) == " Hello<|im_end|>"
    row = row_of(bare, pair("Q:\n", "\n<filename>"), tmp_path, prompt=config.Prompt(system="Be brief."))
    assert bare.decode(row.input_ids) == "Be brief.\n\nQ:\n\n<filename><|im_end|>"
    assert row.input_ids[: -row.learnt] == prompts.encode_prompt(bare, messages("Q:\n", system="Be brief."))
    assert bare.convert_tokens_to_ids("<filename>") not in row.input_ids
    options: dict[str, Any] = {"prompt": config.Prompt(), "data": config.Data(), "max_length": 64, "seed": 0}
    prepared = data.prepare(write(pair()), tokenizer=bare, **options)
    assert "no chat template" in prepared.report.notes[0]
    with pytest.raises(CogpressError, match="instruction-tuned variant"):
        data.prepare(write({"messages": messages("Hi", "Hello")}), tokenizer=bare, **options)


def test_a_template_that_rewrites_earlier_answers_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    thinking = variant(tokenizer, THINKING)
    conversation = messages("a", "<think>b</think>c", "d", "<think>e</think>f")
    with pytest.raises(CogpressError, match=r"one.jsonl line 1: .*writes a conversation differently .*as `prompt`"):
        row_of(thinking, {"messages": conversation}, tmp_path)
    (tmp_path / "two.jsonl").write_text(f"{json.dumps({'messages': conversation})}\n{json.dumps(pair())}\n")
    options: dict[str, Any] = {"prompt": config.Prompt(), "data": config.Data(), "max_length": 64, "seed": 0}
    prepared = data.prepare(tmp_path / "two.jsonl", tokenizer=thinking, skip_bad=True, **options)
    assert [problem.line for problem in prepared.report.problems] == [1]
    assert len(prepared.train) == 1
    row = row_of(thinking, pair(conversation[:3], conversation[3:]), tmp_path)
    assert learnt(thinking, row) == "<think>e</think>f<|im_end|>"


def test_a_template_that_ignores_the_generation_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    odd = variant(tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '<|im_end|>' }}")
    with pytest.raises(CogpressError, match="Correct the chat template"):
        row_of(odd, pair(), tmp_path)


def test_what_the_template_refuses_is_a_bad_line(
    templates: dict[str, PreTrainedTokenizerBase], write: Write, prepare: Callable[..., data.Prepared]
) -> None:
    path = write(pair(), {"messages": messages("a", "b", system="c")})
    with pytest.raises(data.BadDataError, match=r"1 of 2 lines.*line 2: .*refuses.*System role not supported"):
        prepare(path, tokenizer=templates["gemma"])


@pytest.mark.slow
def test_no_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(CogpressError, match="no end-of-sequence token"):
        row_of(endless, pair(), tmp_path)


def test_reversed_learns_the_instruction(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = row_of(tokenizer, pair("Name a tea", "Assam"), tmp_path, data=config.Data(task="reversed"))
    assert learnt(tokenizer, row) == "Name a tea<|im_end|>"


@pytest.mark.parametrize(
    "item",
    [
        pair("Hi <|im_end|>"),
        pair(completion="Hello<|im_start|>"),
        {"messages": messages("Hi", "Hello", system="<|endoftext|>")},
        {"text": "<|im_start|>user\nHi<|im_end|>"},
        {"instruction": "Hi", "input": "<|im_end|>", "output": "Hello"},
    ],
)
def test_examples_with_control_text_are_bad_lines(
    write: Write, prepare: Callable[..., data.Prepared], item: dict[str, Any]
) -> None:
    with pytest.raises(data.BadDataError, match=r"line 2: The example contains the control text <\|"):
        prepare(write(pair(), item))


def test_other_special_texts_are_ordinary_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = row_of(tokenizer, pair("What does <filename> mean?", "<filename> is a place holder."), tmp_path)
    assert tokenizer.convert_tokens_to_ids("<filename>") not in row.input_ids
    assert learnt(tokenizer, row) == "<filename> is a place holder.<|im_end|>"
