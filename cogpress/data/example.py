"""One example: the plain data of a row in one of four formats, before any prompt template applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cogpress.config import Task
from cogpress.data.read import BadRow, found_keys, short
from cogpress.prompts import Message, Question

Format = Literal["messages", "prompt/completion", "alpaca", "text"]

KEYS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its answer, or a plain text.

    Attributes:
        line: the row's number in its file.
        format: how the row was written.
        question: what is given; an assistant's messages in it are never trained on.
        answer: the messages after it, whose assistant's turns are trained on; none for a plain text.
        text: the plain text.
    """

    line: int
    format: Format
    question: Question
    answer: tuple[Message, ...]
    text: str = ""


class EmptyAnswer(Exception):
    """The row holds an example with nothing to learn."""


def example_of(item: Any, line: int, task: Task = "answer") -> Example:
    """The example that a row holds.

    The format is told by the row's keys, null counting as no key; the first that fits is taken: `messages`; `prompt`
    and `completion`, each text or messages, `prompt` also an object of fields; Alpaca's `instruction`, `input` and
    `output`; `text`.

    Args:
        item: the row, as JSON types.
        line: its number.
        task: `reversed` swaps question and answer.

    Raises:
        BadRow: it cannot be used.
        EmptyAnswer: it holds nothing to learn.
    """
    if not isinstance(item, dict):
        raise BadRow(f"{_kind(item)} and not a JSON object")
    has = {name: value for name, value in item.items() if value is not None}
    if "messages" in has:
        turns = _turns(has["messages"], "messages")
        _check_order(turns)
        first = [turn["role"] for turn in turns].index("assistant")
        return _example(line, "messages", Question(messages=turns[:first]), turns[first:], task)
    if "prompt" in has and "completion" in has:
        return _example(line, "prompt/completion", _asked(has["prompt"], task), _answered(has["completion"]), task)
    if "instruction" in has and "output" in has:
        parts = [_text(has["instruction"], "instruction"), _text(has.get("input", ""), "input")]
        if not parts[0].strip():
            raise BadRow("instruction is empty")
        asked = Question(text="\n\n".join(part for part in parts if part.strip()))
        return _example(line, "alpaca", asked, (_message("assistant", _text(has["output"], "output")),), task)
    if "text" in has:
        text = _text(has["text"], "text")
        if task == "reversed":
            raise BadRow("text has no prompt, so it cannot be learned reversed")
        if not text.strip():
            raise EmptyAnswer
        return Example(line, "text", Question(), (), text)
    raise BadRow(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor text; "
        + found_keys(list(has))
    )


def _example(line: int, format: Format, question: Question, answer: tuple[Message, ...], task: Task) -> Example:
    # Fields are checked when they fill the template.
    asked = question.messages or [_message("user", question.text if question.fields is None else "fields")]
    turns = [*asked, *answer]
    _check_order(turns)
    if not all(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise BadRow("the prompt is empty")
    if not all(turn["content"].strip() for turn in answer if turn["role"] == "assistant"):
        raise EmptyAnswer
    if task == "reversed":
        *system, user, assistant = turns
        if [turn["role"] for turn in system] not in ([], ["system"]):
            raise BadRow("a conversation of several turns cannot be learned reversed")
        question = Question(text=assistant["content"], system=system[0]["content"] if system else None)
        answer = (_message("assistant", user["content"]),)
    return Example(line, format, question, answer)


def _check_order(turns: Sequence[Message]) -> None:
    before = ""
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "first"
            expected = " or ".join(_MAY_FOLLOW[before])
            raise BadRow(f"message {number} is {turn['role']}, but {after} comes {expected}")
        before = turn["role"]
    if before != "assistant":
        raise BadRow(f"ends with {before or 'nothing'}, but the last message must be the assistant's, to be learned")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRow(f"{name} is {_kind(value)} and not a list")
    if not value:
        raise BadRow(f"{name} is empty")
    return tuple(_turn(item, f"{name}[{index}]") for index, item in enumerate(value))


def _turn(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {_kind(value)} and not an object")
    role = value.get("role")
    if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
        raise BadRow(f"{name} has the role {short(role)}, not system, user, assistant or tool")
    return _message(role, _text(value.get("content"), f"{name}.content"))


def _asked(value: Any, task: Task) -> Question:
    if isinstance(value, list):
        return Question(messages=_turns(value, "prompt"))
    if isinstance(value, dict):
        if task == "reversed":
            raise BadRow("prompt is an object of fields, so it cannot be learned reversed")
        _check_texts(value, "prompt")
        return Question(fields=value)
    return Question(text=_text(value, "prompt"))


def _check_texts(value: Any, name: str) -> None:
    """Check every text in an object of fields; what else it may hold, the template checks."""
    if isinstance(value, str):
        _text(value, name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_texts(item, f"{name}.{short(key)[1:-1]}")


def _answered(value: Any) -> tuple[Message, ...]:
    return (
        _turns(value, "completion") if isinstance(value, list) else (_message("assistant", _text(value, "completion")),)
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)} and not a string")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} contains half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    """A value's JSON type, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
