"""A model's architecture from its config.json alone: exact parameter counts and KV cache entries per token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogpress import source
from cogpress.errors import CogpressError
from cogpress.weights import base, fetch, hub, remote_file, skeleton

ATTENTION = {"full_attention": False, "sliding_attention": True, "chunked_attention": True}
"""Kinds of attention layers, by transformers' names, and whether a window bounds their cache."""

MAX_CONFIG = 4 << 20
"""Size limit of a config.json, in bytes."""


@dataclass(frozen=True)
class Linear:
    """The linear layers of one name and shape, `count` in the whole model; the output layer is not among them.

    `quantizable` is whether bitsandbytes quantizes them, which it does not with layers of a model's own kind.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    quantizable: bool = True

    @property
    def weights(self) -> int:
        """Their weights in total, without biases."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Cache:
    """The KV cache of one attention layer.

    Attributes:
        values: values per token: 2 x KV heads x head width; for multi-head latent attention, its compressed form.
        window: the most tokens that are kept; None for all.
    """

    values: int
    window: int | None


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        kind: transformers' name for the architecture.
        parameters: all parameters; a tied output layer is not counted twice.
        embedding: parameters of the input embedding.
        head: parameters of the output layer; 0 if it is tied.
        linears: all other linear layers.
        experts: weights of experts that are stored as one tensor instead of linear layers.
        expert_share: the share of the experts' weights that one token uses.
        caches: one for each attention layer.
        heads, key_value_heads, head_width, hidden, intermediate, vocabulary, max_context: as in config.json;
            `intermediate` counts what one token uses.
        gated: whether the feed-forward network is gated (SwiGLU and the like).
        dtype: of the weights, as config.json names it.
        scheme: how the weights are quantized, by the name in `quantization_config`; None if they are not.
    """

    kind: str
    parameters: int
    embedding: int
    head: int
    linears: tuple[Linear, ...]
    experts: int
    expert_share: float
    caches: tuple[Cache, ...]
    heads: int
    key_value_heads: int
    head_width: int
    hidden: int
    intermediate: int
    vocabulary: int
    max_context: int
    gated: bool
    dtype: str
    scheme: str | None = None

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.caches)

    @property
    def linear_weights(self) -> int:
        """Weights that QLoRA and quantization schemes compress: those of linear layers except the output layer."""
        return sum(linear.weights for linear in self.linears)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the input embedding."""
        return self.head == 0

    @property
    def active(self) -> float:
        """Weights that take part in computing one token: all but the input embedding and the experts that it skips."""
        unused = (1 - self.expert_share) * self.experts
        return self.parameters - unused - (0 if self.tied else self.embedding)

    def adapter(self, rank: int, targets: str = "all-linear") -> int:
        """Parameters of a LoRA adapter: A of rank x inputs and B of outputs x rank (Hu et al. 2021) on each layer.

        Args:
            rank: of the adapter.
            targets: layer names, separated by commas, or `all-linear`.

        Raises:
            CogpressError: the model has no linear layer of a name.
        """
        return sum(rank * (linear.inputs + linear.outputs) * linear.count for linear in self.targeted(targets))

    def targeted(self, targets: str) -> tuple[Linear, ...]:
        """The linear layers that `train.target_modules` names.

        Raises:
            CogpressError: the model has no linear layer of a name.
        """
        if targets == "all-linear":
            return self.linears
        names = {name.strip() for name in targets.split(",") if name.strip()}
        known = {linear.name for linear in self.linears}
        if unknown := sorted(names - known):
            raise CogpressError(
                f"target_modules names {unknown[0]}, which is not a linear layer of this model. "
                f"Choose from {', '.join(sorted(known))}."
            )
        return tuple(linear for linear in self.linears if linear.name in names)


def of(text: str, cache: Path) -> Architecture:
    """The architecture of a model by its source; only its config.json is downloaded where the source allows that.

    Args:
        text: `embedded`, a folder, a config.json, or another source that `fetch.base` takes.
        cache: where fetched models are kept.

    Raises:
        CogpressError: there is no such model, or transformers does not support its architecture.
    """
    return read(config(text, cache), source.shown(text))


def config(text: str, cache: Path) -> dict[str, Any]:
    """A model's config.json. A tar is fetched whole; of other sources only this file.

    Raises:
        CogpressError: it does not exist, or is not a JSON object.
    """
    shown = source.shown(text)
    if text == "embedded":
        return _parsed((fetch.base(text, cache) / "config.json").read_bytes(), shown)
    wanted = source.parse(text)
    if wanted.kind == "hub":
        return _parsed(hub.file(wanted, "config.json").read_bytes(), shown)
    if wanted.kind == "files":
        return _parsed(remote_file.read(fetch.beside(wanted.text, "config.json"), MAX_CONFIG), shown)
    path = Path(wanted.text).expanduser()
    if wanted.kind == "path" and (path.is_dir() or path.suffix == ".json"):
        path = path / "config.json" if path.is_dir() else path
        try:
            return _parsed(path.read_bytes(), str(path))
        except OSError as error:
            raise CogpressError(
                f"{path} cannot be read ({error.strerror}). Name a folder with a config.json."
            ) from None
    return _parsed((fetch.model(text, cache).folder / "config.json").read_bytes(), shown)


