"""Speculation changes the speed of an answer, not the answer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.speculative import SIDES
from cogpress import config
from cogpress.draft import file as draft
from cogpress.errors import CogpressError
from cogpress.remake import draft_of
from cogpress.serve import model as serving
from cogpress.weights import manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drafted_weights(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained weights with the draft that a training of theirs leaves."""
    weights = tmp_path_factory.mktemp("drafted") / "weights"
    shutil.copytree(trained_run / "weights", weights, copy_function=os.link)
    made = draft_of(ROOT, weights, trained_run, trained_run / "data" / "train.jsonl", Console(quiet=True))
    assert made == draft.path_in(weights)
    facts = manifest.read(weights)
    assert facts is not None
    manifest.check(weights, facts)
    assert "draft/table.safetensors" in facts["files"]
    return weights


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("side", ["n-gram", "table"])
def test_greedy_answers_are_those_without_it(
    side: str, trained_weights: Path, drafted_weights: Path, answered: list[dict[str, Any]]
) -> None:
    rows = answered[:12]
    asked = [json.dumps(row["prompt"]) for row in rows]
    weights = drafted_weights if side == "table" else trained_weights
    settings = config.load(ROOT / "model.yaml")
    serve = settings.serve.model_copy(update={"speculative": SIDES[side]})

    async def ask() -> tuple[list[str], dict[str, Any], str, int]:
        settings_with = settings.model_copy(update={"serve": serve})
        server = serving.ServedModel(str(weights), settings_with, ROOT, concurrency=16)
        metrics: dict[str, Any] = {}
        steps = 0
        generate = server.engine.generate

        async def counted(*given: Any) -> Any:
            nonlocal steps
            async for delta in generate(*given):
                steps += 1
                yield delta

        async def answer(**inputs: Any) -> str:
            chunks = await server.answer({"max_tokens": 160, **inputs}, metrics.__setitem__)
            return "".join([chunk async for chunk in chunks])

        try:
            texts = await asyncio.gather(*(answer(fields=fields) for fields in asked))
            server.engine.generate = counted  # type: ignore[method-assign, assignment]
            alone = {"plain": await answer(fields=asked[0], logprobs=2)}
            taken = int(metrics["output_token_count"]) - steps
            assert len(metrics["logprobs"]) == metrics["output_token_count"]
            assert all(one["logprob"] == one["top"][0]["logprob"] for one in metrics["logprobs"])
            alone["schema"] = await answer(fields=asked[0], json_schema='{"type": "object"}')
            alone["penalty"] = await answer(fields=asked[0], frequency_penalty=0.01, presence_penalty=0.01)
            alone["cold"] = await answer(fields=asked[0], temperature=0.01, seed=1, top_k=5, top_p=0.9)
            with pytest.raises(CogpressError, match="not yet supported with speculative decoding") as refused:
                await answer(prompt="x", logit_bias='{"yes": 5}')
            assert await server.engine.drafting(False) is (side == "table")
            steps = 0
            alone["switched off"] = await answer(fields=asked[0])
            if side == "table":
                assert steps >= int(metrics["output_token_count"]) - 1, "a step for each token"
            return texts, alone, str(refused.value), taken
        finally:
            server.engine.shutdown()

    texts, alone, refused, taken = asyncio.run(ask())
    assert texts == [row["answer"] for row in rows]
    assert set(alone.values()) == {rows[0]["answer"]}
    assert refused.startswith("This cannot be used: ")
    assert refused.endswith("Leave it out, or set serve.speculative: none.")
    if side == "table":
        assert taken > 20, "tokens that came beside another in one step"
