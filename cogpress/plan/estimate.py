"""Will it fit, and what will it cost: architecture, memory, hardware and load combined, and machines ranked by cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from cogpress import source
from cogpress.config import Config
from cogpress.engines.gpus import undivided
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.plan import cost, memory
from cogpress.plan.architecture import Architecture
from cogpress.plan.cost import Load, Running, Speed
from cogpress.plan.hardware import Machine, Table
from cogpress.plan.memory import METHODS, Memory, Method, Scheme, Serving, Training

MOST = 4096
"""Upper bound of the search for the largest batch and the largest number of sequences."""

OLDEST = (7, 5)
"""The compute capability that the image's CUDA 13 and vLLM require: Turing's."""

NEEDS: dict[Scheme, tuple[tuple[int, int], str]] = {
    "bfloat16": ((8, 0), "has no bfloat16: serve float16"),
    "fp8": ((8, 9), "does not compute in FP8"),
    "int4": (OLDEST, "has no kernels for 4-bit weights"),
    "awq": (OLDEST, "has no kernels for 4-bit weights"),
}
"""The compute capability that each scheme requires, and what to say of a GPU that lacks it."""


@dataclass(frozen=True)
class TrainingEstimate:
    """Training on one machine's first GPU.

    Attributes:
        refused: why it does not work there; None if it does.
        room: bytes left; negative if it does not fit.
        batch: the largest batch at the wanted length; 0 if not even one row fits.
        length: the largest length at the wanted batch, at most the model's context.
        tokens_per_second, seconds, dollars: None if unknown.
        measured: whether the speed was measured.
        host: bytes of host memory that training takes, with all that follows it.
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
    host: float = 0.0


@dataclass(frozen=True)
class ServingEstimate:
    """Serving on one machine; memory and room are per GPU.

    Attributes:
        refused: why it does not work there; None if it does.
        room: bytes left of what vLLM may use; negative if it does not fit.
        context: the context that the engine will allow: `serve.max_context`, or as much of the model's as the memory
            holds for one sequence.
        concurrency: the largest concurrency at the wanted context.
        per_million: US dollars per million output tokens at the wanted concurrency.
        host: bytes of host memory that serving takes.
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
    host: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """The whole plan for one model.

    Attributes:
        model: its source, without secrets.
        training, serving: what the plan is for.
        methods: memory of each training method, otherwise as in `training`, with and without checkpointing.
        schemes: memory of each serving scheme, otherwise as in `serving`, on one GPU.
        trained, served: by machine; those that fit come first, by cost, and of these what every account may use.
        tokens: number of training tokens, and where that number is from; None if unknown.
        notes: caveats about the numbers.
    """

    model: str
    architecture: Architecture
    training: Training
    serving: Serving
    load: Load
    table: Table
    methods: dict[str, tuple[Memory, Memory]]
    schemes: dict[str, Memory]
    trained: tuple[TrainingEstimate, ...]
    served: tuple[ServingEstimate, ...]
    tokens: tuple[int, str] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON: memory in bytes, money in US dollars."""
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
        """The cheapest machine to serve on; None if none fits."""
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
) -> Estimate:
    """Plan a model's training and serving.

    Args:
        settings: the configuration; its `base`, `train`, `serve` and `plan` are used.
        model: the architecture.
        table: the hardware to choose from.
        report: a run's report of its data, as `data_report` reads it.
        notes: added to the plan's own.

    Raises:
        CogpressError: an option does not fit the model, or names hardware that does not exist.
    """
    for sku in (*settings.plan.tokens_per_second, *settings.plan.training_tokens_per_second):
        # An account's list may be shorter than the hardware whose speed was measured.
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
            f"The account has hardware that the table lacks: {', '.join(table.unknown)}. Describe it in a file like "
            "cogpress/plan/hardware.yaml, named in model.yaml under plan.hardware."
        )
    if not (asked.tokens_per_second and asked.training_tokens_per_second):
        said.append("Speeds that were not measured are estimated from data sheets: expect half to double.")
    # Training uses one GPU; any others would be paid for and idle.
    trainers = [one for one in table.machines if one.gpus <= 1] or table.machines
    trained = _ranked([_trained(model, train, one, settings, tokens) for one in trainers], _training_rank, table)
    served = _ranked([_served(model, serve, one, settings, load) for one in table.machines], _serving_rank, table)
    learning, answering = memory.host_of_training(model, train), memory.host_of_serving(model, serve)
    said.append(
        f"Host memory: training takes about {learning / 1e9:.0f} GB and serving on one GPU {answering / 1e9:.0f} GB, "
        f"{memory.HOST_PROCESS / 1e9:.0f} GB of it assumed for each process."
    )
    said += _read_again("Training", trained, model.parameters * memory.TYPES.get(model.dtype, 2))
    said += _read_again("Serving", served, memory.serving_weights(model, serve.scheme))
    return Estimate(
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
        trained=trained,
        served=served,
        tokens=tokens,
        notes=tuple(said),
    )


