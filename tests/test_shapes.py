"""Templates of many shapes: what is learnt follows what is served, and is what the row says, or the row is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cogpress import config, prompts
from cogpress.config import Prompt
from cogpress.data.prepare import Prepared, Report, held_out, read_examples
from cogpress.errors import CogpressError
from cogpress.given import REASONING
from cogpress.prompts import NO_LOSS, Conversation, Row
from cogpress.push import parity
from cogpress.serve import batch, requests
from cogpress.train.run import HELD_OUT
from cogpress.verify import run as verify
from tests.standins.chatexamples import messages, variant
from tests.standins.shapes import CHATML, SHAPES, Shape, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOL = {
    "type": "function",
    "function": {"name": "stock", "description": "Units", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "stock", "arguments": {"sku": "A7", "at": 3}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "stock", "content": 'units: "12"'}
ASKED = {"role": "user", "content": "How many?"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": messages("Q0", "A0")},
    "lines": {"messages": messages("Q0\n\nQ1", '{"a":\n [1, "é"]}\n\nyes')},
    "system": {"messages": messages("Q0", "A0", system="Be brief.")},
    "several": {"messages": messages("Q0", "A0", "Q1", "A1", "Q2", "A2")},
    "several with system": {"messages": messages("Q0", "A0", "Q1", "A1", system="Be brief.")},
    "tools": {"tools": [TOOL], "messages": messages("Q0", "A0")},
    "call": {"tools": [TOOL], "messages": [ASKED, {**CALLED, "content": None}]},
    "call beside text": {"tools": [TOOL], "messages": [ASKED, {**CALLED, "content": "I look."}]},
    "loop": {"tools": [TOOL], "messages": [ASKED, CALLED, RESULT, {"role": "assistant", "content": "Twelve."}]},
    "think": {"messages": messages("Q0", "<think>\nCount.\n</think>\n\n9")},
    "reasoning": {"messages": [ASKED, {"role": "assistant", "reasoning_content": "Count\nthem.", "content": "9"}]},
}


@pytest.fixture(scope="module")
def shapes() -> dict[str, PreTrainedTokenizerBase]:
    return {name: tokenizer_of(shape) for name, shape in SHAPES.items()}


def example(row: dict[str, Any], tmp_path: Path, prompt: Prompt) -> Conversation:
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row))
    reading = read_examples(path, prompt=prompt)
    assert not reading.problems
    return reading.conversations[0]


def row_of(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, shape: Shape) -> Row:
    more = [tokenizer.convert_tokens_to_ids("<|call|>")] if "<|call|>" in shape.special else []
    [row] = prompts.rows(tokenizer, [conversation], more)
    return row


def served(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], turns: int, prompt: Prompt) -> list[int]:
    """What a server asks the model, when a client sends a row's first turns."""
    sent = [{**turn, "content": turn["content"] or ""} for turn in row["messages"][:turns]]
    tools = json.dumps(row["tools"]) if "tools" in row else None
    request = requests.Request(messages=json.dumps(sent), tools=tools)
    return prompts.encode(tokenizer, requests.question(request, prompt), prompt)


def learnt_spans(row: Row) -> list[int]:
    """Where each learnt answer begins."""
    labels = [NO_LOSS, *row.labels]
    return [at for at in range(len(row.labels)) if labels[at] == NO_LOSS != labels[at + 1]]


def parts(turn: dict[str, Any]) -> list[str]:
    """What a served answer holds, in its order."""
    calls = [json.dumps(call["function"]["arguments"]) for call in turn.get("tool_calls", ())]
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    return [turn.get("reasoning_content", ""), *re.split("</?think>", turn["content"] or ""), *names, *calls]


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_learnt_follows_what_is_served_and_is_what_is_served(
    shapes: dict[str, PreTrainedTokenizerBase], name: str, tmp_path: Path
) -> None:
    shape, tokenizer = SHAPES[name], shapes[name]
    for thinking in (None, True, False) if shape.switch else (None,):
        settings = Prompt(thinking=thinking)
        for kind, given in CONVERSATIONS.items():
            found = example(given, tmp_path, settings)
            if reason := shape.refused.get(kind) or shape.refused.get(f"{kind}/{thinking}"):
                with pytest.raises(CogpressError, match=re.escape(reason)):
                    row_of(tokenizer, found, shape)
                continue
            row = row_of(tokenizer, found, shape)
            answers = [at for at, turn in enumerate(given["messages"]) if turn["role"] == "assistant"]
            for begins, at in zip(learnt_spans(row), answers, strict=True):
                assert row.input_ids[:begins] == served(tokenizer, given, at, settings), (kind, thinking)
            assert prompts.encode_example(tokenizer, found) == served(tokenizer, given, answers[-1], settings)
            turn = given["messages"][-1]
            answer = prompts.answer_text(tokenizer, row).strip()
            if set(turn) == {"role", "content"}:
                assert answer.replace("<think>\n", "") == turn["content"].replace("<think>\n", ""), (kind, thinking)
            place = 0
            for part in parts(turn):
                place = answer.index(part.strip(), place)
            assert json.loads(held(found))["messages"] == [
                {**message, "content": message["content"] or ""} for message in given["messages"]
            ]
            again = example(json.loads(held(found)), tmp_path, Prompt(thinking=thinking))
            assert row_of(tokenizer, again, shape) == row, "verification measures what training measured"


