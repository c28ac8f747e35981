"""Will it fit, and what will it cost: a model's architecture, memory, hardware and load put together.

Knows which question goes to which part and how machines are ranked; leaves counting to `architecture`, bytes to
`memory`, speed and money to `cost`, and prices to `hardware`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from cogpress import source
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.plan import cost, memory
from cogpress.plan.architecture import Architecture
from cogpress.plan.cost import Load, Running, Speed
from cogpress.plan.hardware import Machine, Table
from cogpress.plan.memory import METHODS, Memory, Method, Scheme, Serving, Training

MOST = 4096
"""Rows of a batch, and sequences at once, beyond which nobody looks."""

OLDEST = (7, 5)
"""The compute capability that the image's CUDA 13 and vLLM need: Turing's."""

NEEDS: dict[Scheme, tuple[tuple[int, int], str]] = {
    "bfloat16": ((8, 0), "has no bfloat16: serve float16"),
    "fp8": ((8, 9), "does not compute in FP8"),
    "int4": (OLDEST, "has no kernels for 4-bit weights"),
    "awq": (OLDEST, "has no kernels for 4-bit weights"),
}
"""What each scheme needs of a GPU, and what to say where it is not so."""


@dataclass(frozen=True)
class Trained:
    """A training on one machine's first GPU.

    Attributes:
        refused: why it does not work there; None where it does.
        room: bytes left; negative where it does not fit.
        batch: the largest at the wanted length; 0 where not even one row fits.
        length: the largest at the wanted batch, at most the model's context.
        tokens_per_second, seconds, dollars: None where unknown.
        measured: whether the speed was.
    """

    machine: Machine
    refused: str | None
    memory: Memory
    room: float
    batch: int
    length: int
    tokens_per_second: float | None = None
    measured: bool = False
    seconds: float | None = None
    dollars: float | None = None


@dataclass(frozen=True)
class Served:
    """Serving on one machine; memory and room are each GPU's.

    Attributes:
        refused: why it does not work there; None where it does.
        room: bytes left of what vLLM may use; negative where it does not fit.
        context: the largest at the wanted concurrency, at most the model's.
        concurrency: the largest at the wanted context.
        per_million: US dollars for a million output tokens at the wanted concurrency.
    """

    machine: Machine
    refused: str | None
    memory: Memory
    room: float
    context: int
    concurrency: int
    speed: Speed | None = None
    per_million: float | None = None
    serverless: Running | None = None
    always_on: Running | None = None


@dataclass(frozen=True)
class Plan:
    """All answers about one model.

    Attributes:
        model: its source, as it may be shown.
        training, serving: what was asked for.
        methods: memory of each way to train, as asked for otherwise, with and without checkpointing.
        schemes: memory of each way to serve, as asked for otherwise, on one GPU.
        trained, served: by machine, those that fit first, by cost.
        tokens: of the training, and where that number is from; None where unknown.
        notes: what a reader should know of the numbers.
    """

    model: str
    architecture: Architecture
    training: Training
    serving: Serving
    load: Load
    table: Table
    methods: dict[str, tuple[Memory, Memory]]
    schemes: dict[str, Memory]
    trained: tuple[Trained, ...]
    served: tuple[Served, ...]
    tokens: tuple[int, str] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs. Memory is in bytes, money in US dollars."""
        data = asdict(self)
        table = data.pop("table")
        table["dated"] = table["dated"].isoformat()
        table["machines"] = [one.model_dump(mode="json") for one in self.table.machines]
        for name in ("trained", "served"):
            for row, one in zip(data[name], getattr(self, name), strict=True):
                row["machine"] = one.machine.sku
                row["memory"]["total"] = one.memory.total
        data["methods"] = {
            name: {"checkpointing": _whole(with_), "without": _whole(without)}
            for name, (with_, without) in self.methods.items()
        }
        data["schemes"] = {name: _whole(one) for name, one in self.schemes.items()}
        data["architecture"] |= {
            "layers": self.architecture.layers,
            "active_parameters": self.architecture.active,
            "adapter_parameters": self.architecture.adapter(self.training.rank, self.training.targets),
            "cache_bytes_per_token": sum(one.values for one in self.architecture.caches) * self.serving.cache_bytes,
        }
        return {**data, "hardware": table}

    @property
    def hardware(self) -> Machine | None:
        """The cheapest machine to serve on; None where none fits."""
        first = self.served[0] if self.served else None
        return first.machine if first and first.refused is None else None


def _whole(one: Memory) -> dict[str, float]:
    return {**asdict(one), "total": one.total}


