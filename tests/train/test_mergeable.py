"""What could be trained but not merged is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.merge import merge
from cogpress.train import run as training
from cogpress.weights import base, manifest

pytestmark = pytest.mark.train


def settings(quantization: str = "none", **train: Any) -> config.Config:
    given = {"base": {"quantization": quantization}, "train": {"rank": 2, **train}}
    return config.parse(given, "the test")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_every_layer_of_a_usual_model_can_be_merged(tiny_base: Path, quantization: str, targets: str) -> None:
    model = training.adapted(settings(quantization, target_modules=targets), tiny_base)
    found = training.layers(model, base.quantized_modules(model.get_base_model()))
    merge.check_layers(tiny_base, found)
    assert found["model.layers.1.self_attn.q_proj"] == (128, 128)
    assert ("lm_head" in found) == ("lm_head" in targets)
    assert ("model.layers.1.mlp.down_proj" in found) == (quantization == "nf4" or targets == "all-linear")


def gpt2(folder: Path, *, tied: bool = False) -> Path:
    """GPT-2 stores its weights as (inputs, outputs); two of its layers are square here."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_inner=64, n_layer=2, n_head=2, bos_token_id=0,
                   eos_token_id=1, tie_word_embeddings=tied)
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("targets", ["c_attn,c_proj,c_fc", "c_proj,lm_head", "all-linear"])
def test_layers_that_are_stored_as_inputs_by_outputs_merge(tmp_path: Path, quantization: str, targets: str) -> None:
    """Compared with the adapter on the base; a square weight that is not turned would fit, and be wrong."""
    folder = gpt2(tmp_path / "base")
    model = training.adapted(settings(quantization, target_modules=targets), folder, dtype=torch.float32)
    quantized = base.quantized_modules(model.get_base_model())
    found = training.layers(model, quantized)
    transposed = found.keys() & base.transposed_modules(model.get_base_model())
    assert "transformer.h.1.attn.c_proj" in transposed
    assert "lm_head" not in transposed
    merge.check_layers(folder, found, transposed)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.2)
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.float()
    model.save_pretrained(tmp_path / "adapter")
    facts = {
        "base": {"source": "the test", "fingerprint": manifest.fingerprint(folder)},
        "quantization": quantization,
        "compute_dtype": "float32",
        "quantized_modules": [name.replace(".base_layer", "") for name in quantized],
        "transposed_modules": sorted(transposed),
        "prompt": {},
    }
    manifest.write(tmp_path / "adapter", "adapter", facts)
    merge.merge(folder, tmp_path / "adapter", tmp_path / "weights")
    with torch.no_grad():
        got = base.load(tmp_path / "weights", "none", dtype=torch.float32)(input_ids=ids).logits.float()
        before = base.load(folder, quantization, dtype=torch.float32)(input_ids=ids).logits.float()  # type: ignore[arg-type]
    error = (got - expected).norm() / expected.norm()
    assert error < 0.02
    assert (before - expected).norm() / expected.norm() > 10 * error


def test_an_output_layer_that_is_tied_to_embeddings_of_another_name_is_named(tmp_path: Path) -> None:
    folder = gpt2(tmp_path, tied=True)
    model = training.adapted(settings(target_modules="c_attn,lm_head"), folder)
    with pytest.raises(CogpressError, match=r"^lm_head could be trained but not merged: .* Leave lm_head out"):
        merge.check_layers(folder, training.layers(model, []), base.transposed_modules(model.get_base_model()))


def test_layers_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = gpt2(tmp_path)
    model = training.adapted(settings(target_modules="c_attn"), folder)
    with pytest.raises(CogpressError, match=r"c_attn could be trained but not merged: .* not \[192, 64\]"):
        merge.check_layers(folder, training.layers(model, []))


def test_layers_that_the_files_do_not_have_are_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    (tmp_path / "model.safetensors").symlink_to(tiny_base / "model.safetensors")
    with pytest.raises(CogpressError, match=r"lm_head could be trained but not merged: .* Leave lm_head out"):
        merge.check_layers(tmp_path, {"lm_head": (49152, 128)})
