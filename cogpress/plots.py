"""All plots, drawn without a display.

Figures are made directly and not with pyplot, whose current figure is global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

_BLUE, _ORANGE, _INK, _GRID = "#3b6ea8", "#c8553d", "#333333", "#e4e4e4"


def token_lengths(lengths: Sequence[int], max_length: int, path: Path) -> None:
    """Plot the length of the examples, and which of them `max_length` cuts off.

    Args:
        lengths: tokens per example, before anything is cut.
        max_length: tokens per training row.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure, axes = _figure()
    over = sum(length > max_length for length in lengths)
    # A limit far beyond every example, or one example of a hundred thousand tokens, would squeeze all bars into a
    # corner: the title alone then gives the limit, and the last bar takes all longer examples.
    usual = sorted(lengths)[int(0.99 * len(lengths))] if lengths else 1
    shown = max_length <= 4 * usual
    span = max(min(max(lengths, default=1), 2 * usual), max_length if shown else 1)
    width = -(-span // 60)
    # Bars end at max_length, so that none mixes what fits with what does not
    first = (max_length % width) - width
    edges = np.arange(first, span + width + 1, width) + 0.5
    longer = max(lengths, default=1) > edges[-1]
    counts, _ = np.histogram(np.minimum(np.asarray(lengths, dtype=np.int64), edges[-1] - 0.5), bins=edges)
    colours = [_ORANGE if edge > max_length else _BLUE for edge in edges[:-1]]
    axes.bar(edges[:-1], counts, width, align="edge", color=colours, edgecolor="white", linewidth=0.4)
    if shown:
        axes.axvline(max_length + 0.5, color=_ORANGE, linewidth=1.5, linestyle="--")
        right = max_length > 0.75 * span
        axes.annotate(
            f"max_length {max_length:,}",
            (max_length + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if right else 6, -6),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color=_ORANGE,
        )
    fits = f"{over:,} longer than {max_length:,} tokens" if over else f"all within {max_length:,} tokens"
    axes.set_title(f"{len(lengths):,} examples, {fits}", loc="left", color=_INK)
    axes.set_xlabel("example length (tokens)" + (", the last bar: all longer ones" if longer else ""))
    axes.set_ylabel("examples")
    axes.set_xlim(0, edges[-1] + span * 0.02)
    axes.set_ylim(0, max(1, int(counts.max())) * 1.12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.savefig(path, dpi=120)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, _styled(figure.add_subplot())


def _styled(axes: Axes) -> Axes:
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_INK)
    return axes


def losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot a run's training and validation loss by step.

    Args:
        rows: the rows of `metrics.jsonl`.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure, axes = _figure()
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    styled: list[tuple[list[tuple[int, float]], str, dict[str, Any]]] = [
        (training, "training", {"color": _BLUE, "linewidth": 1.4}),
        (validation, "validation", {"color": _ORANGE, "linewidth": 1.4, "marker": "o", "markersize": 5}),
    ]
    for points, name, style in styled:
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=f"{name}, {values[-1]:.4f} at the end", **style)
    axes.set_title(f"Loss over {max((row['step'] for row in rows), default=0):,} steps", loc="left", color=_INK)
    axes.set_xlabel("step")
    axes.set_ylabel("mean negative log-likelihood per answer token (nats)")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def merges(tried: Sequence[Mapping[str, Any]], chosen: float | None, path: Path) -> None:
    """Plot what merges do to the task against what they do to everything else, a point for each.

    Args:
        tried: `onto`, `strength`, `mean_kl` and `general_perplexity` of each merge.
        chosen: the strength that was taken; None for the dequantized base.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure, axes = _figure()
    least = 1e-5  # a merge that is what training scored has none, and the axis is logarithmic
    ordered = sorted(tried, key=lambda one: one["mean_kl"])
    axes.plot(
        [max(one["mean_kl"], least) for one in ordered],
        [one["general_perplexity"] for one in ordered],
        color=_GRID,
        linewidth=1.5,
        zorder=1,
    )
    for one in tried:
        taken = one["strength"] == chosen and one["onto"] != "original"
        taken = taken and (one["onto"] == "balanced") == (chosen is not None)
        names = {"original": "usual", "dequantized": "dequantized"}
        name = names.get(one["onto"]) or f"balanced, {one['strength']:g}"
        point = (max(one["mean_kl"], least), one["general_perplexity"])
        axes.scatter(*point, color=_ORANGE if taken else _BLUE, s=60 if taken else 36, zorder=2)
        axes.annotate(
            f"{name} (taken)" if taken else name,
            point,
            xytext=(8, 6),
            textcoords="offset points",
            color=_ORANGE if taken else _INK,
        )
    axes.set_xscale("log")
    axes.margins(x=0.18, y=0.15)
    axes.set_title("Each merge: the task, and everything else (lower is better for both)", loc="left", color=_INK)
    axes.set_xlabel("task: mean KL to what training scored, nats per answer token")
    axes.set_ylabel("perplexity of general text")
    figure.savefig(path, dpi=120)


def verification(
    kl: Sequence[float] | None,
    parity: Sequence[tuple[float, float]] | None,
    limits: Mapping[str, float],
    verdict: str,
    path: Path,
) -> None:
    """Plot the KL of each token to the reference, and the engine's log-probabilities against transformers'.

    Args:
        kl: KL of each answer token in nats; None where it was not measured.
        parity: log-probability by the engine and by transformers, of each token; None where it was not measured.
        limits: the checks' limits by name, drawn as lines.
        verdict: for the title.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = (_styled(axes) for axes in figure.subplots(1, 2))
    figure.suptitle(f"Verification {verdict}", x=0.01, ha="left", color=_INK)
    if kl:
        # A logarithmic axis has no zero.
        values = np.maximum(np.sort(np.asarray(kl)), 1e-9)
        left.plot(values, np.linspace(0, 1, len(values)), color=_BLUE, linewidth=1.6)
        left.set_xscale("log")
        for name, label in (("mean KL", "mean"), ("99th percentile KL", "99 %")):
            if name in limits:
                left.axvline(limits[name], color=_ORANGE, linewidth=1.2, linestyle="--")
                left.annotate(
                    f"limit of the {label} {limits[name]:g}", (limits[name], 0.02), xycoords=("data", "axes fraction"),
                    xytext=(-4, 0), textcoords="offset points", rotation=90, ha="right", va="bottom", color=_ORANGE,
                )  # fmt: skip
        left.axvline(float(np.mean(kl)), color=_BLUE, linewidth=1.2, linestyle=":")
        left.set_title(f"{len(kl):,} answer tokens, mean KL {np.mean(kl):.2g}", loc="left", color=_INK)
    _labelled(left, "KL to what training scored (nats, log)", "share of tokens up to there", measured=bool(kl))
    if parity:
        engine, reference = np.asarray(parity).T
        low = float(min(engine.min(), reference.min(), -1e-3)) * 1.05
        right.plot([low, 0], [low, 0], color=_GRID, linewidth=1.5)
        right.scatter(reference, engine, s=9, color=_BLUE, alpha=0.5, linewidths=0)
        difference = float(np.abs(engine - reference).mean())
        right.set_title(f"{len(parity):,} tokens, mean difference {difference:.2g}", loc="left", color=_INK)
    _labelled(right, "log-probability by transformers", "log-probability by the engine", measured=bool(parity))
    figure.savefig(path, dpi=110)


