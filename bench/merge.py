"""Memory and time of the merge against peft's `merge_and_unload` on the same files."""

from __future__ import annotations

import resource
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import alternate_aloud, in_fresh_process, medians
from bench.report import write_report
from cogpress.config import Prompt
from cogpress.files import new_folder
from cogpress.weights import base, manifest

SHARD = "500MB"
RANK = 16


def run(out: Path, work: Path, rounds: int, console: Console) -> dict[str, Any]:
    """Merge a random adapter into a random 1.1 B-parameter Llama in bfloat16, by cogpress and by peft.

    Each merge runs in a fresh process, from files to files. Its memory is the process's peak resident memory, including
    imports; its seconds exclude imports. The merged files are removed after each measurement.

    Args:
        out: the JSON file to write.
        work: the folder for the checkpoint (2.2 GB, kept for the next time) and the merges.
        rounds: number of measurements of each side.
        console: shows progress and the table.
    """
    base_folder, adapter_folder = in_fresh_process(make, work)
    sides = {"cogpress": _ours, "peft": _peft}
    measured = alternate_aloud(
        {name: partial(in_fresh_process, side, base_folder, adapter_folder, work) for name, side in sides.items()},
        rounds,
        console,
        lambda found: f"{found['seconds']:.1f} s, {found['peak_memory_gb']:.2f} GB",
    )
    found = medians(measured)
    ours, theirs = found["cogpress"], found["peft"]
    report = {
        **found,
        "memory_ratio": ours["peak_memory_gb"] / theirs["peak_memory_gb"],
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "time_ratio_without_saving": ours["seconds"] / theirs["seconds_without_saving"],
        "rounds": measured,
    }
    table = Table("merge of 1.1 B parameters", "seconds", "peak memory")
    for name, result in found.items():
        table.add_row(name, f"{result['seconds']:.1f}", f"{result['peak_memory_gb']:.2f} GB")
    table.add_row("ratio", f"{report['time_ratio']:.2f}", f"{report['memory_ratio']:.2f}")
    console.print(table)
    write_report(out, report)
    return report


def make(work: Path) -> tuple[Path, Path]:
    """Make a random 1.1 B-parameter Llama in shards of 500 MB, and a random adapter for all its linear layers."""
    base.quiet_libraries()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base_folder, adapter_folder = work / "base", work / "adapter"
    if manifest.read(adapter_folder) is not None:
        return base_folder, adapter_folder
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    with new_folder(base_folder) as part:
        model.save_pretrained(part, max_shard_size=SHARD)
    quantized = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    tuned = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    with new_folder(adapter_folder) as part:
        tuned.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)
        facts = {
            "base": {"source": "random", "fingerprint": manifest.fingerprint(base_folder)},
            "quantization": "nf4",
            "compute_dtype": "bfloat16",
            "quantized_modules": quantized,
            "prompt": Prompt().model_dump(),
        }
        manifest.write(part, "adapter", facts)
    return base_folder, adapter_folder


def _ours(base_folder: Path, adapter_folder: Path, work: Path) -> dict[str, float]:
    base.quiet_libraries()
    import bitsandbytes  # noqa: F401 - imports are not measured
    import peft  # noqa: F401

    from cogpress.merge import merge

    started = time.perf_counter()
    merge.merge(base_folder, adapter_folder, work / "merged")
    seconds = time.perf_counter() - started
    shutil.rmtree(work / "merged")
    return {"seconds": seconds, "seconds_without_saving": seconds, "peak_memory_gb": _peak_gb()}


def _peft(base_folder: Path, adapter_folder: Path, work: Path) -> dict[str, float]:
    base.quiet_libraries()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()
    without_saving = time.perf_counter() - started
    merged.save_pretrained(work / "peft", max_shard_size=SHARD)
    seconds = time.perf_counter() - started
    shutil.rmtree(work / "peft")
    return {"seconds": seconds, "seconds_without_saving": without_saving, "peak_memory_gb": _peak_gb()}


def _peak_gb() -> float:
    """This process's peak resident memory in 10^9 bytes; Linux reports KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
