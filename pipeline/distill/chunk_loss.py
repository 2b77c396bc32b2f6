"""The loss of a chunk of positions from the product of the output layer, the gradient by it in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.output_layer import OutputLayer
from .position_losses import CompiledLoss, PositionLoss, TritonLoss
from .sums import promote

_REDUCED_BYTES = 128
"""Bytes per token of the positions that a thread of a CPU reduces at once: 32 in float32. Fewer cost the product with a
tail basis its speed, and more leave the core's cache."""
_REDUCED_ROWS = 256
"""Positions that operations of torch reduce at once on a GPU: each operation makes a tensor of that size."""


Results = tuple[Tensor | None, Tensor, Tensor | None]
"""KD, CE, and whether teacher and student have the same first choice, each [C]; None without a teacher."""


class ChunkLoss(Protocol):
    """The loss of the C positions `rows` of all N, from the product of hidden states and output layer [C, V].

    Over the product comes the gradient with respect to it, in its own dtype. kd_scale and ce_scale [C] are the factors
    of dKD/dz, z = x / T, and of dCE/dx, with x the logits.
    """

    def __call__(self, product_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Results: ...


def chunk_loss(position_loss: PositionLoss | TritonLoss, layer: OutputLayer, hidden_ND: Tensor) -> ChunkLoss:
    """What computes the loss of positions with such hidden states, whose logits are the product with bias, scale and
    soft-cap of `layer`."""
    if isinstance(position_loss, TritonLoss):
        if hidden_ND.dtype != torch.float64:
            return _InOneKernel(position_loss, layer)
        position_loss = position_loss.plain
    size = _REDUCED_ROWS
    if hidden_ND.device.type == "cpu":
        size = _REDUCED_BYTES // hidden_ND.element_size() * torch.get_num_threads()
    bare = layer.bias is None and layer.scale == 1.0 and layer.softcap is None
    # Compiled losses take bfloat16 as it is, unless something is done to the logits first.
    takes_product = bare and isinstance(position_loss, CompiledLoss) and hidden_ND.dtype == torch.bfloat16
    return _InPieces(position_loss, layer, size, None if takes_product else promote(hidden_ND[:0]).dtype)


@dataclass(frozen=True)
class _InOneKernel:
    loss: TritonLoss
    layer: OutputLayer

    def __call__(self, product_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Results:
        kl_C, ce_C, agreed_C = self.loss.rows(product_CV, rows, kd_scale_C, ce_scale_C, self.layer)
        return (kl_C, ce_C, agreed_C) if self.loss.has_kd else (None, ce_C, None)


@dataclass(frozen=True)
class _InPieces:
    """The logits of `size` positions at a time."""

    loss: PositionLoss
    layer: OutputLayer
    size: int
    dtype: torch.dtype | None
    """Of the logits; None: that of the product."""

    def __call__(self, product_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Results:
        starts = range(0, len(product_CV), self.size)
        pieces = [slice(start, min(start + self.size, len(product_CV))) for start in starts]
        kd, ce, agreed = zip(
            *(
                self._piece(
                    product_CV[piece],
                    slice(rows.start + piece.start, rows.start + piece.stop),
                    kd_scale_C[piece],
                    ce_scale_C[piece],
                )
                for piece in pieces
            ),
            strict=True,
        )
        has_kd = kd[0] is not None
        return torch.cat(kd) if has_kd else None, torch.cat(ce), torch.cat(agreed) if has_kd else None

    def _piece(self, product_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor) -> Results:
        layer = self.layer
        x_CV = product_CV if self.dtype is None else product_CV.to(self.dtype)
        if layer.bias is not None:
            x_CV += layer.bias
        x_CV = layer.transform(x_CV, in_place=True)
        slope_CV = 1.0 - (x_CV / layer.softcap) ** 2 if layer.softcap is not None else None
        kd_C, ce_C, agreed_C, grad_CV = self.loss(x_CV, rows, kd_scale_C, ce_scale_C)
        if slope_CV is not None:
            grad_CV *= slope_CV
        if layer.scale != 1.0:
            grad_CV *= layer.scale
        product_CV.copy_(grad_CV)
        return kd_C, ce_C, agreed_C
