"""General text among the examples: its rows, its loss from the base, and a run that forgets less with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cogpress import config
from cogpress.data.prepare import Prepared
from cogpress.prompts import NO_LOSS, Row
from cogpress.train import objective, replay
from cogpress.train import run as training
from cogpress.train.objective import AnswerLoss, Collator

pytestmark = pytest.mark.train

TEXT = [[(7 * at) % 89 + 5 for at in range(start, start + 60)] for start in range(4)]
KEPT = Row(TEXT[0][:20], [NO_LOSS, *TEXT[0][1:20]], like_base=True)


def test_rows_are_pieces_of_the_text_as_long_as_the_examples() -> None:
    examples = [Row(list(range(length)), [NO_LOSS] * length) for length in (10, 20, 90)] * 10
    made = replay.rows(examples, 0.25, TEXT, 0)
    assert len(made) == 10, "a quarter of all rows"
    assert {len(row.input_ids) for row in made} == {10, 20, 60}, "of the examples, or as long as the text"
    pieces = {tuple(text[at : at + size]) for text in TEXT for at in range(60) for size in (10, 20, 60)}
    assert all(tuple(row.input_ids) in pieces for row in made)
    assert all(row.labels == [NO_LOSS, *row.input_ids[1:]] and row.like_base for row in made)
    assert made == replay.rows(examples, 0.25, TEXT, 0)
    assert replay.rows(examples, 0.0, TEXT, 0) == []


def test_a_row_like_the_base_costs_its_divergence_from_the_base(tiny_base: Path, short: Prepared) -> None:
    torch.manual_seed(0)
    model = training.adapted(config.Config(), tiny_base, dtype=torch.float32)
    loss = AnswerLoss(model)
    batch = Collator(0)([KEPT, short.train[0]])
    alone = loss(model, Collator(0)([short.train[0]]))
    fresh = loss(model, batch)
    assert fresh[0].item() == pytest.approx(alone[0].item(), rel=1e-3), "a fresh adapter changes nothing"
    assert fresh[1] == alone[1] + 19
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.train()
    changed = loss(model, Collator(0)([KEPT]))[0]
    both = loss(model, batch)[0]
    learnt = loss(model, Collator(0)([short.train[0]]))[0]
    packed = loss(model, Collator(0, "packed")([short.train[0], KEPT, KEPT]))[0]
    loss.release()
    assert model.training
    ids = torch.tensor([KEPT.input_ids])
    with torch.no_grad():
        now = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        with model.disable_adapter():
            before = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    assert changed.item() == pytest.approx(float((before.exp() * (before - now)).sum()), rel=1e-2)
    assert both.item() == pytest.approx(changed.item() + learnt.item(), rel=1e-2)
    assert packed.item() == pytest.approx(2 * changed.item() + learnt.item(), rel=1e-2)
    changed.backward()
    slope = [weight.grad for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(one is not None and one.abs().max() > 0 for one in slope)


def test_the_divergence_and_its_gradient_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "TILE_BYTES", 4 * 11 * 3)  # three positions a tile
    torch.manual_seed(0)
    logits, expected = torch.randn(2, 8, 11)
    found = []
    for divergence in (objective.SummedDivergence.apply, _divergence):
        ours = logits.clone().requires_grad_()
        total = divergence(ours, expected)
        (3 * total).backward()
        found.append((total.detach(), ours.grad))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def _divergence(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    wanted = expected.log_softmax(-1)
    return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)


def test_a_run_learns_from_both_and_knows_them_again(tiny_base: Path, short: Prepared, tmp_path: Path) -> None:
    settings = config.Config().override({"epochs": 1.0, "batch_size": 4, "rank": 4, "learning_rate": 0.001})
    few = replace(short, train=short.train[:6], validation=[], validation_examples=[])
    kept, console = [KEPT] * 6, Console(quiet=True)
    made = training.train(settings, few, tiny_base, tmp_path, console=console, replayed=kept)
    assert made.steps == 3, "six rows of each"
    assert training.train(settings, few, tiny_base, tmp_path, console=console, replayed=kept).reused
    keys = [training.run_key(settings, few, "", rows) for rows in ([], kept)]
    assert keys[0]["rows"] == keys[1]["rows"], "those of the task, which later steps check"
    assert keys[0] != keys[1]
