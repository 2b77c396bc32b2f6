"""The output layer inside the fused loss: logits of some positions, then their gradient back to states and weights."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.output_layer import OutputLayer, project, room_for_logits
from .sums import promote

_PRODUCT_ROWS = 8192
"""Rows of the weights whose gradient is a product in half precision before it is added in float32."""


class Projection(Protocol):
    """Hidden states [N, D] to logits [N, V], before the architecture's scale and soft-cap; some positions at a time."""

    bias_V: Tensor | None
    """What the caller adds to the logits, in float32."""

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] in the dtype of the states; the caller may overwrite it."""

    def add_gradient(self, chunk: slice, grad_CV: Tensor) -> None:
        """Take the gradient with respect to the logits of the last `logits(chunk)`, in their dtype."""

    def gradients(self) -> list[Tensor | None]:
        """Of the hidden states, then of `parameters`: float32 sums; None where none is needed."""


def parameters(output_layer: OutputLayer) -> list[Tensor | None]:
    """The tensors through which the loss reaches the output layer's gradients."""
    if output_layer.module is None:
        return [output_layer.weight, output_layer.bias]
    return [p for p in output_layer.module.parameters() if p.requires_grad]


def projection_of(
    output_layer: OutputLayer,
    hidden_ND: Tensor,
    needed: tuple[bool, ...],
    *,
    rows: int,
    mean_of: int,
    autocast: torch.dtype | None,
) -> Projection:
    """The output layer over these hidden states.

    `needed` says whether the states and each of `parameters` need a gradient. At most `rows` positions are computed at
    once. Sums over the positions of a chunk are means of `mean_of`, to keep them in float16's range. `autocast` is the
    dtype in which the layer's own module computes, None for its own.
    """
    if output_layer.module is None:
        return _Linear(output_layer, hidden_ND, needed, min(rows, len(hidden_ND)), mean_of)
    return _Module(output_layer.module, hidden_ND, needed, autocast)


class _Linear:
    """A plain linear layer: products in the dtype of the states, into one buffer."""

    def __init__(
        self, layer: OutputLayer, hidden_ND: Tensor, needed: tuple[bool, ...], rows: int, mean_of: int
    ) -> None:
        need_hidden, need_weight, need_bias = needed
        dtype = promote(hidden_ND[:0]).dtype
        self._hidden_ND, self._mean_of = hidden_ND, mean_of
        self._matrix_VD = layer.weight.to(hidden_ND.dtype)
        self.bias_V = layer.bias
        self._grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        self._grad_weight_VD = torch.zeros_like(layer.weight, dtype=dtype) if need_weight else None
        self._grad_bias_V = torch.zeros_like(layer.bias, dtype=dtype) if need_bias and layer.bias is not None else None
        self._buffer_CV = room_for_logits(hidden_ND, rows, len(self._matrix_VD))

    def logits(self, chunk: slice) -> Tensor:
        return project(self._hidden_ND[chunk], self._matrix_VD, self._buffer_CV[: chunk.stop - chunk.start])

    def add_gradient(self, chunk: slice, grad_CV: Tensor) -> None:
        if self._grad_hidden_ND is not None:
            torch.mm(grad_CV, self._matrix_VD, out=self._grad_hidden_ND[chunk])
        if self._grad_weight_VD is not None:
            _add_product(self._grad_weight_VD, grad_CV, self._hidden_ND[chunk], self._mean_of)
        if self._grad_bias_V is not None:
            self._grad_bias_V += grad_CV.sum(0, dtype=self._grad_bias_V.dtype)

    def gradients(self) -> list[Tensor | None]:
        return [self._grad_hidden_ND, self._grad_weight_VD, self._grad_bias_V]


class _Module:
    """The model's own module, such as a layer with adapters: its forward pass and autograd, some positions at a time."""

    bias_V: Tensor | None = None

    def __init__(
        self, module: nn.Module, hidden_ND: Tensor, needed: tuple[bool, ...], autocast: torch.dtype | None
    ) -> None:
        self._module, self._needed = module, needed
        # float16 has too small a range for sums of gradients over positions.
        self._hidden_ND = hidden_ND.float() if autocast == torch.float16 else hidden_ND
        self._autocast = None if autocast == torch.float16 else autocast
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._grads: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=promote(tensor[:0]).dtype) if need else None
            for tensor, need in zip([hidden_ND, *self._parameters], needed, strict=True)
        ]
        self._inputs_CD = self._logits_CV = hidden_ND[:0]

    def logits(self, chunk: slice) -> Tensor:
        device = self._hidden_ND.device.type
        self._inputs_CD = self._hidden_ND[chunk].detach().requires_grad_(any(self._needed))
        # Not cached: each chunk's graph is freed, and casts of the weights would belong to the first.
        with (
            torch.set_grad_enabled(any(self._needed)),
            torch.autocast(device, self._autocast, enabled=self._autocast is not None, cache_enabled=False),
        ):
            self._logits_CV = self._module(self._inputs_CD)
        return self._logits_CV.detach().clone()

    def add_gradient(self, chunk: slice, grad_CV: Tensor) -> None:
        wanted = [t for t, need in zip([self._inputs_CD, *self._parameters], self._needed, strict=True) if need]
        if not wanted:
            return
        found = iter(torch.autograd.grad(self._logits_CV, wanted, grad_CV, allow_unused=True))
        for number, total in enumerate(self._grads):
            gradient = None if total is None else next(found)
            if total is not None and gradient is not None:
                (total[chunk] if number == 0 else total).add_(gradient)

    def gradients(self) -> list[Tensor | None]:
        return self._grads


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, mean_of: int) -> None:
    """total += grad^T hidden: products in the dtype of the hidden states, sums in that of the total.

    `mean_of` divides the hidden states before a product in float16 and multiplies it after, to keep it in range.
    """
    if grad_CV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
        return
    if _adds_wider(grad_CV.device, grad_CV.dtype):
        torch.addmm(total_VD, grad_CV.T, hidden_CD, out_dtype=total_VD.dtype, out=total_VD)
        return
    hidden_CD = hidden_CD if mean_of == 1 else hidden_CD / mean_of
    for first in range(0, len(total_VD), _PRODUCT_ROWS):
        block = slice(first, first + _PRODUCT_ROWS)
        total_VD[block].add_(grad_CV[:, block].T @ hidden_CD, alpha=mean_of)


@cache
def _adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product in half precision to a float32 matrix as it computes it: on a GPU, as of torch 2.13.

    Without it, each chunk writes and reads a product of the size of the weights.
    """
    total, factor = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
