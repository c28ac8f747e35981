"""Parameters counted from config.json alone, against published counts and transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import bases
from cogpress.errors import CogpressError
from cogpress.plan import architecture, memory
from tests.standins.architectures import SMOLLM2

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 3 8B": (8_030_261_248, {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "Mistral 7B": (7_241_732_096, {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": 4096}),
    "Qwen2 0.5B": (494_032_768, {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True}),
    "Qwen3 0.6B": (596_049_920, {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": True}),
    "Gemma 2B": (2_506_172_416, {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048,
        "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 256, "tie_word_embeddings": True}),
    "Gemma 2 2B": (2_614_341_888, {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304,
        "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True}),
    "Phi-2": (2_779_683_840, {"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "Phi-3 mini": (3_821_079_552, {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}),
    "Mixtral 8x7B": (46_702_792_704, {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2}),
    "Pythia 160M": (162_322_944, {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_counted_as_published(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    expected, settings = PUBLISHED[name]
    found = architecture.read(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert found.parameters == expected == model.num_parameters()
    assert found.tied == bool(settings.get("tie_word_embeddings"))
    assert found.embedding == settings["vocab_size"] * settings["hidden_size"]
    assert found.layers == settings["num_hidden_layers"]
    # What is neither embedding, output layer, linear layer nor expert are norms and biases: next to nothing.
    rest = found.parameters - found.embedding - found.head - found.linear_weights - found.experts
    assert 0 < rest < 0.002 * found.parameters


@pytest.mark.slow
def test_what_a_hand_counted_model_has() -> None:
    found = architecture.read(
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
         "max_position_embeddings": 8192, "dtype": "bfloat16"}
    )  # fmt: skip
    assert found == SMOLLM2


@pytest.mark.slow
def test_experts_and_windows() -> None:
    mixtral = architecture.read(PUBLISHED["Mixtral 8x7B"][1])
    assert mixtral.expert_share == 0.25
    assert mixtral.experts == 32 * 8 * 3 * 4096 * 14336
    # Published as 12.9 billion used by each token, the embedding counted in.
    assert mixtral.active + mixtral.embedding == pytest.approx(12.88e9, rel=0.001)
    assert mixtral.intermediate == 2 * 14336
    mistral = architecture.read(PUBLISHED["Mistral 7B"][1])
    assert {one.window for one in mistral.caches} == {4096}
    gemma = architecture.read(PUBLISHED["Gemma 2 2B"][1])
    assert [one.window for one in gemma.caches] == [4096, None] * 13
    assert {one.values for one in gemma.caches} == {2 * 4 * 256}
    assert not architecture.read(PUBLISHED["Phi-2"][1]).gated
    assert architecture.read(PUBLISHED["Phi-3 mini"][1]).gated


@pytest.mark.slow
def test_quantized_weights_are_counted_as_unquantized_ones() -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True}}}
    settings = {**PUBLISHED["Qwen2 0.5B"][1],
                "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}  # fmt: skip
    found = architecture.read(settings)
    assert (found.parameters, found.scheme) == (494_032_768, "int4")


@pytest.mark.slow
def test_layers_are_counted_that_are_stored_transposed_or_are_of_their_own_kind() -> None:
    gpt2 = architecture.read(bases.settings("gpt2").to_dict())
    assert {one.name for one in gpt2.linears} == {"c_attn", "c_proj", "c_fc"}
    assert gpt2.adapter(2, "c_attn") == 2 * 2 * (128 + 384)
    falcon = architecture.read(bases.settings("falcon").to_dict())
    assert falcon.linears
    assert not any(one.quantizable for one in falcon.linears)
    held = memory.training_weights(falcon, "nf4")
    assert held == memory.training_weights(falcon, "lora") == 2.0 * falcon.parameters


@pytest.mark.slow
def test_a_model_that_is_not_known_is_explained() -> None:
    with pytest.raises(CogpressError, match=r"mine is not a language model that transformers can build: .*nonsense"):
        architecture.read({"model_type": "nonsense"}, "mine")
    with pytest.raises(CogpressError, match="is not a language model"):
        architecture.read({})
    with pytest.raises(CogpressError, match="is not a language model"):
        architecture.read({"model_type": "llama", "hidden_size": "wide"})


def test_a_config_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    settings = {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert architecture.config(str(tmp_path), tmp_path / "cache") == settings
    assert architecture.config(str(tmp_path / "config.json"), tmp_path / "cache") == settings
    with pytest.raises(CogpressError, match="cannot be read"):
        architecture.config(str(tmp_path / "none.json"), tmp_path / "cache")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CogpressError, match="is not a JSON object"):
        architecture.config(str(tmp_path), tmp_path / "cache")


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        (None, None),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "int8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
    ],
)
def test_schemes_are_known_by_their_config(given: Any, scheme: str | None) -> None:
    assert architecture.scheme_of(given) == scheme
