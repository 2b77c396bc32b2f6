"""The passes of `reduction` over float32, float16 and bfloat16 on a CPU: compiled kernels, some rows per thread.

Exponentials are polynomials in float32 (2^x on [-1/2, 1/2], the power-of-two part by the bits of the exponent), summed
in blocks of 512 places and then in float64.

Shapes: N rows, V vocabulary, K kept entries, J knots, G blocks of W neighbouring tokens, M candidates, X the 65,536
values of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from ..base.kernels import compiled, compiled_fused, in_threads
from .knots import common_base

Array = np.ndarray[Any, np.dtype[Any]]
_ROWS_AT_ONCE = 16
"""Rows per piece of work of a thread; float16 is widened one piece at a time."""
_BLOCK = 512
"""Places that are summed separately in float32."""
_GROUP = 128
"""bfloat16 values with one sign and exponent."""
_WIDTH = 64
"""Neighbouring tokens that one comparison skips where none is among the largest."""
_GONE = np.float32(-1000)
"""exp2 of this underflows to 0."""
_ROUNDS = np.float32(1.5 * 2**23)
"""x + this - this is x rounded to an integer for |x| < 2^22; the low bits of x + this are that integer."""
# 2^x on [-1/2, 1/2], by the series of exp(x log 2): the first omitted term is below 6e-9.
_EXP2 = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(8))


def _float32(x_NV: Tensor, start: int, stop: int) -> Array:
    """Rows [start:stop, V] as float32, by NumPy: torch would start threads of its own in every thread that calls it."""
    return np.ascontiguousarray(x_NV[start:stop].numpy(), np.float32)


def compiled_largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order and their ids [N, K]; of equal ones the first."""
    count, size = x_NV.shape
    # A few hundred blocks: the choice among them and their members costs less than the pass over the row.
    width = 1 << min(max(int(math.log2(max(size / (8 * k), 1.0))), 3), 7)
    values_NK, ids_NK = np.empty((count, k), np.float32), np.empty((count, k), np.int64)

    def work(start: int, stop: int) -> None:
        bits_NV = _float32(x_NV, start, stop).view(np.int32)
        largest_bits(bits_NV, width, values_NK[start:stop].view(np.int32), ids_NK[start:stop])

    in_threads(work, count, _ROWS_AT_ONCE)
    return torch.from_numpy(values_NK), torch.from_numpy(ids_NK)


def compiled_tail_sums(logits_NV: Tensor, head_ids_NK: Tensor, shift_N: Tensor, knots: Sequence[float]) -> Tensor:
    """log sum_v exp(beta (x_v - shift)) [N, J] over the tokens outside the head."""
    head_ids, shift = head_ids_NK.contiguous().numpy(), shift_N.float().contiguous().numpy()
    sums_NJ = np.empty((len(logits_NV), len(knots)))

    def work(start: int, stop: int) -> None:
        rows_NV = _float32(logits_NV, start, stop)
        for columns, scale, powers in _exponents(knots):
            found_NJ = np.empty((stop - start, len(powers)))
            sums_of_exp2(rows_NV, head_ids[start:stop], shift[start:stop], scale, powers, found_NJ)
            sums_NJ[start:stop, columns] = found_NJ

    in_threads(work, len(logits_NV), _ROWS_AT_ONCE)
    return torch.from_numpy(sums_NJ).log_().float()


