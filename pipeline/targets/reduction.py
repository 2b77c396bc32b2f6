"""The passes over a full distribution: its largest entries, and sums over all others.

For float32 and narrower, `reduction_cpu` has them as compiled kernels that read a row once while it stays in the CPU's
cache, and `reduction_triton` as one kernel of a CUDA GPU, where Triton is installed (torch for CUDA brings it on Linux).
For all else this module has them as torch operations. For bfloat16 a CPU counts: a row of 49,152 logits has a few
thousand different values at most, and one exponential serves all equal ones.

Shapes: N positions, V vocabulary, K kept entries, J knots; G blocks of W neighbouring tokens, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.kernels import triton_runs_on
from .knots import common_base
from .reduction_cpu import compiled_largest, compiled_tail_sums, counted_head_and_rest

_CACHED_NUMBERS = 1 << 19  # 2 MiB of float32
_DEVICE_NUMBERS = 1 << 27  # 512 MiB of float32
_LARGEST_HEAD = 512  # of the kernels of a GPU, as the next one
_LARGEST_VOCABULARY = 1 << 20


def head_and_rest(logits_NV: Tensor, k: int, knots: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest logits of each row, and sums over the rest.

    Returns (values [N, k] in descending order, token ids [N, k], rest_max [N], sums [N, J]): equal values in order of
    their ids; rest_max is the largest of the rest, -inf where the rest is empty; sums are log sum_v exp(beta (x_v -
    rest_max)) over the rest for every knot beta.

    Raises ValueError for k outside 0..V.
    """
    size = logits_NV.shape[-1]
    if not 0 <= k <= size:
        raise ValueError(f"the {k} largest of {size} logits: k is outside 0..{size}")
    base, multiples = common_base(knots)
    sums_NJ: Tensor | None
    if has_kernels(logits_NV) and k <= _LARGEST_HEAD and multiples:
        from .reduction_triton import fused_head_and_rest

        top_NK, ids_NK, sums_NJ = fused_head_and_rest(logits_NV, k, base, multiples)
    elif logits_NV.dtype == torch.bfloat16 and runs_compiled(logits_NV):
        top_NK, ids_NK, sums_NJ = counted_head_and_rest(logits_NV, k, knots)
    else:
        # One more than the head: the largest of the rest.
        top_NK, ids_NK = _largest(logits_NV, min(k + 1, size))
        sums_NJ = None
    top_NK = top_NK if top_NK.dtype == torch.float64 else top_NK.float()
    rest_N = top_NK[:, k] if k < size else top_NK.new_full((len(top_NK),), -math.inf)
    if sums_NJ is None:
        sums_NJ = _tail_sums(logits_NV, ids_NK[:, :k], torch.where(torch.isneginf(rest_N), 0.0, rest_N), knots)
    return top_NK[:, :k], ids_NK[:, :k], rest_N, sums_NJ


