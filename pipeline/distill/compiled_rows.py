"""KL and cross-entropy of single positions by the kernels of `row_kernels`: what a CPU computes in float32."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..base.kernels import in_threads
from .flat_targets import FlatTargets, TailShape
from .row_kernels import Array, loss_rows

ROWS_AT_ONCE = 16
"""Positions per piece of work of a thread: their logits, and those of the tail's shape, stay in its core's cache."""
_IMPOSSIBLE = -1e30
"""Exponent of a token that the basis does not have; finite, as 0 times it must be 0."""


class CompiledRows:
    """Loss and gradient of N positions, some at a time, from their logits.

    `target` has a shape or a bucket as its tail; None leaves the cross-entropy. Sums are of float32 terms in float64.
    """

    def __init__(self, target: FlatTargets | None, labels_N: Tensor, temperature: float) -> None:
        count = len(labels_N)
        self._beta = 1.0 / temperature
        self._labels = labels_N.clamp(min=0).contiguous().numpy()
        self._largest_label = int(labels_N.max()) if count else 0
        self._exponents: _ShapeExponents | None = None
        if target is None:
            self._ids, self._log_p = np.empty((count, 0), np.int64), np.empty((count, 0), np.float32)
            self._log_tail = np.zeros(count, np.float32)
        else:
            self._ids, self._log_p = target.token_ids_NK.contiguous().numpy(), _float32(target.log_p_NK)
            self._log_tail = _float32(target.log_tail_N)
            self._exponents = None if target.shape is None else _ShapeExponents(target.shape)

    def __call__(
        self, x_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KL_T, CE and whether both have the same first choice [C]; over x [C, V] the gradient of sum(kd_scale * KL_T)
        with respect to z = x / T plus that of sum(ce_scale * CE) with respect to x.

        Raises ValueError for a label outside the vocabulary.
        """
        count, vocab_size = x_CV.shape
        if self._largest_label >= vocab_size:
            raise ValueError(f"label {self._largest_label} is outside the student's {vocab_size} logits")
        kl_C, ce_C, agreed_C = torch.empty(count), torch.empty(count), torch.empty(count, dtype=torch.bool)
        y_CV = x_CV.new_empty(count, 0) if self._exponents is None else self._exponents(rows, vocab_size)
        arrays = [
            *(part.numpy() for part in (x_CV, y_CV)),
            *(part[rows] for part in (self._ids, self._log_p, self._log_tail, self._labels)),
            *(_float32(part) for part in (kd_scale_C, ce_scale_C)),
            *(part.numpy() for part in (kl_C, ce_C, agreed_C)),
        ]

        def work(start: int, stop: int) -> None:
            loss_rows(self._beta, *(array[start:stop] for array in arrays))

        in_threads(work, count, ROWS_AT_ONCE)
        return kl_C, ce_C, agreed_C


class _ShapeExponents:
    """The exponents of 2 of the tail's shape, beta t / log 2, for some of the positions at a time."""

    def __init__(self, shape: TailShape) -> None:
        basis, factor = shape.basis, 1 / (shape.temperature * math.log(2))
        self._softcap, self._factor = basis.softcap, factor
        before = factor if self._softcap is None else 1 / self._softcap
        self._offset_V = basis.offset.float() * before
        self._coordinates_NR = shape.coordinates_NR.float() * before
        self._directions_RV = basis.directions.float().T.contiguous()
        self._buffer_CV = torch.empty(0, 0)

    def __call__(self, rows: slice, vocab_size: int) -> Tensor:
        """[C, vocab_size], valid until the next call."""
        coordinates_CR = self._coordinates_NR[rows]
        if len(self._buffer_CV) < len(coordinates_CR):
            self._buffer_CV = torch.empty(len(coordinates_CR), vocab_size)
        y_CV = self._buffer_CV[: len(coordinates_CR)]
        known_CV = y_CV[:, : len(self._offset_V)]
        torch.addmm(self._offset_V, coordinates_CR, self._directions_RV, out=known_CV)
        if self._softcap is not None:
            known_CV.tanh_().mul_(self._softcap * self._factor)
        y_CV[:, len(self._offset_V) :] = _IMPOSSIBLE
        return y_CV


def _float32(part: Tensor) -> Array:
    return part.detach().float().contiguous().numpy()
