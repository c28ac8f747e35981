"""The sections of `model.yaml` and every option in them: type, bounds, default and description.

`docs/configuration.md` is generated from this file by `cogpress.manual`.
"""

from __future__ import annotations

import keyword
import math
import string
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from cogpress import source
from cogpress.errors import CogpressError

Quantization = Literal["nf4", "int8", "none"]
Merge = Literal["dequantized", "balanced", "original"]
Task = Literal["answer", "reversed"]
EngineName = Literal["transformers", "vllm"]
"""The files in `engines/`; a test holds them equal."""


class Section(pydantic.BaseModel):
    """Immutable; an unknown option is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _source(text: str) -> str:
    try:
        return source.parse(text).text
    except CogpressError as error:
        raise ValueError(str(error)) from None


Source = Annotated[str, pydantic.AfterValidator(_source)]


class Base(Section):
    """The model to tune."""

    source: Source = "embedded"
    """A [source](sources.md): a folder, a tar, `hf://organisation/name@revision` or a URL.
    `embedded` is SmolLM2-135M-Instruct."""
    quantization: Quantization = "nf4"
    """How training holds the base: `nf4` (QLoRA: 4-bit NormalFloat, double quantization; least memory), `int8`
    (LLM.int8()), or `none` (plain LoRA)."""


InputName = Literal[
    "prompt", "system_prompt", "messages", "fields", "adapter", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "stop", "seed", "json_schema", "regex", "choices", "grammar", "tools", "thinking", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs",
]  # fmt: skip
"""A prediction's inputs besides the template's fields; a test holds them equal to `cogpress.cog.form`'s."""

_TAKEN = frozenset(
    {*InputName.__args__, "self", "locals", "Input", "Output", "Status"}  # type: ignore[attr-defined]
    | {f"{kind}{part}" for kind in ("Prediction", "Training") for part in ("Request", "Response", "Input", "Output")}
    | {"HTTPValidationError", "ValidationError"}
)
"""Names that a field of the form cannot have: other inputs, names that `run()` uses, and Cog's own schemas."""

EXACT_INTEGERS = 2**53
"""Cog writes bounds as float64, which holds integers exactly below this."""

_ESCAPED = frozenset("\\") | {chr(code) for code in range(32)} | {"\x7f"}


class FormField(Section):
    """A field of the template, as it appears in the form; `scripts/form` writes it into `predict.py`."""

    description: str = ""
    """Shown below the field: what to write there. Required."""
    title: str = ""
    """The field's label in the playground. Default: its name."""
    type: Literal["text", "long text", "list", "number", "choice", "boolean"] = "text"
    """A `list` is typed one item a line, separated by commas, or as a JSON list."""
    choices: tuple[str, ...] = ()
    """The values of a `choice`."""
    default: Any = None
    """Its value where it is left out. A field without one must be given."""
    required: bool = True
    """Whether Cog itself refuses a prediction without a field that has no default. `false`: `prompt`, `messages` or
    `fields` may be given instead, and only where all are missing the server asks for it by name."""
    minimum: float | None = None
    """Smallest number; fewest characters of a text, fewest items of a list."""
    maximum: float | None = None
    """Largest number; most characters of a text, most items of a list."""
    example: Any = None
    """A value that the playground opens with."""

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> FormField:
        if not self.description.strip():
            raise ValueError("needs a description: what users are to write there")
        if bool(self.choices) != (self.type == "choice"):
            raise ValueError("needs choices" if self.type == "choice" else f"a {self.type} has no choices")
        if len(set(self.choices)) < len(self.choices) or not all(one.strip() for one in self.choices):
            raise ValueError("choices must differ, and none may be empty")
        bounds = [one for one in (self.minimum, self.maximum) if one is not None]
        if bounds and self.type in ("choice", "boolean"):
            raise ValueError(f"a {self.type} has no bounds")
        if any(not math.isfinite(one) or abs(one) >= EXACT_INTEGERS for one in bounds):
            raise ValueError("bounds must be below 2**53, which Cog's schema holds exactly")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"minimum {bounds[0]:g} is above maximum {bounds[1]:g}")
        if self.type != "number" and any(one < 0 or not one.is_integer() for one in bounds):
            raise ValueError("minimum and maximum count characters or items: whole numbers of at least 0")
        for option, value in (("default", self.default), ("example", self.example)):
            if value is not None and not self._holds(value):
                raise ValueError(f"{option} {value!r} is no {self.type} within its choices and bounds")
        written = [self.title, *self.choices, *self._texts(self.default)]
        if any(_ESCAPED & set(one) or {"'", '"'} <= set(one) for one in written):
            raise ValueError(
                "title, choices and default may hold no line break, no backslash, and not both kinds of quotes"
            )
        return self

    @staticmethod
    def _texts(value: Any) -> list[str]:
        return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]

    def _holds(self, value: Any) -> bool:
        low, high = self.minimum, self.maximum
        if self.type == "boolean":
            return isinstance(value, bool)
        if self.type == "choice":
            return value in self.choices
        if self.type == "number":
            size = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            return math.isfinite(size) and (low is None or size >= low) and (high is None or size <= high)
        if self.type == "list":
            fits = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
        else:
            fits = isinstance(value, str)
        return fits and (low is None or len(value) >= low) and (high is None or len(value) <= high)


