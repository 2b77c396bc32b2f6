"""loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..corpus.labels import IGNORE
from ..targets.knots import inverse_temperature
from ..targets.sparse_targets import SparseTargets
from . import divergences

TAILS = ("bucket", "renormalize", "drop", "uniform", "label")


@dataclass(frozen=True)
class DistillationOutput:
    """What a loss returns."""

    loss: Tensor
    """Scalar, differentiable: kd_weight * T^2 * kd + ce_weight * ce."""
    kd: Tensor
    """Detached mean KL_T per position in nats, without T^2."""
    ce: Tensor
    """Detached mean cross-entropy per position in nats."""
    positions: Tensor
    """Number of positions with a target."""
    coverage: Tensor
    """Detached mean of the teacher's mass on the kept tokens at T."""
    agreement: Tensor
    """Detached share of positions where the student's first choice is the teacher's."""


def distillation_loss(
    student_logits: Tensor,
    targets: SparseTargets,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    tail: str = "bucket",
    divergence: str = "kl",
    alpha: float | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """The loss of the module's docstring, from plain logits.

    student_logits [..., V], targets [...], labels [...] int64 with -100 where there is none. KD is averaged over
    `targets.mask`, CE over the labels; give `kd_positions` and `ce_positions` (totals over all micro-batches and ranks)
    to average over those instead. The student's vocabulary may be larger than the teacher's; for a smaller one see
    `SparseTargets.within`. `divergence` and its `alpha` are those of `divergences`.

    Raises ValueError for a tail, divergence, temperature or vocabulary that cannot be used.
    """
    alpha = check_settings(targets, student_logits.shape[-1], temperature, tail, divergence, alpha)
    vocab_size = student_logits.shape[-1]
    samples = targets.flatten().tail_samples(temperature)
    logits_NV = _promote(student_logits).reshape(-1, vocab_size)
    scale_N = _position_scale(targets, temperature, divergence, alpha)
    targets, labels_N = targets.flatten(), labels.reshape(-1)
    log_p_NK, log_tail_N = targets.at_temperature(temperature)
    log_p_NK, log_tail_N = log_p_NK.to(logits_NV.dtype), log_tail_N.to(logits_NV.dtype)
    used_NK = targets.token_ids >= 0
    ids_NK = _fill_unused(targets.token_ids)
    has_label_N = labels_N != IGNORE

    scaled_NV = logits_NV * inverse_temperature(temperature, targets.knots)
    log_q_NV = F.log_softmax(scaled_NV, -1)
    log_q_NK = log_q_NV.gather(-1, ids_NK)
    outside_NV = torch.ones_like(log_q_NV, dtype=torch.bool).scatter(-1, ids_NK, False)
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
    label_in_tail_N = has_label_N & outside_NV.gather(-1, labels_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    log_q_label_N = log_q_NV.gather(-1, labels_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    if tail == "renormalize":
        log_p_NK = log_p_NK - torch.logsumexp(log_p_NK, -1, keepdim=True)
        log_q_NK = torch.where(used_NK, log_q_NK, -math.inf)
        log_q_NK = log_q_NK - torch.logsumexp(log_q_NK, -1, keepdim=True)
        p_NK = log_p_NK.exp()
    elif tail == "label":
        # The label's own entry absorbs the tail; where it is outside the head it is one more entry.
        is_label_NK = used_NK & (ids_NK == labels_N.unsqueeze(-1))
        p_NK = p_NK + is_label_NK * p_tail_N.unsqueeze(-1)
        log_p_NK = torch.where(is_label_NK, p_NK.clamp(min=torch.finfo(p_NK.dtype).tiny).log(), log_p_NK)
    kl_N = _weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
    if samples is not None:
        w_NK, log_p_samples_NK = (part.to(logits_NV.dtype) for part in samples)
        kl_N = kl_N + _weighted(w_NK, log_p_samples_NK - log_q_NK).sum(-1)
    elif tail == "bucket":
        log_q_tail_N = torch.logsumexp(log_q_NV.masked_fill(~outside_NV, -math.inf), -1)
        kl_N = kl_N + _weighted(p_tail_N, log_tail_N - log_q_tail_N)
        if divergence != "kl":
            log_q_NC = torch.cat([log_q_NK.masked_fill(~used_NK, -math.inf), log_q_tail_N.unsqueeze(-1)], -1)
            log_p_NC = torch.cat([log_p_NK, log_tail_N.unsqueeze(-1)], -1)
            kl_N = divergences.DIVERGENCES[divergence][0](log_p_NC, log_q_NC, alpha, scale_N)[0]
    elif tail == "uniform":
        left_out_N = outside_NV.sum(-1).clamp(min=1)
        mean_log_q_N = (log_q_NV * outside_NV).sum(-1) / left_out_N
        kl_N = kl_N + _weighted(p_tail_N, log_tail_N - left_out_N.to(log_tail_N.dtype).log() - mean_log_q_N)
    elif tail == "label":
        kl_N = kl_N + torch.where(label_in_tail_N, _weighted(p_tail_N, log_tail_N - log_q_label_N), 0.0)

    kd_count = targets.mask.sum() if kd_positions is None else kd_positions
    ce_count = has_label_N.sum() if ce_positions is None else ce_positions
    kd = torch.where(targets.mask, kl_N, 0.0).sum() / _at_least_one(kd_count)
    ce = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum") / _at_least_one(ce_count)
    loss = kd_weight * temperature**2 * kd + ce_weight * ce
    agreed_N = _agreed(logits_NV.detach(), targets.token_ids[:, 0])
    agreement = (agreed_N & targets.mask).sum().to(kd.dtype) / _at_least_one(kd_count)
    coverage = _coverage(targets.mask, log_tail_N, kd_count)
    return DistillationOutput(loss, kd.detach(), ce.detach(), targets.mask.sum(), coverage, agreement)


def check_settings(
    targets: SparseTargets, vocab_size: int, temperature: float, tail: str, divergence: str, alpha: float | None
) -> float:
    """The divergence's alpha, after everything was looked at that can be wrong between targets, student and settings.

    `vocab_size` is that of the student's output layer. Raises ValueError saying what does not fit.
    """
    alpha = divergences.check(divergence, alpha)
    if tail not in TAILS:
        raise ValueError(f"unknown tail {tail!r}: one of {', '.join(TAILS)}")
    if targets.draws is not None and (tail != "bucket" or divergence != "kl"):
        raise ValueError(
            f"tail {tail!r} with divergence {divergence!r} is for targets without samples; theirs say what the tail holds: "
            "use 'bucket' with 'kl'"
        )
    if divergence != "kl" and tail != "bucket":
        raise ValueError(f"divergence {divergence!r} takes the tail as a bucket, not as {tail!r}")
    if vocab_size < targets.vocab_size:
        raise ValueError(
            f"the student has {vocab_size} logits and the teacher {targets.vocab_size}: cached token ids would point "
            "outside; use the same tokenizer and enlarge the student's output layer"
        )
    inverse_temperature(temperature, targets.knots)
    return alpha


def _position_scale(targets: SparseTargets, temperature: float, divergence: str, alpha: float) -> Tensor | None:
    """What a divergence needs to know of each position's sequence, the last axis of the targets [N]."""
    if divergence != "tail_aware_kl":
        return None
    scale = divergences.position_scale(divergence, targets.at_temperature(temperature)[0], targets.mask, alpha)
    return None if scale is None else scale.reshape(-1)


def _agreed(logits_NV: Tensor, first_N: Tensor) -> Tensor:
    """Whether the teacher's first choice [N] is the student's; a tie counts."""
    first_N1 = first_N.clamp(min=0).unsqueeze(-1)
    return (logits_NV.gather(-1, first_N1).squeeze(-1) >= logits_NV.amax(-1)) & (first_N >= 0)


def _coverage(mask_N: Tensor, log_tail_N: Tensor, count: Tensor | int) -> Tensor:
    """Mean of the teacher's mass on the kept tokens."""
    return torch.where(mask_N, 1 - log_tail_N.exp(), 0.0).sum() / _at_least_one(count)


def _promote(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already: the precision in which everything is summed."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _fill_unused(token_ids_NK: Tensor) -> Tensor:
    """Unused entries (-1) pointed at the first one, so that gathers and scatters stay inside and change nothing else."""
    return torch.where(token_ids_NK >= 0, token_ids_NK, token_ids_NK[..., :1].clamp(min=0))


def _weighted(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference with 0 * anything = 0, the limit of p log p."""
    positive = p > 0
    return torch.where(positive, p * torch.where(positive, difference, 0.0), 0.0)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    """A count to divide by: a batch without such positions has a loss of 0, not NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
