"""What a machine does with the whole way: one batch against the CPU's, memory of each phase, merge, serving.

Each part runs on a CPU with a tiny model too, which proves that the part runs and nothing about a GPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import memory as meters
from bench.report import write_report
from cogpress import config, phases, pipeline
from cogpress.config import Config
from cogpress.engines import base as engines
from cogpress.engines.base import Sampling
from cogpress.plan import architecture, estimate, memory
from cogpress.weights import base, fetch, manifest

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 64},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}  # fmt: skip
"""Shapes of random bases; those of Llama 3's models of 1 B and 8 B, with the embedded base's tokenizer."""

ANSWERS, TOKENS = 16, 64
"""Answers at once, and tokens of each, when serving is measured."""

PAGE_HEAD = "# On a GPU\n\n`scripts/prove` writes this page: what it measured on the machine that it ran on.\n"

ABOVE = 0.1
"""How far a phase may peak above training's own peak."""


@dataclass(frozen=True)
class Row:
    """A figure of the table; `holds` is None for what has no limit here."""

    what: str
    measured: str
    expected: str = ""
    holds: bool | None = None


def run(root: Path, work: Path, shape: str, steps: int, console: Console, page: Path | None) -> list[Row]:
    """Run every part, print the table, and write it to `work/prove.json` and to the page.

    Args:
        root: the project's folder, whose cache has the embedded base.
        work: the folder for the random base and its run.
        shape: one of `SHAPES`.
        steps: optimizer steps of the training.
        console: shows progress and the table.
        page: the page to write; None to write none.
    """
    import torch

    gpu = torch.cuda.is_available()
    folder = make(shape, fetch.base("embedded", root / ".cache"), work / f"base-{shape}")
    settings = config.parse(
        {
            "name": "prove", "base": {"source": str(folder)}, "data": {"validation_share": 0.25},
            "train": {"max_steps": steps, "batch_size": 4, "max_length": 512, "evaluations": 0},
            "serve": {"engine": "vllm" if gpu and importlib.util.find_spec("vllm") else "transformers"},
        },
        "scripts/prove",
    )  # fmt: skip
    rows = [Row("device", torch.cuda.get_device_name() if gpu else "CPU"), Row("base", f"random, shape {shape}")]
    rows += one_batch(folder, settings)
    rows += whole_way(folder, settings, work / "run", console, gpu=gpu)
    rows += serving(work / "run" / "weights", settings)
    table = Table("what", "measured", "expected", "")
    for row in rows:
        table.add_row(row.what, row.measured, row.expected, mark(row))
    console.print(table)
    write_report(work / "prove.json", {"gpu": gpu, "rows": [asdict(row) for row in rows]})
    if page is not None:
        page.write_text(written(rows, gpu=gpu), encoding="utf-8")
    return rows


def mark(row: Row) -> str:
    """Whether a figure holds, in a table."""
    return {True: "yes", False: "NO", None: ""}[row.holds]


def written(rows: list[Row], *, gpu: bool) -> str:
    """The page."""
    import torch

    made_by = f"\n{time.strftime('%Y-%m-%d', time.gmtime())}, torch {torch.__version__}.\n"
    none = (
        "\n**No GPU was to be had when this was written.** The figures are a CPU's, of a tiny random model: they show "
        "that every\npart runs, and say nothing about a GPU. FlashAttention over packed rows, fused AdamW, paged "
        "optimizers, several GPUs\nand the plan's formulas for a GPU have never run on one.\n"
    )
    lines = [f"| {row.what} | {row.measured} | {row.expected} | {mark(row)} |" for row in rows]
    table = "\n| what | measured | expected | holds |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    return PAGE_HEAD + made_by + ("" if gpu else none) + table


def make(shape: str, like: Path, folder: Path) -> Path:
    """A random base of a shape with another's tokenizer, made once; on the GPU where there is one."""
    if manifest.read(folder) is not None:
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cogpress.files import new_folder

    found = AutoConfig.from_pretrained(like)
    found.update(SHAPES[shape])
    torch.manual_seed(0)
    with new_folder(folder) as part, torch.device(base.device()):
        AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16).save_pretrained(part)
        base.tokenizer(like).save_pretrained(part)
        manifest.write(part, "base", {"source": {"package": "scripts/prove"}})
    return folder


def one_batch(folder: Path, settings: Config) -> list[Row]:
    """Loss and gradients of a batch without padding, as training computes it here, against the CPU in float32."""
    layout, loss, gradient = phases.run("batch", _batch, folder, settings, False)
    _, expected, exact = phases.run("batch", _batch, folder, settings, True)
    alike = float((gradient @ exact) / (gradient.norm() * exact.norm()))
    near = abs(loss / expected - 1)
    return [
        Row("rows of a batch", str(layout)),
        Row("loss of a batch, relative to float32 on the CPU", f"{near:.1e}", "≤ 1e-2", near <= 1e-2),
        Row("cosine of its gradients", f"{alike:.4f}", "≥ 0.99", alike >= 0.99),
    ]


