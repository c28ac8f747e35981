"""The reference's own answers, kept with the run: each prompt is answered once, whichever examples ask for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogpress.files import read_json, write_json

REFERENCE = "reference.json"
"""In a run's folder: {"adapter": its fingerprint, "answers": {a prompt's digest: {"max_tokens", "text"}}}."""


def kept(run: Path, adapter: str, prompts: Sequence[Sequence[int]], max_tokens: int | None = None) -> list[str | None]:
    """The answers that are known.

    Args:
        run: the run's folder.
        adapter: the adapter's fingerprint.
        prompts: (examples, tokens).
        max_tokens: only answers that were generated with this bound; None for any.

    Returns:
        for each prompt the answer's text, or None where the reference has not answered it yet.
    """
    known = _read(run, adapter)
    found = [known.get(_digest(prompt), {}) for prompt in prompts]
    return [one.get("text") if max_tokens in (None, one.get("max_tokens")) else None for one in found]


def keep(run: Path, adapter: str, prompts: Sequence[Sequence[int]], answers: Sequence[str], max_tokens: int) -> None:
    """Add answers to those that are known; the arguments are those of `kept`."""
    added = {
        _digest(prompt): {"max_tokens": max_tokens, "text": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    }
    write_json(run / REFERENCE, {"adapter": adapter, "answers": _read(run, adapter) | added})


def _read(run: Path, adapter: str) -> dict[str, dict[str, Any]]:
    try:
        saved = read_json(run / REFERENCE)
        return dict(saved["answers"]) if saved["adapter"] == adapter else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
