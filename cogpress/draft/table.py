"""The table of a draft: which symbol followed the last few in the training answers, and how surely."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cogpress.draft.rules import CONTEXT, OPEN, Rules, learn
from cogpress.draft.symbols import NAME, Alphabet, Answer
from cogpress.prompts import NO_LOSS, Row

LONGEST = 8
"""Symbols of the longest context."""

ENTRIES = 1 << 20
"""Most contexts in a table: 16 MB."""

LEAST = 0.2
"""Shares below this are left out."""

_KNOWN = 1 << 16
"""Contexts that are kept with their predictions."""

_FACTOR = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_POWERS = [pow(_FACTOR, at, 1 << 64) for at in range(LONGEST + 1)]


@dataclass(frozen=True)
class Table:
    """Contexts by hash, sorted, and for each the most frequent symbol that follows.

    Attributes:
        keys: hashes of contexts, uint64, shape (entries,).
        symbols: predictions, int32, shape (entries,); see `cogpress.draft.symbols`.
        shares: how often the prediction is right, float32, shape (entries,).
        tail: the last tokens of every training prompt, after which the answer begins.
        ends: tokens that end an answer.
        alphabet: what tokens are.
        rules: which words of the prompt decide where a context leaves open what follows.
    """

    keys: np.ndarray
    symbols: np.ndarray
    shares: np.ndarray
    tail: tuple[int, ...]
    ends: tuple[int, ...]
    alphabet: Alphabet
    rules: Rules = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Views and a cache, because an element of an array takes microseconds to read.
        views = tuple(memoryview(one) for one in (self.keys, self.symbols, self.shares))  # type: ignore[arg-type]
        object.__setattr__(self, "_views", views)
        object.__setattr__(self, "_known", {})

    def predict(self, symbols: Sequence[int], words: Container[int] = ()) -> tuple[int, float] | None:
        """The next symbol after these, by the longest context that the table has or by a surer rule, and its share.

        Args:
            symbols: of the answer so far.
            words: tokens of the prompt, without spaces around them.
        """
        found = self._longest(symbols)
        if found is None or found[1] < OPEN:
            for word, symbol, share in self.rules.get(tuple(symbols[-CONTEXT:]), ()):
                if word < 0 or word in words:
                    return (symbol, share) if found is None or share > found[1] else found
        return found

    def _longest(self, symbols: Sequence[int]) -> tuple[int, float] | None:
        known: dict[tuple[int, ...], tuple[int, float] | None] = self._known  # type: ignore[attr-defined]
        context = tuple(symbols[-LONGEST:])
        if context not in known:
            if len(known) >= _KNOWN:
                known.clear()
            known[context] = self._find(context)
        return known[context]

    def _find(self, symbols: tuple[int, ...]) -> tuple[int, float] | None:
        hashes = []
        found = 0
        for at in range(1, min(LONGEST, len(symbols)) + 1):
            found = (found + (symbols[-at] + 10_001) * _POWERS[at]) & _MASK
            hashes.append((found + at) & _MASK)
        keys, following, shares = self._views  # type: ignore[attr-defined]
        for key in reversed(hashes):
            place = bisect_left(keys, key)
            if place < len(keys) and keys[place] == key:
                return following[place], shares[place]
        return None


def build(rows: Iterable[tuple[Sequence[int], Sequence[int]]], alphabet: Alphabet, ends: Sequence[int] = ()) -> Table:
    """A table of training answers.

    Args:
        rows: token ids of prompts and of their answers.
        alphabet: what tokens are.
        ends: tokens that end an answer; what follows them is left out.
    """
    contexts: list[list[int]] = []
    targets: list[list[list[int]]] = []
    words: list[frozenset[int]] = []
    tail: tuple[int, ...] | None = None
    for prompt, answer in rows:
        end = tuple(prompt[-LONGEST:])
        tail = end if tail is None else _common(tail, end)
        last = next((at for at, token in enumerate(answer) if token in ends), len(answer))
        context, target = _lesson(prompt, answer[: last + 1], alphabet)
        contexts.append(context)
        targets.append(target)
        words.append(alphabet.words_of(prompt))
    keys, symbols, shares = _counted(contexts, targets)
    return Table(
        keys, symbols, shares, tail or (), tuple(ends), alphabet, learn(zip(words, contexts, targets, strict=True))
    )


def answers(rows: Iterable[Row]) -> Iterator[tuple[list[int], list[int]]]:
    """What comes before each answer of training rows, and the answer, as token ids."""
    for row in rows:
        learnt = np.array([False, *(label != NO_LOSS for label in row.labels), False])
        edges = np.flatnonzero(learnt[1:] != learnt[:-1]).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if start:  # a plain text has no prompt
                yield row.input_ids[:start], row.input_ids[start:end]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]


def _lesson(prompt: Sequence[int], answer: Sequence[int], alphabet: Alphabet) -> tuple[list[int], list[list[int]]]:
    """An answer's symbols as contexts see them, and as predictions name them."""
    read = Answer(prompt, alphabet)
    for token in answer:
        read.push(token)
    targets: list[list[int]] = [[]]
    used: list[tuple[int, ...]] = []
    at = 0
    for symbol, size in zip(read.symbols[1:], read.sizes[1:], strict=True):
        span = tuple(answer[at : at + size])
        at += size
        targets.append([symbol] if symbol >= 0 else read.meanings(span, used) or [span[0]])
        if symbol == NAME and span not in used:
            used.append(span)
    return read.symbols, targets


