"""How the GPUs of a machine are shared out: layers, stages, copies of the model, and each GPU's memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cogpress.config import Serve
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.weights import manifest

ENGINES = "COGPRESS_ENGINES_PER_GPU"
"""Environment variable: how many engines share each GPU, where one program starts several."""

_WEIGHTS_SHARE = 0.7
"""Share of the GPUs' memory that weights may fill before a copy takes more GPUs; the rest is for the KV cache."""

_LEFT_FREE = 0.02
"""Share of a GPU's memory that `auto` leaves free beside what others use, which grows by a little."""

_LEAST = 0.05
"""Share of a GPU's memory below which no engine is started."""


class Parallel(NamedTuple):
    """Tensor parallel size, pipeline stages, and copies of the model."""

    tensor: int
    pipeline: int
    data: int


def parallel(folder: Path, serve: Serve, gpus: int, gpu_bytes: int = 0) -> Parallel:
    """How the GPUs share the model. `auto` uses all that it can.

    As many GPUs as the model allows share each layer (`undivided`), which is fastest. Of the GPUs that are left,
    those that the weights need hold successive layers, and copies of the model take the others.

    Args:
        folder: the weights.
        serve: the options.
        gpus: number of GPUs.
        gpu_bytes: memory of each; 0 where it is not known, which is taken for enough.

    Raises:
        CogpressError: the machine has fewer GPUs, or the model cannot be divided so.
    """
    asked = {name: getattr(serve, name) for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")}
    given = {name: 1 if value == "auto" else value for name, value in asked.items()}
    if not gpus:
        if any(value != 1 for value in given.values()):
            names = ", ".join(name for name, value in given.items() if value != 1)
            raise CogpressError(f"serve.{names} needs GPUs, and this machine has none. Set it to auto.")
        return Parallel(1, 1, 1)
    tensor, pipeline, data = given.values()
    if asked["tensor_parallel"] == "auto":
        most = max(1, gpus // (pipeline * data))
        tensor = max(size for size in range(1, most + 1) if not _why_not(folder, size))
    elif why := _why_not(folder, tensor):
        raise CogpressError(f"serve.tensor_parallel is {tensor}, which {why}. Set it to auto.")
    if asked["pipeline_parallel"] == "auto" and asked["tensor_parallel"] == "auto" and gpu_bytes:
        weights = manifest.weights_bytes(folder)
        free = gpus // (tensor * data)
        pipeline = next((n for n in range(1, free + 1) if weights <= _WEIGHTS_SHARE * n * tensor * gpu_bytes), free)
        pipeline = max(1, pipeline)
    if asked["data_parallel"] == "auto" and asked["tensor_parallel"] == "auto":
        data = max(1, gpus // (tensor * pipeline))
    if tensor * pipeline * data > gpus:
        product = " x ".join(name for name, value in zip(asked, (tensor, pipeline, data), strict=True) if value > 1)
        raise CogpressError(
            f"serve.{product} needs {tensor * pipeline * data} GPUs; this machine has {gpus}. Set them to auto."
        )
    return Parallel(tensor, pipeline, data)


def _why_not(folder: Path, size: int) -> str:
    settings = read_json(folder / "config.json")
    text: dict[str, Any] = settings.get("text_config", settings)
    heads = int(text.get("num_attention_heads") or 1)
    widths = [text.get(name) or [] for name in ("intermediate_size", "moe_intermediate_size")]
    return undivided(
        size,
        heads=heads,
        key_value_heads=int(text.get("num_key_value_heads") or heads),
        widths=[int(one) for found in widths for one in (found if isinstance(found, list) else [found])],
        group=_group(settings.get("quantization_config") or {}),
    )


def undivided(size: int, *, heads: int, key_value_heads: int, widths: Iterable[int], group: int = 1) -> str:
    """Why a model's layers cannot be divided between so many GPUs; empty where they can.

    vLLM gives each GPU whole attention heads, and whole KV heads or one that several GPUs repeat; it divides the width
    of feed-forward networks evenly, and not within a group of quantized weights.

    Args:
        size: number of GPUs.
        heads: attention heads.
        key_value_heads: KV heads.
        widths: of the feed-forward networks.
        group: how many weights in a row share a constant.
    """
    if heads % size:
        return f"does not divide the {heads} attention heads"
    if key_value_heads % size and size % key_value_heads:
        return f"neither divides the {key_value_heads} KV heads nor is a multiple of them"
    if size > 1 and (width := next((one for one in widths if one % (size * group)), None)):
        return f"does not divide the feed-forward width {width}" + (f" into groups of {group}" if group > 1 else "")
    return ""


def _group(quantized: dict[str, Any]) -> int:
    """How many weights in a row share a constant; 1 where all of a row do."""
    groups = [found.get("weights") or {} for found in (quantized.get("config_groups") or {}).values()]
    sizes = [found.get("group_size") for found in (quantized, *groups)]
    return max((int(size) for size in sizes if size and int(size) > 0), default=1)


def memory_share(serve: Serve, free: float, total: float) -> float:
    """The share of each GPU's memory that an engine takes: `serve.gpu_memory_share`, or what `auto` finds.

    Args:
        serve: the options.
        free: bytes that nobody uses, on the GPU with least.
        total: bytes of a GPU.

    Raises:
        CogpressError: `auto`, and next to nothing is free.
    """
    if serve.gpu_memory_share != "auto":
        return serve.gpu_memory_share
    wanted = serve.memory_share / max(1, int(os.environ.get(ENGINES) or 1))
    share = min(wanted, int(100 * (free / total - _LEFT_FREE)) / 100)
    if share < _LEAST:
        raise CogpressError(
            f"Other programs use the GPU's memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free. End them, or "
            "set serve.gpu_memory_share."
        )
    return share


def free_and_total(gpus: int) -> tuple[int, int]:
    """Free and total bytes of the GPU with the least free memory, without a CUDA context on it.

    Where NVIDIA's management library is missing, all of it counts as free.
    """
    import torch

    found = []
    for at in range(gpus):
        total = torch.cuda.get_device_properties(at).total_memory
        try:
            used = torch.cuda.device_memory_used(at)
        except (ImportError, RuntimeError):
            used = 0
        found.append((total - used, total))
    return min(found)
