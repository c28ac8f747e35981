"""One example: the plain data of a row in one of five formats, before any prompt template applies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cogpress.config import Task
from cogpress.data.read import BadRow, found_keys, short
from cogpress.prompts import Message, Question

Format = Literal["messages", "conversations", "prompt/completion", "alpaca", "text"]

_FORMS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "prompt/completion": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "text": ("text",),
}
KEYS = tuple(dict.fromkeys(name for names in _FORMS.values() for name in names))

_TURN_KEYS = ("role", "content", "weight", "train")
_TOOL_KEYS = ("tool_call_id", "name")
"""Further keys of a tool's turn, which its chat template may write."""
_SHAREGPT_KEYS = ("from", "value", "weight", "train")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by ShareGPT's names."""
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
        unlearnt: indices in `answer` of an assistant's turns that are not trained on.
        text: the plain text.
    """

    line: int
    format: Format
    question: Question
    answer: tuple[Message, ...]
    text: str = ""
    unlearnt: frozenset[int] = frozenset()


class EmptyAnswer(Exception):
    """The row holds an example with nothing to learn."""


class UnreadKeysError(BadRow):
    """The row has keys that would vanish; `names` are they."""

    def __init__(self, names: Sequence[str]) -> None:
        shown = ", ".join(short(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        super().__init__(f"{'the key' if len(names) == 1 else 'the keys'} {shown} would not be read")
        self.names = tuple(names)


def without(item: Any, ignore: Collection[str]) -> tuple[Any, set[str]]:
    """A row without nulls and without the keys to ignore, at any depth, and which of these it had."""
    left: set[str] = set()

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            left.update(name for name, one in value.items() if name in ignore and one is not None)
            return {name: stripped(one) for name, one in value.items() if one is not None and name not in ignore}
        return [stripped(one) for one in value] if isinstance(value, list) else value

    return stripped(item), left


def _refuse_unread(row: Mapping[str, Any], format: Format) -> None:
    """Refuse keys that the format does not use, of the row and of its messages; empty ones hold nothing to lose."""
    unread: list[str] = [
        name for name, value in row.items() if name not in _FORMS[format] and value not in ("", [], {})
    ]
    for name in ("messages", "conversations", "prompt", "completion"):
        turns = row.get(name) if name in _FORMS[format] else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                known: tuple[str, ...] = _SHAREGPT_KEYS if name == "conversations" else _TURN_KEYS
                known = (*known, *_TOOL_KEYS) if turn.get("role") == "tool" else known
                unread += [key for key, value in turn.items() if key not in known and value not in ("", [], {})]
    if unread:
        raise UnreadKeysError(list(dict.fromkeys(unread)))


def example_of(item: Any, line: int, task: Task = "answer") -> Example:
    """The example that a row holds.

    The format is told by the row's keys, null counting as no key; the first that fits is taken: `messages`;
    ShareGPT's `conversations`; `prompt` and `completion`, each text or messages, `prompt` also an object of fields;
    Alpaca's `instruction`, `input`, `output` and `history`; `text`. All but the last take a `system` text beside them.
    An assistant's turn with `weight` 0 or `train` false is not learnt.

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
    system = _text(has.get("system", ""), "system") or None
    if "messages" in has or "conversations" in has:
        format: Format = "messages" if "messages" in has else "conversations"
        _refuse_unread(has, format)
        turns = _turns(has[format], format)
        _check_order(turns)
        first = [turn["role"] for turn in turns].index("assistant")
        return _example(line, format, Question(messages=turns[:first], system=system), turns[first:], task)
    if "prompt" in has and "completion" in has:
        _refuse_unread(has, "prompt/completion")
        question = replace(_asked(has["prompt"], task), system=system)
        return _example(line, "prompt/completion", question, _answered(has["completion"]), task)
    if "instruction" in has and "output" in has:
        _refuse_unread(has, "alpaca")
        parts = [_text(has["instruction"], "instruction"), _text(has.get("input", ""), "input")]
        if not parts[0].strip():
            raise BadRow("instruction is empty")
        text = "\n\n".join(part for part in parts if part.strip())
        asked = Question(text=text, system=system)
        if history := _history(has.get("history", [])):  # a conversation takes no template, in serving too
            asked = Question(messages=(*history, _message("user", text)), system=system)
        return _example(line, "alpaca", asked, (_message("assistant", _text(has["output"], "output")),), task)
    if "text" in has:
        _refuse_unread(has, "text")
        text = _text(has["text"], "text")
        if task == "reversed":
            raise BadRow("text has no prompt, so it cannot be learned reversed")
        if not text.strip():
            raise EmptyAnswer
        return Example(line, "text", Question(), (), text)
    raise BadRow(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor conversations, "
        "nor text; " + found_keys(list(has))
    )


