"""Draws from the tail of a distribution, by inverting its cumulative sum.

Two levels: the cumulative sums of blocks of tokens, then those inside the block of each draw. Running sums are float64:
49,152 float32 roundings would favour some tokens. On a GPU with Triton both passes over logits are kernels
(`draws_triton`), elsewhere torch operations over slices of rows and of draws, so that memory does not grow with either.
The reduction's own blocks cannot serve there: they have 8 to 64 tokens, and the float64 sums over 4 to 32 times as many
blocks would move half to four times the memory of the second pass over the logits, 2 bytes a token.

The same points give the same draws on every device, except where a point lies nearer to the boundary of two tokens than
the roundings of a block's float32 sum, which each device adds in its own order: of 100,000 draws 3 to 25 are those of a
neighbouring token where sums are float64 instead.

Shapes: N positions, V vocabulary, K kept entries, S samples (draws); G blocks of W neighbouring tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reduction import cache_blocks, has_kernels

BLOCK = 256
"""Tokens per block of the cumulative sum."""
_NUMBERS_AT_ONCE = 1 << 23
"""Of the blocks of several draws: 64 MiB of float64."""


def draw_tail(logits_NV: Tensor, head_ids_NK: Tensor, points_NS: Tensor) -> Tensor:
    """Token ids [N, S] at which the cumulative distribution of the tokens outside the head passes the points [N, S].

    head_ids_NK are the most probable tokens in order, equal ones by id, and -1 behind the head; points are in [0, 1). No
    token of probability 0 is returned. Where the logits have NaN, or nothing is outside the head, any tokens are: an
    index outside would cost a GPU its context.
    """
    if has_kernels(logits_NV):
        from .draws_triton import block_masses, places_inside

        logits_NV = logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()
        masses_NG, cut_N, shift_N = block_masses(logits_NV, head_ids_NK, BLOCK)
        blocks_NS, left_NS = _blocks_of(masses_NG, points_NS)
        inside_NS = places_inside(logits_NV, cut_N, shift_N, blocks_NS, left_NS, BLOCK)
        return (blocks_NS * BLOCK + inside_NS).clamp_(max=logits_NV.shape[-1] - 1)
    return torch.cat(
        [_inverted(logits_NV[some], head_ids_NK[some], points_NS[some]) for some in cache_blocks(logits_NV)]
    )


def _inverted(logits_NV: Tensor, head_ids_NK: Tensor, points_NS: Tensor) -> Tensor:
    count, vocab_size = logits_NV.shape
    x_NV = logits_NV.to(torch.float64 if logits_NV.dtype == torch.float64 else torch.float32, copy=True)
    # Unused entries write to token 0 what stands there: -inf where it is in the head.
    first_N1 = torch.where((head_ids_NK == 0).any(-1, keepdim=True), -math.inf, x_NV[:, :1])
    x_NV.scatter_(-1, head_ids_NK.clamp(min=0), torch.where(head_ids_NK >= 0, -math.inf, first_N1))
    max_N1 = x_NV.amax(-1, keepdim=True)
    # An empty tail has no draws, but NaN would index outside.
    e_NV = x_NV.sub_(torch.where(torch.isneginf(max_N1), 0.0, max_N1)).exp_()
    if vocab_size % BLOCK:
        e_NV = torch.nn.functional.pad(e_NV, (0, -vocab_size % BLOCK))
    e_NGW = e_NV.view(count, -1, BLOCK)
    blocks_NS, left_NS = _blocks_of(e_NGW.sum(-1), points_NS)
    rows_N1 = torch.arange(count, device=x_NV.device).unsqueeze(-1)
    at_once = max(_NUMBERS_AT_ONCE // max(count * BLOCK, 1), 1)
    found = []
    for start in range(0, points_NS.shape[1], at_once):
        blocks_NC, left_NC = blocks_NS[:, start : start + at_once], left_NS[:, start : start + at_once]
        inner_NCW = e_NGW[rows_N1, blocks_NC].double().cumsum(-1)
        inside_NC = _first_above(inner_NCW.flatten(0, 1), left_NC.reshape(-1, 1)).view_as(blocks_NC)
        found.append(blocks_NC * BLOCK + inside_NC)
    return torch.cat(found, -1).clamp_(max=vocab_size - 1)


def _blocks_of(masses_NG: Tensor, points_NS: Tensor) -> tuple[Tensor, Tensor]:
    """The block of each point, and the mass up to the point inside it; both [N, S]."""
    cdf_NG = masses_NG.double().cumsum(-1)
    targets_NS = points_NS * cdf_NG[:, -1:]
    blocks_NS = _first_above(cdf_NG, targets_NS)
    before_NS = torch.where(blocks_NS > 0, cdf_NG.gather(-1, (blocks_NS - 1).clamp(min=0)), 0.0)
    return blocks_NS, targets_NS - before_NS


def _first_above(cdf: Tensor, points: Tensor) -> Tensor:
    """[N, S] the first place of a cumulative sum [N, M] above each point, or the last rise if none is above."""
    found = torch.searchsorted(cdf, points, right=True)
    last = torch.searchsorted(cdf, cdf[..., -1:].contiguous())
    return torch.minimum(found, last).clamp_(max=cdf.shape[-1] - 1)  # NaN is above none
