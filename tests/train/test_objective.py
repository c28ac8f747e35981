"""The loss is the model's own on answer tokens, and padding changes nothing."""

from __future__ import annotations

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
