"""The worker that quantizes weights: a program for llmcompressor's environment, told what to do by a job file.

It imports nothing of this package, which may need what that environment lacks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RESULT = "result.json"
"""Written into a scheme's folder last: it marks the folder as complete."""


def main(job_path: Path) -> None:
    """Do a job: every scheme in turn, each from freshly loaded weights.

    The job is JSON: `source` (folder of weights), `rows` (lists of token ids) and `schemes`, each with `name`, `out`
    (folder), `algorithm` (`gptq`, `awq` or `none`), `preset` (compressed-tensors' name), `group_size` and
    `smoothing` (each may be null).
    """
    job = json.loads(job_path.read_text(encoding="utf-8"))
    for scheme in job["schemes"]:
        compress(Path(job["source"]), job["rows"], scheme)


def compress(source: Path, rows: list[list[int]], scheme: dict[str, Any]) -> None:
    """Quantize the language model's linear layers but the output layer, and write the model to `scheme["out"]`."""
    import llmcompressor
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    torch.manual_seed(0)
    # On the CPU: with an accelerator, llmcompressor moves one layer at a time there.
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True, trust_remote_code=False)
    calibration: dict[str, Any] = {}
    if scheme["algorithm"] != "none":
        calibration = {"dataset": loader(rows), "num_calibration_samples": len(rows)}
    llmcompressor.oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        recipe=recipe(scheme, kept_layers(model)),
        **calibration,
    )
    out = Path(scheme["out"])
    model.save_pretrained(out, save_compressed=True)
    result = {"llmcompressor": llmcompressor.__version__, "seconds": time.perf_counter() - started}
    part = out / f"{RESULT}.part"
    part.write_text(json.dumps(result), encoding="utf-8")
    os.replace(part, out / RESULT)


def recipe(scheme: dict[str, Any], ignore: list[str]) -> list[Any]:
    """llmcompressor's modifiers for a scheme; layers named in `ignore` keep their weights."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    layers = preset_name_to_scheme(scheme["preset"], ["Linear"])
    if scheme["group_size"] is not None:
        layers.weights.group_size = scheme["group_size"]
    groups = {"group_0": layers}
    first: list[Any] = []
    if scheme["smoothing"] is not None:
        first.append(SmoothQuantModifier(smoothing_strength=scheme["smoothing"]))
    if scheme["algorithm"] == "awq":
        first.append(AWQModifier(duo_scaling="both"))
    rounding = GPTQModifier if scheme["algorithm"] == "gptq" else QuantizationModifier
    return [*first, rounding(config_groups=groups, ignore=ignore)]


def kept_layers(model: Any) -> list[str]:
    """The layers that stay as they are, by name: what makes logits, and what sees or hears.

    The first decides every token and is used once for each; the others are calibrated by no text.
    """
    import torch

    head = model.get_output_embeddings()
    text = {id(module) for module in model.get_decoder().modules()}
    return [
        name
        for name, module in model.named_modules()
        if module is head or (isinstance(module, torch.nn.Linear) and id(module) not in text)
    ] or ["lm_head"]


def loader(rows: list[list[int]]) -> Any:
    """One row a batch: GPTQ and AWQ must not learn a layer's inputs from padding."""
    import torch

    batches = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in rows]
    return torch.utils.data.DataLoader(batches, batch_size=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
