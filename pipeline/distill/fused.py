"""The distillation loss and its gradient in one pass over hidden states: the form to train with.

`loss` defines what is computed. The output layer's logits exist for `chunk_size` positions at a time; loss and gradient
are computed together from them in the forward pass, and the gradient replaces the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..corpus.labels import IGNORE
from ..models.output_layer import OutputLayer
from ..targets.sparse_targets import SparseTargets
from ..targets.whole import WholeTargets
from .chunk_loss import chunk_loss
from .flat_targets import flat
from .loss import DistillationOutput
from .loss_settings import LossSettings
from .position_losses import PositionLoss, TritonLoss, cached_target, labels_only, teacher_log_p, whole_target
from .projection import parameters, projection_of
from .sums import at_least_one, mean_over, promote


def fused_distillation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: SparseTargets | WholeTargets | None,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    tail: str | None = None,
    divergence: str = "kl",
    alpha: float | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """`distillation_loss(hidden @ lm_head_weight.T + bias, ...)` without the logits of all positions in memory.

    hidden [..., D], lm_head_weight [V, D], bias [V]. Only [chunk_size, V] logits exist at once; the default depends on
    device and dtype. The forward pass computes loss and gradient together; the backward pass multiplies by the incoming
    gradient and can run once. `logit_scale` and `softcap` are those of architectures that have them:
    x -> softcap * tanh(logit_scale * x / softcap).

    With `targets=None` the loss is the cross-entropy alone, and kd_weight must be 0.

    Raises ValueError for settings that cannot be used, as `distillation_loss`, and for a chunk_size below 1.
    """
    return fused_loss(
        hidden,
        OutputLayer(lm_head_weight, bias, logit_scale, softcap),
        targets,
        labels,
        LossSettings(temperature, kd_weight, ce_weight, tail, divergence, alpha),
        chunk_size=chunk_size,
        kd_positions=kd_positions,
        ce_positions=ce_positions,
    )


def fused_loss(
    hidden: Tensor,
    output_layer: OutputLayer,
    targets: SparseTargets | WholeTargets | None,
    labels: Tensor,
    settings: LossSettings,
    *,
    chunk_size: int | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """`fused_distillation_loss` with output layer and settings as objects."""
    labels_N = labels.reshape(-1)
    if targets is None:
        if settings.kd_weight != 0.0:
            raise ValueError("kd_weight needs targets: pass kd_weight=0 to train on the labels alone")
        mask_N = torch.zeros(labels_N.numel(), dtype=torch.bool, device=labels.device)
        objective = _Objective(labels_only(labels_N), False, mask_N, labels_N, settings, 0, ce_positions)
        return _fused(hidden, output_layer, objective, chunk_size)
    settings = settings.fit(targets, output_layer.weight.shape[0])
    # With kd_weight 0, as at the end of a schedule, the divergence is still reported.
    target, mask_N = flat(targets, labels, settings), targets.mask.flatten()
    position_loss = cached_target(target, labels_N, settings)
    objective = _Objective(position_loss, True, mask_N, labels_N, settings, kd_positions, ce_positions)
    return _fused(hidden, output_layer, objective, chunk_size, target.coverage_N)


def fused_online_loss(
    hidden: Tensor,
    output_layer: OutputLayer,
    teacher_logits: Callable[[slice], Tensor],
    mask: Tensor,
    labels: Tensor,
    settings: LossSettings,
    *,
    chunk_size: int | None = None,
    kd_positions: Tensor | int | None = None,
    ce_positions: Tensor | int | None = None,
) -> DistillationOutput:
    """The same loss against a teacher in memory: the divergence over the full vocabulary, nothing truncated.

    `teacher_logits(rows)` returns the teacher's logits [C, V] for a slice of the flattened positions; `mask` [...]
    marks the positions with a target. Tokens that only the student has are impossible for the teacher. All else as in
    `fused_distillation_loss`; raises ValueError for `tail_aware_kl`, which needs the teacher's tokens in order.
    """
    labels_N = labels.reshape(-1)
    if settings.divergence == "tail_aware_kl":
        raise ValueError("divergence 'tail_aware_kl' needs cached targets: choose another for mode 'online'")
    has_kd = settings.kd_weight != 0.0
    position_loss = (
        whole_target(teacher_log_p(teacher_logits, settings.temperature), labels_N, settings)
        if has_kd
        else labels_only(labels_N)
    )
    objective = _Objective(position_loss, has_kd, mask.reshape(-1), labels_N, settings, kd_positions, ce_positions)
    return _fused(hidden, output_layer, objective, chunk_size)


def default_chunk_size(device: torch.device, dtype: torch.dtype, vocab_size: int) -> int:
    """The positions whose logits [V] exist at once, for hidden states of a dtype.

    Every chunk reads and writes the gradient of the weights, which is the cost where products are fast.
    """
    if device.type == "cpu":
        return 1024 if dtype == torch.bfloat16 else 256
    if device.type != "cuda":
        return 256
    return gpu_chunk_size(torch.cuda.get_device_properties(device).total_memory, vocab_size * dtype.itemsize)


def gpu_chunk_size(memory: int, position: int) -> int:
    """The largest power of two from 256 to 4096 for which the logits, of `position` bytes each, take at most 1/64 of a
    GPU's memory."""
    positions = memory // 64 // position
    return 1 << max(8, min(12, positions.bit_length() - 1))


