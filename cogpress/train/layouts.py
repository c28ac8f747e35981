"""How the rows of a batch lie: padded, or several in a sequence.

Which rows a batch has, and so what is learnt from it, stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Layout = Literal["padded", "packed", "flat"]
"""How a batch's rows lie: each in a sequence of its own; several in one, where that saves padding; or all in one, for
attention that knows where each begins."""

TILE_BYTES = 1 << 26
"""Of a tile of logits in float32: the loss is computed from one after the other."""

ROOM = 512
"""Tokens up to which a packed sequence may be longer than its longest row, and twice as long as that at most."""

ATTENTION = 1500
"""Tokens of a sequence whose attention takes as long as all else. Of the embedded model on a CPU: batches with 16 %
fewer places took 10 % less time, in sequences of 260 instead of 170 tokens."""


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of rows by sequence, each of at most `room` tokens: the longest first, into the first one that fits.

    First-fit decreasing (Johnson 1973) takes at most 11/9 of the fewest sequences, and one more.
    """
    packed: list[list[int]] = []
    left: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        place = next((place for place, free in enumerate(left) if free >= lengths[at]), None)
        if place is None:
            packed.append([at])
            left.append(room - lengths[at])
        else:
            packed[place].append(at)
            left[place] -= lengths[at]
    return packed


def by_tokens(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows, by length, in batches of at most `most` places, padding among them; a longer row is alone."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: lengths[at]):
        if batch and (len(batch) + 1) * lengths[at] > most:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def sequences(lengths: Sequence[int], layout: Layout, room: int = 0) -> list[list[int]]:
    """Indices of a batch's rows by sequence; of packed ones, the way that takes the least time.

    Args:
        lengths: of the rows.
        layout: how they lie.
        room: least tokens of a packed sequence.
    """
    if layout == "flat":
        return [list(range(len(lengths)))]
    if layout == "packed":
        longest = max(room, *lengths)
        most = max(longest, min(ROOM, 2 * longest))
        tried = [first_fit(lengths, longest + part * (most - longest) // 4) for part in range(5)]
        return min(tried, key=lambda found: _cost(lengths, found))
    return [[at] for at in range(len(lengths))]


def _cost(lengths: Sequence[int], lying: Sequence[Sequence[int]]) -> int:
    length = max(sum(lengths[at] for at in sequence) for sequence in lying)
    return len(lying) * length * (ATTENTION + length)


@contextmanager
def rows_known(numbers: torch.Tensor | None) -> Iterator[None]:
    """Tell transformers which row each place of a batch belongs to, for the masks that it makes in the block.

    It finds rows by their positions and asks the device whether there are several, which waits for all that the device
    still computes, in every forward pass (transformers 5.19).

    Args:
        numbers: of rows, shape (sequences, length); None where no sequence has several.
    """
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _positions: numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
