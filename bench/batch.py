"""Throughput of scripts/batch against vLLM's offline engine with the same weights, options and prompts."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import alternate_aloud, in_fresh_process, medians
from bench.report import speeds, write_report
from cogpress import config
from cogpress.cog import schema
from cogpress.engines import vllm
from cogpress.prompts import Question, encode
from cogpress.serve import batch
from cogpress.serve import model as serving
from cogpress.weights import base, manifest

MAX_TOKENS = 160
"""More than any expected answer of the worked example needs."""


def run(
    root: Path, weights: Path, questions: Sequence[dict[str, Any]], out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Measure both in alternating order, each in its own process, and report medians.

    Args:
        root: the project's folder.
        weights: the folder that both serve.
        questions: rows of the worked example.
        out: the JSON file to write.
        rounds: number of measurements of each side.
        console: shows progress and the table.
    """
    sides = {
        "cogpress": partial(in_fresh_process, _ours, root, weights, list(questions)),
        "vllm": partial(in_fresh_process, _theirs, root, weights, list(questions)),
    }
    measured = alternate_aloud(
        sides,
        rounds,
        console,
        lambda found: f"{found['tokens_per_second']:.0f} tokens/s of {found['tokens']:.0f}",
    )
    found = medians(measured)
    report: dict[str, Any] = {
        **found,
        "throughput_ratio": found["cogpress"]["tokens_per_second"] / found["vllm"]["tokens_per_second"],
        "rounds": measured,
    }
    titles = {"cogpress": "scripts/batch", "vllm": "vLLM offline"}
    table = speeds(found, titles, "tokens per second", report["throughput_ratio"])
    table.add_row("tokens", *(f"{found[name]['tokens']:.0f}" for name in sides), "")
    console.print(table)
    write_report(out, report)
    return report


def _ours(root: Path, weights: Path, questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    settings = config.load(root / "model.yaml")
    made = []

    def start() -> serving.ServedModel:
        made.append(serving.ServedModel(str(weights), settings, root, concurrency=serving.batch_size()))
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        rows = [json.dumps({"prompt": row["prompt"], "max_tokens": MAX_TOKENS}) for row in questions]
        source.write_text("\n".join(rows), encoding="utf-8")
        totals = batch.run(
            source,
            Path(folder) / "out.jsonl",
            start,
            schema.inputs(root, "predict.py:Runner"),
            concurrency=serving.batch_size(),
            made_by={},
        )
    for server in made:
        server.engine.shutdown()
    return {"tokens_per_second": totals.tokens_per_second, "tokens": totals.tokens, "seconds": totals.seconds}


def _theirs(root: Path, weights: Path, questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    settings = config.load(root / "model.yaml").serve
    vllm.prepare(settings)
    import torch
    from vllm import LLM, SamplingParams

    cuda = torch.cuda.is_available()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    chosen = vllm.options(
        weights,
        settings,
        serving.batch_size(),
        0,
        torch.cuda.device_count() if cuda else 0,
        torch.cuda.get_device_capability() if cuda else None,
    )
    engine = LLM(**chosen)
    form = config.Prompt.model_validate((manifest.read(weights) or {})["prompt"])
    tokenizer = base.tokenizer(weights)
    # Rendering and tokenizing count on both sides.
    started = time.perf_counter()
    prompts = [{"prompt_token_ids": encode(tokenizer, Question(fields=row["prompt"]), form)} for row in questions]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    seconds = time.perf_counter() - started
    engine.llm_engine.engine_core.shutdown()  # otherwise this process waits for the engine's at its end
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}
