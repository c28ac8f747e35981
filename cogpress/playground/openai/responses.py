"""Render a prediction as OpenAI's API returns it: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from cogpress.playground.export import output_text
from cogpress.playground.openai import errors
from cogpress.playground.openai.parameters import CompletionRequest
from cogpress.playground.openai.tools import ObjectReader, new_call
from cogpress.playground.records import Prediction

_DONE = b"data: [DONE]\n\n"

_PARTIAL = "�"
"""Stands in a token's text for an incomplete character."""


class Completion:
    """The response to one request, from one prediction."""

    def __init__(self, prediction: Prediction, request: CompletionRequest, model: str, *, chat: bool) -> None:
        """The prediction may still run; only `whole` and `last` need its end.

        Args:
            prediction: the answer.
            request: what it answers.
            model: its name as the client gave it.
            chat: whether it is a chat completion.
        """
        self._prediction, self._request, self._chat, self._tools = prediction, request, chat, request.tools
        self._forced = request.tools.forced if request.tools is not None else None
        self._seen, self._sent = "", 0
        self._arguments: ObjectReader | None = None
        """Reads those of the required call that has begun."""
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{prediction.id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(prediction.created_at),
            "model": model,
            "system_fingerprint": f"fp_{prediction.version.id[:12]}",
        }

    def whole(self) -> dict[str, Any]:
        """The response that does not stream, from a prediction that succeeded."""
        text = output_text(self._prediction.output)
        calls: list[dict[str, Any]] = []
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self._tools is not None:
                before, calls = self._tools.calls(text)
                if calls:
                    message |= {"content": before or None, "tool_calls": calls}
            choice["message"] = message
        else:
            choice["text"] = text
        choice |= {"logprobs": self._logprobs(), "finish_reason": self._reason(bool(calls))}
        return {**self._common, "choices": [choice], "usage": self._usage()}

    def _reason(self, called: bool) -> str:
        """The finish reason: the model's own, or else derived from the length."""
        metrics, most = self._prediction.metrics, self._request.max_tokens
        told, count = metrics.get("finish_reason"), metrics.get("output_token_count")
        if told not in ("stop", "length"):
            told = "length" if most is not None and isinstance(count, int) and count >= most else "stop"
        # The client must learn of calls that were cut off.
        return "tool_calls" if called and told == "stop" else told

    def _usage(self) -> dict[str, Any] | None:
        """Token counts, if the model reports them."""
        metrics = self._prediction.metrics
        counts = [metrics.get(name) for name in ("input_token_count", "output_token_count")]
        if not all(isinstance(one, int | float) for one in counts):
            return None
        read, written = (int(one) for one in counts if one is not None)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _logprobs(self) -> dict[str, Any] | None:
        most, told = self._request.logprobs, self._prediction.metrics.get("logprobs")
        if most is None or not isinstance(told, list):
            return None
        return chat_logprobs(told, most) if self._chat else text_logprobs(told, most)

    # For streams.

    def first(self) -> bytes:
        """The chunks before the text."""
        if not self._chat:
            return b""
        delta: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if self._tools is not None and self._forced is not None:
            delta |= {"content": None, "tool_calls": [{"index": 0, **new_call(self._forced["name"], "")}]}
        return self._event([self._choice(delta)])

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """The bytes before and after the text in each chunk; the text is JSON."""
        mark = "\0"
        delta: Any = mark
        if self._forced is not None or (self._tools is not None and self._tools.required):
            delta = {"tool_calls": [{"index": 0, "function": {"arguments": mark}}]}
        elif self._chat:
            delta = {"content": mark}
        before, _, after = self._event([self._choice(delta)]).partition(encoded(mark))
        return before, after

    def chunks(self, texts: list[str]) -> bytes:
        """The chunks of new text; none while it may begin a tool call, which waits for its name or for the end."""
        begin, text = b"", "".join(texts)
        if self._tools is not None and self._forced is None:
            self._seen += text
            if self._tools.required:
                begin, text = self._required(text)
            else:
                at, self._sent = self._sent, max(self._sent, self._tools.safe_length(self._seen))
                text = self._seen[at : self._sent]
        if not text:
            return begin
        # Only the text differs between chunks, so only the text is encoded.
        before, after = self._around
        return begin + before + encoded(text) + after

    def _required(self, text: str) -> tuple[bytes, str]:
        """The chunk that begins a required call, once its name is known, and what is new of its arguments."""
        begin = b""
        if self._arguments is None:
            found = self._tools.begun(self._seen) if self._tools is not None else None
            if found is None:
                return b"", ""
            self._arguments = ObjectReader()
            begin = self._event([self._choice({"tool_calls": [{"index": 0, **new_call(found[0], "")}]})])
            text = self._seen[found[1] :]
        return begin, self._arguments.feed(text)

    def last(self) -> bytes:
        """The chunks after the text, once the prediction has ended."""
        wrong = errors.from_prediction(self._prediction)
        if wrong is not None:
            return b"data: " + json.dumps(wrong.body).encode() + b"\n\n" + _DONE
        events, called = [], self._forced is not None or self._arguments is not None
        if self._tools is not None and not called:
            _, calls = self._tools.calls(self._seen)
            called, rest = bool(calls), self._seen[self._sent :]
            if calls:
                delta: Any = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}
                events.append(self._event([self._choice(delta)]))
            elif rest:
                events.append(self._event([self._choice({"content": rest})]))
        end: Any = {} if self._chat else ""
        events.append(self._event([self._choice(end, self._reason(called), self._logprobs())]))
        if self._request.usage:
            events.append(self._event([], self._usage()))
        return b"".join(events) + _DONE

    def _choice(self, delta: Any, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        key = "delta" if self._chat else "text"
        return {"index": 0, key: delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk: dict[str, Any] = {**self._common, "choices": choices}
        if self._chat:
            chunk["object"] = "chat.completion.chunk"
        if self._request.usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def encoded(text: str) -> bytes:
    """A text as ASCII JSON, in which no client sees a line end."""
    encoded = json.dumps(text)
    if "\\ud" in encoded:  # a lone surrogate, which some parsers reject
        encoded = json.dumps(text.encode(errors="replace").decode())
    return encoded.encode()


def _raw(one: dict[str, Any]) -> bytes | None:
    """A token's bytes; None for half a character of a model that does not report them."""
    if isinstance(one.get("bytes"), list):
        return bytes(one["bytes"])
    token = str(one["token"])
    return None if _PARTIAL in token else token.encode(errors="replace")


def _shown(one: dict[str, Any]) -> str:
    """A token's text; half a character by its bytes, so that two such tokens differ."""
    token, raw = str(one["token"]), _raw(one)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if _PARTIAL in token and raw else token


def chat_logprobs(told: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """A prediction's log-probabilities in the form of chat completions."""

    def described(one: dict[str, Any]) -> dict[str, Any]:
        raw = _raw(one)
        return {"token": _shown(one), "logprob": one["logprob"], "bytes": None if raw is None else list(raw)}

    content = [
        {**described(one), "top_logprobs": [described(other) for other in one.get("top", ())[:most]]} for one in told
    ]
    return {"content": content, "refusal": None}


def text_logprobs(told: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """A prediction's log-probabilities in the form of completions."""
    offsets, text = [], b""
    for one in told:
        offsets.append(len(text.decode(errors="ignore")))
        raw = _raw(one)
        text += str(one["token"]).encode(errors="replace") if raw is None else raw
    return {
        "tokens": [_shown(one) for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{_shown(other): other["logprob"] for other in one.get("top", ())[:most]} for one in told],
        "text_offset": offsets,
    }