def _read_again(what: str, rows: Sequence[TrainingEstimate | ServingEstimate], size: float) -> list[str]:
    """A note about machines that fit whose host memory keeps no copy of the weights' files, of `size` bytes."""
    small = [
        f"{row.machine.sku} ({row.machine.host_memory_gb:.0f} GB)"
        for row in rows
        if row.refused is None and row.machine.host_bytes < size + row.host
    ]
    if not small:
        return []
    return [
        f"{what} on {', '.join(small)}: the host memory does not hold the weights' files ({size / 1e9:.0f} GB), so "
        "that each reading of them waits for the disk."
    ]


def training_of(settings: Config, model: Architecture, report: Mapping[str, Any]) -> Training:
    """Training on a GPU as `model.yaml` configures it. Rows are at most as long as the model's context.

    The share of tokens with loss is `plan.answer_share`, else that of the report, else 1.
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
        optimizer="paged_adamw_8bit" if train.optimizer == "paged_adamw_8bit" else "adamw",
    )


def serving_of(settings: Config, model: Architecture) -> Serving:
    """Serving on one GPU as `model.yaml` configures it.

    Raises:
        CogpressError: the context is longer than the model's.
    """
    asked, serve = settings.plan, settings.serve
    context = asked.context or serve.max_context or min(model.max_context, 4096)
    if context > model.max_context:
        raise CogpressError(f"plan.context is {context}, above the model's {model.max_context}. Lower it.")
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
                f"The weights are quantized with {model.scheme}, which has no formula here. Set plan.scheme to the "
                "scheme that is closest in bits."
            )
        return model.scheme  # type: ignore[return-value]
    dtype = settings.serve.dtype if settings.serve.dtype != "auto" else model.dtype
    # float32 checkpoints are trained and merged in 16 bits.
    return "float16" if dtype == "float16" else "float32" if settings.serve.dtype == "float32" else "bfloat16"


def training_tokens(settings: Config, report: Mapping[str, Any]) -> tuple[int, str] | None:
    """The number of tokens that training sees, and where it is from; None if unknown.

    Args:
        settings: the configuration.
        report: a run's report of the same data (`data.json`); empty without one.
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
        tokens = report["train"] / rows * counted * train.epochs / (1 - settings.data.replay_share)
        return round(tokens), "the last run's data"
    return None


