"""Full logits to sparse targets: the one place where a distribution becomes a target.

Shape suffixes: N positions, V vocabulary, K entries of the support, C points of the tail curve, n draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .knots import DEFAULT_KNOTS
from .reduction import head_and_rest, in_cache
from .sparse_targets import SparseTargets
from .supports import Support, position_seeds


def reduce_logits(
    logits: Tensor,
    support: Support,
    *,
    knots: Sequence[float] = DEFAULT_KNOTS,
    seed: int | Tensor = 0,
    mask: Tensor | None = None,
) -> SparseTargets:
    """Reduce full logits [..., V] to targets [...].

    Works in float32 whatever the dtype of `logits` (float64 stays float64), and sums the tail by itself: one minus the head would
    lose it to rounding where the head holds nearly everything. `knots` are inverse temperatures of the tail curve; 1.0 is always
    added. `mask` [...] marks positions that have a target. Draws depend on `seed` alone: a number, with which positions are
    numbered in order, or one int64 per position [...] (`supports.position_seeds`).

    No gradient flows back into `logits`. Raises ValueError for a k beyond V.
    """
    vocab_size = logits.shape[-1]
    support.check(vocab_size)
    shape, logits_NV = logits.shape[:-1], logits.detach().reshape(-1, vocab_size)
    knots = tuple(sorted({*(float(knot) for knot in knots), 1.0}))
    limit = min(support.head_limit, vocab_size)
    top_NK, ids_NK, tail_max_N, sums_NC = head_and_rest(logits_NV, limit, knots)
    shift_N = torch.where(torch.isneginf(tail_max_N), 0.0, tail_max_N)
    # Relative to the largest logit, so that an offset common to all costs no precision.
    peak_N = top_NK[:, 0] if support.has_head else tail_max_N
    top_NK = top_NK - peak_N.unsqueeze(-1)
    shift_N = shift_N - peak_N
    # Logarithms in float64: in float32 the last bit depends on where in a tensor a number stands, and so would a cache on
    # the rows of a batch.
    tail_N = (sums_NC[:, knots.index(1.0)] + shift_N).double()
    total_N = torch.logaddexp(torch.logsumexp(top_NK.double(), -1), tail_N).to(top_NK.dtype)
    log_p_NK = top_NK - total_N.unsqueeze(-1)
    shift_N = shift_N - total_N
    # A tensor of the knots would be a copy that a GPU waits for.
    curve_NC = sums_NC + torch.stack([knot * shift_N for knot in knots], -1)

    token_ids, log_probs, drawn = ids_NK, log_p_NK, None
    if support.varies:
        in_head_NK = support.head_mask(log_p_NK)
        left_NK = torch.where(in_head_NK, -math.inf, log_p_NK)
        back_NC = torch.stack([torch.logsumexp(knot * left_NK.double(), -1) for knot in knots], -1)
        curve_NC = torch.logaddexp(curve_NC.double(), back_NC).to(curve_NC.dtype)
        token_ids = torch.where(in_head_NK, ids_NK, -1)
        log_probs = torch.where(in_head_NK, log_p_NK, -math.inf)
        if support.has_samples:
            if isinstance(seed, Tensor):
                seeds_N = seed.reshape(-1).to(logits.device)
            else:
                numbers = torch.arange(len(logits_NV), device=logits.device)
                seeds_N = position_seeds(seed, torch.zeros_like(numbers), numbers)
            mass_N = curve_NC[:, knots.index(1.0)].exp()
            samples = []
            for some in in_cache(logits_NV):
                tail_NV = logits_NV[some].to(mass_N.dtype, copy=True)
                kept_NK = torch.where(in_head_NK[some], -math.inf, tail_NV.gather(-1, ids_NK[some]))
                tail_NV.scatter_(-1, ids_NK[some], kept_NK)
                samples.append(support.draw(tail_NV, mass_N[some], seeds_N[some]))
            samples_Nn = torch.cat(samples)
            x_Nn = logits_NV.gather(-1, samples_Nn.clamp(min=0)).to(log_probs.dtype)
            log_samples_Nn = x_Nn - (peak_N + total_N).unsqueeze(-1)
            token_ids, log_probs, drawn = _with_samples(
                token_ids, log_probs, samples_Nn, log_samples_Nn, support.entry_limit
            )
    if mask is None:
        mask_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits.device)
    else:
        mask_N = mask.reshape(-1)
        token_ids = torch.where(mask_N.unsqueeze(-1), token_ids, -1)
        log_probs = torch.where(mask_N.unsqueeze(-1), log_probs, -math.inf)
        curve_NC = torch.where(mask_N.unsqueeze(-1), curve_NC, -math.inf)
        drawn = None if drawn is None else torch.where(mask_N.unsqueeze(-1), drawn, 0)
    flat = SparseTargets(token_ids, log_probs, curve_NC, mask_N, knots, vocab_size, drawn)
    return flat.map(lambda tensor: tensor.reshape(shape + tensor.shape[1:]))


def _with_samples(
    head_ids_NK: Tensor, head_log_p_NK: Tensor, samples_Nn: Tensor, log_p_Nn: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Head entries, a prefix of each row, followed by the samples: each token once, with how often it was drawn.

    Returns token_ids, log_probs and draws, all [N, width]; samples with the most probable first, equal ones by id.
    """
    count, n = samples_Nn.shape
    # Equal ids side by side, draws that were not made at the end.
    ids_Nn, order = torch.where(samples_Nn >= 0, samples_Nn, torch.iinfo(torch.int64).max).sort(-1)
    log_p_Nn = log_p_Nn.gather(-1, order)
    used_Nn = ids_Nn != torch.iinfo(torch.int64).max
    first_Nn = used_Nn.clone()
    first_Nn[:, 1:] &= ids_Nn[:, 1:] != ids_Nn[:, :-1]
    group_Nn = (first_Nn.cumsum(-1) - 1).clamp(min=0)
    drawn_Nn = torch.zeros_like(ids_Nn).scatter_add_(-1, group_Nn, used_Nn.long())
    drawn_Nn = torch.where(first_Nn, drawn_Nn.gather(-1, group_Nn), 0)
    # By probability, those that are no first of their kind last; stable, so that ids order the equal ones.
    _, order = torch.where(first_Nn, log_p_Nn, -math.inf).sort(dim=-1, descending=True, stable=True)
    ids_Nn, log_p_Nn, drawn_Nn = (t.gather(-1, order) for t in (ids_Nn, log_p_Nn, drawn_Nn))

    head_N1 = (head_ids_NK >= 0).sum(-1, keepdim=True)
    # One column more takes what has no place: unused entries of head and samples.
    places_Nn = torch.where(drawn_Nn > 0, head_N1 + torch.arange(n, device=ids_Nn.device), width)
    columns_K = torch.arange(head_ids_NK.shape[1], device=ids_Nn.device)
    places_NK = torch.where(head_ids_NK >= 0, columns_K, width)

    def placed(head: Tensor, samples: Tensor, fill: float) -> Tensor:
        out = torch.full((count, width + 1), fill, dtype=samples.dtype, device=samples.device)
        return out.scatter_(-1, places_NK, head).scatter_(-1, places_Nn, samples)[:, :width]

    token_ids = placed(head_ids_NK, ids_Nn, -1)
    log_probs = placed(head_log_p_NK, log_p_Nn, -math.inf)
    return token_ids, log_probs, placed(torch.zeros_like(head_ids_NK), drawn_Nn, 0)
