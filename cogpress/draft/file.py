"""A draft's table as a file beside the weights: what it belongs to, and reading it without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cogpress.draft.rules import CONTEXT, Rules
from cogpress.draft.symbols import Alphabet
from cogpress.draft.table import Table, answers, build
from cogpress.errors import CogpressError
from cogpress.files import new_file, sha256
from cogpress.prompts import Row
from cogpress.weights import base, tensors
from cogpress.weights.filenames import DRAFT

NAME = "table.safetensors"

FORMAT = "2"

_FACTS = "cogpress"
"""The entry of the file's metadata that says what it belongs to."""

_TYPES = {"U64": np.uint64, "I32": np.int32, "F32": np.float32, "U8": np.uint8}
_PARTS = {"keys": "U64", "symbols": "I32", "shares": "F32", "tail": "I32", "ends": "I32", "kinds": "U8", "bare": "I32"}
_PARTS |= {"rules": "I32", "rule_shares": "F32"}

_RULE = CONTEXT + 2
"""Numbers of a rule: its context, filled up with `_NONE` at the front, its word and the symbol that follows."""

_NONE = -(1 << 31)


def path_in(weights: Path) -> Path:
    """Where a folder of weights has its draft's table."""
    return weights / DRAFT / NAME


def make(weights: Path, rows: Iterable[Row], adapter: str) -> Table:
    """Make a table of training rows and write it into a folder of weights.

    Args:
        weights: the folder, with its tokenizer.
        rows: what the adapter was trained on.
        adapter: its fingerprint.
    """
    tokenizer = base.tokenizer(weights)
    texts = tokenizer.batch_decode([[at] for at in range(len(tokenizer))])
    alphabet = Alphabet.of(texts, tokenizer.all_special_ids)
    made = build(answers(rows), alphabet, sorted(base.stop_ids(weights)))
    write(path_in(weights), made, tokenizer=weights / "tokenizer.json", adapter=adapter)
    return made


def write(path: Path, table: Table, *, tokenizer: Path, adapter: str) -> None:
    """Write a table, whole or not at all.

    Args:
        path: its file; the folder is made.
        table: the table.
        tokenizer: the tokenizer.json whose ids it holds.
        adapter: fingerprint of the adapter whose training's answers it is made of.
    """
    from safetensors.numpy import save_file

    parts = {
        "keys": table.keys,
        "symbols": table.symbols,
        "shares": table.shares,
        "tail": np.array(table.tail, np.int32),
        "ends": np.array(table.ends, np.int32),
        "kinds": table.alphabet.kinds,
        "bare": table.alphabet.bare,
        **_flat(table.rules),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry, as the library writes several in any order, and the same rows must give the same file.
    facts = json.dumps({"format": FORMAT, "tokenizer": sha256(tokenizer), "adapter": adapter})
    with new_file(path) as part:
        save_file({name: np.ascontiguousarray(value) for name, value in parts.items()}, part, metadata={_FACTS: facts})


def read(path: Path) -> Table:
    """Read a table; its large parts stay on the disk, and processes share the pages that they read.

    Raises:
        CogpressError: it is damaged, or of another format.
    """
    if facts(path).get("format") != FORMAT:
        raise CogpressError(f"{path} is of another version of cogpress. Make it again with scripts/draft.")
    found: dict[str, np.ndarray] = {}
    for name, place in tensors.stored(path.parent, [path]).items():
        if _PARTS.get(name) != place.dtype or len(place.shape) != 1:
            raise CogpressError(f"{path} holds {name}, which is no part of a draft. Make it again with scripts/draft.")
        if place.bytes:
            found[name] = np.memmap(path, _TYPES[place.dtype], "r", place.offset, place.shape)
        else:
            found[name] = np.zeros(0, _TYPES[place.dtype])
    if found.keys() != _PARTS.keys() or not len(found["keys"]) == len(found["symbols"]) == len(found["shares"]):
        raise CogpressError(f"{path} is no draft. Make it again with scripts/draft.")
    return Table(
        found["keys"],
        found["symbols"],
        found["shares"],
        tuple(found["tail"].tolist()),
        tuple(found["ends"].tolist()),
        Alphabet(found["kinds"], found["bare"]),
        _rules(path, found["rules"], found["rule_shares"]),
    )


def _flat(rules: Rules) -> dict[str, np.ndarray]:
    every = [(context, *rule) for context, some in rules.items() for rule in some]
    numbers = [(*[_NONE] * (CONTEXT - len(context)), *context, word, symbol) for context, word, symbol, _ in every]
    return {
        "rules": np.array(numbers, np.int32).reshape(-1),
        "rule_shares": np.array([one[3] for one in every], np.float32),
    }


def _rules(path: Path, numbers: np.ndarray, shares: np.ndarray) -> Rules:
    if len(numbers) != _RULE * len(shares):
        raise CogpressError(f"{path} is no draft. Make it again with scripts/draft.")
    found: Rules = {}
    for (*context, word, symbol), share in zip(numbers.reshape(-1, _RULE).tolist(), shares.tolist(), strict=True):
        found.setdefault(tuple(one for one in context if one != _NONE), []).append((word, symbol, share))
    return found


def facts(path: Path) -> dict[str, Any]:
    """What a table says of itself: `format`, and the sha256 or fingerprint of its `tokenizer` and `adapter`."""
    tensors.stored(path.parent, [path])  # says what is wrong with a damaged file
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    try:
        return dict(json.loads(header["__metadata__"][_FACTS]))
    except (KeyError, TypeError, ValueError):
        raise CogpressError(f"{path} is no draft. Make it again with scripts/draft.") from None


def fitting(folders: Iterable[Path], adapter: str) -> Path | None:
    """The first draft that one of these folders of weights has for an adapter, by its fingerprint; None if none has."""
    for weights in folders:
        with suppress(CogpressError, OSError):
            if facts(path_in(weights)).get("adapter") == adapter:
                return path_in(weights).parent
    return None


def check(weights: Path, adapter: str | None) -> Path:
    """The table of a folder of weights, checked to be made for them.

    Args:
        weights: the folder.
        adapter: fingerprint of the adapter in the weights, where they record one.

    Raises:
        CogpressError: it is of another tokenizer or adapter.
    """
    path = path_in(weights)
    known = facts(path)
    other = None
    if known.get("tokenizer") != sha256(weights / "tokenizer.json"):
        other = "another tokenizer"
    elif adapter is not None and known.get("adapter") != adapter:
        other = "another training"
    if other is not None:
        raise CogpressError(
            f"{path} was made for {other}. Make it again with scripts/draft, or set serve.speculative: none."
        )
    return path
