"""Tail bases for a grid of settings from one fit for each rank.

A fit takes a minute or two, and a grid has dozens of settings. What the head changes most is how much of each token the
tails hold: with the directions of one fit, an offset for each head that makes the mean of p^ that of p, token by token,
serves nearly as well as a fit of its own. On SmolLM2 (rank 32, step 0.15), the top 16 with directions fitted for the
top 12: KL(p || p^) at T = 1 and 2 0.176 and 0.205, and the gradient of a near student off by 1.9 and 4.5 %; with their
own 0.175, 0.205, 1.8 and 4.4; without the correction 0.177, 0.205, 2.6 and 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..capture.learning import fitted_basis
from ..models.teacher import Teacher
from ..store.basis_file import StoredBasis
from ..store.coordinates import CoordinateCodec
from ..targets.basis_fit import TEMPERATURES, head_means, prediction_from_heads
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .target_error import Shapes, States

FIT_SUPPORT = Support("topk", k=16)
"""That directions are fitted for: few entries, as beside a shape."""
_POSITIONS = 4096
"""That the offsets are corrected by."""
_BLOCK = 128
_LEAST = 1e-4
"""Probability, summed over positions, below which nothing is known of a token."""


def grid_bases(
    teacher: Teacher, states_ND: Tensor, rank: int, step: float, heads: Sequence[SparseTargets], positions: int
) -> list[StoredBasis]:
    """A basis of a rank for each kind of targets [N]; `states_ND` are the teacher's at the same positions.

    `positions`: of the finished cache. Raises as `targets.basis_fit.learn_basis`.
    """
    support = replace(FIT_SUPPORT, k=min(FIT_SUPPORT.k or 1, teacher.vocab_size))
    coordinates = CoordinateCodec(rank, step, predicted=True)
    stored = fitted_basis(states_ND, teacher, support, coordinates, positions, f"plan: basis of rank {rank}")
    # Every so many: neighbours in a text are alike.
    some = slice(None, None, -(-len(states_ND) // _POSITIONS))
    device = teacher.placement.device
    hidden_ND = states_ND[some].to(device)
    z_NR = stored.to_coordinates.coordinates(hidden_ND.cpu().float()).to(device)
    shapes = Shapes((z_NR / step).round() * step, stored.basis().to(device))
    fits = _fitted_to_heads(States(hidden_ND, teacher.output_layer), shapes, [head[some].to(device) for head in heads])
    offset_step = float(stored.offset_step[0, 0])
    return [
        replace(
            stored,
            offset=stored.offset + np.rint(fit.correction.cpu().numpy() / offset_step).astype(np.int32),
            prediction=prediction_from_heads(torch.cat(fit.means_CR), z_NR).float().cpu().numpy(),
        )
        for fit in fits
    ]


@dataclass
class _HeadFit:
    """What one kind of heads adds to a basis."""

    exact_V: Tensor
    """p outside the heads, summed over positions and temperatures."""
    shaped_V: Tensor
    """p^ likewise."""
    means_CR: list[Tensor]
    """Mean directions of the heads, in blocks."""

    @property
    def correction(self) -> Tensor:
        """What is added to the offsets, nats."""
        return ((self.exact_V + _LEAST) / (self.shaped_V + _LEAST)).log()


@torch.inference_mode()
def _fitted_to_heads(teacher: States, shapes: Shapes, heads: Sequence[SparseTargets]) -> list[_HeadFit]:
    count, vocab_size = len(teacher.hidden_ND), len(teacher.output_layer.weight)
    zero_V = torch.zeros(vocab_size, device=teacher.hidden_ND.device)
    fits = [_HeadFit(zero_V.clone(), zero_V.clone(), []) for _ in heads]
    most = min(2 * max(head.token_ids.shape[-1] for head in heads), vocab_size)
    every = slice(None)
    for first in range(0, count, _BLOCK):
        some = slice(first, first + _BLOCK)
        logits_CV, spread_CV = teacher(some, every), shapes(some, every)
        top_CM = logits_CV.topk(most, -1, sorted=False).indices
        outside = []
        for head, fit in zip(heads, fits, strict=True):
            ids_CK = torch.where(head.head_mask[some], head.token_ids[some], -1)
            outside.append(~(top_CM.unsqueeze(-1) == ids_CK.unsqueeze(1)).any(-1))
            fit.means_CR.append(head_means(head[some], shapes.basis.directions))
        for t in TEMPERATURES:
            p_CV = (logits_CV / t).softmax(-1)
            e_CV = spread_CV / t
            # No overflow on the head, which does not count.
            largest_C1 = e_CV.scatter(-1, top_CM, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e30)
            e_CV = (e_CV - largest_C1).clamp_(max=80.0).exp_()
            p_CM, e_CM = p_CV.gather(-1, top_CM), e_CV.gather(-1, top_CM)
            p_CV.scatter_(-1, top_CM, 0.0)
            e_CV.scatter_(-1, top_CM, 0.0)
            masses_C, sums_C = p_CV.sum(-1), e_CV.sum(-1)
            exact_V = p_CV.sum(0)
            for outside_CM, fit in zip(outside, fits, strict=True):
                exact_CM, shaped_CM = p_CM * outside_CM, e_CM * outside_CM
                scale_C = (masses_C + exact_CM.sum(-1)) / (sums_C + shaped_CM.sum(-1)).clamp(min=1e-30)
                fit.exact_V.add_(exact_V, alpha=1 / t)
                fit.exact_V.index_add_(0, top_CM.flatten(), exact_CM.flatten(), alpha=1 / t)
                fit.shaped_V.add_(scale_C @ e_CV, alpha=1 / t)
                fit.shaped_V.index_add_(0, top_CM.flatten(), (shaped_CM * scale_C.unsqueeze(-1)).flatten(), alpha=1 / t)
    return fits
