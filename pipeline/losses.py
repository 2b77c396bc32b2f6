"""Distillation losses against sparse targets: a short reference, and a fused form that never holds all logits.

With beta = 1/T, x the student's logits, q_T = softmax(beta x) over its whole vocabulary, H the kept tokens, R all others
and p_T the teacher (`SparseTargets.at_temperature`):

    KL_T = sum_H p_T (log p_T - log q_T) + p_T(R) (log p_T(R) - log q_T(R))          tail = "bucket"
    L    = kd_weight * T^2 * mean(KL_T) + ce_weight * mean(CE(x, label))

The T^2 keeps the gradient's size at every temperature (Hinton et al. 2015, arXiv 1503.02531, section 2.1). Other
treatments of the tail:

    renormalize   KL between both softmaxes taken over H only
    drop          sum_H p_T (log p_T - log q_T), the tail left out; not a divergence, it can be negative
    uniform       the tail's mass spread evenly over R
    label         the tail's mass given to the label (left out where there is none)

Where a target has samples of the tail, the bucket's term gives way to their estimate, with weights w_T that sum to p_T(R):

    KL_T = sum_H p_T (log p_T - log q_T) + sum_samples w_T (log p_T - log q_T)

It is unbiased at T = 1 in value and gradient, and not itself a divergence: student = teacher has the gradient of the draw.

Other divergences than KL, chosen by name, are in `divergences`; they take the tail as a bucket.

`distillation_loss` is the definition, written for reading; `fused_distillation_loss` is the one to train with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline import divergences
from pipeline.projection import project
from pipeline.targets import SparseTargets, inverse_temperature

# Positions whose logits are worked on at once where a cache can hold them; elsewhere a whole chunk.
_REDUCED_POSITIONS = {"cpu": 16}
_PRODUCT_ROWS = 8192
"""Rows of the weights whose gradient is a product in half precision before it is added in float32."""
TAILS = ("bucket", "renormalize", "drop", "uniform", "label")
IGNORE = -100


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


def fused_distillation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: SparseTargets | None,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    tail: str = "bucket",
    divergence: str = "kl",
    alpha: float | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """`distillation_loss(hidden @ lm_head_weight.T + bias, ...)`, `chunk_size` positions at a time, by default as many as pay.

    hidden [..., D], lm_head_weight [V, D], bias [V]. Only [chunk_size, V] logits exist at once: loss and gradient are
    taken together in the forward pass, and the backward pass, of which there can be one, only multiplies by the incoming
    gradient. `logit_scale` and `softcap` are those of architectures that have them: x -> softcap * tanh(logit_scale * x / softcap).

    With `targets=None` there is only the cross-entropy, and kd_weight must be 0.
    """
    head = _Head(lm_head_weight, bias, logit_scale, softcap)
    if targets is None:
        if kd_weight != 0.0:
            raise ValueError("kd_weight needs targets: pass kd_weight=0 to train on the labels alone")
        mask_N = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        objective = _Objective(None, mask_N, labels, temperature, 0.0, ce_weight, 0, ce_positions)
        return _fused(hidden, head, objective, chunk_size)
    alpha = check_settings(targets, lm_head_weight.shape[0], temperature, tail, divergence, alpha)
    scale_N = _position_scale(targets, temperature, divergence, alpha)
    targets, labels_N = targets.flatten(), labels.reshape(-1)
    log_p_NK, log_tail_N = targets.at_temperature(temperature)
    samples = targets.tail_samples(temperature)

    def sparse_divergence(z_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        ids_NK, head_NK, tail_N = targets.token_ids[rows], log_p_NK[rows], log_tail_N[rows]
        agreed_N = _agreed(z_NV, ids_NK[:, 0])
        if samples is not None:
            w_NK, log_p_samples_NK = (part[rows] for part in samples)
            # An entry is of the head or a sample, never both.
            p_NK, log_p_of_NK = head_NK.exp() + w_NK, torch.maximum(head_NK, log_p_samples_NK)
            return *_sampled_kl(z_NV, ids_NK, p_NK, log_p_of_NK), agreed_N
        scale_n = None if scale_N is None else scale_N[rows]
        return *divergences.over_cells(z_NV, ids_NK, head_NK, tail_N, divergence, alpha, scale_n), agreed_N

    def sparse_kl(
        z_NV: Tensor, rows: slice, kd_scale_N: Tensor, ce_scale_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        target = targets.token_ids[rows], log_p_NK[rows], log_tail_N[rows], labels_N[rows]
        return _sparse_kl(z_NV, *target, tail, kd_scale_N, ce_scale_N)

    # Also with kd_weight 0, where a schedule has it so: the divergence is then only told.
    objective = _Objective(
        sparse_divergence, targets.mask, labels, temperature, kd_weight, ce_weight, kd_positions, ce_positions
    )
    if divergence == "kl" and samples is None:
        objective = replace(objective, kl=None, sparse_kl=sparse_kl)
    return _fused(hidden, head, objective, chunk_size, log_tail_N)


def fused_online_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logits: Callable[[slice], Tensor],
    mask: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    divergence: str = "kl",
    alpha: float | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """The same loss with the teacher beside the student: the KL over the full vocabulary, nothing truncated.

    `teacher_logits(rows)` gives the teacher's logits [n, V] for a slice of the flattened positions; `mask` [...] marks
    the positions that have a target. Tokens that only the student has are impossible for the teacher. All else as in
    `fused_distillation_loss`; raises ValueError for `tail_aware_kl`, which needs the teacher's tokens in order.
    """
    alpha = divergences.check(divergence, alpha)
    if divergence == "tail_aware_kl":
        raise ValueError("tail_aware_kl is for cached targets")

    def full_divergence(z_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_p_NV = F.log_softmax(teacher_logits(rows).to(z_NV.dtype) / temperature, -1)
        if (missing := z_NV.shape[-1] - log_p_NV.shape[-1]) > 0:
            log_p_NV = F.pad(log_p_NV, (0, missing), value=-math.inf)
        log_q_NV = F.log_softmax(z_NV, -1)
        agreed_N = log_p_NV.argmax(-1) == log_q_NV.argmax(-1)
        if divergence != "kl":
            value_N, slope_NV = divergences.DIVERGENCES[divergence][0](log_p_NV, log_q_NV, alpha, None)
            return value_N, slope_NV - slope_NV.sum(-1, keepdim=True) * log_q_NV.exp(), agreed_N
        p_NV = log_p_NV.exp()
        return _weighted(p_NV, log_p_NV - log_q_NV).sum(-1), log_q_NV.exp_().sub_(p_NV), agreed_N

    kl = full_divergence if kd_weight != 0.0 else None
    objective = _Objective(kl, mask.reshape(-1), labels, temperature, kd_weight, ce_weight, kd_positions, ce_positions)
    return _fused(hidden, _Head(lm_head_weight, bias, logit_scale, softcap), objective, chunk_size)


def _sparse_kl(
    z_NV: Tensor,
    token_ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    labels_N: Tensor,
    tail: str,
    kd_scale_N: Tensor,
    ce_scale_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_T [N] against a sparse target, and CE(z, label) [N], from one exponential of each logit.

    Also whether both have the same first choice [N]; a tie counts. Written over z = beta * x [N, V] is the gradient of
    kd_scale * KL + ce_scale * CE with respect to it.

    With total mass m of the target, the gradient of KL is m q(j) - p(j). The bucket adds a twist outside the head: q(j)
    there is pulled as a whole, q(j) - p(R) q(j) / q(R). The softmax over R, q(j) / q(R), is computed with R's own maximum
    and so stays finite where q(R) rounds to 0.
    """
    dtype = z_NV.dtype
    log_p_NK, log_tail_N = log_p_NK.to(dtype), log_tail_N.to(dtype)
    used_NK, ids_NK = token_ids_NK >= 0, _fill_unused(token_ids_NK)
    # Where nothing is kept, one token of probability 0 stands for the head.
    inside_NK = torch.cat([torch.ones_like(used_NK[:, :1]), used_NK[:, 1:]], -1)
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
    label_column_N1 = labels_N.clamp(min=0).unsqueeze(-1)
    z_NK = z_NV.gather(-1, ids_NK).masked_fill(~inside_NK, -math.inf)
    z_label_N = z_NV.gather(-1, label_column_N1).squeeze(-1)
    left_out_N = (z_NV.shape[-1] - inside_NK.sum(-1)).clamp(min=1)
    if tail == "uniform":
        mean_z_N = (z_NV.sum(-1) - torch.where(inside_NK, z_NK, 0.0).sum(-1)) / left_out_N

    outside_NV = z_NV.scatter_(-1, ids_NK, -math.inf)
    max_N = outside_NV.amax(-1)
    agreed_N = used_NK[:, 0] & (z_NK[:, 0] >= torch.maximum(z_NK.amax(-1), max_N))
    max_N = torch.where(torch.isneginf(max_N), 0.0, max_N)
    exps_NV = outside_NV.sub_(max_N.unsqueeze(-1)).exp_()
    sum_N = exps_NV.sum(-1)
    log_outside_N = sum_N.log() + max_N
    log_inside_N = torch.logsumexp(z_NK, -1)
    log_total_N = torch.logaddexp(log_inside_N, log_outside_N)
    log_q_NK = z_NK - log_total_N.unsqueeze(-1)
    log_q_tail_N = log_outside_N - log_total_N
    sum_N = torch.where(sum_N > 0, sum_N, 1.0)
    # q(j) = q(R) * exps(j) / sum(exps) for j outside the head.
    q_NK, q_tail_N = log_q_NK.exp(), log_q_tail_N.exp()

    if tail == "renormalize":
        # A position without a target has nothing to normalise, and -inf - -inf would be NaN.
        log_mass_N = torch.where(used_NK[:, 0], torch.logsumexp(log_p_NK, -1), 0.0)
        log_p_NK = log_p_NK - log_mass_N.unsqueeze(-1)
        p_NK, log_q_NK = log_p_NK.exp(), z_NK - log_inside_N.unsqueeze(-1)
        kl_N = _weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
        mass_N, pull_tail_N = used_NK[:, 0].to(dtype), torch.zeros_like(kl_N)
    else:
        mass_N = p_NK.sum(-1)
        if tail == "label":
            is_label_NK = used_NK & (ids_NK == labels_N.unsqueeze(-1))
            given_N = torch.where(labels_N != IGNORE, p_tail_N, 0.0)
            mass_N = mass_N + given_N
            p_NK = p_NK + is_label_NK * given_N.unsqueeze(-1)
            log_p_NK = torch.where(is_label_NK, p_NK.clamp(min=torch.finfo(dtype).tiny).log(), log_p_NK)
            given_N = torch.where(is_label_NK.any(-1), 0.0, given_N)
        kl_N = _weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
        if tail == "bucket":
            mass_N = mass_N + p_tail_N
            kl_N = kl_N + _weighted(p_tail_N, log_tail_N - log_q_tail_N)
        elif tail == "uniform":
            mass_N = mass_N + p_tail_N
            kl_N = kl_N + _weighted(
                p_tail_N, log_tail_N - left_out_N.to(log_tail_N.dtype).log() - (mean_z_N - log_total_N)
            )
        elif tail == "label":
            kl_N = kl_N + _weighted(given_N, log_tail_N - (z_label_N - log_total_N))
        pull_tail_N = mass_N * q_tail_N - (p_tail_N if tail == "bucket" else 0.0)

    # The gradient of the logarithm that normalises q is q itself: all that CE asks for but at its label.
    grad_NV = exps_NV.mul_(((kd_scale_N * pull_tail_N + ce_scale_N * q_tail_N) / sum_N).unsqueeze(-1))
    if tail == "uniform":
        grad_NV.sub_((kd_scale_N * p_tail_N / left_out_N).unsqueeze(-1))
    grad_NK = kd_scale_N.unsqueeze(-1) * (mass_N.unsqueeze(-1) * log_q_NK.exp() - p_NK)
    grad_NK = grad_NK + ce_scale_N.unsqueeze(-1) * q_NK
    # Unused entries point at the first one, so they must carry its value.
    grad_NV.scatter_(-1, ids_NK, torch.where(inside_NK, grad_NK, grad_NK[:, :1]))
    pull_label_N = ce_scale_N + kd_scale_N * given_N if tail == "label" else ce_scale_N
    grad_NV.scatter_add_(-1, label_column_N1, -pull_label_N.unsqueeze(-1))
    return kl_N, log_total_N - z_label_N, agreed_N, grad_NV


