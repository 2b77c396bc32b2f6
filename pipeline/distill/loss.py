"""The distillation loss against sparse targets: the definition, from plain logits.

With beta = 1/T, x the student's logits, q_T = softmax(beta x) over its whole vocabulary, H the kept tokens (the head),
R all others (the tail), p_T the teacher (`SparseTargets.at_temperature`) and p^_T its distribution over the whole
vocabulary where the targets have a tail shape (`SparseTargets.dense`):

    KL_T = sum_v p^_T (log p^_T - log q_T)                                           tail = "shape"
    KL_T = sum_H p_T (log p_T - log q_T) + p_T(R) (log p_T(R) - log q_T(R))          tail = "bucket"
    L    = kd_weight * T^2 * mean(KL_T) + ce_weight * mean(CE(x, label))

The T^2 keeps the gradient's size at every temperature (Hinton et al. 2015, arXiv 1503.02531, section 2.1). The default
is the shape where there is one, and the bucket elsewhere. Other treatments of the tail, which ignore a shape:

    renormalize           KL between both softmaxes taken over H only
    renormalize_teacher   sum_H p~ (log p~ - log q_T), p~ the teacher's softmax over H only: KL(p~ || q_T), whose
                          minimum is a student without a tail (the top-k baseline of Anshumann et al. 2025,
                          arXiv 2503.16870)
    drop                  sum_H p_T (log p_T - log q_T), without the tail; not a divergence, it can be negative
    uniform               the tail's mass spread evenly over R
    label                 the tail's mass given to the label; at a position without a label it is dropped

Where targets carry the label's own log-probability l_y (`SparseTargets.label_log_probs`), a label in the tail is one
more token of the head for `shape` and `label`, with log p_T(y) = beta l_y - A(beta), and R has the rest of the mass: in
its shape, or for `label` as a bucket. KL(p_T || p^_T) can only fall by that, since p^ is then exact at the label too.

Where a target has samples of the tail and no shape, their estimate replaces the bucket's term, with weights w_T that
sum to p_T(R):

    KL_T = sum_H p_T (log p_T - log q_T) + sum_samples w_T (log p_T - log q_T)

It is unbiased at T = 1 in value and gradient, and not itself a divergence: student = teacher has the gradient of the
draw.

`divergences` holds the alternatives to KL, over the whole vocabulary with a shape, else over head and bucket. `fused`
computes the same loss and its gradient for training, without all logits in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..corpus.labels import IGNORE
from ..targets.sparse_targets import SparseTargets
from ..targets.whole import WholeTargets
from .divergences import DIVERGENCES, modes_first, resolve_alpha
from .flat_targets import DenseTargets, FlatTargets, flat
from .loss_settings import LossSettings
from .sums import at_least_one, fill_unused, mean_over, promote, weighted


@dataclass(frozen=True)
class DistillationOutput:
    """A loss and its parts, each a scalar tensor."""

    loss: Tensor
    """Differentiable: kd_weight * T^2 * kd + ce_weight * ce."""
    kd: Tensor
    """Detached mean KL_T per position in nats, without T^2."""
    ce: Tensor
    """Detached mean cross-entropy per position in nats."""
    positions: Tensor
    """Number of positions with a target."""
    coverage: Tensor
    """Detached mean of the teacher's mass on the kept tokens at T; 1 for the mean of several teachers."""
    agreement: Tensor
    """Detached share of positions where the student's first choice is the teacher's."""


