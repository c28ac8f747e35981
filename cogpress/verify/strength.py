"""How strongly a balanced merge keeps what the base knew: the strengths are tried, and the measurement decides."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cogpress.config import Merge
from cogpress.merge import balance, general, merge
from cogpress.merge.merge import Progress
from cogpress.verify import distributions
from cogpress.weights import base

if TYPE_CHECKING:
    import torch

    from cogpress.prompts import Row

STRENGTHS = (1.0, 0.3, 0.1, 0.01)
"""From the one that keeps most of what the base knew to the one that is nearest to what training scored."""

TASK_ROWS = 96
"""Training rows from which a layer's inputs in the task are learnt."""

MOST_KL = 0.0005
"""The most that a balanced merge may differ from what training scored on held-out rows, nats per answer token. New
questions are further from the training rows: the worked example's merge at strength 1, within 0.001 on its held-out
rows, measures 0.0013 on questions over other columns."""

MOST_LOST = 0.02
"""The share of held-out rows by which fewer may be right, as where weights are verified; always one, which the smallest
change turns either way."""


@dataclass(frozen=True)
class Tried:
    """One merge, measured on held-out rows of the task and on general text."""

    onto: str
    strength: float | None
    mean_kl: float
    right: int
    """Rows whose every expected token is the most likely one, so that greedy decoding answers as expected."""
    general_perplexity: float

    def within(self, least_right: float) -> bool:
        """Whether the task is kept."""
        return self.mean_kl <= MOST_KL and self.right >= least_right


@dataclass(frozen=True)
class Choice:
    """The merges that were tried, and which strength was taken: None where the dequantized base is better."""

    strength: float | None
    tried: list[Tried]
    correction: Callable[[str], torch.Tensor] | None

    @property
    def onto(self) -> Merge:
        """What to merge into."""
        return "dequantized" if self.strength is None else "balanced"

    def table(self) -> Table:
        """The merges that were tried, on the task and on general text, for a terminal."""
        table = Table("merged into", "task: mean KL", "right", "general perplexity", title_justify="left")
        names = {"original": "the original weights (the usual merge)", "dequantized": "the base as training saw it"}
        for one in self.tried:
            name = names.get(one.onto) or f"balanced, strength {one.strength:g}"
            taken = " ← taken" if (one.onto, one.strength) == (self.onto, self.strength) else ""
            table.add_row(f"{name}{taken}", f"{one.mean_kl:.5f}", str(one.right), f"{one.general_perplexity:.1f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"strength": self.strength, "tried": [vars(one) for one in self.tried]}


def choose(
    base_folder: Path,
    adapter: Path,
    train: Sequence[Row],
    held_out: Sequence[Row],
    work: Path,
    *,
    text: Path | None = None,
    progress: Progress = lambda items, _total: items,
) -> Choice:
    """Try the strengths of a balanced merge, and choose the largest that keeps the task.

    It keeps the task where the mean KL to what training scored is at most `MOST_KL` on held-out rows and at most
    `MOST_LOST` of them are answered worse. The usual merge and the dequantized one are measured beside them. The text
    that measures is none that a merge was computed from.

    Args:
        base_folder: the base.
        adapter: trained on it.
        train: its training rows, of which `TASK_ROWS` are used.
        held_out: rows to measure the task on.
        work: a folder for what is computed, kept so that an interrupted run goes on.
        text: general text of the user's, as `general.pieces` reads it.
        progress: wraps the rows of each part, given how many there are.
    """
    planned = merge.plan(base_folder, adapter, "balanced")
    if not planned.adapter.quantized:  # there is no error to keep or to leave out
        return Choice(None, [], None)
    tokenizer = base.tokenizer(base_folder)
    pad = tokenizer.pad_token_id or 0
    some = random.Random(0).sample(range(len(train)), min(TASK_ROWS, len(train)))
    correction = balance.corrections(
        planned,
        partial(distributions.reference_model, base_folder, adapter, generates=base.device().type == "cpu"),
        [train[at].input_ids for at in sorted(some)],
        general.pieces(tokenizer, "fit", text),
        STRENGTHS,
        work,
        progress,
    )
    kinds: dict[str, tuple[Any, float | None]] = {"original": ("original", None), "dequantized": ("dequantized", None)}
    kinds |= {f"balanced {strength}": ("balanced", strength) for strength in STRENGTHS}
    found = distributions.compare(
        partial(distributions.reference_model, base_folder, adapter),
        {
            name: partial(_trial, base_folder, adapter, work, onto, _of(correction, strength))
            for name, (onto, strength) in kinds.items()
        },
        held_out,
        pad,
        beside=partial(
            distributions.perplexity, rows=general.rows(general.pieces(tokenizer, "measure", text)), pad_token_id=pad
        ),
        progress=progress,
    )
    tried = [Tried(*kinds[name], one.mean_kl, _right(one.scored), one.beside) for name, one in found.items()]
    strength = largest(tried, least_right(_right(found["dequantized"].reference_scored), len(held_out)))
    return Choice(strength, tried, _of(correction, strength))


def _trial(
    base_folder: Path, adapter: Path, work: Path, onto: Merge, correction: Callable[[str], torch.Tensor] | None
) -> torch.nn.Module:
    """A model of one merge, whose files are removed once it is loaded."""
    with tempfile.TemporaryDirectory(dir=work, prefix="trial-") as folder:
        part = Path(folder) / "weights"
        merge.merge(base_folder, adapter, part, onto=onto, correction=correction)
        return distributions.merged_model(part)


def least_right(reference: int, rows: int) -> float:
    """How many held-out rows must be right, given how many are of what training scored, and how many there are."""
    return reference - max(1.0, MOST_LOST * rows)


def largest(tried: Sequence[Tried], least_right: float) -> float | None:
    """The largest strength that keeps the task and is better in general than the dequantized merge; None for that."""
    whole = next(one for one in tried if one.onto == "dequantized").general_perplexity
    better = [one for one in tried if one.within(least_right) and one.general_perplexity < whole]
    return max((one.strength for one in better if one.strength is not None), default=None)


def _of(
    correction: Callable[[float, str], torch.Tensor], strength: float | None
) -> Callable[[str], torch.Tensor] | None:
    return None if strength is None else partial(correction, strength)


def _right(scored: Sequence[distributions.Scored]) -> int:
    return sum(all(row.most_likely) for row in scored)
