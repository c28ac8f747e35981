"""The faithful merge: an adapter folded into the weights that training saw, one tensor at a time.

A QLoRA adapter is trained on the quantized base and corrects its rounding errors too. Added to the original weights, it
would correct errors that are not there. So each quantized layer is quantized and dequantized again exactly as in
training, and the update is added to that, in float32.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cogpress.config import Merge
from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, write_json
from cogpress.merge import adapter
from cogpress.merge.adapter import LoraAdapter
from cogpress.merge.dequantize import TrainedWeight, as_trained
from cogpress.weights import base, manifest, skeleton, tensors
from cogpress.weights.filenames import INDEX, copy_serving_files, tokenizer_files, tokenizer_folder

if TYPE_CHECKING:
    import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps the items of a loop, given how many there are."""

_WORKERS = 4
"""The most tensors computed, and so in memory, at once on a CPU."""

_EMBEDDING = "model.embed_tokens.weight"
"""The tensor that an output layer shares where the two are tied."""


@dataclass(frozen=True)
class Output:
    """One tensor to write, made from the base's tensor `source`, usually of the same name."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do, checked before anything is written."""

    adapter: LoraAdapter
    stored: dict[str, tensors.Stored]
    outputs: list[Output]
    onto: Merge
    compute: torch.dtype
    dtype: torch.dtype
    untied: bool
    vocabulary: int | None
    """The rows of a resized embedding."""
    correction: Callable[[str], torch.Tensor] | None = None
    """Of a layer, by its name: what the balanced merge adds to its original weights beside the adapter."""

    def shape(self, module: str) -> tuple[int, ...]:
        """A layer's (outputs, inputs)."""
        shape = self.stored[f"{module}.weight"].shape
        return shape[::-1] if module in self.adapter.transposed else shape

    def error(self, module: str) -> torch.Tensor:
        """What quantization changed in a layer, float32, shape (outputs, inputs), where the model computes."""
        weight = tensors.load(self.stored[f"{module}.weight"], f"{module}.weight").to(self.compute)
        weight = (weight.T.contiguous() if module in self.adapter.transposed else weight).to(base.device())
        return as_trained(weight, self.adapter.quantization, self.compute).float() - weight.float()

    def value(self, output: Output) -> torch.Tensor:
        """One merged tensor, on the CPU.

        Raises:
            CogpressError: it is not finite.
        """
        import torch

        tensor = tensors.load(self.stored[output.source], output.source)
        if not tensor.is_floating_point():
            return tensor
        # Training casts the checkpoint to its compute dtype first, and quantizes that.
        tensor = tensor.to(self.compute)
        module = output.name.removesuffix(".weight")
        quantized = module in self.adapter.quantized and self.onto == "dequantized"
        corrected = module in self.adapter.quantized and self.onto == "balanced"
        touched = output.name in self.adapter.touched
        if not quantized and not corrected and not touched:
            return tensor.to(self.dtype)
        replacement = self.adapter.replacement(output.name)
        turned = module in self.adapter.transposed and tensor.ndim == 2 and replacement is None
        tensor = (tensor if replacement is None else replacement).to(base.device())
        tensor = tensor.T.contiguous() if turned else tensor
        compute = self.compute
        if corrected and self.correction is not None:
            tensor, compute = tensor.float() + self.correction(module).to(tensor.device), torch.float32
        trained = TrainedWeight(tensor, self.adapter.quantization if quantized else "none", compute)
        merged = self._merged(output.name, trained) if touched else trained.whole().to(self.dtype)
        return (merged.T.contiguous() if turned else merged).cpu()

    def _merged(self, name: str, trained: TrainedWeight) -> torch.Tensor:
        import torch

        merger = self.adapter.merger(name, trained.device)
        out = torch.empty(trained.shape, dtype=self.dtype, device=trained.device)
        work = torch.empty((trained.step, *trained.shape[1:]), device=trained.device)
        for index in trained.slices:
            rows = trained.rows(index)
            out[index] = merger(work[: len(rows)].copy_(rows), index)
            if not torch.isfinite(out[index]).all():  # after the cast: float16 ends at 65,504
                raise CogpressError(
                    f"{name} is not finite after the merge: the training diverged. Nothing is written; train with a "
                    "lower learning rate."
                )
        return out