def make(
    settings: Config,
    model: Architecture,
    table: Table,
    *,
    report: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan a model's training and serving.

    Args:
        settings: of `model.yaml`; `base`, `train`, `serve` and `plan` are used.
        model: its architecture.
        table: the hardware to choose from.
        report: what a run counted of the training's data, as `data_report` reads it.
        notes: to be kept with the plan's own.

    Raises:
        CogpressError: an option does not fit the model, or names hardware that there is not.
    """
    for sku in (*settings.plan.tokens_per_second, *settings.plan.training_tokens_per_second):
        # Of an account's list, which can be shorter, a measured speed may name more.
        if not table.listed:
            table.machine(sku)
    train, serve = training_of(settings, model, report or {}), serving_of(settings, model)
    asked = settings.plan
    load = Load(asked.input_tokens, asked.output_tokens, asked.requests_per_hour / 3600)
    if load.input_tokens + load.output_tokens > serve.context:
        raise CogpressError(
            f"plan.input_tokens and output_tokens are {load.input_tokens + load.output_tokens} together, and "
            f"plan.context is {serve.context}. Raise the context or shorten the requests."
        )
    tokens = training_tokens(settings, report or {})
    said = [*notes]
    if caution := table.caution():
        said.append(caution)
    if table.unknown:
        said.append(
            f"The account has hardware that the table does not know: {', '.join(table.unknown)}. Describe it in a file "
            "like cogpress/plan/hardware.yaml, named in model.yaml under plan.hardware."
        )
    if not (asked.tokens_per_second and asked.training_tokens_per_second):
        said.append("Speeds that are not measured are reckoned from data sheets: expect half to double.")
    # A training takes one GPU; more of them would be paid and idle.
    trainers = [one for one in table.machines if one.gpus <= 1] or table.machines
    return Plan(
        model=source.shown(settings.base.source),
        architecture=model,
        training=train,
        serving=serve,
        load=load,
        table=table,
        methods={
            name: (
                memory.training(model, replace(train, method=name, checkpointing=True)),
                memory.training(model, replace(train, method=name, checkpointing=False)),
            )
            for name in METHODS
        },
        schemes={name: memory.serving(model, replace(serve, scheme=name)) for name in get_args(Scheme)},
        trained=_ranked([_trained(model, train, one, settings, tokens) for one in trainers], _training_rank),
        served=_ranked([_served(model, serve, one, settings, load) for one in table.machines], _serving_rank),
        tokens=tokens,
        notes=tuple(said),
    )


def training_of(settings: Config, model: Architecture, report: Mapping[str, Any]) -> Training:
    """How `model.yaml` trains on a GPU. Rows are never longer than the model's context.

    The share of tokens with loss is what `plan.answer_share` says, or what the report counted, or all.
    """
    counted = (
        report["learnt_tokens"] / report["tokens"] if report.get("learnt_tokens") and report.get("tokens") else 1.0
    )
    train = settings.train
    method: Method = {"nf4": "nf4", "int8": "int8", "none": "lora"}[settings.base.quantization]  # type: ignore[assignment]
    return Training(
        method=method,
        batch=train.batch_size,
        length=min(train.max_length, model.max_context),
        rank=train.rank,
        targets=train.target_modules,
        accumulation=train.gradient_accumulation,
        checkpointing=True,
        answers=settings.plan.answer_share or min(1.0, counted),
        optimizer="adamw" if train.optimizer == "adamw" else "paged_adamw_8bit",
    )


def serving_of(settings: Config, model: Architecture) -> Serving:
    """How `model.yaml` serves on one GPU.

    Raises:
        CogpressError: the context is longer than the model's.
    """
    asked, serve = settings.plan, settings.serve
    context = asked.context or serve.max_context or min(model.max_context, 4096)
    if context > model.max_context:
        raise CogpressError(f"plan.context is {context}, and the model's is {model.max_context}. Lower it.")
    return Serving(
        scheme=_scheme(settings, model),
        context=context,
        concurrency=asked.concurrency,
        cache_bytes=1 if serve.kv_cache_dtype.startswith("fp8") else 2,
        batched=serve.max_batched_tokens or 8192,
        compiled=serve.mode != "eager",
    )


def _scheme(settings: Config, model: Architecture) -> Scheme:
    known: tuple[Scheme, ...] = get_args(Scheme)
    if settings.plan.scheme != "auto":
        return settings.plan.scheme
    if model.scheme is not None:
        if model.scheme not in known:
            raise CogpressError(
                f"The weights are quantized by {model.scheme}, which is not planned here. Set plan.scheme to what is "
                "closest in bits."
            )
        return known[known.index(model.scheme)]  # type: ignore[arg-type]
    dtype = settings.serve.dtype if settings.serve.dtype != "auto" else model.dtype
    # float32 checkpoints are trained and merged in 16 bits.
    return "float16" if dtype == "float16" else "float32" if settings.serve.dtype == "float32" else "bfloat16"


def training_tokens(settings: Config, report: Mapping[str, Any]) -> tuple[int, str] | None:
    """How many tokens a training sees, and how that is known; None where nothing tells.

    Args:
        settings: of `model.yaml`.
        report: what a run of the same data counted (`data.json`); empty where there is none.
    """
    train = settings.train
    if settings.plan.training_tokens is not None:
        return settings.plan.training_tokens, "plan.training_tokens"
    rows, counted = report.get("train", 0) + report.get("validation", 0), report.get("tokens", 0)
    if train.max_steps is not None:
        steps = train.max_steps * train.batch_size * train.gradient_accumulation
        if rows and counted:
            return round(steps * counted / rows), "train.max_steps, with rows as long as the last run's"
        return steps * train.max_length, "train.max_steps, each row as long as max_length: an upper bound"
    if rows and counted:
        return round(report["train"] / rows * counted * train.epochs), "the last run's data"
    return None


def data_report(run: Path) -> dict[str, Any]:
    """What a run counted of its data; empty where it has not."""
    try:
        found = read_json(run / "data.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all below one that fits do too; 0 where not even 1 does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _trained(
    model: Architecture, how: Training, machine: Machine, settings: Config, tokens: tuple[int, str] | None
) -> Trained:
    def room(**changed: Any) -> float:
        return machine.gpu_bytes - memory.training(model, replace(how, **changed)).total

    needed = memory.training(model, how)
    left = machine.gpu_bytes - needed.total
    refused = _no_gpu(machine)
    if refused is None and left < 0:
        refused = f"lacks {-left / 1e9:.1f} GB"
    if _no_gpu(machine):
        return Trained(machine, refused, needed, left, 0, 0)
    found = Trained(
        machine,
        refused,
        needed,
        left,
        batch=largest(lambda batch: room(batch=batch) >= 0, MOST),
        length=largest(lambda length: room(length=length) >= 0, model.max_context),
    )
    if refused:
        return found
    measured = settings.plan.training_tokens_per_second.get(machine.sku)
    rate = measured or (cost.training_speed(model, how, machine) if machine.tflops else None)
    seconds = tokens[0] / rate if tokens and rate else None
    price = machine.price_per_second
    paid = None if seconds is None or price is None else (seconds + settings.plan.cold_start_seconds) * price
    return replace(found, tokens_per_second=rate, measured=measured is not None, seconds=seconds, dollars=paid)


def _served(model: Architecture, how: Serving, machine: Machine, settings: Config, load: Load) -> Served:
    how = replace(how, gpus=max(1, machine.gpus))
    if how.scheme == "bfloat16" and settings.serve.dtype == "auto" and (0, 0) < machine.capability < (8, 0):
        # What the engine does on such GPUs by itself.
        how = replace(how, scheme="float16")
    allowed = machine.gpu_bytes * settings.serve.gpu_memory_share

    def fits(**changed: Any) -> bool:
        return memory.serving(model, replace(how, **changed)).total <= allowed

    needed = memory.serving(model, how)
    left = allowed - needed.total
    if refused := _no_gpu(machine) or _cannot(model, how, machine):
        return Served(machine, refused, needed, left, 0, 0)
    found = Served(
        machine,
        f"lacks {-left / 1e9:.1f} GB on each GPU" if left < 0 else None,
        needed,
        left,
        context=largest(lambda context: fits(context=context), model.max_context),
        concurrency=largest(lambda concurrency: fits(concurrency=concurrency), MOST),
    )
    if found.refused or not (machine.tflops and machine.bandwidth_gb_per_second):
        return found
    speed = cost.speed(model, how, machine, load, settings.plan.tokens_per_second.get(machine.sku))
    found = replace(found, speed=speed)
    if machine.price_per_second is None:
        return found
    return replace(
        found,
        per_million=cost.per_million_tokens(machine.price_per_second, speed.tokens_per_second),
        serverless=cost.serverless(
            load,
            speed,
            machine.price_per_second,
            cold_start=settings.plan.cold_start_seconds,
            idle=settings.plan.idle_seconds,
            private=settings.plan.private,
        ),
        always_on=cost.always_on(load, speed, machine.price_per_second),
    )


def _no_gpu(machine: Machine) -> str | None:
    if not machine.gpus:
        return "has no GPU, which the image needs"
    if machine.capability < OLDEST:
        return "is older than what CUDA 13 knows"
    return None


def _cannot(model: Architecture, how: Serving, machine: Machine) -> str | None:
    if how.scheme in NEEDS and machine.capability < NEEDS[how.scheme][0]:
        return NEEDS[how.scheme][1]
    if model.heads % machine.gpus:
        return f"has {machine.gpus} GPUs, which do not divide {model.heads} attention heads"
    return None


def _ranked(rows: list[Any], key: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(sorted(rows, key=key))


def _training_rank(row: Trained) -> tuple[Any, ...]:
    price = row.machine.price_per_second
    paid = row.dollars if row.dollars is not None else (price if price is not None else float("inf"))
    return (row.refused is not None, paid, row.machine.gpus, -row.room if row.refused else 0)


def _serving_rank(row: Served) -> tuple[Any, ...]:
    """What the load costs a month, by the cheaper way; then the price of an hour."""
    ways = [way.per_month for way in (row.serverless, row.always_on) if way is not None]
    price = row.machine.price_per_second
    return (row.refused is not None, min(ways, default=float("inf")), float("inf") if price is None else price)
