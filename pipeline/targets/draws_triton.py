"""The two passes of `draws` over logits on a GPU, as Triton kernels: masses of blocks, and the places inside them.

A token is in the head where its key, value and id in one int64 as in `reduction_triton`, reaches that of the head's last
entry: the head is a prefix of that order.

Shapes: N rows, K kept entries, S draws, G blocks of W neighbouring tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduction import order_keys
from .reduction_triton import finite_or_zero, ordered

_NO_HEAD = 2**63 - 1


@triton.jit
def tail_logits(x_ptr, token, size, cut):
    """Logits of the given tokens, -inf in the head and outside the vocabulary."""
    x = tl.load(x_ptr + token, mask=token < size, other=-float("inf")).to(tl.float32)
    return tl.where((ordered(x).to(tl.int64) << 32) - token < cut, x, -float("inf"))


@triton.jit
def block_masses_kernel(
    x_ptr,  # [N, V]
    row_stride,
    size,
    cut_ptr,  # [N], key of the head's last entry
    maxima_ptr,  # [N, blocks], the largest logit of every block
    masses_ptr,  # [N, blocks], relative to it
    blocks,
    W: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cut = tl.load(cut_ptr + row)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        token = block[:, None] * W + tl.arange(0, W)[None, :]
        x = tail_logits(x_ptr + row * row_stride, token, size, cut)
        most = tl.max(x, 1)
        mass = tl.sum(tl.exp(x - finite_or_zero(most)[:, None]), 1)
        tl.store(maxima_ptr + row * blocks + block, most, mask=block < blocks)
        tl.store(masses_ptr + row * blocks + block, mass, mask=block < blocks)


@triton.jit
def places_inside_kernel(
    x_ptr,  # [N, V]
    row_stride,
    size,
    cut_ptr,  # [N]
    shift_ptr,  # [N], the largest logit outside the head
    blocks_ptr,  # [N, draws], the block of each draw
    left_ptr,  # [N, draws], its point inside the block
    places_ptr,  # [N, draws]
    draws,
    W: tl.constexpr,
    DRAWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    draw = tl.program_id(1) * DRAWS + tl.arange(0, DRAWS)
    here = draw < draws
    block = tl.load(blocks_ptr + row * draws + draw, mask=here, other=0).to(tl.int32)
    left = tl.load(left_ptr + row * draws + draw, mask=here, other=0.0)
    token = block[:, None] * W + tl.arange(0, W)[None, :]
    x = tail_logits(x_ptr + row * row_stride, token, size, tl.load(cut_ptr + row))
    cdf = tl.cumsum(tl.exp(x - tl.load(shift_ptr + row)).to(tl.float64), 1)
    # The first place above the point, or the last rise if none is above.
    above = tl.sum((cdf <= left[:, None]).to(tl.int32), 1)
    last = tl.sum((cdf < tl.max(cdf, 1)[:, None]).to(tl.int32), 1)
    tl.store(places_ptr + row * draws + draw, tl.minimum(tl.minimum(above, last), W - 1), mask=here)


def block_masses(logits_NV: Tensor, head_ids_NK: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The masses outside the head of blocks of `width` tokens [N, G] float64, relative to the largest logit outside;
    the key of the head's last entry [N]; that largest logit [N], 0 where it is -inf."""
    count, size = logits_NV.shape
    cut_N = torch.full((count,), _NO_HEAD, dtype=torch.int64, device=logits_NV.device)
    if head_ids_NK.shape[-1]:
        used_NK = head_ids_NK >= 0
        some_NK = head_ids_NK.clamp(min=0)
        keys_NK = order_keys(logits_NV.gather(-1, some_NK), some_NK)
        cut_N = torch.where(used_NK, keys_NK, _NO_HEAD).amin(-1)
    blocks = triton.cdiv(size, width)
    maxima_NG = torch.empty(count, blocks, device=logits_NV.device)
    masses_NG = torch.empty_like(maxima_NG)
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        block_masses_kernel[(count,)](
            logits_NV, logits_NV.stride(0), size, cut_N, maxima_NG, masses_NG, blocks, W=width, ROWS=16, num_warps=8
        )
    largest_N = maxima_NG.amax(-1)
    shift_N = torch.where(torch.isneginf(largest_N), 0.0, largest_N)
    factors_NG = (maxima_NG.double() - shift_N.double().unsqueeze(-1)).exp_()
    return factors_NG.mul_(masses_NG), cut_N, shift_N


def places_inside(
    logits_NV: Tensor, cut_N: Tensor, shift_N: Tensor, blocks_NS: Tensor, left_NS: Tensor, width: int
) -> Tensor:
    """The place of each draw inside its block [N, S] int64: where the cumulative mass passes `left_NS`."""
    count, draws = blocks_NS.shape
    places_NS = torch.empty_like(blocks_NS)
    grid = (count, triton.cdiv(draws, 16))
    with torch.cuda.device_of(logits_NV):
        places_inside_kernel[grid](
            logits_NV,
            logits_NV.stride(0),
            logits_NV.shape[-1],
            cut_N,
            shift_N,
            blocks_NS.contiguous(),
            left_NS.contiguous(),
            places_NS,
            draws,
            W=width,
            DRAWS=16,
            num_warps=8,
        )
    return places_NS
