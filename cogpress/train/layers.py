"""Which layers of a base get an adapter, and whether what is trained on them can be merged: known before it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.config import Quantization
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.prompts import Row
from cogpress.weights import skeleton, tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = "all-linear"
"""The value of `train.target_modules` that stands for every linear layer that can be trained and merged."""

_EMBEDDING = "model.embed_tokens.weight"
"""The only shared embedding that the merge can separate from an output layer, by its name in the files."""

_READ_PAST = ("out_proj", "dt_proj", "conv1d")
"""Layers of Mamba's mixers whose weights its kernels read, past any adapter; peft refuses them, too."""


@dataclass(frozen=True)
class Layers:
    """What of a base is trained and how, by the names of its modules.

    Attributes:
        adapted: layers that get an adapter.
        quantized: layers that bitsandbytes holds in few bits.
        transposed: of both, those that the files hold as (inputs, outputs).
        files: of both, what the base's files call them, where that differs.
        notes: what a user should know, in sentences.
    """

    adapted: tuple[str, ...]
    quantized: tuple[str, ...]
    transposed: tuple[str, ...]
    files: dict[str, str]
    notes: tuple[str, ...]

    def facts(self, quantized: Sequence[str]) -> dict[str, Any]:
        """What a manifest records of an adapter, for its merge.

        Args:
            quantized: the layers that were quantized when the base was loaded.
        """
        return {
            "quantized_modules": [name.replace(".base_layer", "") for name in quantized],
            **({"transposed_modules": list(self.transposed)} if self.transposed else {}),
            **({"file_names": self.files} if self.files else {}),
        }


def choose(folder: Path, targets: str, quantization: Quantization) -> Layers:
    """Choose the layers for an adapter, and check that it could be merged.

    Args:
        folder: the base.
        targets: as in `train.target_modules`.
        quantization: how training stores the base.

    Raises:
        CogpressError: the base is no language model or is quantized already; a name is no layer of it; or a layer could
            be trained but not merged.
    """
    skeleton.refuse_quantized(read_json(folder / "config.json"), str(folder))
    model = skeleton.of(folder)
    stored = tensors.stored(folder)
    places = skeleton.file_names(model, stored)
    linears = skeleton.linears(model)
    quantized = skeleton.quantizable(model, stored) if quantization != "none" else []
    mergeable = {name for name in linears if _why_not(model, name, stored, places) is None}
    if targets == ALL:
        adapted = [name for name in linears if name in mergeable and _adaptable(model, name, linears[name])]
        if not adapted:
            raise CogpressError(f"{folder} has no linear layer that an adapter can be merged into. Use another base.")
    else:
        adapted = _named(model, linears, targets)
    for name in dict.fromkeys([*adapted, *quantized]):
        if why := _why_not(model, name, stored, places):
            raise CogpressError(
                f"{name} could be trained but not merged: {why} Leave {name.rpartition('.')[2]} out of "
                "train.target_modules, or use another base."
            )
    involved = dict.fromkeys([*adapted, *quantized])
    renamed = {name: places.get(f"{name}.weight", name).removesuffix(".weight") for name in involved}
    return Layers(
        adapted=tuple(adapted),
        quantized=tuple(quantized),
        transposed=tuple(sorted(name for name in involved if skeleton.transposed(model.get_submodule(name)))),
        files={name: file for name, file in renamed.items() if file != name},
        notes=tuple(_notes(model, adapted, quantized, quantization, targets)),
    )


def check_rows(folder: Path, rows: Sequence[Row], pad: int | None) -> None:
    """Check that a base can read rows, before it is loaded.

    Args:
        folder: the base.
        rows: all that is trained or evaluated on.
        pad: the tokenizer's token for padding.

    Raises:
        CogpressError: its embedding lacks a token, or a row is longer than the positions that it has learnt.
    """
    model = skeleton.of(folder)
    size = model.get_input_embeddings().num_embeddings
    highest = max(max(row.input_ids) for row in rows)
    for token, what in ((highest, "the examples"), (pad or 0, "the padding")):
        if token >= size:
            raise CogpressError(
                f"The tokenizer of {folder} gives {what} token {token}, and the model's embedding has {size}, from 0. "
                "Name a base whose tokenizer and weights belong together."
            )
    longest, positions = max(len(row.input_ids) for row in rows), skeleton.positions(model)
    if positions is not None and longest > positions:
        raise CogpressError(
            f"An example has {longest} tokens, and {folder} has learnt {positions} positions. Set train.max_length to "
            f"{positions}."
        )


