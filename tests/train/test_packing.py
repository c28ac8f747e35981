"""Rows that share a sequence learn what they learn alone, and bases that mix them are told from the others."""

from __future__ import annotations

import inspect
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bases
from cogpress import config
from cogpress.data.prepare import Prepared
from cogpress.prompts import NO_LOSS, Row
from cogpress.train import layouts, packing
from cogpress.train.layouts import Layout
from cogpress.train.objective import AnswerLoss, Collator
from cogpress.weights import base

pytestmark = pytest.mark.train

LENGTHS = (40, 17, 9, 25, 5, 30)


def rows() -> list[Row]:
    chosen = random.Random(1)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = [chosen.randrange(3, 250) for _ in range(length)]
        found.append(Row(ids, [NO_LOSS] * (length // 3) + ids[length // 3 :], weight=1.0 + number))
    return found


def learnt(model: Any, layout: Layout) -> tuple[float, int, torch.Tensor]:
    model.zero_grad()
    objective = AnswerLoss(model)
    loss, count = objective(model, Collator(2, layout)(rows()))
    loss.backward()
    objective.release()
    gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return loss.item(), count, torch.cat(gradients)


def test_rows_go_into_the_first_sequence_with_room() -> None:
    assert layouts.first_fit(LENGTHS, 40) == [[0], [5, 2], [3, 4], [1]]
    assert layouts.first_fit([3, 3, 3], 9) == [[0, 1, 2]]
    assert layouts.sequences([120, 121, 122, 123], "packed") == [[3], [2], [1], [0]]  # 1 % of padding is cheap
    assert layouts.sequences([60, 61, 62, 123, 90, 30], "packed") == [[3, 4], [2, 1, 0, 5]]
    assert layouts.sequences(LENGTHS, "flat") == [[0, 1, 2, 3, 4, 5]]
    assert layouts.sequences(LENGTHS, "padded") == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("mistral", "sdpa"),
        ("gemma3", "sdpa"),
        ("gpt2", "sdpa"),
    ],
)
def test_packed_rows_learn_what_they_learn_alone(name: str, attention: str, tmp_path: Path) -> None:
    model = base.load(bases.make(name, tmp_path), "none", attention=attention, dtype=torch.float32)
    assert packing.choose(model) == "packed"
    (alone, count, expected), (packed, others, got) = (learnt(model, layout) for layout in ("padded", "packed"))
    assert count == others
    assert packed == pytest.approx(alone, rel=1e-5)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["opt", "bloom", "lfm2", "falcon_h1", "jamba"])
def test_a_base_that_mixes_rows_of_a_sequence_gets_padded_batches(name: str, tmp_path: Path) -> None:
    model = base.load(bases.make(name, tmp_path), "none", attention="eager", dtype=torch.float32)
    assert packing.choose(model) == "padded"
    (_, _, expected), (_, _, got) = (learnt(model, layout) for layout in ("padded", "packed"))
    assert (got - expected).norm() > 1e-4 * expected.norm()  # what it would have learnt


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What PyTorch's kernel for CUDA computes, row by row."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert {one.dim() for one in (query, key, value)} == {3}
    assert enable_gqa
    assert query.shape[1] % key.shape[1] == 0
    assert all(one.is_contiguous() for one in (query, key, value))
    ends = cu_seq_q.tolist()
    assert ends[-1] == len(query)
    assert max_q == max_k == max(b - a for a, b in itertools.pairwise(ends))
    found = []
    for begin, end in itertools.pairwise(ends):
        at = torch.arange(end - begin)
        distance = at[:, None] - at
        mask = distance >= 0 if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        q, k, v = (one[begin:end].transpose(0, 1)[None] for one in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "fits"), [("mistral", True), ("gemma3_text", True), ("gpt2", True), ("gemma2", False), ("lfm2", False)]
)
def test_flat_rows_learn_what_they_learn_alone(
    name: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the kernel, which takes what the kernel takes."""
    from torch.nn.attention import varlen as kernels
    from transformers import AttentionInterface

    taken = inspect.signature(kernels.varlen_attn).parameters
    assert all(
        name in taken and taken[name].kind == one.kind for name, one in inspect.signature(varlen).parameters.items()
    )
    monkeypatch.setattr(kernels, "varlen_attn", varlen)
    AttentionInterface.register(packing.VARLEN, packing.varlen_attention)
    settings = {"sliding_window": 8} if name == "mistral" else {}
    monkeypatch.setitem(bases.ARCHITECTURES, name, bases.ARCHITECTURES[name] | settings)
    model = base.load(bases.make(name, tmp_path), "none", attention="sdpa", dtype=torch.float32)
    alone, count, expected = learnt(model, "padded")
    assert packing.keeps_apart(model, "flat", packing.VARLEN) == fits
    if not fits:
        return
    flat, others, got = learnt(model, "flat")
    assert count == others
    assert flat == pytest.approx(alone, rel=1e-5)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_a_step_asks_the_device_for_nothing(tiny_base: Path, short: Prepared, tmp_path: Path) -> None:
    """Each of these operations waits for all that a GPU still computes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from cogpress.train import run as training
    from cogpress.train.arguments import arguments
    from cogpress.train.loop import ObjectiveTrainer, Rows

    asked: list[str] = []
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function).split(".")[1]
            masked = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
            asked.extend([name] if name in waits or masked else [])
            return function(*args, **(kwargs or {}))

    chosen = config.Config().override({"batch_size": 4, "rank": 4})
    model = training.adapted(chosen, tiny_base)
    layout = packing.choose(model)
    assert layout == "packed"
    trainer = ObjectiveTrainer(
        objective=AnswerLoss(model),
        model=model,
        args=arguments(chosen.train, tmp_path, 8, False, base.compute_dtype()),
        train_dataset=Rows(short.train[:8]),
        data_collator=Collator(0, layout),
    )
    halves = [Row(row.input_ids[-20:], row.labels[-20:]) for row in short.train[:3]]
    batch = trainer._prepare_inputs(Collator(0, layout)([short.train[0], *halves]))
    assert "rows" in batch
    with Watch():
        trainer.training_step(model, batch, num_items_in_batch=torch.tensor(40))
    assert asked == []


def test_activations_that_are_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    model = base.load(bases.make("llama", tmp_path), "none", attention="sdpa", dtype=torch.float32)
    _, _, expected = learnt(model, "packed")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, _, got = learnt(model, "packed")
    assert torch.allclose(got, expected, atol=1e-6)
