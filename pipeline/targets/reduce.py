"""Full logits to sparse targets: the arithmetic of `SparseTargets.from_logits`.

Shapes: N positions, V vocabulary, K kept entries, S samples, J knots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .draws import draw_tail
from .reduction import head_and_rest
from .supports import Support, position_seeds

Fields = tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, ...], int, Tensor | None]
"""The fields of `SparseTargets`, in its order."""


def reduce_logits(
    logits: Tensor, support: Support, *, knots: Sequence[float], seed: int | Tensor, mask: Tensor | None
) -> Fields:
    """Reduce full logits [..., V] to the fields of `SparseTargets` [N], N = all leading axes.

    Computes in float32 for every dtype of `logits` except float64. The tail is summed directly: one minus the head
    loses it to rounding where the head has nearly all mass. `knots` are inverse temperatures of the tail curve; 1.0 is
    always added. `mask` [...] is True at positions with a target. `seed` determines the draws: one int64 per position
    [...] (`supports.position_seeds`), or a number from which the positions, in order, get theirs.

    No gradient flows back into `logits`. A position whose logits are no distribution (NaN, +inf, no finite one) has NaN in
    its log-probabilities or its tail curve; whoever keeps targets looks for it, so that nobody waits for a GPU here.
    -inf is a probability of 0. Raises ValueError for k > V.
    """
    vocab_size = logits.shape[-1]
    support.check(vocab_size)
    logits_NV = logits.detach().reshape(-1, vocab_size)
    knots = tuple(sorted({*(float(knot) for knot in knots), 1.0}))
    limit = min(support.head_limit, vocab_size)
    top_NK, ids_NK, tail_max_N, sums_NJ = head_and_rest(logits_NV, limit, knots)
    shift_N = torch.where(torch.isneginf(tail_max_N), 0.0, tail_max_N)
    # Relative to the largest logit: an offset common to all logits then costs no precision.
    peak_N = top_NK[:, 0] if support.has_head else tail_max_N
    top_NK = top_NK - peak_N.unsqueeze(-1)
    shift_N = shift_N - peak_N
    # Logarithms in float64: in float32 the last bit depends on a number's place in its tensor, and a cache would depend
    # on the batch size.
    tail_N = (sums_NJ[:, knots.index(1.0)] + shift_N).double()
    total_N = torch.logaddexp(torch.logsumexp(top_NK.double(), -1), tail_N).to(top_NK.dtype)
    log_p_NK = top_NK - total_N.unsqueeze(-1)
    shift_N = shift_N - total_N
    # A tensor of the knots would be a blocking copy to the GPU.
    curve_NJ = sums_NJ + torch.stack([knot * shift_N for knot in knots], -1)

    token_ids, log_probs, drawn = ids_NK, log_p_NK, None
    if support.varies:
        in_head_NK = support.head_mask(log_p_NK)
        left_NK = torch.where(in_head_NK, -math.inf, log_p_NK)
        back_NJ = torch.stack([torch.logsumexp(knot * left_NK.double(), -1) for knot in knots], -1)
        curve_NJ = torch.logaddexp(curve_NJ.double(), back_NJ).to(curve_NJ.dtype)
        token_ids = torch.where(in_head_NK, ids_NK, -1)
        log_probs = torch.where(in_head_NK, log_p_NK, -math.inf)
        if support.has_samples:
            if isinstance(seed, Tensor):
                seeds_N = seed.reshape(-1).to(logits.device)
            else:
                numbers = torch.arange(len(logits_NV), device=logits.device)
                seeds_N = position_seeds(seed, torch.zeros_like(numbers), numbers)
            mass_N = curve_NJ[:, knots.index(1.0)].exp()
            points_NS, wanted_NS = support.points(mass_N, seeds_N)
            samples_NS = torch.where(wanted_NS, draw_tail(logits_NV, token_ids, points_NS), -1)
            x_NS = logits_NV.gather(-1, samples_NS.clamp(min=0)).to(log_probs.dtype)
            log_samples_NS = x_NS - (peak_N + total_N).unsqueeze(-1)
            token_ids, log_probs, drawn = _with_samples(
                token_ids, log_probs, samples_NS, log_samples_NS, support.entry_limit
            )
    if mask is None:
        mask_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits.device)
    else:
        mask_N = mask.reshape(-1)
        token_ids = torch.where(mask_N.unsqueeze(-1), token_ids, -1)
        log_probs = torch.where(mask_N.unsqueeze(-1), log_probs, -math.inf)
        curve_NJ = torch.where(mask_N.unsqueeze(-1), curve_NJ, -math.inf)
        drawn = None if drawn is None else torch.where(mask_N.unsqueeze(-1), drawn, 0)
    return token_ids, log_probs, curve_NJ, mask_N, knots, vocab_size, drawn


def _with_samples(
    head_ids_NK: Tensor, head_log_p_NK: Tensor, samples_NS: Tensor, log_p_NS: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Head entries, a prefix of each row, followed by the distinct samples with their counts.

    Returns token_ids, log_probs and draws, all [N, width]; samples in descending probability, equal ones by id.
    """
    count, num_samples = samples_NS.shape
    # Equal ids become neighbours; unused draws go last.
    ids_NS, order = torch.where(samples_NS >= 0, samples_NS, torch.iinfo(torch.int64).max).sort(-1)
    log_p_NS = log_p_NS.gather(-1, order)
    used_NS = ids_NS != torch.iinfo(torch.int64).max
    first_NS = used_NS.clone()
    first_NS[:, 1:] &= ids_NS[:, 1:] != ids_NS[:, :-1]
    group_NS = (first_NS.cumsum(-1) - 1).clamp(min=0)
    drawn_NS = torch.zeros_like(ids_NS).scatter_add_(-1, group_NS, used_NS.long())
    drawn_NS = torch.where(first_NS, drawn_NS.gather(-1, group_NS), 0)
    # By descending probability, duplicates last; the stable sort orders equal ones by id.
    _, order = torch.where(first_NS, log_p_NS, -math.inf).sort(dim=-1, descending=True, stable=True)
    ids_NS, log_p_NS, drawn_NS = (t.gather(-1, order) for t in (ids_NS, log_p_NS, drawn_NS))

    head_N1 = (head_ids_NK >= 0).sum(-1, keepdim=True)
    # One extra column takes the unused entries of head and samples.
    places_NS = torch.where(drawn_NS > 0, head_N1 + torch.arange(num_samples, device=ids_NS.device), width)
    columns_K = torch.arange(head_ids_NK.shape[1], device=ids_NS.device)
    places_NK = torch.where(head_ids_NK >= 0, columns_K, width)

    def placed(head: Tensor, samples: Tensor, fill: float) -> Tensor:
        out = torch.full((count, width + 1), fill, dtype=samples.dtype, device=samples.device)
        return out.scatter_(-1, places_NK, head).scatter_(-1, places_NS, samples)[:, :width]

    token_ids = placed(head_ids_NK, ids_NS, -1)
    log_probs = placed(head_log_p_NK, log_p_NS, -math.inf)
    return token_ids, log_probs, placed(torch.zeros_like(head_ids_NK), drawn_NS, 0)
