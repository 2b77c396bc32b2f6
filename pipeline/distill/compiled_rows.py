"""KL and cross-entropy of single positions by the kernels of `row_kernels`: what a CPU computes in float32."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..base.kernels import in_threads
from .flat_targets import FlatTargets, TailShape
from .row_kernels import Array, loss_rows_bfloat16, loss_rows_float32

PIECE = 16
"""Positions per piece of work of a thread."""
_IMPOSSIBLE = -1e30
"""Exponent of a token that the basis does not have; finite, as 0 times it must be 0."""


class CompiledRows:
    """Loss and gradient of N positions, some at a time, from their logits in float32 or bfloat16.

    `target` has a shape or a bucket as its tail; None leaves the cross-entropy. Terms are float32, sums float64.
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
        if self._exponents is None:
            y_CV, offset_V = x_CV.new_empty(count, 0), torch.empty(0)
        else:
            y_CV, offset_V = self._exponents(rows, vocab_size, x_CV.dtype)
        x, y = _bits(x_CV), _bits(y_CV)
        target = [part[rows] for part in (self._ids, self._log_p, self._log_tail, self._labels)]
        scales = _float32(kd_scale_C), _float32(ce_scale_C)
        results = kl_C.numpy(), ce_C.numpy(), agreed_C.numpy()
        kernel = loss_rows_float32 if x_CV.dtype == torch.float32 else loss_rows_bfloat16

        def work(start: int, stop: int) -> None:
            parts = (tuple(part[start:stop] for part in group) for group in (target, scales, results))
            kernel(self._beta, offset_V.numpy(), x[start:stop], y[start:stop], *parts)

        in_threads(work, count, PIECE)
        return kl_C, ce_C, agreed_C


class _ShapeExponents:
    """The exponents of 2 of the tail's shape, beta t / log 2, for some of the positions at a time, as offset + y."""

    def __init__(self, shape: TailShape) -> None:
        self._basis, self._factor = shape.basis, 1 / (shape.temperature * math.log(2))
        self._softcap = self._basis.softcap
        before = self._factor if self._softcap is None else 1 / self._softcap
        self._coordinates_NR = shape.coordinates_NR.float() * before
        self._known_V = self._basis.offset.float() * before
        self._offset_V = self._directions_RV = self._buffer_CV = torch.empty(0)

    def __call__(self, rows: slice, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """y [C, vocab_size], valid until the next call, and the offset [vocab_size] float32.

        The product is in `dtype`. In bfloat16 that moves t by 0.02 nats (root mean square under p^, SmolLM2, r = 16 to
        128), and KL(p^ || p^ so rounded) is 2e-4 nats, a thousandth of what a shape misses.
        """
        coordinates_CR = self._coordinates_NR[rows].to(dtype)
        known = len(self._known_V)
        if len(self._buffer_CV) < len(coordinates_CR):
            self._directions_RV = self._basis.directions.to(dtype).T.contiguous()
            self._offset_V = torch.zeros(vocab_size)
            if self._softcap is None:
                self._offset_V[:known] = self._known_V
            self._offset_V[known:] = _IMPOSSIBLE
            self._buffer_CV = torch.zeros(len(coordinates_CR), vocab_size, dtype=dtype)
        y_CV = self._buffer_CV[: len(coordinates_CR)]
        torch.mm(coordinates_CR, self._directions_RV, out=y_CV[:, :known])
        if self._softcap is not None:
            t_CV = (y_CV[:, :known] + self._known_V).tanh_()
            y_CV[:, :known] = t_CV.mul_(self._softcap * self._factor)
        y_CV[:, known:] = 0
        return y_CV, self._offset_V


def _float32(part: Tensor) -> Array:
    return part.detach().float().contiguous().numpy()


def _bits(part: Tensor) -> Array:
    """float32 as it is, and bfloat16 as uint16, which NumPy has."""
    return part.numpy() if part.dtype == torch.float32 else part.view(torch.int16).numpy().view(np.uint16)
