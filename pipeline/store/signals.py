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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..recipe.choices import parse_signal
from .arrays import Arrays, Rows, joined

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
