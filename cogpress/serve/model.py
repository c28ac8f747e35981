"""Everything that `predict.py` does, without Cog: load a model, and answer predictions with text and metrics."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cogpress import config, prompts, source
from cogpress.engines import base as engine
from cogpress.engines.base import CRASHED, DEAD, INCOMPLETE, Adapter, Delta, Sampling
from cogpress.errors import CogpressError
from cogpress.files import recover
from cogpress.serve import requests as inputs
from cogpress.serve.adapters import Adapters
from cogpress.serve.metrics import Observer, Record, RunningPrediction
from cogpress.serve.requests import Request
from cogpress.weights import base, fetch, manifest

LONG_TEXT = 20_000
"""Number of characters from which inputs are parsed and tokenized in a thread; shorter ones take a few milliseconds."""

_T = TypeVar("_T")


class ServedModel:
    """A loaded model that answers predictions."""

    def __init__(
        self, weights: str | os.PathLike[str] | None, settings: config.Config, root: Path, *, concurrency: int
    ) -> None:
        """Find, check and load weights.

        Args:
            weights: a source, as `fetch.model` takes it; None for `root/weights`, or `serve.weights` if that folder
                holds no model.
            settings: its `serve`, `adapters` and, for weights that bring none, `prompt` are used.
            root: the project's folder.
            concurrency: number of predictions at once.

        Raises:
            CogpressError: there are no weights, or they differ from their manifest.
        """
        started = time.perf_counter()
        self.adapters = Adapters(settings.adapters, settings, root)
        shared = bool(settings.adapters)
        wanted = self.adapters.weights(weights) if shared else find_weights(weights, root, settings.serve)
        serve = with_draft(settings.serve, root)
        found, seconds = fetch_and_import(wanted, root / ".cache", serve)
        if shared:
            self.adapters.check(found)
        self.folder = found.folder
        # Training decided what a prompt looks like, so it travels with the weights.
        prompt = (found.manifest or {}).get("prompt")
        self._form = settings.prompt
        own = config.Prompt.model_validate(prompt) if prompt else settings.prompt
        self.prompt = prompts.described(own, self._form)
        self.observer = Observer(serve)
        self._long = asyncio.Lock()
        self._long_tokenizer: Any = None
        fetched = time.perf_counter()
        self.tokenizer = base.tokenizer(self.folder)
        read = time.perf_counter()
        self.engine = engine.load(self.folder, serve, concurrency, self.adapters.rank)
        ready = time.perf_counter()
        self.cold_start = {**seconds, "tokenizer": read - fetched, "engine": ready - read, "total": ready - started}
        """Seconds of each part of the start: `fetch` and `check` with `imports` beside them (which `saved` some),
        `tokenizer`, `engine` and `total`; after the first answer also `first_token`."""
        self.verified = manifest.state(self.folder, found.manifest)
        """Whether these very weights passed verification."""
        context = f"A prompt and its answer may have {self.engine.max_context:,} tokens."
        print(manifest.STATE_MESSAGES[self.verified], context, cold_start_line(self.cold_start), sep="\n", flush=True)

    def encode(self, request: Request, prompt: config.Prompt | None = None, tokenizer: Any = None) -> list[int]:
        """The prompt's token ids.

        Args:
            request: the prediction's inputs.
            prompt: template and system text; the model's own by default.
            tokenizer: another instance of the model's tokenizer, for use in a thread.

        Raises:
            CogpressError: the prompt is empty or certainly fills the context, an input's JSON is malformed, or the chat
                template refuses.
        """
        settings, tokenizer = prompt or self.prompt, tokenizer or self.tokenizer
        question, context = inputs.question(request, settings), self.engine.max_context
        if prompts.at_least(tokenizer, question, settings) > context:
            raise _too_long(f"more than {context}", context)  # tokenizing megabytes takes seconds
        return prompts.encode(tokenizer, question, settings)

    async def answer(self, given: Mapping[str, Any], record: Record, *, stream: bool = True) -> AsyncIterator[str]:
        """Check a request and stream its answer.

        Args:
            given: a prediction's inputs, by name; `max_tokens` is lowered to the room left in the context.
            record: takes the metrics: tokens in and out, seconds to the first token, tokens per second after it (the
                reciprocal of the mean inter-token latency), and log-probabilities if requested.
            stream: yield text as it is generated; otherwise all of it at the end, which costs a little less.

        Raises:
            CogpressError: raised before anything is generated: the engine is dead, an input is invalid, the prompt
                fills the context, or the adapter is not available.
        """
        started = time.perf_counter()
        try:
            prompt, sampling, adapter = await self._understand(given)
        except CogpressError as error:
            self.observer.refused(given, str(error))
            raise
        except Exception as error:
            self.observer.refused(given, CRASHED)
            raise _crashed() from error
        return self._stream(
            prompt, replace(sampling, stream=stream), adapter, RunningPrediction(given, record, started)
        )

    async def _understand(self, given: Mapping[str, Any]) -> tuple[list[int], Sampling, Adapter | None]:
        if self.engine.dead:
            raise CogpressError(DEAD)
        # Parsing and tokenizing long texts would hold up everyone's streams.
        long = _size(given) >= LONG_TEXT
        request, sampling = await self._threaded(inputs.read, given) if long else inputs.read(given, self.tokenizer)
        ready = await self.adapters.get(request.adapter) if request.adapter else None
        form = prompts.described(ready.prompt, self._form) if ready else None
        prompt = await self._threaded(self.encode, request, form) if long else self.encode(request, form)
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise _too_long(str(len(prompt)), self.engine.max_context)
        most = min(sampling.max_tokens, room)
        sampling = replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
        await self.engine.check(sampling)
        return prompt, sampling, ready.adapter if ready else None

    async def _threaded(self, work: Callable[..., _T], *given: Any) -> _T:
        """Call with a tokenizer for use in a thread as the last argument, in one."""
        async with self._long:
            if self._long_tokenizer is None:
                self._long_tokenizer = await asyncio.to_thread(base.tokenizer, self.folder)
            return await asyncio.to_thread(work, *given, self._long_tokenizer)

    async def _stream(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | None, prediction: RunningPrediction
    ) -> AsyncIterator[str]:
        first = 0.0
        tokens = first_tokens = 0
        complete = False
        logprobs: list[dict[str, Any]] = []
        record = prediction.record
        with self.observer.watch(prediction):
            record("input_token_count", len(prompt))
            outputs = self.engine.generate(prompt, sampling, adapter)
            try:
                async for delta in outputs:
                    tokens += delta.tokens
                    if not first:
                        first, first_tokens = time.perf_counter(), tokens
                        if sampling.stream:
                            record("time_to_first_token", round(first - prediction.started, 4))
                        self._first_token(first - prediction.started)
                    logprobs += self._logprobs(delta)
                    if delta.finish_reason not in (None, "stop", "length"):
                        raise CogpressError(INCOMPLETE)
                    if delta.finish_reason is not None:
                        complete = True
                        record("output_token_count", tokens)
                        if sampling.logprobs is not None:
                            record("logprobs", logprobs)
                        record("finish_reason", delta.finish_reason)
                        seconds = time.perf_counter() - first
                        if tokens > first_tokens and seconds > 0:
                            record("tokens_per_second", round((tokens - first_tokens) / seconds, 2))
                    prediction.text.append(delta.text)
                    if delta.text:
                        yield delta.text
                if not complete:
                    raise CogpressError(INCOMPLETE)
            except CogpressError:
                raise
            except Exception as error:
                raise _crashed() from error
            finally:
                prediction.generated = tokens
                await outputs.aclose()  # type: ignore[attr-defined]

    def _first_token(self, seconds: float) -> None:
        if "first_token" not in self.cold_start:
            self.cold_start["first_token"] = seconds
            print(f"First token of the first answer after {seconds:.2f} s.", flush=True)

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        """Metrics: the text and log-probability of each token, and of the most likely ones in its place."""

        def described(token: int, value: float) -> dict[str, Any]:
            text = str(self.tokenizer.decode([token]))
            # An impossible token has log-probability -infinity, which JSON cannot hold.
            found = {"token": text, "id": token, "logprob": max(round(value, 5), -9999.0)}
            # Several tokens may share a character; their bytes join to it.
            raw = prompts.token_bytes(self.tokenizer, token) if "\ufffd" in text else None
            return found if raw is None else {**found, "bytes": list(raw)}

        steps = zip(delta.token_ids, delta.logprobs, delta.alternatives, strict=True)
        return [
            {
                **described(token, value),
                "top": [described(*one) for one in sorted(others.items(), key=lambda one: -one[1])],
            }
            for token, value, others in steps
        ]


def _size(given: Mapping[str, Any]) -> int:
    """Number of characters in a prediction's inputs."""
    texts = [one for value in given.values() for one in (value if isinstance(value, list) else [value])]
    return sum(len(one) for one in texts if isinstance(one, str))


