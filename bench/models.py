"""What becomes of a tiny random base of each architecture: trained, merged, served and quantized, or refused."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import bases, compress, scores
from bench.report import write_report
from cogpress import config
from cogpress.config import Quantization
from cogpress.engines import base as engines
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.merge import merge
from cogpress.quantize import schemes, worker
from cogpress.quantize.run import collect, task
from cogpress.setup.environment import QUANTIZE, Environment
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


SAME = 1e-3
"""Largest difference in nats between the log-probabilities of two engines in float32 that count as the same."""

FOLLOWS = 0.7
"""Smallest correlation of a quantized model's log-probabilities with those of the weights it was made of; tensors that
were left out or mixed up leave none."""

REFERENCE = "reference engine"

SCHEMES = ("int8", "int4")
"""What a CPU quantizes and serves."""

Scores = list[float] | str
"""The log-probabilities of `scores.IDS`, or why there are none."""


class Helper:
    """A program that answers each line of its standard input with one."""

    def __init__(self, *command: object) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, path: Path) -> str:
        """The program's answer to a path."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise CogpressError(f"{' '.join(map(str, self._process.args[:4]))} ended. Run it by hand to see why.")  # type: ignore[index]
        return answer

    def close(self) -> None:
        """End the program."""
        self._process.communicate()


def reference(folder: Path) -> Scores:
    """What the reference engine makes of a folder of weights."""
    try:
        engine = engines.load(folder, scores.SERVE.model_copy(update={"engine": "transformers"}), 1)
    except (CogpressError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError) as error:
        return scores.reason(str(error))
    try:
        return asyncio.run(engine.score(scores.IDS))
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        return scores.reason(str(error))
    finally:
        engine.shutdown()


def quantize(folder: Path, name: str, helper: Helper) -> Path:
    """Quantize a folder of weights to a scheme, in a folder of its name beside it.

    Raises:
        CogpressError: it cannot be; says why.
    """
    scheme, out = schemes.SCHEMES[name], folder.with_name(name)
    widths = schemes.linear_widths(folder)
    group = schemes.group_size(widths) if scheme.grouped else None
    generator = random.Random(0)
    rows = [[generator.randrange(3, 250) for _ in range(64)] for _ in range(8)]
    (raw := folder.with_name(f"{name}.raw")).mkdir()
    job = {
        "source": str(folder),
        "rows": rows,
        "schemes": [task(scheme, raw, group, schemes.smoothing(scheme, folder))],
    }
    write_json(raw / "job.json", job)
    helper.ask(raw / "job.json")
    if not (raw / worker.RESULT).is_file():
        raise CogpressError(scores.reason((raw / "stderr").read_text(errors="replace")))
    out.mkdir()
    collect(raw, folder, out)
    return out