def _parsed(content: bytes, shown: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CogpressError(f"The config.json of {shown} is not a JSON object. Name another model.")
    return found


def read(settings: Mapping[str, Any], shown: str = "This config.json") -> Architecture:
    """The architecture that a config.json describes.

    Args:
        settings: the content of config.json; code that it refers to is never run.
        shown: the model's name in messages.

    Raises:
        CogpressError: it is no language model that transformers can build, or a layer is not an attention layer.
    """
    base.quiet_libraries()
    model = skeleton.build(settings, shown)
    return _described(model, settings, shown)


def _described(model: Any, settings: Mapping[str, Any], shown: str) -> Architecture:
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    layers = skeleton.linears(model)
    quantizable = set(skeleton.quantizable(model))
    shapes: Counter[tuple[str, int, int, bool]] = Counter()
    for name, layer in layers.items():
        outputs, inputs = skeleton.shape(layer)
        shapes[name.rpartition(".")[2], inputs, outputs, name in quantizable] += 1
    experts = sum(shape.numel() for shape in skeleton.experts(model).values())
    tied = head is None or head.weight is embedding.weight
    heads = int(text.num_attention_heads)
    names = {name for name, *_ in shapes}
    dtype = settings.get("dtype") or settings.get("torch_dtype") or getattr(text, "dtype", None) or "bfloat16"
    used, many = _experts(text)
    return Architecture(
        kind=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=embedding.weight.numel(),
        head=0 if tied else head.weight.numel(),
        linears=tuple(
            Linear(name, inputs, outputs, count, held) for (name, inputs, outputs, held), count in shapes.items()
        ),
        experts=experts,
        expert_share=used / many if many else 1.0,
        caches=_caches(text, heads, shown),
        heads=heads,
        key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_width=_head_width(text, heads),
        hidden=int(text.hidden_size),
        intermediate=_intermediate(text, used if experts else 0),
        vocabulary=int(text.vocab_size),
        max_context=int(getattr(text, "max_position_embeddings", 0) or 4096),
        gated=bool(names & {"gate_proj", "gate_up_proj"}) or experts > 0,
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme_of(settings.get("quantization_config")),
    )


def _head_width(text: Any, heads: int) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // heads)


def _experts(text: Any) -> tuple[int, int]:
    """The number of experts that a token uses, and of all experts; 0 and 0 without experts."""
    many = None
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        many = many or getattr(text, name, None)
    used = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    return (int(used), int(many)) if used and many else (0, 0)


def _intermediate(text: Any, used: int) -> int:
    """The width of the feed-forward network for one token."""
    width = getattr(text, "moe_intermediate_size", None) if used else None
    width = width or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # Some models set a width per layer.
    width = max(width) if isinstance(width, list | tuple) else width
    return int(width) * max(1, used)


def _caches(text: Any, heads: int, shown: str) -> tuple[Cache, ...]:
    """The KV cache of each layer (Shazeer 2019; Ainslie et al. 2023, grouped-query attention)."""
    layers = int(text.num_hidden_layers)
    kinds = list(getattr(text, "layer_types", None) or ())
    if unknown := sorted({kind for kind in kinds if kind not in ATTENTION}):
        raise CogpressError(
            f"{shown} has layers of kind {unknown[0]}, whose memory cannot be planned, as it is not that of attention. "
            "Measure it by serving the model."
        )
    if latent := getattr(text, "kv_lora_rank", None):
        # Multi-head latent attention (DeepSeek-V2, 2024): one compressed vector and one rotated key for all heads.
        values = int(latent) + int(text.qk_rope_head_dim)
    else:
        values = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * _head_width(text, heads)
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    if not kinds:
        return (Cache(values, window),) * layers
    shared = int(getattr(text, "num_kv_shared_layers", 0) or 0)
    # Layers that share another layer's keys and values store none.
    return tuple(Cache(values, window if ATTENTION[kind] else None) for kind in kinds[: layers - shared])


def scheme_of(found: Any) -> str | None:
    """The scheme of a `quantization_config`, by its name in scripts/quantize; None without one."""
    if not isinstance(found, Mapping):
        return None
    method = str(found.get("quant_method") or "")
    if method != "compressed-tensors":
        gptq = "int8" if found.get("bits") == 8 else "int4"
        return {"awq": "awq", "gptq": gptq, "fp8": "fp8"}.get(method, method or None)
    groups = list((found.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if groups and isinstance(groups[0], Mapping) else {}
    if weights.get("type") == "float":
        return "fp8"
    bits = weights.get("num_bits")
    return {8: "int8", 4: "int4" if weights.get("symmetric", True) else "awq"}.get(bits) if bits else None
