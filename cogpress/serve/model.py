"""From a prediction's inputs to a stream of text with metrics; everything that `predict.py` does, without Cog.

Knows prompts, limits and the order of a start; leaves weights to `fetch`, tokens to `engine` and the wire to Cog.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogpress import config, prompts, source
from cogpress.engines import base as engine
from cogpress.engines.base import DEAD, Adapter, Delta, Sampling
from cogpress.errors import CogpressError
from cogpress.files import recover
from cogpress.serve import requests as inputs
from cogpress.serve.adapters import Adapters
from cogpress.serve.metrics import Observer, Prediction, Record
from cogpress.serve.requests import Request
from cogpress.weights import base, fetch, manifest

LONG_TEXT = 20_000
"""Characters from which on a text is tokenized in a thread: below, that takes a few milliseconds."""


class Server:
    """One loaded model and its tokenizer."""

    def __init__(
        self, weights: str | os.PathLike[str] | None, settings: config.Config, root: Path, *, concurrency: int
    ) -> None:
        """Find, check and load weights.

        Args:
            weights: a source, as `fetch.model` takes it; None for `root/weights`, or `serve.weights` where that
                folder holds no model.
            settings: `serve` is used, and `prompt` where the weights bring none.
            root: the project's folder.
            concurrency: predictions that run at once.

        Raises:
            CogpressError: there are no weights, or they are not what was written.
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
        # What a prompt must look like was decided in training, so it travels with the weights.
        prompt = (found.manifest or {}).get("prompt")
        self.prompt = config.Prompt.model_validate(prompt) if prompt else settings.prompt
        self.observer = Observer(serve)
        self._long = asyncio.Lock()
        self._long_tokenizer: Any = None
        fetched = time.perf_counter()
        self.tokenizer = base.tokenizer(self.folder)
        read = time.perf_counter()
        self.engine = engine.load(self.folder, serve, concurrency, self.adapters.rank)
        ready = time.perf_counter()
        self.cold_start = {**seconds, "tokenizer": read - fetched, "engine": ready - read, "total": ready - started}
        """Seconds of the start: `fetch` and `check`, at the same time `imports` (which `saved` so much), `tokenizer`,
        `engine`, and `total`; from the first answer on also its `first_token`."""
        self.verified = manifest.state(self.folder, found.manifest)
        """Whether these very weights passed verification."""
        print(manifest.STATE_MESSAGES[self.verified], cold_start_line(self.cold_start), sep="\n", flush=True)

    def encode(self, request: Request, prompt: config.Prompt | None = None, tokenizer: Any = None) -> list[int]:
        """The prompt's token ids.

        Args:
            request: what is asked.
            prompt: what a prompt must look like; the model's own where not given.
            tokenizer: the model's, where not the server's own is to be used.

        Raises:
            CogpressError: nothing was asked, the JSON of an input is not as described, or the chat template refuses.
        """
        return prompts.encode(tokenizer or self.tokenizer, inputs.question(request), prompt or self.prompt)

    async def answer(self, given: Mapping[str, Any], record: Record, *, stream: bool = True) -> AsyncIterator[str]:
        """Check a request and stream its answer.

        Args:
            given: a prediction's inputs, by name; `max_tokens` is lowered to what the context has room for.
            record: takes the metrics: tokens in and out, seconds to the first token, tokens per second after it (the
                reciprocal of the mean inter-token latency), and log-probabilities where asked for.
            stream: give the text as it is generated; otherwise all of it at the end, which costs a little less.

        Raises:
            CogpressError: before anything is generated: the engine is dead, the inputs are not as described, the
                prompt fills the context, or the adapter can not be had.
        """
        started = time.perf_counter()
        try:
            prompt, sampling, adapter = await self._understand(given)
        except CogpressError as error:
            self.observer.refused(given, str(error))
            raise
        return self._stream(prompt, replace(sampling, stream=stream), adapter, Prediction(given, record, started))

    async def _understand(self, given: Mapping[str, Any]) -> tuple[list[int], Sampling, Adapter | None]:
        if self.engine.dead:
            raise CogpressError(DEAD)
        request, sampling = inputs.read(given, self.tokenizer)
        ready = await self.adapters.get(request.adapter) if request.adapter else None
        prompt = await self._encode(request, ready.prompt if ready else None)
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise CogpressError(
                f"The prompt is {len(prompt)} tokens long and the context {self.engine.max_context}, which must hold "
                "the answer too. Shorten the prompt."
            )
        most = min(sampling.max_tokens, room)
        sampling = replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
        await self.engine.check(sampling)
        return prompt, sampling, ready.adapter if ready else None

    async def _encode(self, request: Request, prompt: config.Prompt | None) -> list[int]:
        """`encode`; of long texts in a thread, with a tokenizer of its own, so that nobody's stream waits for it."""
        size = sum(len(text) for text in vars(request).values() if isinstance(text, str))
        if size < LONG_TEXT:
            return self.encode(request, prompt)
        async with self._long:
            if self._long_tokenizer is None:
                self._long_tokenizer = await asyncio.to_thread(base.tokenizer, self.folder)
            return await asyncio.to_thread(self.encode, request, prompt, self._long_tokenizer)

    async def _stream(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | None, prediction: Prediction
    ) -> AsyncIterator[str]:
        first = 0.0
        tokens = first_tokens = 0
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
                    if delta.finish_reason is not None:
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
            finally:
                prediction.generated = tokens
                await outputs.aclose()  # type: ignore[attr-defined]

    def _first_token(self, seconds: float) -> None:
        if "first_token" not in self.cold_start:
            self.cold_start["first_token"] = seconds
            print(f"First token of the first answer after {seconds:.2f} s.", flush=True)

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        """As metrics: each token's text and log-probability, and those of the most likely in its place."""

        def described(token: int, value: float) -> dict[str, Any]:
            # What is impossible has no finite logarithm, and JSON no infinity.
            return {"token": str(self.tokenizer.decode([token])), "id": token, "logprob": max(round(value, 5), -9999.0)}

        steps = zip(delta.token_ids, delta.logprobs, delta.alternatives, strict=True)
        return [
            {
                **described(token, value),
                "top": [described(*one) for one in sorted(others.items(), key=lambda one: -one[1])],
            }
            for token, value, others in steps
        ]


