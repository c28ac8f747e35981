"""Where a context alone leaves open what follows: which word of the prompt decides it, learnt as a list of rules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

import numpy as np

CONTEXT = 3
"""Symbols of a rule's context."""

OPEN = 0.9
"""Contexts whose most frequent follower has a smaller share have rules."""

_ANSWERS, _CONTEXTS = 4_000, 512
"""Most answers to learn from, and most contexts, the most frequent ones."""

_MOST, _ROWS, _WORDS, _FOLLOWERS = 24, 1_000, 512, 16
"""Of a context: most rules, occurrences that they are learnt from, words and followers that they choose from."""

_LEAST = 5
"""Occurrences that a rule must rest on."""

Rules = dict[tuple[int, ...], list[tuple[int, int, float]]]
"""By context: the word that must be in the prompt (-1: none), the symbol that then follows, and its share. The first
that applies decides."""


def learn(lessons: Iterable[tuple[Collection[int], Sequence[int], Sequence[Sequence[int]]]]) -> Rules:
    """Rules from training answers.

    Args:
        lessons: for each answer the words of its prompt, its symbols, and what each of them may be predicted as.
    """
    seen: dict[tuple[int, ...], list[tuple[Collection[int], Sequence[int]]]] = defaultdict(list)
    for words, symbols, targets in islice(lessons, _ANSWERS):
        for at in range(1, len(symbols)):
            places = seen[tuple(symbols[max(0, at - CONTEXT) : at])]
            if len(places) < _ROWS:
                places.append((words, targets[at]))
    frequent = sorted(seen, key=lambda context: (-len(seen[context]), context))[:_CONTEXTS]
    found = {context: _rules(seen[context]) for context in frequent if len(seen[context]) >= 2 * _LEAST}
    return {context: rules for context, rules in found.items() if rules}


def _rules(places: Sequence[tuple[Collection[int], Sequence[int]]]) -> list[tuple[int, int, float]]:
    names = _frequent((symbol for _, targets in places for symbol in targets), _FOLLOWERS)
    followers = {symbol: column for column, symbol in enumerate(names)}
    follows: np.ndarray = np.zeros((len(places), len(names)), np.float32)
    for row, (_, targets) in enumerate(places):
        follows[row, [followers[symbol] for symbol in targets if symbol in followers]] = 1
    if _shares(follows.sum(0), len(places)).max() >= OPEN:
        return []
    chosen = _frequent((word for words, _ in places for word in words), _WORDS)
    columns = {word: column for column, word in enumerate(chosen)}
    has: np.ndarray = np.zeros((len(places), len(columns)), np.float32)
    for row, (words, _) in enumerate(places):
        has[row, [columns[word] for word in words if word in columns]] = 1
    rules: list[tuple[int, int, float]] = []
    while len(rules) < _MOST and len(has) >= _LEAST and has.shape[1]:
        default = _shares(follows.sum(0), len(has)).max()
        totals = has.sum(0)
        shares = _shares(has.T @ follows, totals[:, None])
        shares[totals < _LEAST] = 0
        best = shares.max(1)
        # Of rules that are nearly as sure, the one for most rows.
        worth = np.where(best >= max(best.max() - 0.03, default), totals, -1)
        column = int(worth.argmax())
        if worth[column] < 0 or totals[column] == len(has):
            break
        rules.append((chosen[column], names[int(shares[column].argmax())], float(best[column])))
        left = has[:, column] == 0
        has, follows = has[left], follows[left]
    if len(follows):
        last = _shares(follows.sum(0), len(follows))
        rules.append((-1, names[int(last.argmax())], float(last.max())))
    return rules


def _frequent(values: Iterable[int], most: int) -> list[int]:
    """The most frequent values; where two are as frequent, the order is always the same."""
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))[:most]


def _shares(counts: np.ndarray, totals: np.ndarray | int) -> np.ndarray:
    return np.asarray((counts - 0.15) / (totals + 0.3))
