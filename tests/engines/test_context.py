"""A model whose context is larger than the memory is served with what fits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cogpress import config
from cogpress.engines import base as engine
from cogpress.engines.base import Sampling
from cogpress.weights import base

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_the_context_is_what_the_cache_holds(base_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    found = AutoConfig.from_pretrained(base_folder)
    found.update({**shape, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 400_000})
    AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16).save_pretrained(tmp_path)
    base.tokenizer(base_folder).save_pretrained(tmp_path)

    async def lengths() -> tuple[int, int]:
        made = engine.load(tmp_path, config.Serve(cpu_kv_cache_gb=1, dtype="bfloat16"), 4, 0)
        try:
            tokens = 0
            async for delta in made.generate([1, 2, 3], Sampling(max_tokens=4, temperature=0)):
                tokens += delta.tokens
            return made.max_context, tokens
        finally:
            made.shutdown()

    context, tokens = asyncio.run(lengths())
    bytes_per_token = 2 * 4 * 8 * 64 * 2  # keys and values of 4 layers, 8 heads of width 64, in bfloat16
    assert context == pytest.approx((1 << 30) / bytes_per_token, rel=0.01)
    assert tokens >= 1
