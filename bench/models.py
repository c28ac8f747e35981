"""What becomes of a tiny random base of each architecture: trained, merged, served and quantized, or refused."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import bases
from bench.report import write_report
from cogpress import config
from cogpress.config import Quantization
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.merge import merge
from cogpress.train import layers
from cogpress.train import run as training
from cogpress.train.layers import Layers
from cogpress.weights import base, manifest, skeleton


def merge_of_random(
    folder: Path, work: Path, *, quantization: Quantization = "nf4", targets: str = "all-linear"
) -> tuple[Layers, float, float]:
    """Train an adapter for two steps, merge a random one, and compare with that one on the base, all in float32.

    Args:
        folder: the base.
        work: where the adapter and the weights are written.
        quantization: how the base is held under the adapter.
        targets: the layers that get one.

    Returns:
        the layers, and the mean KL in nats per token from the adapter on the base to the merge and to the base alone.

    Raises:
        CogpressError: the base is refused, or an adapted layer learns nothing.
    """
    import torch
    from safetensors.torch import save_file

    given = {"base": {"quantization": quantization}, "train": {"rank": 2, "target_modules": targets}}
    settings = config.parse(given, "the benchmark")
    chosen = layers.choose(folder, targets, quantization)
    model = training.adapted(settings, folder, chosen, attention="eager", dtype=torch.float32).eval()
    torch.manual_seed(1)
    ids = torch.randint(3, 250, (2, 24))
    _two_steps(model, ids)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
        expected = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        with model.disable_adapter():
            before = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    model.save_pretrained(work / "adapter")
    facts = {
        "base": {"source": str(folder), "fingerprint": manifest.fingerprint(folder)},
        "quantization": quantization,
        "compute_dtype": "float32",
        **chosen.facts(base.quantized_modules(model.get_base_model())),
        "prompt": config.Prompt().model_dump(),
    }
    manifest.write(work / "adapter", "adapter", facts)
    # In 16 bits, as weights are written, rounding would hide small mistakes.
    planned = replace(merge.plan(folder, work / "adapter"), dtype=torch.float32)
    made = {output.name: planned.value(output).contiguous() for output in planned.outputs}
    shutil.copytree(folder, work / "exact", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(made, work / "exact" / "model.safetensors", {"format": "pt"})
    if planned.untied:
        settings_file = work / "exact" / "config.json"
        write_json(settings_file, {**read_json(settings_file), "tie_word_embeddings": False})
    with torch.no_grad():
        merged = base.load(work / "exact", "none", attention="eager", dtype=torch.float32).eval()
        got = merged(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    def divergence(found: Any) -> float:
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    return chosen, divergence(got), divergence(before)


def _two_steps(model: Any, ids: Any) -> None:
    """Two steps of AdamW on the adapter; every layer has to learn."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, weight in model.named_parameters() if "lora_B" in name and not weight.any()]
    if still or not torch.isfinite(loss):
        raise CogpressError(f"{still or loss} learnt nothing in two steps.")


def answer(folder: Path) -> list[int]:
    """Four tokens of the reference engine, with a folder of weights."""
    from cogpress.engines.base import Sampling
    from cogpress.engines.transformers import Engine

    engine = Engine(folder, config.Serve(engine="transformers"), 1)

    async def tokens() -> list[int]:
        sampling = Sampling(max_tokens=4, temperature=0, logprobs=0)
        return [token async for delta in engine.generate([5, 6, 7], sampling) for token in delta.token_ids]

    try:
        return asyncio.run(tokens())
    finally:
        engine.shutdown()


def measure(name: str, work: Path) -> dict[str, Any]:
    """What becomes of one architecture: `refused` with the reason, or `layers`, `held`, `kl` and `served`."""
    folder = bases.make(name, work / "base")
    started = time.perf_counter()
    try:
        chosen, merged, _ = merge_of_random(folder, work)
    except CogpressError as error:
        said = str(error).replace(f"{folder} ", "").replace(str(folder), "The base")
        return {"refused": said, "seconds": time.perf_counter() - started}
    merge.merge(folder, work / "adapter", work / "weights")
    model = skeleton.of(folder)
    total = sum(parameter.numel() for parameter in model.get_decoder().parameters())
    total -= model.get_input_embeddings().weight.numel()
    held = sum(model.get_submodule(layer).weight.numel() for layer in chosen.quantized)  # type: ignore[union-attr, operator]
    kinds = dict.fromkeys(layer.rpartition(".")[2] for layer in chosen.adapted)
    try:
        served = len(answer(work / "weights")) > 0
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        served = f"no: {str(error).splitlines()[0][:80]}"  # type: ignore[assignment]
    return {"layers": list(kinds), "held": held / total, "kl": abs(merged), "served": served}


def run(out: Path, page: Path, console: Console) -> dict[str, Any]:
    """Measure every architecture, and write the figures as JSON and as a page.

    Args:
        out: the JSON file.
        page: the page, whose table is replaced.
        console: shows each result.
    """
    base.quiet_libraries()
    found: dict[str, Any] = {}
    for name in bases.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as work:
            found[name] = measure(name, Path(work))
        console.print(f"  {name}: {found[name]}", highlight=False, soft_wrap=True)
    write_report(out, found)
    rows = "\n".join(_row(name, one) for name, one in found.items())
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?<=\|---\|---\|---\|---\|\n)(\|.*\n)*", lambda _: rows + "\n", text), encoding="utf-8")
    return found


def _row(name: str, one: dict[str, Any]) -> str:
    if "refused" in one:
        return f"| `{name}` | refused: {one['refused']} | | |"
    merged = "below 1e-7" if one["kl"] < 1e-7 else f"{one['kl']:.0e}"
    served = "yes" if one["served"] is True else one["served"]
    return f"| `{name}` | {', '.join(one['layers'])} | {one['held']:.0%} | {merged}, {served} |"
