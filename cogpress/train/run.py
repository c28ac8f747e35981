"""A training run: its folder, resuming it, and the adapter that comes out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cogpress import phases, source
from cogpress.config import Config, Train
from cogpress.data import prepare
from cogpress.data.prepare import Prepared
from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, write_json
from cogpress.prompts import Row
from cogpress.train import answers, layers
from cogpress.train.arguments import arguments, check_report, lora, optimizer, reporters, too_few
from cogpress.train.layers import Layers
from cogpress.weights import base, manifest
from cogpress.weights.filenames import ADAPTER

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

EAGER_UP_TO = 512
"""Tokens up to which plain attention beats PyTorch's fused kernel on a CPU.

Two cores, batch 8 x 128, 135 M parameters: 452 against 366 tokens per second. Its memory grows with the square of the
length, so longer rows take the fused kernel.
"""

HELD_OUT = "held-out.jsonl"
"""The examples of a run that it does not train on, as conversations."""

TRAINED_ON = "trained-on.jsonl"
"""Some of the examples that a run trains on, as conversations: what it may have learnt by heart."""

_TRAINED = ("checkpoints", ADAPTER, "result.json", "metrics.jsonl", "tensorboard")
"""What a training writes into its run's folder, and a new one there removes."""

_PREPARED = {"data", "data.json", HELD_OUT, TRAINED_ON, "lengths.png", "config.json"}
"""What is in a run's folder before the training begins."""

_NOT_LEARNT = {"evaluations", "max_length", "packing", "report_to"}
"""Options of the section `train` that change nothing that is learnt; `max_length` does by the rows that it leaves."""


@dataclass(frozen=True)
class Result:
    """What a training run gave. `seconds` and the speed exclude evaluation, checkpoints and loading."""

    adapter: Path
    steps: int
    train_loss: float
    validation_loss: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_gb: float
    reused: bool = False


def run_key(config: Config, prepared: Prepared, base_fingerprint: str, replayed: Sequence[Row] = ()) -> dict[str, Any]:
    """Everything that decides what a run learns, but the machine and its compute dtype."""
    return {
        "base": base_fingerprint,
        "quantization": config.base.quantization,
        "train": config.train.model_dump(mode="json", exclude=_NOT_LEARNT),
        "rows": _hash(prepared.train),
        "replay": _hash(replayed) if replayed else None,
    }


