"""vLLM's asynchronous engine, which runs in its own process. The only module that imports vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cogpress.config import Serve
from cogpress.draft import file as draft
from cogpress.draft import proposer
from cogpress.engines.base import DEAD, INPUT_NAMES, MAX_LOGPROBS, Adapter, Delta, Sampling
from cogpress.engines.gpus import free_and_total, memory_share, parallel
from cogpress.engines.grammar import NICENESS, Guard, ebnf, explained
from cogpress.engines.watch import Watch
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.setup.environment import ROOT
from cogpress.weights import base, manifest
from cogpress.weights.filenames import COMPILED

if TYPE_CHECKING:
    import torch

BFLOAT16_CAPABILITY = (8, 0)
"""Ampere's: the first compute capability with bfloat16 in hardware. Source: NVIDIA, CUDA C++ programming guide, table
of arithmetic instructions."""

EXECUTOR = "cogpress.engines.vllm.CPUExecutor"
"""On a CPU, compute in the engine's own process, by vLLM's own class (`__getattr__`). By default vLLM starts another
process there and polls it for its answer, on a core that computing needs (docs/measurements.md)."""

DRAFTS = "cogpress.draft.proposer.Proposer"
"""The class that vLLM's engine imports to draft."""

SWITCH = "cogpress.draft.proposer.Switch"
"""What its worker is extended by, to draft no more."""

WORKER = "cogpress.engines.vllm.DraftedWorker"
"""vLLM's worker for this machine, which shows its requests to the draft (`__getattr__`)."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as the largest rank of an adapter."""


def prepare(serve: Serve) -> None:
    """Configure and import vLLM, which takes seconds; may run in a thread while the weights are fetched."""
    import torch

    # vLLM reads these on import and when its engine process starts.
    os.environ.update(environment(serve, torch.cuda.is_available()))
    import vllm.inputs.engine
    import vllm.sampling_params
    import vllm.v1.engine.async_llm  # noqa: F401 - all that requests use, so that the first one imports nothing