def held(found: Conversation) -> str:
    return held_out(Prepared([], [], [], [found], Report()))


def test_a_question_overrides_the_settings(shapes: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer, question = shapes["qwen3"], prompts.Question("Hi", thinking=True)
    reasons, not_at_all = prompts.encode(tokenizer, question, Prompt(thinking=False)), Prompt(thinking=False)
    assert reasons == prompts.encode(tokenizer, prompts.Question("Hi"), Prompt())
    assert prompts.encode(tokenizer, prompts.Question("Hi"), not_at_all)[: len(reasons)] == reasons
    assert tokenizer.decode(prompts.encode(tokenizer, prompts.Question("Hi"), not_at_all)).endswith("</think>\n\n")
    with pytest.raises(CogpressError, match="no switch for reasoning"):
        prompts.encode(shapes["chatml"], prompts.Question("Hi"), not_at_all)


def test_reasoning_of_earlier_turns_is_asked_with(shapes: dict[str, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    """Qwen 3 writes the reasoning before a call until the next question, in training and serving."""
    called = {**CALLED, "reasoning_content": "I need the stock.", "weight": 0}
    row = {"tools": [TOOL], "messages": [ASKED, called, RESULT, {"role": "assistant", "content": "Twelve."}]}
    made = row_of(shapes["qwen3"], example(row, tmp_path, Prompt()), SHAPES["qwen3"])
    [begins] = learnt_spans(made)
    assert made.input_ids[:begins] == served(shapes["qwen3"], row, 3, Prompt())
    assert "I need the stock." in shapes["qwen3"].decode(made.input_ids)
    for key in REASONING:  # the same from a line of a batch
        told = {name: value for name, value in called.items() if name not in ("weight", "reasoning_content")}
        line = {"tools": [TOOL], "messages": [ASKED, {**told, key: "I need the stock."}, RESULT]}
        request, _ = requests.read(batch.inputs(line, {"messages": {}, "tools": {}}), shapes["qwen3"])
        asked = prompts.encode(shapes["qwen3"], requests.question(request, Prompt()), Prompt())
        assert asked == made.input_ids[:begins]
    with pytest.raises(CogpressError, match="leaves out the reasoning_content"):
        row_of(shapes["qwen2.5"], example(row, tmp_path, Prompt()), SHAPES["qwen2.5"])


@pytest.mark.parametrize("key", REASONING)
def test_reasoning_has_several_names(shapes: dict[str, PreTrainedTokenizerBase], tmp_path: Path, key: str) -> None:
    for name in ("qwen3", "gpt-oss"):
        given = {"messages": [ASKED, {"role": "assistant", key: "Count them.", "content": "9"}]}
        row = row_of(shapes[name], example(given, tmp_path, Prompt()), SHAPES[name])
        assert "Count them." in prompts.answer_text(shapes[name], row)


def test_a_template_that_drops_the_system_text_is_refused(
    shapes: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = variant(
        shapes["chatml"],
        CHATML.replace("{% endfor", "{% endif %}{% endfor").replace("%}", "%}{% if m.role != 'system' %}", 1),
    )
    with pytest.raises(CogpressError, match="leaves out the text of this message by system"):
        row_of(tokenizer, example(CONVERSATIONS["system"], tmp_path, Prompt()), SHAPES["chatml"])


def test_verification_and_push_expect_what_a_server_can_give(
    shapes: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """The prompt, tools among it, and an answer with its calls, of the examples that a run held out."""
    call, plain = CONVERSATIONS["call"], CONVERSATIONS["plain"]
    prepared = Prepared([], [], [], [example(row, tmp_path, Prompt(thinking=False)) for row in (call, plain)], Report())
    (tmp_path / HELD_OUT).write_text(held_out(prepared))
    examples = verify.held_out(config.Verify(), tmp_path, tmp_path, Prompt(thinking=False))
    assert examples == prepared.validation_examples
    tokenizer = shapes["qwen3"]
    tokenizer.save_pretrained(tmp_path / "weights")
    asked = [served(tokenizer, row, 1, Prompt(thinking=False)) for row in (call, plain)]
    expected = ['<tool_call>\n{"name": "stock", "arguments": {"sku": "A7", "at": 3}}\n</tool_call>', "A0"]
    case = SimpleNamespace(tokenizer=tokenizer, examples=examples, rows=prompts.rows(tokenizer, examples))
    assert verify._Case.prompts.fget(case) == asked
    assert verify._Case.expected.fget(case) == expected
    reference = parity.Reference(tmp_path / "weights", examples, "none", None)
    assert reference.expected == expected
    for sent, ids in zip(parity.inputs(reference), asked, strict=True):
        request, _ = requests.read(sent, tokenizer)
        settings = Prompt(thinking=False)  # the served weights' own
        assert prompts.encode(tokenizer, requests.question(request, settings), settings) == ids
