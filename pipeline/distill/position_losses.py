"""The loss of single positions with its gradient over their logits: what `chunk_loss` calls for some at a time.

`_on_device` chooses what computes it: loops compiled for a CPU (`row_kernels`), a kernel of Triton for a GPU
(`loss_triton`), or operations of torch (`gradients`), which are right for every loss on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.kernels import triton_runs_on
from .compiled_rows import CompiledRows
from .divergences import resolve_alpha
from .flat_targets import DenseTargets, FlatTargets
from .gradients import cell_divergence, cross_entropy, ordered_divergence, sampled_kl, sparse_kl, whole_divergence
from .loss import same_first_choice
from .loss_settings import LossSettings
from .sums import promote

if TYPE_CHECKING:
    from .triton_rows import TritonRows


class Terms(NamedTuple):
    """The loss of a chunk of positions."""

    kd_C: Tensor | None
    """Divergence from the teacher, None without a teacher."""
    ce_C: Tensor
    agreed_C: Tensor | None
    """Whether teacher and student have the same first choice, None without a teacher."""
    grad_CV: Tensor
    """Gradient of sum(kd_scale * KD + ce_scale * CE) with respect to the logits."""


class PositionLoss(Protocol):
    """Loss and gradient of the C positions `rows` of all N, from their logits x [C, V], which it may overwrite.

    kd_scale and ce_scale [C] are the factors of dKD/dz, z = x / T, and of dCE/dx.
    """

    def __call__(self, x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Terms: ...


@dataclass(frozen=True)
class CompiledLoss:
    """KL with a shape or a bucket, or the cross-entropy alone, of a CPU; `plain` serves float64.

    The gradient is written over the logits in their own dtype, also in bfloat16.
    """

    rows: CompiledRows
    plain: PositionLoss
    has_kd: bool

    def __call__(self, x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Terms:
        if x_CV.dtype == torch.float64:
            return self.plain(x_CV, rows, kd_scale_C, ce_scale_C)
        kl_C, ce_C, agreed_C = self.rows(x_CV, rows, kd_scale_C, ce_scale_C)
        return Terms(kl_C, ce_C, agreed_C, x_CV) if self.has_kd else Terms(None, ce_C, None, x_CV)


@dataclass(frozen=True)
class TritonLoss:
    """A loss that a kernel computes over the product of the output layer itself; `plain` serves float64."""

    rows: TritonRows
    plain: PositionLoss
    has_kd: bool


def implementation(device: torch.device) -> Literal["compiled", "triton", "torch"]:
    """What computes losses on a device: loops compiled for a CPU, a kernel of Triton on a GPU that runs it, else
    operations of torch."""
    if device.type == "cpu":
        return "compiled"
    return "triton" if triton_runs_on(device) else "torch"


def _on_device(
    plain: PositionLoss, target: FlatTargets | None, labels_N: Tensor, settings: LossSettings
) -> PositionLoss | TritonLoss:
    """A loss as its device computes it; `plain` is the same by operations of torch. Without a target it is the
    cross-entropy.

    All serve the cross-entropy and KL with the tail as shape or bucket. The kernel of a GPU serves every KL whose terms
    are single tokens: with samples too, and with a tail that is dropped, from the sum or from the teacher. Other tails
    and other divergences have `plain`.
    """
    means = implementation(labels_N.device)
    if means == "torch" or (target is not None and settings.divergence != "kl"):
        return plain
    if means == "compiled":
        if target is not None and (target.tail_mode not in ("shape", "bucket") or target.samples is not None):
            return plain
        return CompiledLoss(CompiledRows(target, labels_N, settings.temperature), plain, target is not None)
    from .triton_rows import Entries, TritonRows  # Triton comes with torch for CUDA only

    entries = Entries.none(labels_N) if target is None else Entries.of(target)
    if entries is None:
        return plain
    shape = None if target is None else target.shape
    return TritonLoss(TritonRows(entries, shape, labels_N, settings.temperature), plain, target is not None)


def labels_only(labels_N: Tensor) -> PositionLoss | TritonLoss:
    """The cross-entropy alone."""

    def position_loss(x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Terms:
        ce_C, grad_CV = cross_entropy(x_CV, labels_N[rows], ce_scale_C)
        return Terms(None, ce_C, None, grad_CV)

    return _on_device(position_loss, None, labels_N, LossSettings())


def cached_target(
    target: FlatTargets | DenseTargets, labels_N: Tensor, settings: LossSettings
) -> PositionLoss | TritonLoss:
    """KD against a cache's targets."""
    if isinstance(target, DenseTargets):
        return whole_target(lambda rows, size: target[rows].log_whole(size), labels_N, settings)
    if target.tail_mode == "shape":
        plain = whole_target(lambda rows, size: target[rows].log_whole(size), labels_N, settings, target)
    else:
        plain = _sparse_target(target, labels_N, settings)
    return _on_device(plain, target, labels_N, settings)


