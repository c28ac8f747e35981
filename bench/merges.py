"""What each way of merging an adapter costs: the task, everything else, time and memory."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import in_fresh_process
from bench.report import write_report
from cogpress import config, demo
from cogpress.data import prepare
from cogpress.merge import general, merge
from cogpress.prompts import Row
from cogpress.verify import distributions, strength
from cogpress.weights import base, fetch, tensors
from examples import questions

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")

NAMES = {
    "usual": "the original weights (the usual merge)",
    "dequantized": "the base as training saw it",
    "rounded": "the same, embeddings rounded too",
    "balanced": "balanced",
}


def of_the_example(out: Path, root: Path, adapter: Path, questions_asked: int, console: Console) -> dict[str, Any]:
    """`run` for an adapter of the worked example, on new questions of it."""
    settings = config.load(root / "model.yaml")
    base_folder = fetch.base(settings.base.source, root / ".cache")
    tokenizer, stops = base.tokenizer(base_folder), base.stop_ids(base_folder)
    with tempfile.TemporaryDirectory() as folder:
        files = questions.write(Path(folder), demo.TRAIN_ROWS, questions_asked, settings.train.seed)
        learnt, test = (
            prepare.prepare_as(
                settings.override({"validation_share": share}),
                path,
                tokenizer,
                stops,
                validation_path=None,
                skip_bad=False,
            )
            for path, share in zip(files, (settings.data.validation_share, 0.0), strict=True)
        )
        rows = learnt.train, learnt.validation[: distributions.COMPARED_ROWS]
        return run(out, base_folder, adapter, rows, test.train, Path(folder) / "merges", console)


def run(
    out: Path,
    base_folder: Path,
    adapter: Path,
    rows: tuple[list[Row], list[Row]],
    test: list[Row],
    work: Path,
    console: Console,
) -> dict[str, Any]:
    """Merge one adapter in four ways, and measure each on its task and on general text.

    Each merge is made in a fresh process, whose seconds and peak memory include loading; the balanced one's include the
    search for its strength. All are then measured on the same rows, against what training scored.

    Args:
        out: the JSON file to write.
        base_folder: the base.
        adapter: trained on it.
        rows: its training rows and those held out from them, which the balanced merge needs.
        test: rows of the task to measure on, none of them among the others.
        work: a folder for the merges.
        console: shows progress and the table.
    """
    makers: dict[str, Callable[..., None]] = {
        "usual": partial(_merge, onto="original"),
        "dequantized": partial(_merge, onto="dequantized"),
        "rounded": _rounded,
        "balanced": partial(_balanced, rows=rows, work=work / "balance"),
    }
    made = {}
    for name, make in makers.items():
        made[name] = in_fresh_process(_measured, make, base_folder, adapter, work / name)
        console.print(f"  {NAMES[name]}: {made[name]['seconds']:.0f} s, {made[name]['peak_memory_gb']:.2f} GB")
    tokenizer = base.tokenizer(base_folder)
    pad = tokenizer.pad_token_id or 0
    text = general.rows(general.pieces(tokenizer, "measure"))
    found = distributions.compare(
        partial(distributions.reference_model, base_folder, adapter),
        {name: partial(distributions.merged_model, work / name) for name in makers},
        test,
        pad,
    )
    report: dict[str, Any] = {
        "rows": len(test),
        "reference_right": _right(next(iter(found.values())).reference_scored),
        "base_general_perplexity": distributions.perplexity(distributions.merged_model(base_folder), text, pad),
        "merges": {
            name: {
                "mean_kl": one.mean_kl,
                "right": _right(one.scored),
                "general_perplexity": distributions.perplexity(distributions.merged_model(work / name), text, pad),
                **made[name],
            }
            for name, one in found.items()
        },
    }
    console.print(_table(report))
    write_report(out, report)
    return report


def _table(report: dict[str, Any]) -> Table:
    right, before = report["reference_right"], report["base_general_perplexity"]
    title = f"What training scored: {right} of {report['rows']} right. The base: general perplexity {before:.1f}."
    table = Table("merged into", "task: mean KL", "right", "general perplexity", "seconds", "GB", title=title)
    for name, one in report["merges"].items():
        table.add_row(
            NAMES[name],
            f"{one['mean_kl']:.5f}",
            str(one["right"]),
            f"{one['general_perplexity']:.1f}",
            f"{one['seconds']:.0f}",
            f"{one['peak_memory_gb']:.2f}",
        )
    return table


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
    merge.merge(base_folder, adapter, target, onto=found.onto, correction=found.correction)


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
