"""The merge gives what training saw, tensor by tensor, and refuses what it cannot merge exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogpress import config
from cogpress.data import prepare
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.merge import adapter as adapters
from cogpress.merge import merge
from cogpress.merge.dequantize import as_trained
from cogpress.train import run as training
from cogpress.verify import distributions
from cogpress.weights import base, manifest, tensors

pytestmark = pytest.mark.train


def an_adapter(base_folder: Path, out: Path, quantization: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random adapter as a training run leaves it; no part of it is zero."""
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


def changed(tuned: Any) -> None:
    """Move everything that an adapter trains, as training would."""
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


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
    rows = prepare.prepare(
        examples_file, tokenizer=tokenizer, prompt=config.Prompt(), data=config.Data(), max_length=128, seed=0
    ).train
    quantization = (manifest.read(adapter) or {})["quantization"]
    found = distributions.compare(
        lambda: distributions.reference_model(tiny_base, adapter),
        {
            "merged": lambda: distributions.merged_model(weights),
            "naive": lambda: distributions.naive_model(tiny_base, adapter),
        },
        rows,
        0,
    )
    assert found["merged"].mean_kl < 0.005
    if quantization == "nf4":
        assert found["naive"].mean_kl > 5 * found["merged"].mean_kl


def test_the_manifest_records_the_merge_and_every_change_is_noticed(made: tuple[Path, Path], tmp_path: Path) -> None:
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
    original = load_file(tiny_base / "model.safetensors")[name]
    merger = adapters.read(adapter).merger(name, torch.device("cpu"))
    expected = merger(original.float(), slice(None)).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "weights" / "model.safetensors")[name], expected)


def a_model(folder: Path, kind: str, *, tied: bool, biased: bool = False) -> Path:
    """A small random model of a common architecture, with widths that are no multiple of a block."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    shape = {
        "vocab_size": 96,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(2)
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, attention_bias=biased)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape)),
    }[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers initializes biases to zero, which would hide errors
                parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def a_variant(base_folder: Path, out: Path, quantization: str = "nf4", **options: Any) -> Path:
    """A random adapter of any variant, as peft writes it, with the manifest of a training run."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model: Any = base.load(base_folder, quantization)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    changed(tuned)
    tuned.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    names = [name.replace(".base_layer", "") for name in base.quantized_modules(tuned.get_base_model())]
    facts = {
        "base": {"source": "a tiny model", "fingerprint": manifest.fingerprint(base_folder)},
        "quantization": quantization,
        "compute_dtype": "bfloat16",
        "quantized_modules": names,
        "prompt": config.Prompt().model_dump(),
    }
    manifest.write(out, "adapter", facts)
    return out


def by_peft(base_folder: Path, adapter: Path, quantization: str) -> dict[str, torch.Tensor]:
    """The reference: `dequantize()` and `merge_and_unload()`, the whole model in memory."""
    from peft import PeftModel

    model: Any = base.load(base_folder, quantization)  # type: ignore[arg-type]
    if quantization != "none":
        model = model.dequantize()
    merged: Any = PeftModel.from_pretrained(model.to(torch.bfloat16), str(adapter)).merge_and_unload()
    return {name: value for name, value in merged.state_dict().items() if "rotary" not in name}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensors.load(place, name) for name, place in tensors.stored(folder).items()}


def assert_equal_to_rounding(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to bfloat16's rounding: peft adds the update to a rounded sum."""
    for name, tensor in expected.items():
        if name == "lm_head.weight" and name not in got:
            continue  # tied: the checkpoint holds it once
        assert got[name].dtype == torch.bfloat16
        assert torch.allclose(got[name].float(), tensor.float(), atol=2**-8, rtol=2**-7), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_tensor_equals_the_libraries_merge(tmp_path: Path, kind: str, tied: bool, quantization: str) -> None:
    folder = a_model(tmp_path / "base", kind, tied=tied)
    adapter = a_variant(folder, tmp_path / "adapter", quantization)
    merge.merge(folder, adapter, tmp_path / "weights")
    got = all_tensors(tmp_path / "weights")
    assert got.keys() == all_tensors(folder).keys()
    assert_equal_to_rounding(got, by_peft(folder, adapter, quantization))


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 3, "down_proj": 32},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"mlp.*": 2}, "alpha_pattern": {"o_proj": 9}},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
    "all biases": {"bias": "all"},
    "adapted biases": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "biases of the update": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding and output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "few layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_libraries_merge(tmp_path: Path, variant: str) -> None:
    folder = a_model(tmp_path / "base", "llama", tied=False, biased=True)
    adapter = a_variant(folder, tmp_path / "adapter", "nf4", **VARIANTS[variant])
    merge.merge(folder, adapter, tmp_path / "weights")
    expected = by_peft(folder, adapter, "nf4")
    assert_equal_to_rounding(all_tensors(tmp_path / "weights"), expected)
    # Random adapters are large, so that ignoring the variant would show
    plain = all_tensors(folder)
    changed = [name for name, value in expected.items() if not torch.equal(value, plain[name])]
    assert changed


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings_are_untied_where_training_changed_one(tmp_path: Path, options: Any) -> None:
    """Compared with the model's own answers: peft's merge would write one update into both."""
    from peft import PeftModel

    folder = a_model(tmp_path / "base", "llama", tied=True)
    adapter = a_variant(folder, tmp_path / "adapter", "none", **options)
    merge.merge(folder, adapter, tmp_path / "weights")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base.load(folder, "none"), str(adapter))(input_ids=ids).logits
        got = base.load(tmp_path / "weights", "none")(input_ids=ids).logits
        before = base.load(folder, "none")(input_ids=ids).logits
    error = (got - expected).float().norm() / expected.float().norm()
    assert error < 0.02
    assert (before - expected).float().norm() / expected.float().norm() > 5 * error


