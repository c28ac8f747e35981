"""The merge gives what training saw, tensor by tensor, and refuses what it can not merge exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogpress import base, config, data, divergence, manifest, merge, training
from cogpress.errors import CogpressError

pytestmark = pytest.mark.train


def an_adapter(base_folder: Path, out: Path, quantization: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random adapter as a training run leaves it; random, so that no part of it is zero."""
    chosen = config.Config().override({"rank": 4, "quantization": quantization})
    torch.manual_seed(1)
    model = training.adapted(chosen, base_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    facts = {
        "base": {"source": "the tiny base", "fingerprint": manifest.fingerprint(base_folder)},
        "quantization": quantization,
        "compute_dtype": "bfloat16",
        "quantized_modules": base.quantized_modules(model.get_base_model()),
        "prompt": config.Prompt().model_dump(),
    }
    facts["quantized_modules"] = [name.replace(".base_layer", "") for name in facts["quantized_modules"]]
    manifest.write(out, "adapter", facts)
    return out


@pytest.fixture(scope="module", params=["nf4", "int8", "none"])
def made(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    adapter = an_adapter(tiny_base, folder / "adapter", request.param)
    merge.merge(tiny_base, adapter, folder / "weights")
    return adapter, folder / "weights"


def test_merged_layers_are_the_dequantized_base_plus_the_update(tiny_base: Path, made: tuple[Path, Path]) -> None:
    """Against bitsandbytes' own dequantization of the loaded model, not against our own."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import PeftModel

    adapter, weights = made
    quantization = (manifest.read(adapter) or {})["quantization"]
    model = PeftModel.from_pretrained(base.load(tiny_base, quantization), str(adapter))
    merged = load_file(weights / "model.safetensors")
    checked = 0
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer = module.base_layer
        if isinstance(layer, Linear4bit):
            import bitsandbytes.functional as bnb

            weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            if layer.state.CB is None:
                layer.init_8bit_state()
            weight = layer.state.CB.float() * layer.state.SCB.float()[:, None] / 127
        else:
            weight = layer.weight
        expected = weight.to(torch.bfloat16).float() + module.get_delta_weight("default").float()
        got = merged[f"{name}.weight"]
        assert torch.allclose(got.float(), expected, atol=2e-3, rtol=2**-7), name
        checked += 1
    assert checked == 14
    untouched = load_file(tiny_base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(merged[name], untouched[name])


def test_merged_weights_answer_as_training_scored(
    tiny_base: Path, made: tuple[Path, Path], tokenizer: Any, examples_file: Path
) -> None:
    adapter, weights = made
    rows = data.prepare(
        examples_file, tokenizer=tokenizer, prompt=config.Prompt(), data=config.Data(), max_length=128, seed=0
    ).train
    quantization = (manifest.read(adapter) or {})["quantization"]
    found = divergence.compare(
        divergence.reference_model(tiny_base, adapter),
        {"merged": divergence.merged_model(weights), "naive": divergence.naive_model(tiny_base, adapter)},
        rows,
        0,
    )
    assert found["merged"].mean_kl < 0.005
    if quantization == "nf4":
        assert found["naive"].mean_kl > 5 * found["merged"].mean_kl


def test_manifest_tells_all_and_every_change_is_noticed(made: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    weights = tmp_path / "weights"
    shutil.copytree(made[1], weights)
    facts = manifest.read(weights)
    assert facts is not None
    assert facts["merge"]["onto"] == "dequantized"
    assert facts["base"]["source"] == "the tiny base"
    assert set(facts["files"]) == {path.name for path in weights.iterdir()} - {"manifest.json"}
    manifest.check(weights, facts)
    for path in weights.iterdir():
        assert oct(path.stat().st_mode & 0o777) == "0o644", path
    content = bytearray((weights / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (weights / "model.safetensors").write_bytes(content)
    with pytest.raises(CogpressError, match=r"model\.safetensors is not the file that was written"):
        manifest.check(weights, facts)
    (weights / "model.safetensors").unlink()
    with pytest.raises(CogpressError, match=r"lacks model\.safetensors"):
        manifest.check(weights, facts)


def test_sharded_base_keeps_its_shards(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(
        sharded, max_shard_size="13MB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 1
    base.tokenizer(tiny_base).save_pretrained(sharded)
    adapter = an_adapter(sharded, tmp_path / "adapter", "nf4")
    merge.merge(sharded, adapter, tmp_path / "weights")
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in sharded.glob("*.safetensors")}
    whole = an_adapter(tiny_base, tmp_path / "adapter1", "nf4")
    merge.merge(tiny_base, whole, tmp_path / "weights1")
    expected = load_file(tmp_path / "weights1" / "model.safetensors")
    got = {}
    for path in (tmp_path / "weights").glob("*.safetensors"):
        got |= load_file(path)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_onto_original_is_possible(tiny_base: Path, tmp_path: Path) -> None:
    adapter = an_adapter(tiny_base, tmp_path / "adapter", "nf4")
    facts = merge.merge(tiny_base, adapter, tmp_path / "weights", onto="original")
    assert facts["merge"]["onto"] == "original"
    name = "model.layers.0.mlp.up_proj.weight"
    read = merge.read_adapter(adapter)
    original = load_file(tiny_base / "model.safetensors")[name]
    expected = (original.float() + read.delta(name.removesuffix(".weight"), torch.device("cpu"))).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "weights" / "model.safetensors")[name], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias all"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
)
def test_what_can_not_be_merged_exactly_is_refused_by_name(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    adapter = an_adapter(tiny_base, tmp_path / "adapter", "nf4")
    facts = manifest.read(adapter) or {}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    kept = {key: facts[key] for key in ("base", "quantization", "compute_dtype", "quantized_modules", "prompt")}
    manifest.write(adapter, "adapter", kept)
    with pytest.raises(CogpressError, match=said):
        merge.merge(tiny_base, adapter, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_another_base_is_refused_and_nothing_written(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    adapter = an_adapter(tiny_base, tmp_path / "adapter", "nf4")
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CogpressError, match="another base"):
        merge.merge(other, adapter, tmp_path / "weights")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "other"}


def test_a_killed_merge_leaves_the_last_good_weights(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = an_adapter(tiny_base, tmp_path / "adapter", "nf4")
    merge.merge(tiny_base, adapter, tmp_path / "weights")
    before = manifest.read(tmp_path / "weights")

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_copy_settings", dies)
        with pytest.raises(KeyboardInterrupt):
            merge.merge(tiny_base, adapter, tmp_path / "weights", onto="original")
    assert manifest.read(tmp_path / "weights") == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "weights"}
