"""The engine: token ids in, text as it is generated out. vLLM is the only module that is imported here.

Knows engine options, sampling and requests; leaves prompts, templates and Cog to `serving`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogpress.config import Serve
from cogpress.errors import CogpressError


def prepare(serve: Serve) -> None:
    """Import vLLM, configured; takes many seconds once, and may run in a thread while the weights are fetched."""
    import torch

    # vLLM reads these when it is imported and when its engine process starts.
    os.environ.update(environment(serve, torch.cuda.is_available()))
    import vllm.inputs.engine
    import vllm.sampling_params
    import vllm.v1.engine.async_llm  # noqa: F401 - what an engine uses, so that the first request imports nothing


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults change nothing; temperature 0 is greedy."""

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Delta:
    """What one engine step added to an answer: whole characters, how many tokens, and why it ended, if so.

    Where log-probabilities were asked for, the step's token ids and theirs come along.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """vLLM's asynchronous engine over one folder of weights."""

    def __init__(self, folder: Path, serve: Serve, concurrency: int) -> None:
        """Load the weights; blocks until the engine can answer.

        Raises:
            CogpressError: vLLM can not load the folder.
        """
        prepare(serve)
        import torch
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {
            "model": str(folder),
            "dtype": serve.dtype,
            "max_model_len": serve.max_context,
            "max_num_seqs": concurrency,
            "enable_prefix_caching": serve.prefix_caching,
            "load_format": "safetensors",
            "trust_remote_code": False,
            # Compiled mode answers nonsense on CPUs (torch 2.13, vLLM 0.32); eager matches transformers.
            "enforce_eager": not cuda,
            "disable_log_stats": True,
        }
        if cuda:
            options["gpu_memory_utilization"] = serve.gpu_memory_share
            options["tensor_parallel_size"] = torch.cuda.device_count()
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        except (ValueError, RuntimeError, OSError) as error:
            raise CogpressError(f"vLLM can not load {folder}: {str(error).strip()}") from error
        self.max_context: int = self._llm.model_config.max_model_len

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Delta]:
        """Answer a prompt. Closing the iterator, or cancelling the task that reads it, aborts the request.

        Args:
            prompt: token ids.

        Raises:
            CogpressError: the engine is dead.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
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
            logprobs=0 if sampling.logprobs else None,
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self._llm.generate(tokens_input(prompt), params, request_id=uuid.uuid4().hex)
        try:
            async for output in outputs:
                answer = output.outputs[0]
                ids = list(answer.token_ids) if sampling.logprobs else []
                chosen = [found[one].logprob for one, found in zip(ids, answer.logprobs or (), strict=True)]
                yield Delta(answer.text, len(answer.token_ids), answer.finish_reason, ids, chosen)
        except EngineDeadError:
            raise CogpressError(DEAD) from None
        finally:
            await outputs.aclose()

    async def score(self, ids: list[int]) -> list[float]:
        """The log-probability of each token after those before it; 0 for the first.

        Raises:
            CogpressError: the engine is dead.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        found: list[dict[int, Any] | None] = []
        try:
            async for output in self._llm.generate(tokens_input(ids), params, request_id=uuid.uuid4().hex):
                found = list(output.prompt_logprobs or ())
        except EngineDeadError:
            raise CogpressError(DEAD) from None
        return [step[one].logprob if step else 0.0 for one, step in zip(ids, found, strict=True)]

    @property
    def dead(self) -> bool:
        """Whether the engine's process has stopped and nothing can be answered any more."""
        return bool(self._llm.errored)

    @property
    def unfinished(self) -> int:
        """Requests that the engine still works on."""
        return int(self._llm.get_num_unfinished_requests())

    def shutdown(self) -> None:
        """End the engine's process."""
        self._llm.shutdown()


DEAD = "The engine has stopped; this server can not answer any more. Restart it and read its log for the cause."


def environment(serve: Serve, cuda: bool) -> dict[str, str]:
    """The environment variables by which vLLM is configured."""
    values = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not cuda:
        values["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(serve.cpu_kv_cache_gb)))
        values["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpu_cores(serve.cpu_threads)))
    return {name: value for name, value in values.items() if name not in os.environ or name.startswith("VLLM_CPU")}


def cpu_cores(threads: str | int) -> list[int]:
    """The cores that the engine computes on: all that this process may use, or the first so many of them.

    vLLM by itself leaves one core to its server. With two cores, giving it both made 16 streams 1.4 times as fast
    and a single stream 0.9 times (docs/measurements.md), so all of them is the default.
    """
    available = sorted(os.sched_getaffinity(0))
    return available if threads == "auto" else available[: int(threads)]