def edit_settings(adapter: Path, change: dict[str, Any]) -> None:
    facts = manifest.read(adapter) or {}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    kept = {key: facts[key] for key in ("base", "quantization", "compute_dtype", "quantized_modules", "prompt")}
    manifest.write(adapter, "adapter", kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_variant_of_next_year": True}, "a_variant_of_next_year"),
        ({"r": 5}, "has rank 4 and its configuration says 5"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    adapter = an_adapter(tiny_base, tmp_path / "adapter", "nf4")
    edit_settings(adapter, change)
    with pytest.raises(CogpressError, match=said):
        merge.merge(tiny_base, adapter, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (1e6, "float16")])
def test_a_merge_that_is_not_finite_is_refused(tiny_base: Path, tmp_path: Path, value: float, dtype: str) -> None:
    adapter = an_adapter(tiny_base, tmp_path / "adapter", "none")
    matrices = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in matrices if "lora_B" in name)
    matrices[name] = torch.full_like(matrices[name], value)
    save_file(matrices, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = manifest.read(adapter) or {}
    kept = {key: facts[key] for key in ("base", "quantization", "quantized_modules", "prompt")}
    manifest.write(adapter, "adapter", {**kept, "compute_dtype": dtype})
    with pytest.raises(CogpressError, match="is not finite after the merge"):
        merge.merge(tiny_base, adapter, tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_quantized_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    adapter = an_adapter(folder, tmp_path / "adapter", "nf4")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CogpressError, match="quantized already"):
        merge.merge(folder, adapter, tmp_path / "weights")


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    """Even where the hashes agree."""
    folder = a_model(tmp_path / "base", "llama", tied=False)
    other = a_model(tmp_path / "other", "qwen2", tied=False)
    adapter = a_variant(other, tmp_path / "adapter", "none", target_modules=["q_proj"], bias="all")
    facts = manifest.read(adapter) or {}
    facts["base"]["fingerprint"] = manifest.fingerprint(folder)
    write_json(adapter / manifest.NAME, facts)
    with pytest.raises(CogpressError, match=r"k_proj\.bias, and the base's files hold no tensor of that"):
        merge.merge(folder, adapter, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 64), (576, 1536), (1000, 100), (333, 98), (7, 66), (64, 2), (5, 33)], ids=str)
def test_nf4_in_chunks_is_nf4_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype) * 0.02
    weight[0] = 0  # a block of zeros has no scale
    packed, state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    assert torch.equal(as_trained(weight, "nf4", dtype), bnb.dequantize_4bit(packed, state))


def test_another_base_is_refused_and_nothing_written(tiny_base: Path, tmp_path: Path) -> None:
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


def test_every_template_and_tokenizer_file_of_the_base_is_carried(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).symlink_to(path)
    named = folder / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("{{ 'tools' }}")
    (named / "run.py").write_text("raise SystemExit")
    for name in ("vocab.txt", "spiece.model", "tekken.json"):
        (folder / name).write_text("x")
    adapter = an_adapter(folder, tmp_path / "adapter", "none")
    weights = tmp_path / "weights"
    facts = merge.merge(folder, adapter, weights)
    carried = {"vocab.txt", "spiece.model", "tekken.json", "additional_chat_templates/tool_use.jinja"}
    assert carried <= set(facts["files"])
    assert not list(weights.rglob("*.py"))
    assert AutoTokenizer.from_pretrained(weights).chat_template["tool_use"] == "{{ 'tools' }}"
