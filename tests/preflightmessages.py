"""The messages in the source of preflight, as its page lists them: what is filled in is an ellipsis."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "cogpress" / "preflight"

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
                    message, fix = ([*map(text, call.args), ""])[:2]
                    yield function.name, outcome, message, fix


def text(node: ast.expr) -> str:
    """What is written, with an ellipsis for what is only known when it runs."""
    found = "…"
    if isinstance(node, ast.Constant):
        found = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        found = "".join(map(text, node.values))
    elif isinstance(node, ast.FormattedValue):
        found = text(node.value) if isinstance(node.value, ast.Name) else "…"
    elif isinstance(node, ast.BinOp):
        found = text(node.left) + text(node.right)
    elif isinstance(node, ast.Name):
        found = CONSTANTS.get(node.id, "…")
    return re.sub("…+", "…", found)


def words(message: str) -> int:
    """How many words are always the same."""
    return len(re.findall(r"[A-Za-z]{2,}", message))