def data_report(run: Path) -> dict[str, Any]:
    """A run's report of its data; empty without one."""
    try:
        found = read_json(run / "data.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, given that all smaller ones fit too; 0 if not even 1 does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _trained(
    model: Architecture, how: Training, machine: Machine, settings: Config, tokens: tuple[int, str] | None
) -> TrainingEstimate:
    def room(**changed: Any) -> float:
        return machine.gpu_bytes - memory.training(model, replace(how, checkpointing=True, **changed)).total

    how = replace(how, checkpointing=memory.checkpoints(model, how, machine.gpu_bytes))
    needed = memory.training(model, how)
    left = machine.gpu_bytes - needed.total
    host = memory.host_of_training(model, how)
    if refused := _no_gpu(machine) or _no_host(machine, host):
        return TrainingEstimate(machine, refused, needed, left, 0, 0, host=host)
    if left < 0:
        refused = f"lacks {-left / 1e9:.1f} GB"
    found = TrainingEstimate(
        machine,
        refused,
        needed,
        left,
        host=host,
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


def _served(model: Architecture, how: Serving, machine: Machine, settings: Config, load: Load) -> ServingEstimate:
    how = replace(how, gpus=sharing(model, machine.gpus))
    if how.scheme == "bfloat16" and settings.serve.dtype == "auto" and (0, 0) < machine.capability < (8, 0):
        # As the engine does on such GPUs.
        how = replace(how, scheme="float16")
    allowed = machine.gpu_bytes * settings.serve.memory_share

    def fits(**changed: Any) -> bool:
        return memory.serving(model, replace(how, **changed)).total <= allowed

    needed = memory.serving(model, how)
    left = allowed - needed.total
    host = memory.host_of_serving(model, replace(how, gpus=machine.gpus))
    if refused := _no_gpu(machine) or _cannot(model, how, machine) or _no_host(machine, host):
        return ServingEstimate(machine, refused, needed, left, 0, 0, host=host)
    found = ServingEstimate(
        machine,
        f"lacks {-left / 1e9:.1f} GB on each GPU" if left < 0 else None,
        needed,
        left,
        host=host,
        context=largest(
            lambda context: fits(context=context, concurrency=1), settings.serve.max_context or model.max_context
        ),
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
        return "has no GPU; scripts/push --cpu serves a small model on it"
    if machine.capability < OLDEST:
        return "is older than CUDA 13 supports"
    return None


def _no_host(machine: Machine, needed: float) -> str | None:
    if needed <= machine.host_bytes:
        return None
    return (
        f"has {machine.host_bytes / 1e9:.0f} GB of host memory, and its processes and the tensors on their way to a "
        f"GPU take about {needed / 1e9:.0f}"
    )


def _cannot(model: Architecture, how: Serving, machine: Machine) -> str | None:
    if how.scheme in NEEDS and machine.capability < NEEDS[how.scheme][0]:
        return NEEDS[how.scheme][1]
    return None


def sharing(model: Architecture, gpus: int) -> int:
    """How many of a machine's GPUs share each layer, as the engine decides it; copies of the model take the others."""

    def divided(size: int) -> bool:
        widths = [model.intermediate]
        return not undivided(size, heads=model.heads, key_value_heads=model.key_value_heads, widths=widths)

    return max(size for size in range(1, max(1, gpus) + 1) if divided(size))


def _ranked(rows: list[Any], key: Callable[[Any], tuple[Any, ...]], table: Table) -> tuple[Any, ...]:
    def closed(row: Any) -> bool:
        """Whether a machine fits that not every account may use; what an account lists, it may."""
        return row.refused is None and row.machine.access == "contract" and not table.listed

    return tuple(sorted(rows, key=lambda row: (row.refused is not None, closed(row), *key(row))))


def _training_rank(row: TrainingEstimate) -> tuple[Any, ...]:
    price = row.machine.price_per_second
    paid = row.dollars if row.dollars is not None else (price if price is not None else float("inf"))
    return (paid, row.machine.gpus, -row.room if row.refused else 0)


def _serving_rank(row: ServingEstimate) -> tuple[Any, ...]:
    """The load's cost per month, the cheaper way; then the machine's price."""
    ways = [way.per_month for way in (row.serverless, row.always_on) if way is not None]
    price = row.machine.price_per_second
    return (min(ways, default=float("inf")), float("inf") if price is None else price)
