"""What else is kept of the teacher at a position: hidden states, attention scores, queries and keys.

    hidden.0          the embeddings, as the first layer reads them                       [B, L, D]
    hidden.N          what layer N - 1 gives; for the last one, after the final norm      [B, L, D]
    attention.N       layer N's scores before the softmax, from each position to all      [B, L, H, L]
    qk.N              layer N's queries, scaled, then its keys: the same scores in fewer bytes    [B, L, H + H_kv, d]

Scores between positions that may not see each other are 0; soft-capping, where a model has it, comes after. Layers are numbered from 0; each is watched in the model's own
forward pass, through the attention functions that transformers lets one register, so that rotary positions, grouped keys
and scaling are the architecture's own.

Codecs, chosen per signal: `float16`; `int8`, the last axis in steps of its largest magnitude / 127, that step kept as a
float16; `direction`, the same without the step, for losses that see directions only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import models
from pipeline.codec import Arrays, Rows, joined
from pipeline.config import parse_signal
from pipeline.errors import RecipeError

_LARGEST = 127
_SCALE = ".scale"


@dataclass(frozen=True)
class Signal:
    """One signal of a cache: its name, how it is stored, and the shape that it has at each position."""

    name: str
    codec: str
    shape: tuple[int, ...]
    heads: int = 0
    """Of `attention` and `qk`: query heads."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "codec": self.codec, "shape": list(self.shape), "heads": self.heads}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Signal:
        return cls(value["name"], value["codec"], tuple(value["shape"]), value["heads"])

    @property
    def bytes_per_position(self) -> int:
        """What `layout` takes at one position, without checksums."""
        values, steps = math.prod(self.shape), math.prod(self.shape[:-1])
        return 2 * values if self.codec == "float16" else values + (2 * steps if self.codec == "int8" else 0)

    def layout(self) -> dict[str, str]:
        """Stored arrays [row, position, ...] and their dtypes."""
        if self.codec == "float16":
            return {self.name: "<f2"}
        return {self.name: "|i1", **({self.name + _SCALE: "<f2"} if self.codec == "int8" else {})}

    def encode(self, values: Tensor) -> Arrays:
        """[..., *shape] -> arrays of `layout`."""
        if self.codec == "float16":
            largest = torch.finfo(torch.float16).max
            return {self.name: values.float().clamp(-largest, largest).half().cpu().numpy()}
        values = values.float()
        peak = values.abs().amax(-1, keepdim=True)
        if self.codec == "direction":
            return {self.name: _steps(values, peak / _LARGEST).cpu().numpy()}
        scale = (peak / _LARGEST).half()
        # Rounded to the step that is kept, so that the two do not add up.
        return {
            self.name: _steps(values, scale.float()).cpu().numpy(),
            self.name + _SCALE: scale.squeeze(-1).cpu().numpy(),
        }

    def decode(self, stored: Rows, row_length: int) -> Tensor:
        """Flat rows of `layout` -> float32 [R, L, *shape]. Raises ValueError for rows of another size."""
        layout = self.layout()

        def whole(name: str, *shape: int) -> Tensor:
            rows = stored[name]
            values = joined(name, rows, layout[name], [math.prod(shape)] * len(rows), whole=True)
            return torch.from_numpy(values.reshape(-1, *shape)).float()

        values = whole(self.name, row_length, *self.shape)
        if self.codec == "int8":
            values *= whole(self.name + _SCALE, row_length, *self.shape[:-1]).unsqueeze(-1)
        return values


def _steps(values: Tensor, step: Tensor) -> Tensor:
    ratio = torch.where(step > 0, values / torch.where(step > 0, step, 1.0), 0.0)
    return ratio.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)


def signals_of(names: Sequence[str], config: Any, row_length: int) -> tuple[Signal, ...]:
    """The signals that a recipe names, with the shapes that they have in a model of this transformers configuration.

    Raises RecipeError for a layer that it does not have.
    """
    config = config.get_text_config()
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    found = []
    for text in names:
        name, codec = parse_signal(text)
        kind, _, layer = name.partition(".")
        last = layers if kind == "hidden" else layers - 1
        if int(layer) > last:
            raise RecipeError(f"cache.signals: {name}: the teacher's {kind} goes from {kind}.0 to {kind}.{last}")
        shapes = {"hidden": (config.hidden_size,), "attention": (heads, row_length), "qk": (heads + keys, size)}
        found.append(Signal(name, codec, shapes[kind], 0 if kind == "hidden" else heads))
    return tuple(found)


class Tap:
    """Takes signals out of a model's forward pass, in its own precision and with their gradients.

    `attention.N` and `qk.N` both come as queries and keys, of which `attention_scores` makes the former.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.values: dict[str, Tensor] = {}
        """Name -> its value in the last pass."""
        self._masks: dict[str, Tensor] = {}

    def hidden(self, model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """`models.body_hidden`, with `values` filled on the way."""
        self.values, self._masks = {}, {}
        prefix, layers = models.layer_list(models.causal_model(model))
        with self._watched_layers(model, prefix), self._watched_attention(model):
            last = models.body_output(model, input_ids, segment_ids)
        if f"hidden.{layers}" in self._names:
            self.values[f"hidden.{layers}"] = last
        pairs = visible_pairs(segment_ids, causal=not models.is_masked(model))
        for name in self._names:
            if name.startswith("attention."):
                heads = int(models.causal_model(model).config.get_text_config().num_attention_heads)
                seen = pairs if name not in self._masks else pairs & self._masks[name]
                self.values[name] = attention_scores(self.values[name], heads, seen)
        return models.head_input(model, last)

    @contextmanager
    def _watched_layers(self, model: Any, prefix: str) -> Iterator[None]:
        handles = []
        for number, layer in enumerate(models.causal_model(model).get_submodule(prefix)):
            name = f"hidden.{number}"
            if name in self._names:
                handles.append(layer.register_forward_pre_hook(self._keep(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.values[name] = args[0] if args else kwargs["hidden_states"]

        return hook

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

        config = models.causal_model(model).config.get_text_config()
        usual = config._attn_implementation
        calls = 0

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
            nonlocal calls
            for name in wanted.get(calls, ()):
                scaling = settings.get("scaling")
                scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
                self.values[name] = torch.cat([scaled, key], 1).transpose(1, 2)
                if isinstance(mask, Tensor):  # a window, where the layer has one
                    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                    self._masks[name] = seen[:, 0]
            calls += 1
            if usual == "eager":  # each architecture has its own, beside its layers
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
    """[B, L] -> [B, L, L] bool: whether the first position sees the second. Padding sees nothing and is not seen."""
    pairs = models.document_mask(segment_ids).squeeze(1) & (segment_ids >= 0).unsqueeze(-1)
    return pairs.tril() if causal else pairs


def attention_scores(queries_and_keys: Tensor, heads: int, pairs: Tensor) -> Tensor:
    """[B, L, H + H_kv, d] as `qk` has them -> scores before the softmax [B, L, H, L], 0 where `pairs` [B, L, L] is False."""
    query, key = queries_and_keys[:, :, :heads], queries_and_keys[:, :, heads:]
    key = key.repeat_interleave(heads // key.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key)
    return torch.where(pairs.unsqueeze(2), scores, 0.0)
