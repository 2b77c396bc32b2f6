"""Attention inside the documents of flattened rows, by torch's own flash attention for sequences of any length.

For packed rows transformers makes a mask, L numbers a position, and computes every pair under it. Flash attention is
told where documents end and computes the pairs inside them alone. A model has this attention during such a pass only:
all its other calls, which need masks, keep its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ATTENTION = "documents_by_flash"
"""Its name among transformers' attention functions. It has no function that makes masks, so none are made."""
_VARLEN = "torch.nn.attention.varlen"


def can_flash(model: Any, device: torch.device) -> bool:
    """Whether it is worth a try: half precision on a GPU, each position sees its whole document so far, no gradient.

    Checkpointed activations are computed again in the backward pass, when the model has its own attention again.
    """
    text = model.config.get_text_config()
    return (
        device.type == "cuda"
        and model.dtype in (torch.float16, torch.bfloat16)
        and text._attn_implementation == "sdpa"
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
        and not any(parameter.requires_grad for parameter in model.parameters())
        and find_spec(_VARLEN) is not None
    )


@contextmanager
def attention_of_pass(model: Any, attention: str | None) -> Iterator[None]:
    """Give a model another attention function for one pass; None: its own."""
    if attention is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, document_attention)
    config = model.config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, attention
    try:
        yield
    finally:
        config._attn_implementation = usual


def document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Query [1, A, N, d], key and value [1, A_kv, N, d] -> [1, N, A, d], causal inside each document.

    The documents end at `cu_seq_lens_q` [documents + 1] int32, 0 first; the longest has `max_length_q` positions.
    Raises ValueError for an attention that is more than this: the probe then takes another layout.
    """
    more = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if settings.get(name) is not None]
    more += [name for name in ("dropout", "output_attentions") if settings.get(name)]
    if more or attention_mask is not None or settings.get("is_causal") is False:
        raise ValueError(f"attention with {', '.join(more) or 'a mask'} is not that of documents alone")
    query_NAd, key_NAd, value_NAd = (part[0].transpose(0, 1) for part in (query, key, value))
    output_NAd: Tensor = _varlen()(
        query_NAd,
        key_NAd,
        value_NAd,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_NAd.unsqueeze(0), None


def _varlen() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
