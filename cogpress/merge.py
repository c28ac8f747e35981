"""The faithful merge: an adapter folded into the weights that training saw.

A QLoRA adapter is trained against the quantized base and corrects its rounding errors too. Added to the original
weights instead, it corrects errors that are not there. So each quantized layer is quantized and dequantized again
exactly as training did it, and the update is added to that, in float32.

Works tensor by tensor on the files; leaves loading models to `base` and judging the result to `check`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress import archive, base, manifest
from cogpress.config import Merge, Quantization
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    import torch

SERVING_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What an engine reads beside the weights."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's matrices and what it was trained on."""

    folder: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    quantization: Quantization
    quantized: frozenset[str]
    fingerprint: str
    facts: dict[str, Any]

    def delta(self, module: str, device: torch.device) -> torch.Tensor:
        """The weight update of one layer, scale * B @ A (Hu et al. 2021), float32, shape (out, in)."""
        down, up, scale = self.pairs[module]
        return scale * (up.to(device).float() @ down.to(device).float())


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that `training` wrote.

    Raises:
        CogpressError: files are missing or changed, or the adapter has a part that this merge does not know.
    """
    from safetensors.torch import load_file

    facts = manifest.read(folder)
    if facts is None or facts.get("kind") != "adapter":
        raise CogpressError(f"{folder} holds no adapter of cogpress. Name a run's adapter folder, or train one.")
    manifest.check(folder, facts)
    config = json.loads((folder / "adapter_config.json").read_text())
    _refuse_unknown(config, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "A.weight":
            pairs[module] = (tensor, tensors[name.replace("lora_A", "lora_B")], scale)
        elif part != "B.weight":
            raise CogpressError(f"{folder} holds {name}, which this merge does not know.")
    return Adapter(
        folder=folder,
        pairs=pairs,
        quantization=facts["quantization"],
        quantized=frozenset(facts["quantized_modules"]),
        fingerprint=facts["base"]["fingerprint"],
        facts=facts,
    )


def _refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    """A LoRA variant merged as plain LoRA would be wrong without a sign of it, so it is refused by name."""
    unknown = [
        name
        for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unknown:
        what = ", ".join(unknown) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise CogpressError(f"{folder} can not be merged exactly: it uses {what}. Train it without.")


def as_trained(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer's weight as training computed with it: quantized and dequantized again by bitsandbytes.

    Args:
        weight: shape (out, in), in the dtype that training loaded it in.
        quantization: how training held the layer.
        dtype: what training computed in.
    """
    import bitsandbytes.functional as bnb

    if quantization == "nf4":
        packed, state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        return bnb.dequantize_4bit(packed, state).to(dtype)
    if quantization == "int8":
        # bitsandbytes quantizes from float16, whatever the checkpoint's dtype is.
        rows, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(rows, absmax).to(dtype)
    return weight.to(dtype)


def merge(
    base_folder: Path,
    adapter_folder: Path,
    target: Path,
    *,
    onto: Merge = "dequantized",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, _total: items,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write a folder of weights with a manifest, all or nothing.

    Args:
        base_folder: the base that the adapter was trained on, as safetensors.
        adapter_folder: a run's adapter.
        target: the folder to write; replaced when the merge is complete.
        onto: `dequantized` for the base as training saw it, `original` for the weights before quantization.
        progress: wraps the tensors, given how many there are.
        facts: more for the manifest.

    Returns:
        the manifest.

    Raises:
        CogpressError: the adapter was trained on another base, or does not fit it; nothing is written.
    """
    import torch

    adapter = read_adapter(adapter_folder)
    shards = sorted(base_folder.glob("*.safetensors"))
    if manifest.fingerprint(base_folder) != adapter.fingerprint:
        raise CogpressError(
            f"{adapter_folder} was trained on another base than {base_folder}: the weights' hashes differ. "
            f"Name the base that it was trained on ({adapter.facts['base']['source']})."
        )
    dtype: torch.dtype = getattr(torch, adapter.facts["compute_dtype"])
    _check_fit(adapter, shards)
    with archive.new_folder(target) as part:
        done = _write_shards(adapter, shards, part, onto, dtype, progress)
        _copy_settings(base_folder, part, dtype)
        return manifest.write(
            part,
            "weights",
            {
                "base": adapter.facts["base"],
                "quantization": adapter.quantization,
                "compute_dtype": adapter.facts["compute_dtype"],
                "merge": {"onto": onto, "layers": done, "adapter": manifest.fingerprint(adapter_folder)},
                "prompt": adapter.facts["prompt"],
                **(facts or {}),
            },
        )


def _check_fit(adapter: Adapter, shards: list[Path]) -> None:
    """Every adapted and every quantized layer must be a tensor of the checkpoint, of the adapter's shape."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[name] = file.get_slice(name).get_shape()
    for module in sorted(adapter.quantized | adapter.pairs.keys()):
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise CogpressError(
                f"{adapter.folder} changes {module}, which the base's files do not hold under that name, so it can "
                "not be merged exactly. Name the base that it was trained on."
            )
        if module in adapter.pairs:
            down, up, _ = adapter.pairs[module]
            if shape != [up.shape[0], down.shape[1]]:
                raise CogpressError(
                    f"{module} is {shape} in the base and {[up.shape[0], down.shape[1]]} in the adapter. "
                    "Name the base that it was trained on."
                )


def _write_shards(
    adapter: Adapter,
    shards: list[Path],
    part: Path,
    onto: Merge,
    dtype: torch.dtype,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> int:
    """Write the merged shards under the base's own file names; one shard is in memory at a time."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    device = base.device()
    names = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names += [(shard, name) for name in file.keys()]  # noqa: SIM118
    where: dict[str, str] = {}
    total = merged = 0
    pending: dict[str, torch.Tensor] = {}
    current: Path | None = None

    def flush() -> None:
        nonlocal pending
        if current is not None:
            save_file(pending, part / current.name, metadata={"format": "pt"})
        pending = {}

    for shard, name in progress(names, len(names)):
        if shard != current:
            flush()
            current = shard
        with safe_open(shard, framework="pt") as file:
            tensor = file.get_tensor(name)
        module = name.removesuffix(".weight")
        if tensor.is_floating_point():
            # Training loads the checkpoint in its compute dtype first, and quantizes from that.
            tensor = tensor.to(dtype)
        if module in adapter.quantized and onto == "dequantized":
            tensor = as_trained(tensor.to(device), adapter.quantization, dtype)
        if module in adapter.pairs:
            tensor = (tensor.to(device).float() + adapter.delta(module, device)).to(dtype)
            if not torch.isfinite(tensor).all():
                raise CogpressError(
                    f"{module} is not finite after the merge: the training diverged. Nothing is written."
                )
            merged += 1
        pending[name] = tensor.cpu().contiguous()
        where[name] = shard.name
        total += tensor.numel() * tensor.element_size()
    flush()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        manifest.write_json(part / "model.safetensors.index.json", index)
    return merged


def _copy_settings(base_folder: Path, part: Path, dtype: torch.dtype) -> None:
    for name in SERVING_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, part / name)
    config = json.loads((part / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    manifest.write_json(part / "config.json", config)
