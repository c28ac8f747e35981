"""The turns of an example: who speaks, what is said and called, and what of it is learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cogpress.data.read import BadRow, found_keys, parse_text, short
from cogpress.errors import CogpressError
from cogpress.given import REASONING, kind, tool, tool_call
from cogpress.prompts import Message

MASKS = ("completion_mask", "assistant_masks")
"""TRL's names of what is learnt; theirs has an entry for each token, a row's one for each turn."""

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


def unread_keys(turn: Any) -> list[str]:
    """The keys of a turn that would not be read; empty ones hold nothing to lose."""
    # Other roles are refused themselves.
    if not isinstance(turn, dict) or not (_is_sharegpt(turn) or short(turn.get("role"))[1:-1] in _ROLES):
        return []
    further = _ROLE_KEYS.get(short(turn.get("role"))[1:-1], ())
    known = (*(_SHAREGPT_KEYS if _is_sharegpt(turn) else _TURN_KEYS), *further)
    return [key for key, value in turn.items() if key not in known and value not in ("", [], {})]


def masked(row: Mapping[str, Any], turns: tuple[Message, ...], given: int = 0) -> tuple[Message, ...]:
    """Turns with weight 0 where the row's mask has a 0 for an assistant's; the first `given` ones are never learnt."""
    names = [name for name in MASKS if name in row]
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


def is_learnt(turn: Message) -> bool:
    return bool(turn.get("weight", True)) and bool(turn.get("train", True))


def plain_turn(turn: Message) -> Message:
    """A turn as the chat template gets it."""
    return {name: value for name, value in turn.items() if name not in ("weight", "train")}


def history_of(value: Any) -> list[Message]:
    """The earlier turns of Alpaca's `history`, pairs of what was asked and answered."""
    if not isinstance(value, list):
        raise BadRow(f"history is {kind(value)} and not a list")
    turns: list[Message] = []
    for index, both in enumerate(value):
        if not isinstance(both, list) or len(both) != 2:
            raise BadRow(f"history[{index}] is not a list of a question and its answer")
        turns += [
            turn_of(role, text_of(text, f"history[{index}]"))
            for role, text in zip(("user", "assistant"), both, strict=True)
        ]
    return turns


def check_order(turns: Sequence[Message]) -> None:
    before = ""
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "first"
            expected = " or ".join(_MAY_FOLLOW[before])
            raise BadRow(f"message {number} is {turn['role']}, but {after} comes {expected}")
        before = turn["role"]
    if before != "assistant":
        raise BadRow(f"ends with {before or 'nothing'}, but the last message must be the assistant's, to be learned")


def turn_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def turns_of(value: Any, name: str) -> tuple[Message, ...]:
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
        if not {"role", "from"} & set(value):
            raise BadRow(f"{name} has neither role and content nor from and value; {found_keys(list(value))}")
        role, text = value.get("role"), "content"
        role = "system" if role == "developer" else role  # OpenAI's newer name
        if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
            raise BadRow(f"{name} has the role {short(role)}, not system, user, assistant or tool")
    calls = _calls(value["tool_calls"], name) if role == "assistant" and value.get("tool_calls") else []
    content = "" if calls and value.get(text) is None else _content(value.get(text), f"{name}.{text}")
    turn: dict[str, Any] = {"role": role, "content": content}
    if role == "tool":
        turn |= {key: text_of(value[key], f"{name}.{key}") for key in _ROLE_KEYS[role] if key in value}
    if calls:
        turn["tool_calls"] = calls
    reasoning = [key for key in REASONING if role == "assistant" and value.get(key)]
    if len(reasoning) > 1:
        raise BadRow(f"{name} has {' and '.join(reasoning)}: give one of them")
    if reasoning:
        turn[REASONING[0]] = text_of(value[reasoning[0]], f"{name}.{reasoning[0]}")
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
    found = parse_text(text_of(value, name), name)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            raise BadRow(f'{name} is not {{"name": ..., "arguments": ...}}, or a list of these')
    if not calls:
        raise BadRow(f"{name} holds no call")
    return [{"function": call} for call in calls]


def check_calls(turns: Sequence[Message], tools: Sequence[Any]) -> None:
    """Check that calls are of functions that the row has, and that results are of the calls before them."""
    names = {tool["function"]["name"] for tool in tools}
    ids: set[str] = set()
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            ids |= {call["id"]} if "id" in call else set()
            if names and call["function"]["name"] not in names:
                raise BadRow(f"{call['function']['name'][:80]} is called, which is not among the row's tools")
        if ids and turn["role"] == "tool" and turn.get("tool_call_id", None) not in (None, *ids):
            raise BadRow(f"tool_call_id {short(turn['tool_call_id'])} is the id of no call before it")


def is_call(text: str) -> bool:
    """Whether a text is nothing but calls of functions, as `function_call` turns hold them."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        return bool(_said_calls(text, ""))
    except BadRow:
        return False


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


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
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


def unfilled(turn: Message, tools: Sequence[Any]) -> Message:
    """A turn whose calls have no null for a parameter that their function does not have.

    A table gives every object the keys of all of them, and what is exported from it has nulls for those.
    """
    if not turn.get("tool_calls"):
        return turn
    described = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}

    def call(one: dict[str, Any]) -> dict[str, Any]:
        function = one["function"]
        parameters = described.get(function["name"])
        names = parameters.get("properties") if isinstance(parameters, dict) else None
        if not isinstance(names, dict):
            return one
        kept = {name: value for name, value in function["arguments"].items() if value is not None or name in names}
        return {**one, "function": {**function, "arguments": kept}}

    return {**turn, "tool_calls": [call(one) for one in turn["tool_calls"]]}


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
        return text_of(value, name)
    if not value:
        raise BadRow(f"{name} is an empty list")
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or set(part) != {"type", "text"}:
            raise BadRow(f'{name}[{index}] is not {{"type": "text", "text": ...}}; only text can be learnt')
        texts.append(text_of(part["text"], f"{name}[{index}].text"))
    return "".join(texts)


def _checked(value: Any, name: str) -> Any:
    check_texts(value, name)
    return value


def check_texts(value: Any, name: str) -> None:
    """Check every text and number in JSON; what else an object of fields may hold, the template checks."""
    if isinstance(value, str):
        text_of(value, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{name} is {value}, which is no number in JSON: give null, or leave it out")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_texts(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            text_of(key, f"a key of {name}")
            check_texts(item, f"{name}.{short(key)[1:-1]}")


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind(value)} and not a string")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} contains half of a surrogate pair, which is no character") from None
    return value