def distillation_loss(
    student_logits: Tensor,
    targets: SparseTargets | WholeTargets,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    tail: str | None = None,
    divergence: str = "kl",
    alpha: float | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """The loss of the module's docstring, from plain logits.

    student_logits [..., V], targets [...], labels [...] int64 with -100 where there is none. KD is averaged over
    `targets.mask`, CE over the labels; give `kd_positions` and `ce_positions` (totals over all micro-batches and ranks)
    to average over those instead. The student's vocabulary may be larger than the teacher's; for a smaller one see
    `SparseTargets.restrict_vocabulary`. `tail` None is `shape` where the targets have one, else `bucket`; `divergence`
    and its `alpha` are those of `divergences`.

    Raises ValueError for a tail, divergence, temperature or vocabulary that cannot be used.
    """
    vocab_size = student_logits.shape[-1]
    settings = LossSettings(temperature, kd_weight, ce_weight, tail, divergence, alpha).fit(targets, vocab_size)
    logits_NV, labels_N, mask_N = (
        promote(student_logits).reshape(-1, vocab_size),
        labels.reshape(-1),
        targets.mask.flatten(),
    )
    has_label_N = labels_N != IGNORE
    target = flat(targets, labels, settings)
    kd_count = mask_N.sum() if kd_positions is None else kd_positions
    ce_count = has_label_N.sum() if ce_positions is None else ce_positions
    z_NV = logits_NV / temperature
    if settings.tail_mode == "shape":
        log_p_NV = target.log_whole(vocab_size).to(z_NV.dtype)
        kd_N = _whole_divergence(log_p_NV, F.log_softmax(z_NV, -1), target, settings)
    else:
        assert isinstance(target, FlatTargets)
        kd_N = _divergence(z_NV, target, labels_N, settings)
    if isinstance(target, FlatTargets):
        agreed_N = same_first_choice(logits_NV.detach(), target.token_ids_NK)
    else:
        agreed_N = logits_NV.argmax(-1) == log_p_NV.argmax(-1)
    kd = mean_over(kd_N, mask_N, kd_count)
    ce = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum") / at_least_one(ce_count)
    loss = kd_weight * temperature**2 * kd + ce_weight * ce
    agreement = mean_over(agreed_N.to(kd.dtype), mask_N, kd_count)
    coverage = mean_over(target.coverage_N.to(kd.dtype), mask_N, kd_count)
    return DistillationOutput(loss, kd.detach(), ce.detach(), mask_N.sum(), coverage, agreement)


def _whole_divergence(
    log_p_NV: Tensor, log_q_NV: Tensor, target: FlatTargets | DenseTargets, settings: LossSettings
) -> Tensor:
    """KL [N], or another divergence, of two distributions over the whole vocabulary."""
    if settings.divergence == "kl":
        return weighted(log_p_NV.exp(), log_p_NV - log_q_NV).sum(-1)
    scale_N = None
    if isinstance(target, FlatTargets) and target.scale_N is not None:
        log_p_NV, log_q_NV = (modes_first(log_NV, target.token_ids_NK) for log_NV in (log_p_NV, log_q_NV))
        scale_N = target.scale_N
    alpha = resolve_alpha(settings.divergence, settings.alpha)
    return DIVERGENCES[settings.divergence](log_p_NV, log_q_NV, alpha, scale_N)[0]


def _divergence(z_NV: Tensor, target: FlatTargets, labels_N: Tensor, settings: LossSettings) -> Tensor:
    """KL_T [N], or another divergence, of z = x / T [N, V], with the tail as anything but a shape."""
    tail_mode, divergence, dtype = target.tail_mode, settings.divergence, z_NV.dtype
    log_p_NK, log_tail_N = target.log_p_NK.to(dtype), target.log_tail_N.to(dtype)
    used_NK, ids_NK = target.token_ids_NK >= 0, fill_unused(target.token_ids_NK)
    log_q_NV = F.log_softmax(z_NV, -1)
    log_q_NK = log_q_NV.gather(-1, ids_NK)
    outside_NV = torch.ones_like(log_q_NV, dtype=torch.bool).scatter(-1, ids_NK, False)
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()

    if tail_mode in ("renormalize", "renormalize_teacher"):
        log_p_NK = log_p_NK - torch.logsumexp(log_p_NK, -1, keepdim=True)
        p_NK = log_p_NK.exp()
        if tail_mode == "renormalize":
            log_q_NK = torch.where(used_NK, log_q_NK, -math.inf)
            log_q_NK = log_q_NK - torch.logsumexp(log_q_NK, -1, keepdim=True)
    elif tail_mode == "label":
        # The label's own entry absorbs the tail; a label outside the head is one more entry.
        is_label_NK = used_NK & (ids_NK == labels_N.unsqueeze(-1))
        p_NK = p_NK + is_label_NK * p_tail_N.unsqueeze(-1)
        log_p_NK = torch.where(is_label_NK, p_NK.clamp(min=torch.finfo(dtype).tiny).log(), log_p_NK)
    kl_N = weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
    if target.samples is not None:
        w_NK, log_p_samples_NK = (part.to(dtype) for part in target.samples)
        return kl_N + weighted(w_NK, log_p_samples_NK - log_q_NK).sum(-1)
    if tail_mode == "bucket":
        log_q_tail_N = torch.logsumexp(log_q_NV.masked_fill(~outside_NV, -math.inf), -1)
        if divergence == "kl":
            return kl_N + weighted(p_tail_N, log_tail_N - log_q_tail_N)
        log_q_NM = torch.cat([log_q_NK.masked_fill(~used_NK, -math.inf), log_q_tail_N.unsqueeze(-1)], -1)
        log_p_NM = torch.cat([log_p_NK, log_tail_N.unsqueeze(-1)], -1)
        alpha = resolve_alpha(divergence, settings.alpha)
        return DIVERGENCES[divergence](log_p_NM, log_q_NM, alpha, target.scale_N)[0]
    if tail_mode == "uniform":
        left_out_N = outside_NV.sum(-1).clamp(min=1)
        mean_log_q_N = (log_q_NV * outside_NV).sum(-1) / left_out_N
        return kl_N + weighted(p_tail_N, log_tail_N - left_out_N.to(dtype).log() - mean_log_q_N)
    if tail_mode == "label":
        label_N1 = labels_N.clamp(min=0).unsqueeze(-1)
        in_tail_N = (labels_N != IGNORE) & outside_NV.gather(-1, label_N1).squeeze(-1)
        log_q_label_N = log_q_NV.gather(-1, label_N1).squeeze(-1)
        return kl_N + torch.where(in_tail_N, weighted(p_tail_N, log_tail_N - log_q_label_N), 0.0)
    return kl_N


def same_first_choice(logits_NV: Tensor, token_ids_NK: Tensor) -> Tensor:
    """Whether the teacher's first choice is the student's [N]; a tie counts."""
    first_N1 = token_ids_NK[:, :1]
    return (
        (logits_NV.gather(-1, first_N1.clamp(min=0)) >= logits_NV.amax(-1, keepdim=True)) & (first_N1 >= 0)
    ).squeeze(-1)