def _sparse_target(target: FlatTargets, labels_N: Tensor, settings: LossSettings) -> PositionLoss:
    """KD against a head and a tail without a shape; at T = 1, KL and cross-entropy share one exponential of each
    logit."""
    alpha, temperature = resolve_alpha(settings.divergence, settings.alpha), settings.temperature

    def kl_loss(x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Terms:
        some, labels_C = target[rows], labels_N[rows]
        if temperature == 1.0:
            return Terms(*sparse_kl(x_CV, some, labels_C, kd_scale_C, ce_scale_C))
        z_CV = x_CV / temperature
        ce_C, grad_CV = cross_entropy(x_CV, labels_C, ce_scale_C)
        no_ce_C = torch.zeros_like(ce_scale_C)
        kl_C, _, agreed_C, kl_grad_CV = sparse_kl(z_CV, some, labels_C, kd_scale_C, no_ce_C)
        return Terms(kl_C, ce_C, agreed_C, grad_CV.add_(kl_grad_CV))

    def divergence(z_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        some = target[rows]
        agreed_C = same_first_choice(z_CV, some.token_ids_NK)
        if some.samples is not None:
            return *sampled_kl(z_CV, some, some.samples), agreed_C
        return *cell_divergence(z_CV, some, settings.divergence, alpha), agreed_C

    if settings.divergence == "kl" and target.samples is None:
        return kl_loss
    return _with_cross_entropy(divergence, labels_N, temperature)


def whole_target(
    log_p: Callable[[slice, int], Tensor],
    labels_N: Tensor,
    settings: LossSettings,
    target: FlatTargets | DenseTargets | None = None,
) -> PositionLoss:
    """KD against distributions over the whole vocabulary: log_p(rows, V) gives log p_T [C, V] of a slice of positions.

    The head of a sparse `target`, where there is one, knows the teacher's best tokens in order.
    """
    alpha = resolve_alpha(settings.divergence, settings.alpha)

    def divergence(z_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_p_CV = log_p(rows, z_CV.shape[-1]).to(z_CV.dtype)
        if not isinstance(target, FlatTargets):
            agreed_C = log_p_CV.argmax(-1) == z_CV.argmax(-1)
            return *whole_divergence(z_CV, log_p_CV, settings.divergence, alpha), agreed_C
        some = target[rows]
        agreed_C = same_first_choice(z_CV, some.token_ids_NK)
        if some.scale_N is not None:
            return *ordered_divergence(z_CV, log_p_CV, some, settings.divergence, alpha), agreed_C
        return *whole_divergence(z_CV, log_p_CV, settings.divergence, alpha), agreed_C

    return _with_cross_entropy(divergence, labels_N, settings.temperature)


def teacher_log_p(teacher_logits: Callable[[slice], Tensor], temperature: float) -> Callable[[slice, int], Tensor]:
    def log_p(rows: slice, vocab_size: int) -> Tensor:
        log_p_CV = F.log_softmax(promote(teacher_logits(rows)) / temperature, -1)
        missing = vocab_size - log_p_CV.shape[-1]
        return F.pad(log_p_CV, (0, missing), value=-math.inf) if missing > 0 else log_p_CV

    return log_p


def _with_cross_entropy(
    divergence: Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]], labels_N: Tensor, temperature: float
) -> PositionLoss:
    """`divergence(z, rows)` returns value [C], gradient with respect to z [C, V] and agreement [C]; it may overwrite
    z."""

    def position_loss(x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Terms:
        z_CV = x_CV / temperature
        ce_C, grad_CV = cross_entropy(x_CV, labels_N[rows], ce_scale_C)
        kd_C, kd_grad_CV, agreed_C = divergence(z_CV, rows)
        return Terms(kd_C, ce_C, agreed_C, grad_CV.addcmul_(kd_grad_CV, kd_scale_C.unsqueeze(-1)))

    return position_loss