def find_weights(weights: str | os.PathLike[str] | None, root: Path, serve: config.Serve) -> str:
    """The source of the weights to serve: what was asked for, else `root/weights`, else `serve.weights`.

    Raises:
        CogpressError: none of them is there.
    """
    if weights is not None:
        return os.fspath(weights)
    folder = root / "weights"
    if not folder.exists():
        recover(folder)
    if (folder / "config.json").is_file():
        return str(folder)
    if serve.weights is not None:
        return str(root / serve.weights) if source.parse(serve.weights).kind == "path" else serve.weights
    raise CogpressError(
        f"{folder} holds no model. Train one with scripts/train, or name weights with COG_WEIGHTS or serve.weights."
    )


def batch_size() -> int:
    """Requests at once that keep an engine full: more than that wait in it without making it faster."""
    import torch

    return 256 if torch.cuda.is_available() else 64


def with_draft(serve: config.Serve, root: Path) -> config.Serve:
    """The options with the model that drafts, where one is named, in a folder of this machine."""
    if serve.speculative is None or "model" not in serve.speculative:
        return serve
    named = serve.speculative["model"]
    wanted = str(root / named) if source.parse(named).kind == "path" else named
    folder = fetch.model(wanted, root / ".cache").folder
    return serve.model_copy(update={"speculative": {**serve.speculative, "model": str(folder)}})


def fetch_and_import(wanted: str, cache: Path, serve: config.Serve) -> tuple[fetch.FetchedModel, dict[str, float]]:
    """Get and check the weights while the engine is imported, which takes as long as gigabytes of download.

    Returns:
        the model, and the seconds that each of `fetch`, `check` and `imports` took and that were `saved`.

    Raises:
        CogpressError: of the fetch, at once. Any exception of the imports is raised here too.
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
    """One line that says where the time of a start went."""
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name not in ("total", "saved"))
    return (
        f"Ready to answer after {seconds['total']:.1f} s: {parts}; fetching and checking during the imports saved "
        f"{seconds['saved']:.1f} s."
    )
