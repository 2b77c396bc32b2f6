"""KL and cross-entropy of positions by the kernel of `loss_triton`: what a GPU computes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..models.output_layer import OutputLayer
from ..targets.basis import TailBasis
from .flat_targets import FlatTargets, TailShape
from .loss_triton import loss_rows

_ALIGNED = 16
"""Triton loads and stores several places at once where their number is a multiple of this."""
_HEAD = 32
"""Entries of a row that a program takes together."""
_RANK = 32
"""Coordinates that it takes together."""


class Entries(NamedTuple):
    """A KL as sum of w (log p - log q) over single tokens and, where there is one, the term of the tail R."""

    ids_NK: Tensor
    """-1 where unused."""
    weights_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor
    """log p_T(R), -inf where the tail has no term."""

    @classmethod
    def of(cls, target: FlatTargets) -> Entries | None:
        """None for a treatment of the tail that has another form."""
        if target.tail_mode not in ("shape", "bucket", "drop", "renormalize_teacher"):
            return None
        log_p_NK, log_tail_N = target.log_p_NK, target.log_tail_N
        if target.tail_mode == "renormalize_teacher":
            log_mass_N1 = torch.logsumexp(log_p_NK, -1, keepdim=True)
            log_p_NK = log_p_NK - torch.where(torch.isneginf(log_mass_N1), 0.0, log_mass_N1)
        weights_NK = log_p_NK.exp()
        if target.samples is not None:  # no entry is both
            weights_NK = weights_NK + target.samples[0]
            log_p_NK = torch.maximum(log_p_NK, target.samples[1])
        if target.samples is not None or target.tail_mode not in ("shape", "bucket"):
            log_tail_N = torch.full_like(log_tail_N, -math.inf)
        parts = (part.float().contiguous() for part in (weights_NK, log_p_NK, log_tail_N))
        return cls(target.token_ids_NK.contiguous(), *parts)

    @classmethod
    def none(cls, labels_N: Tensor) -> Entries:
        """Of positions that have labels alone."""
        empty_NK = labels_N.new_empty(len(labels_N), 0)
        log_tail_N = torch.full(labels_N.shape, -math.inf, device=labels_N.device)
        return cls(empty_NK, empty_NK.float(), empty_NK.float(), log_tail_N)


class TritonRows:
    """Loss and gradient of N positions, some at a time, in place over the product of the output layer.

    All arithmetic is float32. The product of coordinates and directions of a tail's shape is in TF32 where that of the
    output layer is in half precision, which leaves out the last 13 bits of its factors, up to 2^-10 of them.
    """

    def __init__(self, entries: Entries, shape: TailShape | None, labels_N: Tensor, temperature: float) -> None:
        self._entries, self._labels_N, self._beta = entries, labels_N.contiguous(), 1.0 / temperature
        self._basis = None if shape is None else shape.basis
        self._coordinates_NR = None if shape is None else shape.coordinates_NR.float().contiguous()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a launch is no part of a compiled graph
    def __call__(
        self, product_CV: Tensor, rows: slice, kd_scale_C: Tensor, ce_scale_C: Tensor, layer: OutputLayer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KL_T, CE and whether both have the same first choice [C], of the positions `rows`.

        Bias, scale and soft-cap of `layer` make logits x of the product [C, V], which is float32, bfloat16 or float16;
        up to 15 places of the room between its rows are overwritten. In its place comes the gradient with respect to
        it: of sum(kd_scale * KL_T) by z = x / T and of sum(ce_scale * CE) by x, each times dx / d product. The CE of a
        label outside the vocabulary is NaN.
        """
        assert product_CV.stride(1) == 1
        count, vocab_size = product_CV.shape
        device, basis, coordinates_NR = product_CV.device, self._basis, self._coordinates_NR
        entries = Entries(*(part[rows] for part in self._entries))
        k = entries.ids_NK.shape[1]
        kl_C, ce_C = (torch.empty(count, device=device) for _ in range(2))  # each aligned, whatever the count
        agreed_C = torch.empty(count, dtype=torch.bool, device=device)
        constants = launch_constants(
            product_CV.dtype, softcap=layer.softcap is not None, softened=self._beta != 1.0, basis=basis
        )
        with torch.cuda.device(product_CV.get_device()):  # -1 for a CPU: no change
            loss_rows[(triton.cdiv(count, constants["ROWS"]),)](
                x_ptr=product_CV,
                stride=product_CV.stride(0),
                bias_ptr=layer.bias,
                scale=layer.scale,
                softcap=layer.softcap or 0.0,
                ids_ptr=entries.ids_NK,
                weights_ptr=entries.weights_NK,
                log_p_ptr=entries.log_p_NK,
                entries_ptr=torch.empty(count, k, device=device),
                log_tail_ptr=entries.log_tail_N,
                labels_ptr=self._labels_N[rows],
                kd_ptr=kd_scale_C,
                ce_ptr=ce_scale_C,
                z_ptr=None if coordinates_NR is None else coordinates_NR[rows],
                offset_ptr=None if basis is None else basis.offset,
                u_ptr=None if basis is None else basis.directions,
                token_stride=0 if basis is None else basis.directions.stride(0),
                coordinate_stride=0 if basis is None else basis.directions.stride(1),
                shape_softcap=0.0 if basis is None else basis.softcap or 0.0,
                kl_out_ptr=kl_C,
                ce_out_ptr=ce_C,
                agreed_ptr=agreed_C,
                count=count,
                size=vocab_size,
                width=min(max(product_CV.stride(0), vocab_size), -(-vocab_size // _ALIGNED) * _ALIGNED),
                k=k,
                rank=0 if basis is None else basis.rank,
                known=0 if basis is None else min(basis.vocab_size, vocab_size),
                beta=self._beta,
                **constants,
            )
        return kl_C, ce_C, agreed_C


def launch_constants(dtype: torch.dtype, *, softcap: bool, softened: bool, basis: TailBasis | None) -> dict[str, Any]:
    """What the kernel is compiled for: products in `dtype`, whether logits are soft-capped and T is not 1, and a shape.

    A program takes few rows of a warp's width, 16 bytes a thread. With a shape it takes more, which share the
    directions that it loads, on all the warps that its registers allow, and it loads ahead: such programs are few.
    """
    whole, rank = dtype == torch.float32, 0 if basis is None else basis.rank
    many_numbers = whole or (softened and rank > _RANK)  # more than 128 registers a thread, of 65,536
    return {
        "SOFTCAP": softcap,
        "SOFTENED": softened,
        "SHAPE": basis is not None,
        "SHAPE_SOFTCAP": basis is not None and basis.softcap is not None,
        "PRECISION": "tf32x3" if whole else "tf32",
        "ROWS": 4 if basis is None else 16,
        "TILE": (512 if basis is None else 256) // dtype.itemsize,
        "HEAD": _HEAD,
        "RANK": min(max(16, triton.next_power_of_2(rank)), _RANK),
        "MORE": rank > _RANK,
        "STAGES": 1 if basis is None else 3,
        "num_warps": 4 if basis is None else 8 if many_numbers else 16,
    }
