"""The balanced merge: its formula, its files, and that measurement chooses how strong it is."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench import bases, models
from cogpress import config, pipeline
from cogpress.errors import CogpressError
from cogpress.merge import balance, general, merge
from cogpress.verify import distributions, strength
from cogpress.weights import manifest, tensors
from tests.merge.test_merge import an_adapter

pytestmark = pytest.mark.train

GENERAL = [[index % 97 + 3 for index in range(start, start + 60)] for start in range(0, 200, 40)]
TASK = [[(7 * index) % 89 + 5 for index in range(start, start + 40)] for start in range(6)]


def test_what_is_kept_minimizes_both_errors_and_needs_float64() -> None:
    """Against the derivative, on moments whose eigenvalues span eight magnitudes."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -4, 12, dtype=torch.float64)
    task, text = (torch.randn(400, 12, dtype=torch.float64) * scales.roll(shift) for shift in (0, 5))
    c, g = (rows.T @ rows / len(rows) for rows in (task, text))
    error = torch.randn(3, 12, dtype=torch.float64)
    added = balance.DAMPING * float((c + 0.1 * g).diagonal().mean())
    correction = balance.kept(error, c, g, [0.1])[0].requires_grad_()
    lost = correction - error
    total = (lost @ c @ lost.T).trace() + 0.1 * (correction @ g @ correction.T).trace() + added * correction.norm() ** 2
    total.backward()
    assert correction.grad is not None
    assert float(correction.grad.norm() / (error @ c).norm()) < 1e-9
    # Moments that were summed up in float32 are accurate enough.
    few = (task.float().T @ task.float() / 400, text.float().T @ text.float() / 400)
    rough, exact = (balance.kept(error, *moments, [0.1])[0] for moments in (few, (c, g)))
    assert float((rough - exact).norm() / exact.norm()) < 1e-5


def test_nothing_is_added_where_neither_text_says_anything() -> None:
    task, text = torch.zeros(2, 8, 8)
    task[0, 0], text[1, 1] = 1.0, 1.0
    kept = balance.kept(torch.eye(8), task, text, [0.1])[0]
    assert float(kept[0, 0]) > 0.9
    assert float(kept.abs().sum()) == pytest.approx(float(kept[0, 0]))
    torch.manual_seed(1)
    few = torch.randn(2, 5, 64, dtype=torch.float64)  # fewer inputs than directions
    c, g = (rows.T @ rows / 5 for rows in few)
    made = balance.kept(torch.eye(64), c, g, (1.0, 0.1, 0.01))
    assert all(float(torch.linalg.matrix_norm(one, 2)) < 4 for one in made)


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, merge.MergePlan, Path]:
    """An adapter, the plan of its balanced merge, and the folder of its corrections."""
    folder = tmp_path_factory.mktemp("balanced")
    adapter = an_adapter(tiny_base, folder / "adapter", "nf4")
    return adapter, merge.plan(tiny_base, adapter, "balanced"), folder / "work"


def test_a_strength_goes_from_the_dequantized_merge_to_the_usual_one(
    tiny_base: Path, made: tuple[Path, merge.MergePlan, Path], tmp_path: Path
) -> None:
    adapter, planned, work = made
    correction = balance.corrections(
        planned,
        lambda: distributions.reference_model(tiny_base, adapter, generates=True),
        TASK,
        GENERAL,
        (0.0001, 1000.0),
        work,
    )
    folders = {}
    for onto in ("dequantized", "original"):
        merge.merge(tiny_base, adapter, tmp_path / onto, onto=onto)
        folders[onto] = tensors.stored(tmp_path / onto)
    names = [f"{layer}.weight" for layer in planned.adapter.quantized]
    assert len(names) == 14

    def far(strength: float, onto: str) -> float:
        plan = replace(planned, correction=lambda layer: correction(strength, layer))
        difference = whole = 0.0
        for output in plan.outputs:
            expected = tensors.load(folders[onto][output.name], output.name).float()
            value = plan.value(output).float()
            if output.name not in names:
                assert torch.equal(value, expected)
                continue
            difference += float((value - expected).norm() ** 2)
            layer = output.name.removesuffix(".weight")
            whole += float(planned.error(layer).norm() ** 2)
        return (difference / whole) ** 0.5

    assert far(0.0001, "dequantized") < far(1000.0, "dequantized")
    assert far(1000.0, "original") < 0.1 < far(0.0001, "original")


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_layers_of_other_names_and_turned_ones_are_balanced_too(tmp_path: Path, name: str) -> None:
    """With little general text all of the error is kept, with little of the task none, in every layer."""
    folder = bases.make(name, tmp_path / "base")
    models.merge_of_random(folder, tmp_path)
    planned = merge.plan(folder, tmp_path / "adapter", "balanced")
    load = partial(distributions.reference_model, folder, tmp_path / "adapter", generates=True)
    found = balance.corrections(planned, load, TASK, TASK, (1e-6, 1e6), tmp_path / "work")
    assert planned.adapter.quantized
    for layer in planned.adapter.quantized:
        error, size = planned.error(layer), float(planned.error(layer).norm())
        assert found(1e-6, layer).shape == error.shape, "(outputs, inputs)"
        assert float(found(1e6, layer).norm()) < 1e-3 * size < float(found(1e-6, layer).norm()), layer


