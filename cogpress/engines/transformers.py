"""The reference engine: transformers, token by token, for any machine and any model that transformers supports.

Requests take turns, one forward pass each: many stream at once, and throughput does not grow with their number.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from cogpress.config import Serve
from cogpress.engines.base import DEAD, INCOMPLETE, INPUT_NAMES, Adapter, Delta, Sampling, Structure
from cogpress.engines.grammar import Guard, ebnf, explained
from cogpress.engines.watch import STUCK_LOOKS, Watch
from cogpress.errors import CogpressError
from cogpress.weights import base

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

LOWEST_TEMPERATURE = 0.01
"""Lower ones but 0 count as this one, as in vLLM: what is divided by them is no number."""

_UNSUPPORTED = {
    "mode": "auto",
    "tensor_parallel": "auto",
    "pipeline_parallel": "auto",
    "data_parallel": "auto",
    "kv_cache_dtype": "auto",
    "chunked_prefill": None,
    "max_batched_tokens": None,
    "cpu_offload_gb": 0.0,
    "kv_offload_gb": 0.0,
}
"""Options that this engine does not support, with the only value that it accepts."""


def prepare(serve: Serve) -> None:
    """Import the libraries that the engine computes with."""
    refuse(serve)
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401


def refuse(serve: Serve) -> None:
    """Refuse options that this engine does not support.

    Raises:
        CogpressError: names the option.
    """
    drafts = {} if isinstance(serve.speculative, str) else {"speculative": "auto"}
    for name, only in (_UNSUPPORTED | drafts).items():
        if getattr(serve, name) != only:
            raise CogpressError(f"The engine transformers does not support serve.{name}. Leave it out, or use vllm.")


class Engine:
    """See `cogpress.engines.base.Engine`."""

    def __init__(self, folder: Path, serve: Serve, concurrency: int, adapters: int = 0) -> None:
        """See `cogpress.engines.base.Engine`. `concurrency` is not a limit: all requests take turns."""
        prepare(serve)
        import torch

        try:
            dtype = None if serve.dtype == "auto" else getattr(torch, serve.dtype)
            self._model: Any = base.load(folder, "none", dtype=dtype).eval()
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise CogpressError(f"transformers cannot load {folder}: {str(error).strip()}") from error
        self._tokenizer = base.tokenizer(folder)
        config = self._model.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", 0) or 2048)
        if serve.max_context is not None and serve.max_context > longest:
            raise CogpressError(f"serve.max_context is {serve.max_context}, above the model's {longest}. Lower it.")
        self.max_context: int = serve.max_context or longest
        self._vocabulary = int(config.vocab_size)
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        self._guard = Guard(folder, self._vocabulary)
        self._grammars: dict[Structure, Any] = {}
        self._compiler: Any = None
        self._compiling = threading.Lock()
        self._adapters: dict[str, None] = {}
        self._active: str | None = None  # the adapter that is switched on
        self._kept = serve.adapters_kept
        self._thread = _Worker()
        self._unfinished = 0
        self._dead = False
        self._open: set[asyncio.Future[None]] = set()
        """One for each request whose step is open; done once the engine is dead."""
        # A long prompt is a single step, which may take a CPU many minutes.
        self._watch = Watch(self._idle, lambda: [psutil.Process()], self._end, busy_looks=STUCK_LOOKS)

    async def check(self, sampling: Sampling) -> None:
        """See `cogpress.engines.base.Engine`."""
        structure = sampling.structure
        if structure is not None:
            await self._guard.checked(structure, lambda: self._grammar(structure))

    def _grammar(self, structure: Structure) -> Any:
        """A compiled grammar; cached, because many requests ask for the same."""
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
                value = structure.value
                text = choice_grammar(value) if isinstance(value, tuple) else ebnf(structure.kind, value)
                made = self._compiler.compile_grammar(text)
            except (RuntimeError, ValueError) as error:
                raise CogpressError(f"{INPUT_NAMES[structure.kind]} cannot be used: {explained(error)}.") from None
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
            processors = _processors(prompt, sampling, matcher, sorted(self._ends))
            state = _Request(prompt, sampling, matcher, processors, self._new_cache(), _generator(sampling))
            text = _Text(self._tokenizer, prompt, sampling.stop)
            while True:
                token, chosen, others = await self._run(lambda: self._step(state, adapter))
                ended = token in self._ends
                state.tokens.append(token)
                new, stopped = ("", False) if ended else text.add(token)
                finish = "stop" if ended or stopped else None
                if finish is None and len(state.tokens) >= sampling.max_tokens:
                    finish = "length"
                if finish is not None and not stopped:
                    new += text.rest()
                wanted = sampling.logprobs is not None
                yield Delta(
                    new,
                    1,
                    finish,
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
        step, dead = self._thread.submit(work), asyncio.get_running_loop().create_future()
        self._open.add(dead)
        try:
            with self._watch.request() as moved:
                await asyncio.wait({step, dead}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise CogpressError(DEAD)
                moved()
                return step.result()
        except MemoryError:
            self._dead = True
            raise CogpressError(DEAD) from None
        finally:
            self._open.discard(dead)
            step.cancel()

    async def _idle(self) -> None:
        """Pass through the computing thread."""
        await self._thread.submit(lambda: None)

    def _end(self, why: str) -> None:
        """Give up a stalled thread, so that what runs fails instead of waiting on."""
        print(f"The engine has stalled: {why}. It is ended.", file=sys.stderr, flush=True)
        self._dead = self._thread.stalled = True
        for one in self._open:
            if not one.done():
                one.set_result(None)

    def _step(self, state: _Request, adapter: Adapter | None) -> tuple[int, float, dict[int, float]]:
        """One forward pass: the next token, its log-probability, and the most likely tokens with theirs."""
        import torch

        new = state.tokens[-1:] or state.prompt
        model = self._with(adapter)
        with torch.no_grad():
            ids = torch.tensor([new], device=self._model.device)
            logits = model(input_ids=ids, past_key_values=state.cache, use_cache=True).logits[0, -1].float()
        logits = logits[: self._vocabulary]
        found = logits.log_softmax(-1)
        token = _choose(logits.cpu(), state)
        most = found.topk(min(state.sampling.logprobs or 0, len(found)))
        others = dict(zip(most.indices.tolist(), most.values.tolist(), strict=True))
        chosen = float(found[token])
        return token, chosen, {**others, token: chosen}

    def _with(self, adapter: Adapter | None) -> Any:
        """The model with an adapter, or without one. Runs in the computing thread.

        Nothing changes where the last step had the same adapter: peft would visit every module, half a step's time.
        """
        from peft import PeftModel

        if adapter is None:
            if self._active is not None:
                self._model.base_model.disable_adapter_layers()
                self._active = None
            return self._model
        name = f"a{adapter.number}"
        if name not in self._adapters:
            self._with(None)  # so that no adapter is active if this one fails to load
            if len(self._adapters) >= self._kept:
                oldest = next(iter(self._adapters))
                del self._adapters[oldest]
                self._model.delete_adapter(oldest)
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(adapter.folder), name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(adapter.folder), name).eval()
        self._adapters.pop(name, None)
        self._adapters[name] = None  # most recently used last
        if self._active is None:
            self._model.base_model.enable_adapter_layers()
        if self._active != name:
            self._model.set_adapter(name)
            self._active = name
        return self._model

    async def drafting(self, on: bool) -> bool:
        """See `cogpress.engines.base.Engine`."""
        return False

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

    def yield_cores(self) -> None:
        """See `cogpress.engines.base.Engine`; nothing to do, as this engine computes in the API process."""

    def shutdown(self) -> None:
        """See `cogpress.engines.base.Engine`."""
        self._dead = True
        self._guard.close()
        self._thread.close()


class _Worker:
    """A thread that computes one step of one request at a time, while the event loop stays free.

    An executor's thread would keep the program from ending where a step hangs.
    """

    def __init__(self) -> None:
        self.stalled = self._closed = False
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="transformers", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Compute, once all that was submitted before is done or canceled.

        Raises:
            CogpressError: it was closed.
        """
        if self._closed:
            raise CogpressError(DEAD)
        future: Future[_T] = Future()
        self._work.put((future, work))
        return asyncio.wrap_future(future)

    def _compute(self) -> None:
        while (found := self._work.get()) is not None:
            future, work = found
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                future.set_exception(error)
            del found, future, work  # they hold a request's cache

    def close(self) -> None:
        """End the thread once it has finished its step."""
        self._closed = True
        self._work.put(None)
        if not self.stalled:
            self._thread.join()