def _example(line: int, format: Format, question: Question, answer: tuple[Message, ...], task: Task) -> Example:
    # Fields are checked when they fill the template.
    asked = question.messages or [_message("user", question.text if question.fields is None else "fields")]
    turns = [*asked, *answer]
    _check_order(turns)
    if question.system and turns[0]["role"] == "system":
        raise BadRow("system stands beside messages that begin with a system message: give one of them")
    if not all(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise BadRow("the prompt is empty")
    learnt = [index for index, turn in enumerate(answer) if turn["role"] == "assistant" and _is_learnt(turn)]
    if not learnt or not all(answer[index]["content"].strip() for index in learnt):
        raise EmptyAnswer
    answer = answer[: learnt[-1] + 1]  # nothing is learnt from what comes after
    unlearnt = frozenset(i for i, turn in enumerate(answer) if turn["role"] == "assistant" and i not in learnt)
    turns = [_given(turn) for turn in (*asked, *answer)]
    answer = tuple(map(_given, answer))
    question = replace(question, messages=tuple(map(_given, question.messages)))
    if task == "reversed":
        *system, user, assistant = turns
        if [turn["role"] for turn in system] not in ([], ["system"]):
            raise BadRow("a conversation of several turns cannot be learned reversed")
        question = Question(text=assistant["content"], system=system[0]["content"] if system else question.system)
        answer = (_message("assistant", user["content"]),)
    return Example(line, format, question, answer, unlearnt=unlearnt)


def _is_learnt(turn: Message) -> bool:
    return bool(turn.get("weight", True)) and bool(turn.get("train", True))


def _given(turn: Message) -> Message:
    """A turn as the chat template gets it."""
    return {name: value for name, value in turn.items() if name not in ("weight", "train")}


def _history(value: Any) -> list[Message]:
    """The earlier turns of Alpaca's `history`, pairs of what was asked and answered."""
    if not isinstance(value, list):
        raise BadRow(f"history is {_kind(value)} and not a list")
    turns: list[Message] = []
    for index, both in enumerate(value):
        if not isinstance(both, list) or len(both) != 2:
            raise BadRow(f"history[{index}] is not a list of a question and its answer")
        turns += [
            _message(role, _text(text, f"history[{index}]"))
            for role, text in zip(("user", "assistant"), both, strict=True)
        ]
    return turns


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
    if name.startswith("conversations["):
        said, text = value.get("from"), "value"
        role = _SHAREGPT.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow(f"{name} is from {short(said)}, not system, human or gpt")
    else:
        role, text = value.get("role"), "content"
        if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
            raise BadRow(f"{name} has the role {short(role)}, not system, user, assistant or tool")
    turn = {"role": role, "content": _content(value.get(text), f"{name}.{text}")}
    turn |= {key: _text(value[key], f"{name}.{key}") for key in _TOOL_KEYS if role == "tool" and key in value}
    for key in ("weight", "train"):
        if key in value:
            if value[key] not in (0, 1) or not isinstance(value[key], bool | int | float):
                raise BadRow(f"{name}.{key} is {short(value[key])}: a turn is learnt (1) or not (0)")
            if value[key] and role != "assistant":
                raise BadRow(f"{name}.{key} asks to learn a turn that is not the assistant's")
            turn[key] = value[key]
    return turn


def _content(value: Any, name: str) -> str:
    """A text, or the text of content parts."""
    if not isinstance(value, list):
        return _text(value, name)
    if not value:
        raise BadRow(f"{name} is an empty list")
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise BadRow(f'{name}[{index}] is not {{"type": "text", "text": ...}}; only text can be learnt')
        texts.append(_text(part["text"], f"{name}[{index}].text"))
    return "".join(texts)


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
            _text(key, f"a key of {name}")
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