def plan(base_folder: Path, adapter_folder: Path, onto: Merge = "dequantized", *, alone: bool = False) -> MergePlan:
    """Check that an adapter and a base belong together, and list what merging them will write.

    Args:
        base_folder: the base.
        adapter_folder: an adapter that was trained on it.
        onto: what to merge into.
        alone: leave the adapter out, and write the base as its training saw it.

    Raises:
        CogpressError: the adapter was trained on another base or does not fit it, or something cannot be merged
            exactly.
    """
    found = adapter.read(adapter_folder)
    if alone:
        found = replace(found, layers={}, replaced={}, tokens={})
    if manifest.fingerprint(base_folder) != found.fingerprint:
        raise CogpressError(
            f"{adapter_folder} was trained on another base than {base_folder}: the weights' hashes differ. "
            f"Name the base that it was trained on ({found.facts['base']['source']})."
        )
    config = read_json(base_folder / "config.json")
    skeleton.refuse_quantized(config, str(base_folder))
    stored = tensors.stored(base_folder)
    sources = {name: name for name in stored}
    tied = bool((config.get("text_config") or config).get("tie_word_embeddings", config.get("tie_word_embeddings")))
    if tied:
        found = _still_tied(found, sources)
    untied = tied and _untie(found, sources, base_folder)
    vocabulary = _check_fit(found, {name: stored[source] for name, source in sources.items()})
    compute = base.trained_dtype(found.facts)
    dtype = base.stored_dtype(compute)
    place = {name: at for at, name in enumerate(stored)}
    order = sorted(sources, key=lambda name: place[sources[name]])  # read and write the files front to back
    outputs = []
    for name in order:
        held = stored[sources[name]]
        held = replace(held, shape=found.shape(name)) if name in found.replaced else held
        outputs.append(_output(name, held, sources[name], dtype))
    return MergePlan(found, stored, outputs, onto, compute, dtype, untied, vocabulary)


def _output(name: str, place: tensors.Stored, source: str, dtype: torch.dtype) -> Output:
    if place.dtype not in tensors.FLOATS:
        if place.dtype.startswith("F"):
            raise CogpressError(f"{place.file} holds {name} in {place.dtype}: it is quantized. Name its original.")
        return Output(name, source, place.shape, place.dtype, place.bytes)
    size = math.prod(place.shape) * dtype.itemsize
    return Output(name, source, place.shape, tensors.dtype_name(dtype), size)


def _still_tied(found: LoraAdapter, sources: dict[str, str]) -> LoraAdapter:
    """The adapter without an output layer that it holds only because it saved a resized embedding.

    peft saves both then, and they are one tensor; modules that it trains whole are copies of their own.
    """
    head = "lm_head.weight"
    if head in sources or head not in found.replaced or found.saved & {"lm_head", "embed_tokens"}:
        return found
    import torch

    own, embedding = found.replacement(head), found.replacement(_EMBEDDING)
    if own is None or embedding is None or not torch.equal(own, embedding):
        return found
    return replace(found, replaced={name: held for name, held in found.replaced.items() if name != head})


def _untie(found: LoraAdapter, sources: dict[str, str], base_folder: Path) -> bool:
    """Give the output layer its own tensor if it shares the embedding's and training changed one of the two.

    A checkpoint with tied embeddings holds one tensor; peft trains each layer separately.
    """
    head, embedding = "lm_head.weight", _EMBEDDING
    # Rows of single tokens change in both, and so does an embedding that was only resized.
    resized = embedding in found.replaced and not found.saved and head not in found.touched
    only = {embedding} if resized and embedding.removesuffix(".weight") not in found.layers else set()
    if not (found.touched - found.tokens.keys() - only) & {head, embedding} or head in sources:
        return False
    if embedding not in sources:
        raise CogpressError(
            f"Cannot merge {found.folder} exactly: it changes embeddings that {base_folder} ties under unknown names. "
            "Train without the embedding and the output layer."
        )
    sources[head] = embedding
    return True


