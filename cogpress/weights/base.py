"""What training and serving do with a base model: its tokenizer, device, dtype and quantization, and loading it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cogpress.config import Quantization
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.weights import skeleton, tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


KERNELS = 128
"""More than the shapes of one training step."""


def quiet_libraries() -> None:
    """Silence what libraries print about themselves: our own steps report progress."""
    import logging

    # On import it warns that an optional kernel from the Hub is missing, and uses its built-in one.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if not sys.warnoptions:  # who asks Python for warnings gets them
        for library in ("bitsandbytes", "peft", "torch", "transformers"):
            warnings.filterwarnings("ignore", module=rf"{library}\b")


def without_bars(module: Any) -> None:
    """Stop a module from drawing tqdm's progress bars, which it has no switch for."""
    module.tqdm = functools.partial(tqdm, disable=True)


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of a model folder.

    Raises:
        CogpressError: the folder has none that loads without running its code.
    """
    from transformers import AutoTokenizer

    if (folder / "tekken.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise CogpressError(
            f"{folder} has its tokenizer as tekken.json alone, which has no chat template and other functions than "
            "transformers' own. Name a base with a tokenizer.json."
        )
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CogpressError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from None
    return loaded


def stop_ids(folder: Path) -> list[int]:
    """The token ids on which a model's own generation settings stop."""
    try:
        ids = read_json(folder / "generation_config.json").get("eos_token_id")
    except (FileNotFoundError, ValueError):
        return []
    return [ids] if isinstance(ids, int) else list(ids or [])


def bound_kernel_caches() -> None:
    """Keep at most `KERNELS` of the kernels that PyTorch's oneDNN makes for shapes of 16-bit products on a CPU.

    It keeps 1,024 by default, in two caches, each with its own memory, and every length of a batch brings new ones:
    training the embedded model took 0.6 GB more after 50 steps. Both read the environment, once, at the first product.
    A user's own setting stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@functools.cache
def compute_dtype() -> torch.dtype:
    """What matrix products run in: bfloat16, unless this machine is faster in another format.

    float16 on a GPU without bfloat16 (before Ampere). Many CPUs have no bfloat16 units: on a CPU a few products are
    timed in both, once a process, and float32 is taken where it saves at least a quarter of the time.
    """
    import torch

    if torch.cuda.is_available():
        return torch.float16 if torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.float32 if seconds[torch.float32] <= 0.75 * seconds[torch.bfloat16] else torch.bfloat16


def _product_seconds(dtype: torch.dtype) -> float:
    """The time of one matrix product with a small model's shapes on a CPU, the best of four."""
    bound_kernel_caches()
    import torch

    tokens, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    found = []
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        found.append(time.perf_counter() - started)
    return min(found)


def stored_dtype(compute: torch.dtype) -> torch.dtype:
    """What weights are stored in that were trained in a compute dtype: 16 bits, as they are served."""
    import torch

    return torch.bfloat16 if compute == torch.float32 else compute


def trained_dtype(facts: dict[str, Any]) -> torch.dtype:
    """The compute dtype that the manifest of an adapter or of weights records."""
    import torch

    found: torch.dtype = getattr(torch, facts["compute_dtype"])
    return found


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Run matrix products in `dtype`, as training did; in float32 there is nothing to cast."""
    import torch

    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device().type, dtype=dtype)


def quantization_config(quantization: Quantization, dtype: torch.dtype, folder: Path) -> Any:
    """The bitsandbytes settings of QLoRA (Dettmers et al. 2023): NF4, double quantization; None for `none`."""
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    left = skeleton.unquantized(skeleton.of(folder), tensors.stored(folder))
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=left,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)


def load(
    folder: Path, quantization: Quantization, *, attention: str = "sdpa", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a base as training sees it: linear layers quantized, norms computed in float32.

    Args:
        folder: a model folder in safetensors.
        quantization: how the linear layers are stored.
        attention: transformers' name of an attention implementation; eager where the model lacks it, as gpt-oss does.
        dtype: what it computes in; this machine's fastest where not given.

    Raises:
        CogpressError: its files lack tensors, which transformers would fill with random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    bound_kernel_caches()
    if "quantization_config" in read_json(folder / "config.json"):
        with contextlib.suppress(ImportError):
            from compressed_tensors.compressors.model_compressors import model_compressor

            without_bars(model_compressor)
    dtype = dtype or compute_dtype()
    chosen = quantization_config(quantization, dtype, folder)
    model: PreTrainedModel
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        # None would hide that a checkpoint is quantized, and its integers would be taken for weights.
        **({} if chosen is None else {"quantization_config": chosen}),
        device_map={"": str(device())},
        attn_implementation=attention if skeleton.has_attention(folder, attention) else "eager",
        trust_remote_code=False,
        use_safetensors=True,
    )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CogpressError(
            f"{folder} lacks tensors that its model has: {', '.join(missing[:3])}{more}. Its files are incomplete or "
            "have other names than transformers asks for; fetch or convert them again."
        )
    keep_training_layout(model)
    for module in model.modules():
        # RMS norms compute in float32 whatever their dtype; layer norms compute in their own.
        if isinstance(module, torch.nn.LayerNorm):
            module.to(torch.float32)
            module.register_forward_pre_hook(_to_float32)
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
    """Names of the linear layers that bitsandbytes quantized, as in the base's own checkpoint."""
    import bitsandbytes as bnb

    return sorted(
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    )
