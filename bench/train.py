"""Training speed against TRL's SFTTrainer at equal loss: with its defaults, on a GPU as its users set it up there."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import alternate_aloud, in_fresh_process, medians
from bench.report import write_report
from cogpress.config import Config
from cogpress.data.prepare import Prepared
from cogpress.engines.gpus import free_and_total
from cogpress.plan import room
from cogpress.weights import base


def run(
    config: Config, prepared: Prepared, base_folder: Path, out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Train one epoch on the same rows, base and settings with both trainers.

    Tokens exclude padding, seconds are those of the whole `trainer.train()`, and the loss is the mean per answer token
    of the same validation rows after training, measured by the same code.

    Returns:
        the medians of both and their ratios, which are also written to `out` as JSON.
    """
    sides = {"cogpress": _ours, "trl": _trl}
    measured = alternate_aloud(
        {name: partial(in_fresh_process, side, config, prepared, base_folder) for name, side in sides.items()},
        rounds,
        console,
        lambda found: f"{found['tokens_per_second']:.0f} tokens/s, loss {found['loss']:.4f}",
    )
    found = medians(measured)
    report = {
        **found,
        "speed_ratio": found["cogpress"]["tokens_per_second"] / found["trl"]["tokens_per_second"],
        "loss_difference": found["cogpress"]["loss"] - found["trl"]["loss"],
        "rounds": measured,
    }
    table = Table("trainer", "tokens/s", "validation loss", "peak memory")
    for name, result in found.items():
        table.add_row(
            name, f"{result['tokens_per_second']:.0f}", f"{result['loss']:.4f}", f"{result['peak_memory_gb']:.2f} GB"
        )
    console.print(table)
    console.print(f"cogpress trains at {report['speed_ratio']:.2f} times the speed of TRL.")
    write_report(out, report)
    return report


def _result(model: Any, prepared: Prepared, pad: int, seconds: float) -> dict[str, float]:
    from cogpress.train.loop import memory_gb
    from cogpress.verify.distributions import answer_loss

    peak = memory_gb()
    return {
        "tokens_per_second": sum(len(row.input_ids) for row in prepared.train) / seconds,
        "seconds": seconds,
        "peak_memory_gb": peak,
        "loss": answer_loss(model, prepared.validation, pad),
    }


def _ours(config: Config, prepared: Prepared, base_folder: Path) -> dict[str, float]:
    import torch

    base.quiet_libraries()
    from cogpress.train import packing
    from cogpress.train import run as training
    from cogpress.train.arguments import arguments
    from cogpress.train.loop import ObjectiveTrainer, Rows
    from cogpress.train.objective import AnswerLoss, Collator

    torch.manual_seed(config.train.seed)
    tokenizer = base.tokenizer(base_folder)
    pad = tokenizer.pad_token_id or 0
    longest = max(len(row.input_ids) for row in prepared.train)
    with tempfile.TemporaryDirectory() as folder:
        again = torch.cuda.is_available() and room.recomputes(config, base_folder, prepared.train, free_and_total(1)[0])
        model = training.adapted(config, base_folder, attention=training.attention(longest), checkpointing=again)
        objective = AnswerLoss(model)
        trainer = ObjectiveTrainer(
            objective=objective,
            model=model,
            args=arguments(
                config.train, Path(folder), len(prepared.train), False, base.compute_dtype(), checkpointing=again
            ),
            train_dataset=Rows(prepared.train),
            data_collator=Collator(pad, packing.choose(model)),
        )
        training.quiet(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        objective.release()
    return _result(trainer.model, prepared, pad, seconds)


def trl_packing() -> dict[str, Any]:
    """TRL's options of batches on a GPU: rows packed by best-fit decreasing; none on a CPU, where its default pads."""
    import torch

    return {"packing": True, "packing_strategy": "bfd"} if torch.cuda.is_available() else {}


def trl_attention() -> dict[str, str]:
    """FlashAttention where it is installed, which TRL wants for packed rows; on a CPU transformers' default."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_kernels_available

    if not torch.cuda.is_available():
        return {}
    if is_flash_attn_2_available():
        return {"attn_implementation": "flash_attention_2"}
    return {"attn_implementation": "kernels-community/flash-attn2"} if is_kernels_available() else {}


def _trl(config: Config, prepared: Prepared, base_folder: Path) -> dict[str, float]:
    import torch

    base.quiet_libraries()
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from cogpress.train import run as training

    disable_progress_bars()
    settings = config.train
    torch.manual_seed(settings.seed)
    dtype = base.compute_dtype()
    model = AutoModelForCausalLM.from_pretrained(
        base_folder,
        dtype=dtype,
        quantization_config=base.quantization_config(config.base.quantization, dtype, base_folder),
        device_map={"": str(base.device())},
        **trl_attention(),
    )
    tokenizer = base.tokenizer(base_folder)
    rows = [
        {
            "prompt": example.asked,
            "completion": [{"role": "assistant", "content": example.answer}],
        }
        for example in prepared.train_examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                gradient_accumulation_steps=settings.gradient_accumulation,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.schedule,
                warmup_steps=settings.warmup_share,
                max_length=settings.max_length,
                seed=settings.seed,
                bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **trl_packing(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings.rank,
                lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
                lora_dropout=settings.dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        training.quiet(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    base.keep_training_layout(trainer.model)
    return _result(trainer.model, prepared, tokenizer.pad_token_id or 0, seconds)
