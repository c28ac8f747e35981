"""Encode a prediction's events as server-sent events, in the form that Replicate's clients read."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

_BREAKS = re.compile("\r\n|\r|\n")
_REASONS = {"failed": '{"reason": "error"}', **dict.fromkeys(("canceled", "aborted"), '{"reason": "canceled"}')}


def text_of(chunk: Any) -> str:
    """A chunk of output as text: itself, or its JSON."""
    return chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)


def encode(event: str, number: int, outputs: int, text: str) -> bytes:
    """One event.

    Args:
        event: output, logs, error or done.
        number: events so far, including this one.
        outputs: output events so far. The id holds both counts, so that a reader can resume from either.
        text: the data.
    """
    # A line break inside an event's data starts another data line; clients join them again.
    if "\n" in text or "\r" in text:
        text = "\ndata: ".join(_BREAKS.split(text))
    return f"event: {event}\nid: {number}:{outputs}\ndata: {text}\n\n".encode(errors="replace")


def after(before: str, text: str) -> str:
    """An output's text to encode after another one: a line end that falls between the two is one, and not two."""
    return text[1:] if before.endswith("\r") and text.startswith("\n") else text


def failure(error: str | None) -> str:
    """The data of an error event."""
    return json.dumps({"detail": error}, ensure_ascii=False)


def reason(status: str) -> str:
    """The data of the done event after a final status."""
    return _REASONS.get(status, "{}")


def replay(record: dict[str, Any], seen: int = 0) -> list[bytes]:
    """Rebuild the events of a finished prediction from what the store keeps of it.

    Args:
        record: of a prediction that ended.
        seen: how many outputs the reader already has; they are left out.
    """
    output = record["output"]
    texts = list(map(text_of, output)) if isinstance(output, list) else [] if output is None else [text_of(output)]
    shown = [after(before, text) for before, text in pairwise(["", *texts])]
    frames = [encode("output", number, number, text) for number, text in enumerate(shown, 1)][seen:]
    if record["status"] == "failed":
        frames.append(encode("error", len(texts) + 1, len(texts), failure(record["error"])))
    frames.append(encode("done", len(texts) + 2, len(texts), reason(record["status"])))
    return frames
