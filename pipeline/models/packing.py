"""Packed rows through a transformers model: attention inside each document, and the states that the output layer
reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a peft wrapper; its adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_masked(model: Any) -> bool:
    """Whether a model predicts hidden tokens from both sides (masked) rather than the next token (causal)."""
    return type(unwrap_peft(model)).__name__.endswith("ForMaskedLM")


def model_inputs(batch: Any) -> dict[str, Any]:
    """Keyword arguments of a transformers model for a batch of a cache: `model(**model_inputs(batch)).logits`.

    input_ids [B, L], and position_ids [B, L] that restart at each document, so that attention stays inside it. Masked
    rows also bring the attention mask that they need for this.
    """
    inputs = {"input_ids": batch["input_ids"], "position_ids": document_positions(batch["segment_ids"])}
    if "attention_mask" in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    return {**inputs, "use_cache": False}


def document_positions(segment_ids: Tensor) -> Tensor:
    """Position of every token inside its own document [B, L], restarting at each boundary.

    transformers recognises restarting positions as packed documents and confines attention to each of them.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return index - first


def document_mask(segment_ids: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L] bool: the token pairs of the same document, as bidirectional attention sees them."""
    return (segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)).unsqueeze(1)


def body_output(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Last hidden states [B, L, D] of a model's body, with attention confined to each document."""
    batch = {"input_ids": input_ids, "segment_ids": segment_ids}
    model = unwrap_peft(model)
    if is_masked(model):
        mask = document_mask(segment_ids)
        if model.config._attn_implementation.endswith("eager"):  # eager attention adds the mask to the scores
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        batch["attention_mask"] = mask
    hidden: Tensor = model.base_model(**model_inputs(batch), return_dict=True).last_hidden_state
    return hidden


def body_hidden(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Hidden states [B, L, D] that the output layer reads, with attention confined to each document."""
    return output_layer_input(model, body_output(model, input_ids, segment_ids))


def output_layer_input(model: Any, hidden: Tensor) -> Tensor:
    """The states that the output layer reads: the body's last hidden states, transformed first in a masked model."""
    model = unwrap_peft(model)
    if not is_masked(model):
        return hidden
    if hasattr(model, "vocab_transform"):  # DistilBERT
        hidden = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    elif hasattr(model, "cls"):  # BERT
        hidden = model.cls.predictions.transform(hidden)
    return hidden
