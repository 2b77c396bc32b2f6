"""Signals out of a model's forward pass: hidden states, attention scores, queries and keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .flash_rows import attention_of_pass
from .packing import Pass, document_lengths, document_mask, gather, is_masked, make_passes, unwrap_peft
from .placement import input_device, to_device
from .probe import check_model
from .sizes import ModelSizes
from .states import run_to_head
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

    def hidden(
        self, model: Any, input_ids: Tensor, segment_ids: Tensor, passes: Sequence[Pass] | None = None
    ) -> Tensor:
        """`body_hidden`, which also fills `values`; `passes` are those of the rows, where they are known already."""
        model = unwrap_peft(model)
        if passes is None:
            passes = make_passes(model, check_model(model).layout, input_ids, segment_ids, input_device(model))
        parts, values, masks = [], [], []
        for one in passes:
            self.values, self._masks = {}, {}
            prefix, layers = layer_list(model)
            own = attention_of_pass(model, one.attention)
            with own, self._watched_layers(model, prefix, layers), self._watched_attention(model):
                parts.append(run_to_head(model, one.inputs))
            values.append(self.values)
            masks.append(self._masks)
        shape = input_ids.shape
        self.values = {name: gather([part[name] for part in values], passes, shape) for name in values[0]}
        pairs = visible_pairs(to_device(segment_ids, input_device(model)), causal=not is_masked(model))
        for name in self._names:
            if name.startswith("attention."):
                heads = ModelSizes.of(model.config).heads or 0
                seen = pairs
                if name in masks[0]:
                    seen = pairs & _gather_pairs([part[name] for part in masks], passes, shape)
                self.values[name] = attention_scores(self.values[name], heads, seen)
        return gather(parts, passes, shape)

    @contextmanager
    def _watched_layers(self, model: Any, prefix: str, layers: int) -> Iterator[None]:
        with ExitStack() as hooks:
            for number, layer in enumerate(model.get_submodule(prefix)):
                name = f"hidden.{number}"
                if name in self._names:
                    hooks.enter_context(layer.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True))
            if f"hidden.{layers}" in self._names:
                hooks.enter_context(model.base_model.register_forward_hook(partial(self._keep_last, layers)))
            yield

    def _keep(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values[name] = args[0] if args else kwargs["hidden_states"]

    def _keep_last(self, layers: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.values[f"hidden.{layers}"] = output[0]

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

        config = model.config.get_text_config()
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
        if usual in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(watched, ALL_MASK_ATTENTION_FUNCTIONS[usual])
        config._attn_implementation = watched
        try:
            yield
        finally:
            config._attn_implementation = usual


def _gather_pairs(masks: list[Tensor], passes: Sequence[Pass], shape: torch.Size) -> Tensor:
    """Which positions see each other in the passes, [b, l, l] bool each, in the order of the rows: [B, L, L]."""
    if passes[0].places_M is None:
        return masks[0]
    rows, length = shape
    seen = torch.zeros(rows + 1, length, length, dtype=torch.bool, device=masks[0].device)  # the last for padding
    for mask, one in zip(masks, passes, strict=True):
        assert one.places_M is not None
        places = one.places_M.view(-1, mask.shape[-1])
        row, at = places // length, places % length
        # Tokens of a pass may be of several rows, as in a flattened one; no pair of those sees each other.
        kept = torch.where(row.unsqueeze(-1) == row.unsqueeze(-2), row.unsqueeze(-1), rows)
        seen[kept, at.unsqueeze(-1), at.unsqueeze(-2)] = mask.expand_as(kept)
    return seen[:rows]


def visible_pairs(segment_ids: Tensor, *, causal: bool) -> Tensor:
    """[B, L] -> [B, L, L] bool: whether the first position attends to the second.

    Padding neither attends nor is attended to.
    """
    pairs = document_mask(segment_ids).squeeze(1) & (segment_ids >= 0).unsqueeze(-1)
    return pairs.tril() if causal else pairs


def visible_pair_count(segment_ids: Tensor, *, causal: bool) -> Tensor:
    """The number of `visible_pairs`, without them: of a document of n tokens n (n + 1) / 2, or n^2."""
    _, lengths = document_lengths(segment_ids)
    return (lengths * (lengths + 1) // 2 if causal else lengths**2).sum()


def attention_scores(queries_and_keys: Tensor, heads: int, pairs: Tensor) -> Tensor:
    """Queries and keys [B, L, A + A_kv, d] -> scores before the softmax [B, L, A, L], 0 where `pairs` [B, L, L] is
    False.

    A attention heads, A_kv key heads (grouped-query attention), d the size of a head.
    """
    query, key = queries_and_keys[:, :, :heads], queries_and_keys[:, :, heads:]
    key = key.repeat_interleave(heads // key.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key)
    return torch.where(pairs.unsqueeze(2), scores, 0.0)
