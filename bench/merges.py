"""What each way of merging an adapter costs: the task, everything else, time and memory; then quantized, and served."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import small
from bench.measure import in_fresh_process
from bench.report import write_report
from cogpress import config, demo
from cogpress.data import prepare
from cogpress.data.prepare import Prepared
from cogpress.files import read_json, write_json
from cogpress.merge import general, merge
from cogpress.prompts import Row, answer_text, encode_example
from cogpress.quantize import calibrate
from cogpress.quantize import run as quantize
from cogpress.verify import distributions, parity, strength
from cogpress.verify import run as verify
from cogpress.weights import base, fetch, manifest, tensors
from examples import questions

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")

NAMES = {
    "usual": "the original weights (the usual merge)",
    "dequantized": "the base as training saw it",
    "rounded": "the same, embeddings rounded too",
    "balanced": "balanced",
}

SCHEME = "int4"
"""What each merge is quantized to afterwards."""


@dataclass(frozen=True)
class Case:
    """An adapter whose merges are measured."""

    settings: config.Config
    base_folder: Path
    adapter: Path
    learnt: Prepared
    """What it was trained on."""
    test: Prepared
    """Rows of the task to measure on, none of them among the others."""

    @property
    def rows(self) -> tuple[list[Row], list[Row]]:
        """Training rows and those held out from them, which the balanced merge needs."""
        return self.learnt.train, self.learnt.validation[: distributions.COMPARED_ROWS]


def run(out: Path, root: Path, adapter: Path, asked: int, console: Console, *, served: bool = True) -> dict[str, Any]:
    """Measure the merges of the worked example's adapter, and of one on a small base of another family.

    What is measured already is not measured again, so that an interrupted run goes on.

    Args:
        out: the JSON file to write; the merges are kept beside it.
        root: the project's folder.
        adapter: of the worked example.
        asked: questions to measure on.
        console: shows progress and the tables.
        served: quantize each merge, and serve all of them, too.
    """
    report = {}
    cases: dict[str, Callable[[], Case]] = {
        "the worked example": partial(of_the_example, root, out.parent / "data", adapter, asked),
        "a small Qwen 3": partial(of_a_small_base, root, out.parent / "small", asked, console),
    }
    for name, case in cases.items():
        console.print(name)
        found = case()
        work = out.parent / "merges" / manifest.fingerprint(found.adapter)[:12]
        report[name] = measure(found, work, console)
        if served:
            report[name]["afterwards"] = afterwards(found, work, root, console)
        for table in tables(name, report[name]):
            console.print(table)
        write_report(out, report)
    return report


def of_the_example(root: Path, folder: Path, adapter: Path, asked: int) -> Case:
    """An adapter of the worked example, and new questions of it."""
    settings = config.load(root / "model.yaml")
    base_folder = fetch.base(settings.base.source, root / ".cache")
    tokenizer, stops = base.tokenizer(base_folder), base.stop_ids(base_folder)
    folder.mkdir(parents=True, exist_ok=True)
    learnt, test = (
        prepare.prepare_as(
            settings.override({"validation_share": share}), path, tokenizer, stops, validation_path=None, skip_bad=False
        )
        for path, share in zip(
            questions.write(folder, demo.TRAIN_ROWS, asked, settings.train.seed),
            (settings.data.validation_share, 0.0),
            strict=True,
        )
    )
    return Case(settings, base_folder, adapter, learnt, test)


def of_a_small_base(root: Path, folder: Path, asked: int, console: Console) -> Case:
    """A small base that is trained from nothing, and an adapter that is trained on it."""
    base_folder = small.make(folder / "base", root)
    return Case(small.SETTINGS, base_folder, *small.adapter(base_folder, folder / "run", asked, console))


def measure(case: Case, work: Path, console: Console) -> dict[str, Any]:
    """Merge one adapter in four ways, and measure each on its task and on general text.

    Each merge is made in a fresh process, whose seconds and peak memory include loading; the balanced one's include the
    search for its strength. All are then measured on the same rows, against what training scored.

    Args:
        case: the adapter.
        work: takes the merges and what was measured.
        console: shows progress.
    """
    known = work / "measured.json"
    key = [manifest.fingerprint(case.adapter), general.key(None), [row.input_ids for row in case.test.train]]
    if known.is_file() and (saved := read_json(known))["key"] == key:
        return dict(saved["report"])
    makers: dict[str, Callable[..., None]] = {
        "usual": partial(_merge, onto="original"),
        "dequantized": partial(_merge, onto="dequantized"),
        "rounded": _rounded,
        "balanced": partial(_balanced, rows=case.rows, work=work / "balance"),
    }
    made = {}
    for name, make in makers.items():
        figures = work / f"{name}.json"
        if not figures.is_file() or manifest.read(work / name) is None:
            write_json(figures, in_fresh_process(_measured, make, case.base_folder, case.adapter, work / name))
        made[name] = read_json(figures)
        console.print(f"  {NAMES[name]}: {made[name]['seconds']:.0f} s, {made[name]['peak_memory_gb']:.2f} GB")
    tokenizer = base.tokenizer(case.base_folder)
    pad = tokenizer.pad_token_id or 0
    perplexity = partial(
        distributions.perplexity, rows=general.rows(general.pieces(tokenizer, "measure")), pad_token_id=pad
    )
    found = distributions.compare(
        partial(distributions.reference_model, case.base_folder, case.adapter),
        {name: partial(distributions.merged_model, work / name) for name in makers},
        case.test.train,
        pad,
        beside=perplexity,
    )
    report: dict[str, Any] = {
        "rows": len(case.test.train),
        "reference_right": _right(next(iter(found.values())).reference_scored),
        "base_general_perplexity": perplexity(distributions.merged_model(case.base_folder)),
        "merges": {
            name: {
                "mean_kl": one.mean_kl,
                "right": _right(one.scored),
                "general_perplexity": one.beside,
                **made[name],
            }
            for name, one in found.items()
        },
    }
    write_json(known, {"key": key, "report": report})
    return report


def afterwards(case: Case, work: Path, root: Path, console: Console) -> dict[str, Any]:
    """Quantize each merge to int4, and have vLLM answer the questions with each merge and each quantized one."""
    tokenizer = base.tokenizer(case.base_folder)
    test = case.test
    prompts = [encode_example(tokenizer, example) for example in test.train_examples]
    expected = [answer_text(tokenizer, row) for row in test.train]
    score, longest = verify.scorer(case.settings.verify.score), 16 + 2 * max(row.learnt for row in test.train)
    rows = general.rows(general.pieces(tokenizer, "measure"))
    report: dict[str, Any] = {}
    for name in NAMES:
        known = work / f"{name}-afterwards.json"
        if not known.is_file():
            folder = work / name
            source = calibrate.Source(folder, manifest.read(folder) or {}, work, case.settings)
            console.print(f"  {NAMES[name]}: {SCHEME}, vLLM")
            made = quantize.quantize(
                root, source, [SCHEME], lambda: case.learnt, console, out=work / f"{name}-quantized"
            )
            quantized = made[SCHEME].folder
            model = distributions.merged_model(quantized)
            perplexity = distributions.perplexity(model, rows, tokenizer.pad_token_id or 0)
            answered = {}
            for kind, weights in (("served", folder), ("served_int4", quantized)):
                found = parity.serve(weights, case.settings.serve, prompts, None, longest, work / "engine.log")
                pairs = zip(expected, found.answers, strict=True)
                answered[kind] = sum(bool(score(right, answer.text)) for right, answer in pairs)
            write_json(known, {"general_perplexity_int4": perplexity, **answered})
        report[name] = read_json(known)
    return report


def tables(name: str, report: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal."""
    right, before = report["reference_right"], report["base_general_perplexity"]
    title = (
        f"{name}. What training scored: {right} of {report['rows']} right. The base: general perplexity {before:.1f}."
    )
    table = Table("merged into", "task: mean KL", "right", "general perplexity", "seconds", "GB", title=title)
    for merged, one in report["merges"].items():
        table.add_row(
            NAMES[merged],
            f"{one['mean_kl']:.5f}",
            str(one["right"]),
            f"{one['general_perplexity']:.1f}",
            f"{one['seconds']:.0f}",
            f"{one['peak_memory_gb']:.2f}",
        )
    if "afterwards" not in report:
        return [table]
    served = Table("merged into", "vLLM: right", f"{SCHEME}: right", f"{SCHEME}: general perplexity")
    for merged, one in report["afterwards"].items():
        perplexity = f"{one['general_perplexity_int4']:.1f}"
        served.add_row(NAMES[merged], str(one["served"]), str(one["served_int4"]), perplexity)
    return [table, served]


