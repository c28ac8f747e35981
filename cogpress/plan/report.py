"""A plan as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cogpress import config, plots
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json
from cogpress.plan import architecture, cost, hardware, room
from cogpress.plan import estimate as planning
from cogpress.plan.architecture import Architecture
from cogpress.plan.cost import Running
from cogpress.plan.estimate import Estimate
from cogpress.plan.hardware import Machine
from cogpress.plan.memory import Memory, gigabytes
from cogpress.train import layers
from cogpress.weights import tensors

NAME = "plan.json"
PICTURE = "plan.png"

RATES = tuple(10 ** (power / 4) for power in range(21))
"""Requests per hour on the plot: from one to a hundred thousand."""

_METHODS = {"full": "full", "lora": "LoRA", "int8": "LoRA on int8", "nf4": "QLoRA (nf4)"}


def changed(settings: Config, asked: Mapping[str, Any], speeds: Sequence[str], model: str | None) -> Config:
    """The configuration, overridden by the command's options.

    Args:
        settings: the configuration.
        asked: options of the section `plan`, by name.
        speeds: measured output tokens per second, as `SKU=TOKENS`.
        model: a source that replaces the base's.

    Raises:
        CogpressError: an option is out of bounds, or a speed is malformed.
    """
    data = settings.model_dump()
    data["plan"] |= asked
    for pair in speeds:
        sku, equals, number = pair.partition("=")
        try:
            data["plan"]["tokens_per_second"][sku] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise CogpressError(f"--speed {pair} must have the form SKU=TOKENS, such as gpu-l40s=900.")
    if model is not None:
        data["base"]["source"] = model
    return config.parse(data, "What was given")


def of_project(settings: Config, root: Path, model: Architecture) -> Estimate:
    """Plan with the hardware of `model.yaml` and the account, and with the run's report of its data.

    Where the base's files are here, what training would refuse or say of its layers is part of the plan.

    Raises:
        CogpressError: as `estimate.make`; or the table cannot be read, or Replicate rejects the token; or what is
            trained on the base could not be merged.
    """
    said: tuple[str, ...] = ()
    base = Path(settings.base.source).expanduser()
    if base.is_dir() and tensors.files(base) and model.scheme is None:
        said = layers.choose(base, settings.train.target_modules, settings.base.quantization).notes
    path = root / settings.plan.hardware if settings.plan.hardware else None
    table, note = hardware.current(hardware.table(path, settings.plan.prices))
    report = planning.data_report(root / "runs" / settings.name)
    if model.scheme is None:
        said += tuple(room.of_architecture(model, settings, report).notes(root / "runs"))
    return planning.make(settings, model, table, report=report, notes=(*said, note) if note else said)


def sku(settings: Config, root: Path, *, ask: bool = True) -> str:
    """The cheapest hardware on which the project's model fits.

    Args:
        settings: of `model.yaml`.
        root: the project's folder, whose `weights/` is the model, or else `serve.weights` or the base.
        ask: ask Replicate for the account's hardware; else use the dated table.

    Raises:
        CogpressError: the plan does not know the model, or nothing fits.
    """
    own = root / "weights" / "config.json"
    try:
        if own.is_file():
            model = architecture.read(read_json(own), str(own))
        else:
            model = architecture.of(settings.serve.weights or settings.base.source, root / ".cache")
        if ask:
            made = of_project(settings, root, model)
        else:
            path = root / settings.plan.hardware if settings.plan.hardware else None
            made = planning.make(settings, model, hardware.table(path, settings.plan.prices))
    except (CogpressError, ValueError) as error:
        raise CogpressError(f"The plan cannot choose hardware: {error} Or name it with --hardware SKU.") from None
    if made.hardware is None:
        raise CogpressError(
            "The model fits on no hardware by the plan; scripts/plan shows why. Name one with --hardware SKU."
        )
    return made.hardware.sku


def duration(seconds: float) -> str:
    """Seconds, formatted in a fitting unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def dollars(amount: float) -> str:
    """US dollars, formatted with more digits for small amounts."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.4f}"


def tables(plan: Estimate) -> RenderableType:
    """The whole plan, for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [
        _model(plan),
        _methods(plan),
        _trained(plan),
        _unfit([(row.machine.sku, row.refused, _most(row.batch, row.length, "rows")) for row in plan.trained]),
        _schemes(plan),
        _served(plan),
        _unfit([(row.machine.sku, row.refused, _most(row.concurrency, row.context, "at once")) for row in plan.served]),
        _costs(plan),
    ]
    return Group(*parts, *(Text(f"• {note}", style="dim") for note in plan.notes))