def _named(model: PreTrainedModel, linears: Mapping[str, Any], targets: str) -> list[str]:
    """The layers that names stand for: whole names of modules, or their ends."""
    known = [*linears]
    head = model.get_output_embeddings()
    known += [name for name, module in model.named_modules() if head is not None and module is head]
    found: dict[str, None] = {}
    for wanted in (name.strip() for name in targets.split(",") if name.strip()):
        matching = [name for name in known if name == wanted or name.endswith(f".{wanted}")]
        if not matching:
            choices = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            fused = skeleton.experts(model)
            why = " Its experts are fused into single tensors, which get no adapter." if fused else ""
            raise CogpressError(
                f"train.target_modules names {wanted}, which is no linear layer of this model.{why} Choose from "
                f"{choices}, or set it to {ALL}."
            )
        for name in matching:
            if not _adaptable(model, name, model.get_submodule(name)):
                raise CogpressError(
                    f"train.target_modules names {wanted}, but an adapter on {name} would have no effect or train "
                    "fused experts instead. Leave it out."
                )
            found[name] = None
    return list(found)


def _adaptable(model: PreTrainedModel, name: str, layer: Any) -> bool:
    """Whether peft's adapter on a layer takes part: the model calls the layer, and the result is its product."""
    import torch

    mixer = model.get_submodule(name.rpartition(".")[0])
    if name.rpartition(".")[2] in _READ_PAST and hasattr(mixer, "A_log") and hasattr(mixer, "D"):
        return False
    if _taken_for_expert(model, name):
        return False
    if type(layer) is torch.nn.Linear or skeleton.transposed(layer):
        return True
    # A layer of its own kind may do more: Llama 4's router, a linear layer, returns two results.
    outputs, inputs = skeleton.shape(layer)
    made = layer(torch.empty(1, inputs, device="meta", dtype=layer.weight.dtype))
    return isinstance(made, torch.Tensor) and made.shape == (1, outputs)


def _taken_for_expert(model: PreTrainedModel, name: str) -> bool:
    """Whether peft would train the fused experts instead, as in models with dense layers of the experts' names.

    It renames the layers that adapters of transformers 4 are for (peft 0.21).
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import _convert_peft_config_moe

    config = LoraConfig(target_modules=[name])
    try:
        _convert_peft_config_moe(config, model)
    except ValueError:  # only together with others
        return True
    return name not in (config.target_modules or ())


def _why_not(
    model: PreTrainedModel, name: str, stored: Mapping[str, tensors.Stored], places: Mapping[str, str]
) -> str | None:
    """Why what is trained on a layer cannot be merged, in a sentence; None where it can."""
    layer = model.get_submodule(name)
    place = stored.get(places.get(f"{name}.weight", ""))
    if place is None or place.dtype not in tensors.FLOATS:
        # The merge gives an output layer that shares the embedding a tensor of its own.
        tied = layer is model.get_output_embeddings() and model.config.get_text_config().tie_word_embeddings
        if place is None and tied and name == "lm_head" and _EMBEDDING in stored:
            return None
        if place is None and tied:
            return f"it shares its weight with the embedding, which the files do not call {_EMBEDDING}."
        return "the base's files hold no tensor of that name." if place is None else f"it is stored as {place.dtype}."
    shape = skeleton.shape(layer)
    shape, order = (shape[::-1], "inputs, outputs") if skeleton.transposed(layer) else (shape, "outputs, inputs")
    if place.shape != shape:
        return f"its weight is {list(place.shape)} in the base's files, and not {list(shape)} ({order})."
    return None


def _notes(
    model: PreTrainedModel, adapted: list[str], quantized: list[str], quantization: Quantization, targets: str
) -> list[str]:
    notes = []
    total = sum(parameter.numel() for parameter in model.parameters())
    fused = skeleton.experts(model)
    share = sum(shape.numel() for shape in fused.values()) / total
    if fused and targets == ALL:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in adapted))
        notes.append(
            f"train.target_modules {ALL} leaves out the experts, {share:.0%} of the weights: they are fused into "
            f"single tensors, which get no adapter. It trains {kinds}."
        )
    if quantization != "none":
        held = sum(model.get_submodule(name).weight.numel() for name in quantized)  # type: ignore[union-attr, operator]
        embeddings = {id(one.weight): one.weight.numel() for one in _embeddings(model)}
        rest = total - sum(embeddings.values())
        if held < rest / 2:
            what = "none" if not held else f"{held / rest:.0%}"
            why = (
                "the experts are fused into single tensors" if fused else "the rest are layers of the model's own kind"
            )
            notes.append(
                f"base.quantization {quantization} holds {what} of this model's weights besides the embeddings, as "
                f"{why}, which bitsandbytes leaves in 16 bits. Training needs memory for that."
            )
    return notes


def _embeddings(model: PreTrainedModel) -> list[Any]:
    return [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
