"""One example: which of the four formats a line is in, what makes it bad, and the messages it comes to.

Knows a line's value once it is parsed, the prompt template and the system text. Files are `data.read`'s, tokens
`data.tokenize`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cogpress import config
from cogpress.errors import CogpressError

Format = Literal["messages", "prompt/completion", "alpaca", "text"]

KEYS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Turn(NamedTuple):
    """One message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One example as read, its system text and prompt template applied: either `messages` or `text` is set."""

    messages: tuple[Turn, ...] | None
    text: str | None
    line: int
    source: str
    format: Format
    context: int = 0
    """So many leading messages are given and never learnt, even an assistant's: the conversation in a `prompt`."""

    @property
    def prompt(self) -> str:
        """What comes before the last answer, without the system text; nothing for `text`."""
        return "\n\n".join(turn.content for turn in (self.messages or ())[:-1] if turn.role != "system")

    @property
    def asked(self) -> list[dict[str, str]]:
        """The messages before the last answer, as `chat.encode_prompt` takes them; none for `text`."""
        return as_dicts((self.messages or ())[:-1])

    @property
    def answer(self) -> str:
        """The last answer; all of it for `text`."""
        return self.messages[-1].content if self.messages else self.text or ""

    @property
    def system(self) -> str:
        """The system text, empty where there is none."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else ""


def as_dicts(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Messages as chat templates take them."""
    return [turn._asdict() for turn in turns]


class BadExample(Exception):
    """A reason, for the line being read."""


class EmptyAnswer(Exception):
    """The line being read holds an example with nothing to learn."""


def check_task(prompt: config.Prompt, task: str) -> None:
    """Check that a prompt template can be used for a task.

    Raises:
        CogpressError: learning reversed asks with one text, and the template has other fields.
    """
    if task == "reversed" and len(prompt.fields) != 1:
        raise CogpressError(
            f"Learning reversed asks with one text, and prompt.template has the fields {', '.join(prompt.fields)}. "
            "Give it a template with one."
        )


def example_of(item: Any, line: int, source: str, prompt: config.Prompt, task: str) -> Example:
    """The example that a line's value holds.

    Args:
        item: the value, as JSON types.
        line: its number.
        source: the file's name.
        prompt: gives the system text, and the template that a prompt of fields or of text fills.
        task: `answer` or `reversed`.

    Raises:
        BadExample: it can not be used.
        EmptyAnswer: it holds nothing to learn.
    """
    if not isinstance(item, dict):
        raise BadExample(f"{_kind(item)} and not a JSON object")
    has = {name: value for name, value in item.items() if value is not None}
    if "messages" in has:
        return _chat_example(_turns(has["messages"], "messages"), 0, "messages", line, source, prompt, task)
    if "prompt" in has and "completion" in has:
        asked = _asked_turns(has["prompt"], prompt, task)
        answered = _answer_turns(has["completion"])
        return _chat_example((*asked, *answered), len(asked), "prompt/completion", line, source, prompt, task)
    if "instruction" in has and "output" in has:
        parts = [_text(has["instruction"], "instruction"), _text(has.get("input", ""), "input")]
        if not parts[0].strip():
            raise BadExample("instruction is empty")
        asked = (Turn("user", _fill(prompt, "\n\n".join(part for part in parts if part.strip()), task)),)
        answered = (Turn("assistant", _text(has["output"], "output")),)
        return _chat_example((*asked, *answered), 1, "alpaca", line, source, prompt, task)
    if "text" in has:
        text = _text(has["text"], "text")
        if task == "reversed":
            raise BadExample("text has no prompt, so it cannot be learnt reversed")
        if not text.strip():
            raise EmptyAnswer
        return Example(None, text, line, source, "text")
    raise BadExample(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor text; "
        + found_keys(list(has))
    )


def _chat_example(
    turns: Sequence[Turn], context: int, format: Format, line: int, source: str, prompt: config.Prompt, task: str
) -> Example:
    _check_order(turns)
    if not all(turn.content.strip() for turn in turns if turn.role == "user"):
        raise BadExample("the prompt is empty")
    if not all(turn.content.strip() for turn in turns[context:] if turn.role == "assistant"):
        raise EmptyAnswer
    if task == "reversed":
        turns, context = _reversed(turns, prompt), 0
    if prompt.system and turns[0].role != "system":
        turns, context = (Turn("system", prompt.system), *turns), context + 1
    return Example(tuple(turns), None, line, source, format, context)


def _reversed(turns: Sequence[Turn], prompt: config.Prompt) -> tuple[Turn, ...]:
    *system, asked, answered = turns
    if [turn.role for turn in system] not in ([], ["system"]):
        raise BadExample("a conversation of several turns cannot be learnt reversed")
    return (
        *system,
        Turn("user", prompt.fill(answered.content)),
        Turn("assistant", asked.content),
    )


def _check_order(turns: Sequence[Turn]) -> None:
    before = ""
    for number, turn in enumerate(turns, start=1):
        if turn.role not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "first"
            raise BadExample(f"message {number} is {turn.role}, but {after} comes {' or '.join(_MAY_FOLLOW[before])}")
        before = turn.role
    if before != "assistant":
        raise BadExample(f"ends with {before or 'nothing'}, but the last message must be assistant's, to be learnt")


def _turns(value: Any, name: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise BadExample(f"{name} is {_kind(value)} and not a list")
    if not value:
        raise BadExample(f"{name} is empty")
    return tuple(_turn(item, f"{name}[{index}]") for index, item in enumerate(value))


def _turn(value: Any, name: str) -> Turn:
    if not isinstance(value, dict):
        raise BadExample(f"{name} is {_kind(value)} and not an object")
    role = value.get("role")
    if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
        raise BadExample(f"{name} has the role {_short(role)}, not system, user, assistant or tool")
    return Turn(role, _text(value.get("content"), f"{name}.content"))


def _asked_turns(value: Any, prompt: config.Prompt, task: str) -> tuple[Turn, ...]:
    if isinstance(value, list):
        return _turns(value, "prompt")
    if isinstance(value, dict):
        if task == "reversed":
            raise BadExample("prompt is an object of fields, so it cannot be learnt reversed")
        try:
            return (Turn("user", _text(prompt.render(value), "prompt")),)
        except CogpressError as error:
            raise BadExample(str(error).rstrip(".")) from None
    return (Turn("user", _fill(prompt, _text(value, "prompt"), task)),)


def _answer_turns(value: Any) -> tuple[Turn, ...]:
    return _turns(value, "completion") if isinstance(value, list) else (Turn("assistant", _text(value, "completion")),)


def _fill(prompt: config.Prompt, text: str, task: str) -> str:
    """The text as the server would ask it. Learnt reversed it is the answer, which no template wraps."""
    return text if not text.strip() or task == "reversed" else prompt.fill(text)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadExample(f"{name} is {_kind(value)} and not a string")
    if "\0" in value:
        raise BadExample(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadExample(f"{name} contains half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, for a reason, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def found_keys(names: Sequence[str]) -> str:
    """The keys, told apart from what they might do to a terminal."""
    shown = ", ".join(_short(name) for name in names[:8])
    return f"it has {shown}{', ...' if len(names) > 8 else ''}" if names else "it has no keys with a value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