def counted_head_and_rest(logits_NV: Tensor, k: int, knots: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16: the min(k + 1, V) largest values, their ids [N, K], and log sums over all but the first k [N, J]."""
    count, size = logits_NV.shape
    most = min(k + 1, size)
    values_NK, ids_NK = np.empty((count, most), np.float32), np.empty((count, most), np.int64)
    sums_NJ = np.empty((count, len(knots)))

    def work(start: int, stop: int) -> None:
        words_NV = np.ascontiguousarray(logits_NV[start:stop].view(torch.int16).numpy()).view(np.uint16)
        for columns, scale, powers in _exponents(knots):
            found_NJ, bits_NK = np.empty((stop - start, len(powers))), values_NK[start:stop].view(np.int32)
            count_and_sum(words_NV, k, scale, powers, bits_NK, ids_NK[start:stop], found_NJ)
            sums_NJ[start:stop, columns] = found_NJ

    in_threads(work, count, _ROWS_AT_ONCE)
    return torch.from_numpy(values_NK), torch.from_numpy(ids_NK), torch.from_numpy(sums_NJ).log_().float()


def _exponents(knots: Sequence[float]) -> list[tuple[slice, float, Array]]:
    """Groups of knots: their columns, the exponent of 2 per nat of their common base, their multiples of the base."""
    base, multiples = common_base(knots)
    if multiples:
        return [(slice(None), base / math.log(2), np.array(multiples))]
    return [(slice(place, place + 1), knot / math.log(2), np.array([1])) for place, knot in enumerate(knots)]


@register_jitable
def _ordered(bits: Any) -> Any:
    """float32 bits -> an int32 of the same order: the bits of negative numbers but the sign are inverted; -0 is 0."""
    ordered = np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return np.int32(ordered + np.int32(ordered == -1))


@register_jitable
def _descending(keys_M: Array, bits_K: Array, ids_K: Array) -> None:
    """Keys of value and id -> the K largest: value bits int32 and ids, descending."""
    ascending = np.sort(keys_M)
    for rank in range(len(ids_K)):
        key = ascending[len(ascending) - 1 - rank]
        ordered = (key + 0xFFFFFFFF) >> 32
        ids_K[rank] = (ordered << 32) - key
        bits_K[rank] = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)


@compiled
def largest_bits(bits_NV: Array, width: int, top_bits_NK: Array, ids_NK: Array) -> None:
    """The K largest float32 of each row, as int32 bits in descending order, and their ids."""
    size, k = bits_NV.shape[1], ids_NK.shape[1]
    blocks = -(-size // width)
    maxima_G = np.empty(blocks, np.int32)
    for row in range(len(bits_NV)):
        bits_V = bits_NV[row]
        for block in range(blocks):
            bits_W = bits_V[block * width : min((block + 1) * width, size)]
            most = np.int32(-(2**31))
            for i in range(len(bits_W)):
                most = max(most, _ordered(bits_W[i]))
            maxima_G[block] = most
        # k values reach the k-th largest maximum: no smaller one is among the k largest.
        least = np.partition(maxima_G, blocks - k)[blocks - k] if blocks >= k else np.int32(-(2**31))
        keys_M = np.empty(width * np.sum(maxima_G >= least), np.int64)
        found = 0
        for block in range(blocks):
            if maxima_G[block] >= least:
                for place in range(block * width, min((block + 1) * width, size)):
                    ordered = _ordered(bits_V[place])
                    if ordered >= least:
                        keys_M[found] = (np.int64(ordered) << 32) - place
                        found += 1
        _descending(keys_M[:found], top_bits_NK[row], ids_NK[row])


@register_jitable(fastmath={"contract"})
def _weighted_sums(y_V: Array, weight_V: Array, size: int, powers_J: Array, sums_J: Array) -> None:
    """sum_v weight_v (2^(y_v))^n for ascending powers n, over the first `size` places, a multiple of a block.

    Terms are float32, and so are the sums of each place of a block; the total of these sums is float64. Multiply-adds
    are fused where the CPU has that.
    """
    lowest = np.float32(-127)
    c0, c1, c2, c3, c4, c5, c6, c7 = _EXP2
    clamped_W, rounded_W = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    term_W, power_W, whole_W = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.int32)
    bits_W, two_W = rounded_W.view(np.int32), whole_W.view(np.float32)
    first_W, sums_JW = np.empty(_BLOCK, np.float32), np.zeros((len(powers_J), _BLOCK), np.float32)
    for start in range(0, size, _BLOCK):
        y_W, weight_W = y_V[start : start + _BLOCK], weight_V[start : start + _BLOCK]
        for i in range(_BLOCK):
            y = lowest if y_W[i] < lowest else y_W[i]  # NaN compares false and stays NaN
            clamped_W[i] = y
            rounded_W[i] = y + _ROUNDS
        for i in range(_BLOCK):
            whole_W[i] = (bits_W[i] << np.int32(23)) + np.int32(127 << 23)  # the bits of 2^n; of 0 for n = -127
        for i in range(_BLOCK):
            f = clamped_W[i] - (rounded_W[i] - _ROUNDS)
            term_W[i] = c0 + f * (c1 + f * (c2 + f * (c3 + f * (c4 + f * (c5 + f * (c6 + f * c7))))))
        for i in range(_BLOCK):
            term_W[i] *= two_W[i]
            power_W[i] = term_W[i]
        reached = 1
        for knot in range(len(powers_J)):
            while reached < powers_J[knot]:
                # By the first power where it does not overshoot.
                far = knot > 0 and powers_J[0] <= powers_J[knot] - reached
                factor_W, step = (first_W, powers_J[0]) if far else (term_W, 1)
                for i in range(_BLOCK):
                    power_W[i] *= factor_W[i]
                reached += step
            if knot == 0:
                first_W[:] = power_W
            sums_W = sums_JW[knot]
            for i in range(_BLOCK):
                sums_W[i] += power_W[i] * weight_W[i]
    for knot in range(len(powers_J)):
        total = 0.0
        for i in range(_BLOCK):
            total += sums_JW[knot, i]
        sums_J[knot] = total


@compiled_fused
def sums_of_exp2(
    x_NV: Array, head_ids_NK: Array, shift_N: Array, scale: float, powers_J: Array, sums_NJ: Array
) -> None:
    """sum_v (2^(scale (x_v - shift)))^n of each row, for ascending powers n, over the tokens outside the head."""
    size, factor = x_NV.shape[1], np.float32(scale)
    y_V = np.full(-(-size // _BLOCK) * _BLOCK, _GONE)
    weight_V = np.ones(len(y_V), np.float32)
    for row in range(len(x_NV)):
        x_V, shift = x_NV[row], shift_N[row]
        for v in range(size):
            y_V[v] = (x_V[v] - shift) * factor
        for rank in range(head_ids_NK.shape[1]):
            y_V[head_ids_NK[row, rank]] = _GONE
        _weighted_sums(y_V, weight_V, len(y_V), powers_J, sums_NJ[row])


@register_jitable
def _least_of_top(counts_X: Array, k: int) -> Any:
    """The k-th largest of the counted bfloat16 values, as an int16 of the same order; 0 and -0 are -1."""
    found = 0
    for first in range(2**15 - _GROUP, -1, -_GROUP):
        group_W = counts_X[first : first + _GROUP]
        here = 0
        for i in range(_GROUP):
            here += group_W[i]
        if found + here + (counts_X[2**15] if first == 0 else 0) < k:
            found += here
            continue
        for place in range(_GROUP - 1, -1, -1):
            found += group_W[place]
            if found >= k and first + place > 0:
                return np.int16(first + place)
        return np.int16(-1)
    found += counts_X[2**15]
    for word in range(2**15 + 1, 2**16):
        found += counts_X[word]
        if found >= k:
            return np.int16((word - 2**16) ^ 0x7FFF)
    return np.int16(-(2**15))


@register_jitable
def _places(counts_X: Array, shift: Any, factor: Any, y_V: Array, weight_V: Array) -> int:
    """Write (x - shift) * factor and the count of every counted bfloat16 x to `y_V` and `weight_V`; clear the counts.

    Whole groups are written, with y far below for values of count 0. Returns the number of places, a multiple of a
    block.
    """
    bits_W = np.empty(_GROUP, np.int32)
    x_W = bits_W.view(np.float32)
    filled = 0
    for first in range(0, len(counts_X), _GROUP):
        counts_W = counts_X[first : first + _GROUP]
        some = np.int32(0)
        for i in range(_GROUP):
            some = np.int32(some | counts_W[i])
        if some != 0:
            y_W, weight_W = y_V[filled : filled + _GROUP], weight_V[filled : filled + _GROUP]
            for i in range(_GROUP):
                bits_W[i] = np.int32(first + i) << np.int32(16)
            for i in range(_GROUP):
                y = (x_W[i] - shift) * factor
                y_W[i] = y if counts_W[i] > 0 else _GONE
                weight_W[i] = counts_W[i]
                counts_W[i] = 0
            filled += _GROUP
    whole = -(-filled // _BLOCK) * _BLOCK
    y_V[filled:whole], weight_V[filled:whole] = _GONE, 0
    return whole


@compiled_fused
def count_and_sum(
    words_NV: Array, k: int, scale: float, powers_J: Array, top_bits_NK: Array, ids_NK: Array, sums_NJ: Array
) -> None:
    """For bfloat16 rows: the min(k + 1, V) largest as bits of float32 with their ids, and over all but the first k
    sum_v (2^(scale (x_v - largest of these)))^n for ascending powers n.

    A row has a few thousand different values at most: one count of them serves both results.
    """
    size, most, factor = words_NV.shape[1], ids_NK.shape[1], np.float32(scale)
    counts_X = np.zeros(2**16, np.int32)
    y_V, weight_V = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    keys_V = np.empty(size, np.int64)
    for row in range(len(words_NV)):
        words_V = words_NV[row]
        for v in range(size):
            counts_X[words_V[v]] += np.int32(1)
        # int16 has the order of the values above 0, and below 0 once all bits but the sign are inverted.
        least = _least_of_top(counts_X, most)
        turn = np.int16(0x7FFF if least < 0 else 0)
        found = 0
        for first in range(0, size, _WIDTH):
            halves_W = words_V[first : min(first + _WIDTH, size)].view(np.int16)
            largest_half = np.int16(-(2**15))
            for i in range(len(halves_W)):
                turned = np.int16(halves_W[i] ^ turn)
                largest_half = turned if turned > largest_half else largest_half
            if largest_half >= least:
                for i in range(len(halves_W)):
                    if np.int16(halves_W[i] ^ turn) >= least:
                        ordered = _ordered(np.int32(np.int32(halves_W[i]) << 16))
                        keys_V[found] = (np.int64(ordered) << 32) - (first + i)
                        found += 1
        _descending(keys_V[:found], top_bits_NK[row], ids_NK[row])
        for rank in range(k):
            counts_X[words_V[ids_NK[row, rank]]] -= np.int32(1)
        shift = top_bits_NK[row].view(np.float32)[k] if k < most else np.float32(0)
        filled = _places(counts_X, np.float32(0) if shift == -np.inf else shift, factor, y_V, weight_V)
        _weighted_sums(y_V, weight_V, filled, powers_J, sums_NJ[row])
