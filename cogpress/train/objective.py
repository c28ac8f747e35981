"""What a batch teaches: tensors of its rows, and the loss on answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from cogpress.prompts import NO_LOSS, Row
from cogpress.train import layouts
from cogpress.train.layouts import TILE_BYTES, Layout

_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
"""Of a batch, what a model takes."""


class Collator:
    """Makes a batch of rows.

    All that can be counted is counted here, on the CPU, so that a step asks the device for nothing:

    - `input_ids`, and `labels` of the same shape, (sequences, length), int64; no row's first token has a label.
    - `attention_mask` where each row has a sequence of its own, padded on the right.
    - `position_ids` in the other layouts, and `rows`, which row each place belongs to, where some share a sequence. A
      padded end is a row of its own. In a flat batch also where rows begin, as FlashAttention takes it.
    - `places`, the flat indices of positions that predict a labelled token, and `targets`, these tokens, both int64;
      where a row has a weight, `weights`, those of each target, float32.
    - where rows are to stay like the base, `kept`, which of the targets are theirs, int64, whose weight is 0, and
      `alone`, a batch of these rows in the same order, flat where this one is, else padded.
    - `tokens`, how many there are without padding.
    """

    def __init__(self, pad_token_id: int, layout: Layout = "padded", *, room: int = 0) -> None:
        """Make a collator.

        Args:
            pad_token_id: fills sequences; its value changes nothing.
            layout: how rows lie.
            room: least tokens of a packed sequence; that of the longest row where there is none.
        """
        self.pad_token_id = pad_token_id
        self.layout: Layout = layout
        self.room = room

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        lengths = [len(row.input_ids) for row in rows]
        lying = layouts.sequences(lengths, self.layout, self.room)
        length = max(sum(lengths[at] for at in sequence) for sequence in lying)
        ids, labels, positions, numbers = (
            torch.full((len(lying), length), fill) for fill in (self.pad_token_id, NO_LOSS, 0, len(rows))
        )
        weights: list[float] = []
        kept: list[bool] = []
        for number, sequence in enumerate(lying):
            begin = 0
            for at in sequence:
                end = begin + lengths[at]
                ids[number, begin:end] = torch.tensor(rows[at].input_ids)
                labels[number, begin + 1 : end] = torch.tensor(rows[at].labels[1:])
                positions[number, begin:end] = torch.arange(lengths[at])
                numbers[number, begin:end] = at
                learnt = sum(label != NO_LOSS for label in rows[at].labels[1:])
                weights += [0.0 if rows[at].like_base else rows[at].weight] * learnt
                kept += [rows[at].like_base] * learnt
                begin = end
            positions[number, begin:] = torch.arange(length - begin)
        places = (labels[:, 1:] != NO_LOSS).nonzero()
        made: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "places": places[:, 0] * length + places[:, 1],
            "targets": labels[places[:, 0], places[:, 1] + 1],
            "tokens": sum(lengths),
        }
        if any(row.weight != 1 for row in rows):
            made["weights"] = torch.tensor(weights)
        if any(kept):
            some = [replace(rows[at], like_base=False) for at in chain(*lying) if rows[at].like_base]
            made["weights"], made["kept"] = torch.tensor(weights), torch.tensor(kept).nonzero()[:, 0]
            made["alone"] = Collator(self.pad_token_id, "flat" if self.layout == "flat" else "padded")(some)
        if self.layout == "padded":
            return made | {"attention_mask": (numbers != len(rows)).long()}
        made |= {"position_ids": positions}
        if len(lying) < len(rows):  # else causal attention keeps a row from its padding, which needs no mask
            made |= {"rows": numbers}
        if self.layout == "flat":
            starts = torch.tensor([0, *lengths]).cumsum(0).int()
            made |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            made |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return made


class AnswerLogits:
    """Computes a model's logits at labelled positions only.

    The output layer is the widest of a small model (SmolLM2: 49,152 x 576 of 135 M parameters) and its logits the
    largest tensor of a step. A hook on the layer's input keeps only the hidden states that have a label, so that
    everything a model does to its logits (scaling, soft-capping) stays as its own code has it.
    """

    def __init__(self, model: Any) -> None:
        self._keep: torch.Tensor | None = None
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hook = plain.get_output_embeddings().register_forward_pre_hook(self._keep_labelled)

    def _keep_labelled(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs if self._keep is None else (inputs[0].flatten(0, -2).index_select(0, self._keep), *inputs[1:])

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits before each labelled token, shape (labelled tokens, vocabulary), and these tokens.

        Args:
            model: the one that was given first, or a wrapper of it.
            batch: as a `Collator` makes it.
        """
        self._keep = batch["places"]
        try:
            with layouts.rows_known(batch.get("rows")):
                found = model(**{name: batch[name] for name in _INPUTS if name in batch}, use_cache=False)
        finally:
            self._keep = None
        return found.logits, batch["targets"]

    def release(self) -> None:
        """Take the hook off the model, which then gives all its logits again."""
        self._hook.remove()


