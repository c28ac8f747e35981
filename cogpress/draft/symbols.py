"""An answer as symbols: its tokens, but what it copies from the prompt as one symbol, whatever the name or number.

A table of the training answers then predicts answers over names that no training answer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAME, NUMBER, START = -1, -2, -3
"""Symbols of what was copied, a line of the prompt or a run of digits, and of the answer's beginning."""

MENTIONED, REPEATED, DIGITS, AFTER = -1_000, -2_000, -3_000, -10_000
"""Predictions, minus a rank: the line of the prompt that its text mentions first, second, ...; the first, second, ...
name of the answer again; the first, second, ... number of the prompt. Minus a token: the line that the text mentions
after this token."""

LONGEST = 8
"""Tokens of the longest line that counts as a name."""

_RANKS = 32


@dataclass(frozen=True)
class Alphabet:
    """What tokens are, by id.

    Attributes:
        kinds: 1 for a line break, 2 for digits, 0 for others; uint8, shape (vocabulary,).
        bare: the token of the same text without spaces around it, or the token itself; int32, shape (vocabulary,).
    """

    kinds: np.ndarray
    bare: np.ndarray

    def kinds_of(self, tokens: Sequence[int]) -> np.ndarray:
        """What tokens are, uint8, shape (tokens,); unknown ones are as the last."""
        return np.asarray(self.kinds.take(tokens, mode="clip"))

    def bare_of(self, tokens: Sequence[int]) -> np.ndarray:
        """The tokens without spaces around them, int32, shape (tokens,); unknown ones are as the last."""
        return np.asarray(self.bare.take(tokens, mode="clip"))

    def words_of(self, prompt: Sequence[int]) -> frozenset[int]:
        """The different tokens of a prompt, without spaces around them."""
        return frozenset(self.bare_of(prompt).tolist())

    @classmethod
    def of(cls, texts: Sequence[str], special: Sequence[int] = ()) -> Alphabet:
        """Of the tokens with these texts; special ones end a line."""
        ids: dict[str, int] = {}
        for at, text in enumerate(texts):
            ids.setdefault(text, at)
        kinds = [1 if "\n" in text else 2 if text.strip().isdigit() else 0 for text in texts]
        for at in special:
            kinds[at] = 1
        bare = [ids.get(text.strip(), at) if text.strip() else at for at, text in enumerate(texts)]
        return cls(np.array(kinds, np.uint8), np.array(bare, np.int32))


