"""The base model: the embedded one, and how training loads any.

Knows the embedded package and quantization; leaves other sources to `fetch`, adapters to `training` and arithmetic on
weights to `merge`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cogpress.config import Quantization
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quiet_libraries() -> None:
    """Silence what libraries print about themselves: our own steps say what is done."""
    import logging

    # Says at its import that an optional kernel from the Hub is missing; the built-in one is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def without_bars(module: Any) -> None:
    """Stop a module from drawing tqdm's bars, for which it has no switch."""
    module.tqdm = functools.partial(tqdm, disable=True)


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of a model folder.

    Raises:
        CogpressError: the folder has none that can be read without running its code.
    """
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CogpressError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from None
    return loaded


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16, or float16 on a GPU that lacks it (before Ampere)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return torch.float16
    return torch.bfloat16


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The bitsandbytes settings of QLoRA (Dettmers et al. 2023): NF4, double quantization; None for `none`."""
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def load(folder: Path, quantization: Quantization, *, attention: str = "sdpa") -> PreTrainedModel:
    """Load a base as training sees it: linear layers quantized, norms computed in float32.

    Args:
        folder: a model folder in safetensors.
        quantization: how the linear layers are held.
        attention: transformers' name of an attention implementation.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        with contextlib.suppress(ImportError):
            from compressed_tensors.compressors.model_compressors import model_compressor

            without_bars(model_compressor)
    dtype = compute_dtype()
    chosen = quantization_config(quantization, dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        # Given as None, it would hide that a checkpoint is quantized, whose integers then pass for weights.
        **({} if chosen is None else {"quantization_config": chosen}),
        device_map={"": str(device())},
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    keep_training_layout(model)
    for module in model.modules():
        # RMS norms compute in float32 by themselves, whatever their dtype; layer norms compute in theirs.
        if isinstance(module, torch.nn.LayerNorm):
            module.to(torch.float32)
            module.register_forward_pre_hook(_to_float32)
            # What follows stays in 16 bits.
            module.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
    return model


def keep_training_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    Linear4bit repacks on its first call in eval mode without gradients, and a repacked weight gives wrong gradients
    in every later training step. It is one flag on each layer (bitsandbytes 0.50).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _to_float32(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])


def quantized_modules(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers that bitsandbytes holds quantized, as in the base's own checkpoint."""
    import bitsandbytes as bnb

    return sorted(
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    )
