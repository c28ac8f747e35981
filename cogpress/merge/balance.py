"""The balanced merge: what quantization changed in the base is kept where the task needs it, and left out elsewhere.

W are a layer's original weights, Q = W + E the quantized ones that training saw, and BA is the adapter. Training
scored Q + BA; E makes the model worse at everything that was not trained. Over a layer's inputs x, the weights W' that
minimize

    mean over the task's x of |W'x - (Q + BA)x|²  +  g * mean over general text's x of |W'x - (W + BA)x|²

are W + BA + E C (C + gG)⁻¹, with C and G the means of x xᵀ over the two: with D = W' - W - BA the sum is
tr((D - E) C (D - E)ᵀ) + g tr(D G Dᵀ), and its derivative is zero where D (C + gG) = E C. A larger strength g keeps more
of what the base knew, and is further from what training scored. A little is added to the diagonal of C + gG, for the
directions that neither text has.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress import phases
from cogpress.files import new_file, read_json, write_json
from cogpress.merge.merge import MergePlan, Progress, ahead
from cogpress.weights import base, manifest, tensors

if TYPE_CHECKING:
    import torch

MOMENT_BYTES = 512 << 20
"""Second moments in memory at once, those of one block at least: a part of what training needs."""

DAMPING = 0.01
"""Share of the mean second moment that every direction is given beside its own, so that nothing is added to the weights
where neither text says anything: with 1e-6, corrections of some layers were thirteen times the whole error."""

_KEY = "key.json"


def corrections(
    planned: MergePlan,
    load: Callable[[], torch.nn.Module],
    task: Sequence[list[int]],
    general: Sequence[list[int]],
    strengths: Sequence[float],
    folder: Path,
    progress: Progress = lambda items, _total: items,
) -> Callable[[float, str], torch.Tensor]:
    """Compute E C (C + gG)⁻¹ for every quantized layer and strength; an interrupted computation is gone on with.

    Some blocks at a time: the model runs up to them once for each group, so that the second moments of few layers are
    in memory at once.

    Args:
        planned: the merge.
        load: loads the model that training scored.
        task: token ids of training rows.
        general: token ids of general text.
        strengths: the values of g.
        folder: takes a file for each layer.
        progress: wraps the rows of all groups, given how many there are.

    Returns:
        a function from a strength and the name of a layer to its correction, shape (outputs, inputs), on the CPU.
    """
    wanted = {
        "adapter": manifest.fingerprint(planned.adapter.folder),
        "rows": _digest([task, general]),
        "strengths": list(strengths),
    }
    if not _begun(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / _KEY, wanted)
    paths = {layer: folder / f"{layer}.safetensors" for layer in planned.adapter.quantized}
    missing = [group for group in _groups(planned) if not all(paths[layer].is_file() for layer in group)]
    if missing:
        total = len(missing) * (len(task) + len(general))
        ticks = iter(progress(range(total), total))
        tick = partial(next, ticks, None)
        phases.run("balanced merge", _compute, planned, load, missing, paths, (task, general), strengths, tick=tick)
        tick()  # lets a progress bar finish
    return partial(_read, tensors.stored(folder, list(paths.values())))


def _read(stored: dict[str, tensors.Stored], strength: float, layer: str) -> torch.Tensor:
    return tensors.load(stored[f"{layer}@{strength}"], f"{layer}@{strength}")


def kept(
    error: torch.Tensor, task: torch.Tensor, general: torch.Tensor | None, strengths: Sequence[float]
) -> list[torch.Tensor]:
    """E C (C + gG)⁻¹ for each strength, in float64: second moments span more magnitudes than float32 can be solved in.

    E C is multiplied first, once: solving for it is less work than for C where a layer narrows.

    Args:
        error: E, shape (outputs, inputs).
        task: C, shape (inputs, inputs).
        general: G, of the same shape; None where no general text got there.
        strengths: the values of g.
    """
    import torch

    task = task.double()
    wanted = (error.double() @ task).T
    found = []
    for strength in strengths:
        both = task.clone() if general is None else task + strength * general.double()
        both.diagonal().add_(DAMPING * both.diagonal().mean() + 1e-30)
        found.append(torch.cholesky_solve(wanted, torch.linalg.cholesky(both)).T)
    return found


def _begun(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        return bool(read_json(folder / _KEY) == wanted)
    except (FileNotFoundError, ValueError):
        return False


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _block(layer: str) -> str:
    """The decoder block of a layer, such as `model.layers.3`; the layer itself where it is in none."""
    found = re.match(r"(.*?\.\d+)\.", layer)
    return found.group(1) if found else layer


def _groups(planned: MergePlan) -> list[list[str]]:
    """The quantized layers, in groups of whole blocks whose second moments fit `MOMENT_BYTES`."""
    blocks: dict[str, list[str]] = {}
    for layer in sorted(planned.adapter.quantized, key=_natural):
        blocks.setdefault(_block(layer), []).append(layer)
    groups: list[list[str]] = []
    room = 0
    for layers in blocks.values():
        size = sum(2 * 4 * planned.shape(layer)[1] ** 2 for layer in layers)
        if not groups or size > room:
            groups.append([])
            room = MOMENT_BYTES
        groups[-1] += layers
        room -= size
    return groups


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _compute(
    planned: MergePlan,
    load: Callable[[], torch.nn.Module],
    missing: Sequence[list[str]],
    paths: Mapping[str, Path],
    rows: tuple[Sequence[list[int]], Sequence[list[int]]],
    strengths: Sequence[float],
    tick: Callable[[], object],
) -> None:
    from safetensors.torch import save_file

    model = load()
    for group in missing:
        found = {layer: _module(model, planned.adapter.module(layer)) for layer in group}
        last = _module(model, _block(planned.adapter.module(group[-1])))
        task, general = (_moments(model, found, last, some, tick) for some in rows)
        made = ahead(partial(_corrected, planned, task, general, strengths), group)
        for layer, corrected in zip(group, made, strict=True):
            with new_file(paths[layer]) as part:
                save_file(corrected, part)


def _corrected(
    planned: MergePlan,
    task: dict[str, torch.Tensor],
    general: dict[str, torch.Tensor],
    strengths: Sequence[float],
    layer: str,
) -> dict[str, torch.Tensor]:
    """A layer's correction for each strength; takes its second moments out, whose memory is needed."""
    import torch

    error = planned.error(layer)
    c, g = task.pop(layer, None), general.pop(layer, None)
    # An expert that no row of the task asked for needs nothing kept.
    values = [torch.zeros_like(error) for _ in strengths] if c is None else kept(error, c, g, strengths)
    pairs = zip(strengths, values, strict=True)
    return {f"{layer}@{strength}": value.to(planned.dtype).cpu().contiguous() for strength, value in pairs}