def test_it_is_not_made_without_the_examples(
    tiny_base: Path, made: tuple[Path, merge.MergePlan, Path], tmp_path: Path
) -> None:
    with pytest.raises(CogpressError, match=r"needs the examples of the training, so scripts/train makes it"):
        merge.merge(tiny_base, made[0], tmp_path / "weights", onto="balanced")
    assert not (tmp_path / "weights").exists()


def test_an_interrupted_computation_goes_on_and_another_one_begins_anew(
    tiny_base: Path, made: tuple[Path, merge.MergePlan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, planned, _ = made
    monkeypatch.setattr(balance, "MOMENT_BYTES", 1)  # a group for each block
    passes: list[int] = []

    def load() -> torch.nn.Module:
        passes.append(len(list(work.glob("*.safetensors"))))
        return distributions.reference_model(tiny_base, adapter, generates=True)

    def compute(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        found = balance.corrections(planned, load, rows, GENERAL, (0.1,), work)
        return {layer: found(0.1, layer) for layer in planned.adapter.quantized}

    work = tmp_path / "work"
    first = compute(TASK)
    assert len(list(work.glob("*.safetensors"))) == 14, "a file for each layer"
    compute(TASK)
    assert passes == [0], "what is there is not computed again"
    (work / "model.layers.1.mlp.down_proj.safetensors").unlink()
    again = compute(TASK)
    assert passes == [0, 13]
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    other = compute(TASK[:2])
    assert passes == [0, 13, 0], "other rows: nothing is taken over"
    assert any(not torch.equal(first[layer], other[layer]) for layer in first)
    content = load_file(adapter / "adapter_model.safetensors")
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    save_file({name: 2 * one for name, one in content.items()}, trained / "adapter_model.safetensors")
    manifest.write(trained, "adapter", {k: v for k, v in planned.adapter.facts.items() if k not in manifest.WRITTEN})
    planned = merge.plan(tiny_base, trained, "balanced")
    compute(TASK[:2])
    assert passes == [0, 13, 0, 0], "another adapter on the same layers: nothing is taken over"


def test_a_run_measures_strengths_and_takes_the_largest_that_keeps_the_task(
    tiny_base: Path, examples_file: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", io.StringIO()
    text = tmp_path / "general.jsonl"
    text.write_text("".join(json.dumps({"text": f"Line {n} of a short text."}) + "\n" for n in range(6)))
    settings = config.parse(
        {
            "data": {"general": str(text), "replay_share": 0.25},
            "base": {"source": str(tiny_base)},
            "train": {"max_steps": 2, "rank": 4, "evaluations": 0},
            "merge": "balanced",
        },
        "the test",
    )
    console = Console(file=out, width=80)
    built = pipeline.build(settings, examples_file, run, tmp_path / "cache", console, general_text=text)
    saved = json.loads((run / "balance.json").read_text())
    tried = [strength.Tried(**one) for one in saved["tried"]]
    assert [(one.onto, one.strength) for one in tried] == [
        ("original", None), ("dequantized", None), *(("balanced", one) for one in strength.STRENGTHS),
    ]  # fmt: skip
    assert tried[1].mean_kl < tried[0].mean_kl
    assert built.manifest["merge"]["asked"] == "balanced"
    assert built.manifest["merge"]["onto"] == ("dequantized" if saved["strength"] is None else "balanced")
    assert (run / "balance.png").is_file()
    assert not (run / "balance").exists(), "what it computed is removed when the weights are written"
    assert "← taken" in out.getvalue()
    assert "rows of general text beside the examples" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80
    before = (run / "weights" / "model.safetensors").stat().st_mtime_ns
    pipeline.build(settings, examples_file, run, tmp_path / "cache", console, general_text=text)
    assert (run / "weights" / "model.safetensors").stat().st_mtime_ns == before, "not merged again"
    text.write_text(text.read_text().replace("Line", "Row"))
    pipeline.build(settings, examples_file, run, tmp_path / "cache", console, general_text=text)
    assert (run / "weights" / "model.safetensors").stat().st_mtime_ns != before, "with other text it is"


@pytest.mark.parametrize(
    ("tried", "wanted"),
    [
        ([(0.0006, 9, 20.0), (0.0004, 9, 22.0), (0.0003, 9, 24.0), (0.0001, 9, 25.0)], 0.3),
        ([(0.0005, 8, 20.0), (0.0004, 9, 22.0), (0.0002, 9, 24.0), (0.0001, 9, 25.0)], 0.3),
        ([(0.0005, 9, 20.0), (0.0004, 9, 22.0), (0.0002, 9, 24.0), (0.0001, 9, 25.0)], 1.0),
        ([(0.01, 9, 20.0), (0.008, 9, 22.0), (0.006, 9, 24.0), (0.004, 9, 25.0)], None),
        ([(0.0005, 9, 40.0), (0.0004, 9, 41.0), (0.0002, 9, 41.5), (0.0001, 9, 42.0)], None),
    ],
    ids=["within the limit", "enough right", "all within", "none within", "none better in general"],
)
def test_the_rule(tried: list[tuple[float, int, float]], wanted: float | None) -> None:
    merges = [strength.Tried("original", None, 0.006, 9, 18.0), strength.Tried("dequantized", None, 0.0, 9, 30.0)]
    merges += [strength.Tried("balanced", g, *one) for g, one in zip(strength.STRENGTHS, tried, strict=True)]
    assert strength.largest(merges, 9) == wanted


def test_one_row_fewer_is_no_loss_and_of_many_rows_two_in_a_hundred() -> None:
    assert (strength.least_right(21, 38), strength.least_right(900, 1000)) == (20, 880)


def test_general_text_of_ones_own(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": f"Line {number} of the text."}) + "\n" for number in range(1, 7)))
    for use, numbers in (("fit", "1245"), ("measure", "36")):
        found = general.pieces(tokenizer, use, path)  # type: ignore[arg-type]
        assert [tokenizer.decode(ids).split()[1] for ids in found] == list(numbers)
    own = {use: general.pieces(tokenizer, use) for use in ("fit", "measure")}  # type: ignore[arg-type]
    assert max(len(ids) for ids in own["fit"]) <= general.PIECE
    assert not {tuple(ids) for ids in own["fit"]} & {tuple(ids) for ids in own["measure"]}
    row = general.rows([[5, 6, 7]])[0]
    assert (row.input_ids, row.labels[1:]) == ([5, 6, 7], [6, 7])
    path.write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(CogpressError, match=r"general\.jsonl:2 is no JSON object with a text"):
        general.pieces(tokenizer, "fit", path)
    with pytest.raises(CogpressError, match=r"no general text at .*missing"):
        general.pieces(tokenizer, "fit", tmp_path / "missing")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["A one.", "A two.", "A three."]}), path := tmp_path / "general.parquet"
    )
    assert [tokenizer.decode(ids) for ids in general.pieces(tokenizer, "measure", path)] == ["A three."]


def test_general_text_that_would_take_for_ever_is_refused_before_training(
    tiny_base: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "MAX_TOKENS", 100)
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 30}) + "\n" for _ in range(10)))
    settings = config.parse({"base": {"source": str(tiny_base)}, "merge": "dequantized"}, "the test")
    with pytest.raises(CogpressError, match=r"general\.jsonl has more than 100 tokens to fit"):
        pipeline.build(
            settings, examples_file, tmp_path / "run", tmp_path / "cache", Console(quiet=True), general_text=path
        )
    assert not (tmp_path / "run" / "adapter").exists()
