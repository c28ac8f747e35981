"""Memory by formulas, against numbers computed by hand and files that were made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cogpress.errors import CogpressError
from cogpress.plan import memory
from cogpress.plan.architecture import Architecture, Cache
from cogpress.plan.memory import Method, Serving, Training
from cogpress.train.layouts import TILE_BYTES
from tests.standins.architectures import LLAMA3, SMOLLM2


def test_parameters_are_the_published_ones() -> None:
    assert SMOLLM2.parameters == 134_515_008
    assert SMOLLM2.linear_weights == 106_168_320
    assert LLAMA3.parameters == 8_030_261_248
    # All but the input embedding; a tied one is the output layer and is used.
    assert SMOLLM2.active == 134_515_008
    assert LLAMA3.active == 8_030_261_248 - 525_336_576


def test_an_adapter_has_a_and_b_on_each_layer() -> None:
    # One layer: q and o 32 (576 + 576), k and v 32 (576 + 192), gate, up and down 32 (576 + 1536).
    assert SMOLLM2.adapter(32) == 30 * (2 * 36_864 + 2 * 24_576 + 3 * 67_584) == 9_768_960
    assert SMOLLM2.adapter(8, "q_proj, v_proj") == 30 * (8 * 1152 + 8 * 768)
    with pytest.raises(CogpressError, match=r"names qkv, which is not a linear layer.*down_proj"):
        SMOLLM2.adapter(8, "q_proj,qkv")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", 4 * 134_515_008),
        ("lora", 2 * 134_515_008),
        # 28,346,688 others in 16 bits; 155,520 outputs with a constant of 4 bytes each.
        ("int8", 56_693_376 + 106_168_320 + 4 * 155_520),
        # 4 bits are 53,084,160 bytes, the constants 1,658,880 and those of the constants 25,920.
        ("nf4", 56_693_376 + 53_084_160 + 1_658_880 + 25_920),
    ],
)
def test_the_base_as_training_holds_it(method: Method, expected: int) -> None:
    assert memory.training_weights(SMOLLM2, method) == expected


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter() -> None:
    found = memory.training(LLAMA3, Training(method="full", optimizer="adamw"))
    assert found.weights + found.gradients + found.optimizer == 16 * 8_030_261_248


def test_gradients_and_activations_of_full_fine_tuning_are_not_there_at_once() -> None:
    how = Training(method="full", batch=8, length=512, optimizer="adamw", frame=0)
    found = memory.training(SMOLLM2, how)
    # Between the passes: the output layer's gradient. Where batches are accumulated, those of the batches before.
    assert found.logits == 4 * 49_152 * 8 * 512 + 2 * TILE_BYTES
    assert found.gradients == 4 * 49_152 * 576
    accumulated = memory.training(SMOLLM2, replace(how, accumulation=2))
    assert accumulated.gradients == 4 * 134_515_008
    assert accumulated.total - found.total == 4 * (134_515_008 - 49_152 * 576)
    # With few tokens the end of the backward pass counts, where there are no logits any more.
    few = memory.training(SMOLLM2, replace(how, batch=1, length=16))
    assert (few.gradients, few.logits) == (4 * 134_515_008, 0)


def test_an_adapter_takes_sixteen_bytes_a_parameter_beside_its_base() -> None:
    found = memory.training(SMOLLM2, Training(method="nf4", rank=32, optimizer="adamw"))
    assert found.weights == 111_462_336 + 4 * 9_768_960
    assert (found.gradients, found.optimizer) == (4 * 9_768_960, 8 * 9_768_960)
    small = memory.training(SMOLLM2, Training(method="nf4", rank=32, optimizer="paged_adamw_8bit"))
    assert small.optimizer == pytest.approx(9_768_960 * 2.03125)


def test_a_layer_saves_what_its_derivation_lists() -> None:
    how = Training(method="nf4", rank=16, fused=True)
    # Norms 2 x 4h; inputs of q, k, v, o, gate, up (h each) and down (i) in 16 bits; between A and B 7 x 16 numbers;
    # queries, keys, values, output of 576 in 16 bits and 9 logarithms; three tensors of i.
    expected = 8 * 576 + 2 * (6 * 576 + 1536) + 2 * 7 * 16 + 8 * 576 + 4 * 9 + 6 * 1536
    assert memory.saved_by_layer(SMOLLM2, how) == expected == 28_676
    unfused = memory.saved_by_layer(SMOLLM2, replace(how, fused=False, length=100))
    assert unfused == expected + 6 * 9 * 100


def test_checkpointing_keeps_one_tensor_a_layer() -> None:
    how = Training(method="nf4", batch=2, length=50, answers=0.25, checkpointing=True, fused=True, frame=0)
    assert memory.logits(SMOLLM2, 25) == 12 * 49_152 * 25
    found = memory.training(SMOLLM2, how)
    assert found.logits == 12 * 49_152 * 25
    kept = 2 * 576 * 100 * 30
    layer = 28_676 * 100
    passing = layer + 10 * 1536 * 100 + 2 * 576 * 1536
    assert found.activations == kept + max(0, passing - found.logits)
    without = memory.training(SMOLLM2, replace(how, checkpointing=False))
    assert without.activations == pytest.approx(30 * layer)


@pytest.mark.parametrize("method", memory.METHODS)
def test_more_work_never_takes_less_memory(method: Method) -> None:
    how = Training(method=method, batch=4, length=256)
    base = memory.training(LLAMA3, how).total
    for more in ({"batch": 5}, {"length": 257}, {"checkpointing": False}, {"fused": False}, {"optimizer": "adamw"}):
        assert memory.training(LLAMA3, replace(how, **more)).total >= base, more  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "file_bytes"),
    # What scripts/quantize wrote of this very model, headers counted in.
    [("bfloat16", 269_060_552), ("int8", 163_226_688), ("int4", 113_175_416)],
)
def test_weights_as_served_are_as_large_as_their_files(scheme: memory.Scheme, file_bytes: int) -> None:
    assert memory.serving_weights(SMOLLM2, scheme) == pytest.approx(file_bytes, rel=0.001)


def test_groups_are_as_large_as_the_layers_allow() -> None:
    # 4096 and 14336 are multiples of 128, 576 of 64 alone.
    assert memory.serving_weights(LLAMA3, "int4") - 2 * (LLAMA3.parameters - LLAMA3.linear_weights) == pytest.approx(
        LLAMA3.linear_weights * (0.5 + 2 / 128)
    )
    assert memory.serving_weights(SMOLLM2, "int4") == 56_693_376 + 106_168_320 * (0.5 + 2 / 64)


def test_the_cache_of_a_sequence() -> None:
    # 30 layers x 2 x 3 heads x 64 in 16 bits: 23,040 bytes a token; 100 tokens are 7 blocks of 16.
    assert memory.cache_of_sequence(SMOLLM2, 100) == 112 * 23_040
    assert memory.cache_of_sequence(SMOLLM2, 100, cache_bytes=1) == 112 * 11_520
    # Llama 3: 128 KiB a token, as it is known for.
    assert memory.cache_of_sequence(LLAMA3, 16) == 16 * 131_072


def test_a_window_ends_the_cache() -> None:
    mixed = replace(SMOLLM2, caches=(Cache(384, 64), Cache(384, None)))
    # A window of 64 tokens touches at most 4 blocks and a part of a fifth.
    assert memory.cache_of_sequence(mixed, 1600) == (5 * 16 + 1600) * 384 * 2
    assert memory.cache_of_sequence(mixed, 32) == 2 * 32 * 384 * 2


def test_gpus_share_weights_and_heads() -> None:
    one, two = (memory.serving(LLAMA3, Serving(gpus=gpus)) for gpus in (1, 2))
    assert two.weights == one.weights / 2
    assert two.cache == one.cache / 2
    # 3 heads of keys and values on 9 GPUs: each holds a whole one.
    assert memory.cache(SMOLLM2, Serving(gpus=9)) == pytest.approx(memory.cache(SMOLLM2, Serving()) / 3)


def test_host_memory_is_of_processes_and_of_tensors_in_transit() -> None:
    embedding = 2 * 128_256 * 4096
    assert memory.largest_tensor(LLAMA3) == embedding
    assert memory.host_of_training(LLAMA3, Training()) == 3e9 + 4 * embedding
    # Of a small model the comparison's log-probabilities are the larger part: 2,048 tokens at least.
    few = replace(LLAMA3, embedding=0, head=0, linears=())
    assert memory.host_of_training(few, Training()) == 3e9 + 4 * 2048 * 128_256
    assert memory.host_of_training(few, Training(length=4096)) == 3e9 + 4 * 4096 * 128_256
    assert memory.host_of_serving(LLAMA3, Serving()) == 6e9 + embedding
    assert memory.host_of_serving(LLAMA3, Serving(gpus=2)) == 12e9 + 2 * embedding
    assert memory.largest_tensor(replace(LLAMA3, experts=32 * 10**9)) == 2 * 10**9, "those of one layer"
    assert memory.largest_tensor(replace(LLAMA3, dtype="float32")) == 2 * embedding


def test_the_total_is_the_sum_of_its_parts() -> None:
    found = memory.serving(LLAMA3, Serving(context=4096, concurrency=16))
    assert found.total == found.weights + found.cache + found.activations + found.overhead
    assert found.weights == 2 * 8_030_261_248
    assert found.cache == 16 * 4096 * 131_072


def test_experts_that_are_one_tensor_stay_in_16_bits_for_training_and_shrink_for_serving() -> None:
    experts = 1_000_000
    mixture: Architecture = replace(
        SMOLLM2, parameters=SMOLLM2.parameters + experts, experts=experts, expert_share=0.25
    )
    more = memory.training_weights(mixture, "nf4") - memory.training_weights(SMOLLM2, "nf4")
    assert more == 2 * experts
    assert memory.serving_weights(mixture, "int8") - memory.serving_weights(SMOLLM2, "int8") == experts
    assert mixture.active == SMOLLM2.active + 250_000


def test_serving_on_a_cpu_takes_what_was_measured_or_a_little_more() -> None:
    # The embedded base, 269 MB of files, with 2 GiB of cache: 3.9 GB in all processes, shared pages counted once.
    needed = memory.host_of_serving_on_cpu(269e6, 2 * 2**30)
    assert 3.9e9 <= needed <= 1.25 * 3.9e9


def test_activations_are_computed_again_only_where_memory_needs_it() -> None:
    how = Training(method="nf4", batch=4, length=512)
    kept, again = (memory.training(LLAMA3, replace(how, checkpointing=one)).total for one in (False, True))
    assert not memory.checkpoints(LLAMA3, how, kept / 0.9 + 1)
    assert memory.checkpoints(LLAMA3, how, kept / 0.9 - 1)
    assert memory.checkpoints(LLAMA3, how, again)