class Answer:
    """One answer as it grows: its symbols so far, and what its prompt offers to copy."""

    def __init__(self, prompt: Sequence[int], alphabet: Alphabet) -> None:
        """Finds the names and numbers of the prompt (token ids)."""
        self.symbols: list[int] = [START]
        self.sizes: list[int] = [0]
        """Tokens of each symbol."""
        self._names, self._numbers = _spans(prompt, alphabet)
        self._mentioned, self._after = _mentions(prompt, self._names, alphabet)
        self._used: list[tuple[int, ...]] = []
        self._starts: dict[int, list[tuple[int, ...]]] = {}
        for span in (*self._names, *self._numbers):
            found = self._starts.setdefault(span[0], [])
            if span not in found:
                found.append(span)
        self._open: list[int] = []
        """The tokens since the last closed symbol, which may still become a copy."""

    def push(self, token: int) -> None:
        """Take the answer's next token."""
        self._open.append(token)
        while self._open:
            spans = self._starts.get(self._open[0], ())
            size = len(self._open)
            started = tuple(self._open)
            if any(len(span) > size and span[:size] == started for span in spans):
                return
            whole = max((span for span in spans if started[: len(span)] == span), key=len, default=())
            if whole:
                number = whole in self._numbers and whole not in self._names
                self.symbols.append(NUMBER if number else NAME)
                if not number and whole not in self._used:
                    self._used.append(whole)
                self.sizes.append(len(whole))
                del self._open[: len(whole)]
            else:
                self.symbols.append(self._open.pop(0))
                self.sizes.append(1)

    @property
    def pending(self) -> list[int]:
        """Tokens that may become a copy."""
        return self._open

    def rest(self) -> tuple[int, ...]:
        """What is left of the name or number that the last tokens begin: of the first that the text mentions."""
        size, started = len(self._open), tuple(self._open)
        fits = [span for span in self._starts.get(self._open[0], ()) if len(span) > size and span[:size] == started]
        for wanted in (self._mentioned, self._numbers, fits):
            for span in wanted:
                if span in fits:
                    return span[size:]
        return ()

    def meaning(self, prediction: int) -> tuple[int, ...]:
        """The tokens of a predicted symbol; empty where this prompt or answer has none."""
        if prediction >= 0:
            return (prediction,)
        if prediction <= AFTER:
            return self._after.get(AFTER - prediction, ())
        for base, spans in ((DIGITS, self._numbers), (REPEATED, self._used), (MENTIONED, self._mentioned)):
            if base - _RANKS < prediction <= base:
                return spans[base - prediction] if base - prediction < len(spans) else ()
        return ()

    def meanings(self, span: tuple[int, ...], used: Sequence[tuple[int, ...]]) -> list[int]:
        """The predictions that stand for a copied span, given the names that the answer had before it."""
        found = [AFTER - token for token, name in self._after.items() if name == span]
        for base, spans in ((REPEATED, used), (MENTIONED, self._mentioned), (DIGITS, self._numbers)):
            if span in spans[:_RANKS]:
                found.append(base - list(spans).index(span))
        return found

    def copy(self) -> Answer:
        """An independent copy, to look ahead with."""
        made = Answer.__new__(Answer)
        made._names, made._numbers, made._starts = self._names, self._numbers, self._starts
        made._mentioned, made._after = self._mentioned, self._after
        made.symbols, made.sizes, made._open, made._used = self.symbols[-16:], [], self._open[:], self._used[:]
        return made


def _spans(prompt: Sequence[int], alphabet: Alphabet) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The lines of a prompt that are short enough for a name, and its runs of digits, each in order."""
    kinds = alphabet.kinds_of(prompt)
    names: list[tuple[int, ...]] = []
    numbers: list[tuple[int, ...]] = []
    breaks = np.flatnonzero(kinds == 1)
    for start, end in zip(breaks[:-1] + 1, breaks[1:], strict=True):
        if 0 < end - start <= LONGEST:
            names.append(tuple(prompt[start:end]))
    digits = np.flatnonzero(np.diff(np.concatenate([[0], (kinds == 2).astype(np.int8), [0]])))
    for start, end in zip(digits[::2], digits[1::2], strict=True):
        run = tuple(alphabet.bare_of(prompt[start:end]).tolist())
        if run not in numbers:
            numbers.append(run)
    return list(dict.fromkeys(names)), numbers


def _mentions(
    prompt: Sequence[int], names: list[tuple[int, ...]], alphabet: Alphabet
) -> tuple[list[tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """The names that the prompt has outside a line of their own, in order, and each by the token before it."""
    bare = alphabet.bare_of(prompt)
    kinds = alphabet.kinds_of(prompt)
    found = []
    for name in names:
        wanted = alphabet.bare_of(name)
        size = len(wanted)
        for at in np.flatnonzero(bare[1 : len(bare) - size] == wanted[0]) + 1:
            alone = kinds[at - 1] == 1 and kinds[at + size] == 1
            if not alone and (bare[at : at + size] == wanted).all():
                found.append((int(at), -size, name))
    found.sort()
    after: dict[int, tuple[int, ...]] = {}
    for at, _, name in found:
        after.setdefault(NUMBER if kinds[at - 1] == 2 else int(bare[at - 1]), name)
    return list(dict.fromkeys(name for _, _, name in found)), after
