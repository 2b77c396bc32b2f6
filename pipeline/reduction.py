"""The passes over a full distribution: its largest entries, and sums over all others.

On a CPU, float32 and narrower, they are compiled loops that read a row once while it stays in the cache; elsewhere, and in
float64, they are operations of torch. Shape suffixes as in `targets`: N positions, V vocabulary, K entries, C knots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from pipeline.compiled import compiled, compiled_fused, in_threads

Array = np.ndarray[Any, np.dtype[Any]]

_CACHED_NUMBERS = 1 << 19
_ROWS_AT_ONCE = 16
"""A thread takes so many rows, and narrower ones are widened."""
_BLOCK = 512
_GROUP = 128
_GONE = np.float32(-1000)
"""2 to this is 0 in float32."""
_ROUNDS = np.float32(1.5 * 2**23)
"""Added to a number of size below 2^22 and taken off again, it leaves a whole one; the sum's last bits are that number."""
# 2^x on [-1/2, 1/2], by the series of exp(x log 2): the first term left out is below 6e-9.
_EXP2 = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(8))


def largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order and their places [N, k]; of equal ones, frequent in bf16, the first.

    In two levels: the k blocks whose maxima are largest hold all that is wanted, because a member of any other block is
    beaten by k maxima. One pass over everything, and a few thousand numbers to choose from.

    Raises ValueError for k outside 1..V.
    """
    if not 1 <= k <= x_NV.shape[-1]:
        raise ValueError(f"the {k} largest of {x_NV.shape[-1]}")
    if _is_compiled(x_NV):
        return _compiled_largest(x_NV, k)
    count, size = x_NV.shape
    width = 1 << max(round(math.log2(max(size / max(k, 1), 1.0)) / 2), 0)
    blocks = -(-size // width)
    if width < 4 or blocks <= k:
        return _first_largest(x_NV, torch.arange(size, device=x_NV.device).expand(count, size), k)
    whole = size // width
    maxima_NB = x_NV[:, : whole * width].view(count, whole, width).amax(-1)
    if blocks > whole:
        maxima_NB = torch.cat([maxima_NB, x_NV[:, whole * width :].amax(-1, keepdim=True)], -1)
    _, blocks_Nk = _first_largest(maxima_NB, torch.arange(blocks, device=x_NV.device).expand(count, blocks), k)
    members_NM = (blocks_Nk.unsqueeze(-1) * width + torch.arange(width, device=x_NV.device)).flatten(-2)
    # The last block may be short: what is not there must not be chosen.
    values_NM = x_NV.gather(-1, members_NM.clamp(max=size - 1)).masked_fill(members_NM >= size, -math.inf)
    return _first_largest(values_NM, members_NM, k)


def tail_sums(logits_NV: Tensor, head_ids_NK: Tensor, shift_N: Tensor, knots: Sequence[float]) -> Tensor:
    """log sum_{v in R} exp(beta * (x_v - shift)) [N, C] for every knot, over all tokens R that are not in the head.

    `shift` [N] must be no less than any of R, but for where R is empty.

    One exponential serves all knots that are multiples of a common base: exp(n b x) = exp(b x)^n. It is taken to the base
    2, which is the faster one.
    """
    if _is_compiled(logits_NV):
        return _compiled_tail_sums(logits_NV, head_ids_NK, shift_N, knots)
    base, multiples = _common_base(knots)
    scale = base / math.log(2.0)
    parts = in_cache(logits_NV)
    most = max(some.stop - some.start for some in parts)
    # Written over and over: fresh pages would cost as much as the arithmetic.
    root_NV, second_NV, power_NV = (shift_N.new_empty(most, logits_NV.shape[-1]) for _ in range(3))
    sums = []
    for some in parts:
        x_NV = logits_NV[some]
        size = len(x_NV)
        root_nV = torch.add((shift_N[some] * -scale).unsqueeze(-1), x_NV, alpha=scale, out=root_NV[:size])
        root_nV.scatter_(-1, head_ids_NK[some], -math.inf)
        if multiples:
            root_nV.exp2_()
            found = _sums_of_powers(root_nV, multiples, second_NV[:size], power_NV[:size])
        else:
            found = [torch.mul(root_nV, knot, out=power_NV[:size]).exp2_().sum(-1) for knot in knots]
        sums.append(torch.stack(found, -1))
    return torch.cat(sums).log_()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def in_cache(x_NV: Tensor) -> list[slice]:
    """Rows to pass over together, several times: on a CPU few enough to stay in its cache from one pass to the next.

    Never one row of several: torch sums a single one in another order, by all threads together.
    """
    count = len(x_NV)
    rows = max(_CACHED_NUMBERS // max(x_NV.shape[-1], 1), 2) if x_NV.device.type == "cpu" else max(count, 1)
    parts = max(count // rows, 1)
    return [slice(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


def _first_largest(x_NM: Tensor, ids_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their ids, descending; of equal ones those of the lowest ids."""
    if x_NM.dtype == torch.float64:
        ids_NM, order = ids_NM.sort(-1)
        x_NM, order = x_NM.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return x_NM[..., :k], ids_NM.gather(-1, order)[..., :k]
    # One whole number for value and id: a float's bits ascend as it does, below zero once all but the sign are turned.
    bits_NM = (x_NM.float() + 0.0).view(torch.int32)
    bits_NM = (bits_NM ^ ((bits_NM >> 31) & 0x7FFFFFFF)).long()
    key_Nk = torch.topk((bits_NM << 32) - ids_NM, k, dim=-1).values
    bits_Nk = (key_Nk + 0xFFFFFFFF) >> 32
    ids_Nk = (bits_Nk << 32) - key_Nk
    bits_Nk = bits_Nk.to(torch.int32)
    return (bits_Nk ^ ((bits_Nk >> 31) & 0x7FFFFFFF)).view(torch.float32), ids_Nk


