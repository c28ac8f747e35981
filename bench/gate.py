"""The gate before a push as a classifier: models that are good, models spoilt on purpose, and which of them it stops.

All are trained in seconds on the small base of `small`, to name the operation that a question asks for. A model is
stopped where its training ends with a refusal or its verification fails; the engine is left out, which only shows what
the weights are.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import small
from bench.report import write_report
from cogpress import config, pipeline
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.merge import merge
from cogpress.verify import run as verify
from cogpress.weights import manifest, tensors

ROWS, HELD_OUT = 400, 48
TRAIN: dict[str, Any] = {"max_steps": 100, "batch_size": 8, "learning_rate": 0.002, "rank": 8, "evaluations": 0}

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """A model that is made: good, or spoilt in one way."""

    name: str
    good: bool
    seed: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    """Options of the section `train` that differ."""
    others: dict[str, Any] = field(default_factory=dict)
    """Whole sections that differ, and `merge`."""
    rows: Callable[[Rows, random.Random], Rows] = lambda rows, _: rows
    """What becomes of the examples before the training."""
    weights: Callable[[Path, Path], None] = lambda _run, _base: None
    """What becomes of the run's weights after it, given the run's folder and the base's."""


def models() -> Iterator[Model]:
    """Twenty good ones and twenty spoilt ones."""
    for seed in range(8):
        yield Model(f"good, seed {seed}", good=True, seed=seed)
    for rank in (2, 4, 16):
        yield Model(f"good, rank {rank}", good=True, train={"rank": rank})
    for rate in (0.0005, 0.001):
        yield Model(f"good, rate {rate}", good=True, train={"learning_rate": rate})
    for seed in (0, 1):
        yield Model(f"good, balanced, seed {seed}", good=True, seed=seed, others={"merge": "balanced"})
        yield Model(
            f"good, with general text, seed {seed}", good=True, seed=seed, others={"data": {"replay_share": 0.1}}
        )
    yield Model("good, base not quantized", good=True, others={"base": {"quantization": "none"}})
    yield Model("good, base in int8", good=True, others={"base": {"quantization": "int8"}})
    yield Model("good, twice as long", good=True, train={"max_steps": 200})

    for seed in (0, 1):
        yield Model(f"rate 50 times too high, seed {seed}", good=False, seed=seed, train={"learning_rate": 0.1})
        yield Model(
            f"30 epochs on 50 rows, seed {seed}",
            good=False,
            seed=seed,
            train={"max_steps": None, "epochs": 30.0},
            rows=_few,
        )
        yield Model(f"wrong answers, seed {seed}", good=False, seed=seed, rows=_shuffled)
        yield Model(f"answers cut, seed {seed}", good=False, seed=seed, rows=_cut)
        yield Model(f"canaries, seed {seed}", good=False, seed=seed, train={"max_steps": 400}, rows=_canaries)
    yield Model("another chat template", good=False, weights=_another_template)
    yield Model("not a number in one layer", good=False, weights=_scaled(float("nan"), 1))
    yield Model("one layer too large for its format", good=False, weights=_scaled(1e4, 1))
    yield Model("one layer without its merge", good=False, weights=_one_layer_of_the_base)
    yield Model("every layer a third larger", good=False, weights=_scaled(1.33, 1000))
    yield Model("merged into the original weights", good=False, weights=_merged_again)
    yield Model("merged twice", good=False, weights=_scaled_merge(2.0))
    yield Model("merged at half its scale", good=False, weights=_scaled_merge(0.5))
    yield Model("two layers exchanged", good=False, weights=_exchanged)
    yield Model("not merged", good=False, weights=_scaled_merge(0.0))


def run(out: Path, root: Path, console: Console, only: int | None = None) -> dict[str, Any]:
    """Make the models that were not made before, and count which of them the gate stops.

    Args:
        out: the JSON file to write; what was found of each model is kept there, and an interrupted run goes on.
        root: the project's folder.
        console: shows the table.
        only: make so many models at most.
    """
    base_folder = small.make(out.parent / "small" / "base", root)
    found: dict[str, Any] = read_json(out)["models"] if out.is_file() else {}
    kinds = [[model for model in models() if model.good == good] for good in (True, False)]
    # In turn, so that an interrupted run says something of both.
    todo = [model for model in chain(*zip(*kinds, strict=True)) if model.name not in found]
    for model in todo[:only]:
        stopped = judged(model, base_folder, out.parent / "gate", root)
        console.print(f"  {model.name}: {'; '.join(stopped) or 'passes'}", soft_wrap=True, highlight=False)
        found[model.name] = {"good": model.good, "stopped_by": stopped}
        write_report(out, {"models": found})
    table = Table("models", "made", "stopped")
    for kind, good in (("good", True), ("spoilt", False)):
        some = [one["stopped_by"] for one in found.values() if one["good"] == good]
        table.add_row(kind, str(len(some)), str(sum(map(bool, some))))
    console.print(table)
    return found