def _batch(folder: Path, settings: Config, on_cpu: bool) -> tuple[str, float, Any]:
    import torch

    from cogpress.prompts import NO_LOSS
    from cogpress.prompts import Row as Example
    from cogpress.train import packing
    from cogpress.train import run as training
    from cogpress.train.objective import AnswerLoss, Collator

    if on_cpu:  # its four-bit weights are the same, and what it computes with them is exact
        torch.cuda.is_available = lambda: False  # type: ignore[assignment]
    torch.manual_seed(0)
    model: Any = training.adapted(settings, folder, dtype=torch.float32 if on_cpu else None)
    chosen = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:  # the same adapter on both
            weight.data = (0.02 * torch.randn(weight.shape, generator=chosen)).to(weight)
    ids = [torch.randint(5, 40_000, (n,), generator=chosen).tolist() for n in (200, 40, 90, 60)]
    examples = [Example(one, [NO_LOSS] * 10 + one[10:]) for one in ids]
    layout = "padded" if on_cpu else packing.choose(model)
    batch = {
        name: one.to(model.device) if torch.is_tensor(one) else one
        for name, one in Collator(0, layout)(examples).items()
    }
    objective = AnswerLoss(model)
    with base.autocast(model.dtype):
        loss, count = objective(model, batch)
    (loss / count).backward()
    gradients = [one.grad.flatten().float().cpu() for one in model.parameters() if one.grad is not None]
    return layout, loss.item() / count, torch.cat(gradients)


@contextmanager
def peak() -> Iterator[list[int]]:
    """The block's peak: what PyTorch allocated on a GPU, else resident memory."""
    import torch

    with meters.peak() as found:
        yield found
    if torch.cuda.is_available():
        found[0] = torch.cuda.max_memory_allocated()


def whole_way(folder: Path, settings: Config, run: Path, console: Console, *, gpu: bool) -> list[Row]:
    """Train, merge and compare, each phase's peak measured, beside the plan."""
    from cogpress.train import run as training

    run.parent.mkdir(parents=True, exist_ok=True)
    examples = run.parent / "examples.jsonl"
    lines = [{"prompt": f"{n}: " + "what is next? " * 8, "completion": f"{n + 1} " * (8 + n % 24)} for n in range(64)]
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    training.discard(run, console)
    phases.measured.clear()
    phases.meter = peak
    rows: list[Row] = []
    try:
        built = pipeline.build(settings, examples, run, run.parent / "cache", console)
        merged, result = built.merged, built.training
    except pipeline.UnfitError as error:  # the weights are whole, and the table says what is wrong with them
        merged, result = error.built.merged, error.built.training
        rows.append(Row("judged", str(error), "fit", False))
    finally:
        phases.meter = None
    found: dict[str, int] = {}
    for name, size in phases.measured:
        found[name] = max(size, found.get(name, 0))
    trained = found.pop("training")
    model = architecture.of(str(folder), folder)
    how = estimate.training_of(settings, model, json.loads((run / "data.json").read_text(encoding="utf-8")))
    foretold = memory.training(model, how).total
    near = abs(foretold / trained - 1) <= meters.LIMIT if gpu else None
    rows.append(Row("training: peak", gigabytes(trained), f"{gigabytes(foretold)} foretold" if gpu else "", near))
    for name, size in found.items():
        limit = (1 + ABOVE) * trained
        rows.append(
            Row(
                f"{name}: peak", gigabytes(size), f"≤ {gigabytes(limit)}" if gpu else "", size <= limit if gpu else None
            )
        )
    rows.append(Row("training: tokens per second", f"{result.tokens_per_second:,.0f}"))
    if merged is not None:
        rows.append(Row("merge: mean KL to what training scored", f"{merged.mean_kl:.5f}"))
    return rows


def gigabytes(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:.2f} GB"


def serving(weights: Path, settings: Config) -> list[Row]:
    """Answers at once from the merged weights, by the engine that this machine has."""
    tokens, seconds, context = phases.run("serving", _served, weights, settings)
    return [
        Row(f"{settings.serve.engine}: tokens per second, {ANSWERS} answers at once", f"{tokens / seconds:,.0f}"),
        Row("context that is served", f"{context:,}"),
    ]


def _served(weights: Path, settings: Config) -> tuple[int, float, int]:
    async def answer(engine: engines.Engine, number: int) -> int:
        sampling = Sampling(max_tokens=TOKENS, min_tokens=TOKENS)
        return sum([delta.tokens async for delta in engine.generate([10 + number] * 32, sampling)])

    async def all_of_them() -> tuple[int, float, int]:
        engine = engines.load(weights, settings.serve, ANSWERS)
        try:
            began = time.perf_counter()
            tokens = sum(await asyncio.gather(*(answer(engine, number) for number in range(ANSWERS))))
            return tokens, time.perf_counter() - began, engine.max_context
        finally:
            engine.shutdown()

    return asyncio.run(all_of_them())
