"""Disk and memory that a training and the steps after it need, estimated before it starts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cogpress.config import Config
from cogpress.draft.table import ENTRIES
from cogpress.errors import CogpressError
from cogpress.plan import architecture, estimate, memory
from cogpress.plan.architecture import Architecture
from cogpress.plan.memory import gigabytes
from cogpress.prompts import NO_LOSS, Row
from cogpress.train.layers import Layers
from cogpress.verify import distributions, strength
from cogpress.weights import base, skeleton, tensors

CHECKPOINT = 12
"""Bytes of a checkpoint for each parameter of the adapter, in 32 bits: itself and AdamW's two states."""

CHECKPOINTS = 3
"""Checkpoints at once: two are kept while another is written."""

TABLES = 5
"""Tensors as large as a batch's log-probabilities that the comparison holds at once; 4.9 were measured."""

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def recomputes(config: Config, base_folder: Path, rows: Sequence[Row], free: float) -> bool:
    """Whether a training has to compute activations again in its backward pass, by the plan's formulas.

    Args:
        config: the configuration.
        base_folder: the base.
        rows: all that it computes.
        free: bytes of the GPU that nobody uses.
    """
    model = architecture.of(str(base_folder), base_folder)
    counted = {
        "tokens": sum(len(row.input_ids) for row in rows),
        "learnt_tokens": sum(label != NO_LOSS for row in rows for label in row.labels),
    }
    how = estimate.training_of(config, model, counted)
    return memory.checkpoints(model, replace(how, length=max(len(row.input_ids) for row in rows)), free)


@dataclass(frozen=True)
class Room:
    """Bytes that a training and the steps after it need.

    Attributes:
        weights: the merged weights.
        adapter: the adapter.
        corrections: what a balanced merge computes of all its strengths; 0 for other merges.
        draft: the table of the draft, at most.
        stored: the reference's log-probabilities, in the folder for temporary files.
        memory: of the comparison on a CPU, an estimate: the merged weights and a batch of log-probabilities.
    """

    weights: float
    adapter: float
    corrections: float
    draft: float
    stored: float
    memory: float

    def largest(self, *, tar: bool, copy: bool = False, freed: float = 0, stored: bool = True) -> dict[str, float]:
        """What is on the run's disk when most is, in bytes by part.

        Args:
            tar: whether weights and adapter are packed, too.
            copy: whether the weights are copied in the end.
            freed: bytes of earlier weights, which the new ones replace.
            stored: whether temporary files are on the same disk.
        """
        made = {"the adapter": self.adapter, "the weights": self.weights, "their draft": self.draft}
        compared = {"the comparison's log-probabilities": self.stored * stored}
        corrections = {"the corrections of the balanced merge": self.corrections}
        packed = {"the tar": sum(made.values()) * tar, "what they replace": -freed}
        moments = [
            {"the adapter": self.adapter, "the checkpoints": CHECKPOINTS * CHECKPOINT / 4 * self.adapter},
            made | corrections,
            made | compared | packed,
            made | {"their copy": self.weights * copy} | packed,
        ]
        if self.corrections:
            moments.append(
                {"the adapter": self.adapter, "a trial of the weights": self.weights, **corrections, **compared}
            )
        return max(moments, key=lambda parts: sum(parts.values()))

    def check(self, run: Path, *, tar: bool, copy: bool = False, replaced: Sequence[Path] = ()) -> str | None:
        """Check that the disk has room for all of it, before a training begins.

        Args:
            run: the run's folder.
            tar: whether weights and adapter are packed, too.
            copy: whether the weights are copied in the end, on the same disk.
            replaced: earlier weights and their tar, removed once the new weights are whole.

        Returns:
            a warning where the comparison may lack memory on this CPU.

        Raises:
            CogpressError: it has not.
        """
        temporary = Path(tempfile.gettempdir())
        same = _existing(run).stat().st_dev == temporary.stat().st_dev
        parts = self.largest(tar=tar, copy=copy, freed=sum(map(_size, replaced)), stored=same)
        need, free = sum(parts.values()), _free(run)
        if need > free:
            raise CogpressError(
                f"The training and what follows it take {gigabytes(need)} in {run} ({_listed(parts)}), "
                f"and {gigabytes(free)} are free there. Free some, or name a folder on another disk with --run."
            )
        if not same and self.stored > (free := _free(temporary)):
            raise CogpressError(
                f"The comparison after the training stores {gigabytes(self.stored)} in {temporary}, and "
                f"{gigabytes(free)} are free there. Free some, or name another folder in TMPDIR."
            )
        return self.caution()

    def caution(self) -> str | None:
        """A warning where the comparison may lack memory; None on a GPU, where training takes more."""
        free = _free_memory()
        if base.device().type != "cpu" or self.memory <= free:
            return None
        return (
            f"The comparison after the training takes about {gigabytes(self.memory)} of memory, and "
            f"{gigabytes(free)} are free: it may fail. The weights are finished by then, and scripts/verify compares "
            "them on a larger machine."
        )

    def notes(self, runs: Path) -> list[str]:
        """For a plan: the disk of a training on this machine, against what is free in the folder of the runs."""
        parts = self.largest(tar=False)
        need, free = sum(parts.values()), _free(runs)
        packed = sum(self.largest(tar=True).values())
        lacking = " That is too little: scripts/train would not begin." if need > free else ""
        told = (
            f"A training on this machine takes {gigabytes(need)} of disk beside its base ({_listed(parts)}), "
            f"{gigabytes(packed)} with --tar; {gigabytes(free)} are free.{lacking}"
        )
        return [told, caution] if (caution := self.caution()) else [told]