class _PastGroup(Exception):
    """Ends a pass after the last block whose inputs are wanted."""


def _moments(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    last: torch.nn.Module,
    rows: Sequence[list[int]],
    tick: Callable[[], object],
) -> dict[str, torch.Tensor]:
    """The mean of x xᵀ over the inputs of each layer that gets some, float32, shape (inputs, inputs).

    Rows run one at a time, because padding would count as input, and end behind the last block.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def adding(layer: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if layer not in sums:
                sums[layer] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
            sums[layer].addmm_(flat.T, flat)
            counts[layer] += len(flat)

        return add

    def past(*_: Any) -> None:
        raise _PastGroup

    with ExitStack() as hooked, torch.no_grad(), base.autocast(model.dtype):  # type: ignore[arg-type]
        for layer, module in layers.items():
            hooked.callback(module.register_forward_pre_hook(adding(layer)).remove)
        hooked.callback(last.register_forward_hook(past).remove)
        for row in rows:
            with suppress(_PastGroup):
                model(input_ids=torch.tensor([row], device=base.device()), use_cache=False)
            tick()
    return {layer: total.div_(counts[layer]) for layer, total in sums.items()}


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module of the base in peft's model; of a layer with an adapter, the base's own."""
    found = model.get_submodule(f"base_model.model.{name}")
    return getattr(found, "base_layer", found)