class Prompt(Section):
    """How an application's fields become the prompt, the same in training and serving."""

    system: str = ""
    """System message of every conversation that brings none. Empty: none."""
    template: str = "{prompt}"
    """The user's message, with `{fields}` to fill; `{{` writes a brace. A template of one field also takes a plain text
    prompt; with several, a plain text is taken as already filled. A list is written one item a line."""
    thinking: bool | None = None
    """Whether the model reasons before its answers, in training and in predictions that leave `thinking` empty: the
    chat template's switch. `null`: as the template has it."""
    fields: dict[str, FormField] = {}
    """The template's fields as the form shows them, by name, [below](#promptfieldsname)."""

    @pydantic.field_validator("template")
    @classmethod
    def _template_parses(cls, template: str) -> str:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        plain = all(name and name.isidentifier() and not spec and not how for _, name, spec, how in parts)
        if not parts or not plain:
            raise ValueError("needs at least one {field}, named like a Python identifier; write {{ for a brace")
        return template

    @pydantic.model_validator(mode="after")
    def _fields_are_the_templates(self) -> Prompt:
        names = self.names
        for name in self.fields:
            if name not in names:
                raise ValueError(f"fields describes {name}, which is no field of the template")
            if keyword.iskeyword(name) or name.startswith("_") or not name.isascii():
                raise ValueError(
                    f"the field {name} cannot be an input's name; rename it in the template and the examples"
                )
            if name in _TAKEN:
                raise ValueError(
                    f"the field {name} is named like an input that every model has; rename it in the template and the "
                    "examples"
                )
        if self.fields and (left := [name for name in names if name not in self.fields]):
            raise ValueError(f"fields lacks a description of {', '.join(left)}, which the template has")
        return self

    @property
    def names(self) -> list[str]:
        """The template's fields, in order of first use."""
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))


