"""KL and cross-entropy of rows of float32 logits with their gradient, compiled for a CPU: few passes over a row that
stays in the core's cache, without temporaries of its size.

Exponentials are powers of 2 by a polynomial in float32; sums are float32 within `_BLOCK` places, then float64. Shapes:
N rows, V vocabulary, K entries of the head, C a block of neighbouring tokens.
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
_LOG2 = math.log(2)
_FAR = 1000.0
"""2 to the power of minus this is 0."""


@register_jitable(fastmath={"contract", "reassoc"})
def _exponentials(x_C: Array, shift: Any, scale: Any) -> Any:
    """2^(scale (x - shift)) over x, and their sum."""
    total = np.float32(0)
    for v in range(len(x_C)):
        term = exp2((x_C[v] - shift) * scale)
        x_C[v] = term
        total += term
    return total


@register_jitable(fastmath={"contract", "reassoc"})
def _both_exponentials(x_C: Array, shift: Any, scale_z: Any, one_C: Array, scale_1: Any) -> tuple[Any, Any]:
    """The same over x with `scale_z`, and with `scale_1` into another vector."""
    total_z, total_1 = np.float32(0), np.float32(0)
    for v in range(len(x_C)):
        x = x_C[v] - shift
        term, one = exp2(x * scale_z), exp2(x * scale_1)
        x_C[v], one_C[v] = term, one
        total_z += term
        total_1 += one
    return total_z, total_1


@register_jitable(fastmath={"contract", "reassoc"})
def _shape_exponentials(y_C: Array, most: Any, x_C: Array, shift: Any, scale: Any) -> tuple[Any, Any]:
    """2^(y - most) over y; their sum, and that of their products with (y - most) - scale (x - shift)."""
    total, dot = np.float32(0), np.float32(0)
    for v in range(len(y_C)):
        y = y_C[v] - most
        term = exp2(y)
        dot += term * (y - (x_C[v] - shift) * scale)
        y_C[v] = term
        total += term
    return total, dot


@register_jitable
def _largest_outside(x_V: Array, ids_K: Array, far: float) -> Any:
    """The largest outside the head, 0 where there is none; the head's places become smaller than that by `far`."""
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            x_V[ids_K[rank]] = -np.inf
    most = largest(x_V)
    most = np.float32(0) if most == -np.inf else most
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            x_V[ids_K[rank]] = most - np.float32(far)
    return most


@register_jitable
def _log_sum(head_K: Array, ids_K: Array, beta: float, tail_sum: float, shift: float) -> float:
    """log of sum over the head of exp(beta x) + tail_sum exp(beta shift)."""
    most = beta * shift if tail_sum > 0 else -np.inf
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            most = max(most, beta * head_K[rank])
    total = tail_sum * math.exp(beta * shift - most) if tail_sum > 0 else 0.0
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            total += math.exp(beta * head_K[rank] - most)
    return math.log(total) + most


@register_jitable(fastmath={"contract"})
def _combine(x_V: Array, a: Any, one_V: Array, b: Any, y_V: Array, c: Any) -> None:
    """x <- a x + b one - c y, without a vector of no rows."""
    if len(one_V) and len(y_V):
        for v in range(len(x_V)):
            x_V[v] = a * x_V[v] + b * one_V[v] - c * y_V[v]
    elif len(one_V):
        for v in range(len(x_V)):
            x_V[v] = a * x_V[v] + b * one_V[v]
    elif len(y_V):
        for v in range(len(x_V)):
            x_V[v] = a * x_V[v] - c * y_V[v]
    else:
        for v in range(len(x_V)):
            x_V[v] *= a


