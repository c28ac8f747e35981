"""Safetensors files one tensor at a time: listing them, and writing one without holding it in memory.

The library writes a file only from tensors that are all in memory. The format is an 8-byte length, a JSON header, and
the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.weights.filenames import INDEX, SINGLE, safe_name

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantized, in the format's words."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of a value of each type."""

_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000
"""Bytes; the library's own limit."""


@dataclass(frozen=True)
class Stored:
    """A tensor's file, dtype (in the format's words, such as BF16), shape, size, and where in the file it begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int = 0


def stored(folder: Path, chosen: Sequence[Path] | None = None) -> dict[str, Stored]:
    """Every tensor of a folder's model by name, in the order of its files and of their data; or of the chosen files.

    Raises:
        CogpressError: as `files`; or a file is truncated, is no safetensors file (the library would refuse it too), or
            holds a tensor that another one holds too.
    """
    found: dict[str, Stored] = {}
    for path in files(folder) if chosen is None else chosen:
        header, start = _header(path)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = start + max((entry["data_offsets"][1] for _, entry in entries), default=0)
        if path.stat().st_size != end:
            raise CogpressError(
                f"{path} has {path.stat().st_size} bytes and its header says {end}: it is truncated. Fetch it again."
            )
        for name, entry in entries:
            if name in found:
                raise CogpressError(f"{path} holds {name}, which {found[name].file.name} holds too. Fetch them again.")
            low, high = entry["data_offsets"]
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), high - low, start + low)
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a file's header, and where its data begins."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unrepeated)
        notes = header.pop("__metadata__", None)
        if not all(isinstance(one, str) for one in ({} if notes is None else notes).values()):
            raise ValueError("its metadata are no texts")
        _check_layout(header)
    except (ValueError, struct.error, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CogpressError(f"{path} is no safetensors file ({str(error)[:200]}). Fetch it again.") from None
    return header, 8 + length


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return made


def _check_layout(header: dict[str, Any]) -> None:
    """Check what the library checks: tensors lie end to end, each of the bytes that its type and shape need.

    Raises:
        ValueError, KeyError, TypeError: they do not.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda one: one["data_offsets"]):
        (low, high), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if not isinstance(shape, list) or not isinstance(entry["data_offsets"], list):
            raise ValueError("a shape is no list")
        if not all(type(one) is int and one >= 0 for one in (low, high, *shape)) or low != end or high < low:
            raise ValueError("the offsets are wrong")
        if dtype not in _BITS:
            raise ValueError(f"the type {str(dtype)[:20]!r} is not known")
        if math.prod(shape) * _BITS[dtype] != (high - low) * 8:
            raise ValueError("the bytes of a tensor are not those of its shape")
        end = high


def files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's model is read from, sorted.

    They are the shards that its index names; without an index `model.safetensors`; else all that there are. Checkpoints
    come with others beside them, such as Mistral's own `consolidated.safetensors`, which hold the same model again.

    Raises:
        CogpressError: a shard is missing; or `model.safetensors` stands beside the shards, of which transformers would
            load one and vLLM the other.
    """
    single, named = folder / SINGLE, shards(folder)
    for name in named:
        if not (folder / name).is_file():
            raise CogpressError(f"{folder} lacks {name}, which {INDEX} names. Fetch the model again.")
    if named and SINGLE not in named and single.is_file():
        raise CogpressError(
            f"{folder} holds {SINGLE} beside the shards that {INDEX} names, and programs differ in which they load. "
            "Remove what is stale."
        )
    if named:
        return [folder / name for name in named]
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def shards(folder: Path) -> list[str]:
    """The files that a folder's index names; none where there is no index.

    Raises:
        CogpressError: it is no index, or names a file outside the folder.
    """
    try:
        names = read_json(folder / INDEX)["weight_map"].values()
        return [str(safe_name(str(name), str(folder))) for name in sorted(set(names))]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CogpressError(f"{folder / INDEX} is not an index of shards. Fetch the model again.") from None


def load(place: Stored, name: str) -> torch.Tensor:
    """Load one tensor. The file is mapped for it alone, so that no other page stays in memory."""
    from safetensors import safe_open

    with safe_open(place.file, framework="pt") as file:
        return file.get_tensor(name)


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype in the format's words."""
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names[dtype]


class Writer:
    """Writes one file: names and shapes first, then the tensors in that order, one at a time.

    Its sha256 is computed on the way, which saves reading the file again.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
        """
        Args:
            path: the file to write.
            layout: dtype (in the format's words), shape and bytes of each tensor, in the order of writing.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape, size) in layout.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._path = path
        self._left = list(layout)
        self._sizes = {name: size for name, (_, _, size) in layout.items()}
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._file = path.open("xb")
        self._put(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the layout, on the CPU."""
        import torch

        if not self._left or self._left[0] != name:
            raise ValueError(f"{name} is not the next tensor of {self._path.name}")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        if data.nbytes != self._sizes[name]:
            raise ValueError(f"{name} has {data.nbytes} bytes, not the {self._sizes[name]} of its layout")
        self._left.pop(0)
        self._put(memoryview(data))

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        """Finish the file and return its `sha256` and `bytes`, as a manifest records them."""
        if self._left:
            raise ValueError(f"{self._path.name} lacks {self._left[0]}")
        self._file.close()
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