class Engine:
    """See `cogpress.engines.base.Engine`."""

    def __init__(self, folder: Path, serve: Serve, concurrency: int, adapters: int = 0) -> None:
        """See `cogpress.engines.base.Engine`."""
        prepare(serve)
        import torch
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self._shares_cores = not gpus
        capability = torch.cuda.get_device_capability() if gpus else None
        memory = free_and_total(gpus) if gpus else (0, 0)
        wanted = options(folder, serve, concurrency, adapters, gpus, capability, memory)
        os.environ.update(compile_cache(folder, wanted))
        wanted["structured_outputs_config"] = StructuredOutputsConfig(**wanted["structured_outputs_config"])
        if not gpus:
            wanted["distributed_executor_backend"] = EXECUTOR
        try:
            # vLLM derives some of its defaults from the usage context.
            with contextlib.nullcontext() if gpus else computing_on(cpu_cores(serve.cpu_threads)):
                self._llm = AsyncLLM.from_engine_args(
                    AsyncEngineArgs(**wanted), usage_context=UsageContext.OPENAI_API_SERVER
                )
        except (ValueError, RuntimeError, OSError, NotImplementedError, TypeError) as error:
            raise CogpressError(f"vLLM cannot load {folder}: {str(error).strip()}") from error
        self.max_context: int = self._llm.model_config.max_model_len
        self._guard = Guard(folder, self._llm.model_config.get_vocab_size())
        self._stalled = False
        self._watch = Watch(self._llm.is_sleeping, self._processes, self._end)

    async def check(self, sampling: Sampling) -> None:
        """See `cogpress.engines.base.Engine`."""
        from vllm.exceptions import VLLMClientError

        config = self._llm.vllm_config
        if sampling.structure is None and config.speculative_config is None:
            return  # the bounds of single inputs are checked already

        def verify() -> None:
            _params(sampling).verify(
                config.model_config,
                config.speculative_config,
                config.structured_outputs_config,
                self._llm.get_tokenizer(),
            )

        try:
            # In a thread, because it parses user input while the event loop streams everyone's tokens.
            if sampling.structure is None:
                await asyncio.to_thread(verify)
            else:
                await self._guard.checked(sampling.structure, verify)
        except (VLLMClientError, ValueError, RuntimeError) as error:
            name = "This" if sampling.structure is None else INPUT_NAMES[sampling.structure.kind]
            way_out = " Leave it out, or set serve.speculative: none." if "speculative" in str(error) else ""
            raise CogpressError(f"{name} cannot be used: {explained(error)}.{way_out}") from None

    async def generate(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None
    ) -> AsyncIterator[Delta]:
        """See `cogpress.engines.base.Engine`."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        lora = None if adapter is None else LoRARequest(adapter.name, adapter.number, str(adapter.folder))
        outputs = self._llm.generate(
            tokens_input(prompt), _params(sampling), request_id=uuid.uuid4().hex, lora_request=lora
        )
        try:
            with self._watch.request() as moved:
                async for output in outputs:
                    moved()
                    answer = output.outputs[0]
                    ids = list(answer.token_ids) if sampling.logprobs is not None else []
                    found = [
                        {token: one.logprob for token, one in step.items()}
                        for _, step in zip(ids, answer.logprobs or (), strict=True)
                    ]
                    chosen = [step[token] for token, step in zip(ids, found, strict=True)]
                    yield Delta(answer.text, len(answer.token_ids), answer.finish_reason, ids, chosen, found)
        except EngineDeadError:
            raise CogpressError(DEAD) from None
        except (VLLMClientError, EngineGenerateError, ValueError) as error:
            raise CogpressError(f"The engine refused this: {error.__cause__ or error}") from None
        finally:
            await outputs.aclose()

    async def score(self, ids: list[int]) -> list[float]:
        """See `cogpress.engines.base.Engine`."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        found: list[dict[int, Any] | None] = []
        try:
            with self._watch.request() as moved:
                async for output in self._llm.generate(tokens_input(ids), params, request_id=uuid.uuid4().hex):
                    moved()
                    found = list(output.prompt_logprobs or ())
        except EngineDeadError:
            raise CogpressError(DEAD) from None
        return [step[one].logprob if step else 0.0 for one, step in zip(ids, found, strict=True)]

    async def drafting(self, on: bool) -> bool:
        """See `cogpress.engines.base.Engine`."""
        if self._llm.vllm_config.parallel_config.worker_extension_cls != SWITCH:
            return False
        await self._llm.collective_rpc("switch_draft", args=(on,))
        return True

    @property
    def dead(self) -> bool:
        """See `cogpress.engines.base.Engine`."""
        return self._stalled or bool(self._llm.errored)

    def _processes(self) -> list[psutil.Process]:
        """The engine's processes on this machine, with those that they started."""
        found: list[psutil.Process] = []
        for one in getattr(self._llm.engine_core.resources.engine_manager, "processes", ()):
            with contextlib.suppress(psutil.Error):
                leader = psutil.Process(one.pid)
                found += [leader, *leader.children(recursive=True)]
        return found

    def _end(self, why: str) -> None:
        """End a stalled engine, so that what it runs fails instead of waiting on."""
        from vllm.v1.engine.exceptions import EngineDeadError

        print(f"The engine has stalled: {why}. It is ended.", file=sys.stderr, flush=True)
        self._stalled = True
        self._llm.output_processor.propagate_error(EngineDeadError())
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    @property
    def unfinished(self) -> int:
        """See `cogpress.engines.base.Engine`."""
        return int(self._llm.get_num_unfinished_requests())

    def yield_cores(self) -> None:
        """See `cogpress.engines.base.Engine`."""
        if self._shares_cores:
            lower_priority()
            pin_threads()

    def shutdown(self) -> None:
        """See `cogpress.engines.base.Engine`."""
        self._guard.close()
        self._llm.shutdown()


