"""QLoRA on a tiny model: evaluation harms nothing, and an interrupted run ends as if it had not been interrupted."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from cogpress import config, pipeline
from cogpress.data.prepare import Prepared
from cogpress.errors import CogpressError
from cogpress.merge import merge
from cogpress.prompts import Row
from cogpress.train import run as training
from cogpress.train.objective import Collator
from cogpress.verify import distributions
from cogpress.weights import base, manifest, tensors

pytestmark = pytest.mark.train

QUIET = Console(quiet=True)


def settings(**train: Any) -> config.Config:
    options = {"max_steps": 6, "batch_size": 4, "rank": 4, "learning_rate": 0.01, "max_length": 128, "evaluations": 1}
    return config.Config().override(options | train).override({"validation_share": 0.1})


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    batch = Collator(0)(rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def gradients(model: torch.nn.Module, rows: list[Row]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    with base.autocast(model.dtype):  # type: ignore[arg-type]
        model(**padded(rows)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_evaluation_between_steps_leaves_gradients_as_they_were(tiny_base: Path, short: Prepared) -> None:
    # bitsandbytes repacks 4-bit weights for inference on AVX512-BF16 CPUs, and repacked weights train wrongly.
    torch.manual_seed(0)
    model = training.adapted(settings(), tiny_base, dtype=torch.bfloat16)
    with torch.no_grad():  # a fresh adapter's B is zero, which would hide wrong gradients of A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    before = gradients(model, short.train[:4])
    model.eval()
    with torch.no_grad():
        model(**padded(short.train[:4]))
        model.generate(input_ids=torch.tensor([short.train[0].input_ids]), max_new_tokens=2, do_sample=False)
    after = gradients(model, short.train[:4])
    assert before.keys() == after.keys()
    assert sum("lora_A" in name for name in before) == 14
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.abs().max() > 0, name


def test_a_run_leaves_everything_and_is_reused(tiny_base: Path, short: Prepared, tmp_path: Path) -> None:
    result = training.train(settings(), short, tiny_base, tmp_path / "run", console=QUIET)
    assert result.steps == 6
    assert not result.reused
    assert result.validation_loss is not None
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter", "answers.json", "config.json", "loss.png", "metrics.jsonl", "result.json"} <= names
    assert "checkpoints" not in names
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row][-1] == 6
    assert all(row["tokens_per_second"] > 0 and row["memory_gb"] > 0 for row in rows if "loss" in row)
    facts = manifest.read(tmp_path / "run" / "adapter")
    assert facts is not None
    assert facts["quantization"] == "nf4"
    assert len(facts["quantized_modules"]) == 14
    assert str(tiny_base) not in (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
    again = training.train(settings(), short, tiny_base, tmp_path / "run", console=QUIET)
    assert again.reused
    other = training.train(settings(learning_rate=0.02), short, tiny_base, tmp_path / "run", console=QUIET)
    assert not other.reused


def test_files_of_examples_are_relative_to_the_project(
    tiny_base: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    lines = examples_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "data" / "train.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    (root / "data" / "validation.jsonl").write_text("".join(lines[24:30]), encoding="utf-8")
    files = {"train": "data/train.jsonl", "validation": "data/validation.jsonl"}
    chosen = {"base": {"source": str(tiny_base)}, "data": files, "train": {"max_steps": 1, "rank": 4}}
    (root / "model.yaml").write_text(json.dumps(chosen), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pipeline.from_inputs(root, {}, run=root / "runs" / "one", console=QUIET)
    held_out = (root / "runs" / "one" / training.HELD_OUT).read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["messages"][-1]["content"] for line in held_out]
    assert answers == [f"It is {number + 1}, of course." for number in range(24, 30)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_run_resumes_to_the_same_adapter(
    tiny_base: Path,
    short: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
) -> None:
    import cogpress.train.loop

    class Interrupt(cogpress.train.loop.Recorder):
        """Stops the run as Ctrl-C does, in the middle of a step after a checkpoint."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            super().on_step_begin(args, state, control, **rest)
            if state.global_step == 5:
                raise KeyboardInterrupt

    chosen = settings(max_steps=14, dropout=dropout)  # more than an epoch of 9 batches
    whole = training.train(chosen, short, tiny_base, tmp_path / "whole", console=QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(cogpress.train.loop, "Recorder", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.train(chosen, short, tiny_base, tmp_path / "cut", console=QUIET)
    assert not (tmp_path / "cut" / "adapter").exists()
    with pytest.raises(CogpressError, match=r"interrupted run, at checkpoint \d+.*--resume"):
        training.train(chosen, short, tiny_base, tmp_path / "cut", console=QUIET)
    with pytest.raises(CogpressError, match=r"another train\.rank"):
        training.train(settings(max_steps=14, rank=2), short, tiny_base, tmp_path / "cut", console=QUIET, resume=True)
    with monkeypatch.context() as patch:
        # By now another format is faster, on a busier machine or a new one.
        other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[base.compute_dtype()]
        patch.setattr(base, "compute_dtype", lambda: other)
        resumed = training.train(chosen, short, tiny_base, tmp_path / "cut", console=QUIET, resume=True)
    assert resumed.steps == whole.steps
    assert manifest.fingerprint(resumed.adapter) == manifest.fingerprint(whole.adapter)
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_what_a_kill_left_half_written_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, key = tmp_path / "run", {"base": "b", "train": {}, "rows": "r"}
    write = training.write_json

    def killed(path: Path, content: Any) -> None:
        if path.name == "key.json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            training._open_run(run, key, settings(), resume=False)
    training.discard(run, QUIET)
    training.check_folder(run)
    assert training._open_run(run, key, settings(), resume=False) is None
    for step, text in ((2, "{}"), (4, '{"global_step": 4')):
        (run / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert training._open_run(run, key, settings(), resume=True) == run / "checkpoints" / "checkpoint-2"
    assert (run / "config.json").is_file()


def test_a_finished_run_keeps_no_checkpoints(
    tiny_base: Path, short: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.write_json(tmp_path / "key.json", {"base": "", "train": {}, "rows": ""})
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    found = training.Result(tmp_path / "adapter", 2, 1.0, None, 1.0, 1, 1.0, 1.0, reused=True)
    monkeypatch.setattr(training, "_finished", lambda *_: found)
    assert training.train(settings(), short, tiny_base, tmp_path, console=QUIET) is found
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_to_resume_is_said(tiny_base: Path, short: Prepared, tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="no interrupted run"):
        training.train(settings(), short, tiny_base, tmp_path / "run", console=QUIET, resume=True)


def test_norms_compute_in_float32_and_layers_in_16_bits(tiny_base: Path, tmp_path: Path) -> None:
    """RMS norms do so by themselves; a layer norm, which does not, is held in float32."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = base.load(tiny_base, "nf4", dtype=torch.bfloat16)
    assert len(base.quantized_modules(model)) == 14
    norm = model.model.layers[0].input_layernorm
    values = torch.randn(64, 128).to(torch.bfloat16) * 30
    exact = values.float() * torch.rsqrt(values.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    assert torch.equal(norm(values), (norm.weight * exact.to(torch.bfloat16)))

    small = GPTNeoXConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    GPTNeoXForCausalLM(small).save_pretrained(tmp_path)
    neox = base.load(tmp_path, "nf4", dtype=torch.bfloat16)
    layer_norm = neox.gpt_neox.layers[0].input_layernorm
    assert layer_norm.weight.dtype == torch.float32
    assert layer_norm(values[:, :64]).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(neox(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_each_quantization_learns(quantization: str, tiny_base: Path, short: Prepared, tmp_path: Path) -> None:
    chosen = settings(max_steps=12).override({"quantization": quantization})
    training.train(chosen, short, tiny_base, tmp_path, console=QUIET)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_computes_as_training_did_and_weights_have_16_bits(
    dtype: torch.dtype, tiny_base: Path, short: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base, "compute_dtype", lambda: dtype)
        adapter = training.train(settings(max_steps=12), short, tiny_base, tmp_path, console=QUIET).adapter
    facts = manifest.read(adapter) or {}
    assert facts["compute_dtype"] == str(dtype).removeprefix("torch.")
    reference = distributions.reference_model(tiny_base, adapter)
    assert reference.dtype == dtype  # whatever is fastest here by now
    merge.merge(tiny_base, adapter, tmp_path / "weights")
    assert {place.dtype for place in tensors.stored(tmp_path / "weights").values()} == {"BF16"}
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["dtype"] == "bfloat16"
    candidate = {"merged": lambda: distributions.merged_model(tmp_path / "weights")}
    found = distributions.compare(lambda: reference, candidate, short.train, 0)["merged"]
    assert found.mean_kl < 0.001
    assert found.reference_perplexity == pytest.approx(math.exp(distributions.answer_loss(reference, short.train, 0)))


def test_what_is_measured_goes_where_train_report_to_says(
    tiny_base: Path, short: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, str, float, int]] = []

    class SummaryWriter:
        """What transformers' callback uses of the package, which is not among the project's own."""

        def __init__(self, log_dir: str) -> None:
            self.folder = log_dir

        def add_text(self, *_: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((self.folder, name, value, step))

    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    run = tmp_path / "run"
    training.train(settings(max_steps=4, report_to="tensorboard"), short, tiny_base, run, console=QUIET)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {folder for folder, *_ in written} == {str(run / "tensorboard")}
    for column, name in (("loss", "train/loss"), ("learning_rate", "train/learning_rate")):
        ours = [(row["step"], row[column]) for row in rows if "loss" in row]
        assert [(step, value) for _, one, value, step in written if one == name] == ours
    ours = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert [(step, value) for _, one, value, step in written if one == "eval/loss"] == ours != []
    monkeypatch.undo()
    assert training.train(settings(max_steps=4), short, tiny_base, run, console=QUIET).reused


@pytest.mark.skipif(find_spec("wandb") is not None, reason="asks for a package that is missing")
def test_a_package_to_report_to_that_is_missing_is_said_before_anything_is_loaded(
    tiny_base: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    chosen = {"base": {"source": str(tiny_base)}, "train": {"report_to": "wandb"}}
    with pytest.raises(CogpressError, match=r"train\.report_to is wandb.* -m pip install wandb, or set .* to none"):
        pipeline.build(config.parse(chosen, "the test"), examples_file, tmp_path / "run", tmp_path, QUIET)
    assert not (tmp_path / "run").exists()
