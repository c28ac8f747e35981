"""`model.yaml`, validated once into typed objects that everything else receives.

Knows every option, its bounds and its default; knows nothing of files beyond the one it reads, of models or of
hardware: `auto` stays `auto` here and is resolved where the machine is known.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from cogpress import source
from cogpress.engines import base as engine
from cogpress.errors import CogpressError

Quantization = Literal["nf4", "int8", "none"]
"""How training loads the base: 4-bit NormalFloat with double quantization, LLM.int8(), or as it is."""

Merge = Literal["dequantized", "original"]
"""What the adapter is merged into: the base as training saw it, or the weights before quantization."""


class _Section(pydantic.BaseModel):
    """Immutable, and a misspelt option is an error instead of being ignored."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def _source(text: str) -> str:
    try:
        return source.parse(text).text
    except CogpressError as error:
        raise ValueError(str(error)) from None


_Source = Annotated[str, pydantic.AfterValidator(_source)]


class Base(_Section):
    """The model that is tuned."""

    source: _Source = "embedded"
    quantization: Quantization = "nf4"


class Prompt(_Section):
    """How an application's fields become the text that the model sees, in training and when served."""

    system: str = ""
    template: str = "{prompt}"

    @pydantic.field_validator("template")
    @classmethod
    def _template_parses(cls, template: str) -> str:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        plain = all(name and name.isidentifier() and not spec and not how for _, name, spec, how in parts)
        if not parts or not plain:
            raise ValueError("needs at least one {field}, named like a Python identifier; write {{ for a brace")
        return template

    @property
    def fields(self) -> list[str]:
        """The names in the template, in order of first use."""
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    def fill(self, text: str) -> str:
        """A prompt that is one text: put into a template of one field; with several it is taken as filled already."""
        return self.render({self.fields[0]: text}) if len(self.fields) == 1 else text

    def render(self, fields: dict[str, Any]) -> str:
        """Fill the template; a list is written with one item a line.

        Raises:
            CogpressError: a field is missing, unknown, or neither text, number, boolean nor a list of these.
        """
        missing = [name for name in self.fields if name not in fields]
        unknown = [name for name in fields if name not in self.fields]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(map(str, unknown))}"
            raise CogpressError(
                f"The prompt template's fields are {', '.join(self.fields)}; the input {wrong}. "
                "Give exactly those, as a JSON object."
            )
        return self.template.format(**{name: _as_text(name, value) for name, value in fields.items()})


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_as_text(name, item) for item in value)
    if isinstance(value, str | int | float):
        return str(value)
    raise CogpressError(f"Field {name} must be text, a number or a list of these, not {type(value).__name__}.")


class Data(_Section):
    """The examples, and which way they are learnt."""

    train: str | None = None
    validation: str | None = None
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    task: Literal["answer", "reversed"] = "answer"


