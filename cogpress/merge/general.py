"""General text: what a base should still know after it was trained for a task.

The kit's own is prose, dialogue, code, lists, data, chat and other languages, written for it. One part is for computing
a merge, the other for measuring one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogpress.config import Data
from cogpress.data import read
from cogpress.errors import CogpressError
from cogpress.files import sha256
from cogpress.prompts import NO_LOSS, Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = Path(__file__).with_name("general.txt")
"""Texts, each under a line of `###`, its use and its kind."""

PIECE = 512
"""Tokens of a piece at most."""

MAX_TOKENS = 1 << 17
"""Most tokens for each use: all layers compute each of them, and the kit's own text has some thousand."""

Use = Literal["fit", "measure"]


def file(data: Data, root: Path) -> Path | None:
    """The user's own general text, where `data.general` names one."""
    return root / data.general if data.general else None


def key(path: Path | None) -> str:
    """The hash of the general text that `pieces` reads."""
    return sha256(path or OWN)


def pieces(tokenizer: PreTrainedTokenizerBase, use: Use, path: Path | None = None) -> list[list[int]]:
    """Token ids of general text, in pieces of at most 512 and `MAX_TOKENS` in all.

    Args:
        tokenizer: the base's.
        use: for computing a merge, or for measuring one.
        path: a file of one's own, JSON lines or Parquet with a `text` each; every third is for measuring.

    Raises:
        CogpressError: the file has no such lines, too few for both uses, or too much.
    """
    found: list[list[int]] = []
    total = 0
    for text in texts(use) if path is None else _given(path, use):
        ids = encode_plain(tokenizer, text)
        found += [ids[at : at + PIECE] for at in range(0, len(ids), PIECE)]
        if (total := total + len(ids)) > MAX_TOKENS:
            raise CogpressError(
                f"{path} has more than {MAX_TOKENS:,} tokens to {use}, and each of them is computed in every merge or "
                "measurement. Give fewer lines of more kinds: some hundred paragraphs are enough."
            )
    return [ids for ids in found if len(ids) > 1]


def rows(pieces: list[list[int]]) -> list[Row]:
    """Rows in which every token but the first has loss."""
    return [Row(ids, [NO_LOSS, *ids[1:]]) for ids in pieces]


def texts(use: Use) -> list[str]:
    """The kit's own texts, whole."""
    _, *parts = re.split(r"^### (fit|measure) \w+\n", OWN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text.strip() for one, text in zip(parts[::2], parts[1::2], strict=True) if one == use]


def _given(path: Path, use: Use) -> Iterator[str]:
    if not path.is_file():
        raise CogpressError(f"There is no general text at {path}. Correct data.general.")
    number = 0
    for number, (line, row) in enumerate(read.rows(path, ("text",)), 1):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            why = row if isinstance(row, read.BadRow) else "no JSON object with a text"
            raise CogpressError(f'{path}:{line} is {why}. Write lines such as {{"text": "..."}}.')
        if (number % 3 == 0) == (use == "measure"):
            yield text
    if number < 3:
        raise CogpressError(f"{path} has fewer than three lines: two of three are for the merge, one for measuring it.")
