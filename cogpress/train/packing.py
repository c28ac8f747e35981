"""Which batches without padding a model takes: rows that share a sequence must not see each other, which is tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cogpress.prompts import Row
from cogpress.train.layouts import Layout
from cogpress.train.objective import AnswerLogits, Collator
from cogpress.weights import base

VARLEN = "cogpress_varlen"
"""The name under which transformers knows `varlen_attention`."""

PROBE = 8
"""Tokens of each row that a model is tried with."""

SAME = 0.1
"""How far rounding may move the logits of a row in a packed sequence, relative to what they move by as the end of one
long row. Bases of 40 architectures moved by at most 0.04 in bfloat16."""


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a flat batch, by the FlashAttention that PyTorch has for CUDA.

    Args:
        module: the model's attention layer.
        query: shape (1, heads, tokens, width); so are `key` and `value`, with KV heads.
        key: see `query`.
        value: see `query`.
        attention_mask: none; `cu_seq_lens_q` says all.
        scaling: of the scores.
        dropout: of the scores, which this kernel has not.
        cu_seq_lens_q: where each row begins and the last one ends, int32, shape (rows + 1,).
        max_length_q: tokens of the longest row.
        sliding_window: tokens that a token sees, itself among them.
        softcap: a bound of the scores, which this kernel has not.
        s_aux: attention sinks, which this kernel has not.

    Raises:
        NotImplementedError: the model asks for what this kernel has not, or does not pass on where rows begin.
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or attention_mask is not None or softcap or s_aux is not None or dropout:
        raise NotImplementedError("attention of this kind over rows of a flat batch")
    flat = [one[0].transpose(0, 1).to(value.dtype).contiguous() for one in (query, key, value)]
    window = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        *flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(window, 0), enable_gqa=True,
    )  # fmt: skip
    return out[None], None


def choose(model: Any) -> Layout:
    """The layout with the least padding in which a model still keeps rows apart, which is tried; sets its attention.

    State-space layers, convolutions and positions counted over a sequence mix rows, and a model need not say so.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    usual = plain.config._attn_implementation
    if plain.device.type == "cuda":
        from transformers import AttentionInterface

        AttentionInterface.register(VARLEN, varlen_attention)
        if keeps_apart(plain, "flat", VARLEN):
            return "flat"
        plain.set_attn_implementation(usual)
    return "packed" if keeps_apart(plain, "packed", usual) else "padded"


def keeps_apart(model: Any, layout: Layout, attention: str) -> bool:
    """Whether a row's logits are the same whichever row it shares a sequence with, and as they are alone.

    The first comparison is exact, as nothing else differs; in the second one shapes do, and so the rounding. The
    attention stays set.
    """
    first, second, row = _ids(model)
    alone, follows = _logits(model, [row], "padded"), _logits(model, [first + row], "padded")
    try:
        if attention != model.config._attn_implementation:
            model.set_attn_implementation(attention)
        with_first, with_second = (_logits(model, [other, row], layout) for other in (first, second))
    except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return False  # it does not compute in this layout at all
    moved, seen = ((found - alone).norm(dim=-1) for found in (with_first, follows))
    return torch.equal(with_first, with_second) and bool((moved <= SAME * seen).all())


def _ids(model: Any) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    known = model.get_input_embeddings().num_embeddings
    return torch.randint(1, known, (3, PROBE), generator=random).tolist()  # type: ignore[no-any-return]


def _logits(model: Any, rows: Sequence[list[int]], layout: Layout) -> torch.Tensor:
    """A model's logits at the end of rows of ids, shape (PROBE - 1, vocabulary), float32."""
    batch = Collator(0, layout, room=2 * PROBE)([Row(ids, ids) for ids in rows])
    batch = {name: one.to(model.device) if torch.is_tensor(one) else one for name, one in batch.items()}
    logits = AnswerLogits(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), base.autocast(model.dtype):
            found, _ = logits(model, batch)
    finally:
        logits.release()
        model.train(training)
    return found[1 - PROBE :].float()
