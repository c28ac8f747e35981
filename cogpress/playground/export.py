"""Turn rated predictions into rows of training data: good answers as they are, bad ones as corrected."""

from __future__ import annotations

import json
from typing import Any

from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.playground.events import text_of
from cogpress.prompts import Question, conversation


def output_text(output: Any) -> str:
    """An output as one text."""
    if isinstance(output, list):
        return "".join(map(text_of, output))
    return "" if output is None else text_of(output)


def example(record: dict[str, Any], prompt: Prompt) -> dict[str, Any] | None:
    """A rated prediction as a row of training data; None if there is no right answer or no prompt.

    Args:
        record: from the store.
        prompt: the project's prompt settings, which training applies to a row's prompt but not to its messages.
    """
    inputs = record["input"] or {}
    right = record["correction"] if record["rating"] == "bad" else record["correction"] or output_text(record["output"])
    if not right or not right.strip() or (record["rating"] == "good" and record["status"] != "succeeded"):
        return None
    try:
        row, tools = _row_of(inputs, prompt, right), _parsed(inputs.get("tools"))
    except (ValueError, TypeError, KeyError, IndexError, CogpressError):
        return None  # the model rejected it too
    return {**row, "tools": tools} if row and tools else row


def _parsed(value: Any) -> Any:
    return json.loads(value if value.strip() else "null") if isinstance(value, str) else value


def _row_of(inputs: dict[str, Any], prompt: Prompt, right: str) -> dict[str, Any] | None:
    system = inputs.get("system_prompt")
    if inputs.get("messages"):
        messages = _parsed(inputs["messages"])
        if system:
            messages = conversation(Question(messages=messages, system=system), prompt)
        # As a prompt: the assistant's earlier answers in it were not rated and must not be trained on.
        return {"prompt": messages, "completion": right}
    if inputs.get("fields"):
        fields = _parsed(inputs["fields"])
        return _row(Question(fields=fields, system=system), prompt, right) if isinstance(fields, dict) else None
    text = inputs.get("prompt")
    if not isinstance(text, str) or not text.strip():
        return None
    return _row(Question(text, system=system), prompt, right)


def _row(question: Question, prompt: Prompt, right: str) -> dict[str, Any]:
    """A row of training data; one with its own system prompt holds the whole conversation."""
    if not question.system:
        return {"prompt": question.text if question.fields is None else question.fields, "completion": right}
    return {"messages": [*conversation(question, prompt), {"role": "assistant", "content": right}]}
