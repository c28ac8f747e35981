"""What could be trained but not merged is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.merge import merge
from cogpress.train import run as training
from cogpress.weights import base

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


def test_layers_that_are_stored_otherwise_are_named(tmp_path: Path) -> None:
    """GPT-2 stores its weights as (inputs, outputs)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=64, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    model = training.adapted(settings(target_modules="c_attn"), tmp_path)
    with pytest.raises(CogpressError, match=r"c_attn could be trained but not merged: .* not \[24, 8\]"):
        merge.check_layers(tmp_path, training.layers(model, []))


def test_layers_that_the_files_do_not_have_are_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    (tmp_path / "model.safetensors").symlink_to(tiny_base / "model.safetensors")
    with pytest.raises(CogpressError, match=r"lm_head could be trained but not merged: .* Leave lm_head out"):
        merge.check_layers(tmp_path, {"lm_head": (49152, 128)})