def merge(
    base_folder: Path,
    adapter_folder: Path,
    target: Path,
    *,
    onto: Merge = "dequantized",
    alone: bool = False,
    progress: Progress = lambda items, _total: items,
    facts: dict[str, Any] | None = None,
    add: Callable[[Path], object] | None = None,
    correction: Callable[[str], torch.Tensor] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write a folder of weights with a manifest, all or nothing.

    Few tensors are in memory at once, and one is written while others are computed. Uses a GPU where there is one.

    Args:
        base_folder: the base that the adapter was trained on, as safetensors.
        adapter_folder: a run's adapter.
        target: the folder to write; replaced when the merge is complete.
        onto: `dequantized` for the base as training saw it, `original` for the weights before quantization, `balanced`
            for these with `correction`.
        alone: write the base alone, to serve adapters on.
        progress: wraps the tensors, given how many there are.
        facts: more for the manifest.
        add: called with the folder before it is complete, to write more files into it.
        correction: as in `MergePlan`.
        noted: more for the manifest's `merge`.

    Returns:
        the manifest.

    Raises:
        CogpressError: the adapter was trained on another base, does not fit it, or cannot be merged exactly, or the
            disk has no room; nothing is written.
    """
    if onto == "balanced" and correction is None:
        raise CogpressError(
            "A balanced merge needs the examples of the training, so scripts/train makes it. Give --onto dequantized "
            "or --onto original."
        )
    planned = replace(plan(base_folder, adapter_folder, onto, alone=alone), correction=correction)
    size = sum(output.bytes for output in planned.outputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.01 * size:
        raise CogpressError(f"{target} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Free some there.")
    with new_folder(target) as part:
        written = _write(planned, part, progress)
        _copy_settings(base_folder, part, planned)
        if add is not None:
            add(part)
        return manifest.write(
            part,
            "weights",
            {
                "base": planned.adapter.facts["base"],
                "quantization": planned.adapter.quantization,
                "compute_dtype": planned.adapter.facts["compute_dtype"],
                "merge": {
                    "onto": onto,
                    "layers": len(planned.adapter.layers),
                    "adapter": None if alone else manifest.fingerprint(adapter_folder),
                    **(noted or {}),
                },
                # Adapters that share a base have prompts of their own.
                **({} if alone else {"prompt": planned.adapter.facts["prompt"]}),
                **(facts or {}),
            },
            known=written,
        )


def asked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What weights were made from, by their manifest: `onto`, which for a balanced merge may have become the
    dequantized base, the `adapter`, and the general `text` of a balanced one."""
    found = facts["merge"]
    onto = found.get("asked") or found.get("onto")
    return {"onto": onto, "adapter": found.get("adapter"), "text": found.get("text", False)}


def write_base(
    base_folder: Path,
    adapter_folder: Path,
    target: Path,
    progress: Progress = lambda items, _total: items,
) -> dict[str, Any]:
    """Write the base as an adapter was trained on it, quantized and dequantized, to serve adapters on.

    Args:
        base_folder: the base, as safetensors.
        adapter_folder: an adapter that was trained on it.
        target: the folder to write.
        progress: wraps the tensors, given how many there are.

    Returns:
        the manifest; `shared_base` is the `base_key` of the adapters that the base is for.

    Raises:
        CogpressError: they do not belong together; nothing is written.
    """
    key = adapter.read(adapter_folder).base_key
    return merge(base_folder, adapter_folder, target, alone=True, progress=progress, facts={"shared_base": key})


def _check_fit(found: LoraAdapter, places: dict[str, tensors.Stored]) -> int | None:
    """Refuse adapted or quantized layers that are no tensors of the checkpoint, or of another shape.

    Returns:
        the rows of the embedding and the output layer where training resized them.
    """
    resized = set()
    for name in sorted(found.touched | {f"{module}.weight" for module in found.quantized}):
        if name not in places:
            raise CogpressError(
                f"Cannot merge {found.folder} exactly: it changes {name}, and the base's files hold no tensor of that "
                "name. Name the base that it was trained on."
            )
        if name in found.replaced and name.removesuffix(".weight") in found.quantized:
            raise CogpressError(f"Cannot merge {found.folder} exactly: it saved all of {name}, quantized.")
        if name not in found.touched:
            continue
        shape, wanted = places[name].shape, found.shape(name)
        rows = name in found.replaced and adapter.is_embedding(name) and shape[1:] == wanted[1:]
        some = name in found.tokens and shape[1:] == wanted[1:] and max(found.tokens[name][1], default=0) < shape[0]
        if rows and shape != wanted:
            resized.add(wanted[0])
        elif shape != wanted and not some:
            raise CogpressError(
                f"{name} is {list(shape)} in the base and {list(wanted)} in the adapter. "
                "Name the base that it was trained on."
            )
    if not resized:
        return None
    rows_of = {
        name: found.shape(name)[0] if name in found.replaced else place.shape[0] for name, place in places.items()
    }
    if len({rows for name, rows in rows_of.items() if adapter.is_embedding(name)}) > 1:
        raise CogpressError(
            f"Cannot merge {found.folder} exactly: it resized the embedding or the output layer and holds only one of "
            "them. Save both with the adapter: modules_to_save=['embed_tokens', 'lm_head']."
        )
    return int(resized.pop())


def _write(planned: MergePlan, part: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the merged shards under the base's file names, and return the sha256 and bytes of each."""
    written: dict[str, dict[str, Any]] = {}
    shards: dict[str, list[Output]] = {}
    for output in planned.outputs:
        shards.setdefault(planned.stored[output.source].file.name, []).append(output)
    computed = iter(progress(ahead(planned.value, planned.outputs), len(planned.outputs)))
    for shard, outputs in shards.items():
        layout = {output.name: (output.dtype, output.shape, output.bytes) for output in outputs}
        with tensors.Writer(part / shard, layout) as writer:
            for output in outputs:
                writer.write(output.name, next(computed))
            written[shard] = writer.close()
    next(computed, None)  # lets a progress bar finish
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.bytes for output in planned.outputs)},
            "weight_map": {output.name: shard for shard, outputs in shards.items() for output in outputs},
        }
        write_json(part / INDEX, index)
    return written


def ahead(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """`map`, some items ahead, so that tensors are computed while others are hashed and written.

    On a CPU one thread computes each tensor, several at a time: its steps are too short to parallelize.
    """
    import torch

    cpu = base.device().type == "cpu"
    workers = min(_WORKERS, len(os.sched_getaffinity(0))) if cpu else 1
    threads = torch.get_num_threads()
    if cpu:
        torch.set_num_threads(1)
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for one in pending:
                one.cancel()
            torch.set_num_threads(threads)


def _copy_settings(base_folder: Path, part: Path, planned: MergePlan) -> None:
    copy_serving_files(base_folder, part)
    if tokenizer_folder(base_folder, planned.adapter.folder) != base_folder:
        for name in tokenizer_files(part):
            (part / name).unlink()
        copy_serving_files(planned.adapter.folder, part)
    config = read_json(part / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(planned.dtype).removeprefix("torch.")
    if planned.untied:
        config["tie_word_embeddings"] = False
    if planned.vocabulary is not None:
        for section in (config, config.get("text_config") or {}):
            if "vocab_size" in section:
                section["vocab_size"] = planned.vocabulary
    write_json(part / "config.json", config)