@register_jitable
def _loss_row(
    beta: float,
    x_V: Array,
    y_V: Array,
    one_V: Array,
    ids_K: Array,
    log_p_K: Array,
    log_tail: float,
    label: int,
    kd: float,
    ce: float,
) -> tuple[float, float, bool]:
    """The row of `loss_rows_float32`: KL_T, CE and whether the first choice is the same; the gradient over x.

    `one_V` is scratch, [V] or for T = 1 empty. Exponentials of the tail are taken from its own largest logit, so that q
    stays finite in it where all mass is in the head. Outside the head the gradient is ce q_1 + kd (q - p^) with a
    shape, and ce q_1 + kd q (1 - p(R) / q(R)) with a bucket: a sum of exponentials with factors of the row.
    """
    size, shaped, softened = len(x_V), len(y_V) > 0, len(one_V) > 0
    scale_1, scale_z = np.float32(1 / _LOG2), np.float32(beta / _LOG2)
    head_K = np.empty(len(ids_K))
    x_label, best = np.float64(x_V[label]), -np.inf
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            head_K[rank] = x_V[ids_K[rank]]
            best = max(best, head_K[rank])
    from_x = _largest_outside(x_V, ids_K, _FAR / min(beta, 1.0))
    agreed = len(ids_K) > 0 and ids_K[0] >= 0 and head_K[0] >= max(best, from_x)
    from_y = _largest_outside(y_V, ids_K, _FAR) if shaped else np.float32(0)
    sum_1, sum_z, sum_y, dot = 0.0, 0.0, 0.0, 0.0
    for start in range(0, size, _BLOCK):
        x_C, stop = x_V[start : start + _BLOCK], min(start + _BLOCK, size)
        if shaped:
            parts = _shape_exponentials(y_V[start:stop], from_y, x_C, from_x, scale_z)
            sum_y += parts[0]
            dot += parts[1]
        if softened:
            sums = _both_exponentials(x_C, from_x, scale_z, one_V[start:stop], scale_1)
            sum_z += sums[0]
            sum_1 += sums[1]
        else:
            sum_z += _exponentials(x_C, from_x, scale_z)
    sum_1 = sum_1 if softened else sum_z
    shift = np.float64(from_x)
    log_1, log_z = _log_sum(head_K, ids_K, 1.0, sum_1, shift), _log_sum(head_K, ids_K, beta, sum_z, shift)
    p_tail, kl = math.exp(log_tail), 0.0
    mass = p_tail
    for rank in range(len(ids_K)):
        p = math.exp(log_p_K[rank])
        if p > 0:
            mass += p
            kl += p * (log_p_K[rank] - beta * head_K[rank] + log_z)
    by_1, by_z, by_y = ce * math.exp(shift - log_1), kd * mass * math.exp(beta * shift - log_z), 0.0
    if p_tail > 0 and sum_z > 0:
        if shaped:
            kl += p_tail * (log_tail - math.log(sum_y) + log_z - beta * shift + _LOG2 * dot / sum_y)
            by_y = kd * p_tail / sum_y
        else:
            kl += p_tail * (log_tail - math.log(sum_z) + log_z - beta * shift)
            by_z -= kd * p_tail / sum_z
    by_x = by_z if softened else by_z + by_1
    _combine(x_V, np.float32(by_x), one_V, np.float32(by_1), y_V, np.float32(by_y))
    for rank in range(len(ids_K)):
        if ids_K[rank] >= 0:
            q_1, q_z = math.exp(head_K[rank] - log_1), math.exp(beta * head_K[rank] - log_z)
            x_V[ids_K[rank]] = np.float32(ce * q_1 + kd * (mass * q_z - math.exp(log_p_K[rank])))
    x_V[label] -= np.float32(ce)
    return kl, log_1 - x_label, agreed


@register_jitable
def _loss_at(
    row: int, beta: float, offset_V: Array, x_V: Array, y_V: Array, one_V: Array, target: Any, scales: Any, results: Any
) -> None:
    """One row of `loss_rows_float32`, with its x and y in float32."""
    for v in range(len(y_V)):
        y_V[v] += offset_V[v]
    ids_NK, log_p_NK, log_tail_N, labels_N = target
    kd, ce = np.float64(scales[0][row]), np.float64(scales[1][row])
    log_tail = np.float64(log_tail_N[row])
    found = _loss_row(beta, x_V, y_V, one_V, ids_NK[row], log_p_NK[row], log_tail, labels_N[row], kd, ce)
    results[0][row], results[1][row], results[2][row] = found


@compiled_fused
def loss_rows_float32(
    beta: float, offset_V: Array, x_NV: Array, y_NV: Array, target: Any, scales: Any, results: Any
) -> None:
    """KL_T, CE(x, label) and whether teacher and student have the same first choice, into the three `results` [N], and
    over x the gradient: of kd_scale * KL_T with respect to z = beta x, and of ce_scale * CE with respect to x.

    `target` is ids [N, K] and log p_T [N, K] of a head (-1 and -inf where unused), log_tail [N], and labels [N]. The
    tail has the shape 2^(offset + y) over the tokens outside the head, or is a bucket where `y_NV` [N, V or 0] has no
    columns. `y_NV` is overwritten. `scales` are kd_scale and ce_scale [N]. With an empty head and kd_scale 0 what is
    left is the cross-entropy.
    """
    one_V = np.empty(0 if beta == 1.0 else x_NV.shape[1], np.float32)
    for row in range(len(x_NV)):
        _loss_at(row, beta, offset_V, x_NV[row], y_NV[row], one_V, target, scales, results)


@register_jitable
def _widen(words_V: Array, x_V: Array) -> None:
    """bfloat16 -> float32."""
    bits_V = x_V.view(np.int32)
    for v in range(len(words_V)):
        bits_V[v] = np.int32(words_V[v]) << np.int32(16)


@register_jitable
def _narrow(x_V: Array, words_V: Array) -> None:
    """float32 -> the nearest bfloat16, the even one of two; NaN stays NaN."""
    bits_V = x_V.view(np.uint32)
    for v in range(len(words_V)):
        bits = bits_V[v]
        rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        words_V[v] = rounded if (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint16(0x7FC0)


@compiled_fused
def loss_rows_bfloat16(
    beta: float, offset_V: Array, x_NV: Array, y_NV: Array, target: Any, scales: Any, results: Any
) -> None:
    """`loss_rows_float32` with x and y as the bits of bfloat16, uint16; all arithmetic is in float32."""
    size = x_NV.shape[1]
    one_V = np.empty(0 if beta == 1.0 else size, np.float32)
    wide_x_V, wide_y_V = np.empty(size, np.float32), np.empty(y_NV.shape[1], np.float32)
    for row in range(len(x_NV)):
        _widen(x_NV[row], wide_x_V)
        _widen(y_NV[row], wide_y_V)
        _loss_at(row, beta, offset_V, wide_x_V, wide_y_V, one_V, target, scales, results)
        _narrow(wide_x_V, x_NV[row])