class Data(Section):
    """The examples."""

    train: str | None = None
    """Training examples: JSONL or JSON (also gzipped), or Parquet. `--train-data` overrides it."""
    validation: str | None = None
    """Validation examples. Without it, `validation_share` of the training examples is held out."""
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the examples held out for validation; never a prompt that is also trained on. 0 trains on all."""
    task: Task = "answer"
    """What is learned: the `answer`, or `reversed`, the instruction from its response."""
    general: str | None = None
    """Text that the model should still know after it was trained, for a [balanced merge](merge.md): JSON lines or
    Parquet with a `text` each, some hundred paragraphs. Default: the kit's own, of several kinds."""
    replay_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of general text among the training rows, which [forgets less](merge.md#training-that-forgets-less)."""
    ignore: tuple[str, ...] = ()
    """Keys of the examples to leave out: of rows, of messages and of a prompt's fields. Others that have no meaning in
    their [form](own-model.md#examples) are refused."""
    rename: dict[str, str] = {}
    """Keys of rows that your file calls otherwise than their [form](own-model.md#examples) does, such as
    `{question: prompt, answer: completion}`."""


class Train(Section):
    """QLoRA training. Higher rank, more epochs and a higher learning rate learn more and forget more."""

    epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Passes over the examples. 1 to 3 is typical."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides `epochs`."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. LoRA typically takes 0.0001 to 0.002; lower it when the loss jumps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """LoRA rank: how much the adapter can learn, and its size."""
    alpha: Annotated[float, Field(gt=0, le=2048)] | None = None
    """LoRA scale: updates are multiplied by `alpha / rank`. Default: twice the rank, so that the scale does not depend
    on it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped. Raise it when validation loss rises while training loss falls."""
    target_modules: str = "all-linear"
    """Layers that get an adapter: `all-linear`, or names separated by commas, such as `q_proj,v_proj`."""
    max_length: Annotated[int, Field(ge=8, le=131072)] = 1024
    """Longest example in tokens. Longer conversations are left out and counted; longer plain text is cut."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    """Examples per forward pass. Lower it when memory runs out, and raise `gradient_accumulation` in return."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    """Forward passes per optimizer step; the effective batch is `batch_size` times this."""
    packing: bool = True
    """Examples of a batch share sequences instead of being padded, where the base keeps them apart, which is tried
    first. It changes speed and memory, and nothing that is learnt."""
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    """`auto`: AdamW. The paged ones need a GPU and are for many trained parameters in little memory."""
    evaluations: Annotated[int, Field(ge=0, le=100)] = 4
    """Validations during training, evenly spaced."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where loss, learning rate and validation loss go beside the run's `metrics.jsonl`, as transformers' Trainer sends
    them. Install the package of that name first. TensorBoard reads the folder `tensorboard` of the run; Trackio and
    Weights & Biases take their own environment variables, such as `WANDB_PROJECT` and `WANDB_MODE`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed: validation split, order of the examples, start of the adapter."""

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class Verify(Section):
    """What weights must pass before they ship. Limits left out follow the weights' quantization scheme."""

    examples: str | None = None
    """Held-out examples. Default: those that the run held out."""
    rows: Annotated[int, Field(ge=4, le=10_000)] = 64
    """How many of them are used."""
    score: Annotated[str, Field(pattern=r"^(exact|json|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")] = "exact"
    """How an answer is scored: `exact` text, equal `json`, or your `module:function`, which takes the expected and the
    given answer and returns whether it is right."""
    mean_kl: Annotated[float, Field(gt=0)] | None = None
    """Most mean KL divergence from what training scored, in nats per answer token."""
    p99_kl: Annotated[float, Field(gt=0)] | None = None
    """Most KL divergence at the 99th percentile of answer tokens, in nats."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of answer tokens where the most likely token is the same."""
    perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    """Most perplexity of the expected answers, relative to what training scored."""
    score_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    """Most drop of the score against the adapter on the quantized base."""
    general_ratio: Annotated[float, Field(ge=1)] | None = None
    """Most perplexity of [general text](verification.md#what-was-forgotten), relative to the base before training.
    Default: 5."""
    general_kl: Annotated[float, Field(gt=0)] | None = None
    """Most mean KL divergence from the base before training, in nats per token of general text. Default: 2."""
    instructions: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of plain instructions answered worse than by the base: with nothing, in a loop, with a refusal or
    in another script. Default: 0.25."""
    memorized: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of training lines that come out whole from their first words without their prompt, beyond that of
    held-out lines. Default: 0.1."""
    overfit: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of training answers that come out whole, beyond that of held-out answers. Default: 0.5."""
    served_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of the engine's greedy tokens that transformers chooses too."""
    served_difference: Annotated[float, Field(gt=0)] | None = None
    """Most mean difference between the engine's log-probabilities and transformers', in nats."""


def _speculative(options: Any) -> Any:
    if options is None or options in ("auto", "none"):
        return options or "none"
    if not isinstance(options, dict):
        raise ValueError("is auto, none, or a mapping with a method")
    if not {"method", "model"} & options.keys():
        raise ValueError('needs a method, such as "ngram", or the model that drafts')
    if not isinstance(options.get("num_speculative_tokens", 1), int) or options.get("num_speculative_tokens", 1) < 1:
        raise ValueError("num_speculative_tokens must be a whole number of at least 1")
    if "model" in options:
        options = {**options, "model": _source(str(options["model"]))}
    return options


class Form(Section):
    """The form that users of the model see; `scripts/form` writes it into `predict.py`."""

    hide: tuple[InputName, ...] = ()
    """Inputs that this model does not need. They are no inputs of the model then, not even for programs."""

    @pydantic.field_validator("hide")
    @classmethod
    def _can_be_asked(cls, hide: tuple[InputName, ...]) -> tuple[InputName, ...]:
        if "max_tokens" in hide:
            raise ValueError("max_tokens cannot be hidden: it bounds the time and cost of an answer")
        return hide


class Serve(Section):
    """The server. `auto` is resolved on the machine that serves."""

    engine: EngineName = "vllm"
    """`vllm`, or `transformers`: the reference, slow, for any machine and model."""
    weights: Source | None = None
    """A [source](sources.md), used when none is given and `weights/` holds no model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. `auto`: the weights' own; float16 on GPUs before Ampere, float32 on CPUs that are faster at it."""
    mode: Literal["auto", "eager", "compiled"] = "auto"
    """`auto` compiles on GPUs. Compiled mode can answer wrongly on a CPU and is refused there."""
    max_context: Annotated[int, Field(ge=16)] | None = None
    """Most tokens of a prompt and its answer. Default: the model's, or as many as the memory holds."""
    tensor_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """GPUs that share each layer. `auto`: as many as the model can be divided between: its attention and KV heads, its
    feed-forward width, the groups of quantized weights."""
    pipeline_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Groups of GPUs that hold successive layers. `auto`: as many as the weights need."""
    data_parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Copies of the model, each on GPUs of its own. `auto`: as many as the GPUs that are left hold."""
    gpu_memory_share: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Share of each GPU's memory for weights and KV cache. `auto`: 0.9, or what is free; engines that the kit starts
    side by side share it."""
    cpu_kv_cache_gb: Annotated[float, Field(gt=0, le=4096)] = 2.0
    """KV cache on a CPU, in GB."""
    cpu_threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Threads on a CPU. `auto`: all cores."""
    kv_cache_dtype: str = "auto"
    """Type of the KV cache; `fp8` holds twice as many tokens."""
    prefix_caching: bool = True
    """Compute a beginning that prompts share only once."""
    chunked_prefill: bool | None = None
    """Split long prompts, so that they do not stall other streams. Default: vLLM's."""
    max_batched_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens per engine step: higher for throughput, lower for latency. Default: vLLM's."""
    cpu_offload_gb: Annotated[float, Field(ge=0, le=4096)] = 0.0
    """Weights kept in the CPU's memory, in GB per GPU. Slow; for models that do not fit."""
    kv_offload_gb: Annotated[float, Field(ge=0, le=4096)] = 0.0
    """KV cache swapped out to the CPU's memory, in GB."""
    speculative: Annotated[Literal["auto", "none"] | dict[str, Any], pydantic.BeforeValidator(_speculative)] = "auto"
    """[Speculative decoding](speed.md): `auto` uses the draft that the weights bring, `none` none; or vLLM's options: a
    `method` or the `model` that drafts."""
    adapters_at_once: Annotated[int, Field(ge=1, le=256)] = 4
    """Different adapters in one batch."""
    adapters_kept: Annotated[int, Field(ge=1, le=4096)] = 16
    """Adapters in memory; those used longest ago leave first."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Loopback port for [Prometheus metrics](serving.md#monitoring)."""
    form: Form = Form()
    """The form, [below](#serveform)."""
    log: Literal["none", "requests", "prompts"] = "none"
    """A JSON line per prediction: `requests` without prompt and answer, `prompts` with them."""

    @property
    def memory_share(self) -> float:
        """`gpu_memory_share` on a GPU that nobody else uses."""
        return 0.9 if self.gpu_memory_share == "auto" else self.gpu_memory_share


class Playground(Section):
    """The local Replicate of [scripts/playground](playground.md)."""

    retention_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    """Older predictions are removed, rated or not."""
    retention_count: Annotated[int, Field(ge=1)] = 10_000
    """Predictions kept; beyond that, the oldest unrated ones are removed."""
    keep_prompts: bool = True
    """Store inputs, outputs and logs. If false, they stay in memory only, for about five minutes after the end."""
    max_input_mb: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Largest request in MB, uploads included."""
    requests_per_minute: Annotated[int, Field(ge=1)] = 6000
    """Requests per address; more are answered 429 with `Retry-After`."""
    max_waiting: Annotated[int, Field(ge=2)] = 2000
    """Predictions that wait or run at once, those of one address at most half of them; more are answered 429."""
    max_waiting_mb: Annotated[int, Field(ge=2, le=1_048_576)] = 512
    """Their inputs and outputs in MB, likewise."""
    private_webhooks: bool = False
    """Send webhooks over plain http, to this machine and to its network too, rather than over https to the internet."""


class Plan(Section):
    """The load, prices and speeds that [scripts/plan](hardware.md) calculates with."""

    hardware: str | None = None
    """YAML file of machines that changes or extends `cogpress/plan/hardware.yaml`."""
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}
    """US dollars per second, by SKU. Default: the table's, which are unconfirmed."""
    scheme: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "fp8", "awq"] = "auto"
    """How the weights are served. `auto`: as they are."""
    context: Annotated[int, Field(ge=16)] | None = None
    """Tokens of a sequence, prompt and answer. Default: `serve.max_context`, else the model's up to 4096."""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 32
    """Sequences at once."""
    input_tokens: Annotated[int, Field(ge=1)] = 500
    """Prompt tokens of a request."""
    output_tokens: Annotated[int, Field(ge=1)] = 200
    """Answer tokens of a request."""
    requests_per_hour: Annotated[float, Field(gt=0)] = 60.0
    """The load."""
    private: bool = True
    """Private models pay for starting and idle time, public ones do not."""
    cold_start_seconds: Annotated[float, Field(ge=0)] = 120.0
    """Time an instance takes to start. Measure yours."""
    idle_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Time without requests after which an instance stops."""
    tokens_per_second: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Measured output speed at that concurrency, by SKU. Default: estimated."""
    answer_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the training tokens that have loss. Default: the run's, else all."""
    training_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a training, all epochs. Default: from the run's data, or `train.max_steps`."""
    training_tokens_per_second: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Measured training speed, by SKU. Default: estimated."""


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*"


class Case(Section):
    """A test prediction: an input, and what must come of it. Without a check, it must succeed."""

    name: str = ""
    """Shown in the report."""
    input: dict[str, Any] = {}
    """The prediction's inputs."""
    exact: str | None = None
    """The output is this text."""
    contains: str | tuple[str, ...] = ()
    """The output contains this text, or each of a list."""
    json_schema: dict[str, Any] | None = None
    """The output is JSON of this schema."""
    expected: str | None = None
    """`verify.score` accepts the output for this answer."""
    error: str | None = None
    """The prediction fails with an error that contains this text."""
    streams: bool = False
    """Text arrives before the end, and adds up to the output."""
    cancels: bool = False
    """The prediction ends as canceled within 15 s of being canceled."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Most run time in seconds, without the wait for a machine."""

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> Case:
        text = [name for name in ("exact", "contains", "json_schema", "expected") if getattr(self, name)]
        if self.cancels and (text or self.error or self.streams):
            raise ValueError("a canceled prediction has no answer: put the other checks into another test")
        if self.error is not None and (text or self.streams):
            raise ValueError("a prediction that fails has no answer: put the other checks into another test")
        return self


