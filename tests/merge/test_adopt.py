"""Adapters that peft made elsewhere answer, once merged, as peft's own forward does, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import bases
from cogpress import config, remake
from cogpress.errors import CogpressError
from cogpress.serve import adapters as serving
from cogpress.verify import distributions
from cogpress.weights import base, manifest
from tests import Script
from tests.merge.test_merge import a_model, changed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
IDS = torch.arange(64).reshape(2, 32)


def made_elsewhere(base_folder: Path, out: Path, *, quantization: str = "none", rows: int = 0, **options: Any) -> Any:
    """A random adapter as peft saves it; returns the model that has it, which is the reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    given = base.quantization_config(quantization, torch.bfloat16, base_folder)  # type: ignore[arg-type]
    if given is None:
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=torch.bfloat16, quantization_config=given, device_map={"": "cpu"}
        )
        base.keep_training_layout(model)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    tuned: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    changed(tuned)
    tuned.save_pretrained(out)
    (out / "training_args.bin").write_bytes(b"pickle")
    return tuned.eval()


def merged(base_folder: Path, adapter: Path, run: Path, quantization: Any = None) -> Path:
    """The weights that scripts/merge makes of it."""
    place = remake.adopted(
        adapter, run, run / "cache", QUIET, source=str(base_folder), quantization=quantization, prompt=config.Prompt()
    )
    return remake.merge_of(place, run / "weights", run / "cache", QUIET, onto="dequantized")


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float().log_softmax(-1)
    return found


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL over the tokens that both know."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def assert_answers_alike(reference: Any, base_folder: Path, weights: Path, *, grown: bool = False) -> None:
    from transformers import AutoModelForCausalLM

    expected = logprobs(reference)
    loaded = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    kl = divergence(expected, logprobs(loaded))
    assert kl < 1e-4
    if not grown:  # the base cannot be compared with a wider vocabulary
        assert divergence(expected, logprobs(AutoModelForCausalLM.from_pretrained(base_folder))) > 50 * kl


VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "lora": (False, {}),
    "rslora": (True, {"use_rslora": True}),
    "dora": (False, {"use_dora": True}),
    "patterns": (False, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 32}}),
    "saved modules": (False, {"modules_to_save": ["lm_head", "norm"]}),
    "embedding and output": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "trained tokens": (False, {"trainable_token_indices": [1, 7, 40]}),
    "trained tokens, tied": (True, {"trainable_token_indices": [1, 7, 40]}),
    "trained tokens by module": (False, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [3, 9]}}),
    "new tokens": (False, {"rows": 101}),
    "new tokens, tied": (True, {"rows": 101}),
    "new tokens, saved modules": (False, {"rows": 101, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "new tokens, saved modules, tied": (True, {"rows": 101, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "new tokens, adapted embedding": (False, {"rows": 101, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_adapter_answers_as_pefts_forward(tmp_path: Path, variant: str) -> None:
    tied, options = VARIANTS[variant]
    folder = a_model(tmp_path / "base", "llama", tied=tied)
    reference = made_elsewhere(folder, tmp_path / "theirs", **options)
    weights = merged(folder, tmp_path / "theirs", tmp_path / "run")
    assert_answers_alike(reference, folder, weights, grown="rows" in options)
    # What `scripts/verify` compares with is that model, too.
    again = distributions.reference_model(folder, tmp_path / "run" / "adapter")
    assert divergence(logprobs(reference), logprobs(again)) < 1e-3
    settings = json.loads((weights / "config.json").read_text())
    assert settings["vocab_size"] == options.get("rows", 96)
    assert settings["tie_word_embeddings"] is (tied and "modules_to_save" not in options)


def test_what_only_a_merge_applies_is_not_served_beside_the_base(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "base", "llama", tied=False)
    made_elsewhere(folder, tmp_path / "theirs", target_modules=["q_proj"], trainable_token_indices=[1])
    merged(folder, tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(CogpressError, match=r"changes model\.embed_tokens\.weight in a way that only a merge applies"):
        serving.read("theirs", tmp_path / "run" / "adapter")


def test_an_adapter_on_transposed_layers_merges(tmp_path: Path) -> None:
    folder = bases.make("gpt2", tmp_path / "base")
    reference = made_elsewhere(folder, tmp_path / "theirs", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert_answers_alike(reference, folder, merged(folder, tmp_path / "theirs", tmp_path / "run"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_base_is_held_as_the_user_says_that_training_did(tmp_path: Path, quantization: str) -> None:
    folder = a_model(tmp_path / "base", "llama", tied=False)
    reference = made_elsewhere(folder, tmp_path / "theirs", quantization=quantization)
    weights = merged(folder, tmp_path / "theirs", tmp_path / "run", quantization)
    facts = manifest.read(tmp_path / "run" / "adapter") or {}
    loaded = base.quantized_modules(reference.get_base_model())
    assert facts["quantized_modules"] == [name.replace(".base_layer", "") for name in loaded]
    expected = logprobs(reference)
    usual = merged(folder, tmp_path / "theirs", tmp_path / "other", "none")
    faithful, wrong = (divergence(expected, logprobs(base.load(one, "none"))) for one in (weights, usual))
    assert faithful < 0.5 * wrong or faithful < 1e-4


def test_the_tokenizer_of_the_training_comes_along(tiny_base: Path, tmp_path: Path) -> None:
    made_elsewhere(tiny_base, tmp_path / "theirs", target_modules=["q_proj"])
    tokenizer = base.tokenizer(tiny_base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text("{}")
    weights = merged(tiny_base, tmp_path / "theirs", tmp_path / "run")
    assert base.tokenizer(weights).chat_template == tokenizer.chat_template
    assert json.loads((weights / "config.json").read_text())["model_type"] == "llama"
    assert not list((tmp_path / "run").rglob("*.bin"))
    manifest.check(weights, manifest.read(weights) or {})


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickled, r"adapter_model\.bin, a pickle file"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"lacks adapter_model\.safetensors"),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            r"holds no adapter: adapter_config\.json is missing",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "holds no adapter"),
        (lambda folder: change(folder, peft_type="LOHA"), "its peft_type is LOHA, and only LoRA"),
        (lambda folder: change(folder, peft_type="BONE"), "its peft_type is BONE"),
        (lambda folder: change(folder, init_lora_weights="pissa"), "init_lora_weights pissa"),
        (lambda folder: change(folder, fan_in_fan_out=True), "it uses fan_in_fan_out"),
        (lambda folder: change(folder, a_variant_of_next_year=1), "a_variant_of_next_year"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    folder = a_model(tmp_path / "base", "llama", tied=False)
    made_elsewhere(folder, tmp_path / "theirs", target_modules=["q_proj"])
    spoil(tmp_path / "theirs")
    with pytest.raises(CogpressError, match=said):
        merged(folder, tmp_path / "theirs", tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_another_base_and_another_run_are_refused(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "base", "llama", tied=False)
    made_elsewhere(folder, tmp_path / "one", target_modules=["q_proj"])
    made_elsewhere(folder, tmp_path / "two", target_modules=["v_proj"])
    merged(folder, tmp_path / "one", tmp_path / "run")
    with pytest.raises(CogpressError, match=r"is another adapter, which would be replaced.*--run"):
        merged(folder, tmp_path / "two", tmp_path / "run")
    with pytest.raises(CogpressError, match="no tensor of that name"):
        merged(bases.make("gpt2", tmp_path / "gpt2"), tmp_path / "one", tmp_path / "third")
    with pytest.raises(CogpressError, match="Name the base that it was trained on with --base"):
        remake.adopted(
            tmp_path / "one", tmp_path / "new", tmp_path, QUIET, source=None, quantization=None, prompt=config.Prompt()
        )
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_it_assumes(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = a_model(tmp_path / "base", "llama", tied=False)
    made_elsewhere(folder, tmp_path / "theirs", target_modules=["q_proj"])
    status, out, error = script("merge", tmp_path / "theirs", "--base", folder, "--run", tmp_path / "run")
    assert status == 0, error
    assert "For a QLoRA adapter give --quantization nf4" in out
    assert f"Check it with: scripts/verify {tmp_path / 'run' / 'weights'}" in out