def _hash(rows: Sequence[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        weight = [] if row.weight == 1 else [row.weight]
        found.update(json.dumps([row.input_ids, row.labels, *weight]).encode())
    return found.hexdigest()


def discard(run: Path, console: Console) -> None:
    """Delete a run's folder, so that a training starts over, and say so first. Where none began, nothing is deleted.

    Raises:
        CogpressError: the folder is no run's.
    """
    if not run.is_dir() or {path.name for path in run.iterdir()} <= _PREPARED:
        return
    if not _is_run(run):
        raise CogpressError(
            f"{run} is not a run of cogpress: it has no key.json that a training wrote. --fresh deletes only runs. "
            "Name the folder of a run, or one that does not exist yet."
        )
    console.print(f"Deleting {run}, which holds an earlier run.", soft_wrap=True)
    shutil.rmtree(run.resolve())


def check_folder(run: Path) -> None:
    """Check that a training in this folder would replace nothing but an earlier training.

    Raises:
        CogpressError: the folder holds something else under a name that a training writes.
    """
    if not _is_run(run) and (other := next((name for name in _TRAINED if (run / name).exists()), None)):
        raise CogpressError(
            f"{run} holds {other}, but no run that a training here began, and a training would replace it. Name "
            "another folder with --run."
        )


def _is_run(run: Path) -> bool:
    try:
        return {"base", "train", "rows"} <= read_json(run / "key.json").keys()
    except (OSError, ValueError, AttributeError):
        return False


def is_run_of(run: Path, facts: dict[str, Any]) -> bool:
    """Whether a run trained the adapter in weights, by the facts in their manifest."""
    recorded = manifest.read(run / ADAPTER)
    adapter = (facts.get("merge") or {}).get("adapter")
    return recorded is not None and manifest.recorded_fingerprint(recorded) == adapter


def run_of(facts: dict[str, Any], runs: Path) -> Path | None:
    """The run in the folder `runs` whose adapter is in weights, by the facts in their manifest; None if none is."""
    return next((run for run in sorted(runs.glob("*")) if is_run_of(run, facts)), None)


def validation_file(config: Config, root: Path) -> Path | None:
    """The file that `data.validation` names, relative to the project's folder; None where it names none."""
    return root / config.data.validation if config.data.validation else None


def train(
    config: Config,
    prepared: Prepared,
    base_folder: Path,
    run: Path,
    *,
    console: Console,
    replayed: Sequence[Row] = (),
    resume: bool = False,
    score: Callable[[str, str], bool] | None = None,
    begin: Callable[[], object] = lambda: None,
    checkpointing: bool | None = None,
) -> Result:
    """Train an adapter into `run/adapter`, with all measurements beside it.

    A finished run with the same key is reused. An interrupted one resumes with `resume=True`.

    Args:
        config: the validated configuration; `config.train` and `config.base` are used.
        prepared: checked and tokenized rows.
        base_folder: the base model.
        run: the run's folder, made when missing.
        console: where progress is shown.
        replayed: rows beside them that are to stay like the base.
        resume: resume an interrupted run from its newest checkpoint.
        score: judges answers, as `answers.compare` takes it.
        begin: called before anything is changed, unless a finished run is reused; may refuse.
        checkpointing: compute activations again in the backward pass; on a GPU where not given.

    Raises:
        CogpressError: nothing to train on; the folder holds another run; nothing to resume.
    """
    if not prepared.train:
        raise CogpressError("No example is left to train on. The data report above says what was dropped.")
    check_folder(run)
    check_report(config.train)
    fingerprint = manifest.fingerprint(base_folder)
    key = run_key(config, prepared, fingerprint, replayed)
    finished = _finished(run, key)
    if finished is not None:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # a kill came between the result and this
        return finished
    pad = base.tokenizer(base_folder).pad_token_id
    layers.check_rows(base_folder, prepared.train + prepared.validation, pad)
    begin()
    checkpoint = _open_run(run, key, config, resume)
    if checkpointing is None:
        checkpointing = phases.apart()
    given = (config, prepared, replayed, base_folder, fingerprint, run, checkpoint, score, checkpointing)
    return phases.run("training", _train, *given, console=console)


def _finished(run: Path, key: dict[str, Any]) -> Result | None:
    try:
        saved = read_json(run / "result.json")
    except (FileNotFoundError, ValueError):
        return None
    if _differences(saved["key"], key) or (facts := manifest.read(run / ADAPTER)) is None:
        return None
    manifest.check(run / ADAPTER, facts)
    return Result(**{**saved["result"], "adapter": run / ADAPTER, "reused": True})


def _open_run(run: Path, key: dict[str, Any], config: Config, resume: bool) -> Path | None:
    """Make the run's folder, or find the checkpoint to resume from."""
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in checkpoints if _is_complete(path)]
    saved = read_json(run / "key.json") if (run / "key.json").is_file() else None
    if resume:
        if saved is None:
            raise CogpressError(f"{run} holds no interrupted run. Start one without --resume.")
        if changed := ", ".join(_differences(saved, key)):
            raise CogpressError(f"{run} was started with another {changed}. Set it back, or start over with --fresh.")
        return complete[-1] if complete else None
    if complete and not (run / "result.json").is_file():
        raise CogpressError(
            f"{run} holds an interrupted run, at {complete[-1].name.replace('-', ' ')}. "
            "Continue it with --resume, or start over with --fresh."
        )
    for name in _TRAINED:
        path = run / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", config.public())
    # Last, as it makes the folder a run's. A resumed run computes as it began, even where another way is faster.
    machine = {
        "compute_dtype": str(base.compute_dtype()).removeprefix("torch."),
        "optimizer": optimizer(config.train),
    }
    write_json(run / "key.json", key | machine)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its last file, which is not written at once."""
    try:
        read_json(checkpoint / "trainer_state.json")
    except (OSError, ValueError):
        return False
    return True


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two keys of runs differ in. An option that is younger than the old run had its default there."""
    defaults = Train().model_dump(mode="json")
    before = {**defaults, **old.get("train", {})}
    names = [name for name in new if name != "train" and old.get(name) != new[name]]
    return names + [f"train.{name}" for name in new["train"] if before.get(name) != new["train"][name]]


def _train(
    config: Config,
    prepared: Prepared,
    replayed: Sequence[Row],
    base_folder: Path,
    fingerprint: str,
    run: Path,
    checkpoint: Path | None,
    score: Callable[[str, str], bool] | None,
    checkpointing: bool,
    *,
    console: Console,
) -> Result:
    import torch

    from cogpress import plots
    from cogpress.train import packing
    from cogpress.train.loop import ObjectiveTrainer, Recorder, Rows, memory_gb, read_metrics
    from cogpress.train.objective import AnswerLoss, Collator

    settings = config.train
    torch.manual_seed(settings.seed)
    learnt = [*prepared.train, *replayed]
    longest = max(len(row.input_ids) for row in learnt + prepared.validation)
    tokenizer = base.tokenizer(base_folder)
    began = read_json(run / "key.json")
    compute = base.trained_dtype(began)
    chosen = layers.choose(base_folder, settings.target_modules, config.base.quantization)
    model = adapted(
        config, base_folder, chosen, attention=attention(longest), dtype=compute, checkpointing=checkpointing
    )
    layout = packing.choose(model) if settings.packing else "padded"
    if settings.packing and layout == "padded":
        console.print("  This base mixes rows that share a sequence, so each has one of its own, padded.")
    recorder = Recorder(run / "metrics.jsonl", console)
    objective = AnswerLoss(model)
    trainer = ObjectiveTrainer(
        objective=objective,
        model=model,
        args=arguments(
            settings,
            run,
            len(learnt),
            bool(prepared.validation),
            compute,
            checkpointing=checkpointing,
            optim=began.get("optimizer", ""),
        ),
        train_dataset=Rows(learnt),
        eval_dataset=Rows(prepared.validation) if prepared.validation else None,
        data_collator=Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0, layout),
        callbacks=[*reporters(settings, run), recorder],
    )
    recorder.trainer = trainer
    quiet(trainer)
    if few := too_few(settings, len(learnt)):
        console.print(few)
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        validation_loss = _last_loss(trainer) if prepared.validation else None
    finally:
        recorder.close()
        objective.release()
        if layout == "flat":  # what follows pads its batches
            model.get_base_model().set_attn_implementation(attention(longest))
    check_learnt(model, output.global_step)
    facts = {
        "base": {"source": source.shown(config.base.source), "fingerprint": fingerprint},
        "quantization": config.base.quantization,
        "compute_dtype": str(compute).removeprefix("torch."),
        **chosen.facts(base.quantized_modules(model.get_base_model())),
        "prompt": config.prompt.model_dump(mode="json"),
        # Whoever has the examples can tell whether they hold the same ones out.
        "held_out": hashlib.sha256(prepare.held_out(prepared).encode()).hexdigest(),
    }
    with new_folder(run / ADAPTER) as part:
        model.save_pretrained(part)
        _name_base(part, source.shown(config.base.source))
        manifest.write(part, "adapter", facts)
    answers.compare(model, tokenizer, prepared.validation_examples, run, console, score=score)
    result = Result(
        adapter=run / ADAPTER,
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
    write_json(run / "result.json", {"key": read_json(run / "key.json"), "result": saved})
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def check_learnt(model: torch.nn.Module, steps: int) -> None:
    """Check that training changed the adapter.

    Raises:
        CogpressError: the adapter adds nothing to the base: its matrices B, which begin as zero, still are.
    """
    if not any(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name):
        raise CogpressError(
            f"The adapter is still all zero after {steps} steps, so nothing was learnt. Start over with --fresh, and "
            "a higher train.learning_rate, more train.epochs or a smaller train.batch_size."
        )


def _last_loss(trainer: Any) -> float:
    """The validation loss after the last step, measured now unless the last evaluation was then."""
    measured = [row for row in trainer.state.log_history if "eval_loss" in row]
    if measured and measured[-1]["step"] == trainer.state.global_step:
        return float(measured[-1]["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def attention(longest: int) -> str:
    """The fastest attention implementation on this machine for rows of up to `longest` tokens."""
    return "eager" if base.device().type == "cpu" and longest <= EAGER_UP_TO else "sdpa"


def adapted(
    config: Config,
    base_folder: Path,
    chosen: Layers | None = None,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
) -> PeftModel:
    """The quantized base with a fresh LoRA adapter, in float32, on the chosen layers.

    Args:
        config: `base.quantization` and `train` are used.
        base_folder: the base model.
        chosen: its layers that are trained; as the configuration names them where not given.
        attention: transformers' name of an attention implementation.
        dtype: what the base computes in; this machine's fastest where not given.
        checkpointing: compute activations again in the backward pass.

    Raises:
        CogpressError: as `layers.choose`.
    """
    base.quiet_libraries()
    from peft import get_peft_model

    chosen = chosen or layers.choose(base_folder, config.train.target_modules, config.base.quantization)

    model = base.load(base_folder, config.base.quantization, attention=attention, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, lora(config.train, chosen.adapted))  # type: ignore[return-value]


def quiet(trainer: Any) -> None:
    """Stop transformers' own printer, which would repeat what our recorder prints."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _name_base(folder: Path, name: str) -> None:
    """Name the base as the user does; peft writes the path of this machine's cache."""
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = name
    write_json(folder / "adapter_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)