def _cross_entropy(x_NV: Tensor, labels_N1: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """CE(x, label) [N], and over x the gradient of scale * CE with respect to it [N, V]."""
    max_N1, x_label_N1 = x_NV.amax(-1, keepdim=True), x_NV.gather(-1, labels_N1)
    exps_NV = x_NV.sub_(max_N1).exp_()
    sum_N1, scale_N1 = exps_NV.sum(-1, keepdim=True), scale_N.unsqueeze(-1)
    grad_NV = exps_NV.mul_(scale_N1 / sum_N1).scatter_add_(-1, labels_N1, -scale_N1)
    return (sum_N1.log() + max_N1 - x_label_N1).squeeze(-1), grad_NV


def _sampled_kl(z_NV: Tensor, token_ids_NK: Tensor, weights_NK: Tensor, log_p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """sum over entries of w (log p - log q) [N], and its gradient m q - w [N, V], m the sum of the weights, over z."""
    dtype = z_NV.dtype
    weights_NK, log_p_NK = weights_NK.to(dtype), log_p_NK.to(dtype)
    ids_NK = token_ids_NK.clamp(min=0)  # unused entries have weight 0 and may point anywhere
    log_q_NV = F.log_softmax(z_NV, -1)
    kl_N = _weighted(weights_NK, log_p_NK - log_q_NV.gather(-1, ids_NK)).sum(-1)
    grad_NV = log_q_NV.exp_().mul_(weights_NK.sum(-1, keepdim=True))
    return kl_N, grad_NV.scatter_add_(-1, ids_NK, -weights_NK)


@dataclass(frozen=True)
class _Head:
    """The output layer: x = softcap * tanh(scale * (h W^T + b) / softcap)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class _Objective:
    """What is summed over positions, and over how many it is averaged."""

    kl: Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]] | None
    """z [n, V] = x / T, which it may overwrite, and its rows -> divergence [n], its gradient with respect to z [n, V], and
    whether both have the same first choice [n]."""
    mask_N: Tensor
    labels: Tensor
    temperature: float
    kd_weight: float
    ce_weight: float
    kd_positions: Tensor | int | None
    ce_positions: Tensor | int | None
    sparse_kl: Callable[[Tensor, slice, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """Instead of `kl`: z, rows, and the weights of KL and CE at each -> as `_sparse_kl`."""


def _fused(
    hidden: Tensor, head: _Head, objective: _Objective, chunk_size: int | None, log_tail_N: Tensor | None = None
) -> DistillationOutput:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    if chunk_size is None:
        # Where products are fast, passing over the gradient of the weights for every chunk is what costs.
        chunk_size = 1024 if device == "cpu" and hidden_ND.dtype == torch.bfloat16 else 256
    # Precision is chosen operation by operation inside: products in that of the hidden states, sums in float32.
    with torch.autocast(device, enabled=False):
        loss, kd, ce, agreement = _FusedHead.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight_VD, head.bias_V, head, objective, chunk_size
        )
    count = objective.mask_N.sum()
    log_tail_N = torch.full_like(objective.mask_N, -math.inf, dtype=kd.dtype) if log_tail_N is None else log_tail_N
    given = count if objective.kd_positions is None else objective.kd_positions
    return DistillationOutput(loss, kd, ce, count, _coverage(objective.mask_N, log_tail_N, given), agreement)


def _loss_and_gradient(
    objective: _Objective, x_NV: Tensor, labels_N: Tensor, rows: slice, kd_scale_N: Tensor, ce_scale_N: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Divergence [N] (None without targets), CE [N], same first choice [N], and the weighted gradient over x [N, V]."""
    if objective.sparse_kl is not None and objective.temperature == 1.0:
        return objective.sparse_kl(x_NV, rows, kd_scale_N, ce_scale_N)
    z_NV = None if objective.kl is None and objective.sparse_kl is None else x_NV / objective.temperature
    ce_N, grad_NV = _cross_entropy(x_NV, labels_N.clamp(min=0).unsqueeze(-1), ce_scale_N)
    if z_NV is None:
        return None, ce_N, None, grad_NV
    if objective.sparse_kl is not None:
        kl_N, _, agreed_N, kl_grad_NV = objective.sparse_kl(z_NV, rows, kd_scale_N, torch.zeros_like(ce_scale_N))
        return kl_N, ce_N, agreed_N, grad_NV.add_(kl_grad_NV)
    assert objective.kl is not None
    kl_N, kl_grad_NV, agreed_N = objective.kl(z_NV, rows)
    return kl_N, ce_N, agreed_N, grad_NV.addcmul_(kl_grad_NV, kd_scale_N.unsqueeze(-1))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: _Head,
        objective: _Objective,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        labels_N = objective.labels.reshape(-1)
        has_label_N = labels_N != IGNORE
        dtype = _promote(hidden_ND[:0]).dtype
        kd_count = _at_least_one(objective.mask_N.sum() if objective.kd_positions is None else objective.kd_positions)
        ce_count = _at_least_one(has_label_N.sum() if objective.ce_positions is None else objective.ce_positions)
        # d(kd_weight T^2 KL)/dx = kd_weight T dKL/dz, and the mean and the mask are one factor per position.
        kd_scale_N = objective.mask_N.to(dtype) * (objective.kd_weight * objective.temperature) / kd_count
        ce_scale_N = has_label_N.to(dtype) * objective.ce_weight / ce_count
        # float16 ends at 2^-24, above most probabilities over a number of positions: that is divided by in the end, in float32,
        # and sums over the positions of a chunk are taken as means.
        unit: Tensor | int = 1
        room = 1
        if hidden_ND.dtype == torch.float16:
            unit = ce_count if objective.kl is None and objective.sparse_kl is None else kd_count
            kd_scale_N, ce_scale_N, room = kd_scale_N * unit, ce_scale_N * unit, chunk_size
        matrix_VD = head.weight_VD.to(hidden_ND.dtype)
        kd_sum = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        ce_sum = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        agreed_sum = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if need_bias and bias_V is not None else None

        logits_CV = hidden_ND.new_empty(min(chunk_size, len(hidden_ND)), len(matrix_VD))
        reduced = _REDUCED_POSITIONS.get(hidden_ND.device.type, chunk_size)

        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, min(start + chunk_size, len(hidden_ND)))
            logits_NV = project(hidden_ND[chunk], matrix_VD, logits_CV[: chunk.stop - start])
            for first in range(start, chunk.stop, reduced):
                rows = slice(first, min(first + reduced, chunk.stop))
                low_NV = logits_NV[first - start : rows.stop - start]
                x_NV = low_NV.to(dtype)
                if bias_V is not None:
                    x_NV += bias_V
                if head.scale != 1.0:
                    x_NV *= head.scale
                if head.softcap is not None:
                    x_NV = x_NV.div_(head.softcap).tanh_().mul_(head.softcap)
                slope_NV = 1.0 - (x_NV / head.softcap) ** 2 if head.softcap is not None else None

                kl_n, ce_n, agreed_n, grad_NV = _loss_and_gradient(
                    objective, x_NV, labels_N[rows], rows, kd_scale_N[rows], ce_scale_N[rows]
                )
                ce_sum += torch.where(has_label_N[rows], ce_n, 0.0).sum()
                if kl_n is not None and agreed_n is not None:
                    agreed_sum += (agreed_n & objective.mask_N[rows]).sum()
                    kd_sum += torch.where(objective.mask_N[rows], kl_n, 0.0).sum()
                if slope_NV is not None:
                    grad_NV *= slope_NV
                if head.scale != 1.0:
                    grad_NV *= head.scale
                if grad_bias_V is not None:
                    grad_bias_V += grad_NV.sum(0)
                low_NV.copy_(grad_NV)
            # The logits have become their gradient.
            if grad_hidden_ND is not None:
                torch.mm(logits_NV, matrix_VD, out=grad_hidden_ND[chunk])
            if grad_weight_VD is not None:
                if logits_NV.dtype == dtype:
                    grad_weight_VD.addmm_(logits_NV.T, hidden_ND[chunk])
                else:
                    few_ND = hidden_ND[chunk] if room == 1 else hidden_ND[chunk] / room
                    for first in range(0, len(matrix_VD), _PRODUCT_ROWS):
                        block = slice(first, first + _PRODUCT_ROWS)
                        grad_weight_VD[block].add_(logits_NV[:, block].T @ few_ND, alpha=room)
        ctx.gradients = grad_hidden_ND, grad_weight_VD, grad_bias_V
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        ctx.unit = unit
        kd, ce, agreement = kd_sum / kd_count, ce_sum / ce_count, agreed_sum / kd_count
        loss = objective.kd_weight * objective.temperature**2 * kd + objective.ce_weight * ce
        ctx.mark_non_differentiable(kd, ce, agreement)
        return loss, kd, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a fused loss is made with it and can be taken once: no retain_graph")
        # Given away where they stand: a copy of the weights' would be the most memory of the step.
        gradients, ctx.gradients = ctx.gradients, None
        # A loss scaled for float16 may itself be beyond float16.
        factor = grad_loss / ctx.unit
        hidden, weight, bias = (
            None
            if part is None
            else (part.mul_(factor) if part.dtype == factor.dtype else _promote(part) * factor).to(dtype)
            for part, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None


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
