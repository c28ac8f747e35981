"""The memory that scripts/plan predicts against the memory that training and serving use on this machine.

Each case runs in its own process. On a CPU the measure is resident memory without file pages, sampled during the work,
and the memory before the model is loaded is the formula's `frame`; on a GPU it is what PyTorch allocated, with no
frame.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import merge as checkpoint
from bench.measure import in_fresh_process
from cogpress import config, phases
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.plan import architecture, memory
from cogpress.plan.memory import Serving, Training
from cogpress.weights import base, fetch

LIMIT = 0.15
"""The largest relative error that is allowed."""

STEPS = 3
"""Optimizer steps of a training: the first allocates the optimizer's states, the others run with them in memory."""

TRAININGS: dict[str, tuple[Training, ...]] = {
    "135 M": (
        Training(method="nf4", batch=8, length=256, checkpointing=False, answers=0.5),
        Training(method="nf4", batch=8, length=256, checkpointing=True, answers=0.5),
        Training(method="nf4", batch=4, length=1024, checkpointing=False, answers=0.5, fused=True),
        Training(method="lora", batch=8, length=256, checkpointing=False, answers=0.5),
        Training(method="full", batch=8, length=256, checkpointing=False, answers=0.5),
        Training(method="full", batch=8, length=256, checkpointing=True, answers=0.5),
    ),
    "1.1 B": (
        Training(method="nf4", batch=2, length=128, checkpointing=False, answers=0.5),
        Training(method="nf4", batch=4, length=128, checkpointing=True, answers=0.5),
        Training(method="lora", batch=2, length=128, checkpointing=False, answers=0.5),
    ),
}
"""Training cases by model; the larger has so few tokens that two cores compute them in a minute or two."""

SERVINGS: dict[str, tuple[Serving, ...]] = {
    "135 M": (Serving(context=1024, concurrency=45, batched=2048, compiled=False),),
    "1.1 B": (Serving(context=512, concurrency=93, batched=512, compiled=False),),
}
"""Serving cases by model: as many sequences as one GiB of KV cache holds, the unit of vLLM's CPU option. vLLM touches
all of it at its start, so short sequences use as much as long ones."""

ANSWERS = 16
"""Tokens of each answer in a serving case, in which all sequences are decoded at once."""


def run(out: Path, cache: Path, work: Path, console: Console, *, quick: bool = False) -> dict[str, Any]:
    """Measure every case once and compare. Serving is measured on CPUs only, as on a GPU vLLM takes all memory.

    Args:
        out: the JSON file to write.
        cache: where fetched models are kept.
        work: the folder for the 1.1 B checkpoint (2.2 GB, kept for the next time).
        console: shows progress and the table.
        quick: leave the 1.1 B model out.

    Raises:
        CogpressError: an error exceeds `LIMIT`; the report is written nonetheless.
    """
    import torch

    cuda = torch.cuda.is_available()
    # With a fixed threshold, freed memory goes back to the system, so that resident memory is memory in use. The C
    # library reads this when a process starts, as the measured ones do after this.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    folders = {"135 M": fetch.base("embedded", cache)}
    if not quick:
        folders["1.1 B"] = in_fresh_process(checkpoint.make, work)[0]
    rows: list[dict[str, Any]] = []
    for name, folder in folders.items():
        cases: list[Training | Serving] = [*TRAININGS[name], *([] if cuda else SERVINGS[name])]
        for how in cases:
            if isinstance(how, Training):
                # As training chooses on this machine: see train.arguments.
                how = replace(how, optimizer="adamw", fused=cuda or how.length > 512)
            measure = measure_training if isinstance(how, Training) else measure_serving
            found = in_fresh_process(measure, folder, how)
            rows.append({"model": name, **found})
            console.print(f"  {name}, {found['case']}: {found['measured'] / 1e9:.2f} GB, {found['error']:+.1%}")
    report = {"limit": LIMIT, "worst": max(abs(row["error"]) for row in rows), "cases": rows}
    table = Table("model", "case", "measured", "predicted", "difference", "without the frame")
    for row in rows:
        sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("measured", "foretold")]
        table.add_row(row["model"], row["case"], *sizes, f"{row['error']:+.1%}", f"{row['own_error']:+.1%}")
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    if report["worst"] > LIMIT:
        raise CogpressError(f"A prediction is off by {report['worst']:.0%}; the limit is {LIMIT:.0%}. See {out}.")
    return report


def compared(
    case: str, how: Training | Serving, predicted: memory.Memory, measured: float, frame: float
) -> dict[str, Any]:
    """A measurement beside its prediction; errors are relative to the measurement, with the frame and without."""
    own = measured - frame
    return {
        "case": case,
        "how": asdict(how),
        "measured": measured,
        "foretold": predicted.total,
        "frame": frame,
        "error": predicted.total / measured - 1,
        "own_error": (predicted.total - frame) / own - 1 if own > 0 else 0.0,
        "parts": vars(predicted),
    }


