"""Divergences between a sparse target and a student, beside the truncated KL of `losses`.

All are taken over the kept tokens and one bucket for all others. With C = K + 1 cells, p the teacher's and q the student's
probabilities of them at temperature T (log p from `SparseTargets.at_temperature`, log q(R) = logsumexp of log q outside):

    kl                KL(p || q), which `losses` computes itself
    reverse_kl        KL(q || p)
    jensen_shannon    a KL(p || m) + (1 - a) KL(q || m),    m = a p + (1 - a) q          a = 1/2
    skew_kl           KL(p || a p + (1 - a) q)                                           a = 0.1
    skew_reverse_kl   KL(q || (1 - a) p + a q)                                           a = 0.1
    total_variation   1/2 sum |p - q|
    soft_cross_entropy    - sum p log q, which is KL and the teacher's entropy: its gradient is KL's
    tail_aware_kl     KL over the ten best and the rest, + a / mean(rest) times the KL within the rest   a = 2

A merged bucket can only lower these (the data processing inequality holds for every f-divergence, of which all but the last
two are), so each is a lower bound of the same divergence over the whole vocabulary, and 0 where student equals teacher (the
cross-entropy is the teacher's entropy there).

Each function takes log p and log q [N, C], -inf where unused, and gives the divergence [N] in nats and its derivative with
respect to log q [N, C]. The chain from there to the logits is the same for all (`over_cells`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MODES = 10
"""The top tokens of `tail_aware_kl` (the paper's K; its results peak at 5 to 10)."""
# Where the teacher's probability underflows, log p enters reverse divergences as that of the smallest float32.
_FLOOR = math.log(torch.finfo(torch.float32).tiny)


def reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum q (log q - log p): mode seeking (MiniLLM, Gu et al. 2023, arXiv 2306.08543, eq. 1)."""
    q, difference = log_q.exp(), _difference(log_q, log_p.clamp(min=_FLOOR))
    return (q * difference).sum(-1), q * (difference + 1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q (GKD, Agarwal et al. 2023, arXiv 2306.13649, eq. 1)."""
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

    Of the kept tokens and the bucket: not more than that of the whole vocabulary.
    """
    p = log_p.exp()
    some = p > 0
    return -torch.where(some, p * torch.where(some, log_q, 0.0), 0.0).sum(-1), -p


def tail_aware_kl(log_p: Tensor, log_q: Tensor, alpha: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL_1 + scale * P * KL_2 (Dasgupta et al. 2026, arXiv 2602.20816, eq. 3).

    KL_1 is over the `MODES` best tokens and the rest as one, P the teacher's mass of the rest, KL_2 the KL between both
    distributions within the rest. KL itself is KL_1 + P KL_2; `scale` [N] is a over the mean of P in the sequence
    (`position_scale`), which raises the weight of the rest without letting it run away. The rest's own tail is one cell
    here, so that with no more than `MODES` kept tokens it is KL. Cells must stand in the order of the teacher's
    probability, the bucket last.
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


Cells = Callable[[Tensor, Tensor, float, "Tensor | None"], tuple[Tensor, Tensor]]
DIVERGENCES: dict[str, tuple[Cells, float]] = {
    "reverse_kl": (reverse_kl, 0.0),
    "jensen_shannon": (jensen_shannon, 0.5),
    "skew_kl": (skew_kl, 0.1),
    "skew_reverse_kl": (skew_reverse_kl, 0.1),
    "total_variation": (total_variation, 0.0),
    "soft_cross_entropy": (soft_cross_entropy, 0.0),
    "tail_aware_kl": (tail_aware_kl, 2.0),
}
"""Name -> function and default `alpha`; 0 for those that have none."""


def check(name: str, alpha: float | None) -> float:
    """The `alpha` of a divergence, its default where None. Raises ValueError for an unknown name or an unusable alpha."""
    if name == "kl" and alpha is None:
        return 0.0
    if name not in DIVERGENCES and name != "kl":
        raise ValueError(f"unknown divergence {name!r}: one of kl, {', '.join(DIVERGENCES)}")
    default = DIVERGENCES[name][1] if name != "kl" else 0.0
    if alpha is None:
        return default
    if default == 0.0:
        raise ValueError(f"divergence {name!r} has no alpha")
    if name == "tail_aware_kl":
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha = {alpha} of tail_aware_kl must not be negative")
    elif not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} of {name} must lie between 0 and 1")
    return alpha


def position_scale(name: str, log_p: Tensor, mask: Tensor, alpha: float) -> Tensor | None:
    """What a divergence needs to know of a position's whole sequence [...]: log_p [..., L, K], mask [..., L].

    For `tail_aware_kl`, alpha over the mean mass that the sequence's positions have outside their `MODES` best tokens.
    """
    if name != "tail_aware_kl":
        return None
    rest = torch.where(mask, 1 - log_p[..., :MODES].exp().sum(-1), 0.0)
    mean = rest.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (alpha / mean.clamp(min=1e-6)).expand_as(rest)


def over_cells(
    z_NV: Tensor,
    token_ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    name: str,
    alpha: float,
    scale_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A divergence [N] against a sparse target, and its gradient [N, V] with respect to z = beta * x, written over z.

    With g the derivative by log q of the cells and G its sum: g(v) - G q(v) in the head; for v in R the bucket's
    g(R) - G q(R), shared out by the softmax over R, which is computed with R's own maximum.
    """
    function, _ = DIVERGENCES[name]
    dtype = z_NV.dtype
    used_NK = token_ids_NK >= 0
    ids_NK = torch.where(used_NK, token_ids_NK, token_ids_NK[:, :1].clamp(min=0))
    z_NK = z_NV.gather(-1, ids_NK).masked_fill(~used_NK, -math.inf)
    outside_NV = z_NV.scatter_(-1, ids_NK, -math.inf)
    max_N = outside_NV.amax(-1)
    max_N = torch.where(torch.isneginf(max_N), 0.0, max_N)
    exps_NV = outside_NV.sub_(max_N.unsqueeze(-1)).exp_()
    sum_N = exps_NV.sum(-1)
    z_NC = torch.cat([z_NK, (sum_N.log() + max_N).unsqueeze(-1)], -1)
    log_q_NC = z_NC - torch.logsumexp(z_NC, -1, keepdim=True)
    log_p_NC = torch.cat([log_p_NK, log_tail_N.unsqueeze(-1)], -1).to(dtype)
    value_N, slope_NC = function(log_p_NC, log_q_NC, alpha, scale_N)
    grad_NC = slope_NC - slope_NC.sum(-1, keepdim=True) * log_q_NC.exp()
    grad_NV = exps_NV.mul_((grad_NC[:, -1] / torch.where(sum_N > 0, sum_N, 1.0)).unsqueeze(-1))
    grad_NK = grad_NC[:, :-1]
    # Unused entries point at the first one, so they must carry its value.
    grad_NV.scatter_(-1, ids_NK, torch.where(used_NK, grad_NK, grad_NK[:, :1]))
    return value_N, grad_NV


def _mixed(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    """log(a p + (1 - a) q); -inf where both are, and no NaN in the gradient there."""
    some = ~(torch.isneginf(log_p) & torch.isneginf(log_q))
    log_p, log_q = torch.where(some, log_p, 0.0), torch.where(some, log_q, 0.0)
    mixed = torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))
    return torch.where(some, mixed, -math.inf)


def _difference(log_a: Tensor, log_b: Tensor, empty: float = 0.0) -> Tensor:
    """log a - log b where a > 0, else `empty`: 0 log 0 = 0, and no NaN of -inf - -inf, also not in the gradient."""
    some = ~torch.isneginf(log_a)
    return torch.where(some, torch.where(some, log_a, 0.0) - torch.where(some, log_b, 0.0), empty)
