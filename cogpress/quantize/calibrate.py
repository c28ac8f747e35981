"""Calibration data: the rows that a run trained its weights on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogpress import config
from cogpress.data import prepare as data
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.train import run as training
from cogpress.weights import base, manifest


@dataclass(frozen=True)
class Source:
    """Weights, checked against their manifest, and the run that made them."""

    folder: Path
    facts: dict[str, Any]
    run: Path
    settings: config.Config

    @property
    def dtype(self) -> str:
        """What the weights are stored in, such as `bfloat16`: their name in comparisons with quantized ones."""
        if "compute_dtype" not in self.facts:
            return "unquantized"
        return str(base.stored_dtype(base.trained_dtype(self.facts))).removeprefix("torch.")


def read_source(folder: Path, run: Path | None) -> Source:
    """The weights to quantize; as `read_made`, and refuses those that are quantized already."""
    compression = _facts(folder).get("compression")
    settings = read_json(folder / "config.json")
    if compression or settings.get("quantization_config"):
        scheme = compression["scheme"] if compression else settings["quantization_config"].get("quant_method", "such")
        raise CogpressError(
            f"{folder} holds {scheme} weights already; quantizing them again would only make them worse. "
            "Name the weights that they were made from."
        )
    return read_made(folder, run)


def _facts(folder: Path) -> dict[str, Any]:
    facts = manifest.read(folder) if folder.is_dir() else None
    if facts is None or facts.get("kind") != "weights":
        raise CogpressError(
            f"{folder} holds no weights of cogpress. Name a run's weights, or make some: scripts/train."
        )
    return facts


def read_made(folder: Path, run: Path | None) -> Source:
    """Check weights, and find the run that made them.

    Args:
        folder: weights with a manifest.
        run: the run's folder; the one that `folder` lies in where not given.

    Raises:
        CogpressError: the weights are not cogpress's, or were changed since they were written; the run is missing, or
            is not the one that made them.
    """
    facts = _facts(folder)
    manifest.check(folder, facts)
    run = (
        run
        or (None if training.is_run_of(folder.parent, facts) else training.run_of(facts, folder.parent / "runs"))
        or folder.parent
    )
    if not (run / "key.json").is_file() or not (run / "config.json").is_file():
        raise CogpressError(
            f"{run} is not a run's folder, and the examples of the training are needed. "
            "Name the run with --run runs/NAME."
        )
    adapter = run / "adapter"
    made_by = facts.get("merge", {}).get("adapter")
    if adapter.is_dir() and made_by not in (None, manifest.fingerprint(adapter)):
        raise CogpressError(
            f"{folder} was not made from {adapter}: the adapter's hash differs. Name its run with --run."
        )
    saved = read_json(run / "config.json")
    return Source(folder, facts, run, config.parse(saved, str(run / "config.json")))


def prepare(source: Source, root: Path, examples: Path | None) -> data.Prepared:
    """The run's examples, tokenized and split as training did it.

    Args:
        source: the weights, whose folder has the base's tokenizer.
        root: what relative paths of examples start from.
        examples: the file that was trained on, where it is not where the run's configuration says.

    Raises:
        CogpressError: the examples are gone, or do not give the run's training rows.
    """
    settings = source.settings
    path = examples or (root / settings.data.train if settings.data.train else None)
    if path is None or not path.exists():
        raise CogpressError(
            f"The examples that {source.run} was trained on are not at {path}, and they are needed. "
            "Name them with --data FILE."
        )
    prepared = data.prepare_as(
        settings,
        path,
        base.tokenizer(source.folder),
        base.stop_ids(source.folder),
        validation_path=training.validation_file(settings, root),
        skip_bad=True,  # the hash below tells whether training did
    )
    trained = read_json(source.run / "key.json")["rows"]
    if training.run_key(settings, prepared, "")["rows"] != trained:
        raise CogpressError(
            f"{path} does not give the rows that {source.run} was trained on: it has changed since. "
            "Name the original examples with --data FILE, or train again."
        )
    return prepared


def choose_rows(prepared: data.Prepared, samples: int, seed: int) -> list[list[int]]:
    """Token ids of `samples` training rows chosen by the seed, never held-out ones; all if there are fewer."""
    rows = [row.input_ids for row in prepared.train]
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), min(samples, len(rows))))]