class Fuzz(Section):
    """Inputs generated from the schema. Files and secrets are not generated."""

    rounds: Annotated[int, Field(ge=0, le=1000)] = 8
    """Generated predictions; 0 for none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed."""
    fixed: dict[str, Any] = {}
    """Inputs that keep their value; `max_tokens` is 32 unless it is named here."""
    leave_out: tuple[str, ...] = ()
    """Inputs that are never given."""


class Deployment(Section):
    """A deployment to create or update with the new version."""

    name: Annotated[str, Field(pattern=_NAME + "$")]
    """Its name."""
    hardware: str | None = None
    """SKU. Default: the model's for a new deployment; that of an existing one stays."""
    min_instances: Annotated[int, Field(ge=0, le=5)] = 0
    """Instances that always run, and always cost. An existing deployment keeps its own where this is not set."""
    max_instances: Annotated[int, Field(ge=0, le=20)] = 1
    """Most instances under load; 0 switches the deployment off. An existing deployment keeps its own likewise."""


class TestTraining(Section):
    """A training to start with the pushed version, and predictions of the result."""

    data: str
    """File of examples."""
    input: dict[str, Any] = {}
    """The training's inputs."""
    tests: tuple[Case, ...] = ()
    """Test predictions of the trained version, as `push.tests`."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds."""