def _served(expected: Scores, vllm: Scores) -> str:
    """What serves the weights, in words, by the two engines' scores."""
    if isinstance(expected, str):
        return f"no: {expected}"
    if isinstance(vllm, str):
        return f"{REFERENCE}; vLLM: {vllm}"
    apart = max(abs(one - other) for one, other in zip(vllm, expected, strict=True))
    return "vLLM" if apart < SAME else f"{REFERENCE}; vLLM's log-probabilities differ by up to {apart:.1g}"


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's, of two engines' scores but the first, which stands for none; NaN where one is no number."""
    return statistics.correlation(one[1:], other[1:]) if all(map(math.isfinite, [*one, *other])) else math.nan


def measure(name: str, work: Path, vllm: Helper | None = None, compressor: Helper | None = None) -> dict[str, Any]:
    """What becomes of one architecture: `refused` with the reason, or `layers`, `held`, `kl`, `served` and `quantizes`.

    Args:
        name: of `bases.ARCHITECTURES`.
        work: where its base and weights are written.
        vllm: `bench.scores`; without it, vLLM is not tried.
        compressor: `bench.compress`; without it, quantization is not tried.
    """
    folder = bases.make(name, work / "base")
    started = time.perf_counter()
    try:
        chosen, merged, _ = merge_of_random(folder, work)
    except CogpressError as error:
        said = str(error).replace(f"{folder} ", "").replace(str(folder), "The base")
        return {"refused": said, "seconds": time.perf_counter() - started}
    weights = work / "weights"
    merge.merge(folder, work / "adapter", weights)
    model = skeleton.of(folder)
    total = sum(parameter.numel() for parameter in model.get_decoder().parameters())
    total -= model.get_input_embeddings().weight.numel()
    held = sum(model.get_submodule(layer).weight.numel() for layer in chosen.quantized)  # type: ignore[union-attr, operator]
    kinds = dict.fromkeys(layer.rpartition(".")[2] for layer in chosen.adapted)
    expected = reference(weights)
    found = {"layers": list(kinds), "held": held / total, "kl": abs(merged)}
    found["served"] = _served(expected, json.loads(vllm.ask(weights)) if vllm else "not tried")
    found["quantizes"] = _quantizes(weights, expected, vllm, compressor)
    return found


def _quantizes(weights: Path, expected: Scores, vllm: Helper | None, compressor: Helper | None) -> str:
    """Which schemes can be made of the weights, and what serves them, in words."""
    if vllm is None or compressor is None:
        return "not tried"
    if isinstance(expected, str):
        return "no engine to compare with"
    found: dict[tuple[bool, str], list[str]] = {}
    for name in SCHEMES:
        found.setdefault(_outcome(weights, name, expected, vllm, compressor), []).append(name)
    return ", ".join(
        f"{' and '.join(names)}{why}" if served else f"no {' or '.join(names)}{why}"
        for (served, why), names in found.items()
    )


def _outcome(weights: Path, name: str, expected: Sequence[float], vllm: Helper, compressor: Helper) -> tuple[bool, str]:
    """Whether anything serves a scheme of the weights, and what follows its name in the table."""
    try:
        folder = quantize(weights, name, compressor)
    except CogpressError as error:
        return False, f": {str(error).removeprefix(f'{weights} ').rstrip('.')}"
    by_vllm: Scores = json.loads(vllm.ask(folder))
    if _follows(by_vllm, expected):
        return True, ""
    why = by_vllm if isinstance(by_vllm, str) else f"a correlation of {correlation(by_vllm, expected):.2f}"
    if _follows(reference(folder), expected):
        return True, f" ({REFERENCE}; vLLM: {why})"
    return False, f" (vLLM: {why})"


def _follows(found: Scores, expected: Sequence[float]) -> bool:
    return not isinstance(found, str) and correlation(found, expected) > FOLLOWS


def run(
    out: Path, page: Path, console: Console, *, root: Path | None = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure architectures one after the other, and write each one's figures as JSON and as a row of a page.

    Args:
        out: the JSON file; what it has is not measured again.
        page: the page; the rows of what is not measured stay as they are.
        console: shows each result.
        root: the project; without it, neither vLLM nor quantization is tried.
        names: architectures to measure, again where the file has them; all that it lacks where empty.
    """
    base.quiet_libraries()
    found: dict[str, Any] = read_json(out) if out.is_file() else {}
    helpers: list[Helper] = []
    if root is not None:
        environment = Environment(root, QUANTIZE)
        if not environment.ready("cpu"):
            environment.setup(gpu=False)
        helpers.append(Helper(sys.executable, "-m", "bench.scores"))
        helpers.append(Helper(environment.python, "-I", compress.__file__, worker.__file__))
    try:
        for name in names or [name for name in bases.ARCHITECTURES if name not in found]:
            with tempfile.TemporaryDirectory() as work:
                found[name] = measure(name, Path(work), *helpers)
            console.print(f"  {name}: {found[name]}", highlight=False, soft_wrap=True)
            write_report(out, found)
            _write_row(page, name, found[name])
    finally:
        for helper in helpers:
            helper.close()
    return found


def _write_row(page: Path, name: str, one: Mapping[str, Any]) -> None:
    """Put an architecture's row into the page's table, in the order of `bases.ARCHITECTURES`."""
    text = page.read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    rows[name] = _row(name, one)
    table = "".join(f"{rows[name]}\n" for name in bases.ARCHITECTURES if name in rows)
    page.write_text(re.sub(r"(?<=---\|\n)(\|.*\n)*", lambda _: table, text), encoding="utf-8")


def _row(name: str, one: Mapping[str, Any]) -> str:
    if "refused" in one:
        return f"| `{name}` | refused: {one['refused']} | | | | |"
    merged = "below 1e-7" if one["kl"] < 1e-7 else f"{one['kl']:.0e}"
    measured = (", ".join(one["layers"]), f"{one['held']:.0%}", merged, one["served"], one["quantizes"])
    return f"| `{name}` | {' | '.join(measured)} |"
