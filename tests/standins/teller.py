"""A model for clients of OpenAI's API: it answers what a message tells it to, on the real Cog runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogpress.cog.process import Server
from tests.standins.localreplicate import ROOT, project

RUNNER = """
import asyncio, json, sys, cog
from typing import Optional
sys.path.insert(0, {root!r})
from cog import BaseRunner, ConcatenateIterator, Input
from cogpress.cog import streaming
from cogpress.errors import CogpressError

class Runner(BaseRunner):
    def setup(self) -> None:
        streaming.install()

    async def chunks(self, inputs, record):
        text = json.loads(inputs["messages"])[-1]["content"] if inputs.get("messages") else inputs["prompt"]
        told = json.loads(text) if text.startswith("{{") else {{"say": [text]}}
        record("input_token_count", len(text.split()))
        if "refuse" in told:
            raise CogpressError(told["refuse"])
        if "raise" in told:
            raise ValueError(told["raise"])
        said = [json.dumps(inputs)] if told.get("tell") else told["say"] * told.get("times", 1)
        for one in said:
            await asyncio.sleep(told.get("delay", 0))
            yield one
        if "fail" in told:
            raise ValueError(told["fail"])
        record("output_token_count", len(said))
        for name, value in told.get("metrics", {{}}).items():
            record(name, value)

    @cog.streaming
    @cog.concurrent(max=16)
    async def run(
        self,
        prompt: str = Input(default=""),
        system_prompt: Optional[str] = Input(default=None),
        messages: Optional[str] = Input(default=None),
        adapter: str = Input(default=""),
        max_tokens: int = Input(default=512, ge=1, le=1000),
        temperature: float = Input(default=0.0, ge=0.0, le=5.0),
        top_p: float = Input(default=1.0, ge=0.01, le=1.0),
        top_k: int = Input(default=0, ge=0, le=1000),
        stop: str = Input(default=""),
        seed: Optional[int] = Input(default=None, ge=0),
        json_schema: Optional[str] = Input(default=None),
        tools: Optional[str] = Input(default=None),
        presence_penalty: float = Input(default=0.0, ge=-2.0, le=2.0),
        frequency_penalty: float = Input(default=0.0, ge=-2.0, le=2.0),
        logit_bias: Optional[str] = Input(default=None),
        logprobs: Optional[int] = Input(default=None, ge=0, le=20),
    ) -> ConcatenateIterator[str]:
        inputs = dict(locals())
        del inputs["self"]
        return streaming.stream(self.chunks(inputs, self.scope.record_metric))
"""


@contextmanager
def telling(folder: Path) -> Iterator[Server]:
    """The runtime with this model, ready."""
    root = project(folder)
    (root / "predict.py").write_text(RUNNER.format(root=str(ROOT)))
    with Server(root, log=root / "server.log") as server:
        server.wait_ready(120)
        yield server


def say(*texts: str, **more: Any) -> list[dict[str, Any]]:
    """Messages that make it answer these texts, one after the other."""
    return [{"role": "user", "content": json.dumps({"say": texts, **more})}]
