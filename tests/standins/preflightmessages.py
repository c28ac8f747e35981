"""The messages in the source of preflight, as its page lists them: what is filled in is an ellipsis."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.standins.messages import text

FOLDER = Path(__file__).resolve().parents[2] / "cogpress" / "preflight"

CONSTANTS = {"NAME": ".dockerignore", "REGISTRY": "r8.im", "AGAIN": "Run scripts/lock."}

TOPICS = ("cogyaml", "signature", "packages", "weights", "image", "place")


def messages(file: str) -> Iterator[tuple[str, str, str, str]]:
    """Function, outcome, message and fix of each finding that a file can make but for those that passed."""
    for function in ast.parse((FOLDER / f"{file}.py").read_text()).body:
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for call in sorted(calls, key=lambda node: node.lineno):
                outcome = getattr(call.func, "id", "")
                if outcome in ("failed", "warning", "skipped", "how"):
                    message, fix = ([*(text(argument, CONSTANTS) for argument in call.args), ""])[:2]
                    yield function.name, outcome, message, fix