def _right(scored: list[distributions.Scored]) -> int:
    return sum(all(one.most_likely) for one in scored)


def _measured(make: Callable[..., None], base_folder: Path, adapter: Path, target: Path) -> dict[str, float]:
    started = time.perf_counter()
    make(base_folder, adapter, target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux reports KiB
    return {"seconds": time.perf_counter() - started, "peak_memory_gb": peak}


def _merge(base_folder: Path, adapter: Path, target: Path, *, onto: Any) -> None:
    merge.merge(base_folder, adapter, target, onto=onto)


def _balanced(base_folder: Path, adapter: Path, target: Path, *, rows: tuple[list[Row], list[Row]], work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    found = strength.choose(base_folder, adapter, *rows, work)
    noted = {"balance": found.to_dict()}
    merge.merge(base_folder, adapter, target, onto=found.onto, correction=found.correction, noted=noted)


def _rounded(base_folder: Path, adapter: Path, target: Path) -> None:
    """The dequantized merge with NF4's rounding of the embeddings and the output layer, which training leaves alone."""
    from bitsandbytes import functional
    from safetensors.torch import save_file

    merge.merge(base_folder, adapter, target, onto="dequantized")
    stored = tensors.stored(target)
    files = {place.file for place in stored.values()}
    for path in files:
        content = {name: tensors.load(place, name) for name, place in stored.items() if place.file == path}
        for name, value in content.items():
            if name.endswith(_EMBEDDINGS):
                content[name] = functional.dequantize_nf4(*functional.quantize_nf4(value)).to(value.dtype)
        save_file(content, path, {"format": "pt"})
