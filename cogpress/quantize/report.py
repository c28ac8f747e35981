"""Size, quality and speed of quantized and unquantized weights, as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cogpress.files import write_json
from cogpress.verify import parity
from cogpress.weights import manifest

Measure = Callable[[str, Path], Mapping[str, Any]]
"""From a scheme's name and folder to metrics, by the names of `Candidate`'s fields; missing ones are unknown."""


@dataclass(frozen=True)
class Candidate:
    """A folder of weights to choose from. None: not measured. KL is in nats per token, the score a share of answers."""

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
    """What is known of one folder; `metrics` is None if it was not measured."""
    known = {key: float(metrics[key]) for key in METRICS if metrics.get(key) is not None} if metrics else {}
    group = (manifest.read(folder) or {}).get("compression", {}).get("group_size")
    notes = [f"groups of {group}"] if group else []
    notes += ["not served on this machine"] if metrics is None else []
    notes += ["FAILED verification"] if manifest.state(folder) == "failed" else []
    return Candidate(name, str(folder), manifest.weights_bytes(folder), ", ".join(notes), **known)


def compare(
    folders: Mapping[str, Path], measure: Measure, run: Path, console: Console, *, unmeasured: Collection[str] = ()
) -> list[Candidate]:
    """Measure each folder, print the table, and write `quantization.json` and `quantization.png` into the run's folder.

    Args:
        folders: by scheme; the unquantized weights first.
        measure: takes a scheme's name and its folder.
        run: the run's folder.
        console: where the table goes.
        unmeasured: schemes of which only the size is shown.
    """
    found = [
        candidate(name, folder, None if name in unmeasured else measure(name, folder))
        for name, folder in folders.items()
    ]
    write_json(run / "quantization.json", [asdict(one) for one in found])
    from cogpress import plots  # drawing takes a second to import

    plots.quantization([asdict(one) for one in found], run / "quantization.png")
    console.print(table(found))
    console.print(f"Picture: {run / 'quantization.png'}   figures: {run / 'quantization.json'}")
    return found


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("score", "right answers", lambda value: f"{value:.1%}"),
    ("mean_kl", "mean KL", lambda value: f"{value:.5f}"),
    ("top1_agreement", "same top token", lambda value: f"{value:.1%}"),
    ("perplexity", "perplexity", lambda value: f"{value:.3f}"),
    ("stream_tokens_per_second", "tokens/s,\n1 stream", lambda value: f"{value:.0f}"),
    ("concurrent_tokens_per_second", f"tokens/s,\n{parity.STREAMS} streams", lambda value: f"{value:.0f}"),
)


def table(candidates: Sequence[Candidate]) -> Table:
    """One row for each folder; columns without a measurement are left out."""
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