def choice_grammar(texts: tuple[str, ...]) -> str:
    """A grammar whose sentences are the given texts."""
    import json

    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


@dataclass
class _Request:
    """A request in progress."""

    prompt: list[int]
    sampling: Sampling
    matcher: Any
    processors: Any
    cache: Any
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)


def _generator(sampling: Sampling) -> torch.Generator:
    import torch

    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def _processors(prompt: list[int], sampling: Sampling, matcher: Any, ends: list[int]) -> Any:
    """What users ask for, as transformers' logits processors in vLLM's order: bias and penalties, grammar, sampling."""
    import transformers as library

    # transformers refuses whole numbers where it wants a float, and JSON does not tell 1 from 1.0.
    found = library.LogitsProcessorList()
    if sampling.logit_bias:
        bias = {(token,): float(value) for token, value in sampling.logit_bias.items()}
        found.append(library.SequenceBiasLogitsProcessor(bias))
    if sampling.min_tokens:
        found.append(library.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, ends))
    if sampling.repetition_penalty != 1:
        found.append(library.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(_count_penalties(len(prompt), sampling))
    if matcher is not None:
        found.append(_grammar_mask(matcher))
    if sampling.temperature > 0:
        found.append(library.TemperatureLogitsWarper(max(float(sampling.temperature), LOWEST_TEMPERATURE)))
        if sampling.min_p > 0:
            found.append(library.MinPLogitsWarper(float(sampling.min_p)))
        if sampling.top_k > 0:
            found.append(library.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(library.TopPLogitsWarper(float(sampling.top_p)))
    return found


def _count_penalties(start: int, sampling: Sampling) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """OpenAI's presence and frequency penalties, which transformers lacks, over the tokens from `start` on."""

    def apply(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = ids[0, start:].bincount(minlength=scores.shape[-1])
        return scores - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts

    return apply


def _grammar_mask(matcher: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Rule out the tokens that a grammar does not allow next."""
    import xgrammar

    def apply(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = xgrammar.allocate_token_bitmask(1, scores.shape[-1])
        matcher.fill_next_token_bitmask(mask)
        xgrammar.apply_token_bitmask_inplace(scores, mask)
        return scores

    return apply


def _choose(logits: torch.Tensor, state: _Request) -> int:
    import torch

    # Cloned, because processors may write in place.
    scores = state.processors(torch.tensor([state.prompt + state.tokens]), logits[None].clone())[0]
    if not torch.isfinite(scores).any():
        raise CogpressError(INCOMPLETE)  # the grammar leads nowhere
    if state.sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=state.generator))
    if state.matcher is not None:
        state.matcher.accept_token(token)
    return token


class _Text:
    """Detokenizes into whole characters, and holds back text that may begin a stop sequence."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: list[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._tokenizer = tokenizer._tokenizer
        self._stop = stop
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that certainly belongs to the answer, and whether a stop sequence ended it."""
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
        """The text that was held back, for the end of the answer."""
        new, self._held = self._held, ""
        return new
