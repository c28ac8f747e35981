"""The loss is the model's own on answer tokens, and padding changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogpress import config
from cogpress.data.prepare import Prepared
from cogpress.prompts import Row
from cogpress.train import run as training
from cogpress.train.objective import AnswerLoss, Collator

pytestmark = pytest.mark.train


def test_loss_is_the_models_own_on_the_answer_tokens(tiny_base: Path, short: Prepared) -> None:
    torch.manual_seed(0)
    chosen = config.Config()
    model = training.adapted(chosen, tiny_base)
    objective = AnswerLoss(model)
    batch = Collator(0)(short.train[:3])
    model.eval()
    with torch.no_grad():
        total, count = objective(model, batch)
        whole = model(**batch)
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
        alone = model(**Collator(0)([row])).logits[0]
        padded = model(**Collator(0)([row, long])).logits[0, : len(row.input_ids)]
    assert torch.allclose(alone.float(), padded.float(), atol=0.05)


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
