"""Side-by-side measurements: the same work, by cogpress and by what people would use instead, in one run.

Knows how to make a comparison fair (fresh processes, alternating order, medians, the same rows and seed) and nothing
of how either side works inside.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cogpress import base, chat, client, engine, manifest
from cogpress.config import Config, Prompt, Serve, load
from cogpress.data import Prepared
from cogpress.errors import CogpressError
from cogpress.server import Server, end_family, free_port

MAX_TOKENS = 160
"""More than any expected answer of the worked example has."""


def in_fresh_process(function: Any, *args: Any) -> Any:
    """Run a function in a new process, so that its memory is its own and no cache is warm from another's work."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def train(
    config: Config, prepared: Prepared, base_folder: Path, out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Training speed against TRL's SFTTrainer as shipped, on the same rows, base and settings.

    Both train one epoch of the same rows; tokens count no padding, seconds are those of `trainer.train()` whole, and
    the loss is the mean per answer token of the same validation rows after training, measured by the same code.

    Returns:
        the medians of both and their ratios; written to `out` as JSON too.
    """
    sides = {"cogpress": _ours, "trl": _trl}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        # The order alternates, so that a machine that slows down or speeds up favours neither.
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            console.print(f"  round {number + 1}/{rounds}: {name}")
            result = in_fresh_process(sides[name], config, prepared, base_folder)
            measured[name].append(result)
            console.print(f"    {result['tokens_per_second']:.0f} tokens/s, loss {result['loss']:.4f}")
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in measured.items()
    }
    report = {
        **medians,
        "speed_ratio": medians["cogpress"]["tokens_per_second"] / medians["trl"]["tokens_per_second"],
        "loss_difference": medians["cogpress"]["loss"] - medians["trl"]["loss"],
        "rounds": measured,
    }
    table = Table("trainer", "tokens/s", "validation loss", "peak memory")
    for name, result in medians.items():
        table.add_row(
            name, f"{result['tokens_per_second']:.0f}", f"{result['loss']:.4f}", f"{result['peak_memory_gb']:.2f} GB"
        )
    console.print(table)
    console.print(f"cogpress trains at {report['speed_ratio']:.2f} times the tokens per second of TRL as shipped.")
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(out, report)
    return report


def _result(model: Any, prepared: Prepared, pad: int, seconds: float) -> dict[str, float]:
    from cogpress.divergence import answer_loss
    from cogpress.trainer import memory_gb

    peak = memory_gb()
    return {
        "tokens_per_second": sum(len(row.input_ids) for row in prepared.train) / seconds,
        "seconds": seconds,
        "peak_memory_gb": peak,
        "loss": answer_loss(model, prepared.validation, pad),
    }


def _ours(config: Config, prepared: Prepared, base_folder: Path) -> dict[str, float]:
    import tempfile

    import torch

    base.quiet_libraries()
    from cogpress import training
    from cogpress.trainer import AnswerTrainer, Collator, Rows

    torch.manual_seed(config.train.seed)
    tokenizer = base.tokenizer(base_folder)
    pad = tokenizer.pad_token_id or 0
    longest = max(len(row.input_ids) for row in prepared.train)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AnswerTrainer(
            model=training.adapted(config, base_folder, attention=training.attention(longest)),
            args=training.arguments(config.train, Path(folder), len(prepared.train), validation=False),
            train_dataset=Rows(prepared.train),
            data_collator=Collator(pad),
            lengths=[len(row.input_ids) for row in prepared.train],
        )
        training.quiet(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.release()
    return _result(trainer.model, prepared, pad, seconds)


def _trl(config: Config, prepared: Prepared, base_folder: Path) -> dict[str, float]:
    import tempfile

    import torch

    base.quiet_libraries()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from cogpress import training

    settings = config.train
    torch.manual_seed(settings.seed)
    dtype = base.compute_dtype()
    model = AutoModelForCausalLM.from_pretrained(
        base_folder,
        dtype=dtype,
        quantization_config=base.quantization_config(config.base.quantization, dtype),
        device_map={"": str(base.device())},
    )
    tokenizer = base.tokenizer(base_folder)
    rows = [
        {
            "prompt": [turn._asdict() for turn in (example.messages or ())[:-1]],
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
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
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


@dataclass(frozen=True)
class Stream:
    """One streamed answer as its client saw it: seconds to the first text, seconds in all, tokens."""

    first_seconds: float
    seconds: float
    tokens: int


def serve(
    root: Path, weights: Path, questions: Sequence[dict[str, Any]], out: Path, rounds: int, console: Console
) -> dict[str, Any]:
    """Serving speed against vLLM's own OpenAI server on the same weights, engine options and questions.

    Both servers run side by side and are asked in turn, first alone and then with 16 streams, in an order that
    alternates; the report holds medians over all rounds.

    Args:
        root: the project's folder.
        weights: the folder that both serve.
        questions: held-out rows of the worked example.
        out: where the JSON goes.
        rounds: how often both are measured.
        console: where progress is shown.
    """
    facts = manifest.read(weights) or {}
    prompt = Prompt.model_validate(facts["prompt"])
    settings = load(root / "model.yaml").serve
    with (
        Server(root, weights=str(weights), log=out.with_name("bench-cogpress.log")) as ours,
        _vllm_server(weights, settings, out.with_name("bench-vllm.log")) as theirs,
    ):
        ours.wait_ready()
        _wait_for(f"{theirs}/health")
        sides: dict[str, Callable[[dict[str, Any]], Stream]] = {
            "cogpress": lambda row: _ask_cog(ours.url, row),
            "vllm": lambda row: _ask_openai(theirs, str(weights), prompt, row),
        }
        for side in sides.values():  # the first requests after a start are slower on both
            for row in questions[:4]:
                side(row)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
                measured[name].append(_load(sides[name], questions))
            console.print(f"  round {number + 1}/{rounds} done")
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in measured.items()
    }
    ours_, theirs_ = medians["cogpress"], medians["vllm"]
    report: dict[str, Any] = {
        **medians,
        "ttft_difference_seconds": {n: ours_[f"ttft_{n}"] - theirs_[f"ttft_{n}"] for n in LOADS},
        "throughput_ratio": {n: ours_[f"tokens_per_second_{n}"] / theirs_[f"tokens_per_second_{n}"] for n in LOADS},
        "rounds": measured,
    }
    table = Table("", "cogpress", "vLLM's server", "cogpress against vLLM")
    for n in LOADS:
        difference = f"{1000 * report['ttft_difference_seconds'][n]:+.0f} ms"
        table.add_row(
            f"time to first token, {n} streams",
            f"{ours_[f'ttft_{n}']:.3f} s",
            f"{theirs_[f'ttft_{n}']:.3f} s",
            difference,
        )
        speed = [f"{side[f'tokens_per_second_{n}']:.0f}" for side in (ours_, theirs_)]
        table.add_row(f"tokens per second, {n} streams", *speed, f"x {report['throughput_ratio'][n]:.2f}")
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(out, report)
    return report


LOADS = (1, 16)
"""Streams at once."""


def _load(ask: Callable[[dict[str, Any]], Stream], questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for streams in LOADS:
        rows = list(questions[: 12 if streams == 1 else 64])
        started = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            answers = list(pool.map(ask, rows))
        seconds = time.perf_counter() - started
        found[f"ttft_{streams}"] = statistics.median(answer.first_seconds for answer in answers)
        found[f"tokens_per_second_{streams}"] = sum(answer.tokens for answer in answers) / seconds
    return found


def _ask_cog(url: str, row: dict[str, Any]) -> Stream:
    started = time.perf_counter()
    first, tokens = 0.0, 0
    for event in client.stream(url, {"fields": json.dumps(row["prompt"]), "max_tokens": MAX_TOKENS}):
        if event.kind == "output":
            first = first or time.perf_counter() - started
        tokens = int(event.metrics.get("output_token_count", tokens))
    return Stream(first, time.perf_counter() - started, tokens)


def _ask_openai(url: str, model: str, prompt: Prompt, row: dict[str, Any]) -> Stream:
    body = {
        "model": model,
        "messages": chat.chat(prompt.render(row["prompt"]), prompt.system),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first, tokens = 0.0, 0
    with (
        client.connect(url) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - started
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return Stream(first, time.perf_counter() - started, tokens)


@contextmanager
def _vllm_server(weights: Path, settings: Serve, log: Path) -> Iterator[str]:
    """vLLM's own OpenAI server with the engine options that ours has."""
    import torch

    cuda = torch.cuda.is_available()
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", settings.dtype, "--disable-log-stats"]
    command += ["--max-num-seqs", "64", "--load-format", "safetensors"]
    command += ["--gpu-memory-utilization", str(settings.gpu_memory_share / 2)] if cuda else ["--enforce-eager"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **engine.environment(settings, cuda)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_family(process)


def _wait_for(url: str, timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise CogpressError(f"{url} did not answer within {timeout:.0f} s. Its log in runs/ tells why.")
