"""A tiny model of random weights of each language model class of transformers.

`small_config` takes the class's own default configuration and replaces whatever sets a size; a few architectures need
more (`SPECIAL`), some of it so that four layers are not all alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

VOCABULARY = 120
CAUSAL, MASKED = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), tuple(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
"""Values of model_type."""


def _sizes() -> dict[str, Any]:
    """Keys that set a size, by their names in any configuration, and a small value for each."""
    named = {
        VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input eod_token_id_size",
        32: "hidden_size d_model n_embd embed_dim embedding_size emb_dim embedding_dim attention_hidden_size "
        "word_embed_proj_dim lru_width input_embedding_size output_embedding_size cross_attention_hidden_size",
        4: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks num_layers_per_stack num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads num_local_experts num_experts n_routed_experts "
        "moe_num_experts linear_num_value_heads swa_num_attention_heads attention_heads",
        2: "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads num_experts_per_tok moe_topk "
        "moe_k num_experts_per_token",
        8: "head_dim d_head dim_head attention_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "linear_key_head_dim linear_value_head_dim swa_head_dim sliding_window attention_window_size window_size "
        "attention_chunk_size floor_scale mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank index_topk "
        "sliding_window_size local_attention hidden_size_per_layer_input index_head_dim linear_head_dim",
        16: "q_lora_rank kv_lora_rank qk_head_dim index_n_heads",
        48: "intermediate_size ffn_dim n_inner hidden_dim dim_ff encoder_ffn_dim decoder_ffn_dim d_inner dff "
        "ffn_hidden_size intermediate_size_mlp shared_intermediate_size dense_intermediate_size feed_forward_size",
        24: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size",
        64: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length "
        "max_target_positions",
        1: "n_group topk_group n_shared_experts num_expert_group first_k_dense_replace moe_num_shared_experts n_groups "
        "mamba_n_groups num_shared_experts num_dense_layers",
        0: "pad_token_id bos_token_id eos_token_id eod_token_id num_nextn_predict_layers",
    }
    return {name: value for value, names in named.items() for name in names.split()}


_SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SHARED = {"num_kv_shared_layers": 2, "layer_types": _ALTERNATING}
_HASHED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _ALTERNATING}
    },
    "cohere2": {"layer_types": _ALTERNATING},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64},
    "gemma3_text": {"layer_types": _ALTERNATING},
    "gemma3": {"text_config": {"layer_types": _ALTERNATING}},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0]},
    "gemma4_text": _SHARED,
    "gemma4": {"text_config": _SHARED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_SSM, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mobilebert": {"embedding_size": 16},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "moss_transcribe_diarize": {"text_config": {"vocab_size": VOCABULARY}},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "esmc": {"num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "glm4v": {"text_config": {"rope_parameters": _SECTIONS}},
    "qwen2_vl": {"text_config": {"rope_parameters": _SECTIONS}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _SECTIONS}},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "qwen4_exp": {"text_config": _HASHED},
    "qwen4_exp_text": _HASHED,
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""model_type -> further keys."""


def small_config(model_type: str, objective: str = "causal") -> Any:
    """The configuration of a tiny model."""
    kind = type(AutoConfig.for_model(model_type))
    special = SPECIAL.get(model_type, {})
    if "is_decoder" in {field.name for field in dataclasses.fields(kind)}:  # families of encoders, and Reformer
        special = {**special, "is_decoder": objective == "causal"}
    return kind(**_small(kind, special))


def _small(kind: Any, special: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    sizes = _sizes()
    settings |= {field.name: sizes[field.name] for field in dataclasses.fields(kind) if field.name in sizes}
    if "kv_lora_rank" in settings:  # latent attention has as many key heads as query heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    parts = getattr(kind, "sub_configs", None) or {}
    settings |= {name: value for name, value in special.items() if name not in parts}
    for name in parts:
        part = getattr(kind(), name)
        if part is not None:
            inner = special.get(name, {})
            settings[name] = {"model_type": part.model_type, **_small(type(part), inner)}
    return settings


def small_model(model_type: str, objective: str = "causal", noise: float = 0.0) -> Any:
    """A tiny model of seeded random weights, in evaluation mode; `noise` of this size is added to all weights, so that
    biases, scales and soft-capping matter."""
    auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(small_config(model_type, objective)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model
