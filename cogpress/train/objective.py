"""What a batch teaches: padded tensors, and the loss on answer tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cogpress.prompts import NO_LOSS, Row


class Collator:
    """Pads a batch on the right to its longest row: tensors of shape (batch, longest), int64.

    Where a row has a weight, `weights` holds those of all, shape (batch,), float32.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(row.input_ids) for row in rows)

        def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([list(value) + [fill] * (longest - len(value)) for value in values])

        weighted = any(row.weight != 1 for row in rows)
        return {
            **({"weights": torch.tensor([row.weight for row in rows])} if weighted else {}),
            "input_ids": padded((row.input_ids for row in rows), self.pad_token_id),
            "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
            "labels": padded((row.labels for row in rows), NO_LOSS),
        }


def labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions predict a token that is learnt, shape (batch, length), and these tokens, in order."""
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS)
    mask = targets != NO_LOSS
    return mask, targets[mask]


class AnswerLogits:
    """Computes a model's logits at labelled positions only.

    The output layer is the widest of a small model (SmolLM2: 49,152 x 576 of 135 M parameters) and its logits in
    float32 the largest tensor of a step. A hook on the layer's input keeps only the hidden states that have a label,
    so that everything a model does to its logits (scaling, soft-capping) stays as its own code has it.
    """

    def __init__(self, model: Any) -> None:
        self._keep: torch.Tensor | None = None
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hook = plain.get_output_embeddings().register_forward_pre_hook(self._keep_labelled)

    def _keep_labelled(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs if self._keep is None else (inputs[0][self._keep], *inputs[1:])

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits before each labelled token, shape (labelled tokens, vocabulary), float32, and these tokens.

        Args:
            model: the one that was given first, or a wrapper of it.
            batch: `input_ids`, `attention_mask` and `labels`, each of shape (batch, length).
        """
        self._keep, targets = labelled(batch["labels"])
        try:
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            self._keep = None
        return found.logits.float(), targets

    def release(self) -> None:
        """Take the hook off the model, which then gives all its logits again."""
        self._hook.remove()


class AnswerLoss:
    """Cross-entropy on answer tokens."""

    def __init__(self, model: Any) -> None:
        self._logits = AnswerLogits(model)
        self.release = self._logits.release

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Summed negative log-likelihood (nats) of a batch's labelled tokens, each times its row's weight, and how many
        there are: a weight is a factor on the row's loss, and leaves that of other rows as it is.
        """
        logits, targets = self._logits(model, batch)
        if "weights" not in batch:
            return F.cross_entropy(logits, targets, reduction="sum"), targets.numel()
        mask, _ = labelled(batch["labels"])
        weights = batch["weights"][:, None].expand(mask.shape)[mask]
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum(), targets.numel()
