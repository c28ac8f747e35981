"""What could be trained but not merged is refused before the first step; what is trained merges exactly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bench import bases, models
from cogpress import config
from cogpress.engines import base as engines
from cogpress.errors import CogpressError
from cogpress.prompts import Row
from cogpress.train import layers
from cogpress.weights import base, skeleton

pytestmark = pytest.mark.train


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_every_layer_of_a_usual_model_can_be_merged(tiny_base: Path, quantization: Any, targets: str) -> None:
    found = layers.choose(tiny_base, targets, quantization)
    assert ("lm_head" in found.adapted) == ("lm_head" in targets)
    assert ("model.layers.1.mlp.down_proj" in found.adapted) == (targets == "all-linear")
    assert ("model.layers.1.mlp.down_proj" in found.quantized) == (quantization == "nf4")
    assert (found.notes, found.files, found.transposed) == ((), {}, ())


@pytest.mark.parametrize(
    ("name", "quantization", "targets"),
    [
        ("gpt2", "none", "all-linear"),
        ("gpt2", "nf4", "c_attn,c_proj"),
        ("gpt2", "int8", "c_attn,c_proj,c_fc"),
        ("qwen2", "nf4", "q_proj,lm_head"),
        ("falcon", "nf4", "all-linear"),
        ("mixtral", "nf4", "all-linear"),
        ("olmoe", "nf4", "all-linear"),
        ("qwen3_moe", "none", "all-linear"),
        ("deepseek_v3", "nf4", "all-linear"),
        ("gpt_oss", "nf4", "all-linear"),
        ("jamba", "none", "all-linear"),
        ("gemma3", "nf4", "all-linear"),
        ("gemma3", "int8", "q_proj"),
        ("qwen3_5", "nf4", "all-linear"),
        ("llama4", "none", "all-linear"),
    ],
)
def test_what_is_trained_merges_as_training_saw_it(tmp_path: Path, name: str, quantization: Any, targets: str) -> None:
    """Against the adapter on the base: stored transposed, tied, under other names, beside experts or a vision tower."""
    folder = bases.make(name, tmp_path / "base")
    chosen, merged, untrained = models.merge_of_random(folder, tmp_path, quantization=quantization, targets=targets)
    assert abs(merged) < 1e-5
    assert untrained > 1e-4
    assert all("vision" not in layer for layer in (*chosen.adapted, *chosen.quantized))


def test_all_linear_names_the_experts_that_it_leaves_out(tmp_path: Path) -> None:
    found = layers.choose(bases.make("mixtral", tmp_path), "all-linear", "nf4")
    assert {name.rpartition(".")[2] for name in found.adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "leaves out the experts, 82% of the weights" in found.notes[0]
    assert "It trains q_proj, k_proj, v_proj, o_proj." in found.notes[0]
    assert found.notes[1].startswith("base.quantization nf4 holds 11% of this model's weights")


def test_an_expert_that_is_named_is_refused_with_what_can_be_trained(tmp_path: Path) -> None:
    folder = bases.make("mixtral", tmp_path)
    with pytest.raises(CogpressError, match=r"names w1, .* Its experts are fused .* Choose from q_proj, k_proj"):
        layers.choose(folder, "q_proj,w1", "nf4")


def test_dense_layers_that_peft_takes_for_experts_are_left_out_or_refused(tmp_path: Path) -> None:
    folder = bases.make("deepseek_v3", tmp_path)
    assert not any(name.endswith("gate_proj") for name in layers.choose(folder, "all-linear", "none").adapted)
    with pytest.raises(CogpressError, match=r"names gate_proj, but an adapter on .* train fused experts"):
        layers.choose(folder, "gate_proj", "none")


def test_a_base_whose_layers_stay_in_16_bits_says_so(tmp_path: Path) -> None:
    found = layers.choose(bases.make("falcon", tmp_path), "all-linear", "nf4")
    assert not found.quantized
    assert "nf4 holds none of this model's weights" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t5", r"\(t5\) has an encoder and a decoder"),
        ("whisper", r"\(whisper\) has an encoder and a decoder"),
        ("bert", r"\(bert\) is an encoder"),
        ("qwen2_5_vl", r"\(qwen2_5_vl\) answers about images"),
        ("mistral3", r"\(mistral3\) answers about images"),
        ("vit", r"\(vit\) is no language model"),
    ],
)
def test_a_base_that_is_no_language_model_is_refused_by_its_config(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(CogpressError, match=said):
        layers.choose(tmp_path, "all-linear", "nf4")
    with pytest.raises(CogpressError, match=said):
        base.load(tmp_path, "none")


def test_a_model_without_fused_attention_loads_with_plain(tmp_path: Path) -> None:
    loaded = base.load(bases.make("gpt_oss", tmp_path), "none", attention="sdpa")
    assert loaded.config._attn_implementation == "eager"


def test_what_is_quantized_already_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    settings = json.loads((tiny_base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CogpressError, match=r"is quantized already \(awq\).* Name its original as base\.source"):
        layers.choose(tmp_path, "all-linear", "nf4")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_reference_engine_computes_in_the_type_that_is_set(tmp_path: Path, name: str) -> None:
    """Layer norms, which compute in float32 whatever the model does, hand on that type."""
    folder = bases.make(name, tmp_path)
    engine = engines.load(folder, config.Serve(engine="transformers", dtype="float32"), 1)
    try:
        assert asyncio.run(engine.score([5, 6]))[1] < 0
    finally:
        engine.shutdown()


def test_an_output_layer_that_is_tied_to_embeddings_of_another_name_is_named(tmp_path: Path) -> None:
    folder = bases.make("gpt2", tmp_path)
    with pytest.raises(CogpressError, match=r"^lm_head could be trained but not merged: .* Leave lm_head out"):
        layers.choose(folder, "c_attn,lm_head", "none")


@pytest.mark.parametrize("targets", ["q_proj", "all-linear"])
def test_layers_of_another_shape_are_named(tmp_path: Path, targets: str) -> None:
    folder = bases.make("llama", tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    found = load_file(folder / "model.safetensors")
    save_file({**found, name: found[name][:32].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CogpressError, match=r"q_proj could be trained but not merged: .* \[32, 128\] .* not \[128, 128\]"
    ):
        layers.choose(folder, targets, "nf4")


@pytest.mark.parametrize(
    ("name", "ids", "pad", "said"),
    [
        ("llama", [5, 288], 2, r"gives the examples token 288, and the model's embedding has 288"),
        ("llama", [5, 6], 300, r"gives the padding token 300, and the model's embedding has 288"),
        ("opt", [5] * 257, 2, r"has 257 tokens, .* learnt 256 positions\. Set train\.max_length to 256"),
        ("llama", [5] * 257, 2, None),
        ("opt", [287] * 256, None, None),
    ],
)
def test_rows_that_the_base_cannot_read_are_refused(
    tmp_path: Path, name: str, ids: list[int], pad: int | None, said: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(bases.settings(name).to_dict()))
    expected = pytest.raises(CogpressError, match=said) if said else contextlib.nullcontext()
    with expected:
        layers.check_rows(tmp_path, [Row([5], [5]), Row(ids, ids)], pad)


def test_a_tokenizer_that_is_tekken_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CogpressError, match=r"tekken\.json alone.* Name a base with a tokenizer\.json"):
        base.tokenizer(tmp_path)


def test_learnt_positions_are_known(tmp_path: Path) -> None:
    settings = {name: bases.settings(name).to_dict() for name in ("opt", "gpt2", "llama")}
    found = {name: skeleton.positions(skeleton.build(one, name)) for name, one in settings.items()}
    assert found == {"opt": 256, "gpt2": 256, "llama": None}
