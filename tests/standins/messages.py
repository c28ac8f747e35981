"""The messages of errors in the source, as docs/troubleshooting.md lists them.

python tests/standins/messages.py        # writes the lists into the page again
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

TOPICS = {
    "Environment": "cli environment interpreter pip progress",
    "model.yaml": "config",
    "Examples": "data examples example reading tokenizing",
    "Models and weights": "archive base download fetch hub manifest source origin tensors",
    "Training": "calibration recipe trainer training train adapter",
    "Merge": "merge",
    "Verification": "parity verdict verify divergence",
    "Quantization": "quantize compress comparison schemes",
    "Publishing": "card publish bundle",
    "Serving": "chat client engine engines grammar inputs multilora observe pget predict schema server serving "
    "streaming",
    "Batches": "batch",
    "Playground": "local",
    "Plan": "architecture cost hardware memory plan plan_report plots",
    "Push": "push replicate remote web",
    "Benchmarks": "bench demo",
}
"""Which files and folders a topic's messages are from; preflight has a page of its own."""

CLASSES = {
    "ArgumentTypeError", "BadDataError", "BusyError", "CogpressError", "InvalidInput", "LostError", "NotFound",
    "Refused", "StatusError", "TooLarge", "Unreachable", "ValueError", "Wrong", "BadExample", "_Missing",
    "_NotFound",
}  # fmt: skip


def text(node: ast.expr, constants: Mapping[str, str] = {}) -> str:
    """What is written, with an ellipsis for what is only known when it runs."""
    found = "…"
    if isinstance(node, ast.Constant):
        found = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        found = "".join(text(value, constants) for value in node.values)
    elif isinstance(node, ast.FormattedValue):
        found = text(node.value, constants) if isinstance(node.value, ast.Name) else "…"
    elif isinstance(node, ast.BinOp):
        found = text(node.left, constants) + text(node.right, constants)
    elif isinstance(node, ast.Name):
        found = constants.get(node.id, "…")
    return re.sub("…+", "…", found)


def words(message: str) -> int:
    """How many words are always the same."""
    return len(re.findall(r"[A-Za-z]{2,}", message))


def messages() -> Iterator[tuple[str, str]]:
    """Topic and message of each error that a user can see, in the order of the source."""
    of_file = {name: topic for topic, names in TOPICS.items() for name in names.split()}
    for path in sorted([*(ROOT / "cogpress").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *ROOT.glob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "preflight" in parts:
            continue
        topic = next((of_file[part] for part in (*parts[1:], parts[0]) if part in of_file), "Anything else")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) in CLASSES]
        for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
            found = max((text(argument, constants) for argument in call.args), key=words, default="")
            if words(found) >= 2:
                yield topic, " ".join(found.split())


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def lists() -> dict[str, str]:
    """Each topic's messages as a list in Markdown, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for topic, message in messages():
        found.setdefault(topic, set()).add(message)
    return {
        topic: "".join(f"- {_shown(message)}\n" for message in sorted(rows, key=lambda row: row.lstrip("…. ").lower()))
        for topic, rows in found.items()
    }


def _shown(message: str) -> str:
    """A message that Markdown shows as it is."""
    return re.sub(r"([<>*_`|\[\]])", r"\\\1", message)


def page() -> str:
    """The page with its lists as they should be: from each topic's mark to the next heading."""
    listed = lists()
    whole = PAGE.read_text(encoding="utf-8")
    for topic in listed:
        mark = f"<!-- messages: {topic} -->\n"
        before, found, after = whole.partition(mark)
        if not found:
            raise SystemExit(f"{PAGE.name} has no line {mark.strip()}.")
        rest = after[match.start() :] if (match := re.search(r"^## ", after, re.MULTILINE)) else ""
        whole = f"{before}{mark}\n{listed[topic]}" + (f"\n{rest}" if rest else "")
    return whole


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
