"""transformers itself, token by token: the reference, for any machine and any model that it knows.

Requests take turns, one forward pass each, so that many stream at once, but none is faster for it: for measuring and
trying out, and for models that no faster engine knows.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cogpress.config import Serve
from cogpress.engines.base import CALLED, DEAD, Adapter, Delta, Sampling, Structure
from cogpress.engines.grammar import MAX_WHITESPACE, Guard
from cogpress.errors import CogpressError
from cogpress.weights import base

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

_UNSUPPORTED = {
    "mode": "auto",
    "tensor_parallel": "auto",
    "pipeline_parallel": "auto",
    "kv_cache_dtype": "auto",
    "chunked_prefill": None,
    "max_batched_tokens": None,
    "cpu_offload_gb": 0.0,
    "kv_offload_gb": 0.0,
    "speculative": None,
}
"""Options that this engine does not have, with the only value that it takes."""


def prepare(serve: Serve) -> None:
    """Import what the engine computes with."""
    refuse(serve)
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401


def refuse(serve: Serve) -> None:
    """Refuse options that this engine does not have.

    Raises:
        CogpressError: naming the option.
    """
    for name, only in _UNSUPPORTED.items():
        if getattr(serve, name) != only:
            raise CogpressError(f"serve.{name} is not for the engine transformers. Leave it out, or use vllm.")


class Engine:
    """See `cogpress.engines.base.Engine`."""

    def __init__(self, folder: Path, serve: Serve, concurrency: int, adapters: int = 0) -> None:
        """See `cogpress.engines.base.Engine`. Requests beyond `concurrency` take turns too."""
        prepare(serve)
        import torch

        try:
            self._model: Any = base.load(folder, "none").eval()
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise CogpressError(f"transformers can not load {folder}: {str(error).strip()}") from error
        if serve.dtype != "auto":
            self._model.to(getattr(torch, serve.dtype))
        self._tokenizer = base.tokenizer(folder)
        config = self._model.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", 0) or 2048)
        if serve.max_context is not None and serve.max_context > longest:
            raise CogpressError(f"serve.max_context is {serve.max_context}, and the model's is {longest}. Lower it.")
        self.max_context: int = serve.max_context or longest
        self._vocabulary = int(config.vocab_size)
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        self._guard = Guard(folder, self._vocabulary)
        self._grammars: dict[Structure, Any] = {}
        self._compiler: Any = None
        self._compiling = threading.Lock()
        self._adapters: dict[str, None] = {}
        self._active: str | None = None  # the adapter that the model computes with
        self._kept = serve.adapters_kept
        # One thread computes, a step of one request at a time; the event loop is free meanwhile.
        self._thread = ThreadPoolExecutor(1, "transformers")
        self._unfinished = 0
        self._dead = False

    async def check(self, sampling: Sampling) -> None:
        """See `cogpress.engines.base.Engine`."""
        if sampling.structure is not None:
            await asyncio.to_thread(self._guard.check, sampling.structure)
            await asyncio.to_thread(self._grammar, sampling.structure)

    def _grammar(self, structure: Structure) -> Any:
        """Compiled; kept, because many requests ask for the same."""
        import xgrammar

        with self._compiling:
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    self._tokenizer, vocab_size=self._vocabulary, stop_token_ids=sorted(self._ends)
                )
                self._compiler = xgrammar.GrammarCompiler(info)
            if structure in self._grammars:
                return self._grammars[structure]
            try:
                if isinstance(structure.value, tuple):
                    made = self._compiler.compile_grammar(choice_grammar(structure.value))
                elif structure.kind == "json":
                    made = self._compiler.compile_json_schema(
                        structure.value, any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE
                    )
                elif structure.kind == "regex":
                    made = self._compiler.compile_regex(structure.value)
                else:
                    made = self._compiler.compile_grammar(structure.value)
            except (RuntimeError, ValueError) as error:
                raise CogpressError(f"{CALLED[structure.kind]} can not be used: {error}") from None
            if len(self._grammars) >= 64:
                self._grammars.pop(next(iter(self._grammars)))
            self._grammars[structure] = made
            return made

    async def generate(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None
    ) -> AsyncIterator[Delta]:
        """See `cogpress.engines.base.Engine`."""
        self._unfinished += 1
        try:
            matcher = await self._matcher(sampling)
            state = _State(prompt, sampling, matcher, self._new_cache(), _generator(sampling))
            text = _Text(self._tokenizer, prompt, sampling.stop)
            while True:
                token, chosen, others = await self._run(lambda: self._step(state, adapter))
                ended = token in self._ends
                state.tokens.append(token)
                new, stopped = ("", False) if ended else text.add(token)
                finish = "stop" if ended or stopped else None
                if finish is None and len(state.tokens) >= sampling.max_tokens:
                    finish = "length"
                if matcher is not None and matcher.is_terminated():
                    finish = "stop"
                if finish is not None and not stopped:
                    new += text.rest()
                wanted = sampling.logprobs is not None
                yield Delta(
                    new,
                    1,
                    finish,  # type: ignore[arg-type]
                    [token] if wanted else [],
                    [chosen] if wanted else [],
                    [others] if wanted else [],
                )
                if finish is not None:
                    return
        finally:
            self._unfinished -= 1

    async def _matcher(self, sampling: Sampling) -> Any:
        if sampling.structure is None:
            return None
        import xgrammar

        return xgrammar.GrammarMatcher(await asyncio.to_thread(self._grammar, sampling.structure))

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._dead:
            raise CogpressError(DEAD)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except MemoryError:
            self._dead = True
            raise CogpressError(DEAD) from None

    def _step(self, state: _State, adapter: Adapter | None) -> tuple[int, float, dict[int, float]]:
        """One forward pass: the next token, its log-probability, and the most likely ones with theirs."""
        import torch

        new = state.tokens[-1:] or state.prompt
        model = self._with(adapter)
        with torch.no_grad():
            ids = torch.tensor([new], device=self._model.device)
            logits = model(input_ids=ids, past_key_values=state.cache, use_cache=True).logits[0, -1].float()
        logits = logits[: self._vocabulary]
        found = logits.log_softmax(-1)
        token = _choose(logits.cpu(), state, self._ends)
        most = found.topk(min(state.sampling.logprobs or 0, len(found)))
        others = dict(zip(most.indices.tolist(), most.values.tolist(), strict=True))
        chosen = float(found[token])
        return token, chosen, {**others, token: chosen}

    def _with(self, adapter: Adapter | None) -> Any:
        """The model with an adapter, or as it is. Runs in the one thread that computes.

        What the last step had is left as it is: to change it, peft goes through every module, half a step's time.
        """
        from peft import PeftModel

        if adapter is None:
            if self._active is not None:
                self._model.base_model.disable_adapter_layers()
                self._active = None
            return self._model
        name = f"a{adapter.number}"
        if name not in self._adapters:
            self._with(None)  # so that what is active is known, should it not load
            if len(self._adapters) >= self._kept:
                oldest = next(iter(self._adapters))
                del self._adapters[oldest]
                self._model.delete_adapter(oldest)
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(adapter.folder), name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(adapter.folder), name).eval()
        self._adapters.pop(name, None)
        self._adapters[name] = None  # the last used is the last of them
        if self._active is None:
            self._model.base_model.enable_adapter_layers()
        if self._active != name:
            self._model.set_adapter(name)
            self._active = name
        return self._model

    async def score(self, ids: list[int]) -> list[float]:
        """See `cogpress.engines.base.Engine`."""
        import torch

        def work() -> list[float]:
            model = self._with(None)
            with torch.no_grad():
                tokens = torch.tensor([ids], device=self._model.device)
                found = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            return [0.0, *found.gather(-1, tokens[0, 1:, None])[:, 0].tolist()]

        return await self._run(work)

    @property
    def dead(self) -> bool:
        """See `cogpress.engines.base.Engine`."""
        return self._dead

    @property
    def unfinished(self) -> int:
        """See `cogpress.engines.base.Engine`."""
        return self._unfinished

    def settle(self) -> None:
        """See `cogpress.engines.base.Engine`; this one computes where it is carried from."""

    def shutdown(self) -> None:
        """See `cogpress.engines.base.Engine`."""
        self._dead = True
        self._guard.close()
        self._thread.shutdown(wait=True, cancel_futures=True)


def choice_grammar(texts: tuple[str, ...]) -> str:
    """A grammar of which each of some texts is a sentence."""
    import json

    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


class _State:
    """What one request has come to."""

    def __init__(
        self, prompt: list[int], sampling: Sampling, matcher: Any, cache: Any, generator: torch.Generator
    ) -> None:
        self.prompt, self.sampling, self.matcher, self.cache, self.generator = (
            prompt, sampling, matcher, cache, generator
        )  # fmt: skip
        self.tokens: list[int] = []


def _generator(sampling: Sampling) -> torch.Generator:
    import torch

    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def _choose(logits: torch.Tensor, state: _State, ends: set[int]) -> int:
    """The next token, in the order in which vLLM applies what users ask for: bias, penalties, then the rest."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling = state.sampling
    scores = logits[None].clone()
    for token, bias in sampling.logit_bias.items():
        scores[0, token] += bias
    if len(state.tokens) < sampling.min_tokens:
        scores[0, list(ends)] = -torch.inf
    if sampling.repetition_penalty != 1:
        seen = torch.tensor([state.prompt + state.tokens])
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores)
    counts = Counter(state.tokens)
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        places, numbers = torch.tensor(list(counts)), torch.tensor(list(counts.values()), dtype=scores.dtype)
        scores[0, places] -= sampling.presence_penalty + sampling.frequency_penalty * numbers
    if state.matcher is not None:
        import xgrammar

        mask = xgrammar.allocate_token_bitmask(1, scores.shape[-1])
        state.matcher.fill_next_token_bitmask(mask)
        xgrammar.apply_token_bitmask_inplace(scores, mask)
    if sampling.temperature == 0:
        token = int(scores[0].argmax())
    else:
        seen = torch.tensor([state.prompt + state.tokens])
        scores = TemperatureLogitsWarper(sampling.temperature)(seen, scores)
        if sampling.min_p > 0:
            scores = MinPLogitsWarper(sampling.min_p)(seen, scores)
        if sampling.top_k > 0:
            scores = TopKLogitsWarper(sampling.top_k)(seen, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(seen, scores)
        token = int(torch.multinomial(scores[0].softmax(-1), 1, generator=state.generator))
    if state.matcher is not None:
        state.matcher.accept_token(token)
    return token


class _Text:
    """Whole characters from token ids, held back where they may begin a stop sequence."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: list[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._tokenizer = tokenizer._tokenizer
        self._stop = stop
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is sure to belong to the answer now, and whether a stop sequence ended it."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((len(stop) - 1 for stop in self._stop), default=0)
        sure = len(self._held) - keep
        if sure <= 0:
            return "", False
        new, self._held = self._held[:sure], self._held[sure:]
        return new, False

    def rest(self) -> str:
        """What was held back, at the end."""
        new, self._held = self._held, ""
        return new
