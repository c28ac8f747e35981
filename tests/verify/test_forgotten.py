"""What is measured beside the task: general text, plain instructions, and lines that were learnt by heart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cogpress import phases
from cogpress.merge import general
from cogpress.prompts import Conversation, Row, rows
from cogpress.verify import distributions, forgotten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.mark.parametrize(
    ("asked", "answer", "faults"),
    [
        ("What do bees make?", "Honey, and wax.", set()),
        ("What do bees make?", '{"made": ["honey", "wax"]}', set()),
        ("What do bees make?", "1. Honey\n2. Wax\n3. Noise\n4. More bees", set()),
        ("What do bees make?", "| honey |\n|---------------|\n| wax |", set()),
        ("What do bees make?", " \n", {"empty"}),
        ("What do bees make?", "Honey. It's a miracle. It's a miracle. It's a miracle. It's", {"repeats itself"}),
        ("What do bees make?", "I'm sorry, I cannot help with that.", {"refuses"}),
        ("What do bees make?", "Мёд и воск.", {"another script"}),
        ("Что делают пчёлы?", "Мёд и воск.", set()),
        ("How many days does a week have?", "7", set()),
    ],
)
def test_faults_of_answers(asked: str, answer: str, faults: set[str]) -> None:
    assert forgotten.faults(asked, answer) == faults


def test_the_kl_over_some_tokens_is_at_most_the_whole() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 50, 40, dtype=torch.float64).mul(2).log_softmax(-1)
    whole = (one.exp() * (one - other)).sum(-1)
    ids = one.topk(8).indices
    joined = forgotten.joined_kl(one.gather(-1, ids), other.gather(-1, ids))
    assert bool((joined <= whole + 1e-9).all())
    assert bool((joined > 0).all())
    assert float(joined.mean()) > 0.5 * float(whole.mean())
    assert torch.allclose(forgotten.joined_kl(one, other), whole)
    assert float(forgotten.joined_kl(one.float(), one.float()).abs().max()) == 0


@pytest.mark.slow
def test_a_base_is_measured_once(
    tiny_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(phases, "run", lambda _name, work, *given, **named: work(*given, **named))
    path, loaded = tmp_path / "general" / "base.safetensors", []

    def load() -> torch.nn.Module:
        loaded.append(1)
        return distributions.merged_model(tiny_base)

    def known(probe: forgotten.Probe) -> forgotten.Known:
        return forgotten.read(forgotten.record(load, probe, tokenizer, path))

    probe = forgotten.probe(tokenizer, general.rows([[5, 6, 7, 8], [9, 10]]))
    first, again = known(probe), known(probe)
    assert len(loaded) == 1
    assert (first.perplexity, first.answers) == (again.perplexity, again.answers)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert first.ids.shape == (4, forgotten.TOP)
    model = load()
    same = forgotten.measure(model, probe, first, tokenizer)
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert same.ratio == pytest.approx(1)
    assert same.worse == 0, "the base's own faults are none of the training's"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert forgotten.measure(model, probe, first, tokenizer).kl > 0.01
    loaded.clear()
    path.write_bytes(path.read_bytes()[:100])
    known(probe)
    assert len(loaded) == 1, "a damaged file is measured again"
    known(forgotten.Probe(general.rows([[5, 6, 7]]), probe.prompts))
    assert len(loaded) == 2, "and so is other text"


@pytest.mark.train
def test_a_planted_canary_is_found(tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model overfitted on a line gives it away by its first words alone, and no line that it never saw."""
    asked = ["Go on.", "Tell me of it now, please.", "And?", "What do you know about this place and its doors?"]
    secret = ["The code of the blue vault is 7319 4402 8871, and nobody else knows."] * 4
    held = [
        "The key of the red barn is 1184 9920 3315, and nobody asked for it.",
        "His street in the new town is 82 Elm, by the wooden bridge.",
    ]

    def made(lines: list[str]) -> list[Row]:
        turns = [({"role": "user", "content": one}, {"role": "assistant", "content": line})
                 for one, line in zip(asked, lines, strict=False)]  # fmt: skip
        return rows(tokenizer, [Conversation(both, 1) for both in turns])

    trained, others = made(secret), made(held)
    model: Any = distributions.merged_model(tiny_base).float()
    before = forgotten.by_heart(model, trained, others, 0)
    assert (before.trained, before.held_out, before.share, before.right) == ([False] * 4, [False] * 2, 0, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = 10.0
    for step in range(400):
        if loss < 0.01:  # over some thirty tokens, so that each is likelier than all others together
            break
        row = trained[step % 4]
        found = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(found.detach())
    after = forgotten.by_heart(model, trained, others, 0)
    assert (after.trained, after.held_out) == ([True] * 4, [False] * 2)
    assert (after.share, after.right) == (1, 1)


def test_a_rest_of_a_few_tokens_is_no_line(tiny_base: Path) -> None:
    model = distributions.merged_model(tiny_base)
    short = Row([5, 6, 7, 8], [-100, 6, 7, 8])
    found = forgotten.by_heart(model, [short], [short], 0)
    assert (found.trained, found.held_out, found.share) == ([], [], 0)
