"""One example: the plain data of a row in one of five formats, before any prompt template applies."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cogpress.config import Task
from cogpress.data.read import BadRow, found_keys, parse_text, short
from cogpress.errors import CogpressError
from cogpress.given import REASONING, kind, tool, tool_call
from cogpress.prompts import Message, Question

Format = Literal["messages", "conversations", "prompt/completion", "alpaca", "text"]

_MASKS = ("completion_mask", "assistant_masks")
"""TRL's names of what is learnt; theirs has an entry for each token, a row's one for each turn."""

_FORMS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools", "weight", *_MASKS),
    "conversations": ("conversations", "system", "tools", "weight", *_MASKS),
    "prompt/completion": ("prompt", "completion", "system", "tools", "weight", *_MASKS),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", "weight"),
    "text": ("text", "weight"),
}
KEYS = tuple(dict.fromkeys(name for names in _FORMS.values() for name in names))

_MAX_WEIGHT = sys.float_info.max

_TURN_KEYS = ("role", "content", "weight", "train")
_ROLE_KEYS: dict[Any, tuple[str, ...]] = {"tool": ("tool_call_id", "name"), "assistant": ("tool_calls", *REASONING)}
"""Further keys of a turn by its role, which the chat template writes."""
_SHAREGPT_KEYS = ("from", "value", "weight", "train")
_CALL = "function_call"
"""Who speaks in ShareGPT's turns that hold calls of functions, as JSON."""
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    _CALL: "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
"""Roles by ShareGPT's names."""
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


_ROLES = (*_MAY_FOLLOW, "developer")

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
    "instruction": "the question",
    "input": "more of the question",
    "output": "the answer, learnt",
    "history": "earlier questions and answers, not learnt",
    "system": "the system text",
    "tools": "functions that the model may call",
    "weight": "factor on the row's loss",
    **dict.fromkeys(_MASKS, "which turns are learnt: 1, else 0"),
    "text": "plain text, all of it learnt",
}


def key_paths(item: Any) -> set[str]:
    """The keys of a row that have a value: its own, `messages[].role` of its turns, `prompt.name` of its fields."""
    found: set[str] = set()
    for name, value in item.items() if isinstance(item, dict) else ():
        if value is None:
            continue
        found.add(name)
        turns = value if isinstance(value, list) and name != "tools" else []
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


def without(item: Any, ignore: Collection[str]) -> tuple[Any, set[str]]:
    """A row without nulls and without the keys to ignore, at any depth, and which of these it had.

    Inside of `tools` and `tool_calls`, where keys are parameters of functions, none is ignored.
    """
    left: set[str] = set()

    def stripped(value: Any, ignore: Collection[str]) -> Any:
        if isinstance(value, dict):
            left.update(name for name, one in value.items() if name in ignore and one is not None)
            return {
                name: stripped(one, () if name in ("tools", "tool_calls") else ignore)
                for name, one in value.items()
                if one is not None and name not in ignore
            }
        return [stripped(one, ignore) for one in value] if isinstance(value, list) else value

    return stripped(item, ignore), left


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
            # Other roles are refused themselves.
            if isinstance(turn, dict) and (_is_sharegpt(turn) or short(turn.get("role"))[1:-1] in _ROLES):
                known: tuple[str, ...] = _SHAREGPT_KEYS if _is_sharegpt(turn) else _TURN_KEYS
                known = (*known, *_ROLE_KEYS.get(short(turn.get("role"))[1:-1], ()))
                unread += [key for key, value in turn.items() if key not in known and value not in ("", [], {})]
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
    tools = _tools(has.get("tools", []))
    said = [example.question.system or "", *(turn["content"] for turn in example.question.messages)]
    if tools and any("<tools>" in text for text in said):
        raise BadRow(
            "tools stand beside a text that lists them in <tools>, and the chat template would list them again: take "
            "the list out of the text, or name tools in data.ignore to keep the text as it is"
        )
    if tools and task == "reversed":
        raise BadRow("tools cannot be learned reversed")
    return replace(example, weight=float(weight), question=replace(example.question, tools=tools))