def of_files(folder: Path, chosen: Layers, settings: Config, rows: Sequence[Row]) -> Room:
    """The room for training a base whose files are here.

    Args:
        folder: the base.
        chosen: its layers that are trained.
        settings: `merge` and `train.rank` are used.
        rows: those that the comparison takes.
    """
    model, stored = skeleton.of(folder), tensors.stored(folder)

    def weights(name: str) -> int:
        outputs, inputs = skeleton.shape(model.get_submodule(name))
        return outputs * inputs

    elements = sum(one.bytes // _width(one) for one in stored.values())
    # An output layer that shares the embedding's tensor gets its own where an adapter changes it.
    elements += sum(weights(name) for name in chosen.adapted if f"{chosen.files.get(name, name)}.weight" not in stored)
    return _room(
        settings,
        elements,
        adapter=sum(settings.train.rank * sum(skeleton.shape(model.get_submodule(name))) for name in chosen.adapted),
        quantized=sum(map(weights, chosen.quantized)),
        vocabulary=model.get_input_embeddings().num_embeddings,
        labelled=sum(label != NO_LOSS for row in rows for label in row.labels[1:]),
    )


def of_architecture(model: Architecture, settings: Config, report: Mapping[str, Any]) -> Room:
    """The room for training a model of which only the architecture is known.

    Args:
        model: the architecture.
        settings: the configuration.
        report: a run's report of its data; without one, every compared row is taken for as long as `train.max_length`.
    """
    rows, learnt = report.get("train", 0) + report.get("validation", 0), report.get("learnt_tokens", 0)
    a_row = learnt / rows if rows and learnt else settings.train.max_length
    return _room(
        settings,
        model.parameters,
        adapter=model.adapter(settings.train.rank, settings.train.target_modules),
        quantized=model.linear_weights if settings.base.quantization != "none" else 0,
        vocabulary=model.vocabulary,
        labelled=round(a_row * distributions.COMPARED_ROWS),
    )


def _room(settings: Config, elements: int, *, adapter: int, quantized: int, vocabulary: int, labelled: int) -> Room:
    row, most = 4.0 * vocabulary, distributions.BATCH_TOKENS
    return Room(
        weights=1.01 * 2 * elements,  # as the merge asks for: 16 bits, and the files beside the tensors
        adapter=4.0 * adapter,
        corrections=2.0 * len(strength.STRENGTHS) * quantized if settings.merge == "balanced" else 0,
        draft=16.0 * ENTRIES + 5 * vocabulary,
        stored=min(row * labelled, distributions.STORED_BYTES + row * most),
        memory=elements * base.compute_dtype().itemsize + TABLES * row * min(labelled, most),
    )


def _width(one: tensors.Stored) -> int:
    """Bytes of an element, by its type's name, such as BF16 or I64."""
    digits = "".join(character for character in one.dtype if character.isdigit())
    return max(1, int(digits or 8) // 8)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder.absolute())).free


def _free_memory() -> float:
    free = float(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container, or one without a limit
        free = min(free, float(int(_CGROUP.read_text())))
    return free


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _listed(parts: Mapping[str, float]) -> str:
    """The parts that make a difference, the largest first."""
    shown = sorted(parts.items(), key=lambda part: -abs(part[1]))
    least = sum(parts.values()) / 100
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in shown if abs(size) > least)