def _largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order and their ids [N, k]; of equal ones, as in bfloat16, the first.

    Two levels: the k blocks with the largest maxima hold the k largest values, because k maxima exceed every member of
    the other blocks. One pass over the row, then a choice among a few thousand candidates.
    """
    if runs_compiled(x_NV):
        return compiled_largest(x_NV, k)
    count, size = x_NV.shape
    width = 1 << max(round(math.log2(max(size / max(k, 1), 1.0)) / 2), 0)
    blocks = -(-size // width)
    if width < 4 or blocks <= k:
        return _first_largest(x_NV, torch.arange(size, device=x_NV.device).expand(count, size), k)
    whole = size // width
    maxima_NG = x_NV[:, : whole * width].view(count, whole, width).amax(-1)
    if blocks > whole:
        maxima_NG = torch.cat([maxima_NG, x_NV[:, whole * width :].amax(-1, keepdim=True)], -1)
    _, blocks_NK = _first_largest(maxima_NG, torch.arange(blocks, device=x_NV.device).expand(count, blocks), k)
    members_NM = (blocks_NK.unsqueeze(-1) * width + torch.arange(width, device=x_NV.device)).flatten(-2)
    # The last block may be short: its missing members must not be chosen.
    values_NM = x_NV.gather(-1, members_NM.clamp(max=size - 1)).masked_fill(members_NM >= size, -math.inf)
    return _first_largest(values_NM, members_NM, k)


def _tail_sums(logits_NV: Tensor, head_ids_NK: Tensor, shift_N: Tensor, knots: Sequence[float]) -> Tensor:
    """log sum_{v in R} exp(beta * (x_v - shift)) [N, J] for every knot, over the tokens R outside the head.

    `shift` [N] must be an upper bound of x on R, or any number where R is empty.

    One exponential serves all knots that are multiples of a common base: exp(n b x) = exp(b x)^n. exp2 is fastest.
    """
    if runs_compiled(logits_NV):
        return compiled_tail_sums(logits_NV, head_ids_NK, shift_N, knots)
    base, multiples = common_base(knots)
    scale = base / math.log(2.0)
    parts = cache_blocks(logits_NV)
    most = max(some.stop - some.start for some in parts)
    # Reused buffers: fresh memory pages would cost as much as the arithmetic.
    root_NV, second_NV, power_NV = (shift_N.new_empty(most, logits_NV.shape[-1]) for _ in range(3))
    sums = []
    for some in parts:
        x_NV = logits_NV[some]
        size = len(x_NV)
        root_CV = torch.add((shift_N[some] * -scale).unsqueeze(-1), x_NV, alpha=scale, out=root_NV[:size])
        root_CV.scatter_(-1, head_ids_NK[some], -math.inf)
        if multiples:
            root_CV.exp2_()
            sums_J = _sums_of_powers(root_CV, multiples, second_NV[:size], power_NV[:size])
        else:
            sums_J = [torch.mul(root_CV, knot, out=power_NV[:size]).exp2_().sum(-1) for knot in knots]
        sums.append(torch.stack(sums_J, -1))
    return torch.cat(sums).log_()


def cache_blocks(x_NV: Tensor) -> list[slice]:
    """Slices of rows for several passes each: on a CPU a slice stays in the CPU's cache from one pass to the next, on a
    GPU what is made of it takes some hundred MiB.

    A slice of several rows has two at least: torch sums a single row in another order, on all threads together.
    """
    count = len(x_NV)
    numbers = _CACHED_NUMBERS if x_NV.device.type == "cpu" else _DEVICE_NUMBERS
    rows = max(numbers // max(x_NV.shape[-1], 1), 2)
    parts = max(count // rows, 1)
    return [slice(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


def _first_largest(x_NM: Tensor, ids_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their ids, descending; of equal ones the lowest ids."""
    if x_NM.dtype == torch.float64:
        ids_NM, order = ids_NM.sort(-1)
        x_NM, order = x_NM.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return x_NM[..., :k], ids_NM.gather(-1, order)[..., :k]
    key_NK = torch.topk(order_keys(x_NM, ids_NM), k, dim=-1).values
    bits_NK = (key_NK + 0xFFFFFFFF) >> 32
    ids_NK = (bits_NK << 32) - key_NK
    bits_NK = bits_NK.to(torch.int32)
    return (bits_NK ^ ((bits_NK >> 31) & 0x7FFFFFFF)).view(torch.float32), ids_NK


def order_keys(x_NM: Tensor, ids_NM: Tensor) -> Tensor:
    """One int64 for value and id, that descends with the value and then ascends with the id; -0 is 0.

    The bits of a float32 ascend with it, for negative ones once all bits but the sign are inverted.
    """
    bits_NM = (x_NM.float() + 0.0).view(torch.int32)
    bits_NM = (bits_NM ^ ((bits_NM >> 31) & 0x7FFFFFFF)).long()
    return (bits_NM << 32) - ids_NM


def _sums_of_powers(root_NV: Tensor, exponents: Sequence[int], second_NV: Tensor, power_NV: Tensor) -> list[Tensor]:
    """sum_v root^n [N] for ascending n, each power from the one before; the last two tensors are scratch space."""
    # Factors of further powers: the root and the first power above it.
    factors, power, reached = {1: root_NV}, root_NV, 1
    sums = []
    for exponent in exponents:
        while reached < exponent:
            step = max(step for step in factors if step <= exponent - reached)
            power = torch.mul(power, factors[step], out=second_NV if len(factors) == 1 else power_NV)
            reached += step
        if len(factors) == 1 and reached > 1:
            factors[reached] = power
        sums.append(power.sum(-1))
    return sums


def runs_compiled(x_NV: Tensor) -> bool:
    return x_NV.device.type == "cpu" and x_NV.dtype != torch.float64


def has_kernels(x_NV: Tensor) -> bool:
    """Whether the kernels of a GPU serve these logits."""
    served = x_NV.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_NV.shape[-1] <= _LARGEST_VOCABULARY
    return served and triton_runs_on(x_NV.device)