def __getattr__(name: str) -> Any:
    """`CPUExecutor` and `DraftedWorker`, which each of vLLM's processes looks up here."""
    if name == "CPUExecutor":
        return _cpu_executor()
    if name == "DraftedWorker":
        return _drafted_worker()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _cpu_executor() -> type:
    """vLLM's executor under a name of this module, so that a process that gets it by name mends vLLM first."""
    import torch
    import vllm.v1.sample.rejection_sampler as sampler
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    sampler.expand_batch_to_tokens = expanded
    if not torch.cuda.is_available():
        sampler.RejectionSampler.forward = checked(sampler.RejectionSampler.forward)
    return type("CPUExecutor", (UniProcExecutor,), {"__module__": __name__, "__qualname__": "CPUExecutor"})


@functools.cache
def _drafted_worker() -> type:
    """vLLM's worker, which shows the draft its model runner: vLLM itself asks drafts with token ids alone."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker

    class DraftedWorker(Worker):  # type: ignore[misc, valid-type]
        def load_model(self, *given: Any, **named: Any) -> None:
            super().load_model(*given, **named)
            drafter = getattr(self.model_runner, "drafter", None)  # the last stage of a pipeline has it
            if drafter is not None:
                drafter.attach(self.model_runner)

    return DraftedWorker


def checked(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's check of drafted tokens (`RejectionSampler.forward`), faster where all requests are greedy.

    vLLM 0.32 copies the logits of all drafted tokens three times and ranks them with PyTorch's argmax, which takes
    three times as long as the one that vLLM has for CPUs and uses where nothing is drafted.

    Args:
        otherwise: vLLM's own, for requests that need more than the likeliest tokens.
    """
    import torch
    import vllm.v1.sample.rejection_sampler as sampler
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

    def idle(processor: Any) -> bool:
        if isinstance(processor, MinTokensLogitsProcessor):
            return not processor.min_toks
        return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases

    def plain(asked: Any) -> bool:
        holder = asked.thinking_budget_state_holder
        return (
            asked.all_greedy
            and asked.no_penalties
            and asked.max_num_logprobs is None
            and asked.allowed_token_ids_mask is None
            and not (asked.logprob_token_ids or asked.bad_words_token_ids)
            and not (holder is not None and holder.has_tracked_requests())
            and all(map(idle, asked.logitsprocs.non_argmax_invariant))
        )

    def forward(self: Any, facts: Any, draft_probs: Any, logits: torch.Tensor, asked: Any) -> Any:
        if self.synthetic_mode or not plain(asked):
            return otherwise(self, facts, draft_probs, logits, asked)
        # A few rows at a time, whose copies stay in the processor's cache.
        best = torch.cat([torch.ops._C.greedy_argmax(rows.to(torch.float32)) for rows in logits.split(16)])
        found = torch.full((len(facts.num_draft_tokens), facts.max_spec_len + 1), -1, dtype=torch.int32)
        sampler._rejection_greedy_sample(
            found,
            facts.cu_num_draft_tokens,
            facts.draft_token_ids,
            best[facts.target_logits_indices],
            best[facts.bonus_logits_indices].unsqueeze(-1),
            None,
            facts.max_spec_len,
            None,
            None,
        )
        return SamplerOutput(sampled_token_ids=found, logprobs_tensors=None)

    return forward


