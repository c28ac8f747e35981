"""QLoRA: from a base model and prepared rows to an adapter.

Knows the run folder (configuration, metrics, plots, checkpoints, adapter) and resuming; leaves the loop to
transformers' Trainer, the adapter to peft and quantization to bitsandbytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cogpress import source
from cogpress.config import Config, Train
from cogpress.data import prepare
from cogpress.data.example import Example
from cogpress.data.prepare import Prepared
from cogpress.errors import CogpressError
from cogpress.files import new_folder, write_json
from cogpress.prompts import encode_prompt
from cogpress.verify import distributions
from cogpress.weights import base, manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

EAGER_UP_TO = 512
"""Tokens up to which plain attention beats PyTorch's fused kernel on a CPU.

Measured on two cores, batch 8 x 128, 135 M parameters: 452 against 366 tokens per second. Its memory grows with the
square of the length, so longer rows take the fused kernel.
"""


@dataclass(frozen=True)
class Result:
    """What a training run gave. `seconds` and the speed leave out evaluation, checkpoints and loading."""

    adapter: Path
    steps: int
    train_loss: float
    validation_loss: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_gb: float
    reused: bool = False


def run_key(config: Config, prepared: Prepared, base_fingerprint: str) -> dict[str, Any]:
    """Everything that decides what a run learns; two runs with equal keys give the same adapter."""
    import hashlib

    rows = hashlib.sha256()
    for row in prepared.train:
        rows.update(json.dumps([row.input_ids, row.labels]).encode())
    return {
        "base": base_fingerprint,
        "quantization": config.base.quantization,
        "train": config.train.model_dump(mode="json"),
        "rows": rows.hexdigest(),
    }


def train(
    config: Config, prepared: Prepared, base_folder: Path, run: Path, *, console: Console, resume: bool = False
) -> Result:
    """Train an adapter into `run/adapter`, with everything measured on the way beside it.

    A finished run with the same key is reused. An interrupted one goes on with `resume=True`.

    Args:
        config: the validated configuration; `config.train` and `config.base` are used.
        prepared: checked and tokenized rows.
        base_folder: the base model.
        run: the run's folder, made when missing.
        console: where progress is shown.
        resume: go on from the newest checkpoint of an interrupted run.

    Raises:
        CogpressError: nothing to train on; the folder holds another run; nothing to resume.
    """
    if not prepared.train:
        raise CogpressError("No example is left to train on. Read the data report above it for what was dropped.")
    fingerprint = manifest.fingerprint(base_folder)
    key = run_key(config, prepared, fingerprint)
    finished = _finished(run, key)
    if finished is not None:
        return finished
    checkpoint = _open_run(run, key, config, resume)
    return _train(config, prepared, base_folder, fingerprint, run, checkpoint, console)


def _finished(run: Path, key: dict[str, Any]) -> Result | None:
    try:
        saved = json.loads((run / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if saved["key"] != key or manifest.read(run / "adapter") is None:
        return None
    manifest.check(run / "adapter", manifest.read(run / "adapter") or {})
    return Result(**{**saved["result"], "adapter": run / "adapter", "reused": True})


def _open_run(run: Path, key: dict[str, Any], config: Config, resume: bool) -> Path | None:
    """Make the run's folder, or find the checkpoint to go on from."""
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in checkpoints if (path / "trainer_state.json").is_file()]
    saved = json.loads((run / "key.json").read_text()) if (run / "key.json").is_file() else None
    if resume:
        if saved is None:
            raise CogpressError(f"{run} holds no interrupted run. Start one without --resume.")
        if saved != key:
            changed = ", ".join(_differences(saved, key))
            raise CogpressError(f"{run} was started with another {changed}. Set it back, or start with --fresh.")
        return complete[-1] if complete else None
    if complete and not (run / "result.json").is_file():
        raise CogpressError(
            f"{run} holds an interrupted run, at {complete[-1].name.replace('-', ' ')}. "
            "Continue it with --resume, or start over with --fresh."
        )
    for name in ("checkpoints", "adapter", "result.json", "metrics.jsonl"):
        path = run / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "key.json", key)
    write_json(run / "config.json", config.public())
    return None


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in new:
        if isinstance(new[name], dict):
            names += _differences(old.get(name, {}), new[name], f"{prefix}{name}.")
        elif old.get(name) != new[name]:
            names.append(prefix + name)
    return names


