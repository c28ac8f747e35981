"""One example: the plain data of a row in one of five formats, before any prompt template applies."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cogpress.config import Task
from cogpress.data.read import BadRow, found_keys, parse_text, short
from cogpress.data.turns import (
    MASKS,
    check_calls,
    check_order,
    check_texts,
    history_of,
    is_call,
    is_learnt,
    masked,
    plain_turn,
    text_of,
    tools_of,
    turn_of,
    turns_of,
    unfilled,
    unread_keys,
)
from cogpress.given import REASONING, kind
from cogpress.prompts import Message, Question

Format = Literal["messages", "conversations", "prompt/completion", "alpaca", "text"]

_FORMS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools", "weight", *MASKS),
    "conversations": ("conversations", "system", "tools", "weight", *MASKS),
    "prompt/completion": ("prompt", "completion", "tool_calls", "system", "tools", "weight", *MASKS),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", "weight"),
    "text": ("text", "weight"),
}
KEYS = tuple(dict.fromkeys(name for names in _FORMS.values() for name in names))

_MAX_WEIGHT = sys.float_info.max

_TURN = {
    "role": "who speaks",
    "from": "who speaks",
    "content": "the text; learnt in the assistant's turns",
    "value": "the text; learnt in gpt's turns, and as calls in function_call's",
    "weight": "0: a turn without loss",
    "train": "false: a turn without loss",
    "tool_calls": "calls of functions, learnt",
    "tool_call_id": "which call a tool answers",
    "name": "the tool that answers",
    **dict.fromkeys(REASONING, "reasoning before the answer, learnt"),
}
_MEANINGS = {
    "messages": "a conversation; the assistant's turns are learnt",
    "conversations": "a conversation of ShareGPT's form; gpt's turns are learnt",
    "prompt": "the question: a text, turns, or the template's fields",
    "completion": "the answer, learnt",
    "tool_calls": "the answer's calls of functions, learnt",
    "instruction": "the question",
    "input": "more of the question",
    "output": "the answer, learnt",
    "history": "earlier questions and answers, not learnt",
    "system": "the system text",
    "tools": "functions that the model may call",
    "weight": "factor on the row's loss",
    **dict.fromkeys(MASKS, "which turns are learnt: 1, else 0"),
    "text": "plain text, all of it learnt",
}


_FUNCTIONS = ("tools", "tool_calls")
_GIVEN_AS_IS = ("arguments", "default", "const")
"""Keys inside of `_FUNCTIONS` whose null is a value: of an argument, or in a parameter's JSON schema."""


def key_paths(item: Any) -> set[str]:
    """The keys of a row that have a value: its own, `messages[].role` of its turns, `prompt.name` of its fields."""
    found: set[str] = set()
    for name, value in item.items() if isinstance(item, dict) else ():
        if value is None:
            continue
        found.add(name)
        if name in ("messages", "conversations") and isinstance(value, str):
            with contextlib.suppress(BadRow):
                value = parse_text(value, name)
        turns = value if isinstance(value, list) and name not in _FUNCTIONS else []
        found |= {
            f"{name}[].{key}"
            for turn in turns
            if isinstance(turn, dict)
            for key, one in turn.items()
            if one is not None
        }
        if name == "prompt" and isinstance(value, dict):
            found |= {f"{name}.{key}" for key, one in value.items() if one is not None}
    return found


def meaning(path: str) -> str:
    """How a key, as `key_paths` names it, is understood."""
    name, turns, key = path.partition("[].")
    if turns and name in ("messages", "conversations", "prompt", "completion"):
        return _TURN.get(key, _UNREAD)
    if not turns and path.startswith("prompt."):
        return "a field of prompt.template"
    return _MEANINGS.get(path, _UNREAD)


