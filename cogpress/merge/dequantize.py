"""A layer's weight as training computed with it: quantized, then dequantized, bit for bit as bitsandbytes does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cogpress.config import Quantization

if TYPE_CHECKING:
    import torch

_NF4_BLOCK = 64
"""Values that share a scale."""

_STATISTICS_BLOCK = 256
"""Scales that share a scale of their own (double quantization)."""

_CHUNK = 1 << 18
"""Elements computed at once on a CPU, so that their temporaries fit its cache."""


class TrainedWeight:
    """A tensor as training computed with it: quantized once, dequantized a chunk of rows at a time.

    On a CPU a chunk fits the cache, which is several times as fast as passes over a whole layer; on a GPU all rows are
    one chunk.
    """

    def __init__(self, weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> None:
        """
        Args:
            weight: in the dtype that training loaded it in; shape (out, in) where it is quantized.
            quantization: how training stored it.
            dtype: what training computed in.
        """
        self.shape, self.device = tuple(weight.shape), weight.device
        columns = max(1, math.prod(self.shape[1:]))
        # A chunk ends at the end of a row and of a block.
        unit = _NF4_BLOCK // math.gcd(columns, _NF4_BLOCK)
        self.step = unit * max(1, _CHUNK // (columns * unit)) if self.device.type == "cpu" else len(weight)
        self.step = max(1, min(self.step, len(weight)))
        self.slices = [slice(at, at + self.step) for at in range(0, len(weight), self.step)]
        self._dtype = dtype
        self._rows = self._held(weight, quantization)

    def rows(self, index: slice) -> torch.Tensor:
        """The rows of one slice, in the compute dtype."""
        return self._rows(index).to(self._dtype)

    def whole(self) -> torch.Tensor:
        """The whole tensor, in the compute dtype."""
        import torch

        return torch.cat([self.rows(index) for index in self.slices])

    def _held(self, weight: torch.Tensor, quantization: Quantization) -> Callable[[slice], torch.Tensor]:
        import bitsandbytes.functional as bnb

        if quantization == "nf4":
            if self.device.type == "cpu" and weight.shape[1] % 2 == 0:
                return self._nf4_rows(weight)
            packed, state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
            return bnb.dequantize_4bit(packed, state).__getitem__
        if quantization == "int8":
            # bitsandbytes quantizes from float16, whatever the checkpoint's dtype.
            rows, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
            return lambda index: bnb.int8_vectorwise_dequant(rows[index], absmax[index])
        return weight.__getitem__

    def _nf4_rows(self, weight: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """`dequantize_4bit(*quantize_4bit(weight))` of bitsandbytes on a CPU, bit for bit, by rows.

        Blocks of 64 values are quantized independently; only their scales are quantized together (double
        quantization). So the order is: all blocks, then the scales, then the values.
        """
        import bitsandbytes.functional as bnb
        import torch

        work = torch.empty(3, self.step * weight.shape[1])
        packed, scales = zip(*(_nf4(weight[index], work) for index in self.slices), strict=True)
        absmax = torch.cat(scales)
        offset = absmax.mean()
        absmax = bnb.dequantize_blockwise(*bnb.quantize_blockwise(absmax - offset, blocksize=_STATISTICS_BLOCK))
        absmax += offset
        split = absmax.split([len(scale) for scale in scales])
        parts = {index.start: part for index, *part in zip(self.slices, packed, split, strict=True)}
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default

        def rows(index: slice) -> torch.Tensor:
            values, scale = parts[index.start]
            return dequantize(values, scale.contiguous(), _NF4_BLOCK, "nf4", weight[index].shape, weight.dtype)

        return rows


def as_trained(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer's weight, shape (out, in), as training computed with it: quantized and dequantized again."""
    return TrainedWeight(weight, quantization, dtype).whole()


def _nf4(weight: torch.Tensor, work: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' `quantize_4bit` of whole rows: two values a byte, and the scale of each block of 64.

    The library's operator searches the 15 bounds between NF4's values weight by weight; counting the bounds below all
    weights at once, in reused memory, gives the same index several times as fast.

    Args:
        weight: rows of a layer.
        work: float32, shape (3, at least the number of weights); overwritten.
    """
    import torch
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

    count = weight.numel()
    if count % _NF4_BLOCK:  # a last, partial block is rounded differently
        return torch.ops.bitsandbytes.quantize_4bit.default(weight.contiguous(), _NF4_BLOCK, "nf4", torch.uint8)
    scaled, above, index = (part[:count] for part in work)
    scaled.copy_(weight.reshape(-1))
    absmax = torch.abs(scaled, out=above).view(-1, _NF4_BLOCK).amax(dim=1)
    scaled.view(-1, _NF4_BLOCK).mul_((1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    index.zero_()
    for bound in _get_4bit_quantize_bounds("nf4", weight.device)[0].tolist():
        index += torch.gt(scaled, bound, out=above)
    pairs = index.to(torch.uint8)
    return ((pairs[::2] << 4) | pairs[1::2]).unsqueeze(1), absmax
