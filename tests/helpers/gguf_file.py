"""A small Llama written as a GGUF file, its matrices rounded as llama.cpp rounds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(model: Any, file: Path, kind: str) -> Path:
    """Write a LlamaForCausalLM with `kind`, such as Q8_0 or Q4_0, as the type of its matrices."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config, quantisation = model.config, GGMLQuantizationType[kind]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    weights = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        own = _name(name)
        if own.endswith(("attn_q", "attn_k")):
            tensor = _interleaved(tensor, config.num_attention_heads)
        if tensor.ndim == 1:
            writer.add_tensor(f"{own}.weight", tensor)
        else:
            writer.add_tensor(f"{own}.weight", quants.quantize(tensor, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _name(name: str) -> str:
    """transformers' name of a weight -> that of GGUF, without its ending."""
    plain = name.removesuffix(".weight").removeprefix("model.")
    if plain.startswith("layers."):
        _, number, inside = plain.split(".", 2)
        return f"blk.{number}.{_NAMES[inside]}"
    return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[plain]


def _interleaved(weight_MD: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key matrix in GGUF's order: the halves of a head in turn."""
    rows, width = weight_MD.shape
    return weight_MD.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
