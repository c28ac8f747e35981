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
    system = inputs.get("system_prompt")
    try:
        if inputs.get("messages"):
            messages = json.loads(inputs["messages"]) if isinstance(inputs["messages"], str) else inputs["messages"]
            if system:
                messages = conversation(Question(messages=messages, system=system), prompt)
            # As a prompt: the assistant's earlier answers in it were not rated and must not be trained on.
            return {"prompt": messages, "completion": right}
        if inputs.get("fields"):
            fields = json.loads(inputs["fields"]) if isinstance(inputs["fields"], str) else inputs["fields"]
            if not isinstance(fields, dict):
                return None
            return _row(Question(fields=fields, system=system), prompt, right)
    except (ValueError, TypeError, KeyError, IndexError, CogpressError):
        return None  # the model rejected it too
    text = inputs.get("prompt")
    if not isinstance(text, str) or not text.strip():
        return None
    return _row(Question(text, system=system), prompt, right)


def _row(question: Question, prompt: Prompt, right: str) -> dict[str, Any]:
    """A row of training data; one with its own system prompt holds the whole conversation."""
    if not question.system:
        return {"prompt": question.text if question.fields is None else question.fields, "completion": right}
    return {"messages": [*conversation(question, prompt), {"role": "assistant", "content": right}]}