@dataclass(frozen=True)
class _Objective:
    """The loss of single positions, and the counts and weights of their sum."""

    position_loss: PositionLoss | TritonLoss
    has_kd: bool
    mask_N: Tensor
    labels_N: Tensor
    settings: LossSettings
    kd_positions: Tensor | int | None
    ce_positions: Tensor | int | None


def _fused(
    hidden: Tensor,
    output_layer: OutputLayer,
    objective: _Objective,
    chunk_size: int | None,
    coverage_N: Tensor | None = None,
) -> DistillationOutput:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast is not None:
        hidden_ND = hidden_ND.to(autocast)
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden_ND.device, hidden_ND.dtype, output_layer.weight.shape[0])
    # Each operation has its own precision: products that of the hidden states, sums float32.
    with torch.autocast(device, enabled=False):
        loss, kd, ce, agreement = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND, output_layer, objective, chunk_size, autocast, *parameters(output_layer)
        )
    mask_N = objective.mask_N
    count = mask_N.sum()
    coverage_N = torch.ones_like(mask_N, dtype=kd.dtype) if coverage_N is None else coverage_N
    coverage = mean_over(coverage_N, mask_N, objective.kd_positions)
    return DistillationOutput(loss, kd, ce, count, coverage, agreement)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        output_layer: OutputLayer,
        objective: _Objective,
        chunk_size: int,
        autocast: torch.dtype | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        settings, mask_N = objective.settings, objective.mask_N
        has_label_N = objective.labels_N != IGNORE
        dtype = promote(hidden_ND[:0]).dtype
        kd_count = at_least_one(mask_N.sum() if objective.kd_positions is None else objective.kd_positions)
        ce_count = at_least_one(has_label_N.sum() if objective.ce_positions is None else objective.ce_positions)
        # d(kd_weight T^2 KL)/dx = kd_weight T dKL/dz; the mean and the mask are one factor per position.
        kd_scale_N = mask_N.to(dtype) * (settings.kd_weight * settings.temperature) / kd_count
        ce_scale_N = has_label_N.to(dtype) * settings.ce_weight / ce_count
        # The smallest float16, 2^-24, is above most probabilities over a number of positions: the division by that
        # number comes last, in float32, and sums over the positions of a chunk are means.
        unit: Tensor | int = 1
        mean_of = 1
        if hidden_ND.dtype == torch.float16:
            unit = kd_count if objective.has_kd else ce_count
            kd_scale_N, ce_scale_N, mean_of = kd_scale_N * unit, ce_scale_N * unit, chunk_size
        kd_sum, ce_sum, agreed_sum = torch.zeros(3, dtype=dtype, device=hidden_ND.device).unbind()
        projection = projection_of(output_layer, hidden_ND, needed, rows=chunk_size, mean_of=mean_of, autocast=autocast)
        in_chunk = chunk_loss(objective.position_loss, replace(output_layer, bias=projection.bias_V), hidden_ND)
        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, min(start + chunk_size, len(hidden_ND)))
            logits_CV = projection.logits(chunk)
            kd_C, ce_C, agreed_C = in_chunk(logits_CV, chunk, kd_scale_N[chunk], ce_scale_N[chunk])
            ce_sum += torch.where(has_label_N[chunk], ce_C, 0.0).sum()
            if kd_C is not None and agreed_C is not None:
                agreed_sum += (agreed_C & mask_N[chunk]).sum()
                kd_sum += torch.where(mask_N[chunk], kd_C, 0.0).sum()
            # From here on logits_CV holds the gradient with respect to the logits.
            projection.add_gradient(chunk, logits_CV)
        ctx.gradients = projection.gradients()
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_ND, *parameters)]
        ctx.unit = unit
        kd, ce, agreement = kd_sum / kd_count, ce_sum / ce_count, agreed_sum / kd_count
        loss = settings.kd_weight * settings.temperature**2 * kd + settings.ce_weight * ce
        ctx.mark_non_differentiable(kd, ce, agreement)
        return loss, kd, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss holds its gradient for one backward pass: do not use retain_graph")
        # The gradients are handed over in place: a copy of the weights' would be the largest tensor of the step.
        gradients, ctx.gradients = ctx.gradients, None
        # A loss scaled for float16 may itself be out of float16's range.
        factor = grad_loss / ctx.unit
        hidden, *others = (
            None
            if part is None
            else (part.mul_(factor) if part.dtype == factor.dtype else promote(part) * factor).to(dtype)
            for part, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return hidden, None, None, None, None, *others
