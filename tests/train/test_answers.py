"""Answers side by side: the terminal's width is theirs, and differences are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress.train import answers

EXPECTED = (
    '{"calculations":[{"op":"P95","column":"agent.idle"}],"breakdowns":["player.uid"],'
    '"orders":[{"op":"P95","column":"agent.idle","order":"descending"}],"limit":10}'
)


def shown(tuned: str, width: int = 80) -> list[str]:
    rows = [{"question": "10 player.uid?", "expected": EXPECTED, "base": "Sure! SELECT *", "tuned": tuned}]
    console = Console(width=width)
    with console.capture() as said:
        console.print(answers.table(rows, "Answers", marked=True))
    return [line.rstrip() for line in said.get().splitlines()]


def test_every_answer_is_readable_in_80_columns() -> None:
    lines = shown(EXPECTED)
    assert max(map(len, lines)) <= 80
    whole = "".join(line.split("│")[3].strip() for line in lines if line.startswith("│ ") and "Sure" not in line)
    assert whole.count(EXPECTED) == 2, "neither the expected answer nor the given one is cut"
    assert [line.split("│")[1].strip() for line in lines if "│" in line and line.split("│")[1].strip()] == [
        "question", "base", "expected", "tuned"
    ]  # fmt: skip
    marks = [line.split("│")[2].strip() for line in lines if "│" in line]
    assert (marks.count("✗"), marks.count("✓")) == (1, 1)


def test_differences_from_the_expected_answer_are_marked() -> None:
    wrong = EXPECTED.replace("player.uid", "player.id").replace(',"limit":10', "")
    text = answers.differences(EXPECTED, wrong, marked=True).plain
    assert text.count("[id]") == 1
    assert text.endswith('"descending"}][]}'), "what is missing is marked where it is missing"
    red = answers.differences(EXPECTED, wrong)
    assert [red.plain[span.start : span.end] for span in red.spans] == ["id", "[]"]
    assert not answers.differences(EXPECTED, "Sure! SELECT * FROM players", marked=True).spans
    assert answers.differences(EXPECTED, EXPECTED, marked=True).plain == EXPECTED


@pytest.mark.train
def test_answers_are_generated_in_batches_of_bounded_size(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cogpress.weights import base

    tokenizer = base.tokenizer(tiny_base)
    model: Any = base.load(tiny_base, "none", dtype=torch.float32)
    asked = [[11 + number, *range(20, 20 + length)] for number, length in enumerate((30, 2, 17, 5, 9, 40))]
    together = answers.generate(model, tokenizer, asked, 4)
    places = []
    generate = model.generate

    def watched(**given: Any) -> Any:
        rows, longest = given["input_ids"].shape
        places.append(rows * (longest + given["max_new_tokens"]))
        return generate(**given)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(answers, "GENERATED_TOKENS", 40)
    assert answers.generate(model, tokenizer, asked, 4) == together
    assert len(places) == 5
    assert sorted(places)[-2] <= 40 < max(places)  # the longest prompt alone is above the bound