def _too_long(tokens: str, context: int) -> CogpressError:
    """For users, of a prompt that leaves no room for an answer; `engines.base.CONTEXT_EXCEEDED` matches it."""
    return CogpressError(
        f"The prompt is {tokens} tokens long and the context {context}, which must also hold the answer. Shorten the "
        "prompt."
    )


def _crashed() -> CogpressError:
    """For users, of the exception that is handled now; what it says is for the log."""
    traceback.print_exc()
    return CogpressError(CRASHED)


def find_weights(weights: str | os.PathLike[str] | None, root: Path, serve: config.Serve) -> str:
    """The source of the weights to serve: `weights` if given, else `root/weights`, else `serve.weights`.

    Raises:
        CogpressError: there are none.
    """
    if weights is not None:
        return os.fspath(weights)
    folder = root / "weights"
    if not folder.exists():
        recover(folder)
    if (folder / "config.json").is_file():
        return str(folder)
    if serve.weights is not None:
        return source.under(serve.weights, root)
    raise CogpressError(
        f"{folder} holds no model. Train one with scripts/train, or name weights with COG_WEIGHTS or serve.weights."
    )


def batch_size() -> int:
    """The number of concurrent requests beyond which an engine gets no faster."""
    import torch

    return 256 if torch.cuda.is_available() else 64


