"""The ways of merging beside each other, over a tiny base."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import merges, small
from cogpress import config
from cogpress.data.prepare import Prepared, Report
from cogpress.merge import general
from cogpress.prompts import NO_LOSS, Row, answer_text
from cogpress.quantize import run as quantize
from cogpress.quantize.calibrate import Source
from cogpress.verify import parity, strength
from cogpress.weights import base, tensors
from tests.merge.test_merge import an_adapter

ROWS = [
    Row(ids, [*[NO_LOSS] * 10, *ids[10:]])
    for ids in ([(7 * index) % 89 + 5 for index in range(start, start + 20)] for start in range(6))
]


@pytest.mark.slow
def test_four_merges_of_one_adapter_are_measured_and_served(
    tiny_base: Path,
    tmp_path: Path,
    examples_file: Path,
    prepare: Callable[..., Prepared],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine and llmcompressor are left out: what is asked of them and counted is what the test is about."""

    def here(work: Any, *given: Any) -> Any:
        return work(*given)

    monkeypatch.setattr(merges, "in_fresh_process", here)
    monkeypatch.setattr(strength, "STRENGTHS", (0.3,))
    monkeypatch.setattr(general, "pieces", lambda *_: [list(range(5, 65))])
    adapter, out = an_adapter(tiny_base, tmp_path / "adapter", "nf4"), io.StringIO()
    work, console = tmp_path / "work", Console(file=out, width=120)
    learnt, test = Prepared(ROWS[:4], ROWS[4:], [], [], Report()), prepare(examples_file)
    test = replace(test, train=test.train[:2], train_examples=test.train_examples[:2])
    case = merges.Case(config.Config(), tiny_base, adapter, learnt, test)
    found = merges.measure(case, work, console)
    assert list(found["merges"]) == ["usual", "dequantized", "rounded", "balanced"]
    assert found["merges"]["dequantized"]["mean_kl"] < found["merges"]["usual"]["mean_kl"]
    assert all(one["general_perplexity"] > 1 for one in found["merges"].values())
    asked: list[Path] = []

    def quantized(root: Path, source: Source, names: list[str], *_: Any, out: Path) -> dict[str, Any]:
        assert (root, names, source.facts["kind"]) == (tmp_path, ["int4"], "weights")
        return {"int4": quantize.Quantized("int4", source.folder, source.facts, reused=False)}

    def served(folder: Path, _: Any, prompts: list[list[int]], *__: Any) -> parity.Served:
        asked.append(folder)
        texts = [answer_text(tokenizer, row) for row in test.train]
        given = [parity.Answer(text, [], []) for text in (texts[0], "something else")]
        assert [row.input_ids[: len(ids)] for row, ids in zip(test.train, prompts, strict=True)] == prompts
        return parity.Served(given, [], 1.0, 1.0, 1.0)

    tokenizer = base.tokenizer(tiny_base)
    monkeypatch.setattr(quantize, "quantize", quantized)
    monkeypatch.setattr(parity, "serve", served)
    found["afterwards"] = merges.afterwards(case, work, tmp_path, console)
    assert [path.name for path in asked] == [name for name in merges.NAMES for _ in range(2)]
    assert all((one["served"], one["served_int4"]) == (1, 1) for one in found["afterwards"].values())
    merges.afterwards(case, work, tmp_path, console)
    assert len(asked) == 8, "not asked again"
    for table in merges.tables("a tiny base", found):
        console.print(table)
    assert all(name in out.getvalue() for name in merges.NAMES.values())
    plain, rounded = (tensors.stored(work / name) for name in ("dequantized", "rounded"))
    different = {
        name for name in plain if not torch.equal(tensors.load(plain[name], name), tensors.load(rounded[name], name))
    }
    assert {name.split(".")[-2] for name in different} <= {"embed_tokens", "lm_head"}
    assert different
    monkeypatch.setattr(merges, "in_fresh_process", None)
    assert merges.measure(case, work, console)["merges"] == found["merges"], "not measured again"


@pytest.mark.train
def test_a_small_base_of_another_family_learns_to_read(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    folder = small.make(tmp_path / "base", root, steps=3)
    tokenizer = base.tokenizer(folder)
    text = "Which is larger, the Moon or the Earth?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) < len(text), "pairs of bytes are learnt"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    small.make(folder, root, steps=3)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
