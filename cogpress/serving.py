"""From a prediction's inputs to a stream of text with metrics; everything that `predict.py` does, without Cog.

Knows prompts, limits and the order of a start; leaves weights to `fetch`, tokens to `engine` and the wire to Cog.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogpress import archive, base, chat, config, engine, fetch, source, verdict
from cogpress.engine import DEAD, Engine, Sampling
from cogpress.errors import CogpressError

Record = Callable[[str, Any], None]
"""Takes the name and the value of a metric."""


@dataclass(frozen=True)
class Request:
    """The inputs that decide what the model is asked; exactly one of prompt, fields and messages is used."""

    prompt: str = ""
    system_prompt: str | None = None
    messages: str | None = None
    fields: str | None = None


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
        wanted = find_weights(weights, root, settings.serve)
        found, seconds = fetch_and_import(wanted, root / ".cache", settings.serve)
        self.folder = found.folder
        # What a prompt must look like was decided in training, so it travels with the weights.
        prompt = (found.manifest or {}).get("prompt")
        self.prompt = config.Prompt.model_validate(prompt) if prompt else settings.prompt
        fetched = time.perf_counter()
        self.tokenizer = base.tokenizer(self.folder)
        read = time.perf_counter()
        self.engine = Engine(self.folder, settings.serve, concurrency)
        ready = time.perf_counter()
        self.cold_start = {**seconds, "tokenizer": read - fetched, "engine": ready - read, "total": ready - started}
        """Seconds of the start: `fetch` and `check`, at the same time `imports` (which `saved` so much), `tokenizer`,
        `engine`, and `total`; from the first answer on also its `first_token`."""
        self.verified = verdict.state(self.folder, found.manifest)
        """Whether these very weights passed verification."""
        print(verdict.TOLD[self.verified], cold_start_line(self.cold_start), sep="\n", flush=True)

    def encode(self, request: Request) -> list[int]:
        """The prompt's token ids.

        Raises:
            CogpressError: nothing was asked, or the JSON of messages or fields is not as described.
        """
        messages = self.chat(request)
        return chat.encode_prompt(self.tokenizer, messages)

    def chat(self, request: Request) -> list[dict[str, str]]:
        """The conversation that a request asks to continue: `messages` win over `fields`, these over `prompt`."""
        system = self.prompt.system if request.system_prompt is None else request.system_prompt
        if request.messages:
            messages = _messages(request.messages)
            if system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            return messages
        prompt = self.prompt.fill(request.prompt) if request.prompt.strip() else ""
        if request.fields:
            fields = _json(request.fields, "fields")
            if not isinstance(fields, dict):
                raise CogpressError('fields must be a JSON object, such as {"question": "..."}.')
            prompt = self.prompt.render(fields)
        if not prompt.strip():
            raise CogpressError("There is nothing to answer: prompt, messages and fields are all empty. Give one.")
        return chat.chat(prompt, system)

    def answer(self, request: Request, sampling: Sampling, record: Record) -> AsyncIterator[str]:
        """Check a request and stream its answer.

        Args:
            request: what is asked.
            sampling: how tokens are chosen; `max_tokens` is lowered to what the context has room for.
            record: takes the metrics: tokens in and out, seconds to the first token, and tokens per second after it
                (the reciprocal of the mean inter-token latency).

        Raises:
            CogpressError: at once, before anything is generated: the engine is dead, the inputs are not as described,
                or the prompt fills the context.
        """
        started = time.perf_counter()
        if self.engine.dead:
            raise CogpressError(DEAD)
        prompt = self.encode(request)
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise CogpressError(
                f"The prompt is {len(prompt)} tokens long and the context {self.engine.max_context}, which must hold "
                "the answer too. Shorten the prompt."
            )
        most = min(sampling.max_tokens, room)
        sampling = replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
        return self._stream(prompt, sampling, record, started)

    async def _stream(
        self, prompt: list[int], sampling: Sampling, record: Record, started: float
    ) -> AsyncIterator[str]:
        first = 0.0
        tokens = first_tokens = 0
        record("input_token_count", len(prompt))
        outputs = self.engine.generate(prompt, sampling)
        try:
            async for delta in outputs:
                tokens += delta.tokens
                if not first:
                    first, first_tokens = time.perf_counter(), tokens
                    record("time_to_first_token", round(first - started, 4))
                    if "first_token" not in self.cold_start:
                        self.cold_start["first_token"] = first - started
                        print(f"First token of the first answer after {first - started:.2f} s.", flush=True)
                if delta.finish_reason is not None:
                    record("output_token_count", tokens)
                    record("finish_reason", delta.finish_reason)
                    seconds = time.perf_counter() - first
                    if tokens > first_tokens and seconds > 0:
                        record("tokens_per_second", round((tokens - first_tokens) / seconds, 2))
                if delta.text:
                    yield delta.text
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CogpressError(f"{name} is not JSON: {error}. Give valid JSON, or leave it empty.") from None


def _messages(text: str) -> list[dict[str, str]]:
    messages = _json(text, "messages")
    if not isinstance(messages, list) or not messages:
        raise CogpressError('messages must be a non-empty JSON list of {"role": ..., "content": ...}.')
    for at, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise CogpressError(f"Message {at} must be an object with the texts role and content.")
        if message["role"] not in ("system", "user", "assistant"):
            raise CogpressError(f"Message {at} has the role {message['role']!r}; use system, user or assistant.")
        if message["role"] == "system" and at > 1:
            raise CogpressError(f"Message {at} is a system message; only the first message may be one.")
    if messages[-1]["role"] != "user":
        raise CogpressError("The last message must be the user's, which is the one to answer.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def parse_stop(text: str) -> list[str]:
    """Stop sequences: one text, or a JSON list of texts.

    Raises:
        CogpressError: it starts like a list and is not one of non-empty texts.
    """
    if not text.lstrip().startswith("["):
        return [text] if text else []
    try:
        values = json.loads(text)
    except ValueError:
        return [text]
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise CogpressError('stop must be a text or a JSON list of texts, such as ["\\n\\n", "END"].')
    return values


def find_weights(weights: str | os.PathLike[str] | None, root: Path, serve: config.Serve) -> str:
    """The source of the weights to serve: what was asked for, else `root/weights`, else `serve.weights`.

    Raises:
        CogpressError: none of them is there.
    """
    if weights is not None:
        return os.fspath(weights)
    folder = root / "weights"
    if not folder.exists():
        archive.settle(folder)
    if (folder / "config.json").is_file():
        return str(folder)
    if serve.weights is not None:
        return str(root / serve.weights) if source.parse(serve.weights).kind == "path" else serve.weights
    raise CogpressError(
        f"{folder} holds no model. Train one with scripts/train, or name weights with COG_WEIGHTS or serve.weights."
    )


def fetch_and_import(wanted: str, cache: Path, serve: config.Serve) -> tuple[fetch.Model, dict[str, float]]:
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
        engine.prepare(serve)
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