def _table(title: str, *columns: str) -> Table:
    """A narrow table of numbers beside names."""
    table = Table(title=f"\n{title}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left", no_wrap=True, vertical="bottom")
    return table


def _unfit(rows: Sequence[tuple[str, str | None, str]]) -> Text:
    """The machines that do not fit, by reason, with what would fit."""
    reasons: dict[str, list[str]] = {}
    for sku, refused, most in rows:
        if refused:
            reasons.setdefault(f"{refused}{most}", []).append(sku)
    lines = [f"{', '.join(skus)}: {reason}" for reason, skus in reasons.items()]
    return Text("\n".join(f"{line}." for line in lines), style="dim")


def _most(count: int, length: int, of: str) -> str:
    """What would fit, if anything."""
    found = [f"{count:,} {of}"] * bool(count) + [f"{length:,} tokens long"] * bool(length)
    return f" (at most {' or '.join(found)})" if found else ""


def _model(plan: Estimate) -> Table:
    model = plan.architecture
    table = _table(plan.model, "", "")
    table.show_header = False
    token = sum(one.values for one in model.caches) * plan.serving.cache_bytes
    windows = sum(one.window is not None for one in model.caches)
    facts = [
        ("architecture", model.kind),
        ("parameters", f"{model.parameters:,}"),
        ("  in the embedding", f"{model.embedding:,}" + (" (also the output layer)" if model.tied else "")),
        ("  in linear layers", f"{model.linear_weights + model.experts:,}"),
        (f"adapter of rank {plan.training.rank}", f"{model.adapter(plan.training.rank, plan.training.targets):,}"),
        ("attention", f"{model.layers} layers, {model.heads} heads, {model.key_value_heads} of keys and values"),
        ("longest context", f"{model.max_context:,} tokens"),
        ("KV cache per token", f"{token / 1024:,.1f} KiB"),
    ]
    if model.expert_share < 1:
        facts.insert(2, ("used per token", f"{model.active:,.0f}"))
    if windows:
        window = min(one.window for one in model.caches if one.window)
        facts.append(("layers with a window", f"{windows}, of {window:,} tokens"))
    for name, value in facts:
        table.add_row(name, value)
    return table


def _methods(plan: Estimate) -> Table:
    how = plan.training
    table = _table(
        f"Memory of training in GB: {how.batch} rows of {how.length:,} tokens, {how.answers:.0%} of them with loss",
        "method", "weights", "gradients", "optimizer", "acti-\nvations", "logits", "all", "without\nckpt.",
    )  # fmt: skip
    for name, (with_, without) in plan.methods.items():
        parts = (with_.weights, with_.gradients, with_.optimizer, with_.activations, with_.logits, with_.total)
        style = "bold" if name == how.method else ""
        table.add_row(_METHODS[name], *map(_gb, (*parts, without.total)), style=style)
    table.caption, table.caption_justify = "without ckpt.: all, without gradient checkpointing", "left"
    return table


def _schemes(plan: Estimate) -> Table:
    how = plan.serving
    table = _table(
        f"Memory of serving in GB: {how.concurrency} sequences of {how.context:,} tokens, one GPU",
        "scheme", "weights", "KV cache", "one pass", "overhead", "all",
    )  # fmt: skip
    for name, one in plan.schemes.items():
        parts = (one.weights, one.cache, one.activations, one.overhead, one.total)
        table.add_row(name, *map(_gb, parts), style="bold" if name == how.scheme else "")
    return table


def _trained(plan: Estimate) -> Table:
    told = f"{plan.tokens[0]:,} tokens ({plan.tokens[1]})" if plan.tokens else "an unknown number of tokens"
    table = _table(
        f"Training with {_METHODS[plan.training.method]} on one GPU: {told}",
        "hardware", "$/s", "room\nGB", "largest\nbatch", "longest\nrow", "tokens/s", "time", "cost",
    )  # fmt: skip
    for row in plan.trained:
        if row.refused:
            continue
        speed = "?" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}{'' if row.measured else '*'}"
        time = "?" if row.seconds is None else duration(row.seconds)
        paid = "?" if row.dollars is None else dollars(row.dollars)
        fits = (_gb(row.room), *_numbers(row.batch, row.length))
        table.add_row(_sku(row.machine, plan), _price(row.machine), *fits, speed, time, paid)
    return table