def _sums_of_powers(root_NV: Tensor, exponents: Sequence[int], second_NV: Tensor, power_NV: Tensor) -> list[Tensor]:
    """sum_v root^n [N] for ascending n, from the powers before; the last two tensors are room to work in."""
    # The root and the first power above it are what further powers are made of.
    factors, power, reached = {1: root_NV}, root_NV, 1
    sums = []
    for exponent in exponents:
        while reached < exponent:
            step = max(step for step in factors if step <= exponent - reached)
            room = second_NV if len(factors) == 1 else power_NV
            power = torch.mul(power, factors[step], out=room)
            reached += step
        if len(factors) == 1 and reached > 1:
            factors[reached] = power
        sums.append(power.sum(-1))
    return sums


def _common_base(knots: Sequence[float]) -> tuple[float, list[int]]:
    """The largest base of which all knots are small multiples, and these; 1 and none where there is no such base."""
    for parts in (1, 2, 3):
        base = min(knots) / parts
        multiples = [round(knot / base) for knot in knots]
        if max(multiples) <= 16 and all(abs(m * base - knot) < 1e-12 for m, knot in zip(multiples, knots, strict=True)):
            return base, multiples
    return 1.0, []


def _is_compiled(x_NV: Tensor) -> bool:
    return x_NV.device.type == "cpu" and x_NV.dtype != torch.float64


def _words(x_NV: Tensor, start: int, stop: int) -> tuple[Array, int]:
    """Some rows as uint16 [n, V words] and how many words a number has: 1 of bfloat16, 2 of float32, the lower first.

    By NumPy: every thread that calls torch gets threads of its own from it.
    """
    rows_NV = x_NV[start:stop]
    if rows_NV.dtype == torch.bfloat16:
        return np.ascontiguousarray(rows_NV.view(torch.int16).numpy()).view(np.uint16), 1
    return np.ascontiguousarray(rows_NV.numpy(), np.float32).view(np.uint16), 2


def _compiled_largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    count, size = x_NV.shape
    # A few hundred blocks: finding the best of them, and what they hold, costs less than the pass over all.
    width = 1 << min(max(int(math.log2(max(size / (8 * k), 1.0))), 3), 7)
    values_Nk, ids_Nk = np.empty((count, k), np.float32), np.empty((count, k), np.int64)

    def work(start: int, stop: int) -> None:
        bits_Nk = values_Nk[start:stop].view(np.int32)
        _largest_bits(*_words(x_NV, start, stop), width, bits_Nk, ids_Nk[start:stop])

    in_threads(work, count, _ROWS_AT_ONCE)
    return torch.from_numpy(values_Nk), torch.from_numpy(ids_Nk)


