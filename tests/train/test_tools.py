"""A training with tools: it learns exactly the calls and answers, each after what a server would ask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import config, pipeline
from cogpress.prompts import NO_LOSS
from cogpress.serve.model import ServedModel
from cogpress.serve.requests import Request
from cogpress.train.objective import Collator
from cogpress.weights import base, manifest
from tests.standins.shapes import QWEN_25

pytestmark = pytest.mark.train

TOOL = {
    "type": "function",
    "function": {"name": "stock", "description": "Units", "parameters": {"type": "object", "properties": {}}},
}


def row(number: int) -> dict[str, Any]:
    """A call, its result and the answer, as ShareGPT writes them."""
    said = [
        ("system", "Be brief."),
        ("human", f"How many of A{number}?"),
        ("function_call", json.dumps({"name": "stock", "arguments": {"sku": f"A{number}"}})),
        ("observation", json.dumps({"units": number})),
        ("gpt", f"There are {number}."),
    ]
    turns = [{"from": who, "value": text} for who, text in said]
    return {"conversations": turns, "tools": json.dumps([TOOL["function"]])}


def sent(number: int) -> list[dict[str, Any]]:
    """What a client of the served model sends, up to the answer."""
    call = {"type": "function", "function": {"name": "stock", "arguments": {"sku": f"A{number}"}}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"How many of A{number}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({"units": number})},
    ]


def test_a_training_with_tools_learns_what_is_served(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = base.tokenizer(folder)
    tokenizer.chat_template = QWEN_25
    tokenizer.save_pretrained(folder)
    manifest.write(folder, "base", {"source": {"package": "test"}})
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(f"{json.dumps(row(number))}\n" for number in range(8)))
    batches: list[dict[str, Any]] = []
    collate = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda *given: batches.append(collate(*given)) or batches[-1])
    given = {
        "base": {"source": str(folder)},
        "data": {"validation_share": 0},
        "train": {"max_steps": 2, "batch_size": 4, "rank": 4, "packing": False},
        "serve": {"engine": "transformers"},
    }
    settings = config.parse(given, "the test")
    built = pipeline.build(settings, path, tmp_path / "run", tmp_path / "cache", Console(quiet=True))
    served = ServedModel(str(built.weights), settings, tmp_path, concurrency=1)
    try:
        trained = {
            tuple(token for token, seen in zip(ids, mask, strict=True) if seen): labels
            for batch in batches
            for ids, mask, labels in zip(
                batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True
            )
        }
        assert len(trained) == 8
        for number in range(8):
            asked = [
                served.encode(Request(messages=json.dumps(sent(number)[:turns]), tools=json.dumps([TOOL])))
                for turns in (2, 4)
            ]
            [(ids, labels)] = [both for both in trained.items() if list(both[0][: len(asked[0])]) == asked[0]]
            begins = [at for at, label in enumerate(labels) if label != NO_LOSS and labels[at - 1] == NO_LOSS]
            assert [list(ids[:at]) for at in begins] == asked
            call = f'<tool_call>\n{{"name": "stock", "arguments": {{"sku": "A{number}"}}}}\n</tool_call><|im_end|>'
            learnt = served.tokenizer.decode([label for label in labels if label != NO_LOSS])
            assert learnt == f"{call}There are {number}.<|im_end|>"
    finally:
        served.engine.shutdown()