def _train(
    config: Config,
    prepared: Prepared,
    base_folder: Path,
    fingerprint: str,
    run: Path,
    checkpoint: Path | None,
    console: Console,
) -> Result:
    import torch

    from cogpress import plots
    from cogpress.train.loop import AnswerTrainer, Collator, Recorder, Rows, memory_gb, read_metrics

    settings = config.train
    torch.manual_seed(settings.seed)
    longest = max(len(row.input_ids) for row in prepared.train + prepared.validation)
    tokenizer = base.tokenizer(base_folder)
    model = adapted(config, base_folder, attention=attention(longest))
    quantized = base.quantized_modules(model.get_base_model())
    recorder = Recorder(run / "metrics.jsonl", console)
    trainer = AnswerTrainer(
        model=model,
        args=arguments(settings, run, len(prepared.train), bool(prepared.validation)),
        train_dataset=Rows(prepared.train),
        eval_dataset=Rows(prepared.validation) if prepared.validation else None,
        data_collator=Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        lengths=[len(row.input_ids) for row in prepared.train],
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    quiet(trainer)
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        validation_loss = trainer.evaluate()["eval_loss"] if prepared.validation else None
    finally:
        recorder.close()
        trainer.release()
    facts = {
        "base": {"source": source.shown(config.base.source), "fingerprint": fingerprint},
        "quantization": config.base.quantization,
        "compute_dtype": str(base.compute_dtype()).removeprefix("torch."),
        "quantized_modules": [name.replace(".base_layer", "") for name in quantized],
        "prompt": config.prompt.model_dump(mode="json"),
        # Whoever has the examples can tell whether they hold the same ones out.
        "held_out": hashlib.sha256(prepare.held_out(prepared).encode()).hexdigest(),
    }
    with new_folder(run / "adapter") as part:
        model.save_pretrained(part)
        _name_base(part, source.shown(config.base.source))
        manifest.write(part, "adapter", facts)
    compare_answers(model, tokenizer, prepared.validation_examples, run, console)
    result = Result(
        adapter=run / "adapter",
        steps=output.global_step,
        train_loss=output.training_loss,
        validation_loss=validation_loss,
        seconds=recorder.seconds or time.perf_counter() - started,
        tokens=recorder.tokens,
        tokens_per_second=recorder.tokens / recorder.seconds if recorder.seconds else 0.0,
        peak_memory_gb=memory_gb(),
    )
    plots.losses(read_metrics(run / "metrics.jsonl"), run / "loss.png")
    saved = {name: value for name, value in vars(result).items() if name not in ("adapter", "reused")}
    write_json(run / "result.json", {"key": json.loads((run / "key.json").read_text()), "result": saved})
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def attention(longest: int) -> str:
    """The attention implementation that is fastest for rows of up to `longest` tokens on this machine."""
    return "eager" if base.device().type == "cpu" and longest <= EAGER_UP_TO else "sdpa"


def adapted(config: Config, base_folder: Path, *, attention: str = "sdpa") -> PeftModel:
    """The quantized base with a fresh LoRA adapter, in float32, on the configured layers.

    Raises:
        CogpressError: a name in `target_modules` is no layer of this model.
    """
    base.quiet_libraries()
    from peft import LoraConfig, get_peft_model

    settings = config.train
    model = base.load(base_folder, config.base.quantization, attention=attention)
    if base.device().type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets: str | list[str] = settings.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in settings.target_modules.split(",") if name.strip()]
    try:
        return get_peft_model(  # type: ignore[return-value]
            model,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
                lora_dropout=settings.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
                bias="none",
            ),
        )
    except ValueError as error:
        raise CogpressError(f"target_modules {settings.target_modules!r} do not fit this model: {error}") from None


def arguments(settings: Train, run: Path, rows: int, validation: bool) -> TrainingArguments:
    """Our settings in transformers' words. Steps are optimizer steps."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    half = {"bf16": base.compute_dtype() == torch.bfloat16, "fp16": base.compute_dtype() == torch.float16}
    per_epoch = max(1, rows // (settings.batch_size * settings.gradient_accumulation))
    total = settings.max_steps or max(1, round(per_epoch * settings.epochs))
    evaluate = validation and settings.evaluations > 0
    optimizer = settings.optimizer
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if cuda else "adamw"
    if optimizer == "paged_adamw_8bit" and not cuda:
        raise CogpressError("optimizer paged_adamw_8bit needs a GPU. Set it to auto or adamw.")
    return TrainingArguments(
        output_dir=str(run / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim={"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}[optimizer],
        **half,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        gradient_checkpointing_kwargs={"use_reentrant": False} if cuda else None,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=max(1, total // (settings.evaluations + 1)) if evaluate else None,
        save_strategy="steps",
        save_steps=max(1, total // 8),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
    )


def quiet(trainer: Any) -> None:
    """Our own recorder prints; transformers' printer would say everything twice."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _name_base(folder: Path, name: str) -> None:
    """Name the base as the user does: peft writes the path of a cache on this machine."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    write_json(folder / "adapter_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)


def compare_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    run: Path,
    console: Console,
    *,
    count: int = 4,
    max_tokens: int = 96,
) -> list[dict[str, str]]:
    """Greedy answers of the base and of the tuned model to validation prompts, side by side.

    Shown as a table and written to `answers.json` in the run's folder.
    """
    from rich.table import Table

    shown = [example for example in examples if example.messages is not None][:count]
    if not shown:
        return []
    prompts = [encode_prompt(tokenizer, example.asked) for example in shown]
    with model.disable_adapter():
        before = distributions.answers(model, tokenizer, prompts, max_tokens)
    after = distributions.answers(model, tokenizer, prompts, max_tokens)
    rows = [
        {"prompt": example.prompt, "expected": example.answer, "base": old, "tuned": new}
        for example, old, new in zip(shown, before, after, strict=True)
    ]
    write_json(run / "answers.json", rows)
    table = Table("prompt", "expected", "base", "tuned", title="Validation answers", show_lines=True)
    for row in rows:
        table.add_row(*(_plain(value) for value in row.values()))
    console.print(table)
    return rows


def _plain(text: str) -> Any:
    from rich.text import Text

    text = " ".join(text.split())
    return Text(text if len(text) <= 300 else text[:300] + "…")
