"""A model without its weights, from its config.json: its class, its layers, and where its files hold each of them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.errors import CogpressError, reason
from cogpress.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_BUILD_ERRORS = (
    OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError,
)  # fmt: skip
"""What transformers raises for a configuration that it does not take."""


def of(folder: Path) -> PreTrainedModel:
    """The model of a folder. See `build`."""
    return build(read_json(folder / "config.json"), str(folder))


def build(settings: Mapping[str, Any], shown: str) -> PreTrainedModel:
    """Build a language model on the meta device, where tensors have shapes but no data.

    Args:
        settings: the content of config.json; code that it refers to is never run.
        shown: the model's name in messages.

    Raises:
        CogpressError: it is no language model, or transformers does not support the architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    found = check(settings, shown)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(found, trust_remote_code=False)
    except _BUILD_ERRORS as error:
        raise _unknown(error, shown) from None
    return model


def check(settings: Mapping[str, Any], shown: str) -> PreTrainedConfig:
    """Read a language model's configuration. See `build`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # Quantization changes how weights are stored, not their number.
    plain = {name: value for name, value in settings.items() if name not in ("quantization_config", "auto_map")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
            found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*_BUILD_ERRORS, StrictDataclassError) as error:
        raise _unknown(error, shown) from None
    refuse_kind(found, shown)
    return found


def _unknown(error: Exception, shown: str) -> CogpressError:
    return CogpressError(
        f"{shown} is not a language model that transformers can build: {reason(error).rstrip('.')}. "
        "Name a model of a supported architecture."
    )


def refuse_kind(config: PreTrainedConfig, shown: str) -> None:
    """Refuse a model that is no decoder of text.

    Raises:
        CogpressError: it is an encoder, has an encoder and a decoder, or transformers cannot load its text part alone.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        kind = "has an encoder and a decoder"
    elif name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "is an encoder"
    elif name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    elif name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        kind = "answers about images, and transformers does not load its language model alone"
    else:
        kind = "is no language model"
    raise CogpressError(f"{shown} ({name}) {kind}. Name a base that continues text, such as Llama, Qwen 3 or Gemma 3.")


def refuse_quantized(settings: Mapping[str, Any], shown: str) -> None:
    """Refuse a base whose weights are quantized: it could be trained, but no merge into it is exact.

    Args:
        settings: the content of config.json.
        shown: the base's name in messages.

    Raises:
        CogpressError: it is quantized.
    """
    found = settings.get("quantization_config")
    if found is None:
        return
    method = str(found.get("quant_method", "")) if isinstance(found, dict) else ""
    # gpt-oss was published in MXFP4, so its original is such a checkpoint, too.
    way = "Name a copy in 16 bits" if method == "mxfp4" else "Name its original"
    how = f" ({method})" if method else ""
    raise CogpressError(f"{shown} is quantized already{how}, so that no merge into it is exact. {way} as base.source.")


def has_attention(folder: Path, name: str) -> bool:
    """Whether the model of a folder has an attention implementation, by transformers' name of it.

    Raises:
        CogpressError: it is no language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = check(read_json(folder / "config.json"), str(folder))
    return name != "sdpa" or bool(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa)


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers of the language model by name; its output layer and the parts that see or hear left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    text, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in text.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and id(module) in inside
    }


def transposed(layer: Any) -> bool:
    """Whether a layer's weight is stored as (inputs, outputs), as GPT-2's are; of a square one no shape tells."""
    from transformers.pytorch_utils import Conv1D

    # bitsandbytes' layers remember what they replaced.
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def shape(layer: Any) -> tuple[int, int]:
    """A linear layer's (outputs, inputs), whichever way its weight is stored."""
    rows, columns = layer.weight.shape
    return (columns, rows) if transposed(layer) else (rows, columns)


def file_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The tensor in a model's files that each of its parameters is, by transformers' own conversion of names.

    Parameters that are made of several tensors, such as fused experts, or of a part of one, are not among them.

    Args:
        model: on any device.
        stored: the names of the tensors in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    parameters = model.state_dict()
    found: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):
        parameter, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converter is None and parameter in parameters:
            found[parameter] = name
    return found


def unquantized(model: PreTrainedModel, stored: Iterable[str] | None = None) -> list[str]:
    """The linear layers that stay as they are when the model is quantized, as patterns for transformers.

    Beside those that transformers chooses, they are the parts that see or hear, which no text trains, and layers that
    are no single tensor of the files, which could not be merged as training held them.

    Args:
        model: on any device.
        stored: the names of the tensors in the files, where those are there.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    text = linears(model)
    places = model.state_dict().keys() if stored is None else file_names(model, stored).keys()
    left = [
        f"^{re.escape(name)}$"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and (name not in text or f"{name}.weight" not in places)
    ]
    return sorted(get_keys_to_not_convert(model)) + left


def quantizable(model: PreTrainedModel, stored: Iterable[str] | None = None) -> list[str]:
    """The linear layers that bitsandbytes quantizes: not those of a model's own kind, such as Falcon's."""
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = [*unquantized(model, stored), *(model._keep_in_fp32_modules or ())]
    return [
        name
        for name, module in linears(model).items()
        if (type(module) is torch.nn.Linear or transposed(module)) and should_convert_module(name, left)
    ]


def experts(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shapes of the weights of experts that are fused into one tensor instead of linear layers."""
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in f".{name}."
    }


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has learnt, beyond which it cannot read; None where it computes them."""
    import torch

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # OPT keeps two rows more than it has positions.
    return most if most and any(most <= rows <= most + 2 for rows in tables) else None