_UNREAD = "not read: its rows are bad lines; name it in data.ignore"


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its answer, or a plain text.

    Attributes:
        line: the row's number in its file.
        format: how the row was written.
        question: what is given; an assistant's messages in it are never trained on.
        answer: the messages after it, whose assistant's turns are trained on; none for a plain text.
        unlearnt: indices in `answer` of an assistant's turns that are not trained on.
        text: the plain text.
        weight: factor on the loss, above 0.
    """

    line: int
    format: Format
    question: Question
    answer: tuple[Message, ...]
    text: str = ""
    unlearnt: frozenset[int] = frozenset()
    weight: float = 1.0


class EmptyAnswer(Exception):
    """The row holds an example with nothing to learn."""


class NoWeight(Exception):
    """The row has weight 0: it is not to be learnt."""


class UnreadKeysError(BadRow):
    """The row has keys that would vanish; `names` are they."""

    def __init__(self, names: Sequence[str]) -> None:
        shown = ", ".join(short(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        super().__init__(f"{'the key' if len(names) == 1 else 'the keys'} {shown} would not be read")
        self.names = tuple(names)


def without(item: Any, ignore: Collection[str], functions: Collection[str] = _FUNCTIONS) -> tuple[Any, set[str]]:
    """A row without nulls and without the keys to ignore, at any depth, and which of these it had.

    Inside of `functions`, where keys are parameters of functions, none is ignored, and arguments keep their nulls.
    """
    left: set[str] = set()

    def stripped(value: Any, ignore: Collection[str], function: bool = False) -> Any:
        if isinstance(value, dict):
            left.update(name for name, one in value.items() if name in ignore and one is not None)
            return {
                name: one
                if function and name in _GIVEN_AS_IS
                else stripped(one, () if name in functions else ignore, function or name in functions)
                for name, one in value.items()
                if name not in ignore and (one is not None or (function and name in _GIVEN_AS_IS))
            }
        return [stripped(one, ignore, function) for one in value] if isinstance(value, list) else value

    return stripped(item, ignore), left


def row_of(item: Any, ignore: Collection[str], rename: Mapping[str, str]) -> tuple[Any, set[str]]:
    """A row as `example_of` takes it: `without` what is ignored, `renamed`, and with turns that are JSON text parsed.

    Returns:
        the row, and which of the keys to ignore it had.

    Raises:
        BadRow: it has a key twice, or its turns are no JSON.
    """
    functions = [*_FUNCTIONS, *(old for old, new in rename.items() if new in _FUNCTIONS)]
    item, left = without(item, ignore, functions)
    row = renamed(item, rename)
    for name in ("messages", "conversations"):
        text = row.get(name) if isinstance(row, dict) else None
        if isinstance(text, str) and text.lstrip().startswith("["):  # as tables hold lists
            turns, more = without(parse_text(text, name), ignore)
            row, left = {**row, name: turns}, left | more
    return row, left


def renamed(row: Any, names: Mapping[str, str]) -> Any:
    """A row, without nulls, whose keys have the names that `names` gives them.

    Raises:
        BadRow: it has both, so that one of them would be lost.
    """
    if not isinstance(row, dict):
        return row
    made: dict[str, Any] = {}
    for name, value in row.items():
        new = names.get(name, name)
        if new in made:
            raise BadRow(f"it has {new} twice, as data.rename makes {short(name)[1:-1]} one: leave one out")
        made[new] = value
    return made


def _refuse_unread(row: Mapping[str, Any], format: Format) -> None:
    """Refuse keys that the format does not use, of the row and of its messages; empty ones hold nothing to lose."""
    unread: list[str] = [
        name for name, value in row.items() if name not in _FORMS[format] and value not in ("", [], {})
    ]
    for name in ("messages", "conversations", "prompt", "completion"):
        turns = row.get(name) if name in _FORMS[format] else None
        for turn in turns if isinstance(turns, list) else ():
            unread += unread_keys(turn)
    if unread:
        raise UnreadKeysError(list(dict.fromkeys(unread)))


def example_of(item: Any, line: int, task: Task = "answer") -> Example:
    """The example that a row holds.

    The format is told by the row's keys, null counting as no key; the first that fits is taken: `messages`;
    ShareGPT's `conversations`; `prompt` and `completion`, each text or messages, `prompt` also an object of fields;
    Alpaca's `instruction`, `input`, `output` and `history`; `text`. All but the last take a `system` text and `tools`
    beside them, all of them the row's `weight`, a factor on its loss. An assistant's turn may have `tool_calls` and
    `reasoning_content`; with `weight` 0 or `train` false it is not learnt.

    Args:
        item: the row, as JSON types.
        line: its number.
        task: `reversed` swaps question and answer.

    Raises:
        BadRow: it cannot be used.
        EmptyAnswer: it holds nothing to learn.
        NoWeight: its weight is 0.
    """
    if not isinstance(item, dict):
        raise BadRow(f"{kind(item)} and not a JSON object")
    has = {name: value for name, value in item.items() if value is not None}
    example = _example_of(has, line, task)
    weight = has.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MAX_WEIGHT:
        raise BadRow(f"weight is {short(weight)}, not a number from 0: the factor on the row's loss")
    if not weight:
        raise NoWeight
    tools = tools_of(has.get("tools", []))
    said = [example.question.system or "", *(turn["content"] for turn in example.question.messages)]
    if tools and any("<tools>" in text for text in said):
        raise BadRow(
            "tools stand beside a text that lists them in <tools>, and the chat template would list them again: take "
            "the list out of the text, or name tools in data.ignore to keep the text as it is"
        )
    check_calls([*example.question.messages, *example.answer], tools)
    if tools and any(turn["role"] == "assistant" and is_call(turn["content"]) for turn in example.answer):
        raise BadRow(
            "an answer is a call of a tool as text, which the chat template would write otherwise: give it as "
            "tool_calls, with data.rename where the row has it under another name, or name tools in data.ignore"
        )
    if tools and task == "reversed":
        raise BadRow("tools cannot be learned reversed")
    question = replace(
        example.question, tools=tools, messages=[unfilled(turn, tools) for turn in example.question.messages]
    )
    answer = tuple(unfilled(turn, tools) for turn in example.answer)
    return replace(example, weight=float(weight), question=question, answer=answer)


def _example_of(has: Mapping[str, Any], line: int, task: Task) -> Example:
    system = text_of(has.get("system", ""), "system") or None
    if "messages" in has or "conversations" in has:
        format: Format = "messages" if "messages" in has else "conversations"
        _refuse_unread(has, format)
        turns = turns_of(has[format], format)
        check_order(turns)
        turns = masked(has, turns)
        first = [turn["role"] for turn in turns].index("assistant")
        return _example(line, format, Question(messages=turns[:first], system=system), turns[first:], task)
    if "prompt" in has and ("completion" in has or "tool_calls" in has):
        _refuse_unread(has, "prompt/completion")
        question = replace(_asked(has["prompt"], task), system=system)
        given = question.messages or (turn_of("user", ""),)
        answer = masked(has, (*given, *_answered(has)), len(given))[len(given) :]
        return _example(line, "prompt/completion", question, answer, task)
    if "instruction" in has and "output" in has:
        _refuse_unread(has, "alpaca")
        parts = [text_of(has["instruction"], "instruction"), text_of(has.get("input", ""), "input")]
        if not parts[0].strip():
            raise BadRow("instruction is empty")
        text = "\n\n".join(part for part in parts if part.strip())
        asked = Question(text=text, system=system)
        if history := history_of(has.get("history", [])):  # a conversation takes no template, in serving too
            asked = Question(messages=(*history, turn_of("user", text)), system=system)
        return _example(line, "alpaca", asked, (turn_of("assistant", text_of(has["output"], "output")),), task)
    if "text" in has:
        _refuse_unread(has, "text")
        text = text_of(has["text"], "text")
        if task == "reversed":
            raise BadRow("text has no prompt, so it cannot be learned reversed")
        if not text.strip():
            raise EmptyAnswer
        return Example(line, "text", Question(), (), text)
    if "input_ids" in has:
        raise BadRow("input_ids are tokens, which only their own tokenizer reads: give the texts they were made from")
    if "chosen" in has and "rejected" in has:
        raise BadRow(
            "chosen and rejected are a preference, and only answers are learnt here: name rejected in data.ignore, and "
            f"in data.rename chosen as {'completion' if 'prompt' in has else 'messages'}"
        )
    for one, other in (("prompt", "completion"), ("completion", "prompt"), ("instruction", "output")):
        if one in has:
            raise BadRow(f"{one} without {other}: {found_keys(list(has))}; {_RENAMED}")
    raise BadRow(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor conversations, "
        f"nor text; {found_keys(list(has))}; {_RENAMED}"
    )


_RENAMED = "if it has the same under other names, say so in data.rename"


def _example(line: int, format: Format, question: Question, answer: tuple[Message, ...], task: Task) -> Example:
    # Fields are checked when they fill the template.
    asked = question.messages or [turn_of("user", question.text if question.fields is None else "fields")]
    turns = [*asked, *answer]
    check_order(turns)
    if question.system and turns[0]["role"] == "system":
        raise BadRow("system stands beside messages that begin with a system message: give one of them")
    if not all(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise BadRow("the prompt is empty")
    learnt = [index for index, turn in enumerate(answer) if turn["role"] == "assistant" and is_learnt(turn)]
    if not learnt or not all(answer[at]["content"].strip() or answer[at].get("tool_calls") for at in learnt):
        raise EmptyAnswer
    answer = answer[: learnt[-1] + 1]  # nothing is learnt from what comes after
    unlearnt = frozenset(i for i, turn in enumerate(answer) if turn["role"] == "assistant" and i not in learnt)
    turns = [plain_turn(turn) for turn in (*asked, *answer)]
    answer = tuple(map(plain_turn, answer))
    question = replace(question, messages=tuple(map(plain_turn, question.messages)))
    if task == "reversed":
        if unfit := next((name for turn in turns for name in ("tool_calls", REASONING[0]) if turn.get(name)), None):
            raise BadRow(f"{unfit} cannot be learned reversed")
        *system, user, assistant = turns
        if [turn["role"] for turn in system] not in ([], ["system"]):
            raise BadRow("a conversation of several turns cannot be learned reversed")
        question = Question(text=assistant["content"], system=system[0]["content"] if system else question.system)
        answer = (turn_of("assistant", user["content"]),)
    return Example(line, format, question, answer, unlearnt=unlearnt)


def _asked(value: Any, task: Task) -> Question:
    if isinstance(value, list):
        return Question(messages=turns_of(value, "prompt"))
    if isinstance(value, dict):
        if task == "reversed":
            raise BadRow("prompt is an object of fields, so it cannot be learned reversed")
        check_texts(value, "prompt")
        return Question(fields=value)
    return Question(text=text_of(value, "prompt"))


def _answered(has: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of `completion`, or one with the row's `tool_calls`, where both stand with that text."""
    value = has.get("completion", "")
    if "tool_calls" in has:
        return turns_of([{"role": "assistant", "content": value, "tool_calls": has["tool_calls"]}], "completion")
    if isinstance(value, list):
        return turns_of(value, "completion")
    return (turn_of("assistant", text_of(value, "completion")),)