def measure_training(folder: Path, how: Training) -> dict[str, Any]:
    """Train for a few steps as scripts/train does, on rows of random tokens, and compare the peak."""
    base.quiet_libraries()
    import bitsandbytes  # noqa: F401 - imports count as frame
    import peft  # noqa: F401
    import torch

    from cogpress.prompts import NO_LOSS, Row
    from cogpress.train import packing
    from cogpress.train import run as training
    from cogpress.train.arguments import arguments as training_arguments
    from cogpress.train.loop import ObjectiveTrainer, Rows
    from cogpress.train.objective import AnswerLoss, Collator

    model_facts = architecture.of(str(folder), folder)
    cuda = torch.cuda.is_available()
    frame = 0.0 if cuda else float(resident())
    settings = config.Config.model_validate(
        {
            "base": {"quantization": {"lora": "none", "full": "none"}.get(how.method, how.method)},
            "train": {"rank": how.rank, "batch_size": how.batch, "max_length": how.length, "max_steps": STEPS,
                      "evaluations": 0},
        }
    )  # fmt: skip
    attention = "sdpa" if how.fused else "eager"
    if how.method == "full":
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, device_map={"": str(base.device())}
        )
    else:
        # In 16 bits, which plans are made for, even where a CPU is faster in 32.
        model = training.adapted(settings, folder, attention=attention, dtype=torch.bfloat16)
    if not cuda:
        own(model)
    torch.manual_seed(0)
    masked = round(how.length * (1 - how.answers))
    rows = []
    for ids in torch.randint(1, model_facts.vocabulary, (STEPS * how.batch, how.length)).tolist():
        rows.append(Row(ids, [NO_LOSS] * masked + ids[masked:]))
    with tempfile.TemporaryDirectory() as run_folder:
        arguments = training_arguments(settings.train, Path(run_folder), len(rows), False, torch.bfloat16)
        arguments.save_strategy = "no"  # type: ignore[assignment]
        arguments.gradient_checkpointing = how.checkpointing
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        if how.checkpointing:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            plain.gradient_checkpointing_disable()
        objective = AnswerLoss(model)
        trainer = ObjectiveTrainer(
            objective=objective,
            model=model,
            args=arguments,
            train_dataset=Rows(rows),
            data_collator=Collator(0, packing.choose(model)),
        )
        training.quiet(trainer)
        tidy()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with peak() as sampled:
            trainer.train()
        objective.release()
    measured = float(torch.cuda.max_memory_allocated()) if cuda else float(sampled[0])
    how = replace(how, frame=frame)
    predicted = memory.training(model_facts, how)
    kept = "checkpointed" if how.checkpointing else "all kept"
    return compared(f"train {how.method}, {how.batch} x {how.length}, {kept}", how, predicted, measured, frame)


def measure_serving(folder: Path, how: Serving) -> dict[str, Any]:
    """Serve the predicted number of sequences in passes of the predicted length, and compare the peak."""
    facts = architecture.of(str(folder), folder)
    need = memory.cache(facts, how)
    serve = config.Serve(
        cpu_kv_cache_gb=max(1.0, -(-need // (1 << 30))), max_context=how.context, mode="eager", dtype="bfloat16"
    )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from cogpress.engines import vllm

    vllm.prepare(serve)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import llama  # noqa: F401 - imports count as frame
    from vllm.v1.worker import cpu_worker  # noqa: F401

    frame = float(resident())
    chosen = vllm.options(folder, serve, how.concurrency, 0, 0, None)
    chosen |= {"max_num_batched_tokens": how.batched, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    torch.manual_seed(0)
    length = min(how.context - ANSWERS - 1, -(-4 * how.batched // how.concurrency))
    prompts = torch.randint(1, facts.vocabulary, (how.concurrency, length)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=ANSWERS, ignore_eos=True, detokenize=False)
    engine = LLM(**chosen)
    tidy()
    with peak() as sampled:
        engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    how = replace(how, frame=frame)
    case = f"serve {how.scheme}, {how.concurrency} x {how.context}"
    return compared(case, how, memory.serving(facts, how), float(sampled[0]), frame)


def resident() -> int:
    """Resident bytes of this process without file pages (programs, the checkpoint), which the system may drop."""
    whole, of_files = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(whole) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def own(model: Any) -> None:
    """Copy tensors that safetensors left in the checkpoint's file pages, so that they are counted."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def tidy() -> None:
    """Return freed memory to the system."""
    gc.collect()
    phases.give_back()


@contextmanager
def peak(every: float = 0.005) -> Iterator[list[int]]:
    """Sample resident memory in a thread; the list's only number is the maximum so far."""
    found = [resident()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(every):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], resident())