def expanded(
    values: torch.Tensor, ends: torch.Tensor, count: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """A request's value for each of its drafted tokens.

    vLLM 0.32's version for CPUs leaves values that are not 64-bit integers uninitialized: sampling with a draft then
    used any temperature, and a top_k ended the engine.

    Args:
        values: by request, shape (requests,).
        ends: where each request's tokens end, shape (requests,).
        count: number of tokens.
        replace_from: a value that stands for another,
        replace_to: and the other.
    """
    import torch

    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    found = values.repeat_interleave(counts, output_size=count)
    return found if replace_from == replace_to else found.masked_fill(found == replace_from, replace_to)


def _params(sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structure = None
    if sampling.structure is not None:
        value = sampling.structure.value
        if isinstance(value, tuple):
            structure = StructuredOutputsParams(choice=list(value))
        else:
            structure = StructuredOutputsParams(grammar=_ebnf(sampling.structure.kind, value))
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop=sampling.stop or None,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        logit_bias=sampling.logit_bias or None,
        structured_outputs=structure,
        output_kind=RequestOutputKind.DELTA if sampling.stream else RequestOutputKind.FINAL_ONLY,
    )


_ebnf = functools.lru_cache(maxsize=32)(ebnf)  # a schema may have a megabyte, and its grammar more


def options(
    folder: Path,
    serve: Serve,
    concurrency: int,
    adapters: int,
    gpus: int,
    capability: tuple[int, int] | None,
    memory: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The engine arguments for vLLM.

    Args:
        folder: the weights; vLLM reads there how they are quantized.
        serve: the options.
        concurrency: number of requests at once.
        adapters: the largest adapter's rank; 0 for none.
        gpus: number of GPUs of this machine.
        capability: their compute capability; None without GPUs.
        memory: free and total bytes of each; zeros where they are not known.

    Raises:
        CogpressError: an option does not fit this machine or these weights.
    """
    tensor, pipeline, data = parallel(folder, serve, gpus, memory[1])
    chosen: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype(folder, serve, capability),
        # -1: the model's context, or as much of it as the memory holds for one sequence.
        "max_model_len": serve.max_context or -1,
        "max_num_seqs": concurrency,
        "enable_prefix_caching": serve.prefix_caching,
        "kv_cache_dtype": serve.kv_cache_dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
        "max_logprobs": MAX_LOGPROBS,
        # By default vLLM chooses for each request, but its engine keeps the backend of the first one.
        "structured_outputs_config": {"backend": "xgrammar"},
        "enforce_eager": not compiled(serve, gpus),
        "disable_log_stats": serve.metrics_port is None,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
    }
    if serve.chunked_prefill is not None:
        chosen["enable_chunked_prefill"] = serve.chunked_prefill
    if serve.max_batched_tokens is not None:
        chosen["max_num_batched_tokens"] = serve.max_batched_tokens
    if serve.kv_offload_gb:
        chosen["kv_offloading_size"] = serve.kv_offload_gb
    chosen |= speculation(folder, serve, adapters)
    if data > 1:
        chosen["data_parallel_size"] = data
    if gpus:
        free, total = memory if memory[1] else (1, 1)
        chosen["gpu_memory_utilization"] = memory_share(serve, free, total)
        if serve.cpu_offload_gb:
            chosen["cpu_offload_gb"] = serve.cpu_offload_gb
    if adapters:
        if adapters > RANKS[-1]:
            raise CogpressError(f"An adapter has rank {adapters}; vLLM serves at most {RANKS[-1]}. Merge it.")
        chosen |= {
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in RANKS if rank >= adapters),
            "max_loras": serve.adapters_at_once,
            "max_cpu_loras": max(serve.adapters_kept, serve.adapters_at_once),
        }
    return chosen


def speculation(folder: Path, serve: Serve, adapters: int = 0) -> dict[str, Any]:
    """The engine arguments for speculative decoding: `serve.speculative`, or the draft that the weights bring.

    Raises:
        CogpressError: the draft is not one for these weights.
    """
    if isinstance(serve.speculative, dict):
        return {"speculative_config": dict(serve.speculative)}
    if serve.speculative == "none" or adapters or not draft.path_in(folder).is_file():
        return {}
    table = draft.check(folder, ((manifest.read(folder) or {}).get("merge") or {}).get("adapter"))
    chosen = {"method": "custom_class", "model": DRAFTS, "num_speculative_tokens": proposer.MOST}
    return {
        "speculative_config": chosen,
        "additional_config": {proposer.OPTION: str(table)},
        "worker_extension_cls": SWITCH,
        "worker_cls": WORKER,
    }


def lower_priority() -> None:
    """Lower the priority of every thread of this process's children to `NICENESS`.

    The engine computes on every core, and its threads spin rather than sleep, while the processes that stream a token
    need a core for a moment. At equal priority they waited for one: with 16 streams a tenth of the first tokens came at
    least 0.3 s later (docs/measurements.md).
    """
    for child in psutil.Process().children(recursive=True):
        # Linux has a priority per thread; a thread may end meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in child.threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread.id)))


def pin_threads() -> None:
    """Pin this process's threads, and those that they start, to one core.

    Each step brings a chunk for every stream, and each stream has its own thread. Spread over all cores, they took
    turns at the interpreter and disturbed every computing thread, and computing threads wait for each other.
    """
    core = max(os.sched_getaffinity(0))
    for thread in psutil.Process().threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, {core})


def compile_cache(folder: Path, chosen: Mapping[str, Any]) -> dict[str, str]:
    """The variable that says where vLLM keeps compiled code; nothing in eager mode, where the place is read-only, or
    where the variable is set already.

    vLLM unpickles what it finds there, which runs it, so that only the project's own weights may bring it. What was
    compiled for others is in the project's cache, by their fingerprint, or, without a manifest, in vLLM's own. Its keys
    hold the paths of the weights and packages: only code compiled inside the image is found there again.
    """
    if chosen["enforce_eager"] or "VLLM_CACHE_ROOT" in os.environ:
        return {}
    if folder.resolve() == (ROOT / "weights").resolve():
        place = folder / COMPILED
    elif facts := manifest.read(folder):
        place = ROOT / ".cache" / COMPILED / manifest.recorded_fingerprint(facts)[:16]
    else:
        return {}
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    return {"VLLM_CACHE_ROOT": str(place)} if os.access(place, os.W_OK) else {}


def dtype(folder: Path, serve: Serve, capability: tuple[int, int] | None) -> str:
    """The compute dtype. `auto` is the weights' own, but float16 on GPUs before Ampere, which lack bfloat16, and
    float32 on CPUs that compute it faster. Quantized weights keep theirs, which their kernels require.
    """
    if serve.dtype != "auto":
        return serve.dtype
    if capability is not None:
        return "float16" if capability < BFLOAT16_CAPABILITY else "auto"
    if "quantization_config" in read_json(folder / "config.json"):
        return "auto"
    return "float32" if str(base.compute_dtype()) == "torch.float32" else "auto"


def compiled(serve: Serve, gpus: int) -> bool:
    """Whether to run compiled: on GPUs, unless `serve.mode` says otherwise.

    Raises:
        CogpressError: it was requested on a CPU, where compiled mode answered wrongly (torch 2.13, vLLM 0.32) and eager
            mode matched transformers.
    """
    if serve.mode == "compiled" and not gpus:
        raise CogpressError(
            "serve.mode is compiled, which gives wrong answers on a CPU with this vLLM. Set it to auto or eager."
        )
    return bool(gpus) and serve.mode != "eager"


def environment(serve: Serve, cuda: bool) -> dict[str, str]:
    """The environment variables that configure vLLM."""
    # On a CPU, each of its processes warns a dozen times that this is a CPU.
    level = "WARNING" if cuda else "ERROR"
    values = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": level}
    if not cuda:
        # Warnings that its processes print at every start, whatever the user does.
        values |= {
            "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            # Else the first request for log-probabilities compiles their ranking, eager mode or not: without a C++
            # compiler that ends the engine.
            "TORCHDYNAMO_DISABLE": "1",
        }
        values["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(serve.cpu_kv_cache_gb)))
        # For vLLM's own server and offline engine, which the benchmarks compare with ours on the same cores.
        values["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpu_cores(serve.cpu_threads)))
    return {name: value for name, value in values.items() if name not in os.environ or name.startswith("VLLM_CPU")}


@contextlib.contextmanager
def computing_on(cores: Sequence[int]) -> Iterator[None]:
    """Bind OpenMP in processes started within the block to these cores, as vLLM does for its own workers. OpenMP reads
    these environment variables once, when a process starts.
    """
    variables = {
        "OMP_NUM_THREADS": str(len(cores)),
        "OMP_PLACES": f"{{{','.join(map(str, cores))}}}",
        "OMP_PROC_BIND": "true",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cpu_cores(threads: str | int) -> list[int]:
    """The cores that the engine computes on: the first `threads` of those this process may use, or all of them.

    By default vLLM leaves one core to its server. With both of two cores, one stream gave 1.15 times the tokens per
    second and 16 streams 1.4 times (docs/measurements.md), so the default is all of them.
    """
    available = sorted(os.sched_getaffinity(0))
    return available if threads == "auto" else available[: int(threads)]
