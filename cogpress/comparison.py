"""Size, quality and speed of quantized weights beside the unquantized ones, so that one can be picked by looking.

Knows which figures matter and how to show them; leaves measuring to whoever it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cogpress import demo, manifest, plots
from cogpress.data import Prepared
from cogpress.quantize import weights_bytes

Measure = Callable[[str, Path], Mapping[str, Any]]
"""From a scheme's name and its folder to metrics by the names of `Candidate`'s fields; those missing are not known."""


@dataclass(frozen=True)
class Candidate:
    """One folder of weights as a choice. None: not measured. KL is in nats per token, the score a share of answers."""

    name: str
    folder: str
    bytes: int
    note: str = ""
    mean_kl: float | None = None
    p99_kl: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    score: float | None = None
    stream_tokens_per_second: float | None = None
    concurrent_tokens_per_second: float | None = None


METRICS = tuple(name for name in Candidate.__dataclass_fields__ if name not in ("name", "folder", "bytes", "note"))


def candidate(name: str, folder: Path, metrics: Mapping[str, Any] | None) -> Candidate:
    """What is known of one folder; metrics of other names are left out, None stands for not measured."""
    known = {key: float(metrics[key]) for key in METRICS if metrics.get(key) is not None} if metrics else {}
    group = (manifest.read(folder) or {}).get("compression", {}).get("group_size")
    notes = [f"groups of {group}"] if group else []
    notes += ["not served on this machine"] if metrics is None else []
    return Candidate(name, str(folder), weights_bytes(folder), ", ".join(notes), **known)


def compare(
    folders: Mapping[str, Path],
    measure: Measure,
    run: Path,
    console: Console,
    *,
    key: Any = None,
    unmeasured: Collection[str] = (),
    fresh: bool = False,
) -> list[Candidate]:
    """Measure each folder, print the table, and write `quantization.json` and `quantization.png` into the run's folder.

    All are measured or none: speeds of different hours on one machine tell more of the hours than of the weights.

    Args:
        folders: by scheme; the unquantized weights first.
        measure: takes a scheme's name and its folder.
        run: the run's folder.
        console: where the table goes.
        key: what else decides the figures, JSON-serialisable; figures of the same key and weights are reused.
        unmeasured: schemes of which only the size is shown.
        fresh: measure again even so.
    """
    decides = {
        "weights": {name: [manifest.fingerprint(folder), verified(folder)] for name, folder in folders.items()},
        "unmeasured": sorted(unmeasured),
        "key": key,
    }
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    found = None if fresh else _saved(run / "quantization.json", digest)
    if found is None:
        found = [
            candidate(name, folder, None if name in unmeasured else measure(name, folder))
            for name, folder in folders.items()
        ]
        manifest.write_json(run / "quantization.json", {"key": digest, "weights": [asdict(one) for one in found]})
    plots.quantization([asdict(one) for one in found], run / "quantization.png")
    console.print(table(found))
    console.print(f"Picture: {run / 'quantization.png'}   figures: {run / 'quantization.json'}", soft_wrap=True)
    return found


def _saved(path: Path, digest: str) -> list[Candidate] | None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return [Candidate(**one) for one in saved["weights"]] if saved["key"] == digest else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("score", "right answers", lambda value: f"{value:.1%}"),
    ("mean_kl", "mean KL", lambda value: f"{value:.5f}"),
    ("top1_agreement", "same top token", lambda value: f"{value:.1%}"),
    ("perplexity", "perplexity", lambda value: f"{value:.3f}"),
    ("stream_tokens_per_second", "tokens/s,\n1 stream", lambda value: f"{value:.0f}"),
    ("concurrent_tokens_per_second", f"tokens/s,\n{demo.CONCURRENT} streams", lambda value: f"{value:.0f}"),
)


def table(candidates: Sequence[Candidate]) -> Table:
    """One row for each folder; columns that nobody measured are left out."""
    made = Table(title="What each scheme costs and gives", title_justify="left")
    made.add_column("weights", no_wrap=True)
    made.add_column("size", justify="right", no_wrap=True)
    shown = [column for column in _COLUMNS if any(getattr(one, column[0]) is not None for one in candidates)]
    for _, title, _ in shown:
        made.add_column(title, justify="right")
    if any(one.note for one in candidates):
        made.add_column("", overflow="fold")
    for one in candidates:
        values = [(getattr(one, key), text) for key, _, text in shown]
        cells = ["-" if value is None else text(value) for value, text in values]
        made.add_row(one.name, f"{one.bytes / 1e6:,.0f} MB", *cells, *([one.note] if one.note else []))
    return made


def verified(folder: Path) -> Mapping[str, Any] | None:
    """What verification found out about a folder of weights; None where it was not verified."""
    try:
        metrics = json.loads((folder / "verification.json").read_text(encoding="utf-8"))["metrics"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return metrics if isinstance(metrics, dict) else None


def served(
    root: Path, run: Path, questions: Sequence[dict[str, Any]], score: Callable[[str, str], bool], console: Console
) -> Measure:
    """Measures by serving a folder and asking it questions; where it was verified, quality is as verified."""

    def measure(name: str, folder: Path) -> Mapping[str, Any]:
        result = demo.served_once(root, name, folder, questions, score, run, console, fresh=True)
        return {
            "score": result.exact_match,
            **(verified(folder) or {}),
            "stream_tokens_per_second": result.stream_tokens_per_second,
            "concurrent_tokens_per_second": result.concurrent_tokens_per_second,
        }

    return measure


def questions(run: Path, prepared: Callable[[], Prepared], count: int) -> list[dict[str, Any]]:
    """Held-out questions of a run: its own test file where it has one, as the demonstration has, else validation."""
    test = run / "data" / "test.jsonl"
    if test.is_file():
        return [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()][:count]
    examples = [example for example in prepared().validation_examples if example.messages is not None]
    return [{"prompt": example.asked, "completion": example.answer} for example in examples[:count]]
