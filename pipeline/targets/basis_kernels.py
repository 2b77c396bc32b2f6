"""The slope of the tail's divergence, compiled for a CPU: two passes over a row, and no temporaries of its size.

Shapes: C positions, V vocabulary, K entries of the head.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from ..base.exp2 import exp2, largest
from ..base.kernels import compiled_fused

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 2048
_HALF = np.float32(0.5 / math.log(2))
"""Exponents of 2 per nat at T = 2."""


@register_jitable
def _without_head(x_V: Array, ids_K: Array) -> Any:
    """Sets the head's places to -inf; the largest of the others, 0 where there is none."""
    for rank in range(len(ids_K)):
        x_V[ids_K[rank]] = -np.inf
    most = largest(x_V)
    return np.float32(0) if most == -np.inf else most


@register_jitable(fastmath={"contract", "reassoc"})
def _halves(x_C: Array, most: Any) -> tuple[Any, Any]:
    """exp((x - most) / 2) over x; the sum of its squares, and its sum."""
    squares, total = np.float32(0), np.float32(0)
    for v in range(len(x_C)):
        term = exp2((x_C[v] - most) * _HALF)
        x_C[v] = term
        squares += term * term
        total += term
    return squares, total


@register_jitable(fastmath={"contract"})
def _combine(y_V: Array, a1: Any, a2: Any, x_V: Array, b1: Any, b2: Any) -> None:
    for v in range(len(y_V)):
        y, x = y_V[v], x_V[v]
        y_V[v] = y * (a2 + a1 * y) - x * (b2 + b1 * x)


@compiled_fused
def tail_slopes(shape_CV: Array, logits_CV: Array, heads_CK: Array, masses_C2: Array) -> None:
    """sum over T = 1, 2 of p_T(R) / T (softmax_R(shape / T) - softmax_R(logits / T)), over `shape`; 0 on the head.

    Both are float32, and `logits` are overwritten; `masses` are p_T(R). Exponentials at T = 1 are squares of those at
    T = 2.
    """
    size = shape_CV.shape[1]
    for row in range(len(shape_CV)):
        y_V, x_V, ids_K = shape_CV[row], logits_CV[row], heads_CK[row]
        from_y, from_x = _without_head(y_V, ids_K), _without_head(x_V, ids_K)
        y1, y2, x1, x2 = 0.0, 0.0, 0.0, 0.0
        for start in range(0, size, _BLOCK):
            of_y, of_x = _halves(y_V[start : start + _BLOCK], from_y), _halves(x_V[start : start + _BLOCK], from_x)
            y1, y2, x1, x2 = y1 + of_y[0], y2 + of_y[1], x1 + of_x[0], x2 + of_x[1]
        # An empty tail has no terms.
        m1, m2 = masses_C2[row, 0], 0.5 * masses_C2[row, 1]
        a1, a2 = np.float32(m1 / max(y1, 1e-300)), np.float32(m2 / max(y2, 1e-300))
        b1, b2 = np.float32(m1 / max(x1, 1e-300)), np.float32(m2 / max(x2, 1e-300))
        _combine(y_V, a1, a2, x_V, b1, b2)
        for rank in range(len(ids_K)):
            y_V[ids_K[rank]] = 0
