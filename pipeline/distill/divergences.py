"""Divergences between a target and a student other than the KL of `loss`.

The cells of a position are all M = V tokens where the target has a tail shape, else its K kept tokens and one bucket
for all others, M = K + 1. With p the teacher's and q the student's probabilities of the cells at temperature T (log p
from `SparseTargets.dense` or `at_temperature`, of the bucket log q(R) = logsumexp of log q over the tail R):

    kl                KL(p || q), which `loss` computes itself
    reverse_kl        KL(q || p)
    jensen_shannon    a KL(p || m) + (1 - a) KL(q || m),    m = a p + (1 - a) q          a = 1/2
    skew_kl           KL(p || a p + (1 - a) q)                                           a = 0.1
    skew_reverse_kl   KL(q || (1 - a) p + a q)                                           a = 0.1
    total_variation   1/2 sum |p - q|
    soft_cross_entropy    - sum p log q, the KL plus the teacher's entropy: its gradient is KL's
    tail_aware_kl     KL over the ten best and the rest, + a / mean(rest) times the KL within the rest   a = 2

A merged bucket can only lower these (the data processing inequality holds for every f-divergence, of which all but the
last two are), so each is a lower bound of the same divergence over the whole vocabulary, and 0 where student equals
teacher (the cross-entropy is the teacher's entropy there).

Each function takes log p and log q [N, M], -inf where unused, and returns the divergence [N] in nats and its derivative
with respect to log q [N, M]. The chain rule from log q to the logits is the same for all (`gradients.cell_divergence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recipe.choices import Divergence
from .sums import weighted

MODES = 10
"""The top tokens of `tail_aware_kl` (the paper's K; its results peak at 5 to 10)."""
# Floor of log p in reverse divergences, where the teacher's probability underflows: the log of the smallest normal
# float32.
_FLOOR = math.log(torch.finfo(torch.float32).tiny)


def reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum q (log q - log p): mode seeking (MiniLLM, Gu et al. 2023, arXiv 2306.08543, eq. 1)."""
    q, difference = log_q.exp(), _difference(log_q, log_p.clamp(min=_FLOOR))
    return (q * difference).sum(-1), q * (difference + 1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q (GKD, Agarwal et al. 2023, arXiv 2306.13649, eq. 1)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _mixed(log_p, log_q, alpha)
    to_p, to_q = p * _difference(log_p, log_m), q * _difference(log_q, log_m)
    return (alpha * to_p + (1 - alpha) * to_q).sum(-1), (1 - alpha) * to_q


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(p || a p + (1 - a) q) (DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1)."""
    p, log_m = log_p.exp(), _mixed(log_p, log_q, alpha)
    share = (1 - alpha) * _difference(log_q, log_m, empty=-math.inf).exp()
    return (p * _difference(log_p, log_m)).sum(-1), -p * share


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(q || (1 - a) p + a q) (DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1)."""
    q, log_m = log_q.exp(), _mixed(log_p, log_q, 1 - alpha)
    difference = _difference(log_q, log_m)
    share = alpha * _difference(log_q, log_m, empty=-math.inf).exp()
    return (q * difference).sum(-1), q * (difference + 1 - share)


def total_variation(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|, at most 1 (Wen et al. 2023, arXiv 2307.15190, section 3)."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()


def soft_cross_entropy(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """- sum p log q (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, eq. 10; its code also divides by the number of classes).

    Over the cells it is at most the cross-entropy over the whole vocabulary.
    """
    p = log_p.exp()
    return -weighted(p, log_q).sum(-1), -p


def tail_aware_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL_1 + scale * P * KL_2 (Dasgupta et al. 2026, arXiv 2602.20816, eq. 3).

    KL_1 is over the `MODES` best tokens and the rest as one cell, P the teacher's mass of the rest, KL_2 the KL between
    both distributions within the rest. KL itself is KL_1 + P KL_2; `scale` [N] is a over the mean of P in the sequence
    (`position_scale`), which raises the weight of the rest and bounds it. Cells must be in the order of the teacher's
    probability. A bucket comes last and is one cell of the rest, so that with at most `MODES` kept tokens this is KL;
    of a whole vocabulary the best are those of the head (`modes_first`).
    """
    assert scale is not None
    scale = scale.unsqueeze(-1)
    p = log_p.exp()
    terms = p * _difference(log_p, log_q)
    rest = torch.arange(log_p.shape[-1], device=log_p.device) >= min(MODES, log_p.shape[-1] - 1)
    log_p_rest = torch.logsumexp(log_p.masked_fill(~rest, -math.inf), -1, keepdim=True)
    log_q_rest = torch.logsumexp(log_q.masked_fill(~rest, -math.inf), -1, keepdim=True)
    p_rest = log_p_rest.exp()
    together = p_rest * _difference(log_p_rest, log_q_rest)
    value = torch.where(rest, scale * terms, terms).sum(-1) + ((1 - scale) * together).squeeze(-1)
    within = _difference(log_q, log_q_rest, empty=-math.inf).exp()
    return value, torch.where(rest, -scale * p - (1 - scale) * p_rest * within, -p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]] = {
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "soft_cross_entropy": soft_cross_entropy,
    "tail_aware_kl": tail_aware_kl,
}
_DEFAULT_ALPHA = {"jensen_shannon": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "tail_aware_kl": 2.0}


