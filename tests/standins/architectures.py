"""Architectures whose numbers are known, without a library that builds them."""

from __future__ import annotations

from cogpress.plan.architecture import Architecture, Cache, Linear


def llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, *, tied: bool,
    context: int = 8192, window: int | None = None,
) -> Architecture:  # fmt: skip
    """A model like Llama, counted by hand."""
    width = hidden // heads
    keys = key_value_heads * width
    linears = tuple(
        Linear(name, inputs, outputs, layers)
        for name, inputs, outputs in (
            ("q_proj", hidden, hidden),
            ("k_proj", hidden, keys),
            ("v_proj", hidden, keys),
            ("o_proj", hidden, hidden),
            ("gate_proj", hidden, intermediate),
            ("up_proj", hidden, intermediate),
            ("down_proj", intermediate, hidden),
        )
    )
    embedding = vocabulary * hidden
    norms = (2 * layers + 1) * hidden
    return Architecture(
        kind="LlamaForCausalLM",
        parameters=embedding * (1 if tied else 2) + norms + sum(one.weights for one in linears),
        embedding=embedding,
        head=0 if tied else embedding,
        linears=linears,
        experts=0,
        expert_share=1.0,
        caches=(Cache(2 * keys, window),) * layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=width,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        max_context=context,
        gated=True,
        dtype="bfloat16",
    )


SMOLLM2 = llama(49152, 576, 1536, 30, 9, 3, tied=True)
"""SmolLM2-135M, the embedded model."""

LLAMA3 = llama(128256, 4096, 14336, 32, 32, 8, tied=False)
"""Llama 3 8B."""
