"""A LoRA adapter in peft's layout: which tensors of its base it changes, and how, one tensor at a time.

An unknown variant is refused by name: merged as plain LoRA it would be silently wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.config import Quantization
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.weights import manifest, tensors
from cogpress.weights.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch

Merger = Callable[["torch.Tensor", slice], "torch.Tensor"]
"""Takes rows of a tensor as training computed with it, in float32, and their slice of its first dimension; merges them
in place."""

_PREFIX = "base_model.model."

_TOKENS = ".token_adapter.trainable_tokens_delta"
"""The rows that replace those of the tokens in `trainable_token_indices`; peft calls them a delta."""

_HARMLESS = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
"""Options of an adapter that do not affect the merge, whatever their value."""

_HANDLED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "bias",
    "lora_bias", "init_lora_weights", "trainable_token_indices",
}  # fmt: skip
"""Options that the merge honours."""

_FRESH_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base unchanged; PiSSA, OLoRA, CorDA and LoftQ change it."""


@dataclass(frozen=True)
class Layer:
    """One adapted layer: the names of its matrices in the adapter's file, and the scale of their product."""

    down: str
    up: str
    scale: float
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter whose matrices are loaded when needed, and what it was trained on."""

    folder: Path
    layers: dict[str, Layer]
    replaced: dict[str, str]
    tokens: dict[str, tuple[str, tuple[int, ...]]]
    """Embeddings of which some rows are replaced: by name, the tensor that holds them and their indices."""
    saved: frozenset[str]
    """Modules that training held apart from the base, saved whole."""
    quantization: Quantization
    quantized: frozenset[str]
    transposed: frozenset[str]
    """Layers that the base's files hold as (inputs, outputs); everything here is (outputs, inputs)."""
    facts: dict[str, Any]
    _stored: dict[str, tensors.Stored] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The `manifest.fingerprint` of the base that it was trained on."""
        return str(self.facts["base"]["fingerprint"])

    @property
    def base_key(self) -> str:
        """Equal for adapters that can share a base: the same weights, stored the same way in training."""
        facts = [self.fingerprint, self.quantization, self.facts["compute_dtype"], sorted(self.quantized)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def touched(self) -> set[str]:
        """The names of the base's tensors that it changes."""
        weights = {f"{module}.weight" for module in self.layers}
        biases = {f"{module}.bias" for module, layer in self.layers.items() if layer.bias}
        return weights | biases | self.replaced.keys() | self.tokens.keys()

    @property
    def vocabulary(self) -> int | None:
        """The rows of the embedding where it was saved whole; training may have resized it."""
        return next((self.shape(name)[0] for name in self.replaced if is_embedding(name)), None)

    def module(self, layer: str) -> str:
        """What the loaded model calls a layer that the base's files may have under another name."""
        return next((name for name, file in self.facts.get("file_names", {}).items() if file == layer), layer)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the adapter expects of the base's tensor; of one whose rows it replaces, (rows, width)."""
        if name in self.replaced:
            return self._stored[self.replaced[name]].shape
        if name in self.tokens and name.removesuffix(".weight") not in self.layers:
            return self._stored[self.tokens[name][0]].shape
        module, _, part = name.rpartition(".")
        layer = self.layers[module]
        up, down = self._stored[layer.up].shape, self._stored[layer.down].shape
        if part == "bias":
            return (up[0],)
        return (down[1], up[0]) if layer.embedding or module in self.transposed else (up[0], down[1])

    def replacement(self, name: str) -> torch.Tensor | None:
        """The tensor that replaces the base's: of a module saved whole, or a trained bias."""
        return self._load(self.replaced[name]) if name in self.replaced else None

    def merger(self, name: str, device: torch.device) -> Merger:
        """The function that merges rows of one of the base's tensors.

        LoRA: W + s B A, with s = alpha / r (Hu et al. 2021) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
        DoRA: m (W + s B A) / |W + s B A|, the norm over each row (Liu et al. 2024).

        Args:
            name: the name of a tensor of the base that this adapter changes.
            device: where to compute.
        """
        if name in self.tokens:
            return self._token_merger(name, device)
        module, _, part = name.rpartition(".")
        layer = self.layers.get(module)
        if layer is None or (part == "bias" and layer.bias is None):
            return lambda rows, _index: rows
        if part == "bias":
            bias = layer.scale * self._load(str(layer.bias)).to(device).float()
            return lambda rows, index: rows.add_(bias[index])
        up, down = (self._load(one).to(device).float() for one in (layer.up, layer.down))
        if layer.embedding:
            up, down = down.T, up.T
        magnitude = None if layer.magnitude is None else self._load(layer.magnitude).to(device).float()

        def merge(rows: torch.Tensor, index: slice) -> torch.Tensor:
            rows.addmm_(up[index], down, alpha=layer.scale)
            return rows if magnitude is None else rows.mul_((magnitude[index] / rows.norm(dim=1)).unsqueeze(1))

        return merge

    def _token_merger(self, name: str, device: torch.device) -> Merger:
        held, indices = self.tokens[name]
        trained = self._load(held).to(device).float()

        def merge(rows: torch.Tensor, index: slice) -> torch.Tensor:
            for at, token in enumerate(indices):
                if index.start <= token < index.stop:
                    rows[token - index.start] = trained[at]
            return rows

        return merge

    def _load(self, name: str) -> torch.Tensor:
        return tensors.load(self._stored[name], name)


