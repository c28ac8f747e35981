"""General text among the examples, so that a training for a task leaves the rest of what the base knows as it is.

Its rows are pieces of the text that a balanced merge is computed from. They are learnt from the base itself: their loss
is the KL from what the model without its adapter makes of them, which is zero at first and grows as the model forgets.
Learning the text would be another matter: there is little of it, and it would be known by heart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cogpress.prompts import NO_LOSS, Row


def rows(examples: Sequence[Row], share: float, text: Sequence[list[int]], seed: int) -> list[Row]:
    """Rows of general text that make up a share of all rows, as long as the examples so that batches hold both.

    Args:
        examples: the rows of the task.
        share: of all rows, examples and these; from 0 to below 1.
        text: token ids of general text, each with two at least.
        seed: chooses the pieces.
    """
    chance = random.Random(seed)
    found = []
    for _ in range(round(len(examples) * share / (1 - share))):
        length = max(2, len(chance.choice(examples).input_ids))
        whole = chance.choices(text, [len(ids) for ids in text])[0]
        at = chance.randrange(max(1, len(whole) - length + 1))
        ids = whole[at : at + length]
        found.append(Row(ids, [NO_LOSS, *ids[1:]], like_base=True))
    return found