class AnswerLoss:
    """Cross-entropy on answer tokens; of rows that are to stay like the base, the KL from it."""

    def __init__(self, model: Any) -> None:
        self._tuned = model
        self._logits = AnswerLogits(model)
        self.release = self._logits.release

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Summed loss (nats) of a batch's labelled tokens, each times its row's weight, and how many there are: a
        weight is a factor on the row's loss, and leaves that of other rows as it is.

        A token's loss is its negative log-likelihood; in a row that is to stay like the base, the KL divergence of the
        model's distribution from the base's.
        """
        logits, targets = self._logits(model, batch)
        loss: torch.Tensor = SummedCrossEntropy.apply(logits, targets, batch.get("weights"))
        if "kept" in batch:
            ours = logits.index_select(0, batch["kept"])
            divergence: torch.Tensor = SummedDivergence.apply(ours, self._of_the_base(batch["alone"]))
            loss = loss + divergence
        return loss, targets.numel()

    def _of_the_base(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits of the model without its adapter and without dropout."""
        training = self._tuned.training
        self._tuned.eval()
        try:
            with torch.no_grad(), self._tuned.disable_adapter():
                return self._logits(self._tuned, batch)[0]
        finally:
            self._tuned.train(training)


class SummedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits, tile by tile in float32: no float32 copy of all of them is ever made.

    PyTorch's own keeps one, and makes two more for its gradient. This keeps the logits as they are and one number for
    each position, and computes the softmax again for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The sum, in nats, float32.

        Args:
            ctx: PyTorch's.
            logits: shape (positions, vocabulary).
            targets: shape (positions,), int64.
            weights: factors of each position's loss, shape (positions,); 1 where not given.
        """
        scale = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part in _tiles(logits):
            tile = logits[part].float()
            scale[part] = tile.logsumexp(-1)
            loss = scale[part] - tile.gather(-1, targets[part, None])[:, 0]
            total += (loss if weights is None else loss * weights[part]).sum()
        ctx.save_for_backward(logits, targets, scale, weights)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the logits: softmax less one at the target, times the weight."""
        logits, targets, scale, weights = ctx.saved_tensors
        made = torch.empty_like(logits)
        minus = torch.full((1, 1), -1.0, device=logits.device)
        for part in _tiles(logits):
            tile = (logits[part].float() - scale[part, None]).exp_()
            tile.scatter_add_(-1, targets[part, None], minus.expand(tile.shape[0], 1))
            made[part] = tile.mul_(given if weights is None else (given * weights[part])[:, None])
        return made, None, None


class SummedDivergence(torch.autograd.Function):
    """Summed KL divergence of logits from expected ones, tile by tile in float32 as `SummedCrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """KL(expected || model) summed over positions, in nats, float32; both of shape (positions, vocabulary)."""
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part in _tiles(logits):
            wanted = expected[part].float().log_softmax(-1)
            total += (wanted.exp() * (wanted - logits[part].float().log_softmax(-1))).sum()
        ctx.save_for_backward(logits, expected)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the logits: their softmax less that of the expected ones."""
        logits, expected = ctx.saved_tensors
        made = torch.empty_like(logits)
        for part in _tiles(logits):
            made[part] = (logits[part].float().softmax(-1) - expected[part].float().softmax(-1)).mul_(given)
        return made, None


def _tiles(logits: torch.Tensor) -> list[slice]:
    rows = max(1, TILE_BYTES // (4 * logits.shape[-1]))
    return [slice(at, at + rows) for at in range(0, logits.shape[0], rows)]
