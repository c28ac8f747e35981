"""Tiny random bases of many architectures, in the layout of their checkpoints on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""What all of them share, where their configurations have it under these names; vLLM computes no narrower heads."""

_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "smollm3": {},
    "granite": {},
    "cohere": {},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": {},
    "stablelm": {},
    "glm4": {},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "seed_oss": {},
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": 4},
    "gptj": {**_GPT2, "rotary_dim": 16},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128, "num_key_value_heads": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "head_dim": None},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": None},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {**_LATENT, **_EXPERTS, "head_dim": 16, "num_key_value_heads": 4, "topk_method": "noaux_tc"},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_dim": 128, "block_ff_dim": 256, "conv_dim": 128},
    "mamba2": {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "expand": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 256},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 256,
                         "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_experts": 4, "mamba_d_state": 16, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "qwen3_5": {"text": {**_DELTA}, "vision": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                "out_hidden_size": 128, "patch_size": 14}},
    "gemma3": {"text": {"layer_types": ["sliding_attention", "full_attention"]}, "vision": _VISION,
               "mm_tokens_per_image": 4},
    "llama4": {"text": {"num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
               "vision": _VISION},
    "qwen2_5_vl": {"text": {}, "vision": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                   "out_hidden_size": 128}},
    "mistral3": {"text": {"model_type": "mistral"}, "vision": {**_VISION, "model_type": "pixtral"}},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "whisper": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "decoder_start_token_id": 0},
    "bert": {},
}  # fmt: skip
"""The architectures, by transformers' name of the model type, and what their configurations need beyond `COMMON`."""


def settings(name: str) -> Any:
    """The configuration of a tiny base, as transformers has it."""
    from transformers import AutoConfig

    own = dict(ARCHITECTURES[name])
    text, vision = own.pop("text", None), own.pop("vision", None)
    if text is None:
        given = {option: value for option, value in {**COMMON, **own}.items() if value is not None}
        return AutoConfig.for_model(name, **given)
    return AutoConfig.for_model(
        name, text_config={**COMMON, **text}, vision_config=vision, **{**own, "eos_token_id": 1, "pad_token_id": 2}
    )


def make(name: str, folder: Path) -> Path:
    """Write a tiny random base in float32, in its checkpoint's own names, and return its folder."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = settings(name)
    text_and_more = "text" in ARCHITECTURES[name]
    torch.manual_seed(0)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name)
    whole = transformers.AutoModelForImageTextToText if text_and_more else transformers.AutoModel
    auto = text_and_more or found.is_encoder_decoder or kind is None
    model = whole.from_config(found) if auto else getattr(transformers, str(kind))(found)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """One token a byte, three special ones and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<start>", "<end>", "<pad>"]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *bytes_])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        chat_template="{% for one in messages %}{{ one.role }}: {{ one.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
