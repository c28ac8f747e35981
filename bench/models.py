"""What becomes of a tiny random base of each architecture: trained, merged, served and quantized, or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogpress import config
from cogpress.config import Quantization
from cogpress.files import read_json, write_json
from cogpress.merge import merge
from cogpress.train import layers
from cogpress.train import run as training
from cogpress.train.layers import Layers
from cogpress.weights import base, manifest


def merge_of_random(
    folder: Path, work: Path, *, quantization: Quantization = "nf4", targets: str = "all-linear"
) -> tuple[Layers, float, float]:
    """Merge a random adapter into a base, and compare with the adapter on the base, all in float32.

    Args:
        folder: the base.
        work: where the adapter and the weights are written.
        quantization: how the base is held under the adapter.
        targets: the layers that get one.

    Returns:
        the layers, and the mean KL in nats per token from the adapter on the base to the merge and to the base alone.
    """
    import torch
    from safetensors.torch import save_file

    given = {"base": {"quantization": quantization}, "train": {"rank": 2, "target_modules": targets}}
    settings = config.parse(given, "the benchmark")
    chosen = layers.choose(folder, targets, quantization)
    model = training.adapted(settings, folder, chosen, attention="eager", dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
        ids = torch.randint(3, 250, (2, 24))
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
