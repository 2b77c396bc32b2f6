"""Signals out of a model's forward pass: hidden states, attention scores, queries and keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .packing import body_output, document_mask, is_masked, output_layer_input, unwrap_peft
from .student_layers import layer_list


class Tap:
    """Records signals of a model's forward pass, in its own precision and with gradients.

    For `attention.N` as for `qk.N` it records queries and keys; `attention_scores` computes the scores from them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.values: dict[str, Tensor] = {}
        """Name -> value in the last pass."""
        self._masks: dict[str, Tensor] = {}

    def hidden(self, model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """`body_hidden`, which also fills `values`."""
        self.values, self._masks = {}, {}
        prefix, layers = layer_list(unwrap_peft(model))
        with self._watched_layers(model, prefix), self._watched_attention(model):
            last = body_output(model, input_ids, segment_ids)
        if f"hidden.{layers}" in self._names:
            self.values[f"hidden.{layers}"] = last
        pairs = visible_pairs(segment_ids, causal=not is_masked(model))
        for name in self._names:
            if name.startswith("attention."):
                heads = int(unwrap_peft(model).config.get_text_config().num_attention_heads)
                seen = pairs if name not in self._masks else pairs & self._masks[name]
                self.values[name] = attention_scores(self.values[name], heads, seen)
        return output_layer_input(model, last)

    @contextmanager
    def _watched_layers(self, model: Any, prefix: str) -> Iterator[None]:
        with ExitStack() as hooks:
            for number, layer in enumerate(unwrap_peft(model).get_submodule(prefix)):
                name = f"hidden.{number}"
                if name in self._names:
                    hooks.enter_context(layer.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True))
            yield

    def _keep(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values[name] = args[0] if args else kwargs["hidden_states"]

    @contextmanager
    def _watched_attention(self, model: Any) -> Iterator[None]:
        wanted: dict[int, list[str]] = {}
        for name in self._names:
            if not name.startswith("hidden."):
                wanted.setdefault(int(name.partition(".")[2]), []).append(name)
        if not wanted:
            yield
            return
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = unwrap_peft(model).config.get_text_config()
        usual = config._attn_implementation
        calls = 0

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
            nonlocal calls
            for name in wanted.get(calls, ()):
                scaling = settings.get("scaling")
                scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
                self.values[name] = torch.cat([scaled, key], 1).transpose(1, 2)
                if isinstance(mask, Tensor):  # excludes what a sliding window hides
                    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                    self._masks[name] = seen[:, 0]
            calls += 1
            if usual == "eager":  # defined once per architecture, in the module of its layers
                own = sys.modules[type(module).__module__].eager_attention_forward
                return own(module, query, key, value, mask, **settings)
            return ALL_ATTENTION_FUNCTIONS[usual](module, query, key, value, mask, **settings)

        watched = f"watched_{usual}"
        ALL_ATTENTION_FUNCTIONS.register(watched, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(watched, ALL_MASK_ATTENTION_FUNCTIONS[usual])
        config._attn_implementation = watched
        try:
            yield
        finally:
            config._attn_implementation = usual


def visible_pairs(segment_ids: Tensor, *, causal: bool) -> Tensor:
    """[B, L] -> [B, L, L] bool: whether the first position attends to the second.

    Padding neither attends nor is attended to.
    """
    pairs = document_mask(segment_ids).squeeze(1) & (segment_ids >= 0).unsqueeze(-1)
    return pairs.tril() if causal else pairs


def attention_scores(queries_and_keys: Tensor, heads: int, pairs: Tensor) -> Tensor:
    """Queries and keys [B, L, A + A_kv, d] -> scores before the softmax [B, L, A, L], 0 where `pairs` [B, L, L] is
    False.

    A attention heads, A_kv key heads (grouped-query attention), d the size of a head.
    """
    query, key = queries_and_keys[:, :, :heads], queries_and_keys[:, :, heads:]
    key = key.repeat_interleave(heads // key.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key)
    return torch.where(pairs.unsqueeze(2), scores, 0.0)
