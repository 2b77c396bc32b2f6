"""The passes over a full distribution: its largest entries, and sums over all others.

On a CPU, float32 and narrower, they are compiled loops that read a row once while it stays in the cache; elsewhere, and in
float64, they are operations of torch. Of bfloat16, of which a row of 49,152 holds a few thousand different numbers at most,
the loop counts them: exponentials are taken of what differs. Shape suffixes as in `targets`: N positions, V vocabulary, K
entries, C knots; X the 65,536 numbers of bfloat16, B blocks of W neighbours, M what is chosen from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .knots import common_base
from .reduction_cpu import _compiled_largest, _compiled_tail_sums, _counted_head_and_rest

_CACHED_NUMBERS = 1 << 19


def head_and_rest(logits_NV: Tensor, k: int, knots: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest of each row in descending order, [N, k], and their places, of equal ones the first; the largest of the
    rest [N], -inf where there is none; and of the rest, relative to that, log sum_v exp(beta (x_v - largest)) [N, C] for every
    knot beta.

    Raises ValueError for k outside 0..V.
    """
    size = logits_NV.shape[-1]
    if not 0 <= k <= size:
        raise ValueError(f"the {k} largest of {size}")
    if logits_NV.dtype == torch.bfloat16 and _is_compiled(logits_NV):
        top_NK, ids_NK, sums_NC = _counted_head_and_rest(logits_NV, k, knots)
    else:
        # One more than the head: the largest of the rest.
        top_NK, ids_NK = _largest(logits_NV, min(k + 1, size))
        sums_NC = None
    top_NK = top_NK.to(_accumulator(logits_NV.dtype))
    rest_N = top_NK[:, k] if k < size else top_NK.new_full((len(top_NK),), -math.inf)
    if sums_NC is None:
        sums_NC = _tail_sums(logits_NV, ids_NK[:, :k], torch.where(torch.isneginf(rest_N), 0.0, rest_N), knots)
    return top_NK[:, :k], ids_NK[:, :k], rest_N, sums_NC


def _largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order and their places [N, k]; of equal ones, frequent in bf16, the first.

    In two levels: the k blocks whose maxima are largest hold all that is wanted, because a member of any other block is
    beaten by k maxima. One pass over everything, and a few thousand numbers to choose from.
    """
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


def _tail_sums(logits_NV: Tensor, head_ids_NK: Tensor, shift_N: Tensor, knots: Sequence[float]) -> Tensor:
    """log sum_{v in R} exp(beta * (x_v - shift)) [N, C] for every knot, over all tokens R that are not in the head.

    `shift` [N] must be no less than any of R, but for where R is empty.

    One exponential serves all knots that are multiples of a common base: exp(n b x) = exp(b x)^n. It is taken to the base
    2, which is the faster one.
    """
    if _is_compiled(logits_NV):
        return _compiled_tail_sums(logits_NV, head_ids_NK, shift_N, knots)
    base, multiples = common_base(knots)
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


def _accumulator(dtype: torch.dtype) -> torch.dtype:
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


def _is_compiled(x_NV: Tensor) -> bool:
    return x_NV.device.type == "cpu" and x_NV.dtype != torch.float64