class Train(_Section):
    """QLoRA. `max_steps`, where given, wins over `epochs`."""

    epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0, le=2048)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str = "all-linear"
    max_length: Annotated[int, Field(ge=8, le=131072)] = 1024
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    evaluations: Annotated[int, Field(ge=0, le=100)] = 4
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def lora_alpha(self) -> float:
        """Alpha where given, else twice the rank, so that the scale of the update does not depend on the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def _engine(name: str) -> str:
    if name not in engine.names():
        raise ValueError(f"there is no such engine; the engines are {', '.join(engine.names())}")
    return name


def _speculative(options: dict[str, Any]) -> dict[str, Any]:
    if not {"method", "model"} & options.keys():
        raise ValueError('needs a method, such as "ngram", or the model that drafts')
    if not isinstance(options.get("num_speculative_tokens", 1), int) or options.get("num_speculative_tokens", 1) < 1:
        raise ValueError("num_speculative_tokens must be a whole number of at least 1")
    if "model" in options:
        options = {**options, "model": _source(str(options["model"]))}
    return options


class Serve(_Section):
    """The engine. `auto` values are resolved on the machine that serves; `weights` count where none are installed."""

    engine: Annotated[str, pydantic.AfterValidator(_engine)] = "vllm"
    weights: _Source | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    mode: Literal["auto", "eager", "compiled"] = "auto"
    max_context: Annotated[int, Field(ge=16)] | None = None
    tensor_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    pipeline_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    cpu_kv_cache_gb: Annotated[float, Field(gt=0, le=4096)] = 2.0
    cpu_threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    chunked_prefill: bool | None = None
    max_batched_tokens: Annotated[int, Field(ge=16)] | None = None
    cpu_offload_gb: Annotated[float, Field(ge=0, le=4096)] = 0.0
    kv_offload_gb: Annotated[float, Field(ge=0, le=4096)] = 0.0
    speculative: Annotated[dict[str, Any], pydantic.AfterValidator(_speculative)] | None = None
    adapters_at_once: Annotated[int, Field(ge=1, le=256)] = 4
    adapters_kept: Annotated[int, Field(ge=1, le=4096)] = 16
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    log: Literal["none", "requests", "prompts"] = "none"


class Verify(_Section):
    """What weights must pass before they ship. A limit that is None is the default for the weights' scheme."""

    examples: str | None = None
    rows: Annotated[int, Field(ge=4, le=10_000)] = 64
    score: Annotated[str, Field(pattern=r"^(exact|json|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")] = "exact"
    mean_kl: Annotated[float, Field(gt=0)] | None = None
    p99_kl: Annotated[float, Field(gt=0)] | None = None
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    score_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    served_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    served_difference: Annotated[float, Field(gt=0)] | None = None


class Playground(_Section):
    """The local Replicate of scripts/playground: what it keeps, and how much it takes."""

    retention_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    retention_count: Annotated[int, Field(ge=1)] = 10_000
    keep_prompts: bool = True
    max_input_mb: Annotated[int, Field(ge=1, le=65_536)] = 64
    requests_per_minute: Annotated[int, Field(ge=1)] = 6000


