"""Every causal and masked family of transformers as a tiny model of random weights.

`build` shrinks a family's own default configuration: sizes that most families name alike are set by name, in the
configuration and in those inside it; what else a family needs stands in `SPECIAL`.
"""

from __future__ import annotations

import inspect
from typing import Any

VOCABULARY = 96
WINDOW = 6
"""Sliding window, attention chunk and original positions of the rotary embeddings: documents are longer than this."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "emb_dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "n_inner": 48,
    "hidden_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

SPECIAL: dict[str, dict[str, Any]] = {}


def shrunk(kind: Any, special: dict[str, Any] | None = None, masked: bool = False) -> Any:
    """A configuration of class `kind` with small sizes; `special` replaces or adds values."""
    defaults = kind()
    named = set(inspect.signature(kind.__init__).parameters) | set(defaults.to_dict())
    aliases = set(kind.attribute_map)
    values = {name: value for name, value in _SIZES.items() if name in named - aliases}
    values.pop("is_decoder") if masked and "is_decoder" in values else None
    for name in ("sliding_window", "attention_chunk_size"):
        if name in values and getattr(defaults, name, None) is None:
            del values[name]  # the family does without
    if "num_key_value_heads" in values and getattr(defaults, "num_key_value_heads", None) is None:
        del values["num_key_value_heads"]
    if "head_dim" in values and getattr(defaults, "head_dim", None) is None:
        del values["head_dim"]
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if isinstance(getattr(defaults, name, None), inner):
            values[name] = shrunk(inner, None, masked).to_dict()
    for name, value in (special or {}).items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **value}
        else:
            values[name] = value
    return kind(**values)


def tiny_model(family: str, *, masked: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A model of random weights of a family, in float32 and evaluation mode; `changes` to its configuration."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = CONFIG_MAPPING[family]
    config = shrunk(kind, {**SPECIAL.get(family, {}), **changes}, masked)
    model_class = (MODEL_FOR_MASKED_LM_MAPPING if masked else MODEL_FOR_CAUSAL_LM_MAPPING)[kind]
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for biases, scalings and soft-capping to matter.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