class Push(Section):
    """How [scripts/push](push.md) builds, and what a version must do before it reaches the model that people use."""

    weights: Literal["layer", "image", "fetched"] = "layer"
    """`layer`: a layer of their own, so that new code does not push them again; `image`: with everything else;
    `fetched`: not in the image but downloaded from `serve.weights` at the start (then remove `!weights` from
    `.dockerignore`)."""
    test_model: Annotated[str, Field(pattern=_NAME + r"/[A-Za-z0-9._-]+$")] | None = None
    """owner/name of the test model. Default: the destination's with `-test`."""
    tests: tuple[Case, ...] = ()
    """Test predictions, [below](#pushtests)."""
    same_answers: bool = False
    """Fail when a test input gets another answer than from the live version, instead of reporting it."""
    fuzz: Fuzz = Fuzz()
    """Generated inputs, [below](#pushfuzz)."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    """Predictions at once."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds that a prediction may take, cold start included."""
    parity: bool = True
    """Compare answers with the local weights. Needs the weights, held-out examples, and the inputs and metrics of
    `predict.py`."""
    rows: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Held-out examples to compare."""
    training: TestTraining | None = None
    """A training to try as well, [below](#pushtraining)."""
    deployment: Deployment | None = None
    """A deployment to create or update, [below](#pushdeployment)."""