class Plan(_Section):
    """What scripts/plan reckons with: the load, and what this kit can not know of prices, speeds and starts."""

    hardware: str | None = None
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}
    scheme: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "fp8", "awq"] = "auto"
    context: Annotated[int, Field(ge=16)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 32
    input_tokens: Annotated[int, Field(ge=1)] = 500
    output_tokens: Annotated[int, Field(ge=1)] = 200
    requests_per_hour: Annotated[float, Field(gt=0)] = 60.0
    private: bool = True
    cold_start_seconds: Annotated[float, Field(ge=0)] = 120.0
    idle_seconds: Annotated[float, Field(ge=0)] = 60.0
    tokens_per_second: dict[str, Annotated[float, Field(gt=0)]] = {}
    answer_share: Annotated[float, Field(gt=0, le=1)] | None = None
    training_tokens: Annotated[int, Field(ge=1)] | None = None
    training_tokens_per_second: dict[str, Annotated[float, Field(gt=0)]] = {}


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*"


class Case(_Section):
    """A test prediction of scripts/push: an input, and what must come of it."""

    name: str = ""
    input: dict[str, Any] = {}
    exact: str | None = None
    contains: str | tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    expected: str | None = None
    error: str | None = None
    streams: bool = False
    cancels: bool = False
    seconds: Annotated[float, Field(gt=0)] | None = None

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> Case:
        text = [name for name in ("exact", "contains", "json_schema", "expected") if getattr(self, name)]
        if self.cancels and (text or self.error or self.streams):
            raise ValueError("a prediction that is canceled has no answer: put the other checks into another test")
        if self.error is not None and (text or self.streams):
            raise ValueError("a prediction that fails has no answer: put the other checks into another test")
        return self


class Fuzz(_Section):
    """The inputs that scripts/push makes up from the schema. `fixed` ones keep their value."""

    rounds: Annotated[int, Field(ge=0, le=1000)] = 8
    seed: Annotated[int, Field(ge=0)] = 0
    fixed: dict[str, Any] = {}
    leave_out: tuple[str, ...] = ()


class Deployment(_Section):
    """What scripts/push makes or changes for the new version."""

    name: Annotated[str, Field(pattern=_NAME + "$")]
    hardware: str | None = None
    min_instances: Annotated[int, Field(ge=0, le=1000)] = 0
    max_instances: Annotated[int, Field(ge=1, le=1000)] = 1


class TestTraining(_Section):
    """A training that scripts/push starts with the pushed version, and predictions of what it makes."""

    data: str
    input: dict[str, Any] = {}
    tests: tuple[Case, ...] = ()
    timeout: Annotated[float, Field(gt=0)] = 3600.0


class Push(_Section):
    """How scripts/push builds, and what a version must do before it goes to the model that people use."""

    weights: Literal["layer", "image", "fetched"] = "layer"
    test_model: Annotated[str, Field(pattern=_NAME + r"/[A-Za-z0-9._-]+$")] | None = None
    tests: tuple[Case, ...] = ()
    same_answers: bool = False
    fuzz: Fuzz = Fuzz()
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    parity: bool = True
    rows: Annotated[int, Field(ge=1, le=10_000)] = 16
    training: TestTraining | None = None
    deployment: Deployment | None = None


class Config(_Section):
    """One model, from base to server."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$")] = "model"
    base: Base = Base()
    prompt: Prompt = Prompt()
    data: Data = Data()
    train: Train = Train()
    merge: Merge = "dequantized"
    verify: Verify = Verify()
    serve: Serve = Serve()
    playground: Playground = Playground()
    plan: Plan = Plan()
    push: Push = Push()
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")], _Source] = {}

    def public(self) -> dict[str, Any]:
        """As JSON, for files that people pass on: sources without what can be secret in a URL."""
        data = self.model_dump(mode="json")
        for section, option in (("base", "source"), ("serve", "weights")):
            data[section][option] = data[section][option] and source.shown(data[section][option])
        data["adapters"] = {name: source.shown(place) for name, place in data["adapters"].items()}
        if data["serve"]["speculative"] and "model" in data["serve"]["speculative"]:
            data["serve"]["speculative"]["model"] = source.shown(data["serve"]["speculative"]["model"])
        return data

    def override(self, inputs: dict[str, Any]) -> Config:
        """A copy with a training's inputs put in their places and validated; None and `model.yaml` change nothing.

        Raises:
            CogpressError: a value is out of bounds.
        """
        data = self.model_dump()
        for name, value in inputs.items():
            if value is not None and value != "model.yaml":
                section, option = _PLACES.get(name, ("train", name))
                data[section][option] = value
        return parse(data, "What was given")


_PLACES = {
    "base_model": ("base", "source"),
    "quantization": ("base", "quantization"),
    "train_data": ("data", "train"),
    "validation_share": ("data", "validation_share"),
}
"""Where a training's inputs go that do not belong to the section `train`."""


def parse(data: Any, place: str) -> Config:
    """Validate what a YAML file holds.

    Raises:
        CogpressError: naming the option, the place and what was expected.
    """
    try:
        # A section whose every line is commented out is read as None, and means its defaults.
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if value is not None}
        return Config.model_validate({} if data is None else data)
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "the file"
            if problem["type"] == "extra_forbidden":
                lines.append(f"{where} is not an option")
            else:
                given = problem["input"]
                # A URL can hold a signature.
                given = source.shown(given) if isinstance(given, str) else given
                lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {given!r})")
        raise CogpressError(
            f"{place} is not valid: {'; '.join(lines)}. README, docs/serving.md, docs/playground.md, "
            "docs/hardware.md and docs/push.md list every option."
        ) from None


def load(path: Path) -> Config:
    """Read and validate `model.yaml`.

    Raises:
        CogpressError: the file is missing, is not YAML, or holds an option that does not exist or is out of bounds.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CogpressError(f"{path} does not exist. Copy model.yaml from the repository, or name one.") from None
    except OSError as error:
        raise CogpressError(f"{path} can not be read: {error.strerror}. Name a file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct that line.") from None
    return parse(data, str(path))
