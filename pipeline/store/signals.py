"""Signals: the teacher's hidden states, attention scores, queries and keys that a cache stores beside the targets.

    hidden.0          the embeddings, the input of the first layer                            [B, L, D]
    hidden.N          the output of layer N - 1; of the last layer, after the final norm      [B, L, D]
    attention.N       the scores of layer N before the softmax, from each position to all     [B, L, A, L]
    qk.N              the scaled queries of layer N, then its keys: scores in fewer bytes     [B, L, A + A_kv, d]

A are attention heads, A_kv key heads, d the size of a head. Layers have numbers from 0. The score of two positions that
do not see each other is 0; soft-capping, where a model has it, is not applied. `models.taps` reads signals from the
model's own forward pass, so rotary positions, grouped keys and scaling are those of the architecture.

Codecs, one per signal: `float16`; `int8`, the last axis in steps of its largest magnitude / 127, with the step as
float16; `direction`, `int8` without the step, for losses that depend on the direction only.

The stored arrays of a signal have its name, with a suffix for steps (`is_signal_array`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..models.sizes import ModelSizes
from ..recipe.choices import SignalKind, parse_signal
from .arrays import Arrays, RowShape, StoredRows, joined

_LARGEST = 127
_SCALE = ".scale"


@dataclass(frozen=True)
class Signal:
    """One signal of a cache: its name, its codec, and its shape at each position."""

    name: str
    codec: str
    shape: tuple[int, ...]
    heads: int = 0
    """A, the query heads of `attention` and `qk`."""

    @property
    def kind(self) -> SignalKind:
        return cast(SignalKind, self.name.partition(".")[0])

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "codec": self.codec, "shape": list(self.shape), "heads": self.heads}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Signal:
        return cls(value["name"], value["codec"], tuple(value["shape"]), value["heads"])

    @property
    def bytes_per_position(self) -> int:
        """Stored bytes of one position, without checksums."""
        values, steps = math.prod(self.shape), math.prod(self.shape[:-1])
        return 2 * values if self.codec == "float16" else values + (2 * steps if self.codec == "int8" else 0)

    def layout(self) -> dict[str, str]:
        """Name -> dtype of the stored arrays [row, position, ...]."""
        if self.codec == "float16":
            return {self.name: "<f2"}
        return {self.name: "|i1", **({self.name + _SCALE: "<f2"} if self.codec == "int8" else {})}

    def shapes(self, row_length: int) -> dict[str, RowShape]:
        """Name -> shape of a row of the stored arrays."""
        whole = (row_length, *self.shape)
        return {name: whole[:-1] if name.endswith(_SCALE) else whole for name in self.layout()}

    def encode(self, values: Tensor) -> Arrays:
        """Values [..., *shape] -> the arrays of `layout`."""
        return {name: part.cpu().numpy() for name, part in self.rounded(values).items()}

    def rounded(self, values: Tensor) -> dict[str, Tensor]:
        """What `encode` gives, on the device of the values."""
        if self.codec == "float16":
            largest = torch.finfo(torch.float16).max
            return {self.name: values.float().clamp(-largest, largest).half()}
        values = values.float()
        peak = values.abs().amax(-1, keepdim=True)
        if self.codec == "direction":
            return {self.name: _steps(values, peak / _LARGEST)}
        scale = (peak / _LARGEST).half()
        # Rounded by the stored step, so the rounding of the step adds no error.
        return {self.name: _steps(values, scale.float()), self.name + _SCALE: scale.squeeze(-1)}

    def decode(self, stored: StoredRows, row_length: int) -> Tensor:
        """Flat rows of `layout` -> float32 [B, L, *shape]. Raises ValueError for rows of another size."""
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


def is_signal_array(name: str) -> bool:
    """Whether a stored array belongs to a signal; it belongs to the targets otherwise."""
    return name.partition(".")[0] in get_args(SignalKind)


def signals_of(names: Sequence[str], config: Any, row_length: int) -> tuple[Signal, ...]:
    """The signals of a recipe, with their shapes in a model of this transformers configuration.

    Raises RecipeError for a layer or heads that the model does not have, ValueError for a name that is no signal.
    """
    sizes = ModelSizes.of(config)
    heads, key_heads, head_size = sizes.heads or 0, sizes.key_heads or 0, sizes.head_size or 0
    shapes = {"hidden": (sizes.hidden_size,), "attention": (heads, row_length), "qk": (heads + key_heads, head_size)}
    signals = []
    for text in names:
        name, codec = parse_signal(text)
        kind, _, layer = name.partition(".")
        if kind != "hidden" and not heads:
            raise RecipeError(f"cache.signals: {name}: the teacher has no attention heads, or another number by layer")
        last = sizes.layers if kind == "hidden" else sizes.layers - 1
        if int(layer) > last:
            raise RecipeError(f"cache.signals: {name}: the teacher has {kind}.0 to {kind}.{last}")
        signals.append(Signal(name, codec, shapes[kind], 0 if kind == "hidden" else heads))
    return tuple(signals)