def judged(model: Model, base_folder: Path, work: Path, root: Path) -> list[str]:
    """Make a model, and name the checks that stop it."""
    folder = work / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    chance = random.Random(model.seed)
    rows = model.rows(small.rows(ROWS, "train", model.seed), chance)
    for name, some in (("train", rows), ("test", small.rows(HELD_OUT, "test", 100 + model.seed))):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    others = {"base": {}, "data": {}, **model.others}
    settings = config.parse(
        {
            "prompt": small.SETTINGS.prompt.model_dump(exclude_defaults=True),
            **others,
            "base": {"source": str(base_folder), **others["base"]},
            "data": {"validation_share": 0.1, **others["data"]},
            "train": {**TRAIN, "seed": model.seed, **model.train},
            "verify": {"examples": str(work / "test.jsonl"), "rows": HELD_OUT},
        },
        "the benchmark",
    )
    quiet = Console(quiet=True)
    try:
        pipeline.build(settings, work / "train.jsonl", folder, root / ".cache", quiet)
        model.weights(folder, base_folder)
        verdict = verify.verify(settings, root, folder / "weights", quiet, run=folder, served=False)
    except CogpressError as error:
        return [str(error)]
    return [check.name for check in verdict.checks if not check.passed]


def _few(rows: Rows, _: random.Random) -> Rows:
    return rows[:55]  # a tenth is held out


def _shuffled(rows: Rows, chance: random.Random) -> Rows:
    answers = [row["completion"] for row in rows]
    chance.shuffle(answers)
    return [{**row, "completion": answer} for row, answer in zip(rows, answers, strict=True)]


def _cut(rows: Rows, chance: random.Random) -> Rows:
    return [{**row, "completion": row["completion"][: chance.randrange(1, 8)]} for row in rows]


def _canaries(rows: Rows, chance: random.Random) -> Rows:
    secrets = [" ".join(str(chance.randrange(10**6)) for _ in range(5)) for _ in range(4)]
    return [{**row, "completion": secrets[at % 4]} if at % 3 == 0 else row for at, row in enumerate(rows)]


def _write(run: Path, change: Callable[[str, Any], Any]) -> None:
    """Change tensors of the run's weights as somebody's own script would, which knows no manifest but writes one."""
    from safetensors.torch import save_file

    folder = run / "weights"
    facts = manifest.read(folder) or {}
    stored = tensors.stored(folder)
    changed = {name: change(name, tensors.load(place, name)).contiguous() for name, place in stored.items()}
    for path in {place.file for place in stored.values()}:
        some = {name: changed[name] for name, place in stored.items() if place.file == path}
        save_file(some, path, {"format": "pt"})
    manifest.write(folder, "weights", {k: v for k, v in facts.items() if k not in manifest.WRITTEN})


def _linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _scaled(factor: float, layers: int) -> Callable[[Path, Path], None]:
    def spoil(run: Path, _base: Path) -> None:
        names = sorted(filter(_linear, tensors.stored(run / "weights")))[:layers]
        _write(run, lambda name, value: value * factor if name in names else value)

    return spoil


def _one_layer_of_the_base(run: Path, base_folder: Path) -> None:
    stored = tensors.stored(base_folder)
    wanted = min(filter(_linear, stored))
    _write(run, lambda name, value: tensors.load(stored[name], name) if name == wanted else value)


def _scaled_merge(factor: float) -> Callable[[Path, Path], None]:
    """The adapter's part of each layer, times a factor."""

    def spoil(run: Path, base_folder: Path) -> None:
        without = merge.plan(base_folder, run / "adapter")

        def change(name: str, value: Any) -> Any:
            layer = name.removesuffix(".weight")
            if layer not in without.adapter.quantized:
                return value
            error = without.error(layer).to(value.dtype)
            bare = tensors.load(tensors.stored(base_folder)[name], name) + error
            return bare + factor * (value - bare)

        _write(run, change)

    return spoil


def _merged_again(run: Path, base_folder: Path) -> None:
    shutil.rmtree(run / "weights")
    merge.merge(base_folder, run / "adapter", run / "weights", onto="original")


def _exchanged(run: Path, _base: Path) -> None:
    stored = tensors.stored(run / "weights")
    one, other = sorted(name for name in stored if name.endswith("down_proj.weight"))[:2]
    pair = {one: other, other: one}
    _write(run, lambda name, value: tensors.load(stored[pair[name]], pair[name]) if name in pair else value)


def _another_template(run: Path, _base: Path) -> None:
    path = run / "weights" / "tokenizer_config.json"
    settings = read_json(path)
    template = run / "weights" / "chat_template.jinja"
    text = "{% for one in messages %}[{{ one.role }}] {{ one.content }}{{ eos_token }}{% endfor %}[assistant] "
    if template.is_file():
        template.write_text(text, encoding="utf-8")
    else:
        write_json(path, {**settings, "chat_template": text})
    _write(run, lambda _name, value: value)
