"""The loss is the model's own on answer tokens, and neither padding nor sharing a sequence changes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogpress import config
from cogpress.data.prepare import Prepared
from cogpress.prompts import NO_LOSS, Row
from cogpress.train import objective as objectives
from cogpress.train import run as training
from cogpress.train.objective import AnswerLoss, Collator, SummedCrossEntropy

pytestmark = pytest.mark.train


def padded(rows: list[Row]) -> dict[str, Any]:
    """A batch as transformers' models take it, labels included."""
    batch = Collator(0)(rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def test_loss_is_the_models_own_on_the_answer_tokens(tiny_base: Path, short: Prepared) -> None:
    torch.manual_seed(0)
    chosen = config.Config()
    model = training.adapted(chosen, tiny_base)
    objective = AnswerLoss(model)
    batch = Collator(0)(short.train[:3])
    model.eval()
    with torch.no_grad():
        total, count = objective(model, batch)
        whole = model(**padded(short.train[:3]))
    objective.release()
    assert count == int((batch["labels"] != -100).sum())
    assert count < batch["attention_mask"].sum()
    assert (total / count).item() == pytest.approx(whole.loss.item(), rel=1e-4)
    assert whole.logits.shape[:2] == batch["input_ids"].shape  # all logits again outside of the loss


def test_padding_changes_nothing(tiny_base: Path, short: Prepared) -> None:
    chosen = config.Config()
    torch.manual_seed(0)
    model = training.adapted(chosen, tiny_base, attention="eager").eval()
    row = short.train[0]
    long = Row(row.input_ids * 3, row.labels * 3)
    with torch.no_grad():
        alone = model(**padded([row])).logits[0]
        beside = model(**padded([row, long])).logits[0, : len(row.input_ids)]
    assert torch.allclose(alone.float(), beside.float(), atol=0.05)


def test_a_weight_is_a_factor_on_its_rows_loss(tiny_base: Path, short: Prepared) -> None:
    torch.manual_seed(0)
    model = training.adapted(config.Config(), tiny_base).eval()
    first, second = short.train[:2]
    objective = AnswerLoss(model)
    with torch.no_grad():
        (one, count), (other, more) = (objective(model, Collator(0)([row])) for row in (first, second))
        weighted, both = objective(model, Collator(0)([replace(first, weight=2.5), second]))
    assert both == count + more
    assert weighted.item() == pytest.approx((2.5 * one + other).item(), rel=1e-2)


def test_a_weight_is_part_of_what_a_run_learns(short: Prepared) -> None:
    heavier = replace(short, train=[replace(short.train[0], weight=2.0), *short.train[1:]])
    keys = [training.run_key(config.Config(), prepared, "")["rows"] for prepared in (short, heavier)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_of_tiles_is_pytorchs_own(weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "TILE_BYTES", 4 * 50 * 7)  # 7 positions a tile, the last one smaller
    torch.manual_seed(0)
    values, targets = torch.randn(24, 50).to(dtype), torch.randint(50, (24,))
    weights = torch.rand(24) if weighted else None
    found = []
    for own in (True, False):
        logits = values.clone().requires_grad_()
        if own:
            loss = SummedCrossEntropy.apply(logits, targets, weights)
        else:
            each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            loss = (each if weights is None else each * weights).sum()
        (loss / 3).backward()
        assert logits.grad is not None
        assert logits.grad.dtype == dtype
        found.append((loss.item(), logits.grad.float()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=2e-3 if dtype == torch.bfloat16 else 1e-6)


def test_no_float32_copy_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(objectives, "TILE_BYTES", 4 * 50 * 7)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in [made] if torch.is_tensor(one) and one.dtype == torch.float32)
            return made

    logits = torch.randn(24, 50, dtype=torch.bfloat16).requires_grad_()
    with Watch():
        SummedCrossEntropy.apply(logits, torch.randint(50, (24,)), None).backward()
    assert max(sizes) == 7 * 50


def test_the_labels_of_a_batch_are_counted_as_they_are_learnt() -> None:
    rows = [Row([1, 2, 3], [1, 2, 3]), Row([4, 5], [NO_LOSS, 5]), Row([6, 7, 8, 9, 10], [NO_LOSS] * 4 + [10])]
    for layout in ("padded", "packed", "flat"):
        batch = Collator(0, layout)(rows)
        assert sorted(batch["targets"].tolist()) == [2, 3, 5, 10]
        learnt = batch["input_ids"].flatten()[batch["places"] + 1]
        assert torch.equal(learnt, batch["targets"])
        assert int((batch["labels"][:, 1:] != NO_LOSS).sum()) == 4  # as transformers' trainer counts them
        assert batch["tokens"] == 10
    kept = [replace(rows[0], like_base=True), rows[1]]
    assert "cu_seq_lens_q" in Collator(0, "flat")(kept)["alone"]  # the kernel of a flat batch takes no other
    assert "attention_mask" in Collator(0, "packed")(kept)["alone"]
    assert Collator(0, "packed")(rows)["input_ids"].tolist() == [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