def _compiled_tail_sums(logits_NV: Tensor, head_ids_NK: Tensor, shift_N: Tensor, knots: Sequence[float]) -> Tensor:
    base, multiples = _common_base(knots)
    exponents = [(base, multiples)] if multiples else [(knot, [1]) for knot in knots]
    head_ids, shift = head_ids_NK.contiguous().numpy(), shift_N.float().contiguous().numpy()
    sums_NC = np.empty((len(logits_NV), len(knots)))

    def work(start: int, stop: int) -> None:
        (words_NV, words), column = _words(logits_NV, start, stop), 0
        for scale, powers in exponents:
            found_NC = np.empty((stop - start, len(powers)))
            scale_2 = scale / math.log(2)
            _sums_of_exp2(words_NV, words, head_ids[start:stop], shift[start:stop], scale_2, np.array(powers), found_NC)
            sums_NC[start:stop, column : column + len(powers)] = found_NC
            column += len(powers)

    in_threads(work, len(logits_NV), _ROWS_AT_ONCE)
    return torch.from_numpy(sums_NC).log_().float()


@register_jitable
def _ordered(bits: Any) -> Any:
    """An int32 that ascends as the float32 of these bits does: all but the sign of negative ones are turned; -0 is 0."""
    ordered = np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return np.int32(ordered + np.int32(ordered == -1))


@register_jitable
def _add_keys(bits_W: Array, first: int, least: Any, keys_M: Array, found: int) -> int:
    """Keys of the numbers that are no less than `least`, to the end of those that were found; returns how many there are now."""
    for i in range(len(bits_W)):
        ordered = _ordered(bits_W[i])
        if ordered >= least:
            keys_M[found] = (np.int64(ordered) << 32) - (first + i)
            found += 1
    return found


@register_jitable
def _block_maxima(stored_V: Array, words: int, width: int, maxima_B: Array) -> None:
    """The largest of each `width` numbers of one or two uint16 words each, as `_ordered` has it."""
    if words == 2:
        bits_V = stored_V.view(np.int32)
        for block in range(len(maxima_B)):
            bits_W = bits_V[block * width : min((block + 1) * width, len(bits_V))]
            largest = np.int32(-(2**31))
            for i in range(len(bits_W)):
                largest = max(largest, _ordered(bits_W[i]))
            maxima_B[block] = largest
        return
    # Sixteen bits each, twice as many at a time, and only the largest of them is widened.
    halves_V = stored_V.view(np.int16)
    for block in range(len(maxima_B)):
        halves_W = halves_V[block * width : min((block + 1) * width, len(halves_V))]
        most = np.int16(-(2**15))
        for i in range(len(halves_W)):
            turned = np.int16(halves_W[i] ^ ((halves_W[i] >> 15) & 0x7FFF))
            most = turned if turned > most else most
        maxima_B[block] = _ordered(np.int32((most ^ ((most >> 15) & 0x7FFF)) << 16))