def _example_of(has: Mapping[str, Any], line: int, task: Task) -> Example:
    system = _text(has.get("system", ""), "system") or None
    if "messages" in has or "conversations" in has:
        format: Format = "messages" if "messages" in has else "conversations"
        _refuse_unread(has, format)
        turns = _turns(has[format], format)
        _check_order(turns)
        turns = _masked(has, turns)
        first = [turn["role"] for turn in turns].index("assistant")
        return _example(line, format, Question(messages=turns[:first], system=system), turns[first:], task)
    if "prompt" in has and "completion" in has:
        _refuse_unread(has, "prompt/completion")
        question = replace(_asked(has["prompt"], task), system=system)
        given = question.messages or (_message("user", ""),)
        answer = _masked(has, (*given, *_answered(has["completion"])), len(given))[len(given) :]
        return _example(line, "prompt/completion", question, answer, task)
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
    if "input_ids" in has:
        raise BadRow("input_ids are tokens, which only their own tokenizer reads: give the texts they were made from")
    raise BadRow(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor conversations, "
        "nor text; " + found_keys(list(has)) + "; if these are the same under other names, say so in data.rename"
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
    if not learnt or not all(answer[at]["content"].strip() or answer[at].get("tool_calls") for at in learnt):
        raise EmptyAnswer
    answer = answer[: learnt[-1] + 1]  # nothing is learnt from what comes after
    unlearnt = frozenset(i for i, turn in enumerate(answer) if turn["role"] == "assistant" and i not in learnt)
    turns = [_given(turn) for turn in (*asked, *answer)]
    answer = tuple(map(_given, answer))
    question = replace(question, messages=tuple(map(_given, question.messages)))
    if task == "reversed":
        if unfit := next((name for turn in turns for name in ("tool_calls", REASONING[0]) if turn.get(name)), None):
            raise BadRow(f"{unfit} cannot be learned reversed")
        *system, user, assistant = turns
        if [turn["role"] for turn in system] not in ([], ["system"]):
            raise BadRow("a conversation of several turns cannot be learned reversed")
        question = Question(text=assistant["content"], system=system[0]["content"] if system else question.system)
        answer = (_message("assistant", user["content"]),)
    return Example(line, format, question, answer, unlearnt=unlearnt)


def _masked(row: Mapping[str, Any], turns: tuple[Message, ...], given: int = 0) -> tuple[Message, ...]:
    """Turns with weight 0 where the row's mask has a 0 for an assistant's; the first `given` ones are never learnt."""
    names = [name for name in _MASKS if name in row]
    if not names:
        return turns
    name, mask = names[0], row[names[0]]
    if len(names) > 1:
        raise BadRow(f"{' and '.join(names)} stand in one row: give one of them")
    if not isinstance(mask, list) or any(one not in (0, 1) or not isinstance(one, bool | int | float) for one in mask):
        raise BadRow(f"{name} is no list of 1 (learnt) and 0 (not)")
    if len(mask) != len(turns):
        raise BadRow(
            f"{name} has {len(mask)} entries for {len(turns)} turns; a mask of tokens, as TRL makes it, is of no use "
            "to another tokenizer: give an entry for each turn"
        )
    if wrong := [at for at, turn in enumerate(turns) if mask[at] and (at < given or turn["role"] != "assistant")]:
        raise BadRow(f"{name}[{wrong[0]}] asks to learn a turn that is no answer")
    return tuple(
        turn if keep or turn["role"] != "assistant" else {**turn, "weight": 0}
        for turn, keep in zip(turns, mask, strict=True)
    )


def _is_learnt(turn: Message) -> bool:
    return bool(turn.get("weight", True)) and bool(turn.get("train", True))


def _given(turn: Message) -> Message:
    """A turn as the chat template gets it."""
    return {name: value for name, value in turn.items() if name not in ("weight", "train")}


def _history(value: Any) -> list[Message]:
    """The earlier turns of Alpaca's `history`, pairs of what was asked and answered."""
    if not isinstance(value, list):
        raise BadRow(f"history is {kind(value)} and not a list")
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
    if isinstance(value, str) and value.lstrip().startswith("["):  # as tables hold lists
        value = parse_text(value, name)
    if not isinstance(value, list):
        raise BadRow(f"{name} is {kind(value)} and not a list")
    if not value:
        raise BadRow(f"{name} is empty")
    return tuple(_turn(item, f"{name}[{index}]") for index, item in enumerate(value))


def _turn(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {kind(value)} and not an object")
    if _is_sharegpt(value):
        said, text = value.get("from"), "value"
        role = _SHAREGPT.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow(f"{name} is from {short(said)}, not system, human, gpt, {_CALL}, observation or tool")
        if said == _CALL:
            value = {**value, text: "", "tool_calls": _said_calls(value.get(text), f"{name}.{text}")}
    else:
        role, text = value.get("role"), "content"
        role = "system" if role == "developer" else role  # OpenAI's newer name
        if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
            raise BadRow(f"{name} has the role {short(role)}, not system, user, assistant or tool")
    calls = _calls(value["tool_calls"], name) if role == "assistant" and value.get("tool_calls") else []
    content = "" if calls and value.get(text) is None else _content(value.get(text), f"{name}.{text}")
    turn: dict[str, Any] = {"role": role, "content": content}
    if role == "tool":
        turn |= {key: _text(value[key], f"{name}.{key}") for key in _ROLE_KEYS[role] if key in value}
    if calls:
        turn["tool_calls"] = calls
    reasoning = [key for key in REASONING if role == "assistant" and value.get(key)]
    if len(reasoning) > 1:
        raise BadRow(f"{name} has {' and '.join(reasoning)}: give one of them")
    if reasoning:
        turn[REASONING[0]] = _text(value[reasoning[0]], f"{name}.{reasoning[0]}")
        if "</think>" in content:
            raise BadRow(f"{name} has {reasoning[0]} beside a content with </think>: give one of them")
    for key in ("weight", "train"):
        if key in value:
            if value[key] not in (0, 1) or not isinstance(value[key], bool | int | float):
                raise BadRow(f"{name}.{key} is {short(value[key])}: a turn is learnt (1) or not (0)")
            if value[key] and role != "assistant":
                raise BadRow(f"{name}.{key} asks to learn a turn that is not the assistant's")
            turn[key] = value[key]
    return turn


def _is_sharegpt(turn: Mapping[str, Any]) -> bool:
    return "from" in turn and "role" not in turn


def _said_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls in the text of a `function_call` turn: an object or a list of objects with `name` and `arguments`."""
    found = parse_text(_text(value, name), name)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            raise BadRow(f'{name} is not {{"name": ..., "arguments": ...}}, or a list of these')
    if not calls:
        raise BadRow(f"{name} holds no call")
    return [{"function": call} for call in calls]


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    value = parse_text(value, f"{name}.tool_calls") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"{name}.tool_calls is {kind(value)} and not a list")
    calls = []
    for call in value:
        call = _unflattened(call)
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(text := function.get("arguments"), str) and text.strip():
            call = {**call, "function": {**function, "arguments": parse_text(text, f"arguments in {name}")}}
        try:
            calls.append(tool_call(_checked(call, f"{name}.tool_calls"), name))
        except CogpressError as error:
            raise BadRow(str(error).rstrip(".")) from None
    return calls


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The row's functions, as a list or its JSON text, as Parquet files often hold it; each may stand without the
    `{"type": "function", "function": ...}` around it, as LLaMA-Factory, xLAM and glaive write them.
    """
    value = parse_text(value if value.strip() else "[]", "tools") if isinstance(value, str) else value or []
    if not isinstance(value, list):
        raise BadRow(f"tools is {kind(value)} and not a list")
    value = [_unflattened(one) for one in value]
    try:
        return tuple(tool(_checked(one, f"tools[{at}]"), f"tools[{at}]") for at, one in enumerate(value))
    except CogpressError as error:
        raise BadRow(str(error).rstrip(".")) from None


def _unflattened(one: Any) -> Any:
    """A function, or a call of one, as OpenAI's API nests it, where a row has only what belongs inside."""
    if not isinstance(one, dict) or "function" in one or one.get("type", "function") != "function":
        return one
    outer = {"type": "function", **({"id": one["id"]} if "id" in one else {})}
    return {**outer, "function": {name: value for name, value in one.items() if name not in ("type", "id")}}


_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text, in OpenAI's two APIs."""


def _content(value: Any, name: str) -> str:
    """A text, or the text of content parts."""
    if not isinstance(value, list):
        return _text(value, name)
    if not value:
        raise BadRow(f"{name} is an empty list")
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or set(part) != {"type", "text"}:
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


def _checked(value: Any, name: str) -> Any:
    _check_texts(value, name)
    return value


def _check_texts(value: Any, name: str) -> None:
    """Check every text in JSON; what else an object of fields may hold, the template checks."""
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
        raise BadRow(f"{name} is {kind(value)} and not a string")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} contains half of a surrogate pair, which is no character") from None
    return value