def _counted(
    contexts: Sequence[list[int]], targets: Sequence[list[list[int]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    nothing: tuple[np.ndarray, np.ndarray, np.ndarray]
    nothing = np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    if not contexts:
        return nothing
    symbols = np.concatenate([np.array(one, np.int64) for one in contexts])
    place = np.concatenate([np.arange(len(one)) for one in contexts])
    several = [names for one in targets for names in one]
    many = np.array([len(names) for names in several])
    wanted = np.array([name for names in several for name in names], np.int64)
    hashes: np.ndarray = np.zeros(len(symbols), np.uint64)
    parts = []
    for size in range(1, LONGEST + 1):
        shifted: np.ndarray = np.zeros(len(symbols), np.int64)
        shifted[size:] = symbols[:-size]
        hashes = hashes + (shifted + 10_001).astype(np.uint64) * np.uint64(_POWERS[size])
        there = place >= size
        keys = hashes + np.uint64(size)
        chosen: np.ndarray = np.repeat(there, many)
        if not chosen.any():  # no answer is as long
            continue
        parts.append(_grouped(np.repeat(keys, many)[chosen], wanted[chosen], keys[there]))
    if not parts:
        return nothing
    keys, following, counts, totals = (np.concatenate(one) for one in zip(*parts, strict=True))
    shares = ((counts - 0.15) / (totals + 0.3)).astype(np.float32)
    kept = shares >= LEAST
    keys, following, counts, shares = keys[kept], following[kept], counts[kept], shares[kept]
    if len(keys) > ENTRIES:
        most = np.argsort(-counts, kind="stable")[:ENTRIES]
        keys, following, shares = keys[most], following[most], shares[most]
    order = np.argsort(keys)
    return keys[order], following[order].astype(np.int32), shares[order]


def _grouped(keys: np.ndarray, following: np.ndarray, every: np.ndarray) -> tuple[np.ndarray, ...]:
    """For each key: its most frequent follower, how often that follows, and how often the key occurs."""
    order = np.lexsort((following, keys))
    keys, following = keys[order], following[order]
    first = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]) | (following[1:] != following[:-1])]))
    counts = np.diff(np.append(first, len(keys)))
    pair_keys, pair_followers = keys[first], following[first]
    order = np.lexsort((-counts, pair_keys))
    pair_keys, pair_followers, counts = pair_keys[order], pair_followers[order], counts[order]
    start = np.flatnonzero(np.concatenate([[True], pair_keys[1:] != pair_keys[:-1]]))
    found, totals = np.unique(every, return_counts=True)
    return pair_keys[start], pair_followers[start], counts[start], totals[np.searchsorted(found, pair_keys[start])]
