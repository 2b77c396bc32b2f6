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

from ..corpus.labels import IGNORE
from ..models.output_layer import project
from ..targets.sparse_targets import SparseTargets
from . import divergences
from .loss import (
    DistillationOutput,
    _agreed,
    _at_least_one,
    _coverage,
    _position_scale,
    _promote,
    _weighted,
    check_settings,
)
from .sparse_kl import _cross_entropy, _sampled_kl, _sparse_kl

# Positions whose logits are worked on at once where a cache can hold them; elsewhere a whole chunk.
_REDUCED_POSITIONS = {"cpu": 16}
_PRODUCT_ROWS = 8192
"""Rows of the weights whose gradient is a product in half precision before it is added in float32."""


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
