"""Speculation changes the speed of an answer, not the answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.speculative import NGRAM
from cogpress import config
from cogpress.errors import CogpressError
from cogpress.serve import model as serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.server
def test_greedy_answers_are_those_without_it(trained_weights: Path, answered: list[dict[str, Any]]) -> None:
    asked = [json.dumps(row["prompt"]) for row in answered[:12]]
    settings = config.load(ROOT / "model.yaml")
    serve = settings.serve.model_copy(update={"speculative": NGRAM})

    async def ask() -> tuple[list[str], str]:
        settings_with = settings.model_copy(update={"serve": serve})
        server = serving.ServedModel(str(trained_weights), settings_with, ROOT, concurrency=16)

        async def answer(**inputs: Any) -> str:
            chunks = await server.answer({"max_tokens": 160, **inputs}, lambda _name, _value: None)
            return "".join([chunk async for chunk in chunks])

        try:
            texts = await asyncio.gather(*(answer(fields=fields) for fields in asked))
            with pytest.raises(CogpressError, match="not yet supported with speculative decoding") as refused:
                await answer(prompt="x", logit_bias='{"yes": 5}')
            return texts, str(refused.value)
        finally:
            server.engine.shutdown()

    texts, refused = asyncio.run(ask())
    assert texts == [row["answer"] for row in answered[:12]]
    assert refused.startswith("This cannot be used: ")