def resolve_alpha(divergence: str, alpha: float | None) -> float:
    """The parameter of a divergence, by default the value of its paper, 0 where it has none.

    Raises ValueError for an unknown name, and for an alpha that is out of range or that the divergence does not have.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"unknown divergence {divergence!r}: one of {', '.join(get_args(Divergence))}")
    if alpha is None:
        return _DEFAULT_ALPHA.get(divergence, 0.0)
    if divergence not in _DEFAULT_ALPHA:
        raise ValueError(f"divergence {divergence!r} has no alpha")
    if divergence == "tail_aware_kl":
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha = {alpha} of tail_aware_kl must not be negative")
    elif not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} of {divergence} must lie between 0 and 1")
    return alpha


def position_scale(divergence: str, log_p: Tensor, mask: Tensor, alpha: float) -> Tensor | None:
    """The factor [..., L] that a divergence takes from the whole sequence of a position.

    From log_p [..., L, K] and mask [..., L]: for `tail_aware_kl` alpha over the mean mass outside the `MODES` best
    tokens in the sequence; None for all others.
    """
    if divergence != "tail_aware_kl":
        return None
    rest = torch.where(mask, 1 - log_p[..., :MODES].exp().sum(-1), 0.0)
    mean = rest.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (alpha / mean.clamp(min=1e-6)).expand_as(rest)


def modes_first(log_NV: Tensor, token_ids_NK: Tensor) -> Tensor:
    """Log-probabilities over the vocabulary [N, V] -> [N, MODES + V], the first `MODES` tokens of the head in front.

    They leave their own places, and heads with fewer tokens the first columns, as unused cells.
    """
    ids_NM = F.pad(token_ids_NK, (0, max(MODES - token_ids_NK.shape[-1], 0)), value=-1)[:, :MODES]
    used_NM = ids_NM >= 0
    places_NM = torch.where(used_NM, ids_NM, log_NV.shape[-1])  # one more column takes the unused ones
    padded_NV = F.pad(log_NV, (0, 1), value=-math.inf)
    return torch.cat([padded_NV.gather(-1, places_NM), padded_NV.scatter(-1, places_NM, -math.inf)[:, :-1]], -1)


def _mixed(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    """log(a p + (1 - a) q); -inf where both are -inf, without NaN in the gradient."""
    some = ~(torch.isneginf(log_p) & torch.isneginf(log_q))
    log_p, log_q = torch.where(some, log_p, 0.0), torch.where(some, log_q, 0.0)
    mixed = torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))
    return torch.where(some, mixed, -math.inf)


def _difference(log_a: Tensor, log_b: Tensor, empty: float = 0.0) -> Tensor:
    """log a - log b where a > 0, else `empty`: 0 log 0 = 0, and -inf - -inf gives no NaN in value or gradient."""
    some = ~torch.isneginf(log_a)
    return torch.where(some, torch.where(some, log_a, 0.0) - torch.where(some, log_b, 0.0), empty)