def _labelled(axes: Axes, across: str, up: str, *, measured: bool) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if not measured:
        axes.set_title("not measured: an earlier check failed", loc="left", color=_ORANGE)
        axes.set_xticks([])
        axes.set_yticks([])


_PANELS: tuple[tuple[str, str, float, str, tuple[tuple[str, str], ...]], ...] = (
    ("size", "weights (MB)", 1e-6, "{:,.0f}", (("bytes", _BLUE),)),
    ("quality", "right answers (%)", 100, "{:.1f}", (("score", _BLUE),)),
    ("distance from training", "mean KL per token (nats)", 1, "{:.5f}", (("mean_kl", _ORANGE),)),
    (
        "speed",
        "tokens per second",
        1,
        "{:,.0f}",
        (("stream_tokens_per_second", _BLUE), ("concurrent_tokens_per_second", _ORANGE)),
    ),
)
"""Panels: title, axis, factor from the figure to the axis, label, and bars by figure and colour."""


def quantization(candidates: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot size, quality and speed of each folder of weights, side by side.

    Args:
        candidates: figures by the names of `quantize.report.Candidate`; None is not drawn, nor a panel without figures.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    panels = [panel for panel in _PANELS if any(one.get(key) is not None for one in candidates for key, _ in panel[4])]
    figure = Figure(figsize=(3.4 * len(panels) + 0.6, 1.4 + 0.62 * len(candidates)), layout="constrained")
    FigureCanvasAgg(figure)
    places = range(len(candidates))
    for number, (title, unit, factor, label, bars) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        height = 0.7 / len(bars)
        largest = 0.0
        for index, (key, colour) in enumerate(bars):
            offset = (index - (len(bars) - 1) / 2) * height
            for place, one in zip(places, candidates, strict=True):
                if one.get(key) is None:
                    if index == 0:
                        axes.text(0, place, " not measured", va="center", color="#999999")
                    continue
                value = float(one[key]) * factor
                largest = max(largest, value)
                axes.barh(place + offset, value, height * 0.9, color=colour)
                axes.text(value, place + offset, " " + label.format(value), va="center", color=_INK)
        # Room for the labels right of the bars.
        axes.set_xlim(0, 1.3 * (largest or 1))
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        axes.set_yticks(places, [str(one["name"]) for one in candidates] if number == 0 else [])
        axes.set_title(title, loc="left", color=_INK, fontsize=11)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        if unit.endswith("(%)"):
            axes.set_xticks([0, 50, 100])
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#999999")
        axes.tick_params(colors=_INK, left=False)
        if len(bars) > 1:
            names = ("1 stream", "16 streams")
            marks = [Line2D([], [], color=colour, linewidth=6) for _, colour in bars]
            axes.legend(marks, names, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=2)
    figure.savefig(path, dpi=120)


def serving_curves(sides: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Plot throughput, time to first token and inter-token latency against streams, 1500 pixels wide.

    Args:
        sides: the figures at each number of `streams`, by name; at most three sides.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    whole: dict[str, Any] = {"linewidth": 1.8}
    dashed: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--"}
    drawn: tuple[tuple[str, str, float, tuple[tuple[str, dict[str, Any]], ...]], ...] = (
        ("throughput", "tokens per second, all streams", 1, (("tokens_per_second", whole),)),
        ("time to first token", "milliseconds", 1000, (("ttft_p50", whole), ("ttft_p99", dashed))),
        ("inter-token latency", "milliseconds", 1000, (("itl_p50", whole), ("itl_p99", dashed))),
    )
    streams = sorted({int(point["streams"]) for points in sides.values() for point in points})
    for axes, (title, unit, factor, curves) in zip(map(_styled, panels), drawn, strict=True):
        for (name, points), colour in zip(sides.items(), (_BLUE, _ORANGE, "#5b8c5a"), strict=False):
            for key, style in curves:
                values = [factor * point[key] for point in points]
                label = name if style is whole else None
                places = [point["streams"] for point in points]
                axes.plot(places, values, color=colour, marker="o", markersize=4.5, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(streams, [str(number) for number in streams])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_title(title, loc="left", color=_INK)
        axes.set_xlabel("streams at once")
        axes.set_ylabel(unit)
    panels[0].legend(frameon=False, loc="upper left")
    kinds = [Line2D([], [], color=_INK, label="50th percentile", **whole)]
    kinds.append(Line2D([], [], color=_INK, label="99th percentile", **dashed))
    panels[1].legend(handles=kinds, frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)


def drafts(ratios: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot how many times faster each draft makes each load than none.

    Args:
        ratios: by draft and load; `none` is the line at 1.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = _styled(figure.subplots())
    shown = {name: values for name, values in ratios.items() if name != "none"}
    loads = list(ratios["none"])
    width = 0.8 / len(shown)
    for number, ((name, values), colour) in enumerate(zip(shown.items(), (_ORANGE, _BLUE, "#5b8c5a"), strict=False)):
        places = [at - 0.4 + width * (number + 0.5) for at in range(len(loads))]
        bars = axes.bar(places, [values[load] for load in loads], width * 0.92, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, color=_INK, padding=2)
    axes.axhline(1, color=_INK, linewidth=1)
    axes.set_xticks(range(len(loads)), [f"{load} stream{'s' * (not load.endswith(' 1'))}" for load in loads])
    axes.set_ylabel("times the speed without a draft")
    axes.set_title("What a draft gains", loc="left", color=_INK)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)


_PARTS = {
    "weights": _BLUE, "gradients": "#8fb3d9", "optimizer": "#5b8c5a", "activations": _ORANGE, "logits": "#e0a08f",
    "cache": "#b58a3c", "overhead": "#aaaaaa",
}  # fmt: skip


def plan(
    bars: Sequence[tuple[str, Mapping[str, float]]],
    machines: Sequence[tuple[str, float]],
    curves: tuple[str, Sequence[tuple[float, Any, Any]]] | None,
    requests: float,
    name: str,
    path: Path,
) -> None:
    """Plot the memory of each way to train and serve against that of GPUs, and the cost by requests an hour.

    Args:
        bars: label, and gigabytes by part.
        machines: GPUs by name, with their gigabytes.
        curves: the hardware's name, and its cost at each rate, serverless and always on; None where that is not known.
        requests: per hour, marked on the curves.
        name: the model's, for the title.
        path: the PNG, replaced if it exists; its folder must exist.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = (_styled(axes) for axes in figure.subplots(1, 2, width_ratios=(1.25, 1)))
    figure.suptitle(f"Plan of {name}", x=0.01, ha="left", color=_INK)
    totals = [sum(parts.values()) for _, parts in bars]
    for part, colour in _PARTS.items():
        starts = [sum(parts.get(one, 0) for one in list(_PARTS)[: list(_PARTS).index(part)]) for _, parts in bars]
        widths = [parts.get(part, 0) for _, parts in bars]
        left.barh(range(len(bars)), widths, 0.7, left=starts, color=colour, label=part)
    for place, total in enumerate(totals):
        left.text(total, place, f" {total:,.1f}", va="center", color=_INK)
    span = 1.15 * max(totals, default=1)
    # One line for GPUs of the same memory.
    sizes: dict[float, list[str]] = {}
    for machine, size in machines:
        sizes.setdefault(size, []).append(machine)
    for size, names in sizes.items():
        if size < span:
            left.axvline(size, color=_INK, linewidth=1.1, linestyle="--")
            shown = ", ".join(names).replace("Nvidia ", "")
            left.annotate(shown, (size, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="center", va="bottom", fontsize=8, color=_INK)  # fmt: skip
    left.set_yticks(range(len(bars)), [label for label, _ in bars])
    left.set_ylim(len(bars) - 0.4, -0.6)
    left.set_xlim(0, span)
    left.set_xlabel("GB of GPU memory")
    left.set_title("memory; training with checkpointing", loc="left", color=_INK, pad=20)
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(_PARTS), fontsize=8,
                columnspacing=1, handlelength=1)  # fmt: skip
    if curves is None:
        right.set_title("cost not known", loc="left", color=_ORANGE)
    else:
        machine, points = curves
        rates = [rate for rate, _, _ in points]
        right.plot(rates, [one.per_month for _, one, _ in points], color=_BLUE, linewidth=1.8, label="serverless")
        right.plot(rates, [one.per_month for _, _, one in points], color=_ORANGE, linewidth=1.8, label="always on")
        right.axvline(requests, color=_INK, linewidth=1, linestyle=":", label=f"{requests:,.0f} requests an hour")
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("requests an hour")
        right.set_ylabel("US dollars a month")
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        right.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        right.set_title(f"cost on {machine}", loc="left", color=_INK, pad=20)
        waits = right.twinx()
        waits.plot(rates, [100 * one.cold for _, one, _ in points], color="#888888", linewidth=1.2, linestyle="--")
        waits.set_ylim(0, 105)
        waits.set_ylabel("requests that wait for a start, serverless (%)", color="#888888")
        waits.spines["top"].set_visible(False)
        right.plot([], [], color="#888888", linewidth=1.2, linestyle="--", label="requests that wait")
        right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.04))
    figure.savefig(path, dpi=110)
