"""Arrays as a page reads them: all in one compressed stream, real numbers as 16 bits.

Real numbers of one sign are kept as the root of their size: fine near 0, where a log-probability stands for a large
probability, and over -40 nats still to 0.001.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NONE = 0xFFFF
"""Whatever the bits."""


class PackedArrays:
    """Arrays by name, added in parts."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray[Any, Any]]] = {}
        self._bits: dict[str, int] = {}

    def add(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self._parts.setdefault(name, []).append(values)

    def add_sizes(self, name: str, values: Tensor, bits: int = 16) -> None:
        """Numbers of one sign by their size, rounded to 2^bits codes; infinite or NaN: none."""
        self._bits[name] = bits
        self.add(name, values.double().abs().numpy())

    def add_curve(self, name: str, curve: Sequence[Tensor], points: Sequence[float], count_N: Tensor) -> None:
        """h(beta) of a curve given at some points, of `count_N` tokens."""
        log_n = count_N.clamp(min=1).double().log()
        self.add_sizes(
            name, torch.stack([(value.double() - log_n) / x for value, x in zip(curve, points, strict=True)], -1)
        )

    def joined(self, name: str) -> np.ndarray[Any, Any]:
        return np.concatenate(self._parts.get(name, [np.empty(0, np.int64)]))

    def replace(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self._parts[name] = [values]

    def remove(self, name: str) -> None:
        self._parts.pop(name, None)

    def packed(self) -> tuple[dict[str, list[float]], bytes]:
        """Compressed: for each array its first byte, the number of its values, their bytes, and the step of sizes.

        The low bytes of all values come first, then the next ones, which compress better.
        """
        directory, data = {}, b""
        for name in self._parts:
            values, step = self.joined(name), 0.0
            if values.dtype.kind == "f":
                values, step = _coded(values, self._bits[name])
            values = values.ravel()
            directory[name] = [len(data), values.size, values.itemsize, step]
            planes = values.astype(values.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, values.itemsize)
            data += np.ascontiguousarray(planes.T).tobytes()
        return directory, zlib.compress(data, 9)


def _coded(sizes: np.ndarray[Any, Any], bits: int) -> tuple[np.ndarray[Any, Any], float]:
    """Sizes as codes c of 16 bits, of which the lower `bits` are used, with size = (c step)², and the step."""
    known = np.isfinite(sizes)
    root = np.sqrt(np.where(known, sizes, 0.0))
    step = float(root.max(initial=0.0)) / (2**bits - 2) or 1.0
    return np.where(known, np.rint(root / step), _NONE).astype(np.uint16), step
