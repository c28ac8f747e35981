"""Batches of like length, the same in every run with the same seed."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow  # transformers' trainer takes seconds to import


def padding(lengths: list[int], rows: list[int]) -> float:
    batches = [[lengths[row] for row in rows[at : at + 8]] for at in range(0, len(rows), 8)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches) / sum(lengths)


def test_batches_hold_rows_of_like_length_and_change_with_the_epoch() -> None:
    from cogpress.train.loop import LengthGroupedSampler

    lengths = [(7 * number) % 101 + 1 for number in range(803)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(803))
    torch.manual_seed(1)
    assert list(sampler) == first  # nothing of the global random state
    assert padding(lengths, first) < 0.06
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(803))
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths, batch_size=8, seed=4)) != first


def test_batches_of_few_rows_are_mixed() -> None:
    from cogpress.train.loop import LengthGroupedSampler

    lengths = [(7 * number) % 101 + 1 for number in range(256)]
    rows = list(LengthGroupedSampler(lengths, batch_size=8, seed=3))
    assert sorted(rows) == list(range(256))
    assert padding(lengths, rows) > 0.3
