"""Measures of a model against its teacher at every position, and how far the cache's own error may move them.

The three that compare whole distributions, teacher p and model q at T = 1, are sums over tokens of p_v phi(q_v / p_v):

    kl            KL(p || q)                    phi(r) = -log r
    reverse_kl    KL(q || p)                    phi(r) = r log r
    acceptance    sum_v min(p_v, q_v)           phi(r) = min(1, r)

A cache knows p on the head H and the mass m of the tail R. Each measure is summed over the cells: the head's tokens and
one bucket for the tail, which makes the divergences lower bounds and the acceptance an upper one, by the log-sum
inequality and the concavity of the minimum. A tail shape is not used: the tail of a quantised copy is nearer to the
teacher's than any cached shape, and where it is not, the error below says so. What the bucket leaves out can be measured
without the teacher, since the cache has its exact probability of every label, and a label l is a draw of p as far as the
text is what the teacher expects. With [R] = 1 where l is in the tail,

    D = [R] (phi(q_l / p_l) - phi(q(R) / m))

has the expected value of (measure of full logits) - (measure of the cells): the second term has that of the bucket, and
takes most of the noise away, since both are alike where the model's tail is the teacher's. The error of a mean is |mean
of D| and two standard errors of it, rows taken as the unit, since positions of one text err alike.

To this comes the rounding of the head to levels. Within a level of width s (`store.levels`) an error e of log p is taken
as uniform, with variance s^2 / 12, and the head's mass is kept:

    kl            1/2 sum_H p s^2 / 12,              and noise of variance sum_H p^2 (f - mean f)^2 s^2 / 12, f = log p/q
    reverse_kl    the same times q(H) / p(H),        and noise of variance sum_H (q - q(H) p / p(H))^2 s^2 / 12
    acceptance    sum_H p s / 4 + m (1 - m) / 256,   the total variation that rounding of head and of mass can cause

The noise averages over positions, of which the error has two standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distill.sums import fill_unused, weighted
from ..store.levels import LEVEL_GROWTH, LEVEL_STEP
from ..store.masses import HEAD_MASS_STEP
from ..targets.sparse_targets import SparseTargets

_FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""Floor of log p in the reverse divergence, where the teacher's probability underflows."""
_LARGEST_SHARE = 31 / 32
"""Of the tail's mass that a label has at most; both are stored rounded."""


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return weighted(log_p.exp(), log_p - log_q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return weighted(log_q.exp(), log_q - log_p.clamp(min=_FLOOR))


def _acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.minimum(log_p, log_q).exp()


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "acceptance": _acceptance,
}
"""Name -> p phi(q / p) of every cell, from log p and log q."""


@dataclass(frozen=True)
class Cells:
    """Teacher and model over head and tail of N positions."""

    ids_NK: Tensor
    """Token ids of the head, -1 where unused."""
    log_p_NM: Tensor
    """Of the head and, in the last column, the tail; -inf where unused. M = K + 1."""
    log_q_NM: Tensor

    @classmethod
    def of(cls, targets: SparseTargets, log_q_NV: Tensor) -> Cells:
        """From targets [N] without samples, over the vocabulary of the model or a smaller one, and the model's log q."""
        log_p_NK, log_tail_N = targets.at_temperature(1.0)
        used_NK, ids_NK = targets.token_ids >= 0, fill_unused(targets.token_ids)
        log_q_NK = torch.where(used_NK, log_q_NV.gather(-1, ids_NK), -math.inf)
        log_q_tail_N = log_q_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1)
        log_p_NM = torch.cat([log_p_NK, log_tail_N.unsqueeze(-1)], -1)
        return cls(targets.token_ids, log_p_NM, torch.cat([log_q_NK, log_q_tail_N.unsqueeze(-1)], -1))

    def measure(self, name: str) -> Tensor:
        """[N]"""
        return MEASURES[name](self.log_p_NM, self.log_q_NM).sum(-1)

    def tail_differences(self, labels_N: Tensor, label_log_p_N: Tensor, label_log_q_N: Tensor) -> dict[str, Tensor]:
        """D of each measure [N] in float64, of positions that have labels."""
        in_tail_N = (self.ids_NK != labels_N.unsqueeze(-1)).all(-1)
        log_m_N, log_q_tail_N = self.log_p_NM[:, -1].double(), self.log_q_NM[:, -1].double()
        log_p_N = torch.minimum(label_log_p_N.double(), log_m_N + math.log(_LARGEST_SHARE))
        differences = {}
        for name, terms in MEASURES.items():
            of_label_N = terms(log_p_N, label_log_q_N.double()) * (-log_p_N).exp()
            of_bucket_N = terms(log_m_N, log_q_tail_N) * (-log_m_N).exp()
            differences[name] = torch.where(in_tail_N, of_label_N - of_bucket_N, 0.0)
        return differences

    def rounding(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Bias and variance [N] of each measure from the rounding of the head, in float64."""
        used_NK = self.ids_NK >= 0
        log_p_NK, log_q_NK = self.log_p_NM[:, :-1].double(), self.log_q_NM[:, :-1].double()
        p_NK, q_NK = log_p_NK.exp(), log_q_NK.exp()
        p_N, q_N = (part.sum(-1).clamp(min=1e-12) for part in (p_NK, q_NK))
        # Levels count from the first entry, which is not rounded itself.
        below_NK = torch.where(used_NK, log_p_NK[:, :1] - log_p_NK, 0.0)
        width_NK = torch.where(used_NK, LEVEL_STEP + LEVEL_GROWTH * below_NK, 0.0)
        width_NK[:, 0] = 0.0
        variance_NK = width_NK.square() / 12
        f_NK = torch.where(used_NK, log_p_NK - log_q_NK, 0.0)
        centred_NK = f_NK - (weighted(p_NK, f_NK).sum(-1) / p_N).unsqueeze(-1)
        bias_N = 0.5 * (p_NK * variance_NK).sum(-1)
        swap_NK = q_NK - (q_N / p_N).unsqueeze(-1) * p_NK
        m_N = self.log_p_NM[:, -1].double().exp()
        variation_N = (p_NK * width_NK).sum(-1) / 4 + m_N * (1 - m_N) * HEAD_MASS_STEP / 4
        return {
            "kl": (bias_N, (p_NK.square() * centred_NK.square() * variance_NK).sum(-1)),
            "reverse_kl": (bias_N * q_N / p_N, (swap_NK.square() * variance_NK).sum(-1)),
            "acceptance": (variation_N, torch.zeros_like(variation_N)),
        }
