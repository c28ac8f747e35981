"""The options of `model.yaml` as peft's and transformers' own."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogpress.config import Train
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback, TrainingArguments

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""transformers' names by ours."""

CHECKPOINTS = 8
"""Checkpoints in a run, of which the newest two are kept."""


def lora(settings: Train, layers: Sequence[str]) -> LoraConfig:
    """The adapter: its rank, its scale and the layers that it is for, by their whole names."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(layers),
        task_type="CAUSAL_LM",
        bias="none",
    )


def too_few(settings: Train, rows: int) -> str | None:
    """What to set where the rows give a single optimizer step, which teaches next to nothing."""
    batch = settings.batch_size * settings.gradient_accumulation
    if settings.max_steps or math.ceil(math.ceil(rows / batch) * settings.epochs) > 1:
        return None
    return (
        f"{rows} training examples in batches of {batch} make a single optimizer step, which teaches little. "
        "Raise train.epochs, or lower train.batch_size."
    )


def check_report(settings: Train) -> None:
    """Check that the package of `train.report_to` is installed.

    Raises:
        CogpressError: it is not.
    """
    name = settings.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        raise CogpressError(
            f"train.report_to is {name}, and the package {name} is not installed here. Install it with "
            f"{sys.executable} -m pip install {name}, or set train.report_to to none."
        )


def reporters(settings: Train, run: Path) -> list[TrainerCallback]:
    """transformers' own callback for `train.report_to`; none where nothing is asked for."""
    if settings.report_to == "none":
        return []
    check_report(settings)
    from transformers import integrations

    if settings.report_to == "tensorboard":
        made = integrations.TensorBoardCallback()
        # Its default is beside the checkpoints, which are removed when the training is done.
        made.logging_dir = made.logging_dir or str(run / "tensorboard")
        return [made]
    return [{"trackio": integrations.TrackioCallback, "wandb": integrations.WandbCallback}[settings.report_to]()]


def optimizer(settings: Train) -> str:
    """transformers' name of the optimizer. `auto` is AdamW, in one kernel on a GPU: an adapter's two moments are small
    beside its base, so that neither 8 bits nor paging gains anything.

    Raises:
        CogpressError: it does not run on this machine.
    """
    import torch

    cuda = torch.cuda.is_available()
    if settings.optimizer.startswith("paged") and not cuda:
        raise CogpressError(f"optimizer {settings.optimizer} needs a GPU. Set it to auto or adamw.")
    if settings.optimizer in ("auto", "adamw"):
        return "adamw_torch_fused" if cuda else "adamw_torch"
    return settings.optimizer


def arguments(
    settings: Train,
    run: Path,
    rows: int,
    validation: bool,
    compute: torch.dtype,
    *,
    checkpointing: bool = False,
    optim: str = "",
) -> TrainingArguments:
    """The loop: steps, schedule, optimizer, evaluations and checkpoints. Steps are optimizer steps.

    Args:
        settings: the section `train`.
        run: the run's folder.
        rows: how many there are to train on.
        validation: whether there are rows to evaluate on.
        compute: what matrix products run in.
        checkpointing: compute activations again in the backward pass.
        optim: transformers' name of the optimizer, where a run that goes on has it; `optimizer` where not given.

    Raises:
        CogpressError: the optimizer does not run on this machine.
    """
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    per_epoch = max(1, rows // (settings.batch_size * settings.gradient_accumulation))
    total = settings.max_steps or max(1, round(per_epoch * settings.epochs))
    evaluate = validation and settings.evaluations > 0
    made = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=optim or optimizer(settings),
        bf16=compute == torch.bfloat16,
        fp16=compute == torch.float16,
        use_cpu=not cuda,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=max(1, total // (settings.evaluations + 1)) if evaluate else None,
        save_strategy="steps",
        save_steps=max(1, total // CHECKPOINTS),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",  # `reporters` are given to the Trainer
        run_name=run.name,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
    )
    if made.n_gpu > 1:
        # One process uses one GPU: DataParallel would multiply the batch and break the loss of labelled positions.
        made._n_gpu = 1
    return made