@compiled
def _largest_bits(words_NV: Array, words: int, width: int, bits_Nk: Array, ids_Nk: Array) -> None:
    """The k largest of each row, descending, of floats of one or two uint16 words each: their int32 as float32, and places."""
    size, k = words_NV.shape[1] // words, ids_Nk.shape[1]
    blocks = -(-size // width)
    maxima_B, room_W = np.empty(blocks, np.int32), np.empty(width, np.int32)
    for row in range(len(words_NV)):
        stored_V = words_NV[row]
        bits_V = stored_V[: len(stored_V) // 2 * 2].view(np.int32)
        _block_maxima(stored_V, words, width, maxima_B)
        # What is below the k-th largest maximum is beaten by k others.
        least = np.partition(maxima_B, blocks - k)[blocks - k] if blocks >= k else np.int32(-(2**31))
        keys_M = np.empty(width * np.sum(maxima_B >= least), np.int64)
        found = 0
        for block in range(blocks):
            if maxima_B[block] >= least:
                first = block * width
                count = min(width, size - first)
                if words == 2:
                    found = _add_keys(bits_V[first : first + count], first, least, keys_M, found)
                else:
                    for i in range(count):
                        room_W[i] = np.int32(stored_V[first + i]) << np.int32(16)
                    found = _add_keys(room_W[:count], first, least, keys_M, found)
        ascending = np.sort(keys_M[:found])
        for rank in range(k):
            key = ascending[found - 1 - rank]
            ordered = (key + 0xFFFFFFFF) >> 32
            ids_Nk[row, rank] = (ordered << 32) - key
            bits_Nk[row, rank] = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)


@register_jitable
def _count(stored_V: Array, counts_X: Array) -> None:
    """How often each uint16 stands there, added to what `counts_X` [65536] has."""
    for v in range(len(stored_V)):
        counts_X[stored_V[v]] += np.int32(1)


@register_jitable
def _counted(counts_X: Array, shift: Any, factor: Any, y_V: Array, weight_V: Array) -> int:
    """(x - shift) * factor of every bfloat16 x that was counted, and how often it was. Clears the counts; returns how many.

    All of one sign and exponent together: of those that were not counted y is far below and the weight 0.
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
    return filled


@compiled_fused
def _sums_of_exp2(
    words_NV: Array, words: int, head_ids_NK: Array, shift_N: Array, scale: float, powers_C: Array, sums_NC: Array
) -> None:
    """sum_v (2^(scale (x_v - shift)))^n of each row, for ascending powers n, over all v but the head's.

    x are floats of one or two uint16 words each. Of bfloat16 a row has a few thousand different ones at most: they are counted
    first. Terms are float32 and summed so, each of a block's places by itself; float64 takes over for these sums.
    """
    size, factor, lowest = words_NV.shape[1] // words, np.float32(scale), np.float32(-127)
    c0, c1, c2, c3, c4, c5, c6, c7 = _EXP2
    room = max(size, 2**16 if words == 1 else 0) + _BLOCK
    y_V, weight_V = np.empty(room, np.float32), np.empty(room, np.float32)
    if words == 2:
        weight_V[:] = 1
    counts_X = np.zeros(2**16 if words == 1 else 0, np.int32)
    clamped_W, rounded_W = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    term_W, power_W, whole_W = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.int32)
    bits_W, two_W = rounded_W.view(np.int32), whole_W.view(np.float32)
    first_W, sums_CW = np.empty(_BLOCK, np.float32), np.empty((len(powers_C), _BLOCK), np.float32)
    for row in range(len(words_NV)):
        stored_V, shift = words_NV[row], shift_N[row]
        if words == 1:
            _count(stored_V, counts_X)
            for rank in range(head_ids_NK.shape[1]):
                counts_X[stored_V[head_ids_NK[row, rank]]] -= np.int32(1)
            filled = _counted(counts_X, shift, factor, y_V, weight_V)
        else:
            filled, x_V = size, stored_V.view(np.float32)
            for v in range(size):
                y_V[v] = (x_V[v] - shift) * factor
            for rank in range(head_ids_NK.shape[1]):
                y_V[head_ids_NK[row, rank]] = _GONE
        y_V[filled : filled + _BLOCK], weight_V[filled : filled + _BLOCK] = _GONE, 1
        sums_CW[:] = 0
        for block in range(0, filled, _BLOCK):
            y_W, weight_W = y_V[block : block + _BLOCK], weight_V[block : block + _BLOCK]
            for i in range(_BLOCK):
                y = lowest if y_W[i] < lowest else y_W[i]  # this way round, what is no number stays none
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
            for knot in range(len(powers_C)):
                while reached < powers_C[knot]:
                    # By the first of the powers where that is not too far.
                    far = knot > 0 and powers_C[0] <= powers_C[knot] - reached
                    factor_W, step = (first_W, powers_C[0]) if far else (term_W, 1)
                    for i in range(_BLOCK):
                        power_W[i] *= factor_W[i]
                    reached += step
                if knot == 0:
                    first_W[:] = power_W
                sums_W = sums_CW[knot]
                for i in range(_BLOCK):
                    sums_W[i] += power_W[i] * weight_W[i]
        for knot in range(len(powers_C)):
            total = 0.0
            for i in range(_BLOCK):
                total += sums_CW[knot, i]
            sums_NC[row, knot] = total