def _served(plan: Estimate) -> Table:
    how = plan.serving
    table = _table(
        f"Serving {how.scheme}, {how.concurrency} sequences of {how.context:,} tokens",
        "hardware", "$/s", "GB a\nGPU", "longest\ncontext", "at\nonce", "tokens/s", "one\nstream", "$/1 M\ntokens",
    )  # fmt: skip
    for row in plan.served:
        if row.refused:
            continue
        speed = row.speed
        together, alone = "?", "?"
        if speed is not None:
            together = f"{speed.tokens_per_second:,.0f}{'' if speed.measured else '*'}"
            alone = f"{speed.stream_tokens_per_second:,.0f}*"
        paid = "?" if row.per_million is None else dollars(row.per_million)
        fits = (_gb(row.room), *_numbers(row.context, row.concurrency))
        table.add_row(_sku(row.machine, plan), _price(row.machine), *fits, together, alone, paid)
    by_contract = any(_sku(row.machine, plan) != row.machine.sku for row in plan.served if not row.refused)
    table.caption = "* estimated, not measured" + "; † for accounts whose contract has it" * by_contract
    table.caption_justify = "left"
    return table


def _sku(machine: Machine, plan: Estimate) -> str:
    """A machine's SKU, marked where not every account may use it."""
    return f"{machine.sku} †" if machine.access == "contract" and not plan.table.listed else machine.sku


def _price(machine: Machine) -> str:
    return "?" if machine.price_per_second is None else f"{machine.price_per_second:.6f}"


def _gb(number: float) -> str:
    """Bytes in units of 10^9, without the unit."""
    return gigabytes(number).removesuffix(" GB")


def _numbers(*values: int) -> Iterable[str]:
    return [f"{value:,}" if value else "-" for value in values]


def _costs(plan: Estimate) -> Table:
    load = plan.load
    table = _table(
        f"A month of {3600 * load.per_second:,.0f} requests an hour: {load.input_tokens} + {load.output_tokens} tokens",
        "hardware", "instances\nonline", "serverless", "requests\nthat wait", "for", "always on",
    )  # fmt: skip
    for row in plan.served:
        if row.serverless is not None and row.always_on is not None:
            table.add_row(row.machine.sku, f"{row.serverless.instances:.2f} of {row.always_on.instances:.0f}",
                          dollars(row.serverless.per_month), f"{row.serverless.cold:.1%}",
                          duration(row.serverless.wait), dollars(row.always_on.per_month))  # fmt: skip
    return table


def write(plan: Estimate, folder: Path, console: Console, asked: config.Plan) -> None:
    """Write the plan's JSON and plot into a folder, and print their paths.

    Args:
        asked: the section `plan` of the configuration, for the plot's curves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NAME, plan.as_json())
    machines = [(one.name, one.gpu_memory_gb) for one in plan.table.machines if one.gpus == 1]
    plots.plan(_bars(plan), machines, _curves(plan, asked), 3600 * plan.load.per_second, plan.model, folder / PICTURE)
    console.print(f"Written: {folder / NAME}, {folder / PICTURE}", highlight=False, soft_wrap=True)


def _bars(plan: Estimate) -> list[tuple[str, dict[str, float]]]:
    def parts(one: Memory) -> dict[str, float]:
        return {name: value / 1e9 for name, value in vars(one).items()}

    methods = [(f"train {_METHODS[name]}", parts(with_)) for name, (with_, _) in plan.methods.items()]
    shown = dict.fromkeys((plan.serving.scheme, "bfloat16", "int8", "int4", "fp8"))
    return methods + [(f"serve {name}", parts(plan.schemes[name])) for name in shown]


def _curves(plan: Estimate, asked: config.Plan) -> tuple[str, list[tuple[float, Running, Running]]] | None:
    """The cheapest machine's cost by requests per hour, serverless and always on; None if no cost is known."""
    best = next((row for row in plan.served if row.speed is not None and row.always_on is not None), None)
    if best is None or best.speed is None or best.machine.price_per_second is None:
        return None
    points = []
    for rate in RATES:
        load = cost.Load(plan.load.input_tokens, plan.load.output_tokens, rate / 3600)
        price = best.machine.price_per_second
        scaled = cost.serverless(
            load,
            best.speed,
            price,
            cold_start=asked.cold_start_seconds,
            idle=asked.idle_seconds,
            private=asked.private,
        )
        points.append((rate, scaled, cost.always_on(load, best.speed, price)))
    return best.machine.sku, points
