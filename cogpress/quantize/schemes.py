"""Quantization schemes: which models each fits, and which machines make and serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.weights import base, skeleton

GROUP_SIZES = (128, 64, 32)
"""Weights that share one scale in 4-bit schemes, smallest result first: the sizes that engines have kernels for."""

FP8_CAPABILITY = (8, 9)
"""The first NVIDIA compute capability that computes in FP8: Ada, Hopper and later."""

SMOOTHING = 0.5
"""How much of the activations' range SmoothQuant (Xiao et al. 2022) moves into the weights; the paper's own default."""

SMOOTHED = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose norms feed only the layers that compensate for smoothing.

llmcompressor smooths others, too, such as Gemma, whose post-attention norm feeds the residual stream: that changes what
the model computes.
"""


@dataclass(frozen=True)
class Scheme:
    """A way to quantize: the algorithm, compressed-tensors' preset, and whether weights are grouped and smoothed."""

    name: str
    algorithm: str
    preset: str
    grouped: bool
    smoothed: bool
    about: str


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "gptq", "W8A8", False, True, "weights and activations in 8 bits, GPTQ"),
        Scheme("int4", "gptq", "W4A16", True, False, "weights in 4 bits, GPTQ"),
        Scheme("fp8", "none", "FP8_DYNAMIC", False, False, "weights and activations in FP8, without calibration"),
        Scheme("awq", "awq", "W4A16_ASYM", True, False, "weights in 4 bits, AWQ"),
    )
}


def linear_widths(folder: Path) -> dict[str, int]:
    """The input width of every layer that is quantized, by name, without reading a weight.

    Raises:
        CogpressError: it is no language model, or has no linear layer.
    """
    import torch

    base.quiet_libraries()
    model = skeleton.of(folder)
    widths = {
        name: skeleton.shape(layer)[1]
        for name, layer in skeleton.linears(model).items()
        if type(layer) is torch.nn.Linear  # of a model's own kind, llmcompressor writes what no engine loads
    }
    for name, shape in skeleton.experts(model).items():
        # Either of the last two dimensions may be the input's.
        widths |= {f"{name} ({width})": width for width in shape[1:]}
    if not widths:
        raise CogpressError(
            f"{folder} has no plain linear layers besides the output layer, so there is nothing to quantize."
        )
    return widths


def group_size(widths: dict[str, int]) -> int:
    """The largest group of weights that divides every layer's input width.

    Raises:
        CogpressError: none does; names the first layer that it fails for.
    """
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    name, width = next((name, width) for name, width in widths.items() if width % GROUP_SIZES[-1])
    raise CogpressError(
        f"4-bit weights come in groups of {', '.join(map(str, GROUP_SIZES))}, none of which divides {name}'s width of "
        f"{width}. Choose int8 or fp8."
    )


def smoothing(scheme: Scheme, folder: Path) -> float | None:
    """SmoothQuant's strength for a scheme on this model; None where smoothing would not be exact or not help."""
    architectures = read_json(folder / "config.json").get("architectures") or []
    return SMOOTHING if scheme.smoothed and set(architectures) & set(SMOOTHED) else None


def why_group(widths: dict[str, int], size: int) -> str:
    """Why groups are smaller than the usual, in words that follow `groups of 64`; nothing where they are not."""
    if size == GROUP_SIZES[0]:
        return ""
    larger = GROUP_SIZES[GROUP_SIZES.index(size) - 1]
    width = next(width for width in widths.values() if width % larger)
    return f" ({larger} does not divide the model's width of {width})"


def compute_capability() -> tuple[int, int] | None:
    """The first GPU's compute capability; None without a GPU."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def refuse_here(schemes: Sequence[str], capability: tuple[int, int] | None) -> None:
    """Refuse schemes that this machine cannot make.

    Raises:
        CogpressError: AWQ without an accelerator.
    """
    if "awq" in schemes and capability is None:
        raise CogpressError(
            "awq needs an NVIDIA GPU: llmcompressor searches its scales on an accelerator, and this machine has none. "
            "Choose int4, which has the same size, or run it where a GPU is."
        )


def caution(scheme: str, capability: tuple[int, int] | None) -> str | None:
    """What a user should know before a scheme is made on this machine, if anything."""
    if scheme != "fp8" or (capability is not None and capability >= FP8_CAPABILITY):
        return None
    if capability is None:
        return (
            "fp8 is for GPUs of the Ada or Hopper generation and later. It is made here but not measured: this "
            "machine's engine only emulates it, at about one token per second."
        )
    return (
        "fp8 is for GPUs of the Ada or Hopper generation and later. This one computes with its weights in 16 bits: "
        "smaller, but hardly faster."
    )


def served_here(scheme: str, capability: tuple[int, int] | None) -> bool:
    """Whether this machine's engine serves a scheme at a meaningful speed."""
    return scheme != "fp8" or capability is not None