def read(folder: Path) -> LoraAdapter:
    """Read an adapter that training wrote, or `adopt` took over.

    Raises:
        CogpressError: files are missing or changed, or it uses something that cannot be merged exactly.
    """
    facts = manifest.read(folder) if folder.is_dir() else None
    if facts is None or facts.get("kind") != "adapter":
        raise CogpressError(f"{folder} holds no adapter trained by cogpress. Name a run's adapter.")
    manifest.check(folder, facts)
    config = read_json(folder / ADAPTER_CONFIG)
    files = facts.get("file_names", {})

    def filed(name: str) -> str:
        """A module or its tensor by the name that the base's files have for it."""
        module, _, part = name.rpartition(".")
        return f"{files[module]}.{part}" if module in files else files.get(name, name)

    transposed = frozenset(map(filed, facts.get("transposed_modules", ())))
    if transposed:  # peft notes it for the whole adapter, as the last layer of its list is
        config.pop("fan_in_fan_out", None)
    refuse_unknown(config, folder)
    stored = tensors.stored(folder, list(folder.glob(ADAPTER_WEIGHTS)))
    layers, replaced, tokens = _sorted_out(stored, config, folder)
    return LoraAdapter(
        folder=folder,
        layers={filed(name): layer for name, layer in layers.items()},
        replaced={filed(name): held for name, held in replaced.items()},
        tokens={filed(name): held for name, held in tokens.items()},
        saved=frozenset(config.get("modules_to_save") or ()),
        quantization=facts["quantization"],
        quantized=frozenset(map(filed, facts["quantized_modules"])),
        transposed=transposed,
        facts=facts,
        _stored=stored,
    )


def is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding of tokens or the output layer, with a row for each token."""
    return name.removesuffix(".weight").rpartition(".")[2] in ("embed_tokens", "wte", "lm_head")


def refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    """Refuse the settings of an adapter that cannot be merged exactly.

    Raises:
        CogpressError: names them.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise CogpressError(
            f"Cannot merge {folder} exactly: its peft_type is {kind}, and only LoRA with its variants merges."
        )
    unknown = [name for name, value in config.items() if value and name not in _HARMLESS | _HANDLED]
    if config.get("init_lora_weights", True) not in _FRESH_STARTS:
        unknown.append(f"init_lora_weights {config['init_lora_weights']}")
    if unknown:
        raise CogpressError(f"Cannot merge {folder} exactly: it uses {', '.join(unknown)}. Train the adapter without.")


def _sorted_out(
    stored: dict[str, tensors.Stored], config: dict[str, Any], folder: Path
) -> tuple[dict[str, Layer], dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """Sort an adapter's tensors into adapted layers, replaced tensors and replaced rows."""
    layers: dict[str, Layer] = {}
    replaced: dict[str, str] = {}
    tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
    used = set()
    for name in stored:
        short = name.removeprefix(_PREFIX)
        for kind in ("lora_embedding_A", "lora_A.weight"):
            if short.endswith(f".{kind}"):
                module = short.removesuffix(f".{kind}")
                layers[module] = layer = _layer(name, kind, module, stored, config, folder)
                used |= {part for part in (layer.down, layer.up, layer.magnitude, layer.bias) if part}
        if short.endswith(_TOKENS):
            module = short.removesuffix(_TOKENS)
            tokens[f"{module}.weight"] = (name, _indices(module, config))
            used.add(name)
        if "lora_" not in short and short.endswith((".weight", ".bias")):
            # With a resized embedding peft saves its wrapper, too: the base's own module and the trained one once more.
            if ".original_module." not in short:
                replaced[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
            used.add(name)
    left = sorted(stored.keys() - used)
    if left:
        raise CogpressError(f"{folder} holds {left[0]}, which the merge does not support. Train without it.")
    if both := sorted(tokens.keys() & (replaced.keys() | {f"{module}.weight" for module in layers})):
        raise CogpressError(f"Cannot merge {folder} exactly: it changes {both[0]} and single rows of it.")
    return layers, replaced, tokens


def _indices(module: str, config: dict[str, Any]) -> tuple[int, ...]:
    """The tokens whose rows an adapter trained: one list for the embedding, or one for each module."""
    given = config["trainable_token_indices"]
    if isinstance(given, dict):
        given = next(found for name, found in given.items() if f".{module}".endswith(f".{name}"))
    return tuple(given)


def _layer(
    down: str, kind: str, module: str, stored: dict[str, tensors.Stored], config: dict[str, Any], folder: Path
) -> Layer:
    from peft.utils.other import get_pattern_key

    embedding = kind == "lora_embedding_A"
    stem = down.removesuffix(kind)
    up = stem + ("lora_embedding_B" if embedding else "lora_B.weight")
    if up not in stored:
        raise CogpressError(f"{folder} holds {down} without its other half, {up}. Train the adapter again.")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    if (stored[down].shape[0], stored[up].shape[1]) != (rank, rank):
        raise CogpressError(
            f"{folder}: {module} has rank {stored[down].shape[0]} and its configuration says {rank}, so its scale is "
            "unknown. Train the adapter again."
        )
    found = [stem + name for name in ("lora_magnitude_vector", "lora_magnitude_vector.weight")]
    magnitude = next((name for name in found if name in stored), None)
    if embedding and magnitude is not None:
        raise CogpressError(f"Cannot merge {folder} exactly: it uses DoRA on {module}, an embedding. Train without.")
    bias = f"{stem}lora_B.bias"
    return Layer(
        down=down,
        up=up,
        scale=alpha / (rank**0.5 if config.get("use_rslora") else rank),
        embedding=embedding,
        magnitude=magnitude,
        bias=bias if bias in stored else None,
    )