def with_draft(serve: config.Serve, root: Path) -> config.Serve:
    """The options, with a draft model fetched and replaced by its local folder."""
    if not isinstance(serve.speculative, dict) or "model" not in serve.speculative:
        return serve
    folder = fetch.model(source.under(serve.speculative["model"], root), root / ".cache").folder
    return serve.model_copy(update={"speculative": {**serve.speculative, "model": str(folder)}})


def fetch_and_import(wanted: str, cache: Path, serve: config.Serve) -> tuple[fetch.FetchedModel, dict[str, float]]:
    """Fetch and check the weights while the engine is imported, which takes as long as downloading gigabytes.

    Returns:
        the model, and the seconds of `fetch`, `check` and `imports`, and those `saved` by doing them at once.

    Raises:
        CogpressError: from the fetch, without waiting for the imports. Exceptions of the imports are raised too.
    """
    # The two threads must not import the same packages at once.
    fetch.prepare(wanted)
    started = time.perf_counter()

    def imports() -> float:
        engine.find(serve.engine).prepare(serve)
        return time.perf_counter() - started

    pool = ThreadPoolExecutor(1, "imports")
    importing = pool.submit(imports)
    try:
        found = fetch.model(wanted, cache)
        spent = importing.result()
    finally:
        pool.shutdown(wait=False)
    took = time.perf_counter() - started
    return found, {**found.seconds, "imports": spent, "saved": max(0.0, sum(found.seconds.values()) + spent - took)}


def cold_start_line(seconds: dict[str, float]) -> str:
    """One line that breaks down the time of a start."""
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name not in ("total", "saved"))
    return (
        f"Ready to answer after {seconds['total']:.1f} s: {parts}; fetching and checking during the imports saved "
        f"{seconds['saved']:.1f} s."
    )
