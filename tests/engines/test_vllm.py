"""One vLLM on a small random model: the context that its memory holds, and its end when it stalls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogpress import config
from cogpress.engines import base as engine
from cogpress.engines import watch
from cogpress.engines.base import DEAD, Sampling
from cogpress.errors import CogpressError
from cogpress.weights import base

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def started(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Any]]:
    """An engine with 1 GiB for a model whose context needs more, and the event loop that it belongs to."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("long")
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    found = AutoConfig.from_pretrained(base_folder)
    found.update({**shape, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 400_000})
    AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16).save_pretrained(folder)
    base.tokenizer(base_folder).save_pretrained(folder)

    async def start() -> Any:
        return engine.load(folder, config.Serve(cpu_kv_cache_gb=1, dtype="bfloat16"), 4, 0)

    with asyncio.Runner() as runner:
        made = runner.run(start())
        yield runner, made
        made.shutdown()


async def ask(made: Any) -> int:
    """How many tokens an answer has."""
    return sum([delta.tokens async for delta in made.generate([1, 2, 3], Sampling(max_tokens=8, min_tokens=8))])


def test_the_context_is_what_the_cache_holds(started: tuple[asyncio.Runner, Any]) -> None:
    runner, made = started
    bytes_per_token = 2 * 4 * 8 * 64 * 2  # keys and values of 4 layers, 8 heads of width 64, in bfloat16
    assert made.max_context == pytest.approx((1 << 30) / bytes_per_token, rel=0.01)
    assert runner.run(ask(made)) == 8


def test_one_with_a_dead_thread_is_ended_and_what_runs_fails(
    started: tuple[asyncio.Runner, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lives, and its loop waits for requests that no longer come in. The last test: it ends the engine."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "IDLE_LOOKS", 5)
    runner, made = started

    async def run() -> list[Any]:
        assert await ask(made) == 8
        client = made._llm.engine_core
        processes = made._processes()
        assert processes
        await client._send_input_message((b"nonsense",), client.core_engine)
        answers = await asyncio.wait_for(asyncio.gather(*(ask(made) for _ in range(3)), return_exceptions=True), 120)
        assert made.dead
        with pytest.raises(CogpressError, match="has stopped"):
            await ask(made)
        assert not psutil.wait_procs(processes, 30)[1]
        return answers

    assert [str(answer) for answer in runner.run(run())] == [DEAD] * 3
